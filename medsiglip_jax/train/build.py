"""A recipe made ready to run: data read, weights in place, nothing compiled yet."""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medsiglip_jax.data import examples, loader, tfds
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input
from medsiglip_jax.data.order import Order
from medsiglip_jax.model import api, sharding, towers, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.preprocess import xla
from medsiglip_jax.preprocess.codec import Codec
from medsiglip_jax.train import freeze, lora, objectives, optim, validation  # fmt: skip
from medsiglip_jax.train import recipe as recipes
from medsiglip_jax.train.objectives import Objective, Params
from medsiglip_jax.train.recipe import Recipe
from medsiglip_jax.train.step import State, init_state, make_train_step


@dataclass(frozen=True, eq=False, repr=False)
class Job:
    """What `prepare` returns.

    Attributes:
        recipe: what was asked for.
        model: the weights to start from, the architecture and the tokenizer.
        part: which parameters train.
        compute: how the arithmetic is done.
        objective: the loss.
        optimizer: of the trainable part.
        state: before the first step.
        training: the examples to train on, by source.
        held_out: the examples to validate on, by source; none without validation.
        mesh: the devices, or None for one.
    """

    recipe: Recipe
    model: api.Model
    part: freeze.Partition
    compute: Compute
    objective: Objective
    optimizer: optim.Optimizer
    state: State
    training: tuple[Examples, ...]
    held_out: tuple[Examples, ...]
    mesh: Mesh | None

    def batches(self, on_error: Callable[[str, str], None], start: int) -> Iterator[Any]:
        """The training batches from step `start` on, on their devices."""
        weights = tuple(data.weight for data in self.recipe.data)
        source = loader.batches(
            self._input(self.training, None if None in weights else weights),
            self.recipe.batch_size,
            start,
            self.recipe.total_steps,
            on_error=on_error,
            codec=self._codec,
            **_this_process(),
        )
        for batch in source:
            if not batch["mask"].any() and jax.process_count() == 1:
                raise ValueError(
                    f"none of the {len(batch['mask'])} images of a batch could be read; look at "
                    "data.path, data.root and the list of unreadable images"
                )
            yield sharding.put_batch(batch, self.mesh)

    def evaluate(self, on_error: Callable[[str, str], None], state: State) -> dict[str, float]:
        """The metrics of `validation` on the held-out examples."""
        params, recipe = freeze.join(state["params"], state["frozen"]), self.recipe
        batches = loader.epoch_batches(
            self._input(self.held_out), recipe.batch_size, on_error=on_error, codec=self._codec,
            **_this_process(),
        )  # fmt: skip
        rows = validation.collect(self._encode, params, batches, self.mesh)
        if recipe.objective.name == "classification":
            return validation.classification(rows, params, self.objective)
        zclass = None if self._prompts is None else self._encode_prompts(params)
        return validation.contrastive(rows, params, recipe.batch_size, zclass)

    @functools.cached_property
    def _codec(self) -> Codec:
        """Who decodes: TensorFlow, a quarter faster, where it is installed, or PIL and XLA."""
        found = importlib.util.find_spec("tensorflow") is not None
        if self.recipe.loader == "pil" or (self.recipe.loader == "auto" and not found):
            return xla.codec(self.recipe.preprocess, self.recipe.dicom)
        from medsiglip_jax.data.tf import tf_codec

        return tf_codec(self.recipe.preprocess, self.recipe.dicom)

    def _input(self, rows: tuple[Examples, ...], weights=None) -> Input:
        recipe, vision = self.recipe, self.model.config.vision
        assert vision is not None
        texts = recipe.objective.name == "contrastive"
        return Input(
            rows,
            Order(tuple(map(len, rows)), weights, recipe.seed),
            vision.image_size,
            recipe.preprocess,
            recipe.augment,
            recipe.seed,
            functools.partial(self.model.processor.tokenizer, warn=False) if texts else None,
            recipe.dicom,
        )

    @functools.cached_property
    def _encode(self):
        return validation.encoder(self.objective, self.mesh)

    @functools.cached_property
    def _prompts(self) -> np.ndarray | None:
        """Tokens of one caption per class, where texts are made of labels."""
        captions, classes = self.recipe.data[0].captions, self.training[0].classes
        if captions is None or not classes:
            return None
        texts = examples.class_captions(captions, classes)
        return self.model.processor.texts([texts[name] for name in classes])

    @functools.cached_property
    def _encode_prompts(self) -> Callable[[Params], np.ndarray]:
        config, tokens, compute = self.model.config, jnp.asarray(self._prompts), self.compute

        def encode(params):
            return towers.normalize(towers.encode_text(params, tokens, config, compute))

        places = self.mesh and sharding.replicated(self.mesh)
        compiled = jax.jit(encode, out_shardings=places)
        return lambda params: np.asarray(compiled(params))


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def prepare(recipe: Recipe) -> Job:
    """Reads the data, loads or draws the weights, and places the state on the devices."""
    mesh = mesh_of(recipe)
    training, held_out = _examples(recipe)
    _check_columns(recipe, training)
    compute = compute_of(recipe, mesh)
    model = _model(recipe, mesh)
    if recipe.objective.name == "contrastive":
        for rows in training:  # says once, before any work, what is missing or too long
            model.processor.texts((rows.texts or ())[:10_000])
    added = additions(recipe, model.params, model.config, len(training[0].classes))
    params = freeze.join(model.params, _place(added, mesh))
    part, optimizer = what_trains(recipe, params)
    trainable, frozen = part.split(params)
    state = init_state(trainable, optimizer, frozen)
    # What the split has cut would otherwise stay in memory, whole, beside its pieces.
    model.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    return Job(
        recipe, model, part, compute, _objective(recipe, model, compute, training, mesh),
        optimizer, state, training, held_out, mesh,
    )  # fmt: skip


def train_step(
    recipe: Recipe,
    objective: Objective,
    optimizer: optim.Optimizer,
    state: State,
    mesh: Mesh | None,
) -> Callable:
    """The compiled step of a run; `state` may be abstract."""
    return make_train_step(
        objective, optimizer, recipe.objective.accumulate, recipe.objective.negatives,
        places=jax.tree.map(lambda x: x.sharding, state) if mesh else None,
    )  # fmt: skip


def mesh_of(recipe: Recipe, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that a recipe asks for, of all devices or of those given; None for one device."""
    wanted = recipe.mesh or recipes.Mesh()
    mesh = sharding.make_mesh(wanted.data, wanted.model, devices=devices)
    if mesh.size == 1:
        return None
    split, pieces = mesh.shape["data"], recipe.objective.accumulate
    if recipe.batch_size % (split * pieces):
        raise ValueError(
            f"batch_size {recipe.batch_size} is not divisible by {split} devices"
            + (f" x {pieces} pieces (objective.accumulate)" if pieces > 1 else "")
        )
    return mesh


def compute_of(recipe: Recipe, mesh: Mesh | None, platform: str | None = None) -> Compute:
    """How a recipe has the towers computed, on a mesh or on one device of a platform."""
    compute = api.compute_for(
        recipe.dtype, attention=recipe.attention, mesh=mesh, platform=platform
    )
    return dataclasses.replace(compute, remat=recipe.remat)


def additions(recipe: Recipe, params: Params, config: ModelConfig, classes: int) -> Params:
    """What training adds to a model's parameters, given or abstract: a head, adapters."""
    added, used = {}, params
    if recipe.objective.name == "classification":
        added["head"] = objectives.init_head(config, classes)
        used = {"img": params["img"]}
    return {**added, **(lora.init(recipe.lora, used, recipe.seed) if recipe.lora else {})}


def what_trains(recipe: Recipe, params: Params) -> tuple[freeze.Partition, optim.Optimizer]:
    """Of parameters, given or abstract: which train, and how."""
    part = freeze.partition(_frozen(recipe, params), params)
    return part, _optimizer(recipe, params, part)


def _examples(recipe: Recipe) -> tuple[tuple[Examples, ...], tuple[Examples, ...]]:
    """(training, held out) rows of every source; rows of any other split are left alone."""
    training, held_out = [], []
    for data in recipe.data:
        arguments = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
        del arguments["weight"]
        reader = tfds if data.path.startswith(tfds.PREFIX) else examples
        rows = reader.read(**arguments)
        if isinstance(recipe.validation, str):
            if rows.splits is None:
                raise ValueError(
                    f"validation is {recipe.validation!r}, but {data.path} has no column "
                    f"{data.split!r}; name it (data.split), or give a share such as 0.1"
                )
            held_out.append(rows.of_split(recipe.validation))
        if rows.splits is not None:
            rows = rows.of_split("train")
        if isinstance(recipe.validation, float):
            rows, other = examples.split_by_group(rows, recipe.validation, recipe.seed)
            held_out.append(other)
        training.append(rows)
    for rows in training:
        for other in held_out:
            examples.check_disjoint(rows, other)
    if recipe.objective.name == "contrastive":
        training, held_out = (list(map(examples.with_own_ids, x)) for x in (training, held_out))
    return tuple(training), tuple(held_out)


def _model(recipe: Recipe, mesh: Mesh | None) -> api.Model:
    fsdp = bool(recipe.mesh and recipe.mesh.fsdp)
    if recipe.init is not None:
        return api.load(recipe.init, mesh=mesh, tokenizer=recipe.tokenizer, fsdp=fsdp)
    model = api.init(recipe.model_config, recipe.seed)
    params = dict(model.params)
    if "t" in params:
        params["t"] = jnp.full((1,), np.log(recipe.temperature), jnp.float32)
        params["b"] = jnp.full((1,), recipe.bias, jnp.float32)
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(params, mesh, fsdp))
    return api.Model(params, model.config, tokenizer=api.tokenizer_path(recipe.tokenizer))


def _place(params: Params, mesh: Mesh | None) -> Params:
    return params if mesh is None else jax.device_put(params, sharding.replicated(mesh))


def _frozen(recipe: Recipe, params: Params) -> tuple[str, ...]:
    """What the recipe freezes, and what its objective does not use: decay would eat it."""
    if recipe.lora:
        config = recipe.lora
        if recipe.objective.name == "classification":
            config = dataclasses.replace(config, train=("head/.*",))
        return config.frozen(params)
    if recipe.objective.name == "contrastive":
        return recipe.freeze
    unused = [p for p in ("txt/.*", "t", "b") if p.split("/")[0] in params]
    if recipe.objective.pool == "mean" and "MAPHead_0" in params["img"]:
        unused.append("img/MAPHead_0/.*")
    return (*recipe.freeze, *unused)


def _objective(recipe: Recipe, model: api.Model, compute: Compute, training, mesh) -> Objective:
    if recipe.objective.name == "contrastive":
        return objective_of(recipe, model.config, compute, mesh)
    multi_label = training[0].labels.ndim == 2
    if recipe.objective.pos_weight is not None and not multi_label:
        raise ValueError(
            "objective.pos_weight is for several findings at once (data.label a tuple of columns); "
            "here every image has one class"
        )
    weight = _pos_weight(recipe, training)
    return objective_of(recipe, model.config, compute, mesh, multi_label, weight)


def objective_of(
    recipe: Recipe,
    config: ModelConfig,
    compute: Compute,
    mesh: Mesh | None,
    multi_label: bool = False,
    pos_weight: Any = None,
) -> Objective:
    """The loss of a recipe; the last two are of classification, and come from its labels."""
    if recipe.objective.name == "contrastive":
        return objectives.contrastive(config, compute, recipe.loss_chunk, mesh)
    return objectives.classification(
        config, compute, recipe.objective.pool, multi_label, pos_weight
    )


def _pos_weight(recipe: Recipe, training: tuple[Examples, ...]) -> np.ndarray | None:
    weight, classes = recipe.objective.pos_weight, training[0].classes
    if weight == "balanced":
        labels = np.concatenate([rows.labels for rows in training if rows.labels is not None])
        positives, known = (labels == 1).sum(0), (~np.isnan(labels)).sum(0)
        return ((known - positives) / np.maximum(positives, 1)).astype(np.float32)
    if weight is not None and len(weight) != len(classes):
        raise ValueError(
            f"objective.pos_weight has {len(weight)} numbers for the {len(classes)} classes "
            f"{', '.join(classes)}; give one each, or 'balanced'"
        )
    return None if weight is None else np.asarray(weight, np.float32)


def _optimizer(recipe: Recipe, params: Params, part: freeze.Partition) -> optim.Optimizer:
    o = recipe.optimizer
    schedule = optim.schedule(
        o.schedule, recipe.total_steps, o.warmup_steps, cooldown_steps=o.cooldown_steps
    )
    common: dict[str, Any] = dict(
        weight_decay=o.weight_decay, clip_norm=o.clip_norm, rates=_rates(recipe, params, part)
    )
    if o.name == "adafactor":
        return optim.adafactor(recipe.learning_rate, schedule, beta2_cap=o.b2, **common)
    return optim.adamw(recipe.learning_rate, schedule, b1=o.b1, b2=o.b2, **common)


_BELOW_BLOCKS = r"(img|txt)/(embedding/.*|Embed_0/.*|pos_embedding)"


def _rates(recipe: Recipe, params: Params, part: freeze.Partition) -> Params | None:
    """Factors on the learning rate, for a stack one per layer."""
    o = recipe.optimizer
    if not o.rates and o.layer_decay == 1:
        return None
    depths = {path.split(tree.STACK)[0].split("/")[0]: len(leaf)
              for path, leaf in tree.items(params) if tree.STACK in path}  # fmt: skip
    factors = {}
    for path, values in tree.match_layers([*o.rates, (".*", 1.0)], params).items():
        rate = np.asarray(values, np.float32)
        if tree.STACK in path:
            factors[path] = rate * np.float32(o.layer_decay) ** np.arange(len(values))[::-1]
        else:
            below = depths[path.split("/")[0]] if re.fullmatch(_BELOW_BLOCKS, path) else 0
            factors[path] = rate.reshape(()) * np.float32(o.layer_decay) ** below
    return part.split(tree.unflatten(factors))[0]


def _check_columns(recipe: Recipe, training: tuple[Examples, ...]) -> None:
    contrastive = recipe.objective.name == "contrastive"
    for data, rows in zip(recipe.data, training, strict=True):
        if contrastive and rows.texts is None:
            raise ValueError(
                f"{data.path} has no texts: no column {data.text!r}; name it (data.text) or make "
                'texts of labels (data.captions="a photo of {label}")'
            )
        if not contrastive and rows.labels is None:
            raise ValueError(f"{data.path} has no labels; name their column (data.label)")
