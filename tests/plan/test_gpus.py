"""Plans for NVIDIA cards: names, descriptions and bounds; and what XLA compiles for cards that are
not here, where jax's CUDA plugin is installed."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from test_plan import FSDP, TINY, check_against_baseline

from medsiglip_jax import cli
from medsiglip_jax.plan import bound, gpus, topologies, verdict, worker
from medsiglip_jax.plan.topologies import parse
from medsiglip_jax.train import configs, recipe

CARDS = gpus.bundled()
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
needs_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="jax's CUDA plugin is not installed; pip install '.[plan-gpu]'",
)


# ----------------------------------------------------------------------------- names and files


@pytest.mark.parametrize("name, key, per_host, hosts", [
    ("h100", "h100", 1, 1), ("H100-8", "h100", 8, 1), ("h200-8", "h200", 8, 1),
    ("a100-80", "a100-80", 1, 1), ("a100-80-4", "a100-80", 4, 1), ("a100-40-2", "a100-40", 2, 1),
    ("b200-8", "b200", 8, 1), ("h100-8*4", "h100", 8, 4), ("rtx4090*2", "rtx4090", 1, 2),
])  # fmt: skip
def test_names(name, key, per_host, hosts):
    found = parse(name)
    assert (found.key, found.per_host, found.hosts) == (key, per_host, hosts)
    assert parse(str(found)) == found == topologies.from_dict(found.to_dict())
    assert found.chips == found.devices == per_host * hosts


@pytest.mark.parametrize("name, say", [
    ("h900", "'h900' is unknown; .* or an NVIDIA card, h100, h200"), ("a100-4", "NVIDIA card"),
    ("h100-16", "a host has 1 to 8 h100; h100-8\\*2 are two hosts"), ("h100-0", "1 to 8"),
    ("h100*0", "1 to 8"), ("h100:2x2", "unknown"),
])  # fmt: skip
def test_wrong_names(name, say):
    with pytest.raises(ValueError, match=say):
        parse(name)


def test_the_promised_cards_are_there():
    assert set("h100 h200 a100-80 b200 a6000 l4 l40s a10g rtx4090 t4".split()) <= set(CARDS)
    assert {key for key, card in CARDS.items() if card.flops.bfloat16 is None} == {"t4"}
    assert {key for key, card in CARDS.items() if card.compute_capability < "8.0"} == {"b200", "t4"}
    for card in CARDS.values():
        assert card.flops.float32 < card.flops.float16
        assert card.flops.bfloat16 in (None, card.flops.float16)
    # Of openxla's own descriptions, and of the data sheets.
    h100, a100 = CARDS["h100"], CARDS["a100-80"]
    assert (h100.memory, h100.multiprocessors, h100.flops.bfloat16) == (84929347584, 132, 989e12)
    assert (a100.memory, a100.multiprocessors, a100.flops.bfloat16) == (85100068864, 108, 312e12)


CARD = """
[mine]
name = "NVIDIA Mine"
compute_capability = "8.6"
multiprocessors = 40
shared_memory = 102400
shared_memory_block = 101376
memory = 8_000_000_000
memory_bandwidth = 4e11
l2_cache = 4_000_000
clock_ghz = 2
flops = { float16 = 5e13, float32 = 1e13 }
link = "pcie"
link_bandwidth = 16e9
network_bandwidth = 1e9
"""


def test_a_card_of_a_file(tmp_path):
    (tmp_path / "cards.toml").write_text(CARD)
    cards = gpus.read(tmp_path / "cards.toml")
    found = parse("mine-2", cards)
    assert found.card.memory == 8_000_000_000 and set(CARDS) < set(cards)
    assert "core_count: 40\n" in found.card.target_config()
    assert topologies.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("change, say", [
    (("memory = 8_000_000_000\n", ""), r"\[mine\]: .*lacks memory"),
    (("clock_ghz", "clock_gzh"), "no key clock_gzh .did you mean clock_ghz"),
    (("= 40", "= -40"), "multiprocessors is -40; expected more than 0"),
    (('"8.6"', '"86"'), "compute_capability is '86'; expected '9.0'"),
    (('"pcie"', '"pci"'), "link is 'pci'; expected one of nvlink, pcie"),
    (("[mine]", "[MINE]"), "name in lower case"), (("[mine]", "mine"), "not TOML"),
    ((CARD, ""), "no card in it"),
])  # fmt: skip
def test_a_wrong_card_is_one_line(change, say, tmp_path, capsys):
    path = tmp_path / "cards.toml"
    path.write_text(CARD.replace(*change))
    flags = ["plan", "--config", "smoke", "--topology", "mine", "--card", str(path)]
    assert cli.main(flags) == 2
    line = capsys.readouterr().err.strip()
    assert re.search(say, line) and str(path) in line and len(line.splitlines()) == 1


# ------------------------------------------------------------------------------------- bounds


ANSWER = {
    "flops": {"model": 8e15, "recomputed": 2e15}, "state_bytes": 10**9,
    "collectives": {"all-gather": {"bytes": 31 * 10**8}},
}  # fmt: skip


def test_bounds_are_the_data_sheets():
    one, host, hosts = (
        bound.seconds(ANSWER, parse(name), "bfloat16") for name in ("h100", "h100-8", "h100-8*4")
    )
    assert one == {"tensor_cores": 1e16 / 989e12, "memory": 1e9 / 3.352e12}
    assert host["tensor_cores"] == one["tensor_cores"] / 8
    assert host["nvlink"] == 31e8 / 450e9 and "network" not in host
    # 32 cards gather 3.2 GB: of the 2.4 GB from other hosts each of 8 cards receives an eighth.
    assert hosts["network"] == pytest.approx(2.4e9 / 8 / 50e9)
    assert hosts["nvlink"] == pytest.approx((31e8 - 0.3e9) / 450e9)
    assert "pcie" in bound.seconds(ANSWER, parse("l4-2"), "bfloat16")
    assert bound.seconds(ANSWER, parse("l4"), "float32")["fp32"] == 1e16 / 30.3e12


def test_what_was_measured_bounds_matrix_products_only():
    topology = parse("h100")
    bounds = bound.seconds(ANSWER, topology, "bfloat16")
    assert bound.reachable(bounds, topology, "float16") == pytest.approx(1e16 / 791.2e12)
    assert bound.reachable({"tensor_cores": 1.0, "memory": 3.0}, topology, "bfloat16") == 3.0
    assert bound.reachable(bounds, parse("l4"), "bfloat16") is None
    assert bound.reachable({"fp32": 1.0}, topology, "float32") is None


# ---------------------------------------------------------------------- requests and mistakes


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(gpus.Hosts, "check_installed", lambda self: None)


@pytest.mark.parametrize("flags, say", [
    (["t4"], "t4 (Tesla T4, compute capability 7.5) has no bfloat16; train with --config.dtype"),
    (["h100-8", "--config.batch_size=12"], "12 is not divisible by the 8 devices of h100-8"),
    (["h100", "--dtype", "float16"], "--dtype is for --embed"),
    (["h100", "--embed", "--dtype", "float8"], "expected one of float32, bfloat16, float16"),
    (["h900"], "an NVIDIA card"), (["h100", "--card", "no.toml"], "no.toml"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, say, installed, capsys):
    code = cli.main(["plan", "--config", "contrastive", "--topology", *flags])
    out = capsys.readouterr()
    assert code == 2 and say in out.err and not out.out
    assert len(out.err.strip().splitlines()) == 1


def test_advice_for_a_card_without_bfloat16_is_not_bfloat16():
    asked = recipe.from_dict(TINY | {"dtype": "float32"})
    for embed in (False, True):
        changes = [c for _, c in verdict._remedies(verdict.Question(asked, parse("t4"), embed))]
        assert changes and not any("dtype" in change for change in changes)
    (flags, changes), *_ = verdict._remedies(verdict.Question(asked, parse("l4"), embed=True))
    assert (flags, changes) == ("--dtype=bfloat16", {"dtype": "bfloat16"})


def test_auto_is_what_the_card_has():
    asked = recipe.from_dict(TINY | {"dtype": "auto"})
    assert verdict.Question(asked, parse("t4")).arithmetic == "float32"
    assert verdict.Question(asked, parse("l4")).arithmetic == "bfloat16"
    assert verdict.Question(asked, parse("v5e:2x2")).arithmetic == "bfloat16"


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(gpus, "find_spec", lambda name: None)
    assert cli.main(["plan", "--config", "contrastive", "--topology", "h100"]) == 1
    assert "pip install 'medsiglip-jax[plan-gpu]'" in capsys.readouterr().err


def test_the_compiler_sees_no_card_and_no_flags_of_this_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    inner = worker.environment(parse("h100"))
    assert inner["CUDA_VISIBLE_DEVICES"] == "-1" and "isa" not in inner["XLA_FLAGS"]
    assert "JAX_COMPILATION_CACHE_DIR" not in inner


# ---------------------------------------------------------------------------- with the compiler

BATCH = 8
# The logits of one image or of all, in any precision.
LOGITS = re.compile(r"\w+\[(?:\d+,)*1024,1024\]")


def compiled_text(topology, embed, **changes):
    """The program that a plan compiles, as text, in a process of its own."""
    code = (
        "import json, sys\n"
        "from medsiglip_jax.plan import program, topologies\n"
        "from medsiglip_jax.train import recipe\n"
        "topology, embed, asked = json.loads(sys.stdin.readline())\n"
        "devices = topologies.from_dict(topology).compiler_devices()\n"
        "build = program._embedding if embed else program._step\n"
        "print(build(recipe.from_dict(asked), devices)[0].compile().as_text())"
    )
    place = parse(topology)
    asked = replace(configs.read("contrastive"), **changes)
    line = json.dumps([place.to_dict(), embed, asdict(asked)])
    done = subprocess.run(
        [sys.executable, "-c", code], input=line, env=worker.environment(place),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check_fused(text, backward):
    """Attention is cuDNN's kernel, and no buffer of the program holds logits."""
    fused = {"__cudnn$fmhaSoftmax", *(["__cudnn$fmhaSoftmaxBackward"] if backward else [])}
    missing = fused - set(re.findall(r'custom_call_target="([^"]+)"', text))
    logits = sorted(set(LOGITS.findall(text)))
    assert not missing and not logits, f"not in the program: {missing}; logits: {logits}"


@needs_compiler
@pytest.mark.parametrize("card", ["h100", "a100-80"])
@pytest.mark.parametrize("embed", [True, False], ids=["tower", "step"])
def test_attention_is_fused_and_logits_stay_on_the_chip(card, embed):
    text = compiled_text(card, embed, batch_size=BATCH, remat="none" if embed else "dots")
    check_fused(text, backward=not embed)


@needs_compiler
def test_the_guard_fails_with_attention_that_writes_its_logits():
    text = compiled_text("h100", True, batch_size=BATCH, attention="xla", remat="none")
    with pytest.raises(AssertionError, match="fmhaSoftmax.*8,16,1024,1024"):
        check_fused(text, backward=False)


@needs_compiler
@pytest.mark.parametrize("where, embed, flags", [
    ("h100", True, ["--config.batch_size=128"]), ("a100-80", True, ["--config.batch_size=128"]),
    ("h100", False, ["--config.batch_size=32"]),
    ("h100-8", False, [FSDP, "--config.remat=block", "--config.batch_size=256"]),
], ids=["h100 tower", "a100 tower", "h100 step", "h100-8 fsdp step"])  # fmt: skip
def test_memory_and_collectives_are_as_in_the_baseline(where, embed, flags, request):
    """Full size; half a minute each."""
    asked = configs.read("contrastive", flags)
    asked = replace(asked, remat="none") if embed else asked
    found = verdict.plan(verdict.Question(asked, parse(where), embed))
    assert found["fits"] and found["attention"] == "cudnn"
    check_against_baseline(request.node.callspec.id, found, memory=0.02)


@needs_compiler
def test_the_command(tmp_path, capsys):
    """The promised keys of a plan for cards, with sizes that agree with the arrays."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config(arg=None):\n    return {TINY!r}\n")
    flags = ["plan", "--config", str(config), "--topology", "h100-2", "--json"]
    assert cli.main([*flags, "--config.remat=block"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["compiled"] and found["hbm_bytes"] == CARDS["h100"].memory
    assert found["attention"] == "xla", "heads of 12"
    assert found["peak_bytes"] > found["memory"]["temporaries"]
    assert found["memory"]["arguments"] >= found["state_bytes"] >= 3 * 4 * found["trained"]
    assert found["collectives"]["collective-permute"]["runs"] == 2  # the ring of the loss
    assert found["bound_seconds"] == max(found["bound"].values())
    assert found["reachable_seconds"] >= found["bound_seconds"]
    assert found["xla_flops"] is None, "XLA counts none for GPUs"


@needs_compiler
def test_splash_on_a_card_is_one_line(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"def get_config(arg=None):\n    return {TINY!r}\n")
    flags = ["plan", "--config", str(config), "--topology", "h100", "--config.attention=splash"]
    assert cli.main(flags) == 2
    assert "'splash' cannot be used: it needs a TPU, this is NVIDIA H100" in capsys.readouterr().err


@needs_compiler
def test_a_card_without_bfloat16_embeds_in_float16():
    asked = replace(recipe.from_dict(TINY), remat="none", dtype="float16")
    found = verdict.plan(verdict.Question(asked, parse("t4"), embed=True))
    assert found["fits"] and found["attention"] == "xla" and "tensor_cores" in found["bound"]
