"""Hosts with NVIDIA cards, what a card can do (`cards.toml`), and XLA's compiler for them.

XLA compiles for a card that is only described, on a machine that has no card and no driver. The
description is its `GpuTargetConfigProto` (openxla/xla, stream_executor/device_description.proto).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse_toml
from medsiglip_jax.files.failures import explained

# Share of a card's memory that the commands let JAX take when it starts (`cli.devices`). JAX's own
# 0.75 would leave 20 GB of an 80 GB card unused; CUDA itself needs about 0.5 GiB.
FRACTION = 0.92
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_Int = Annotated[int, settings.more_than(0)]
_Float = Annotated[float, settings.more_than(0)]


@dataclass(frozen=True)
class Flops:
    """Operations per second of dense matrix products at the peak, by dtype; None: not supported.

    Attributes:
        float32: outside of tensor cores, with all 24 bits.
        float16: of the tensor cores.
        bfloat16: of the tensor cores.
        measured: share of the half-precision peak that a large product reached; None: unknown.
    """

    float32: _Float
    float16: _Float
    bfloat16: _Float | None = None
    measured: _Float | None = None


@dataclass(frozen=True)
class Card:
    """A card; `cards.toml` says what the fields mean and where the numbers come from."""

    name: str
    compute_capability: str
    multiprocessors: _Int
    shared_memory: _Int
    shared_memory_block: _Int
    memory: _Int
    memory_bandwidth: _Float
    l2_cache: _Int
    clock_ghz: _Float
    flops: Flops
    link: Annotated[str, settings.one_of(("nvlink", "pcie"))]
    link_bandwidth: _Float
    network_bandwidth: _Float
    units_per_multiprocessor: _Int = 128
    threads: _Int = 2048
    registers: _Int = 65536
    per_host: _Int = 8
    devices: ClassVar[int] = 1

    def __post_init__(self):
        if not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise ValueError(f"compute_capability is {self.compute_capability!r}; expected '9.0'")

    @property
    def hbm(self) -> int:
        """Bytes of memory, as `tpus.Chip.hbm`."""
        return self.memory

    @property
    def usable(self) -> int:
        """Bytes of memory that a program may use."""
        return int(self.memory * FRACTION)

    def target_config(self) -> str:
        """The card as XLA's compiler wants it, for the libraries that are installed here."""
        major, minor = self.compute_capability.split(".")
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.shared_memory_block}
  threads_per_core_limit: {self.threads}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.units_per_multiprocessor}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth:.0f}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {self.registers}
  registers_per_block_limit: {self.registers}
}}
platform_name: "CUDA"
dnn_version_info {{ {_version("nvidia-cudnn", 9, 10)} }}
runtime_version {{ {_version("nvidia-cuda-runtime", 12, 8)} }}
device_description_str: "{self.name}"
"""


def _version(package: str, *default: int) -> str:
    """Of NVIDIA's library for CUDA 12 or 13 as a proto; the default where none is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for suffix in ("-cu12", "-cu13", ""):
        try:
            default = tuple(map(int, version(package + suffix).split(".")[:2]))
        except PackageNotFoundError:
            continue
        break
    return f"major: {default[0]} minor: {default[1]}"


@functools.cache
def bundled() -> Mapping[str, Card]:
    """The cards of `cards.toml`, by name."""
    path = resources.files("medsiglip_jax.plan") / "cards.toml"
    return _parse_cards(path.read_bytes(), "cards.toml")


def read(path: str | os.PathLike) -> dict[str, Card]:
    """The bundled cards and those of a file in the same form.

    Raises:
        ValueError: all that is wrong with the file.
    """
    return {**bundled(), **_parse_cards(Path(path).read_bytes(), str(path))}


def _parse_cards(text: bytes, path: str) -> dict[str, Card]:
    with explained(path, "not TOML"):
        tables = parse_toml(text.decode())
    cards, problems = {}, []
    for name, table in tables.items():
        try:
            if not isinstance(table, dict) or not _NAME.fullmatch(name):
                raise ValueError("expected a table with a name in lower case, such as [l40s]")
            cards[name] = settings.build(Card, table, "the card")
        except ValueError as error:
            problems.append(f"[{name}]: {error}")
    if not tables:
        problems = ["no card in it; expected tables such as [l40s]"]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return cards


@dataclass(frozen=True)
class Hosts:
    """Equal hosts with equal cards.

    Attributes:
        key: what the card is called.
        card: what it is.
        per_host: cards of a host.
        hosts: number of hosts.
    """

    key: str
    card: Card
    per_host: int = 1
    hosts: int = 1

    unit: ClassVar[str] = "card"
    quick: ClassVar[bool] = False  # the compiler has no such answer as libtpu
    # What the process that compiles needs in its environment.
    environment: ClassVar[Mapping[str, str]] = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # or the plugin refuses to load without a driver
        "CUDA_VISIBLE_DEVICES": "-1",
        # Both would try kernels on a card; matrix products are cuBLAS's then, as most are anyway.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def __str__(self) -> str:
        cards = f"-{self.per_host}" if self.per_host > 1 else ""
        return f"{self.key}{cards}" + (f"*{self.hosts}" if self.hosts > 1 else "")

    @property
    def chip(self) -> Card:
        """The card, as `tpus.Slice.chip`."""
        return self.card

    @property
    def measured(self) -> float | None:
        """Share of the half-precision peak that a large matrix product reached."""
        return self.card.flops.measured

    @property
    def auto_dtype(self) -> str:
        """As `model.devices.auto_dtype`."""
        return "bfloat16" if self.card.flops.bfloat16 else "float32"

    @property
    def chips(self) -> int:
        """The number of cards on all hosts."""
        return self.per_host * self.hosts

    @property
    def devices(self) -> int:
        """How many devices JAX sees: the cards."""
        return self.chips

    def to_dict(self) -> dict[str, Any]:
        """What `topologies.from_dict` takes."""
        return {"name": str(self), "cards": {self.key: dataclasses.asdict(self.card)}}

    def check_installed(self) -> None:
        """Raises ModuleNotFoundError, with what to install, where XLA's compiler is missing."""
        if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise ModuleNotFoundError(
                "plan compiles for NVIDIA cards with jax's CUDA plugin, which is not installed; "
                "pip install 'medsiglip-jax[plan-gpu]' (Linux, 6 GB; no card and no driver needed)"
            )

    def check_dtype(self, dtype: str) -> None:
        """Raises ValueError for a dtype that the card lacks."""
        if getattr(self.card.flops, dtype) is None:
            raise ValueError(
                f"{self.key} ({self.card.name}, compute capability {self.card.compute_capability}) "
                f"has no {dtype}; train with --config.dtype=float32, embed with --dtype float16"
            )

    def compute_bound(self, flops: int | float, dtype: str) -> dict[str, float]:
        """Seconds of the units that multiply, for so many operations in all."""
        unit = "fp32" if dtype == "float32" else "tensor_cores"
        return {unit: flops / self.chips / getattr(self.card.flops, dtype)}

    def memory_bound(self, moved: int | float) -> dict[str, float]:
        """Seconds to move so many bytes in the memory of each card."""
        return {"memory": moved / self.card.memory_bandwidth}

    def links_bound(self, received: int | float) -> dict[str, float]:
        """Seconds to receive so many bytes on each card, from the others of the host and, through
        all network cards at once, from other hosts."""
        n, hosts = self.chips, self.hosts
        # Of what all cards send, a host gets each byte from outside once, by any of its cards.
        outside = received * n / max(1, n - 1) * (hosts - 1) / hosts / self.per_host
        bounds = {}
        if self.per_host > 1:
            bounds[self.card.link] = (received - outside) / self.card.link_bandwidth
        if hosts > 1:
            bounds["network"] = outside / self.card.network_bandwidth
        return bounds

    def compiler_devices(self) -> list[Any]:
        """The cards as JAX compiles for them; in a process with `environment`."""
        from jax.experimental import topologies

        description = topologies.get_topology_desc(
            str(self), "cuda", target_config=self.card.target_config(),
            topology=f"{self.hosts}x1x{self.per_host}",
        )  # fmt: skip
        return list(description.devices)


def card_of(name: str, cards: Mapping[str, Card]) -> str | None:
    """The key of the card that the name of a topology begins with."""
    matching = [key for key in cards if re.fullmatch(rf"{key}(-\d+)?(\*\d+)?", name.lower())]
    return max(matching, key=len, default=None)


def parse(name: str, cards: Mapping[str, Card]) -> Hosts:
    """Reads "h100", "h100-8" for a host with 8 of them, or "h100-8*4" for four such hosts.

    Raises:
        ValueError: no such card, or a host cannot have so many.
    """
    key = card_of(name, cards)
    if key is None:
        raise ValueError(f"topology {name!r} is unknown; expected a card, {', '.join(cards)}")
    counts = re.fullmatch(r"(?:-(\d+))?(?:\*(\d+))?", name.lower()[len(key) :])
    assert counts
    per_host, hosts = (int(count or 1) for count in counts.groups())
    most = cards[key].per_host
    if not 1 <= per_host <= most or not hosts:
        raise ValueError(
            f"topology {name!r}: a host has 1 to {most} {key}; {key}-{most}*2 are two hosts"
        )
    return Hosts(key, cards[key], per_host, hosts)
