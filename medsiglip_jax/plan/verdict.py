"""Plans: a run on a topology, the largest batch, what would make it fit, and a table of many."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medsiglip_jax.plan import bound, topologies, worker
from medsiglip_jax.plan.topologies import Topology
from medsiglip_jax.train.recipe import Mesh, Recipe

Plan = dict[str, Any]
Progress = Callable[[str], None]
# A compilation that is made to believe in so little memory stops after seconds and says what it
# needs; a whole one takes minutes.
_PROBE_MIB = 1
# Of a chip's memory, for what no compiler sees: the next batch on its way, fragments.
HEADROOM = 0.05


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        recipe: the run; its data are not read.
        topology: where.
        embed: embedding images in batches of the recipe's size, instead of training.
        quick: ask the compiler only how much memory the program needs at the least; no
            collectives, and of the bound no part of theirs.
    """

    recipe: Recipe
    topology: Topology
    embed: bool = False
    quick: bool = False

    def __post_init__(self):
        devices, pieces = self._split(), self.recipe.objective.accumulate
        if devices > 1 and self.recipe.batch_size % (devices * pieces):
            raise ValueError(
                f"batch_size {self.recipe.batch_size} is not divisible by the {devices} devices of "
                f"{self.topology}" + (f" x {pieces} pieces" if pieces > 1 else "")
            )

    def _split(self) -> int:
        """Devices over which batches are split."""
        devices = self.topology.devices
        data = (self.recipe.mesh or Mesh()).data or devices
        if data > devices:
            raise ValueError(
                f"mesh.data is {data}; expected at most the {devices} devices of {self.topology}"
            )
        return data

    def per_chip(self) -> float:
        """Examples of a batch."""
        return self.recipe.batch_size / self.topology.chips

    def with_recipe(self, **changes: Any) -> "Question":
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **changes))

    def with_batch(self, units: int) -> "Question":
        """With the smallest batch that divides, times `units`."""
        return self.with_recipe(batch_size=units * self._split() * self.recipe.objective.accumulate)

    def units(self) -> int:
        """The inverse of `with_batch`."""
        return self.recipe.batch_size // (self._split() * self.recipe.objective.accumulate)

    def ask(self, quick: bool) -> dict[str, Any]:
        return worker.ask(
            {
                "recipe": self.recipe.to_dict(),
                "topology": str(self.topology),
                "embed": self.embed,
                "limit_mib": _PROBE_MIB if quick else None,
            }
        )


def plan(question: Question) -> Plan:
    """Whether it fits, what it needs, and the bound on its speed."""
    return _plan(question, question.ask(question.quick))


def _plan(question: Question, answer: Mapping[str, Any]) -> Plan:
    topology, chip = question.topology, question.topology.chip
    memory = answer.get("memory")
    peak = memory["peak"] if memory else answer["needed"]
    allowed = int(chip.usable * (1 - HEADROOM))
    bounds = bound.seconds(answer, topology)
    flops = answer["flops"]["model"] + answer["flops"]["again"]
    peak = None if peak is None else peak * chip.devices
    return {
        "topology": str(topology),
        "chips": topology.chips,
        "batch_size": question.recipe.batch_size,
        "remat": question.recipe.remat,
        "fits": peak is not None and peak <= allowed and (answer["compiled"] or question.quick),
        "compiled": answer["compiled"],
        "peak_bytes": peak,
        "hbm_bytes": chip.hbm,
        "usable_bytes": chip.usable,
        "allowed_bytes": allowed,
        "headroom_bytes": None if peak is None else allowed - peak,
        "memory": memory and {part: size * chip.devices for part, size in memory.items()},
        "state_bytes": answer["state_bytes"] * chip.devices,
        "largest": {
            name: size * chip.devices
            for name, size in sorted(answer["largest"].items(), key=lambda pair: -pair[1])[:5]
        },
        "max_batch_per_chip": None,
        "collectives": answer.get("collectives"),
        "flops": flops,
        "model_flops": answer["flops"]["model"],
        "xla_flops": answer.get("xla_flops"),
        "bound_seconds": max(bounds.values()),
        "bound": bounds,
        "limit": max(bounds, key=lambda name: bounds[name]),
        "compile_seconds": answer["seconds"],
        "compiler_bytes": answer["compiler_bytes"],
        "trained": answer["trained"],
        "parameters": answer["parameters"],
    }


def max_batch(question: Question, progress: Progress) -> float:
    """Examples per chip of the largest batch that fits, 0 if none does.

    Each try asks only what the program needs at the least, which grows nearly in proportion to the
    batch: the next one is where the line through the two nearest says that it is full. What fits by
    that may still not fit when it is compiled whole, which the last try is, with less each time it
    fails.
    """

    def room(units: int, quick: bool = True) -> int:
        asked = question.with_batch(units)
        found = plan(dataclasses.replace(asked, quick=quick))
        said = "fits" if found["fits"] else "does not"
        progress(f"batch {asked.recipe.batch_size} ({asked.per_chip():g} a chip) {said}")
        return found["headroom_bytes"] if found["fits"] else min(found["headroom_bytes"] or -1, -1)

    low, high = 0, max(1, question.units())
    left = question.topology.chip.usable
    while (over := room(high)) >= 0:
        low, high, left = high, 2 * high, over
    while high - low > 1:
        guess = min(high - 1, max(low + 1, int(low + (high - low) * left / (left - over))))
        if guess - low <= low // 16:
            break
        if (found := room(guess)) >= 0:
            low, left = guess, found
        else:
            high, over = guess, found
    while low and not question.quick and room(low, quick=False) < 0:
        low = low * 7 // 8
    return question.with_batch(low).per_chip() if low else 0


def advice(question: Question, progress: Progress) -> list[dict[str, Any]]:
    """Changes with which the run would fit, tried one on top of the other, the cheapest in speed
    first, until one fits or none is left."""
    found = []
    for name, changes in _remedies(question):
        changed = question.with_recipe(**changes)
        result = plan(dataclasses.replace(changed, quick=True))
        said = "fits" if result["fits"] else "does not fit"
        progress(f"{name}: {said}")
        keys = ("fits", "peak_bytes", "compiled")  # never compiled: by the least that it needs
        found.append({"change": name, **{key: result[key] for key in keys}})
        if result["fits"]:
            break
    return found


def _remedies(question: Question) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to write, keys of the recipe), each on top of those before it."""
    recipe, embed = question.recipe, question.embed
    rows = question.units() * recipe.objective.accumulate  # of a batch on a device
    if embed:
        steps: list[tuple[str, Any, bool]] = [("dtype", "bfloat16", recipe.dtype == "float32")]
        steps += [("batch_size", recipe.batch_size * n // rows, True) for n in _halves(rows)]
    else:
        mesh = recipe.mesh or Mesh()
        fsdp = not mesh.fsdp and question.topology.devices > 1
        steps = [
            ("mesh.fsdp", True, fsdp),
            ("loss_chunk", 1024, recipe.objective.chunked and recipe.loss_chunk is None),
            ("dtype", "bfloat16", recipe.dtype == "float32"),
            ("remat", "dots", recipe.remat == "none"),
            ("remat", "block", recipe.remat != "block"),
        ]
        pieces = recipe.objective.accumulate
        steps += [("objective.accumulate", rows // n, rows // n > pieces) for n in _halves(rows)]
    said: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for key, value, applies in steps:
        if not applies:
            continue
        said[key] = value
        group, _, inner = key.rpartition(".")
        if group:
            kind = getattr(recipe, group) or Mesh()
            changes[group] = dataclasses.replace(kind, **{inner: value})
        else:
            changes[inner] = value
        yield " ".join(f"--config.{k}={v}" for k, v in said.items()), dict(changes)


def _halves(rows: int) -> Iterator[int]:
    """rows / 2, rows / 4 and so on, as long as they are whole."""
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        yield rows


def sweep(
    question: Question, names: Sequence[str], remats: Sequence[str], progress: Progress
) -> list[Plan]:
    """A plan for each topology and remat policy with the same batch, cheapest bound first, in
    chip-seconds an example; what does not fit comes last."""
    found = []
    for name in names:
        for remat in remats:
            asked = dataclasses.replace(question, topology=topologies.parse(name))
            result = plan(asked.with_recipe(remat=remat))
            result["chip_seconds_per_example"] = (
                result["bound_seconds"] * result["chips"] / result["batch_size"]
            )
            fits = "fits" if result["fits"] else "does not fit"
            progress(f"{name} remat {remat}: {fits}, {topologies.shown(result['peak_bytes'])}")
            found.append(result)
    return sorted(found, key=lambda p: (not p["fits"], p["chip_seconds_per_example"]))
