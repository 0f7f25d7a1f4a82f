"""TPU slices by their usual names, and the peak figures of a chip of each generation."""

import math
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip of one generation.

    Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; `usable` is what libtpu 0.0.52
    reports when a program needs more ("exceeds available HBM").

    Attributes:
        platform: libtpu's name of the generation.
        axes: number of axes of its torus.
        hbm: bytes of memory.
        usable: bytes of memory that a program may use.
        flops: bfloat16 operations per second at the peak.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second over all links of a chip, in one direction.
        devices: how many devices JAX sees; they share memory and speed in equal parts.
        config: libtpu's chip_config_name; "megacore" makes the two cores of a v4 one device.
    """

    platform: str
    axes: int
    hbm: int
    usable: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int = 1
    config: str = "default"


def shown(size: int | None) -> str:
    """Bytes in GiB or MiB, to be read by people."""
    if size is None:
        return "unknown"
    return f"{size / GIB:.2f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


CHIPS = {
    "v4": Chip("v4", 3, 32 * GIB, int(30.75 * GIB), 275e12, 1.228e12, 300e9, config="megacore"),
    "v5e": Chip("v5e", 2, 16 * GIB, int(15.75 * GIB), 197e12, 0.82e12, 200e9),
    "v5p": Chip("v5", 3, 96 * GIB, int(95.73 * GIB), 459e12, 2.765e12, 600e9, config="megacore"),
    "v6e": Chip("v6e", 2, 32 * GIB, int(31.24 * GIB), 918e12, 1.64e12, 400e9),
    "7x": Chip("tpu7x", 3, 192 * GIB, int(2 * 94.74 * GIB), 2307e12, 7.4e12, 600e9, devices=2),
}
_OTHER_NAMES = {"v5": "v5p", "v5litepod": "v5e", "tpu7x": "7x", "v7x": "7x", "ironwood": "7x",
                "trillium": "v6e"}  # fmt: skip
# The layouts that Cloud TPU gives by number: of chips for v5e and v6e, of cores for v4 and v5p.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
_BY_NUMBER = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}


@dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones.

    Attributes:
        generation: key of `CHIPS`.
        layout: chips along each axis of a slice.
        slices: number of slices.
    """

    generation: str
    layout: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        times = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.generation}:{'x'.join(map(str, self.layout))}{times}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.layout) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices


def parse(name: str) -> Topology:
    """Reads "v5e:4x4", or as Cloud TPU sells it "v5e-16"; "v5e:4x4*2" are two slices.

    Raises:
        ValueError: no such generation or layout.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))(?:\*(\d+))?", name.lower())
    generation = _OTHER_NAMES.get(match[1], match[1]) if match else ""
    if not match or generation not in CHIPS:
        raise ValueError(
            f"topology {name!r} is unknown; expected a generation, {', '.join(CHIPS)}, and chips "
            "along its axes: v5e:4x4, v5p:2x2x1, or v5e:4x4*2 for two slices"
        )
    chip, layout = CHIPS[generation], match[2]
    if match[3]:
        sizes = _BY_NUMBER.get(generation, {})
        if int(match[3]) not in sizes:
            there = ", ".join(f"{generation}-{n}" for n in sizes) or "7x:2x2x1 and so on"
            raise ValueError(f"topology {name!r} is unknown; expected {there}")
        layout = sizes[int(match[3])]
    axes = tuple(map(int, layout.split("x")))
    if len(axes) != chip.axes or 0 in axes or match[4] == "0":
        example = "x".join("4" * chip.axes)
        raise ValueError(
            f"topology {name!r}: a slice of {generation} has {chip.axes} axes; expected for "
            f"example {generation}:{example}"
        )
    return Topology(generation, axes, int(match[4] or 1))
