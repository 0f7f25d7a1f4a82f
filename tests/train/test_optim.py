"""The optimisers against torch and against the papers' rules in numpy; schedules; what decays."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from references import assert_close, rounding

from medsiglip_jax.model import sharding, towers, tree
from medsiglip_jax.model.config import two_towers
from medsiglip_jax.train import freeze, optim

pytestmark = pytest.mark.float

CONFIG = two_towers(
    image_size=8, patch_size=4, width=8, depth=2, mlp_dim=16, num_heads=2,
    vocab_size=12, context_length=4,
)  # fmt: skip
RATE, STEPS = 0.01, 20
# Of a direction, which is about 1: each step multiplies, adds and divides about ten times.
F32 = rounding(10 * STEPS)
SHAPES = {"a/kernel": (4, 5), "a/bias": (5,), "t": (1,)}
# Factored over (64, 40), over (48, 33), not (31 < 32), not; the layers of the stack one by one.
STACK = "img/encoderblock/kernel"
FACTORED = {"a/kernel": (40, 3, 64), STACK: (35, 33, 48), "b/kernel": (64, 31), "b/bias": (7,)}


def constant(step):
    return jnp.float32(1)


def adamw(rate, schedule, rates=None, **changes):
    return optim.make_optimizer(rate, schedule, optim.OptimizerConfig(**changes), rates)


def adafactor(rate, schedule, rates=None, b2=0.999, **changes):
    return adamw(rate, schedule, rates, name="adafactor", b2=b2, **changes)


def adafactor_without_momentum(schedule, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "_adafactor", optim._scale_by_factored_rms)
        return adafactor(RATE, schedule, **changes)


def normals(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def make_gradients(shapes, steps=STEPS):
    """Of sizes from 1e-4 to 10, so that some are clipped and eps shows in others."""
    return [
        {path: g * np.float32(10.0 ** (step % 6 - 4)) for path, g in normals(shapes, step).items()}
        for step in range(steps)
    ]


def run(optimizer, params, gradients):
    """The flat updates of every step, and the last parameters."""
    params = tree.unflatten({path: jnp.asarray(x) for path, x in params.items()})
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(tree.unflatten(gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append({path: np.asarray(x) for path, x in tree.items(updates)})
    return seen, {path: np.asarray(x) for path, x in tree.items(params)}


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def assert_updates(got, want, bound):
    """Every update within `bound` of the rate, which is about Adam's own size."""
    for ours, theirs in zip(got, want, strict=True):
        for path, update in theirs.items():
            np.testing.assert_allclose(ours[path], update, rtol=0, atol=bound * RATE, err_msg=path)


# -------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("b2", [0.95, 0.999])
@pytest.mark.parametrize("clip_norm", [math.inf, 0.5])
def test_adamw_is_torch_s(b2, clip_norm):
    """In float64 there, so that an update can be read off the parameter; their decay times rate."""
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    params, gradients = normals(SHAPES, 99), make_gradients(SHAPES)
    theirs = {path: torch.nn.Parameter(torch.tensor(x).double()) for path, x in params.items()}
    groups = [dict(params=[p], weight_decay=0.3 if "kernel" in k else 0) for k, p in theirs.items()]
    reference = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, b2), eps=1e-8)
    want = []
    for gradient in gradients:
        before = {path: p.detach().numpy().copy() for path, p in theirs.items()}
        for path, p in theirs.items():
            p.grad = torch.tensor(gradient[path]).double()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip_norm)
        reference.step()
        want.append({path: p.detach().numpy() - before[path] for path, p in theirs.items()})

    optimizer = adamw(RATE, constant, weight_decay=0.3 * RATE, b2=b2, clip_norm=clip_norm)
    got, last = run(optimizer, params, gradients)
    assert_updates(got, want, F32)
    for path, p in theirs.items():
        assert_close(last[path], p.detach().numpy(), terms=STEPS)


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_adamw_is_the_paper_s(b2):
    """In numpy: clip, moments, rate, decay, and the schedule on all of it."""
    params, gradients = normals(SHAPES, 99), make_gradients(SHAPES)
    schedule = optim.schedule("cosine", STEPS, 3)
    optimizer = adamw(RATE, schedule, weight_decay=0.003, b2=b2, clip_norm=2.0)
    got, _ = run(optimizer, params, gradients)
    p = {path: x.astype(np.float64) for path, x in params.items()}
    m, v = ({path: np.zeros_like(x) for path, x in p.items()} for _ in range(2))
    want = []
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        for path in p:
            g = gradient[path].astype(np.float64) * min(1, 2.0 / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = b2 * v[path] + (1 - b2) * g**2
        adam = {k: m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - b2**t)) + 1e-8) for k in p}
        decay = {k: 0.003 * p[k] if k == "a/kernel" else 0 for k in p}
        want.append({k: -float(schedule(t - 1)) * (RATE * adam[k] + decay[k]) for k in p})
        p = {k: p[k] + want[-1][k] for k in p}
    assert_updates(got, want, F32)


# ---------------------------------------------------------------------------------- Adafactor


def factored_rms(gradients, cap):
    """Adafactor's direction for one parameter, in float64, by big_vision's rules."""
    shape = gradients[0].shape
    axes = sorted(sorted(range(len(shape)), key=shape.__getitem__)[-2:])
    factored = len(axes) == 2 and min(shape[axis] for axis in axes) >= 32
    means = [(axes[1],), (axes[0],)] if factored else [()]
    moments = [0.0 for _ in means]
    for i, gradient in enumerate(gradients):
        beta2 = min(cap, 1 - (i + 1) ** -0.8)
        squares = gradient.astype(np.float64) ** 2 + 1e-30
        new = [squares.mean(axis, keepdims=True) for axis in means]
        moments = [beta2 * v + (1 - beta2) * x for v, x in zip(moments, new, strict=True)]
        square = moments[0]
        if factored:
            square = square * moments[1] / moments[0].mean(axes[0], keepdims=True)
        yield gradient / np.sqrt(square)


def adafactor_by_rules(gradients, cap):
    """The directions of all parameters, a stack's layer by layer."""
    found = {}
    for path in gradients[0]:
        series = [gradient[path] for gradient in gradients]
        if path == STACK:
            layers = [factored_rms(layer, cap) for layer in zip(*series, strict=True)]
            found[path] = [np.stack(layer) for layer in zip(*layers, strict=True)]
        else:
            found[path] = list(factored_rms(series, cap))
    return [{path: found[path][step] for path in found} for step in range(len(gradients))]


@pytest.mark.parametrize("cap", [0.95, 0.999, 0.5])
def test_adafactor_s_second_moments(cap):
    params, gradients = normals(FACTORED, 99), make_gradients(FACTORED)
    optimizer = adafactor_without_momentum(constant, b2=cap, clip_norm=math.inf)
    got, _ = run(optimizer, params, gradients)
    for ours, theirs in zip(got, adafactor_by_rules(gradients, cap), strict=True):
        for path, direction in theirs.items():
            # Besides, the means over columns and rows.
            assert_close(ours[path] / -RATE, direction, 10 * STEPS + 64 + 40)


def test_adafactor_s_momentum():
    """Not debiased, stored in bfloat16, and multiplied by 0.9 as bfloat16 has it."""
    params, gradients = normals(FACTORED, 99), make_gradients(FACTORED)
    got, _ = run(adafactor(RATE, constant, clip_norm=math.inf), params, gradients)
    decay, old = float(ml_dtypes.bfloat16(0.9)), {path: 0.0 for path in FACTORED}
    for ours, theirs in zip(got, adafactor_by_rules(gradients, 0.999), strict=True):
        for path, direction in theirs.items():
            moving = 0.1 * direction + decay * old[path]
            old[path] = moving.astype(ml_dtypes.bfloat16).astype(np.float64)
            atol = 2**-8 * np.abs(moving).max()
            np.testing.assert_allclose(ours[path] / -RATE, moving, rtol=0, atol=atol)


def test_adafactor_clips_decays_and_schedules_as_adamw():
    """Its direction forgets the gradient's size but for the relative sizes of the steps."""
    params, gradients = normals(FACTORED, 99), make_gradients(FACTORED, 3)
    schedule = optim.schedule("linear", 4)
    make = functools.partial(adafactor_without_momentum, weight_decay=0.01)
    terms = 10 * 3 + 2 * 64 * 40 * 3  # with the norm over everything
    got, _ = run(make(schedule, clip_norm=1e-3), params, gradients)
    norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in gradients]
    clipped = [
        {path: x * np.float32(min(1, 1e-3 / norm)) for path, x in gradient.items()}
        for gradient, norm in zip(gradients, norms, strict=True)
    ]
    want, _ = run(make(schedule, clip_norm=math.inf), params, clipped)
    for a, b in zip(got, want, strict=True):
        for path in FACTORED:
            assert_close(a[path], b[path], terms)
    plain, _ = run(adafactor_without_momentum(constant), params, gradients[:1])
    for path, update in plain[0].items():
        decay = -0.01 * params[path] if path.endswith("kernel") else 0
        assert_close(got[0][path], update + decay, terms)


def test_adafactor_s_state_is_small():
    """Rows and columns in place of kernels, and half a float of momentum."""
    params = tree.unflatten(normals(FACTORED))
    rms, momentum = adafactor(RATE, constant).init(params)[1]
    sizes = {path: x.size for path, x in tree.items(rms.v)}
    assert sizes["a/kernel"] == 1 and sizes[STACK] == 35 and sizes["b/kernel"] == 64 * 31
    assert rms.v_row["img"]["encoderblock"]["kernel"].shape == (35, 33)
    assert rms.v_col["a"]["kernel"].shape == (3, 64)
    assert dtypes(momentum.ema) == {"bfloat16"}


@pytest.mark.parametrize("shape", [(32, 48), (48,)])
def test_adafactor_s_layers_below_a_cut_are_one_by_one(shape):
    """Where 33 of 40 are frozen in part, the layer axis is one of the two largest of the rest."""
    shapes = {"img/encoderblock/frozen": (40, 2), STACK: (40, *shape)}
    params, gradients = normals(shapes, 99), make_gradients(shapes, 4)
    part = freeze.partition([r"img/encoderblock_(\d|[12]\d|3[0-2])/frozen"], tree.unflatten(params))
    first, *cut = [tree.flatten(part.split(tree.unflatten(x))[0]) for x in (params, *gradients)]
    assert first["img/frozen_blocks/kernel"].shape == (33, *shape)
    optimizer = adafactor(RATE, constant, clip_norm=math.inf)
    want, _ = run(optimizer, params, gradients)
    got, _ = run(optimizer, first, cut)
    for ours, theirs in zip(got, want, strict=True):
        joined = np.concatenate([ours["img/frozen_blocks/kernel"], ours[STACK]])
        assert_close(joined, theirs[STACK], 10 * 4 + 32 + 48)


# ------------------------------------------------------------------------- both of them, as a part


BOTH = [adamw, adafactor]


@pytest.mark.parametrize("make", BOTH)
def test_a_rate_per_layer_is_each_layer_on_its_own(make):
    """The decay, on the other hand, is everyone's."""
    shapes, rates = {"a/encoderblock/kernel": (3, 34, 33), "b": (2,)}, np.array([1, 0.5, 0.1])
    params, gradients = normals(shapes, 99), make_gradients(shapes, 5)
    kwargs = dict(weight_decay=0.01, clip_norm=math.inf)
    tree_of_rates = {"a": {"encoderblock": {"kernel": rates}}, "b": 0.25}
    got, _ = run(make(RATE, constant, rates=tree_of_rates, **kwargs), params, gradients)
    for i, rate in [*enumerate(rates), (..., 0.25)]:
        path, alone = ("b", "b") if i is ... else ("a/encoderblock/kernel", "kernel")
        mine = [{"x/" + alone: g[path][i]} for g in gradients]
        want, _ = run(
            make(RATE * float(rate), constant, **kwargs), {"x/" + alone: params[path][i]}, mine
        )
        for a, b in zip(got, want, strict=True):
            assert_close(a[path][i], b["x/" + alone], 10 * 5 + 34 + 33)


def test_a_rate_of_the_wrong_shape_is_named():
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    optimizer = adamw(RATE, constant, rates={"a": {"kernel": np.ones(2)}})
    with pytest.raises(ValueError, match=r"rate of a/kernel has shape \(2,\).*shape \(3,\)"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("make", BOTH)
def test_what_is_absent_has_no_state_and_changes_nothing(make):
    """A tower alone: no kernel for the decay to match, no leaf for the other."""
    shapes = {"txt/pos_embedding": (1, 4, 8), "b": (1,)}
    params, gradients = normals(shapes, 99), make_gradients(shapes, 3)
    optimizer = make(RATE, constant, weight_decay=0.1)
    state = optimizer.init(tree.unflatten(params))
    assert max(x.size for x in jax.tree.leaves(state)) == 32
    assert not any(
        "img" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)
    )
    plain = make(RATE, constant)
    assert_updates(run(optimizer, params, gradients)[0], run(plain, params, gradients)[0], 0)


@pytest.mark.parametrize("make", BOTH)
def test_the_state_keeps_its_types(make):
    """The state is donated, and the step traced once."""
    optimizer, traces = make(RATE, optim.schedule("cosine", 9, 2, cooldown_steps=3)), []
    params = jax.tree.map(jnp.asarray, tree.unflatten(normals(FACTORED)))

    def step(params, state, gradients):
        traces.append(1)
        return optimizer.apply(params, gradients, state)

    compiled, state = jax.jit(step, donate_argnums=(0, 1)), optimizer.init(params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    for gradient in make_gradients(FACTORED, 3):
        params, state = compiled(params, state, tree.unflatten(gradient))
    assert len(traces) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state)) == before


# A sum in another order can round the bfloat16 momentum of an element the other way.
@pytest.mark.parametrize("make, bound", [(adamw, F32), (adafactor, 0.01)])
def test_eight_devices_make_the_same_updates(make, bound):
    optimizer, mesh = make(RATE, constant, weight_decay=0.01), sharding.make_mesh()
    assert mesh.size == 8
    shapes = {"a/kernel": (64, 40), "img/encoderblock/kernel": (3, 32, 40), "b": (7,)}
    params, gradients = normals(shapes, 99), make_gradients(shapes, 3)
    specs = [jax.P("data"), jax.P(None, None, "data"), jax.P()]
    split = {path: jax.NamedSharding(mesh, spec) for path, spec in zip(shapes, specs, strict=True)}
    placed = {path: jax.device_put(x, split[path]) for path, x in params.items()}
    assert_updates(
        run(optimizer, placed, gradients)[0], run(optimizer, params, gradients)[0], bound
    )


# -------------------------------------------------------------------------- what decays, schedules


def test_weight_decay_is_for_kernels_only():
    decayed = tree.flatten(optim.decay_mask(towers.param_shapes(CONFIG)))
    assert {path.split("/")[-1] for path, yes in decayed.items() if yes} == {"kernel"}
    spared = {path.split("/")[-1] for path, yes in decayed.items() if not yes}
    assert spared == {"bias", "scale", "pos_embedding", "probe", "embedding", "t", "b"}
    assert decayed["img/embedding/kernel"] and decayed["txt/head/kernel"]


def test_adapters_do_not_decay():
    attention = {"query": {"kernel": 0}, "query_lora": {"a": 0, "b": 0}}
    mask = optim.decay_mask({"img": {"encoderblock": {"attention": attention}}})
    found = mask["img"]["encoderblock"]["attention"]
    assert found == {"query": {"kernel": True}, "query_lora": {"a": False, "b": False}}
    assert optim.decay_mask({"x": {"b": 0}, "empty": {}}) == {"x": {"b": False}, "empty": {}}


CURVES = {
    "cosine": lambda k, n: (1 + np.cos(np.pi * k / n)) / 2,
    "linear": lambda k, n: 1 - k / n,
    "rsqrt": lambda k, n: (1 + k / 10_000) ** -0.5,
    "constant": lambda k, n: 1.0,
}


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("total, warmup", [(3, 0), (12, 2), (100_000, 5_000)])
def test_schedules_in_closed_form(kind, total, warmup):
    multiplier = optim.schedule(kind, total, warmup)
    curve = CURVES[kind]
    steps = [warmup, warmup + 1, (warmup + total) // 2, total - 1, total]
    want = [curve(step - warmup, total - warmup) for step in steps]
    got = [multiplier(step) for step in steps]
    assert_close(got, want, terms=8, largest=1)
    assert float(multiplier(warmup)) == 1
    assert dtypes(got) == {"float32"} and not any(x.weak_type or x.shape for x in got)
    if warmup:
        assert [float(multiplier(step)) for step in (0, warmup // 2)] == [0, 0.5]
    if kind in ("cosine", "linear"):
        assert float(multiplier(total)) == float(multiplier(total + 9)) == 0


def test_cooldown_multiplies_the_decay():
    """Of rsqrt, whose timescale is 10,000 steps."""
    multiplier = optim.schedule("rsqrt", 100_000, 10_000, cooldown_steps=20_000)
    want = {5: 0.5, 10: 1, 30: 3**-0.5, 80: 8**-0.5, 90: 0.5 / 3, 100: 0, 101: 0}
    got = [float(multiplier(1000 * step)) for step in want]
    assert_close(got, list(want.values()), terms=8, largest=1)


def test_the_rate_is_the_peak_s_share():
    rate = adamw(0.5, optim.schedule("linear", 12, 2)).learning_rate
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 7)], [0, 0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="cosine", total_steps=5, warmup_steps=5), "warmup_steps is 5, total_steps 5"),
        (dict(kind="linear", total_steps=5, warmup_steps=-1), "warmup_steps is -1"),
        (dict(kind="constant", total_steps=5, warmup_steps=2, cooldown_steps=4), "at most the 3"),
        (dict(kind="cosin", total_steps=5), "schedule is 'cosin'; expected one of cosine"),
    ],
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.schedule(**arguments)
