"""Plans: whether a run fits, its largest batch, what would make it fit, and a table of many."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medsiglip_jax.model.devices import AUTO
from medsiglip_jax.model.weights.checkpoint import dtype_of
from medsiglip_jax.plan import bound, topologies, worker
from medsiglip_jax.train.recipe import MeshConfig, Recipe

Plan = dict[str, Any]
Progress = Callable[[str], None]
# A compiler that is told of so little memory stops after seconds and says what the program needs; a
# whole compilation takes minutes.
_PROBE_MIB = 1
# Share of a chip's memory for what no compiler sees: the next batch on its way, fragmentation.
HEADROOM = 0.05


@dataclasses.dataclass(frozen=True)
class Question:
    """A run whose plan is asked for.

    Attributes:
        recipe: the run; its data are not read. To embed, its dtype may also be "float16".
        topology: where it would run.
        embed: plan embedding images in batches of the recipe's size, instead of training.
        quick: ask libtpu only for the least memory that the program needs; the collectives and
            their bound are then unknown. For GPUs the program is compiled all the same.
    """

    recipe: Recipe
    topology: topologies.Topology
    embed: bool = False
    quick: bool = False

    def __post_init__(self):
        dtype_of(self.arithmetic)
        self.topology.check_dtype(self.arithmetic)
        devices, pieces = self._split(), self.recipe.objective.accumulate
        if devices > 1 and self.recipe.batch_size % (devices * pieces):
            raise ValueError(
                f"batch_size {self.recipe.batch_size} is not divisible by the {devices} devices of "
                f"{self.topology}" + (f" x {pieces} pieces" if pieces > 1 else "")
            )

    @property
    def arithmetic(self) -> str:
        """The dtype of the matrix products."""
        dtype = self.recipe.dtype
        return self.topology.auto_dtype if dtype == AUTO else dtype

    def _split(self) -> int:
        """Devices over which batches are split."""
        devices = self.topology.devices
        data = (self.recipe.mesh or MeshConfig()).data or devices
        if data > devices:
            raise ValueError(
                f"mesh.data is {data}; expected at most the {devices} devices of {self.topology}"
            )
        return data

    def per_chip(self) -> float:
        """Examples of a batch on a chip."""
        return self.recipe.batch_size / self.topology.chips

    def with_recipe(self, **changes: Any) -> "Question":
        """The same question of a recipe with other values of some keys."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **changes))

    def with_batch(self, units: int) -> "Question":
        """The same run with a batch of `units` times the smallest one that can be split."""
        return self.with_recipe(batch_size=units * self._split() * self.recipe.objective.accumulate)

    def units(self) -> int:
        """The inverse of `with_batch`."""
        return self.recipe.batch_size // (self._split() * self.recipe.objective.accumulate)

    def ask(self) -> dict[str, Any]:
        """What `program.compiled` answers in a process of its own; raises as `worker.ask`."""
        limit = _PROBE_MIB if self.quick else None
        request = {
            "recipe": dataclasses.asdict(self.recipe) | {"dtype": AUTO},
            "topology": self.topology.to_dict(),
            "dtype": self.arithmetic,
            "embed": self.embed,
            "limit_mib": limit,
        }
        return worker.ask(request, self.topology)


def plan(question: Question) -> Plan:
    """Whether the run fits, what it needs, and the bound on its speed."""
    answer, topology, chip = question.ask(), question.topology, question.topology.chip
    memory = answer.get("memory")
    peak = memory["peak"] if memory else answer["needed"]
    allowed = int(chip.usable * (1 - HEADROOM))
    bounds = bound.seconds(answer, topology, question.arithmetic)
    flops = answer["flops"]["model"] + answer["flops"]["recomputed"]
    peak = None if peak is None else peak * chip.devices
    text = answer.get("text_tower_bytes", 0)
    largest = collections.Counter(answer["largest"]).most_common(5)
    return {
        "topology": str(topology),
        "chips": topology.chips,
        "unit": topology.unit,
        "batch_size": question.recipe.batch_size,
        "dtype": question.arithmetic,
        "remat": question.recipe.remat,
        "attention": answer["attention"],
        **({"tower": "img", "text_tower_bytes": text * chip.devices} if question.embed else {}),
        "fits": peak is not None and peak <= allowed and (answer["compiled"] or question.quick),
        "compiled": answer["compiled"],
        "peak_bytes": peak,
        "hbm_bytes": chip.hbm,
        "usable_bytes": chip.usable,
        "allowed_bytes": allowed,
        "headroom_bytes": None if peak is None else allowed - peak,
        "memory": memory and {part: size * chip.devices for part, size in memory.items()},
        "state_bytes": answer["state_bytes"] * chip.devices,
        "largest": {name: size * chip.devices for name, size in largest},
        "max_batch_per_chip": None,
        "collectives": answer.get("collectives"),
        "kernels": answer.get("kernels"),
        "flops": flops,
        "model_flops": answer["flops"]["model"],
        "xla_flops": answer.get("xla_flops"),
        "bound_seconds": max(bounds.values()),
        "bound": bounds,
        "reachable_seconds": bound.reachable(bounds, topology, question.arithmetic),
        "limit": max(bounds, key=lambda name: bounds[name]),
        "compile_seconds": answer["seconds"],
        **{key: answer[key] for key in ("compiler_bytes", "trained", "parameters")},
    }


def max_batch(question: Question, progress: Progress) -> float:
    """Examples per chip of the largest batch that fits, 0 if none does.

    The memory grows nearly in proportion to the batch: the next try is where the line through the
    two nearest ones reaches the limit. For TPUs a try asks only for the least memory that the
    program needs. What fits by that may still not fit when it is compiled. So the result is
    compiled as a whole, and reduced until that succeeds.
    """
    unit = question.topology.unit
    left = 0  # for a batch of none: what the state leaves

    def room(units: int, quick: bool = True) -> int:
        nonlocal left
        larger = question.with_batch(units)
        result = plan(dataclasses.replace(larger, quick=quick))
        left = left or result["allowed_bytes"] - result["state_bytes"]
        answer = "fits" if result["fits"] else "does not fit"
        progress(f"batch {larger.recipe.batch_size} ({larger.per_chip():g} a {unit}) {answer}")
        headroom = result["headroom_bytes"]
        return headroom if result["fits"] else min(headroom or -1, -1)

    low, high = 0, max(1, question.units())
    while (over := room(high)) >= 0:
        a_unit = max(left - over, 1) / (high - low)
        guess = int(1.05 * (high + over / a_unit)) + 1  # a little more than what may fit
        low, high, left = high, max(high + 1, min(8 * high, guess)), over
    while high - low > 1 and left > 0:
        guess = min(high - 1, max(low + 1, int(low + (high - low) * left / (left - over))))
        if guess - low <= low // 16:
            break
        if (headroom := room(guess)) >= 0:
            low, left = guess, headroom
        else:
            high, over = guess, headroom
    whole = question.quick or not question.topology.quick
    while low and not whole and room(low, quick=False) < 0:
        low = low * 7 // 8
    return question.with_batch(low).per_chip() if low else 0


def advice(question: Question, progress: Progress) -> list[dict[str, Any]]:
    """Changes with which the run would fit: each on top of those before it, the cheapest in speed
    first, until one fits or none is left."""
    tried = []
    for name, changes in _remedies(question):
        changed = question.with_recipe(**changes)
        result = plan(dataclasses.replace(changed, quick=True))
        progress(f"{name}: {'fits' if result['fits'] else 'does not fit'}")
        keys = ("fits", "peak_bytes", "compiled")
        tried.append({"change": name, **{key: result[key] for key in keys}})
        if result["fits"]:
            break
    return tried


def _remedies(question: Question) -> Iterator[tuple[str, dict[str, Any]]]:
    """(flags to give, keys of the recipe), each on top of those before it."""
    recipe = question.recipe
    rows = question.units() * recipe.objective.accumulate  # of a batch on a device
    to_half = question.arithmetic == "float32" and question.topology.auto_dtype == "bfloat16"
    if question.embed:
        steps: list[tuple[str, Any, bool]] = [("dtype", "bfloat16", to_half)]
        steps += [("batch_size", recipe.batch_size * n // rows, True) for n in _halves(rows)]
    else:
        mesh = recipe.mesh or MeshConfig()
        fsdp = not mesh.fsdp and question.topology.devices > 1
        steps = [
            ("mesh.fsdp", True, fsdp),
            ("loss_chunk", 1024, recipe.objective.chunked and recipe.loss_chunk is None),
            ("dtype", "bfloat16", to_half),
            ("remat", "dots", recipe.remat == "none"),
            ("remat", "block", recipe.remat != "block"),
        ]
        pieces = recipe.objective.accumulate
        steps += [("objective.accumulate", rows // n, rows // n > pieces) for n in _halves(rows)]
    flags: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for key, value, applies in steps:
        if not applies:
            continue
        flags[key] = value
        group, _, inner = key.rpartition(".")
        if group:
            kind = getattr(recipe, group) or MeshConfig()
            changes[group] = dataclasses.replace(kind, **{inner: value})
        else:
            changes[inner] = value
        named = {"dtype": "--dtype"} if question.embed else {}
        said = (f"{named.get(key, f'--config.{key}')}={value}" for key, value in flags.items())
        yield " ".join(said), dict(changes)


def _halves(rows: int) -> Iterator[int]:
    """rows / 2, rows / 4 and so on, as long as they are whole numbers."""
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        yield rows


def sweep(
    question: Question,
    places: Sequence[topologies.Topology],
    remats: Sequence[str],
    progress: Progress,
) -> list[Plan]:
    """A plan for each topology and remat policy with the same batch. Those that fit come first, in
    the order of the bound on their chip-seconds per example."""
    plans = []
    for place in places:
        for remat in remats:
            elsewhere = dataclasses.replace(question, topology=place)
            result = plan(elsewhere.with_recipe(remat=remat))
            chip_seconds = result["bound_seconds"] * result["chips"]
            result["chip_seconds_per_example"] = chip_seconds / result["batch_size"]
            fits = "fits" if result["fits"] else "does not fit"
            progress(f"{place} remat {remat}: {fits}, {topologies.shown(result['peak_bytes'])}")
            plans.append(result)
    return sorted(plans, key=lambda p: (not p["fits"], p["chip_seconds_per_example"]))
