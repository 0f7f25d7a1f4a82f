"""The train step against closed forms, and what must not change an update: masked rows, recomputed
activations, more devices."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medsiglip_jax
from medsiglip_jax import model as towers
from medsiglip_jax import optim, sharding, train, tree
from medsiglip_jax.config import two_towers
from medsiglip_jax.model import Compute

CONFIG = two_towers(
    image_size=8, patch_size=4, width=8, depth=2, mlp_dim=16, num_heads=2, text_depth=1,
    vocab_size=12, context_length=4,
)  # fmt: skip
RATE, ROWS = 0.01, 8
# Plain gradient descent: an update is then as well conditioned as its gradient, where Adam divides
# by the noise of gradients that are zero in exact arithmetic (the key biases).
DESCENT = optim.Optimizer(
    init=lambda params: (),
    update=lambda gradients, state, params: (
        jax.tree.map(lambda g: -0.1 * g, gradients), state
    ),
    learning_rate=lambda step: 0.1,
)  # fmt: skip


def make_batch(seed=0, masked=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (ROWS, 8, 8, 3), np.uint8),
        "text": rng.integers(1, 12, (ROWS, 4), np.int32),
        "mask": np.arange(ROWS) < ROWS - masked,
    }


def make_pairs():
    """A batch in which two rows each share a meaning."""
    return make_batch() | {"positives": np.arange(ROWS, dtype=np.int32) // 2}


def make_state(optimizer, seed=0):
    return train.init_state(medsiglip_jax.init(CONFIG, seed).params, optimizer)


def embed(params, images, tokens):
    zimg, _ = towers.encode_image(params, images, CONFIG)
    return towers.normalize(zimg), towers.normalize(towers.encode_text(params, tokens, CONFIG))


def run(step, state, batch, steps=2):
    """The state and the metrics of every step, on the host."""
    seen = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    return jax.tree.map(np.asarray, state), seen


def compile_quickly(step, state, batch):
    """Unoptimised machine code, in 4 instead of 7 CPU-seconds; it takes no other placement."""
    options = {"xla_backend_optimization_level": 0}
    return step.lower(state, batch).compile(compiler_options=options)


@pytest.fixture(scope="module")
def adamw():
    optimizer = optim.adamw(RATE, total_steps=50, weight_decay=1e-3)
    step = train.make_train_step(CONFIG, Compute(), optimizer)
    return optimizer, compile_quickly(step, make_state(optimizer), make_pairs())


@pytest.fixture(scope="module")
def descent():
    """The step whose updates the others must reproduce, with its result on a batch."""
    state, batch = make_state(DESCENT), make_batch(masked=2)
    step = compile_quickly(train.make_train_step(CONFIG, Compute(), DESCENT), state, batch)
    return step, *run(step, state, batch)


# ----------------------------------------------------------------------------- the train step


def test_loss_falls(adamw):
    optimizer, step = adamw
    state, metrics = run(step, make_state(optimizer), make_pairs(), steps=50)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert state["step"] == 50


def test_the_second_step_compiles_nothing():
    """The state comes back in the types it went in, also where init's were weak."""
    params = medsiglip_jax.init(CONFIG).params
    params["b"] = jnp.full((1,), -10.0)
    assert params["b"].weak_type
    state = train.init_state(params, DESCENT)
    step = train.make_train_step(CONFIG, Compute(), DESCENT)
    after, _ = jax.eval_shape(step, state, make_batch())
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (state, after)]
    assert types[0] == types[1]


def test_the_first_step_in_closed_form(adamw):
    """Loss and gradient of b by hand; Adam's first update is the rate, whatever the gradient."""
    optimizer, step = adamw
    batch = make_pairs()
    params = medsiglip_jax.init(CONFIG).params
    zimg, ztxt = jax.jit(embed)(params, batch["image"], batch["text"])
    dots = np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T
    same = batch["positives"][:, None] == batch["positives"]
    against = np.where(same, -1, 1) * (10 * dots - 10)
    loss = np.log1p(np.exp(against)).sum() / ROWS
    gradient_b = (np.where(same, -1, 1) / (1 + np.exp(-against))).sum() / ROWS

    state, (metrics,) = run(step, train.init_state(params, optimizer), batch, steps=1)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["temperature"] == pytest.approx(10) and metrics["bias"] == -10
    assert metrics["learning_rate"] == pytest.approx(RATE)
    assert state["params"]["b"] == pytest.approx(-10 - RATE * np.sign(gradient_b), abs=1e-6)
    # Adam's first moment is a tenth of the gradient, clipped from `grad_norm` to 1.
    moment = state["opt_state"][1].mu
    assert optim.global_norm(moment) == pytest.approx(0.1, rel=1e-5)
    assert moment["b"][0] * 10 * metrics["grad_norm"] == pytest.approx(gradient_b, rel=1e-4)


def test_masked_rows_do_not_matter(descent):
    step, expected, expected_metrics = descent
    batch, other = make_batch(masked=2), make_batch(seed=1)
    for name in ("image", "text"):
        batch[name][-2:] = other[name][-2:]
    state, metrics = run(step, make_state(DESCENT), batch)
    assert metrics == expected_metrics
    jax.tree.map(np.testing.assert_array_equal, state, expected)

    batch["image"][0] = other["image"][0]
    assert run(step, make_state(DESCENT), batch)[1] != expected_metrics


def test_remat_gives_the_same_update(descent):
    _, expected, expected_metrics = descent
    state, batch = make_state(DESCENT), make_batch(masked=2)
    step = train.make_train_step(CONFIG, Compute(remat=True), DESCENT)
    step = compile_quickly(step, state, batch)
    assert_same(run(step, state, batch), expected, expected_metrics)


def test_eight_devices_give_the_same_update(descent):
    _, expected, expected_metrics = descent
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    params = medsiglip_jax.init(CONFIG).params
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    state = train.init_state(params, DESCENT)
    batch = jax.device_put(make_batch(masked=2), sharding.batch_sharding(mesh))
    step = train.make_train_step(CONFIG, Compute(), DESCENT, loss_chunk=1, mesh=mesh)
    step = compile_quickly(step, state, batch)
    assert_same(run(step, state, batch), expected, expected_metrics)


def test_the_whole_state_lies_on_the_mesh():
    """A scalar elsewhere would come back on the mesh, and the second step would compile again."""
    mesh = sharding.make_mesh()
    params = {"layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    state = train.init_state(params, optim.adamw(RATE, 10))
    assert len(jax.tree.leaves(state)) == 2 + 4 + 2 + 1  # parameters, moments, counts, step
    assert {x.sharding.num_devices for x in jax.tree.leaves(state)} == {8}


def assert_same(result, expected, expected_metrics):
    """Equal within float32 rounding: parameters move by 0.1 here."""
    state, metrics = result
    moved = np.abs(expected["params"]["b"] + 10).max()
    assert moved > 1e-2, "the comparison would be empty"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state, expected)
    for got, want in zip(metrics, expected_metrics, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


# --------------------------------------------------------------------------------- the loop


def counting(values):
    """A step without a model: batches are added up, and the loss is whatever comes."""
    losses = iter(values)

    def step(state, batch):
        state = state | {"sum": state["sum"] + batch, "step": state["step"] + 1}
        return state, {"loss": jnp.asarray(next(losses)), "grad_norm": jnp.asarray(1.0)}

    return step


def test_fit_logs_and_resumes():
    logged = []
    state = train.fit(
        {"sum": 0, "step": 3}, counting(itertools.count()), iter([1, 10, 100, 1000, 10000]), 8,
        lambda done, metrics: logged.append((done, metrics["loss"])), log_every=3,
    )  # fmt: skip
    assert state == {"sum": 11111, "step": 8}
    assert logged == [(6, 2.0), (8, 4.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_is_an_error_that_names_the_step(bad):
    step = counting(itertools.repeat(bad))
    drawn = itertools.count()
    with pytest.raises(FloatingPointError, match="loss is (nan|inf) at step 4: .*diverged"):
        train.fit({"sum": 0, "step": 0}, step, drawn, 8, log_every=4)
    assert next(drawn) == 4  # looked at with the log, not before


def test_nan_parameters_are_found(adamw):
    optimizer, step = adamw
    params = medsiglip_jax.init(CONFIG).params
    params["t"] = jnp.full((1,), jnp.nan, jnp.float32)
    with pytest.raises(FloatingPointError, match="step 1"):
        train.fit(train.init_state(params, optimizer), step, iter([make_pairs()]), 1)


def test_batches_that_end_early():
    with pytest.raises(ValueError, match="ended after step 2 of 5"):
        train.fit({"sum": 0, "step": 0}, counting(itertools.count()), iter([1, 2]), 5)


# ------------------------------------------------------------------------------ the optimiser


def test_weight_decay_is_for_kernels_only():
    shapes = towers.param_shapes(CONFIG)
    decayed = tree.flatten(optim.select(optim.DECAY_RULES, shapes))
    assert {path.split("/")[-1] for path, yes in decayed.items() if yes} == {"kernel"}
    spared = {path.split("/")[-1] for path, yes in decayed.items() if not yes}
    assert spared == {"bias", "scale", "pos_embedding", "probe", "embedding", "t", "b"}
    assert decayed["img/embedding/kernel"] and decayed["txt/head/kernel"]


def test_adamw_against_the_paper():
    """Three updates of a kernel and a bias in numpy: clip, moments, rate, decay by schedule."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=5), "bias": rng.normal(size=3)}
    params = {"layer": {k: v.astype(np.float32) for k, v in params.items()}}
    optimizer = optim.adamw(0.1, 10, 2, weight_decay=0.01, b1=0.8, b2=0.9, clip_norm=2.0)
    state = optimizer.init(params)
    got, want = params, {k: v.astype(np.float64) for k, v in params["layer"].items()}
    m, v = ({k: np.zeros_like(x) for k, x in want.items()} for _ in range(2))
    for step, schedule in enumerate([0.0, 0.5, 1.0]):
        g = {k: rng.normal(size=x.shape) * 10.0 ** (step - 1) for k, x in want.items()}
        got, state = optimizer.apply(
            got, {"layer": {k: x.astype(np.float32) for k, x in g.items()}}, state
        )
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k, x in want.items():
            clipped = g[k] * min(1, 2.0 / norm)
            m[k] = 0.8 * m[k] + 0.2 * clipped
            v[k] = 0.9 * v[k] + 0.1 * clipped**2
            adam = m[k] / (1 - 0.8 ** (step + 1)) / (np.sqrt(v[k] / (1 - 0.9 ** (step + 1))) + 1e-8)
            decay = 0.01 * x if k == "kernel" else 0
            want[k] = x - schedule * (0.1 * adam + decay)
    for k, x in want.items():
        np.testing.assert_allclose(got["layer"][k], x, rtol=1e-5)


def test_schedule():
    rate = optim.adamw(0.5, total_steps=12, warmup_steps=2).learning_rate
    want = [0, 0.25] + [0.25 * (1 + np.cos(np.pi * k / 10)) for k in range(11)] + [0]
    np.testing.assert_allclose([float(rate(step)) for step in range(14)], want, atol=1e-7)
    assert float(optim.adamw(0.5, total_steps=3).learning_rate(0)) == 0.5


def test_warmup_must_end():
    with pytest.raises(ValueError, match="warmup_steps is 5, total_steps 5"):
        optim.adamw(0.1, total_steps=5, warmup_steps=5)


def test_training_needs_no_tensorflow():
    code = (
        "import sys, medsiglip_jax.train\n"
        "heavy = {'tensorflow', 'torch', 'orbax', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
