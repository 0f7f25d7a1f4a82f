"""The train step against closed forms, and what must not change an update: masked rows, recomputed
activations, more devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import model_terms, rounding
from sklearn.utils.class_weight import compute_class_weight

import medsiglip_jax
from medsiglip_jax.model import sharding, towers, tree
from medsiglip_jax.model.config import two_towers
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.train import freeze, lora, optim
from medsiglip_jax.train.objectives.classification import Classification
from medsiglip_jax.train.objectives.contrastive import Contrastive
from medsiglip_jax.train.objectives.objective import Labels, Loss
from medsiglip_jax.train.step import init_state, learned, make_train_step

CONFIG = two_towers(
    image_size=8, patch_size=4, width=8, depth=2, mlp_dim=16, num_heads=2, vocab_size=12,
    context_length=4,
)  # fmt: skip
assert CONFIG.text
CONFIG = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, depth=1))
RATE, ROWS = 0.01, 8
# Forth, and back about twice as many.
TERMS = 3 * model_terms(CONFIG)
PAIRS = Contrastive().loss(CONFIG, Compute(), Labels())
# Plain gradient descent: an update is then as well conditioned as its gradient, where Adam divides
# by the noise of gradients that are zero in exact arithmetic (the key biases).
DESCENT = optim.Optimizer(
    init=lambda params: (),
    update=lambda gradients, state, params: (
        jax.tree.map(lambda g: -0.1 * g, gradients), state
    ),
    learning_rate=lambda step: 0.1,
)  # fmt: skip


def adamw_of(rate, schedule, **changes):
    return optim.make_optimizer(rate, schedule, optim.OptimizerConfig(**changes))


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
    return init_state(medsiglip_jax.init(CONFIG, seed).params, optimizer)


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


@pytest.fixture(scope="module")
def adamw():
    optimizer = adamw_of(RATE, optim.schedule("cosine", 50), weight_decay=1e-3)
    step = make_train_step(PAIRS, optimizer)
    return optimizer, step


@pytest.fixture(scope="module")
def descent():
    """The step whose updates the others must reproduce, with its result on a batch."""
    state, batch = make_state(DESCENT), make_batch(masked=2)
    step = make_train_step(PAIRS, DESCENT)
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
    state = init_state(params, DESCENT)
    step = make_train_step(PAIRS, DESCENT)
    after, _ = jax.eval_shape(step, state, make_batch())
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (state, after)]
    assert types[0] == types[1]


@pytest.mark.float
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

    state, (metrics,) = run(step, init_state(params, optimizer), batch, steps=1)
    assert metrics["loss"] == pytest.approx(loss, rel=rounding(TERMS))
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


def test_eight_devices_give_the_same_update(descent):
    _, expected, expected_metrics = descent
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    params = medsiglip_jax.init(CONFIG).params
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    state = init_state(params, DESCENT)
    batch = jax.device_put(make_batch(masked=2), sharding.batch_sharding(mesh))
    # And recomputing blocks, with the gradients of products of a CPU: all is what it was.
    compute = Compute(rows=sharding.batch_sharding(mesh), remat="block", flat=True)
    objective = Contrastive().loss(CONFIG, compute, Labels(), loss_chunk=1)
    step = make_train_step(objective, DESCENT)
    assert_same(run(step, state, batch), expected, expected_metrics)


def test_the_whole_state_lies_on_the_mesh():
    """A scalar elsewhere would come back on the mesh, and the second step would compile again."""
    mesh = sharding.make_mesh()
    params = {"layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    state = init_state(params, adamw_of(RATE, optim.schedule("cosine", 10)), average=True)
    # Parameters, their average, moments, optax's and our counts.
    assert len(jax.tree.leaves(state)) == 2 + 2 + 4 + 2 + 3
    assert {x.sharding.num_devices for x in jax.tree.leaves(state)} == {8}


def test_an_average_is_split_as_its_parameter(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 0)
    mesh = sharding.make_mesh()
    params = {"layer": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(8)}}
    params = jax.device_put(params, sharding.param_shardings(params, mesh, fsdp=True))
    state = init_state(params, DESCENT, average=True)
    jax.tree.map(lambda a, p: pytest.fail() if a.sharding != p.sharding else 0,
                 state["ema"], params)  # fmt: skip
    assert "data" in state["ema"]["layer"]["kernel"].sharding.spec


def assert_same(result, expected, expected_metrics):
    """Equal within float32 rounding: parameters move by a tenth of their gradients here."""
    state, metrics = result
    largest = 0.1 * max(seen["grad_norm"] for seen in expected_metrics)
    moved = np.abs(expected["params"]["b"] + 10).max()
    assert moved > 1e-2, "the comparison would be empty"
    for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        # The sums of the steps' updates, and the parameters that these are added to.
        apart = rounding(len(metrics) * TERMS, largest) + rounding(len(metrics), np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=apart)
    for got, want in zip(metrics, expected_metrics, strict=True):
        assert got == pytest.approx(want, rel=rounding(TERMS))


# ------------------------------------------------------------------- pieces, and what is bad


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_keeps_the_negatives_of_the_whole_batch(descent, devices):
    """GradCache in 4 pieces == the batch in one, with masked rows and recomputed activations; over
    8 devices in 2."""
    _, expected, expected_metrics = descent
    params, batch, pieces = medsiglip_jax.init(CONFIG).params, make_batch(), 4
    objective = Contrastive().loss(CONFIG, Compute(remat="block"), Labels())
    batch["mask"] = make_batch(masked=2)["mask"]
    if devices == 8:
        mesh = sharding.make_mesh()
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
        batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
        batch["mask"][ROWS:] = False
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        compute = Compute(rows=sharding.batch_sharding(mesh))
        objective, pieces = Contrastive().loss(CONFIG, compute, Labels()), 2
    state = init_state(params, DESCENT)
    step = make_train_step(objective, DESCENT, pieces)
    assert_same(run(step, state, batch), expected, expected_metrics)


def test_plain_accumulation_is_the_mean_over_pieces_of_their_own_losses(descent):
    batch = make_batch(masked=3)
    params = medsiglip_jax.init(CONFIG).params
    step = make_train_step(PAIRS, DESCENT, accumulate=2, negatives="piece")
    state, (metrics,) = run(step, make_state(DESCENT), batch, steps=1)
    pieces = [{name: x[i::2] for name, x in batch.items()} for i in (0, 1)]
    losses = [float(jax.jit(PAIRS)(params, piece)) for piece in pieces]
    shares = [piece["mask"].sum() / batch["mask"].sum() for piece in pieces]
    assert shares == [3 / 5, 2 / 5]
    assert metrics["loss"] == pytest.approx(np.dot(losses, shares), rel=rounding(TERMS))
    _, (whole,) = run(descent[0], make_state(DESCENT), batch, steps=1)
    assert metrics["loss"] != pytest.approx(whole["loss"], rel=1e-3)


def test_pieces_must_be_equal():
    with pytest.raises(ValueError, match="batch of 8 cannot be cut into 3 equal"):
        make_train_step(PAIRS, DESCENT, accumulate=3)(make_state(DESCENT), make_batch())
    with pytest.raises(ValueError, match="negatives 'all'"):
        make_train_step(PAIRS, DESCENT, accumulate=2, negatives="all")


def test_what_is_not_finite_is_skipped_and_counted(adamw):
    optimizer, step = adamw
    params = medsiglip_jax.init(CONFIG).params
    state = init_state(params, optimizer)
    state, _ = step(state, make_pairs())
    before = jax.tree.map(np.asarray, state)
    state["params"]["t"] = jnp.full((1,), jnp.nan, jnp.float32)
    for count in (1, 2):
        state, metrics = step(state, make_pairs())
        assert metrics["skipped_in_row"] == count and not np.isfinite(metrics["loss"])
    assert state["step"] == 3 and state["skipped"] == 2
    state["params"]["t"] = jnp.asarray(before["params"]["t"])
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state[name]),
                     before[name])  # fmt: skip
    state, metrics = step(state, make_pairs())
    assert metrics["skipped_in_row"] == 0 and state["skipped"] == 2
    assert metrics["learning_rate"] == pytest.approx(float(optimizer.learning_rate(1)))


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_that_of_the_parameters_after_every_update(decay):
    """The recurrence in float64; an update that is skipped does not count, and the bound of the
    first updates holds."""
    scale = Loss(lambda p, b: {"z": p["w"] * b["x"]}, lambda p, e, b: ((e["z"] - 1) ** 2).mean())
    batch = {"x": np.float32([[1, 2, 3]]), "mask": np.ones(1, bool)}
    state = init_state({"w": jnp.zeros(3)}, DESCENT, average=True)
    step, want, updates = make_train_step(scale, DESCENT, ema=decay), np.zeros(3), 0
    for bad in (False, False, True, False, True, True, False, False):
        before = np.asarray(state["ema"]["w"])
        state, _ = step(state, {**batch, "x": batch["x"] * (np.nan if bad else 1)})
        if bad:
            np.testing.assert_array_equal(state["ema"]["w"], before)
            continue
        updates += 1
        held = min(decay, updates / (9 + updates))
        want = held * want + (1 - held) * np.asarray(state["params"]["w"], np.float64)
        np.testing.assert_allclose(state["ema"]["w"], want, rtol=1e-6)
    assert (np.asarray(learned(state)["w"]) == np.asarray(state["ema"]["w"])).all()
    assert np.abs(want - np.asarray(state["params"]["w"])).max() > 1e-3, "nothing was averaged"


# ------------------------------------------------------------------------------ parts of it


def split(patterns, params):
    return freeze.partition(patterns, params).split(params)


def test_frozen_parts_stay_and_have_no_optimiser_state():
    params = medsiglip_jax.init(CONFIG).params
    trainable, frozen = split(("img/.*", "txt/head/.*"), params)
    optimizer = adamw_of(RATE, optim.schedule("constant", 10))
    state = init_state(trainable, optimizer, frozen)
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.size > 1]
    assert sum(x.size for x in moments) <= 2 * tree.size(trainable)
    kept, before = jax.tree.map(np.array, (frozen, trainable))
    state, _ = run(make_train_step(PAIRS, optimizer), state, make_batch(), steps=2)
    jax.tree.map(np.testing.assert_array_equal, state["frozen"], kept)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state["params"], before)
    assert moved["txt"]["Embed_0"]["embedding"] > 0


def test_gradients_with_frozen_blocks_are_those_of_the_whole_model(descent):
    """What trains moves exactly as it does when everything trains."""
    params, batch, step = medsiglip_jax.init(CONFIG).params, make_batch(), descent[0]
    everything, (metrics,) = run(step, init_state(params, DESCENT), batch, steps=1)
    params = medsiglip_jax.init(CONFIG).params
    part = freeze.partition(("img/Transformer/encoderblock_0/.*", "txt/.*"), params)
    trainable, frozen = part.split(params)
    state, _ = run(step, init_state(trainable, DESCENT, frozen), batch, steps=1)
    want, _ = part.split(everything["params"])
    apart = rounding(TERMS, 0.1 * metrics["grad_norm"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=apart), state["params"], want
    )


def test_adapters_learn():
    params = medsiglip_jax.init(CONFIG).params
    config = lora.LoRA(rank=2)
    adapted = freeze.join(params, lora.init(config, params))
    trainable, frozen = split(config.frozen(adapted), adapted)
    optimizer = adamw_of(0.03, optim.schedule("constant", 50))
    state, metrics = run(
        make_train_step(PAIRS, optimizer),
        init_state(trainable, optimizer, frozen),
        make_pairs(),
        30,
    )
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]


# ------------------------------------------------------------------------------- classes


@pytest.mark.float
def test_cross_entropy_and_its_torch_twin():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 2, -1, 1, 1, 0])
    mask = np.array([True, True, True, False, True, True])
    from medsiglip_jax import losses

    got = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))
    valid = mask & (labels >= 0)
    want = torch.nn.functional.cross_entropy(
        torch.tensor(logits[valid]), torch.tensor(labels[valid])
    )
    assert float(got) == pytest.approx(float(want), rel=rounding(6 * 3))
    weight = np.array([1.0, 3.0, 0.5], np.float32)
    got = losses.cross_entropy(jnp.asarray(logits), labels, mask, weight)
    want = torch.nn.functional.cross_entropy(
        torch.tensor(logits[valid]), torch.tensor(labels[valid]), torch.tensor(weight)
    )
    assert float(got) == pytest.approx(float(want), rel=rounding(6 * 3))
    assert float(losses.cross_entropy(jnp.asarray(logits), labels, mask, 0 * weight)) == 0

    many = rng.integers(0, 2, (6, 3)).astype(np.float32)
    entries = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(many), pos_weight=torch.tensor(weight), reduction="none"
    ).numpy()
    many[0, 1] = np.nan
    got = losses.binary_cross_entropy(
        jnp.asarray(logits), jnp.asarray(many), jnp.asarray(mask), weight
    )
    known = mask[:, None] & ~np.isnan(many)
    assert float(got) == pytest.approx(entries[known].mean(), rel=rounding(6 * 3))


def test_balanced_classes_weigh_the_same():
    """rows / (classes * rows of the class), as scikit-learn's class_weight="balanced"."""
    labels = np.array([0, 0, 0, 2, -1], np.int32)
    known = Labels(("a", "b", "c"), False, labels)
    weight = Classification(class_weight="balanced")._class_weights(known)
    present = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels[:4])
    np.testing.assert_allclose(weight, [present[0] * 2 / 3, 0, present[1] * 2 / 3], rtol=1e-6)
    given = Classification(class_weight=(1.0, 2.0, 3.0))._class_weights(known)
    assert given is not None and given.tolist() == [1, 2, 3]
    assert Classification(class_weight="balanced")._class_weights(Labels(("a",))) is None
    for wrong, labels, message in (
        ((1.0,), known, "class_weight has 1 numbers for the 3 classes"),
        ("balanced", Labels(("a",), True), "class_weight is for one class per image"),
    ):
        with pytest.raises(ValueError, match=message):
            Classification(class_weight=wrong).loss(CONFIG, Compute(), labels)


@pytest.mark.parametrize("pool, multi_label", [
    ("map", False),
    ("mean", True),
    pytest.param("map", True, marks=pytest.mark.slow),
    pytest.param("mean", False, marks=pytest.mark.slow),
])  # fmt: skip
def test_classification_learns_and_accumulates_exactly(pool, multi_label):
    objective, known = Classification(pool=pool), Labels(("a", "b", "c"), multi_label)
    loss = objective.loss(CONFIG, Compute(), known)
    batch = make_batch(masked=1)
    labels = np.arange(ROWS, dtype=np.int32) % 3
    batch["label"] = np.eye(3, dtype=np.float32)[labels] if multi_label else labels
    params = {"img": medsiglip_jax.init(CONFIG).params["img"], **objective.added(CONFIG, known)}
    params["classifier"]["kernel"] += 0.1
    results = []
    for pieces in (1, 4):
        state = init_state(jax.tree.map(jnp.array, params), DESCENT)
        results.append(run(make_train_step(loss, DESCENT, pieces), state, batch, steps=3))
    (one, metrics), (many, _) = results
    apart = rounding(3 * TERMS, 0.1 * max(seen["grad_norm"] for seen in metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=apart), one, many)
    assert metrics[2]["loss"] < metrics[0]["loss"] and "temperature" not in metrics[0]
