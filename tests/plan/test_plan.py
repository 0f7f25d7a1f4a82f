"""Plans: names, counts and bounds against what they must be; compilation for TPUs that are not
here where libtpu is installed."""

import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from medsiglip_jax import cli
from medsiglip_jax.cli import plan
from medsiglip_jax.model import sharding, towers
from medsiglip_jax.model.config import named
from medsiglip_jax.plan import bound, collectives, program, tpus, verdict, worker
from medsiglip_jax.plan.topologies import GIB, parse, shown
from medsiglip_jax.plan.tpus import CHIPS
from medsiglip_jax.plan.verdict import Question
from medsiglip_jax.train import configs, flops, recipe

CONFIGS = Path(__file__).parents[2] / "configs"
BASELINE = Path(__file__).parents[1] / "plan_baseline.json"
TOWER = dict(width=512, depth=1, mlp_dim=2048, num_heads=8)
WIDE = {
    "vision": dict(image_size=224, patch_size=14, pool="map", **TOWER),
    "text": dict(vocab_size=64, context_length=64, embed_dim=512, **TOWER),
}
TINY = {"model": "tiny-56", "data": {"path": "no.csv"}, "total_steps": 10, "batch_size": 16,
        "dtype": "bfloat16", "loss_chunk": 4}  # fmt: skip
LABELS = {"objective": {"name": "classification"}, "data": {"path": "no.csv", "label": "x"}}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; pip install '.[plan]'",
)


@pytest.fixture
def eighty(tmp_path):
    """A config file with batches of 80."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config(arg=None):\n    return {TINY | {'batch_size': 80}!r}\n")
    return str(config)


# ------------------------------------------------------------------------------------ topologies


@pytest.mark.parametrize("name, generation, layout, slices", [
    ("v5e:4x4", "v5e", (4, 4), 1), ("v5litepod-16", "v5e", (4, 4), 1), ("v5e-8", "v5e", (2, 4), 1),
    ("V5P:2x2x1", "v5p", (2, 2, 1), 1), ("v5:2x2x1", "v5p", (2, 2, 1), 1),
    ("v4-8", "v4", (2, 2, 1), 1), ("v6e:2x2*3", "v6e", (2, 2), 3),
    ("tpu7x:2x2x1", "7x", (2, 2, 1), 1),
])  # fmt: skip
def test_names(name, generation, layout, slices):
    found = parse(name)
    assert (found.generation, found.layout, found.slices) == (generation, layout, slices)
    assert parse(str(found)) == found
    assert found.chips == np.prod(layout) * slices
    assert found.devices == found.chips * (2 if generation == "7x" else 1)


@pytest.mark.parametrize("name, say", [
    ("v9:2x2", "'v9:2x2' is unknown; expected a TPU generation, v4, v5e, v5p, v6e, 7x"),
    ("v5e", "is unknown"), ("v5e-7", "expected v5e-1, v5e-4, v5e-8"), ("v5e:2x2x2", "has 2 axes"),
    ("v5p:4x4", "has 3 axes; expected for example v5p:4x4x4"), ("v5e:0x4", "axes"),
    ("v5e:4x4*0", "axes"), ("7x-8", "expected 7x:2x2x1"),
])  # fmt: skip
def test_wrong_names(name, say):
    with pytest.raises(ValueError, match=say):
        parse(name)


# ----------------------------------------------------------------------------------------- FLOPs


def lowered(**changes):
    """The compiler's count of a step on one device, and ours; each step is traced once."""
    return _lowered(json.dumps(changes, sort_keys=True))


@functools.cache
def _lowered(changes):
    small = TINY | {"model": WIDE, "dtype": "float32", "batch_size": 64}
    step, facts = program._step(recipe.from_dict(small | json.loads(changes)), jax.devices()[:1])
    return step.cost_analysis()["flops"], facts["flops"]


@pytest.mark.parametrize("changes", [
    {"remat": "none"}, {"remat": "dots"}, {"remat": "block"}, {"freeze": ("img/.*",)},
    {"lora": {"rank": 64}},
    pytest.param({"lora": {"rank": 64}, "remat": "block"}, marks=pytest.mark.slow),
    {"freeze": ("(img|txt)/(embedding|Embed_0|pos_emb).*",)},
    LABELS, LABELS | {"objective": {"name": "classification", "pool": "mean"}, "remat": "block"},
], ids=str)  # fmt: skip
def test_flops_are_the_compilers_of_a_model_without_loops(changes):
    """One block a tower, so that the compiler's count misses none; it counts 0.6 % of sums, softmax
    and the like on top."""
    compilers, count = lowered(attention="xla", **changes)
    assert count["model"] + count["recomputed"] == pytest.approx(compilers, rel=0.01)


@pytest.mark.parametrize("remat", [
    "block", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("none", "dots")),
])  # fmt: skip
def test_flops_of_a_back_end_that_computes_its_logits_again(remat, monkeypatch):
    """Its heads are a loop, of which the compiler's count misses all: here they are a batch."""
    monkeypatch.setattr(jax.lax, "map", lambda f, xs, batch_size: jax.vmap(f)(xs))
    compilers, count = lowered(attention="blocked", remat=remat)
    assert count["model"] + count["recomputed"] == pytest.approx(compilers, rel=0.01)


def test_recomputation_is_no_model_flops():
    counts = {r: lowered(remat=r, attention="xla")[1] for r in ("none", "dots", "block")}
    assert len({count["model"] for count in counts.values()}) == 1
    again = [counts[r]["recomputed"] for r in ("none", "dots", "block")]
    assert again == sorted(again) and again[0] == 0 < again[1] < again[2]


def test_flops_of_the_full_model_are_the_published():
    """490.13 GMAC an image by timm's count of vit_so400m_patch16_siglip_512, of the same tokens."""
    config = named("so400m-448")
    count = flops.of_embedding(config, towers.param_shapes(config), 1)
    assert count.model / 2e9 == pytest.approx(490.13, rel=0.002)


# ---------------------------------------------------------------------------------------- bounds


def answer(batch, **changes):
    _, count = lowered(batch_size=batch, **changes)
    return {"flops": count, "state_bytes": 10**9}


@pytest.mark.parametrize("generation", CHIPS)
def test_the_bound_is_the_chips_limit(generation):
    topology = parse(f"{generation}:{'x'.join('2' * CHIPS[generation].axes)}")
    found = answer(4)
    seconds = bound.seconds(found, topology, "bfloat16")
    work = found["flops"]["model"] + found["flops"]["recomputed"]
    assert work / seconds["mxu"] / topology.chips == pytest.approx(topology.chip.flops)
    assert 10**9 * topology.chip.devices / seconds["hbm"] <= topology.chip.hbm_bandwidth * 1.0001


@pytest.mark.slow
def test_twice_the_batch_is_twice_the_compute():
    topology = parse("v5e:2x2")
    small, large = (bound.seconds(answer(n, **LABELS), topology, "bfloat16") for n in (4, 8))
    assert large["mxu"] == pytest.approx(2 * small["mxu"], rel=1e-12)
    assert large["hbm"] == small["hbm"]
    # Pairs grow with the square: a millionth of the rest here.
    small, large = (bound.seconds(answer(n), topology, "bfloat16") for n in (4, 8))
    assert large["mxu"] == pytest.approx(2 * small["mxu"], rel=1e-5)


def test_chip_hours():
    topology = parse("v5e:4x4")
    one = bound.chip_hours(8e12, topology, "bfloat16", 4, 10**6, 0.5)
    assert one == pytest.approx(2e12 * 10**6 / (197e12 * 0.5) / 3600)
    for examples, utilisation in ((0, 0.5), (1, 0.0), (1, 1.1)):
        with pytest.raises(ValueError, match="expected"):
            bound.check(examples, utilisation)


# --------------------------------------------------------------------- reading what was compiled

HLO = """\
HloModule jit_step
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %f = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fusion.1
  %e = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fusion.2
  %p = (bf16[10]{0}, bf16[10]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
  %d = bf16[10]{0} collective-permute-done(%p)
}
%fusion.1 (x: f32[8]) -> f32[8,4] {
  %h = f32[8,4]{1,0} all-gather(%x), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
}
%fusion.2 (x: f32[8]) -> f32[8,4] {
  %h = f32[8,4]{1,0} all-gather(%x), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[] constant(27)
  ROOT %r = pred[] compare(%i, %c), direction=LT
}
%on_a_sparse_core (p: f32[2]) -> f32[4] {
  ROOT %g = f32[4]{0} all-gather(%p), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={0}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %r = (f32[6]{0}, f32[2]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1},{2,3}}
  %s = f32[5]{0} reduce-scatter(%a), channel_id=4, replica_groups=mesh['x'=4,'y'=2] {'x'}
  %q = f32[4]{0} custom-call(%a), called_computations={%cond, %on_a_sparse_core}, x={y="1"}
}
"""


def test_collectives():
    """A loop's as often as it runs, a channel's once, all by what a ring receives."""
    found = collectives.read(HLO, "tpu")
    assert found["all-gather"] == collectives.Collective(3, 55, 2 * 27 * 128 * 3 // 4 + 8)
    assert found["collective-permute"] == collectives.Collective(1, 27, 27 * 20)
    assert found["all-reduce"] == collectives.Collective(1, 1, 32)
    assert found["reduce-scatter"] == collectives.Collective(1, 1, 60)


# XLA for GPUs: the number of turns is known, operations start with their operands in a tuple, and
# those of a `shard_map` share a channel.
HLO_OF_GPUS = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = ((bf16[2,4]{1,0}, bf16[3]{0}), (bf16[8,4]{1,0}, bf16[12]{0})) all-gather-start(%x, %y), \
channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  %d = (bf16[8,4]{1,0}, bf16[12]{0}) all-gather-done(%g)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %r = pred[] fusion(%i), kind=kLoop, calls=%compare
}
%compare (i: s32[]) -> pred[] {
  %c = s32[] constant(9)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"27"},"known_init_step":{"init":"0","step":"1"}}
  %r = f32[6]{0} all-reduce-start(%a), channel_id=1, replica_groups={{0,1,2,3}}
  %q = f32[6]{0} all-reduce-start(%b), channel_id=1, replica_groups={{0,1,2,3}}
  %s = ((f32[8]{0}), (f32[2]{0})) reduce-scatter-start(%a), replica_groups=[1,4]<=[4]
  %t = ((f32[8]{0}), f32[8]{0}) all-to-all-start(%a), replica_groups=[1,4]<=[4]
}
"""


def test_collectives_of_gpus():
    found = collectives.read(HLO_OF_GPUS, "gpu")
    assert found["all-gather"] == collectives.Collective(1, 27, 27 * 2 * (32 + 12) * 3 // 4)
    assert found["all-reduce"] == collectives.Collective(2, 2, 2 * 24 * 2 * 3 // 4)
    assert found["reduce-scatter"] == collectives.Collective(1, 1, 8 * 3)
    assert found["all-to-all"] == collectives.Collective(1, 1, 32 * 3 // 4)


def test_out_of_memory_is_read():
    found = program._out_of_memory(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (58.10G) exceeds available HBM (15.75G). HLO module: x.\nSee"
    )
    assert found["needed"] == round(58.10 * 2**30)
    assert program._out_of_memory("RESOURCE_EXHAUSTED: something else")["needed"] is None


@pytest.mark.slow
def test_parameters_split_over_devices_leave_the_batch_split(monkeypatch):
    """Left to itself, the compiler splits the width of the activations instead, and has every
    device work on the whole batch: 30 instead of 4 GiB at full size on 16 chips."""
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 0)
    asked = recipe.from_dict(TINY | {"batch_size": 88, "mesh": {"fsdp": True}, "remat": "block"})
    step, _ = program._step(asked, jax.devices())
    hlo = step.compile().as_text()
    assert "[11,16," in hlo and "[88,16," not in hlo and "[88,64," not in hlo


def test_fsdp_over_devices_that_divide_nothing_is_refused():
    """Widths are 1152 and 4304: 8 devices divide them, and 5 do not, nor do the 256 of a pod."""
    shapes = towers.param_shapes(named("so400m-448"))
    sharding.param_shardings(shapes, sharding.make_mesh(8), fsdp=True)
    with pytest.raises(ValueError, match="over 5 devices: no axis of img/"):
        sharding.param_shardings(shapes, sharding.make_mesh(5), fsdp=True)
    sharding.param_shardings(shapes, sharding.make_mesh(5))


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}])
def test_an_average_takes_what_trains_once_more(changes, monkeypatch):
    """Not what is frozen: with adapters it is as small as they are. The step is not traced."""
    untraced = SimpleNamespace(lower=lambda state, batch: None)
    monkeypatch.setattr("medsiglip_jax.train.build.train_step", lambda *_: untraced)
    facts = [
        program._step(recipe.from_dict(TINY | changes | {"ema": ema}), jax.devices()[:1])[1]
        for ema in (None, 0.999)
    ]
    assert facts[1]["state_bytes"] - facts[0]["state_bytes"] == 4 * facts[0]["trained"]


def test_a_plan_to_embed_says_what_the_text_tower_occupies(eighty, monkeypatch, capsys):
    def ask(question):
        _, facts = program._embedding(question.recipe, jax.devices()[:1])
        return {"compiled": False, "needed": GIB, "message": "", "seconds": 0.0,
                "compiler_bytes": 0, **facts}  # fmt: skip

    monkeypatch.setattr(tpus.Slice, "check_installed", lambda self: None)
    monkeypatch.setattr(Question, "ask", ask)
    flags = ["plan", "--config", eighty, "--embed", "--quick", "--topology", "v5e-1"]
    assert cli.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = jax.tree.reduce(lambda n, x: n + x.size, towers.param_shapes(named("tiny-56"))["txt"], 0)
    assert found["tower"] == "img" and found["text_tower_bytes"] == 2 * size  # in bfloat16
    line = f"the image tower alone; the {shown(2 * size)} of the text tower are in memory, unused"
    assert line in plan._text(found)


# ------------------------------------------------------------------------- requests and mistakes


def test_a_plan_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("TPU_NAME", "mine")
    before = dict(os.environ)
    inner = worker.environment(parse("v5e:2x2"))
    assert dict(os.environ) == before
    assert inner["JAX_PLATFORMS"] == "cpu" and "TPU_NAME" not in inner


def test_a_child_ends_with_the_command_that_started_it(tmp_path):
    """A killed `plan` would leave its compiler running for minutes."""
    child = (
        "import socket, time\n"
        "from medsiglip_jax.plan import worker\n"
        "alive = socket.create_connection(('127.0.0.1', int(worker.read_request())))\n"
        "time.sleep(60)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        parent = (
            "import os, sys\n"
            "from medsiglip_jax.plan import worker\n"
            f"command, port = [sys.executable, '-c', {child!r}], {str(server.getsockname()[1])!r}\n"
            "worker.run_child(command, port, os.environ)"
        )
        process = subprocess.Popen([sys.executable, "-c", parent])
        server.settimeout(60)
        connection, _ = server.accept()
        with connection:
            process.kill()
            process.wait()
            connection.settimeout(5)
            assert connection.recv(1) == b"", "closed by the system, for the child is gone"


def test_a_child_that_answers():
    code = "from medsiglip_jax.plan import worker\nprint(worker.read_request() + 'heard')"
    done = worker.run_child([sys.executable, "-c", code], "said", os.environ)
    assert (done.returncode, done.stdout) == (0, "said\nheard\n")


def test_a_child_that_dies_before_it_reads_is_told_by_its_exit_code():
    done = worker.run_child([sys.executable, "-c", "raise SystemExit(3)"], "x" * 2**20, os.environ)
    assert done.returncode == 3


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(tpus, "find_spec", lambda name: None)
    assert cli.main(["plan", "--config", "contrastive", "--topology", "v5e:2x2"]) == 1
    assert "pip install 'medsiglip-jax[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize("flags, say", [
    (["--topology", "v9:4x4"], "v9:4x4' is unknown"),
    (["--topology", "v5e:4x4", "--config.batch_size=24"], "24 is not divisible by the 16 devices"),
    (["--topology", "v5e:2x2", "--config.mesh.data=8"], "mesh.data is 8; expected at most the 4"),
    (["--topology", "v5e:2x2", "v5e:4x4", "--max-batch"], "--max-batch takes one topology"),
    (["--topology", "v5e:2x2", "--embed", "--remat", "block"], "--embed has none"),
    (["--topology", "v5e:2x2", "--examples", "5", "--utilisation", "40"], "utilisation is 40"),
    (["--topology", "v5e:2x2", "--utilisation", "0.5"], "without --examples these flags have no"),
    (["--topology", "v5e:2x2", "--config.batch_siez=3"], "no key batch_siez"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, say, capsys, monkeypatch):
    monkeypatch.setattr(tpus.Slice, "check_installed", lambda self: None)
    code = cli.main(["plan", "--config", "contrastive", *flags])
    out = capsys.readouterr()
    assert code == 2 and say in out.err and not out.out
    assert len(out.err.strip().splitlines()) == 1


@pytest.fixture
def made_up(monkeypatch):
    """A compiler whose programs need a GiB for each row on a device, half with remat "block", and
    a millisecond of a v5e's peak for each row, a half more with remat "block"."""

    def ask(question):
        rows, block = question.recipe.batch_size, question.recipe.remat == "block"
        held = rows / question.topology.devices / question.recipe.objective.accumulate
        flops = {"model": rows * 197e9, "recomputed": rows * 98.5e9 * block}
        return {
            "compiled": False, "needed": round(held * GIB / (2 if block else 1)), "message": "",
            "attention": "splash", "largest": {}, "flops": flops, "state_bytes": 1, "seconds": 0.0,
            "compiler_bytes": 0, "trained": 1, "parameters": 1,
        }  # fmt: skip

    monkeypatch.setattr(tpus.Slice, "check_installed", lambda self: None)
    monkeypatch.setattr(Question, "ask", ask)


def test_the_largest_batch_and_the_advice(made_up):
    asked = recipe.from_dict(TINY | {"batch_size": 80})
    question = Question(asked, parse("v5e:2x2"), quick=True)
    lines = []
    assert verdict.max_batch(question, lines.append) == 14  # of 15.75 GiB, less a twentieth
    tried = verdict.advice(question, lines.append)
    assert tried[-1]["fits"] and not any(t["fits"] for t in tried[:-1])
    assert tried[-1]["change"].endswith("--config.mesh.fsdp=True --config.remat=block")
    larger = question.with_recipe(batch_size=320)
    assert "--config.objective.accumulate=4" in verdict.advice(larger, lines.append)[-1]["change"]


def test_a_sweep_has_the_cheapest_first_and_what_does_not_fit_last(made_up, eighty, capsys):
    """80 rows on 4 chips of 14.96 GiB fit with remat "block" only, on 8 with all."""
    flags = ["plan", "--config", eighty, "--sweep", "--quick", "--topology", "v5e-4"]
    flags += ["--topology", "v5e-8", "--remat", "none", "--remat", "block"]
    assert cli.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(p["topology"], p["remat"], p["fits"]) for p in found] == [
        ("v5e:2x4", "none", True), ("v5e:2x2", "block", True), ("v5e:2x4", "block", True),
        ("v5e:2x2", "none", False),
    ]  # fmt: skip
    each = [p["chip_seconds_per_example"] for p in found]
    assert each == pytest.approx([0.001, 0.0015, 0.0015, 0.001])
    assert cli.main(flags) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["topology", "remat", "fits"]
    assert [line.split()[2] for line in rest] == ["yes", "yes", "yes", "no"]


def test_several_topologies_are_compared_with_the_configs_own_policy(made_up, eighty, capsys):
    """In one flag or several; a plan in the table is the one that its topology has alone."""
    flags = ["plan", "--config", eighty, "--quick", "--no-advice", "--json", "--examples=1000"]

    def plans(*more):
        assert cli.main([*flags, *more]) == 0
        return json.loads(capsys.readouterr().out)

    found = plans("--topology", "v5e-4", "v5e-8")
    assert [(p["topology"], p["remat"]) for p in found] == [
        ("v5e:2x4", "none"),
        ("v5e:2x2", "none"),
    ]
    assert found == plans("--topology", "v5e-4", "--topology", "v5e-8")
    for several in found:
        alone = plans("--topology", several["topology"])
        assert {key: several[key] for key in alone} == alone
    one, two = plans("--topology", "v5e-8", "--remat", "none", "block")
    assert [one["remat"], two["remat"]] == ["none", "block"]
    assert plans("--topology", "v5e-8", "--remat", "block").items() <= two.items()


# ----------------------------------------------------------------------------- with the compiler


@needs_libtpu
def test_the_command(tmp_path, capsys):
    """The promised keys, with sizes that agree with the arrays."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config(arg=None):\n    return {TINY!r}\n")
    flags = ["plan", "--config", str(config), "--topology", "v5e:2x2", "--json"]
    assert cli.main([*flags, "--config.remat=block", "--examples", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    promised = "fits peak_bytes hbm_bytes max_batch_per_chip collectives flops bound_seconds"
    assert set(promised.split()) <= set(found)
    assert found["fits"] and found["compiled"] and found["hbm_bytes"] == 16 * 2**30
    assert found["peak_bytes"] > found["memory"]["temporaries"]
    # Weights and two moments in float32; the arguments hold the batch and tile padding, too.
    assert found["state_bytes"] >= 3 * 4 * found["trained"]
    assert found["memory"]["arguments"] >= found["state_bytes"]
    assert found["collectives"]["collective-permute"]["runs"] == 4  # the ring of the loss
    assert found["bound_seconds"] == max(found["bound"].values())
    assert found["chip_hours"] > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "7x:2x2x1"])
def test_collectives_are_known_where_libtpu_cannot_read_its_program_back(topology):
    asked = recipe.from_dict(TINY | {"model": WIDE, "mesh": {"fsdp": True}})
    found = verdict.plan(Question(asked, parse(topology)))["collectives"]
    assert found and all(c["runs"] > 0 and c["bytes"] > 0 for c in found.values())


@needs_libtpu
def test_too_much_is_an_answer_and_two_plans_run_at_once(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"def get_config(arg=None):\n    return {TINY!r}\n")
    flags = [sys.executable, "-m", "medsiglip_jax", "plan", "--config", str(config), "--json",
             "--quick", "--topology"]  # fmt: skip

    def run(*more):
        return subprocess.run([*flags, *more], capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(run, "v5e:2x2", "--config.batch_size=4000000", "--no-advice")
        wrong = pool.submit(run, "v5e:3x3", "--config.batch_size=18")
        large, wrong = large.result(), wrong.result()
    found = json.loads(large.stdout)
    assert large.returncode == 0 and not found["fits"] and found["headroom_bytes"] < 0
    assert next(iter(found["largest"])) == "image blocks: attention logits"
    assert wrong.returncode == 2 and "v5e:3x3 does not exist" in wrong.stderr.splitlines()[-1]


MEANING = """
The compiled step of {name} is not the one on record: {what}.
More memory: a batch that fitted may not any more. Another number of collectives: the compiler
splits something another way than before, which mostly costs speed. If it is meant, record it:
  MEDSIGLIP_RECORD_PLANS=1 pytest -n 0 -m '' tests/plan -k baseline
"""


def check_against_baseline(name, found, memory=0.05):
    """Memory to 5 %, or that share, operations of each kind to a tenth, or one."""
    record = json.loads(BASELINE.read_text())
    new = {"peak_bytes": found["peak_bytes"]}
    if found["collectives"] is not None:
        new["collectives"] = {kind: c["operations"] for kind, c in found["collectives"].items()}
    if os.environ.get("MEDSIGLIP_RECORD_PLANS"):
        record[name] = new
        BASELINE.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    assert name in record, MEANING.format(name=name, what="there is none")
    old, changes = record[name], []
    if new["peak_bytes"] != pytest.approx(old["peak_bytes"], rel=memory):
        changes.append(f"peak {old['peak_bytes']:,} -> {new['peak_bytes']:,} bytes")
    kinds = [side.get("collectives", {}) for side in (old, new)]
    for kind in sorted({*kinds[0], *kinds[1]}):
        before, now = (counts.get(kind, 0) for counts in kinds)
        if abs(before - now) > max(1, 0.1 * before):
            changes.append(f"{kind} {before} -> {now} operations")
    assert not changes, MEANING.format(name=name, what="; ".join(changes))


@needs_libtpu
@pytest.mark.parametrize("changes", [
    {"remat": "block"}, {"lora": {"rank": 4}, "remat": "dots"},
    pytest.param({"model": WIDE, "mesh": {"fsdp": True}, "remat": "block"}, marks=pytest.mark.slow),
], ids=["tiny block", "tiny lora", "small fsdp"])  # fmt: skip
def test_small_steps_are_as_in_the_baseline(changes, request):
    asked = recipe.from_dict(TINY | changes)
    found = verdict.plan(Question(asked, parse("v5e:2x2")))
    check_against_baseline(request.node.callspec.id, found)


FULL = [path.stem for path in sorted(CONFIGS.glob("*.py")) if path.stem != "smoke"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])
@pytest.mark.parametrize("name", FULL)
def test_least_memory_of_the_bundled_configs_is_as_in_the_baseline(name, topology):
    """Full size; 15 seconds each."""
    asked = configs.read(name)
    found = verdict.plan(Question(asked, parse(topology), quick=True))
    check_against_baseline(f"{name} {topology} quick", found)


FSDP = "--config.mesh.fsdp=True"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name, topology, flags", [
    ("contrastive", "v5e:4x4", [FSDP, "--config.remat=block", "--config.batch_size=256"]),
    ("lora", "v5e:2x2", []),
])  # fmt: skip
def test_whole_compilations_are_as_in_the_baseline(name, topology, flags):
    """Full size; two to three minutes of a core each, and 2 GB."""
    asked = configs.read(name, flags)
    found = verdict.plan(Question(asked, parse(topology)))
    assert found["fits"]
    said = [flag.removeprefix("--config.") for flag in flags]
    check_against_baseline(" ".join([name, *said, topology]), found)
