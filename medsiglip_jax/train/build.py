"""From a recipe to a run that is ready to start: data read, weights in place, nothing compiled."""

import functools
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medsiglip_jax.data import examples, loader, tfds
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.labels import lacking, two_valued
from medsiglip_jax.data.order import Order
from medsiglip_jax.data.tables import SPLITS
from medsiglip_jax.model import api, devices, processes, processor, sharding, towers, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.preprocess import codec, xla
from medsiglip_jax.train import freeze, lora, optim, step, validation
from medsiglip_jax.train.objectives.objective import Labels, Loss, Params
from medsiglip_jax.train.recipe import MeshConfig, Recipe


@dataclass(frozen=True, eq=False, repr=False)
class PreparedRun:
    """What `prepare` returns.

    Attributes:
        recipe: what the run was prepared from.
        model: the architecture and the tokenizer; its arrays are in `state`.
        part: which parameters train.
        compute: how the arithmetic is done.
        labels: of the training examples.
        loss: of the recipe's objective.
        optimizer: of the trainable part.
        state: before the first step.
        training: the examples to train on, by source.
        held_out: the examples to validate on, by source; empty without validation.
        test: the examples to score at the end, by source; empty without a split "test" or classes.
        mesh: the devices, or None for a single one.
    """

    recipe: Recipe
    model: api.Model
    part: freeze.Partition
    compute: towers.Compute
    labels: Labels
    loss: Loss
    optimizer: optim.Optimizer
    state: step.State
    training: tuple[Examples, ...]
    held_out: tuple[Examples, ...]
    test: tuple[Examples, ...]
    mesh: Mesh | None

    def batches(self, on_error: Callable[[str, str], None], start: int) -> Iterator[Any]:
        """The training batches from step `start` on, on their devices."""
        recipe = self.recipe
        weights = tuple(data.weight for data in recipe.data)
        rows = self._input(self.training, None if None in weights else weights)
        make = self._loader.batches
        source = make(rows, recipe.batch_size, start, recipe.total_steps, **self._how(on_error))
        for batch in source:
            if not batch["mask"].any() and jax.process_count() == 1:
                raise ValueError(
                    f"none of the {len(batch['mask'])} images of a batch could be read; look at "
                    "data.path, data.root and the list of unreadable images"
                )
            yield sharding.put_batch(batch, self.mesh)

    def evaluate(self, on_error: Callable[[str, str], None], state: step.State) -> dict[str, float]:
        """The objective's metrics on the held-out examples."""
        params, recipe = step.learned(state), self.recipe
        encoded = self._encoded(self.held_out, params, on_error)
        zclass = None if self._prompts is None else self._encode_prompts(params)
        return recipe.objective.metrics(encoded, params, self.loss, recipe.batch_size, zclass)

    def judge(
        self, on_error: Callable[[str, str], None], state: step.State
    ) -> tuple[np.ndarray, dict[str, Any] | None]:
        """What the classes score on the test rows at thresholds that validation rows choose.

        Returns:
            The thresholds [classes], empty without classes or validation rows; and the scores of
            `metrics.judge_classes`, or None without test rows.
        """
        if not self.held_out or not self.recipe.objective.judged:
            return np.zeros(0), None
        params = step.learned(state)
        rows = [self._encoded(sources, params, on_error) for sources in (self.held_out, self.test)
                if sources]  # fmt: skip
        scores = [self.recipe.objective.probabilities(x, params, self.labels) for x in rows]
        groups = [group for source in self.test for group in source.groups or ()]
        return validation.judge(rows, scores, self.labels.classes, groups)

    def _encoded(
        self, sources: tuple[Examples, ...], params: Params, on_error: Callable[[str, str], None]
    ) -> dict[str, np.ndarray]:
        rows, size = self._input(sources), self.recipe.batch_size
        batches = self._loader.epoch_batches(rows, size, **self._how(on_error))
        return validation.collect(self._encode, params, batches, self.mesh)

    @functools.cached_property
    def _loader(self) -> ModuleType:
        """Who makes batches: `data.loader`, or what does so in tf.data."""
        if self.recipe.loader == "tfdata" or self.recipe.data_service is not None:
            try:
                return importlib.import_module("medsiglip_jax.data.tf.pipeline")
            except ModuleNotFoundError:
                raise ModuleNotFoundError(
                    "loader 'tfdata' and data_service need TensorFlow; pip install "
                    "'medsiglip-jax[train]', or take loader 'pil'"
                ) from None
        return loader

    def _how(self, on_error: Callable[[str, str], None]) -> dict[str, Any]:
        """The other arguments of what makes batches."""
        vision = self.model.config.vision
        assert vision is not None
        how: dict[str, Any] = {"on_error": on_error, "workers": self.recipe.workers}
        how |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
        if self._loader is loader:
            return {**how, "codec": self._codec}
        service = self.recipe.data_service
        return {**how, "resample": vision.pixels.resample, "data_service": service}

    @functools.cached_property
    def _codec(self) -> codec.Codec:
        """Who decodes in threads: PIL and XLA, and TensorFlow, which is faster for JPEG, if it is
        installed."""
        vision = self.model.config.vision
        assert vision is not None
        pixels = self.recipe.preprocess, self.recipe.dicom, vision.pixels.resample
        plain = xla.codec(*pixels)
        if self.recipe.loader == "pil" or importlib.util.find_spec("tensorflow") is None:
            return plain
        from medsiglip_jax.data.tf import tf_codec

        return tf_codec(*pixels, plain)

    def _input(self, sources: tuple[Examples, ...], weights=None) -> loader.Input:
        recipe, vision = self.recipe, self.model.config.vision
        assert vision is not None
        tokenize = None
        if "txt" in recipe.objective.towers:  # else a tokenizer may be missing
            tokenize = functools.partial(self.model.processor.tokenizer, warn=False)
        order = Order(tuple(map(len, sources)), weights, recipe.seed)
        pixels = vision.image_size, recipe.preprocess, recipe.augment
        return loader.Input(sources, order, *pixels, recipe.seed, tokenize, recipe.dicom)

    @functools.cached_property
    def _encode(self):
        return validation.encoder(self.loss.encode, self.mesh)

    @functools.cached_property
    def _prompts(self) -> np.ndarray | None:
        """Tokens of one caption per class, if texts are made of labels."""
        if not _is_zero_shot(self.recipe, self.labels):
            return None
        captions, classes = self.recipe.data[0].captions, self.labels.classes
        assert captions is not None
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


def prepare(recipe: Recipe) -> PreparedRun:
    """Reads the data, loads or draws the weights, and places the state on the devices."""
    mesh, objective = mesh_of(recipe), recipe.objective
    training, held_out, test = _examples(recipe)
    recipe = _with_steps(recipe, sum(map(len, training)))
    for data, source in zip(recipe.data, training, strict=True):
        objective.check_columns(source, data.path)
    labels = _labels(training)
    _check_labels(recipe, labels, held_out, test)
    compute_of(recipe, None, mesh)  # what cannot be used there is said before weights are loaded
    model = _model(recipe, mesh)
    compute = compute_of(recipe, model.config, mesh)
    if "txt" in objective.towers:
        for source in training:  # warns now, once, of texts that are cut or a missing tokenizer
            model.processor.texts((source.texts or ())[:10_000])
    added = additions(recipe, model.params, model.config, labels)
    added = jax.device_put(added, mesh and sharding.replicated(mesh))
    params = freeze.join(model.params, added)
    part, optimizer = what_trains(recipe, params)
    trainable, frozen = part.split(params)
    state = step.init_state(trainable, optimizer, frozen, recipe.ema is not None)
    # Otherwise the stacks that the split has cut would stay in memory beside their pieces.
    model.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    loss = objective.loss(model.config, compute, labels, recipe.loss_chunk)
    return PreparedRun(
        recipe, model, part, compute, labels, loss, optimizer, state, training, held_out, test,
        mesh,
    )  # fmt: skip


def _is_zero_shot(recipe: Recipe, labels: Labels) -> bool:
    """Whether classes are scored by a caption of each."""
    captions = recipe.data[0].captions is not None
    return captions and bool(labels.classes) and "txt" in recipe.objective.towers


def _check_labels(
    recipe: Recipe, labels: Labels, held_out: Sequence[Examples], test: Sequence[Examples]
) -> None:
    """Says what the labels of each split lack, before any weights are loaded.

    Raises:
        ValueError: there is nothing to learn, or the metric that is to choose the best checkpoint
            does not exist or cannot be computed.
    """
    zero_shot, taught = _is_zero_shot(recipe, labels), "labels" in recipe.objective.columns
    names = recipe.objective.metric_names(labels, zero_shot)
    if recipe.best is not None and recipe.best not in names:
        raise ValueError(
            f"best is {recipe.best!r}; expected one of the validation metrics of this run: "
            f"{', '.join(names)}"
        )
    if taught:
        _tell_lacking("training", labels, "so there is nothing to learn")
    if taught or zero_shot:
        others = f"choose others, or another metric of {', '.join(names)}"
        useless = f"so that best='val_auc' is undefined; {others}"
        _tell_lacking("validation", _labels(held_out), useless if recipe.best == "val_auc" else "")
        _tell_lacking("test", _labels(test))


def _tell_lacking(split: str, labels: Labels, useless: str = "") -> None:
    """Warns of what the labels of a split lack; with `useless`, what follows if no class has both
    images that show it and others, that is a ValueError."""
    if labels.values is None:
        return
    lines = [*_without_label(labels.values), *lacking(labels.values, labels.classes)]
    if useless and not two_valued(labels.values, len(labels.classes)).any():
        raise ValueError(f"{split} examples: {'; '.join(lines)}; {useless}")
    for line in lines:
        warnings.warn(f"{split} examples: {line}", stacklevel=4)


def _without_label(labels: np.ndarray) -> Iterator[str]:
    """Says how many rows have none, which count as examples."""
    unknown = np.isnan(labels).all(axis=1) if labels.ndim == 2 else labels < 0
    if count := int(unknown.sum()):
        yield f"{count} of {len(labels)} have no label"


def _labels(sources: Sequence[Examples]) -> Labels:
    classes = sources[0].classes if sources else ()
    columns = [source.labels for source in sources if source.labels is not None]
    if not columns or any(source.classes != classes for source in sources):
        return Labels(classes)  # the loader refuses to mix sources with different classes
    values = np.concatenate(columns)
    return Labels(classes, values.ndim == 2, values)


def train_step(
    recipe: Recipe, loss: Loss, optimizer: optim.Optimizer, state: step.State, mesh: Mesh | None
) -> Callable:
    """The compiled step of a run; `state` may be abstract."""
    objective = recipe.objective
    places = jax.tree.map(lambda x: x.sharding, state) if mesh else None
    pieces = objective.accumulate, objective.negatives
    device, *_ = jax.tree.leaves(state)[0].sharding.device_set
    return step.make_train_step(loss, optimizer, *pieces, places, recipe.ema, device)


def mesh_of(recipe: Recipe, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a recipe, over all devices or those given; None for a single device."""
    mesh = sharding.make_mesh((recipe.mesh or MeshConfig()).data, devices=devices)
    if mesh.size == 1:
        return None
    split, pieces = mesh.shape["data"], recipe.objective.accumulate
    if recipe.batch_size % (split * pieces):
        raise ValueError(
            f"batch_size {recipe.batch_size} is not divisible by {split} devices"
            + (f" x {pieces} pieces (objective.accumulate)" if pieces > 1 else "")
        )
    return mesh


def compute_of(
    recipe: Recipe, config: ModelConfig | None, mesh: Mesh | None, device: Any = None
) -> towers.Compute:
    """How the towers of a recipe are computed, on a mesh or on one device."""
    compute = api.compute_for(
        recipe.dtype, attention=recipe.attention, mesh=mesh, device=device, config=config
    )
    device = mesh.devices.flat[0] if mesh else device or devices.default()
    # "dots" stores the results of products, and would not find those that have their own gradients.
    flat = recipe.remat != "dots" and devices.flat_gradients(device)
    return replace(compute, remat=recipe.remat, flat=flat)


_ANY_STEPS = 1_000_000  # in a plan, which reads no data that epochs could be counted in


def _with_steps(recipe: Recipe, examples: int) -> Recipe:
    """The recipe with the number of steps that its epochs are; warns of what is changed by that, or
    because the run is short."""
    total, o = recipe.total_steps, recipe.optimizer
    if recipe.epochs is not None:
        total = max(1, round(recipe.epochs * examples / recipe.batch_size))
        given = recipe.total_steps not in (None, total)
        instead = f", instead of total_steps={recipe.total_steps:,}" if given else ""
        warnings.warn(
            f"epochs={recipe.epochs:g} over {examples:,} examples are {total:,} steps{instead}",
            stacklevel=2,
        )
    assert total is not None
    ramps = optim.fitting_ramps(total, o.warmup_steps, o.cooldown_steps)
    if ramps != (o.warmup_steps, o.cooldown_steps):
        warnings.warn(
            f"a warm-up of {o.warmup_steps} and a cool-down of {o.cooldown_steps} steps do not fit "
            f"into a run of {total}: they are {ramps[0]} and {ramps[1]} here",
            stacklevel=2,
        )
    optimizer = replace(o, warmup_steps=ramps[0], cooldown_steps=ramps[1])
    return replace(recipe, total_steps=total, optimizer=optimizer)


def additions(recipe: Recipe, params: Params, config: ModelConfig, labels: Labels) -> Params:
    """What training adds to a model's parameters, given or abstract: a head, adapters."""
    added = recipe.objective.added(config, labels)
    adapted = {tower: params[tower] for tower in recipe.objective.towers}
    return {**added, **(lora.init(recipe.lora, adapted, recipe.seed) if recipe.lora else {})}


def what_trains(recipe: Recipe, params: Params) -> tuple[freeze.Partition, optim.Optimizer]:
    """Which of the parameters, given or abstract, train, and the optimiser of those."""
    part = freeze.partition(_frozen(recipe, params), params)
    o = recipe.optimizer
    total = recipe.total_steps or _ANY_STEPS
    ramps = optim.fitting_ramps(total, o.warmup_steps, o.cooldown_steps)
    schedule = optim.schedule(o.schedule, total, *ramps)
    rates = _rates(recipe, params, part)
    return part, optim.make_optimizer(recipe.learning_rate, schedule, o, rates)


def _examples(recipe: Recipe) -> tuple[tuple[Examples, ...], ...]:
    """(training, held out, test) examples of every source; warns of rows of other splits."""
    training, held_out, test = [], [], []
    for data in recipe.data:
        arguments = {f.name: getattr(data, f.name) for f in fields(data)}
        del arguments["weight"]
        reader = tfds if data.path.startswith(tfds.PREFIX) else examples
        source = reader.read(**arguments)
        if isinstance(recipe.validation, str):
            if source.splits is None:
                raise ValueError(
                    f"validation is {recipe.validation!r}, but {data.path} has no column "
                    f"{data.split!r}; name it (data.split), or give a share such as 0.1"
                )
            held_out.append(source.of_split(recipe.validation))
        if source.splits is not None:
            unseen = recipe.objective.judged and recipe.validation not in (None, _TEST)
            if unseen and _TEST in source.splits:
                test.append(source.of_split(_TEST))
            asked = ("train", _TEST, str(recipe.validation))
            used = SPLITS if recipe.validation is None else asked
            examples.warn_of_unused_splits(source.splits, used, data.path)
            source = source.of_split("train")
        if isinstance(recipe.validation, float):
            source, other = examples.split_by_group(source, recipe.validation, recipe.seed)
            held_out.append(other)
        training.append(source)
    for source in training:
        for other in (*held_out, *test):
            examples.check_disjoint(source, other)
    for source, other in itertools.product(held_out, test):
        examples.check_disjoint(source, other)
    convert = recipe.objective.examples
    return tuple(tuple(map(convert, part)) for part in (training, held_out, test))


_TEST = "test"


def _model(recipe: Recipe, mesh: Mesh | None) -> api.Model:
    fsdp = bool(recipe.mesh and recipe.mesh.fsdp)
    if recipe.init is not None:
        load = functools.partial(
            api.load, recipe.init, mesh=mesh, tokenizer=recipe.tokenizer, fsdp=fsdp
        )
        model = processes.run_on(load)  # each reads its own shards, of which one may be damaged
        assert model is not None
        return _without_classifier(model)
    model = api.init(recipe.model_config, recipe.seed)
    params = dict(model.params)
    if "t" in params:
        params["t"] = jnp.full((1,), np.log(recipe.temperature), jnp.float32)
        params["b"] = jnp.full((1,), recipe.bias, jnp.float32)
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(params, mesh, fsdp))
    return api.Model(params, model.config, tokenizer=processor.tokenizer_path(recipe.tokenizer))


def _without_classifier(model: api.Model) -> api.Model:
    """A classifier's labels are those of other data; a new one begins at zero."""
    if model.config.classifier:
        labels = len(model.config.classifier.labels)
        warnings.warn(
            f"{model.source} is a classifier; training goes on from its image tower, and the layer "
            f"for its {labels} labels is left out",
            stacklevel=2,
        )
        del model.params["classifier"]
        model.config = replace(model.config, classifier=None, preparation=model.config.trained)
    return model


def _frozen(recipe: Recipe, params: Params) -> tuple[str, ...]:
    """Regexes of what the recipe freezes, and of what its objective does not use."""
    objective = recipe.objective
    if not recipe.lora:
        return (*recipe.freeze, *objective.unused(params))
    train = recipe.lora.train if objective.lora_train is None else objective.lora_train
    return replace(recipe.lora, train=train).frozen(params)


_BELOW_BLOCKS = r"(img|txt)/(embedding/.*|Embed_0/.*|pos_embedding)"


def _rates(recipe: Recipe, params: Params, part: freeze.Partition) -> Params | None:
    """Factors on the learning rate; of a stack, one per layer."""
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
