"""The train step of a recipe, or its image encoder, compiled for devices that need not exist.

Runs in a process of its own (`worker`), whose environment keeps compilers away from any device.
"""

import dataclasses
import math
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from medsiglip_jax.model import api, sharding, towers, tree
from medsiglip_jax.model.attention import RECOMPUTES, used_in
from medsiglip_jax.model.config import ModelConfig, named
from medsiglip_jax.model.weights import layouts
from medsiglip_jax.plan import collectives
from medsiglip_jax.plan.topologies import Topology
from medsiglip_jax.train import build, flops, freeze
from medsiglip_jax.train.objectives.objective import Labels
from medsiglip_jax.train.recipe import Recipe
from medsiglip_jax.train.step import State, place_shapes, state_shapes

# Architectures of published checkpoints, so that a plan downloads nothing.
_PUBLISHED = {
    "google/medsiglip-448": "so400m-448",
    "google/siglip-so400m-patch14-384": "so400m-384",
    "google/siglip-so400m-patch14-224": "so400m-224",
}
# Of a run whose classes only its data would tell.
_CLASSES = tuple(map(str, range(10)))


def compiled(
    recipe: Recipe, topology: Topology, dtype: str, embed: bool, limit_mib: int | None
) -> dict:
    """Compiles a train step, or with `embed` the image encoder on a batch.

    Args:
        recipe: the run; its data are not read.
        topology: the devices to compile for.
        dtype: instead of the recipe's; for `embed` also "float16".
        embed: compile the image encoder instead of the train step.
        limit_mib: the memory that libtpu is told there is. If it is too little, it stops after
            seconds and reports the least that it needs. Compilers for GPUs do not.

    Returns:
        `compiled`, `attention` (of the image tower), `flops`, `state_bytes`, `largest` (bytes of
        arrays by name), `trained` and `parameters`; with `embed` `text_tower_bytes`, of weights
        that lie beside the image tower; if it was compiled `memory` (bytes by part),
        `xla_flops`, `collectives` and `kernels` (how many calls of which library the program has;
        None: not known), else `needed` (bytes) and `message`. All sizes are those of one device.

    Raises:
        ValueError: the topology does not exist, or the recipe cannot run on it.
    """
    devices = topology.compiler_devices()
    start = time.perf_counter()
    recipe = dataclasses.replace(recipe, dtype=dtype)
    lowered, facts = (_embedding if embed else _step)(recipe, devices)
    with tempfile.TemporaryDirectory() as folder:
        result = _compile(lowered, devices[0].platform, limit_mib, folder)
    seconds = time.perf_counter() - start
    others = facts.pop("other_weights", 0)
    if result["compiled"]:
        result["memory"]["other weights"] = others
        result["memory"]["peak"] += others
    elif result["needed"] is not None:
        result["needed"] += others
    return {**result, **facts, "seconds": seconds, "compiler_bytes": _most_memory()}


def _most_memory() -> int | None:
    """The peak memory of this process in bytes; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _compile(lowered: Any, platform: str, limit_mib: int | None, folder: str) -> dict:
    options: dict[str, Any] = {}
    if platform == "tpu":
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    if platform == "tpu" and limit_mib:
        options = {"xla_tpu_max_hbm_size_mib": limit_mib}
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return {"compiled": False, **_out_of_memory(str(error))}
    text = _text(program, platform, Path(folder))
    result = {"compiled": True, "memory": memory_of(program)}
    result |= {"xla_flops": _xla_flops(program), "collectives": None, "kernels": None}
    if text is not None:
        by_kind = collectives.read(text, platform)
        result["collectives"] = {kind: dataclasses.asdict(c) for kind, c in by_kind.items()}
        result["kernels"] = dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text)))
    return result


def _text(program: Any, platform: str, folder: Path) -> str | None:
    """The optimised program; None: not known.

    For TPUs what the compiler has dumped: libtpu 0.0.52 fails at `program.as_text()` where
    collectives overlap with computation on v4, v5p and 7x ("async-update instruction should have 1
    operands").
    """
    if platform != "tpu":
        return program.as_text()
    texts = list(folder.glob("*.after_optimizations.txt"))
    return texts[0].read_text() if len(texts) == 1 else None


def _xla_flops(program: Any) -> float | None:
    """None if libtpu cannot parse the program that it has compiled, and for GPUs."""
    try:
        return (program.cost_analysis() or {}).get("flops")
    except jax.errors.JaxRuntimeError:
        return None


def architecture(recipe: Recipe) -> ModelConfig:
    """The architecture of a recipe; reads the header of a local checkpoint, downloads nothing."""
    if recipe.init is None:
        return recipe.model_config
    if recipe.init in _PUBLISHED:
        return named(_PUBLISHED[recipe.init])
    if not Path(recipe.init).exists():
        raise ValueError(
            f"init is {recipe.init!r}, which is no local checkpoint, and a plan downloads nothing; "
            "give a local one, or --config.init=None --config.model=so400m-448"
        )
    return layouts.open_checkpoint(recipe.init).config


def _step(recipe: Recipe, devices: list[Any]) -> tuple[Any, dict]:
    config, mesh, objective = architecture(recipe), build.mesh_of(recipe, devices), recipe.objective
    if "txt" in objective.towers and not (config.vision and config.text):
        raise ValueError(f"init {recipe.init!r} has one tower; {objective.name} needs both")
    compute, labels = build.compute_of(recipe, config, mesh, devices[0]), _labels(recipe)
    whole, rows = _shardings(mesh, devices)
    params = _placed_params(recipe, config, mesh, whole)
    added = jax.eval_shape(lambda: build.additions(recipe, params, config, labels))
    params = freeze.join(params, _placed(added, whole))
    part, optimizer = build.what_trains(recipe, params)
    trained, frozen = _split(part, params)
    state = state_shapes(trained, optimizer, frozen, recipe.ema is not None)
    loss = objective.loss(config, compute, labels, recipe.loss_chunk)
    step: Any = build.train_step(recipe, loss, optimizer, state, mesh)
    batch = _placed(objective.batch(config, recipe.batch_size, labels), rows)
    count = flops.of_step(recipe, config, trained, frozen, compute.attention)
    assert config.vision is not None
    facts = _facts(state, count, used_in(config.vision, compute.attention, recipe.dtype))
    split = mesh.shape["data"] if mesh else 1
    facts["largest"] |= _activations(recipe, config, trained, split, facts["attention"])
    facts |= {"trained": tree.size(trained), "parameters": tree.size(params)}
    return step.lower(state, batch), facts


def _shardings(mesh: Mesh | None, devices: list[Any]) -> tuple[Any, Any]:
    """The shardings of what every device holds whole, and of the rows of a batch."""
    if mesh is None:
        return SingleDeviceSharding(devices[0]), SingleDeviceSharding(devices[0])
    return sharding.replicated(mesh), sharding.batch_sharding(mesh)


def _placed(shapes: Any, place: Any) -> Any:
    return place_shapes(shapes, jax.tree.map(lambda _: place, shapes))


def _placed_params(recipe: Recipe, config: ModelConfig, mesh: Mesh | None, whole: Any) -> Any:
    shapes = towers.param_shapes(config)
    if mesh and recipe.mesh and recipe.mesh.fsdp:
        return place_shapes(shapes, sharding.param_shardings(shapes, mesh, fsdp=True))
    return _placed(shapes, whole)


def _labels(recipe: Recipe) -> Labels:
    """The labels of a recipe, as far as they are known without its data."""
    data = recipe.data[0]
    if isinstance(data.label, tuple):
        return Labels(data.label, multi_label=True)
    return Labels(data.classes or _CLASSES)


def _activations(
    recipe: Recipe, config: ModelConfig, trained: Any, devices: int, attention: str
) -> dict[str, int]:
    """Bytes of the largest activations, which grow with the batch, by name."""
    v, dense = config.vision, recipe.remat != "block"
    assert v is not None
    rows = recipe.batch_size // devices // recipe.objective.accumulate
    tokens = rows * v.num_tokens
    size = jnp.dtype(recipe.dtype).itemsize
    kept = v.depth if "img" in trained else 1  # blocks with activations kept for a gradient
    sizes = {
        "image blocks: hidden layers": size * tokens * v.mlp_dim * (kept if dense else 1),
        "image blocks: inputs": size * tokens * v.width * kept,
    }
    if attention not in RECOMPUTES:
        logits = 4 * tokens * v.num_heads * v.num_tokens
        sizes["image blocks: attention logits"] = logits * (kept if recipe.remat == "none" else 1)
    return sizes | recipe.objective.loss_bytes(recipe.batch_size // devices, recipe.loss_chunk)


def _split(part: freeze.Partition, params: Any) -> tuple[Any, Any]:
    """`part.split` of abstract arrays; the pieces of a stack keep its sharding."""
    places = tree.flatten(jax.tree.map(lambda x: x.sharding, params))
    cut = jax.eval_shape(part.split, params)

    def place(path: str, x: Any) -> Any:
        stack = path.replace(freeze.FROZEN_STACK, tree.STACK)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[stack])

    trained, frozen = (tree.map_with_path(place, half) for half in cut)
    return trained, frozen


def _embedding(recipe: Recipe, devices: list[Any]) -> tuple[Any, dict]:
    """The image encoder as `Model.encode_image` calls it."""
    config, mesh = architecture(recipe), build.mesh_of(recipe, devices)
    if config.vision is None:
        raise ValueError("this model has no image tower")
    compute = build.compute_of(recipe, config, mesh, devices[0])
    whole, rows = _shardings(mesh, devices)
    params = _placed(towers.param_shapes(config, recipe.dtype), whole)
    model = api.Model(params, config, compute=compute, mesh=mesh)
    size = config.vision.image_size
    images = jax.ShapeDtypeStruct((recipe.batch_size, size, size, 3), jnp.uint8, sharding=rows)
    count = flops.of_embedding(config, params, recipe.batch_size)
    facts = _facts(params, count, used_in(config.vision, compute.attention, recipe.dtype))
    facts |= {"trained": 0, "parameters": tree.size(params)}
    # The program takes only what it reads; the other weights are on the device all the same.
    others = {name: x for name, x in params.items() if name != "img"}
    facts["other_weights"] = _facts(others, count, "")["state_bytes"]
    facts["text_tower_bytes"] = _facts(params.get("txt", {}), count, "")["state_bytes"]
    return model._image.lower(params, images), facts


def _facts(state: State, count: flops.Flops, attention: str) -> dict:
    def bytes_per_device(x: Any) -> int:
        return int(jnp.dtype(x.dtype).itemsize) * math.prod(x.sharding.shard_shape(x.shape))

    held = [(jax.tree_util.keystr(p, simple=True, separator="/"), x)
            for p, x in jax.tree_util.tree_leaves_with_path(state)]  # fmt: skip
    largest = sorted(held, key=lambda pair: -bytes_per_device(pair[1]))[:5]
    return {
        "attention": attention,
        "flops": dataclasses.asdict(count),
        "state_bytes": sum(bytes_per_device(x) for _, x in held),
        "largest": {path: bytes_per_device(x) for path, x in largest},
    }


def memory_of(program: Any) -> dict[str, int]:
    """Bytes of a compiled program on a device, by part, and their `peak`."""
    stats = program.memory_analysis()
    kinds = {"arguments": "argument", "outputs": "output", "aliased": "alias",
             "temporaries": "temp", "code": "generated_code"}  # fmt: skip
    parts = {name: getattr(stats, f"{kind}_size_in_bytes") for name, kind in kinds.items()}
    # Outputs that are written in place of donated arguments take no memory of their own.
    peak = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "peak": peak}


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a program does not fit the memory of a device."""
    return "RESOURCE_EXHAUSTED" in str(error)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _out_of_memory(message: str) -> dict:
    """The need in "the total memory required for HLO temporaries (58.10G) exceeds available HBM
    (15.75G)" or in "Used 20.1G of 15.75G hbm"."""
    number = r"([\d.]+)([KMGT]?)"
    sizes = re.search(rf"required[^(]*\({number}\) exceeds[^(]*\({number}\)", message) or re.search(
        rf"Used {number} of {number} hbm", message
    )
    needed = None if sizes is None else round(float(sizes[1]) * _UNITS[sizes[2]])
    return {"needed": needed, "message": message.split("\n")[0]}
