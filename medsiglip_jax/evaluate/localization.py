"""Whether maps lie where the finding is, in localization.parquet: one row for each map.

    DIR/maps/METHOD-DIGEST.jsonl   grows by a line for each map, so that a killed run resumes
    DIR/localization.parquet       id, class, group, iou, hit, chance, centre, how good the map is

Each image with a region of a class gets the map of that class: of what the task scores it by.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from medsiglip_jax.evaluate import scores, zero_shot
from medsiglip_jax.evaluate.data import regions
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.layout import SegmentationFile
from medsiglip_jax.evaluate.data.regions import Region, Regions
from medsiglip_jax.evaluate.options import EvaluateOptions
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.zero_shot import ClassPrompts
from medsiglip_jax.files import settings, storage
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps, to_hash
from medsiglip_jax.files.places import Place
from medsiglip_jax.metrics import maps
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.load import decoded
from medsiglip_jax.trust.explanation import METHODS, Explainer, ExplainOptions, Explanation
from medsiglip_jax.trust.maps.targets import Form, Target

FILE, FOLDER = "localization.parquet", "maps"
_META = b"medsiglip_jax"
_SCHEMA = scores.schema(
    {"id": pa.string(), "class": pa.string(), "method": pa.string()},
    {"group": pa.string(), "iou": pa.float64(), "hit": pa.bool_(), "chance": pa.float64(),
     "centre": pa.bool_(), "better_than_random": pa.bool_(), "completeness": pa.float64(),
     "error": pa.string()},
)  # fmt: skip
# What a row has unless it has an error.
_NEEDED = ("hit", "chance", "centre", "better_than_random")
_MEASURED = [name for name in _SCHEMA.names if name not in ("id", "class", "method", "group")]


# ----------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class MapFacts:
    """What is recorded of maps beside their measures.

    Attributes:
        method: the method that made them.
        fill: what cells are replaced by for the curves of insertion and deletion.
        seed: the seed of the random maps.
        segmented: whether the regions are segmentations, which maps can overlap with.
        regions: name -> digest of the file of regions.
        other: what it names that is no class of the task -> how many regions it has.
        note: what the task says on the regions.
        run: the identity of the run that the maps belong to.
    """

    method: Annotated[str, settings.one_of(METHODS)]
    fill: str
    seed: int
    segmented: bool
    regions: Mapping[str, str]
    other: Mapping[str, int]
    note: str = ""
    run: str = ""


@dataclass(frozen=True, eq=False)
class MapPlan:
    """Which maps of which images are made.

    Attributes:
        dataset: the images with a region.
        of_images: the regions of each, by class.
        source: the file that they come from, as it was read.
        options: how the maps are made.
    """

    dataset: Dataset
    of_images: Sequence[Mapping[str, Region]]
    source: Regions
    options: ExplainOptions

    @property
    def segmented(self) -> bool:
        """Whether the regions are segmentations, which maps can overlap with; boxes are not."""
        return isinstance(self.source.layout, SegmentationFile)

    @functools.cached_property
    def facts(self) -> MapFacts:
        """What is recorded beside the measures."""
        with self.source.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
        options, source = self.options, self.source
        return MapFacts(
            options.method, options.fill, options.seed, self.segmented,
            {source.file.name: digest.hexdigest()}, dict(source.other), source.layout.note,
        )  # fmt: skip


def plan_maps(task: Task, dataset: Dataset, options: EvaluateOptions) -> MapPlan | None:
    """Which maps are made, by what `options.explain` asks for; None if that is nothing.

    Fewer images than there are with a region are drawn by the seed; more of them begin with the
    same.

    Raises:
        FileNotFoundError: the file of regions is missing.
        ValueError: the task or its images have no regions, or what scores it has no map.
    """
    if not options.explain:
        return None
    if task.region_file is None:
        raise ValueError(
            f"--explain measures maps by the regions of a data set, and task {task.name} names none"
        )
    if options.over_prompts == "max":
        raise ValueError("--explain has no map of the maximum over prompts: no --over-prompts max")
    assert dataset.root is not None
    source = regions.read(task, dataset.root)
    there = [i for i, id in enumerate(dataset.ids) if source.of(id)]
    if not there:
        raise ValueError(
            f"{source.file}: none of its {len(source.of_images):,} images, such as "
            f"{next(iter(source.of_images))}, is among the {len(dataset):,} of the task, such as "
            f"{dataset.ids[0]}"
        )
    drawn = np.random.default_rng(options.seed).permutation(there)[: options.explain_images]
    chosen = dataset.select(np.sort(drawn))
    map_options = ExplainOptions(options.explain, seed=options.seed, batch_size=options.batch_size)
    return MapPlan(chosen, [source.of(id) for id in chosen.ids], source, map_options)


# -------------------------------------------------------------------------------------- targets


def targets_of_prompts(
    model: Model,
    task: Task,
    present: ClassPrompts,
    absent: ClassPrompts | None,
    factor: float,
) -> dict[str, Target]:
    """The logit of each class that the rule of the task ranks images by.

    A class is one vector, the mean of its prompts, as for scores. With prompts of absence its logit
    is that of presence less that of absence; of a softmax over classes it is log(p / (1 - p)).

    Args:
        model: with both towers.
        task: with the classes of the prompts.
        present: the prompts of presence.
        absent: those of absence, for rules of pairs.
        factor: that cosines are multiplied by before a softmax over classes; other rules rank alike
            with any, and take that of the model.
    """
    softmax = task.score == "class_softmax"
    factor = factor if softmax else zero_shot.factor(model, "logit_scale")
    vectors = factor * (_vectors(present) - (0.0 if absent is None else _vectors(absent)))
    rows = jnp.asarray(vectors, jnp.float32)
    contrast = None if absent is None else "its absence"
    form = Form(normalize=True, exclusive=softmax)
    targets = {}
    for number, c in enumerate(task.classes):
        of_class = rows if softmax else rows[number : number + 1]
        numbers = {
            "coefficients": of_class, "intercepts": jnp.zeros(len(of_class)),
            "index": jnp.array(number if softmax else 0),
        }  # fmt: skip
        targets[c.name] = Target(c.name, contrast, form, numbers, model)
    return targets


def _vectors(prompts: ClassPrompts) -> Float[np.ndarray, "c d"]:
    """What the cosines of classes are products with."""
    if prompts.first is None:
        return prompts.vectors
    counts = np.diff(np.append(prompts.first, len(prompts.vectors)))
    return np.add.reduceat(prompts.vectors, prompts.first) / counts[:, None]


# ------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class MapInputs:
    """What the maps of an evaluation are made of.

    Attributes:
        targets: the logit of each class, by its name.
        preprocess: the pixel preset.
        dicom: how images are read.
        identity: everything else that the maps depend on, as JSON has it.
    """

    targets: Mapping[str, Target]
    preprocess: str
    dicom: Rules
    identity: Any


def compute(
    plan: MapPlan,
    inputs: MapInputs,
    folder: Place,
    on_maps: Callable[[int, int], Any] = lambda maps, images: None,
    on_map: Callable[[int], Any] = int,
) -> pa.Table:
    """Makes the maps that the folder does not have yet, and measures them.

    Args:
        plan: which maps are made.
        inputs: what they are made of.
        folder: the folder of the evaluation.
        on_maps: called once with how many maps of how many images are still to be made.
        on_map: called with how many are done after each image.

    Returns:
        `id`, `class`, `method`, `group` and for each map whether its maximum lies in the region
        ("hit"), the share of the image that the region covers ("chance") and whether the centre of
        the image lies in it; of segmentations "iou", see `metrics.maps`; of "ig" its
        "completeness"; whether it is better than random maps. Instead of these, "error": the image
        cannot be used, or is not of the size of the region.
    """
    content = to_hash([inputs.identity, asdict(plan.facts)], sort_keys=True)
    identity = hashlib.sha256(content).hexdigest()
    path = folder / FOLDER / f"{plan.options.method}-{identity[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, done = storage.Lines(path), _saved(path, plan)
    images = zip(plan.dataset.ids, plan.dataset.sources, plan.of_images, strict=True)
    left = []
    for id, source, of_image in images:
        new = {name: region for name, region in of_image.items() if (id, name) not in done}
        left += [(id, source, new)] if new else []
    on_maps(sum(len(new) for _, _, new in left), len(left))
    for id, source, new in left:
        for name, row in _measured(id, source, new, plan, inputs):
            done[id, name] = {"id": id, "class": name, **row}
            lines.append(done[id, name])
        on_map(len(new))
    lines.flush()
    return _table(plan, done)


def _saved(path: Place, plan: MapPlan) -> dict[tuple[str, str], dict[str, Any]]:
    """The maps of an earlier run, by image and class."""
    with explained(path, "not measures of maps", "remove it"):
        lines = storage.read_lines(path, **{"id": str, "class": str})
        done = {(line["id"], line["class"]): line for line in lines}
        _table(plan, done)  # fails if a measure is of another type
    return done


def _measured(
    id: str, source: str, of_image: Mapping[str, Region], plan: MapPlan, inputs: MapInputs
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The measures of the maps of one image, by class."""
    masks = {}
    try:
        pixels, _ = decoded(source, inputs.dicom)
        for name, region in of_image.items():
            try:
                masks[name] = region.mask((pixels.shape[0], pixels.shape[1]))
            except ValueError as error:
                yield name, {"error": str(error)}
        explanations = _explained(pixels, id, [*masks], plan, inputs) if masks else []
    except (UnreadableImage, FileNotFoundError) as error:
        # Without the name of the file, since the report counts reasons.
        reason = error.reason if isinstance(error, UnreadableImage) else "no such file"
        yield from ((name, {"error": reason}) for name in masks or of_image)
        return
    for name, made in zip(masks, explanations, strict=True):
        yield name, _measure(made, masks[name], plan.segmented)


def _explained(
    pixels: np.ndarray, id: str, names: Sequence[str], plan: MapPlan, inputs: MapInputs
) -> list[Explanation]:
    explainer = Explainer([inputs.targets[name] for name in names], inputs.preprocess, plan.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of each that is not complete: counted
        return explainer(pixels, id)


def _measure(made: Explanation, mask: np.ndarray, segmented: bool) -> dict[str, Any]:
    height, width = mask.shape
    overlap = maps.iou(maps.segment(made.map), mask) if segmented else np.nan
    return {
        "iou": None if np.isnan(overlap) else overlap,
        "hit": bool(mask[maps.peak(made.map)]),
        "chance": float(mask.mean()),
        "centre": bool(mask[height // 2, width // 2]),
        "better_than_random": bool(made.better),
        "completeness": made.completeness,
    }


# ----------------------------------------------------------------------------------------- file


def _table(plan: MapPlan, done: Mapping[tuple[str, str], Mapping[str, Any]]) -> pa.Table:
    groups = plan.dataset.groups or [None] * len(plan.dataset)
    rows = [
        {"id": id, "class": name, "method": plan.options.method, "group": group}
        | {key: done[id, name].get(key) for key in _MEASURED}
        for id, group, of_image in zip(plan.dataset.ids, groups, plan.of_images, strict=True)
        for name in sorted(of_image)
        if (id, name) in done
    ]
    return pa.Table.from_pylist(rows, _SCHEMA)


def write(path: Place, table: pa.Table, facts: MapFacts) -> None:
    """Writes what `compute` returned, and what is recorded with it."""
    scores.save(path, table, {_META: dumps(asdict(facts))})


def read(path: Place) -> tuple[pa.Table, MapFacts]:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    with scores.opened(path, "measures of maps") as table:
        if not table.schema.equals(_SCHEMA):
            raise ValueError(f"columns are {', '.join(table.schema.names)}")
        facts = parse((table.schema.metadata or {})[_META])
        made = table.filter(table["error"].is_null())
        if lacking := [name for name in _NEEDED if made[name].null_count]:
            raise ValueError(f"maps without an error lack {', '.join(lacking)}")
        return table, settings.build(MapFacts, facts, "what is recorded")
