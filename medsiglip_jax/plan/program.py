"""The train step of a recipe, and the embedding function, compiled for devices that are not here.

Runs in a process of its own (`worker`), whose environment keeps libtpu away from any TPU.
"""

import dataclasses
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from medsiglip_jax.model import api, sharding, towers, tree
from medsiglip_jax.model.attention import RECOMPUTES, used
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


def compiled(recipe: Recipe, topology: Topology, embed: bool, limit_mib: int | None) -> dict:
    """Compiles a step, or with `embed` the image encoder on a batch.

    Args:
        recipe: what is run; its data are not read.
        topology: for what.
        embed: the embedding function instead of the train step.
        limit_mib: memory that the compiler is made to believe in. With too little it stops after
            seconds, and says how much it needs at the least.

    Returns:
        `compiled`, `flops`, `state_bytes`, `largest` (bytes of arrays by name), `trained` and
        `parameters`; if it was compiled `memory` (bytes by part), `xla_flops` and `collectives`
        (None: not known), else `needed` (bytes) and `message`. All sizes are a device's.

    Raises:
        ValueError: a topology or a recipe that cannot be.
    """
    devices = _devices(topology)
    start = time.perf_counter()
    lowered, facts = (_embedding if embed else _step)(recipe, devices)
    with tempfile.TemporaryDirectory() as folder:
        result = _compile(lowered, limit_mib, folder)
    seconds = time.perf_counter() - start
    return {**result, **facts, "seconds": seconds, "compiler_bytes": _most_memory()}


def _most_memory() -> int | None:
    """Bytes that this process has held at most; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _compile(lowered: Any, limit_mib: int | None, folder: str) -> dict:
    options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    if limit_mib:
        options = {"xla_tpu_max_hbm_size_mib": limit_mib}
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"compiled": False, **_out_of_memory(str(error))}
    return {
        "compiled": True,
        "memory": _memory(program.memory_analysis()),
        "collectives": _collectives(Path(folder)),
        "xla_flops": _xla_flops(program),
    }


def _collectives(folder: Path) -> dict[str, dict] | None:
    """From the text that the compiler has written there, as `program.as_text()` has it: libtpu
    0.0.52 cannot read its own program back where collectives run beside other work on v4, v5p and
    7x ("async-update instruction should have 1 operands")."""
    texts = list(folder.glob("*.after_optimizations.txt"))
    if len(texts) != 1:
        return None
    found = collectives.read(texts[0].read_text())
    return {kind: dataclasses.asdict(c) for kind, c in found.items()}


def _xla_flops(program: Any) -> float | None:
    """None where libtpu cannot read its program back."""
    try:
        return float((program.cost_analysis() or {}).get("flops", 0))
    except jax.errors.JaxRuntimeError:
        return None


def _devices(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    chip, layout = topology.chip, "x".join(map(str, topology.layout))
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if set(topology.layout) == {1}:
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.platform}:{layout}",
            chip_config_name=chip.config, **more,
        )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        said = str(error).split("\n")[0].partition(": ")[2] or str(error)
        raise ValueError(f"topology {topology} does not exist: libtpu says: {said}") from None
    return list(found.devices)


def architecture(recipe: Recipe) -> ModelConfig:
    """Of what a recipe starts from; reads the header of a local checkpoint, downloads nothing."""
    if recipe.init is None:
        return recipe.model_config
    if recipe.init in _PUBLISHED:
        return named(_PUBLISHED[recipe.init])
    if not Path(recipe.init).exists():
        raise ValueError(
            f"init is {recipe.init!r}, which is not here, and a plan downloads nothing; give a "
            "local checkpoint, or --config.init=None --config.model=so400m-448"
        )
    return layouts.open_checkpoint(recipe.init).config


def _step(recipe: Recipe, devices: list[Any]) -> tuple[Any, dict]:
    config, mesh = architecture(recipe), build.mesh_of(recipe, devices)
    objective = recipe.objective
    if "txt" in objective.towers and not (config.vision and config.text):
        raise ValueError(f"init {recipe.init!r} has one tower; {objective.name} needs both")
    compute = build.compute_of(recipe, mesh, devices[0].platform)
    one = SingleDeviceSharding(devices[0])
    labels = _labels(recipe)
    params = towers.param_shapes(config)
    fsdp = bool(recipe.mesh and recipe.mesh.fsdp)
    places = (
        jax.tree.map(lambda _: one, params)
        if mesh is None
        else sharding.param_shardings(params, mesh, fsdp)
    )
    params = place_shapes(params, places)
    added = jax.eval_shape(lambda: build.additions(recipe, params, config, labels))
    whole = one if mesh is None else sharding.replicated(mesh)
    params = freeze.join(params, place_shapes(added, jax.tree.map(lambda _: whole, added)))
    part, optimizer = build.what_trains(recipe, params)
    trained, frozen = _split(part, params)
    state = state_shapes(trained, optimizer, frozen)
    loss = objective.loss(config, compute, labels, recipe.loss_chunk, mesh)
    step = build.train_step(recipe, loss, optimizer, state, mesh)
    rows = one if mesh is None else sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
        objective.batch(config, recipe.batch_size, labels),
    )
    count = flops.of_step(
        config, trained, frozen, recipe.batch_size, attention=compute.attention,
        dtype=recipe.dtype, remat=recipe.remat, unused=objective.unused(params),
        loss=objective.loss_flops(config, recipe.batch_size),
        encoded_twice=objective.accumulate > 1 and objective.negatives == "batch",
    )  # fmt: skip
    facts = _facts(state, count)
    facts["largest"] |= _activations(
        recipe, config, trained, mesh.shape["data"] if mesh else 1, compute.attention
    )
    facts |= {"trained": tree.size(trained), "parameters": tree.size(params)}
    return step.lower(state, batch), facts


def _labels(recipe: Recipe) -> Labels:
    """What the recipe tells of the labels that its data would have."""
    data = recipe.data[0]
    if isinstance(data.label, tuple):
        return Labels(data.label, multi_label=True)
    return Labels(data.classes or _CLASSES)


def _activations(
    recipe: Recipe, config: ModelConfig, trained: Any, devices: int, attention: str
) -> dict[str, int]:
    """Bytes of what the image tower and the loss make, by name: what grows with the batch."""
    v, dense = config.vision, recipe.remat != "block"
    assert v is not None
    rows = recipe.batch_size // devices // recipe.objective.accumulate
    tokens = rows * v.num_tokens
    size = jnp.dtype(recipe.dtype).itemsize
    kept = v.depth if "img" in trained else 1  # blocks of which something waits for a gradient
    sizes = {
        "image blocks: hidden layers": size * tokens * v.mlp_dim * (kept if dense else 1),
        "image blocks: inputs": size * tokens * v.width * kept,
    }
    if used(attention, v.num_tokens, recipe.dtype) not in RECOMPUTES:
        logits = 4 * tokens * v.num_heads * v.num_tokens
        sizes["image blocks: attention logits"] = logits * (kept if recipe.remat == "none" else 1)
    return sizes | recipe.objective.loss_bytes(recipe.batch_size // devices, recipe.loss_chunk)


def _split(part: freeze.Partition, params: Any) -> tuple[Any, Any]:
    """`part.split` of abstract arrays, whose stacks keep their sharding when they are cut."""
    places = tree.flatten(jax.tree.map(lambda x: x.sharding, params))
    cut = jax.eval_shape(part.split, params)

    def place(path: str, x: Any) -> Any:
        where = places[path.replace(freeze.FROZEN_STACK, tree.STACK)]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    trained, frozen = (tree.map_with_path(place, half) for half in cut)
    return trained, frozen


def _embedding(recipe: Recipe, devices: list[Any]) -> tuple[Any, dict]:
    """The image encoder as `Model.encode_image` calls it."""
    config, mesh = architecture(recipe), build.mesh_of(recipe, devices)
    if config.vision is None:
        raise ValueError("this model has no image tower")
    compute = build.compute_of(recipe, mesh, devices[0].platform)
    shapes, one = towers.param_shapes(config, recipe.dtype), SingleDeviceSharding(devices[0])
    whole, rows = (
        (one, one) if mesh is None else (sharding.replicated(mesh), sharding.batch_sharding(mesh))
    )
    params = place_shapes(shapes, jax.tree.map(lambda _: whole, shapes))
    model = api.Model(params, config, compute=compute, mesh=mesh)
    size = config.vision.image_size
    images = jax.ShapeDtypeStruct(
        (recipe.batch_size, size, size, 3), jnp.uint8, sharding=rows
    )  # fmt: skip
    facts = _facts(params, flops.of_embedding(config, params, recipe.batch_size))
    facts |= {"trained": 0, "parameters": tree.size(params)}
    return model._image.lower(params, images), facts


def _facts(state: State, count: flops.Flops) -> dict:
    def here(x: Any) -> int:
        return int(jnp.dtype(x.dtype).itemsize) * math.prod(x.sharding.shard_shape(x.shape))

    held = [(jax.tree_util.keystr(p, simple=True, separator="/"), x)
            for p, x in jax.tree_util.tree_leaves_with_path(state)]  # fmt: skip
    largest = sorted(held, key=lambda pair: -here(pair[1]))[:5]
    return {
        "flops": dataclasses.asdict(count),
        "state_bytes": sum(here(x) for _, x in held),
        "largest": {path: here(x) for path, x in largest},
    }


def _memory(stats: Any) -> dict[str, int]:
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # Donated arguments and the outputs that take their place are one.
    peak = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "peak": peak}


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _out_of_memory(message: str) -> dict:
    """What "the total memory required for HLO temporaries (58.10G) exceeds available HBM (15.75G)"
    says, or "Used 20.1G of 15.75G hbm"."""
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"required[^(]*\({number}\) exceeds[^(]*\({number}\)", message) or re.search(
        rf"Used {number} of {number} hbm", message
    )
    needed = None if found is None else round(float(found[1]) * _UNITS[found[2]])
    return {"needed": needed, "message": message.split("\n")[0]}
