"""TPU slices by their usual names, the peak figures of a chip of each generation, and libtpu."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

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
        flops: bfloat16 operations per second at the peak; float32 is slower.
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
class Slice:
    """One slice, or several equal ones.

    Attributes:
        generation: key of `CHIPS`.
        layout: chips along each axis of a slice.
        slices: number of slices.
    """

    generation: str
    layout: tuple[int, ...]
    slices: int = 1

    unit: ClassVar[str] = "chip"
    quick: ClassVar[bool] = True  # the compiler can say the least memory in seconds
    measured: ClassVar[float | None] = None
    auto_dtype: ClassVar[str] = "bfloat16"  # as `model.devices.auto_dtype`
    # What the process that loads libtpu needs in its environment.
    environment: ClassVar[Mapping[str, str]] = {
        "JAX_PLATFORMS": "cpu",
        # One CPU device is enough; XLA_FLAGS may ask for more, or hold flags unknown to libtpu.
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # else libtpu looks for the machine's, and complains
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        # Nothing runs on a TPU, so several plans may load libtpu, also beside a user of a TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }

    def __str__(self) -> str:
        times = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.generation}:{'x'.join(map(str, self.layout))}{times}"

    @property
    def chip(self) -> Chip:
        """What a chip of this generation can do."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.layout) * self.slices

    @property
    def devices(self) -> int:
        """How many devices JAX sees; two for each chip of some generations."""
        return self.chips * self.chip.devices

    def to_dict(self) -> dict[str, Any]:
        """What `topologies.from_dict` takes."""
        return {"name": str(self), "cards": {}}

    def check_installed(self) -> None:
        """Raises ModuleNotFoundError, with what to install, where libtpu is missing."""
        if find_spec("libtpu") is None:
            raise ModuleNotFoundError(
                "plan compiles for TPUs with libtpu, which is not installed; pip install "
                "'medsiglip-jax[plan]' (Linux; no TPU needed)"
            )

    def check_dtype(self, dtype: str) -> None:
        """All dtypes run."""

    def compute_bound(self, flops: int | float, dtype: str) -> dict[str, float]:
        """Seconds of the matrix units for so many operations in all."""
        return {"mxu": flops / self.chips / self.chip.flops}

    def memory_bound(self, moved: int | float) -> dict[str, float]:
        """Seconds to move so many bytes in the memory of each device."""
        return {"hbm": moved * self.chip.devices / self.chip.hbm_bandwidth}

    def links_bound(self, received: int | float) -> dict[str, float]:
        """Seconds to receive so many bytes on each device, over all its links at once; between
        slices the network is slower."""
        return {"ici": received * self.chip.devices / self.chip.ici_bandwidth}

    def compiler_devices(self) -> list[Any]:
        """The devices as JAX compiles for them; in a process with `environment`.

        Raises:
            ValueError: libtpu knows no such slice.
        """
        import jax
        from jax.experimental import topologies

        more: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if set(self.layout) == {1}:
            more["chips_per_host_bounds"] = (1, 1, 1)
        try:
            description = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.platform}:{'x'.join(map(str, self.layout))}",
                chip_config_name=self.chip.config, **more,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).split("\n")[0].partition(": ")[2] or str(error)
            raise ValueError(f"topology {self} does not exist; libtpu: {reason}") from None
        return list(description.devices)


def parse(name: str) -> Slice:
    """Reads "v5e:4x4", or as Cloud TPU sells it "v5e-16"; "v5e:4x4*2" are two slices.

    Raises:
        ValueError: no such generation or layout.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))(?:\*(\d+))?", name.lower())
    generation = _OTHER_NAMES.get(match[1], match[1]) if match else ""
    if not match or generation not in CHIPS:
        raise ValueError(
            f"topology {name!r} is unknown; expected a TPU generation, {', '.join(CHIPS)}, and "
            "chips along its axes: v5e:4x4, v5p:2x2x1, or v5e:4x4*2 for two slices"
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
    return Slice(generation, axes, int(match[4] or 1))
