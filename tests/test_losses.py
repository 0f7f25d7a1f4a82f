"""The sigmoid loss against a plain dense one in float64: values, gradients, memory, devices."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from references import rounding

from medsiglip_jax.losses import sigmoid_loss

pytestmark = pytest.mark.float

# (t, b): as initialised, and as a trained SigLIP has them.
INIT = (math.log(10), -10.0)
TRAINED = (4.77, -16.0)
# No pair is negligible here, as most are above: a masked one that still counts shows.
EVEN = (2.0, 1.0)
value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
# One for the file, so that tests of the same shapes share a compilation.
loss_only = jax.jit(sigmoid_loss, static_argnames="chunk_size")
loss_and_grads = jax.jit(value_and_grad(sigmoid_loss), static_argnames="chunk_size")


def arguments(n, d=16, seed=0, scalars=TRAINED):
    """Unit images and texts that resemble each other, as a trained model's do, and t and b."""
    rng = np.random.default_rng(seed)
    zimg, noise = rng.normal(size=(2, n, d))
    rows = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (zimg, zimg + noise)]
    return [x.astype(np.float32) for x in (*rows, *np.reshape(scalars, (2, 1)))]


def groups(n, seed=0):
    """Ids with groups and loners (negative), and a mask that leaves some row."""
    rng = np.random.default_rng(seed)
    mask = rng.random(n) > 0.25
    mask[0] = True
    return {"positives": rng.integers(-2, max(n // 4, 1), n).astype(np.int32), "mask": mask}


def reference(args, positives=None, mask=None):
    """Loss and gradients from the n x n definition, in numpy float64."""
    zimg, ztxt, t, b = (np.asarray(x, np.float64) for x in args)
    n = len(zimg)
    same = np.eye(n, dtype=bool)
    if positives is not None:
        same |= (positives[:, None] == positives) & (positives >= 0)
    mask = np.ones(n, bool) if mask is None else mask
    weight = (mask[:, None] & mask) / max(mask.sum(), 1)
    zimg, ztxt = (np.where(mask[:, None], z, 0) for z in (zimg, ztxt))
    sign = np.where(same, 1, -1)
    scaled = np.exp(t) * (zimg @ ztxt.T)
    cost = np.logaddexp(0, -sign * (scaled + b))
    g = -sign * -np.expm1(-cost) * weight
    grads = np.exp(t) * g @ ztxt, np.exp(t) * g.T @ zimg, (g * scaled).sum(), g.sum()
    return (cost * weight).sum(), (
        *grads[:2],
        np.reshape(grads[2], t.shape),
        np.reshape(g.sum(), b.shape),
    )


def tolerance(n, d=16, dtype=np.float32):
    """Of a loss, or of the largest entry of a gradient: logits of `d` terms, sums of n and of n."""
    return rounding(2 * n + d, dtype=dtype)


def assert_close(got, want, dtype=np.float32):
    """Compares loss and gradients, each relative to its own largest entry.

    That of b to at least 1: up to 1 from every pair, with either sign, may cancel in it.
    """
    names = ("loss", "zimg", "ztxt", "t", "b")
    allowed = tolerance(*want[1][0].shape, dtype)
    for name, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x = np.asarray(x, np.float64)
        assert x.shape == y.shape, name
        floor = 1 if name == "b" else np.finfo(np.float64).tiny
        error = np.abs(x - y).max() / max(np.abs(y).max(), floor)
        assert error <= allowed, f"{name} is off by {error:.2g} of its scale"


def check(args, chunk_size=None, **pairs):
    assert_close(loss_and_grads(*args, chunk_size=chunk_size, **pairs), reference(args, **pairs))


def test_reference_against_autodiff_of_the_published_code():
    """big_vision siglip.py:287-308, differentiated by JAX in float64."""

    def published(zimg, ztxt, t, b):
        logits = zimg @ ztxt.T * jnp.exp(t[0]) + b[0]
        sign = -jnp.ones_like(logits) + 2 * jnp.eye(len(zimg))
        return jnp.mean(-jnp.sum(jax.nn.log_sigmoid(sign * logits), axis=-1))

    args = [np.asarray(x, np.float64) for x in arguments(13)]
    with jax.enable_x64(True):
        assert_close(jax.jit(value_and_grad(published))(*args), reference(args), np.float64)


def test_the_tolerance_can_tell_a_wrong_loss():
    """Embeddings rounded to TF32's ten bits, or one pair of 150 x 150 of the wrong sign."""
    args = arguments(150, 64, scalars=EVEN)
    bits = [x.view(np.uint32) & ~np.uint32((1 << 13) - 1) for x in args[:2]]
    rounded = [*(x.view(np.float32) for x in bits), *args[2:]]
    ids = np.full(150, -1, np.int32)
    ids[[3, 90]] = 0
    for wrong in (reference(rounded), reference(args, positives=ids)):
        with pytest.raises(AssertionError):
            assert_close(wrong, reference(args))


# ------------------------------------------------------------------------------- values, gradients


def test_two_pairs_by_hand():
    zimg, ztxt = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 0]], np.float32)
    logits = [[2 - 3, 2 - 3], [-3, -3]]  # exp(log 2) * dot - 3
    terms = [
        [math.log1p(math.exp(-z if i == j else z)) for j, z in enumerate(row)]
        for i, row in enumerate(logits)
    ]
    loss = loss_only(zimg, ztxt, math.log(2), -3)
    assert float(loss) == pytest.approx(np.sum(terms) / 2, rel=tolerance(2, 2))


@pytest.mark.parametrize("scalars", [INIT, TRAINED])
@pytest.mark.parametrize("n, d", [(3, 2), (37, 16), (150, 64)])
def test_dense_matches_float64(n, d, scalars):
    check(arguments(n, d, scalars=scalars))


@pytest.mark.parametrize("n, chunk_size", [(7, 1), (7, 3), (7, 50), (131, 32)])
def test_chunks_match_float64(n, chunk_size):
    check(arguments(n), chunk_size, **groups(n))


def test_one_row():
    # As initialised: the loss of one well-trained pair is e^-67, whose last digits float32 lacks.
    check(arguments(1, scalars=INIT))


@pytest.mark.parametrize("chunk_size, names", [
    (None, ["positives", "mask"]), (5, ["positives", "mask"]), (5, ["positives"]), (5, ["mask"]),
])  # fmt: skip
def test_groups_and_masks_match_float64(chunk_size, names):
    for seed in range(5):
        pairs = groups(13, seed)
        args = arguments(13, seed=seed, scalars=EVEN)
        check(args, chunk_size, **{k: pairs[k] for k in names})


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_float64_under_x64(chunk_size):
    args, pairs = [np.asarray(x, np.float64) for x in arguments(23)], groups(23)
    with jax.enable_x64(True):
        loss, grads = loss_and_grads(*args, chunk_size=chunk_size, **pairs)
    assert {x.dtype for x in (loss, *grads)} == {np.dtype("float64")}
    assert_close((loss, grads), reference(args, **pairs), np.float64)


def test_float32_stays_float32_under_x64():
    with jax.enable_x64(True):
        args, ids = arguments(13), jnp.arange(13)
        assert ids.dtype == jnp.int64
        loss, grads = jax.eval_shape(loss_and_grads, *args, positives=ids)
    assert {x.dtype for x in (loss, *grads)} == {np.dtype("float32")}


def test_bfloat16_computes_in_float32():
    args = [jnp.asarray(x, jnp.bfloat16) for x in arguments(13)]
    loss, grads = loss_and_grads(*args, chunk_size=5)
    want, want_grads = reference(args)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(want, rel=tolerance(13))
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == jnp.bfloat16
        # Rounded once, at the end: half a unit in the last place of eight bits.
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("t_shape, b_shape", [((), (1,)), ((1,), ())])
def test_gradients_keep_the_shape_of_t_and_b(t_shape, b_shape):
    zimg, ztxt, t, b = arguments(13)
    args = zimg, ztxt, t.reshape(t_shape), b.reshape(b_shape)
    assert [g.shape for g in loss_and_grads(*args)[1][2:]] == [t_shape, b_shape]
    check(args)


def test_plain_numbers_for_t_and_b():
    zimg, ztxt, t, b = arguments(13, scalars=(1, -2))
    want = pytest.approx(float(loss_only(zimg, ztxt, t, b)), rel=tolerance(13))
    assert float(sigmoid_loss(zimg, ztxt, 1.0, -2)) == want


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_evaluation_agrees_with_differentiation(chunk_size):
    args = arguments(13)
    want = float(loss_and_grads(*args, chunk_size=chunk_size)[0])
    found = float(loss_only(*args, chunk_size=chunk_size))
    assert found == pytest.approx(want, rel=tolerance(13))


def test_cotangents_scale_the_gradients():
    args = arguments(13)
    scaled = value_and_grad(lambda *a: 3 * sigmoid_loss(*a, chunk_size=5) + 1)
    loss, grads = reference(args)
    assert_close(jax.jit(scaled)(*args), (3 * loss + 1, [3 * g for g in grads]))


# --------------------------------------------------------------------------- what the loss promises


def test_loss_at_initialisation_is_about_ten():
    rng = np.random.default_rng(0)
    zimg, ztxt = rng.normal(size=(2, 64, 1152)).astype(np.float32)
    zimg, ztxt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (zimg, ztxt))
    # softplus(10) for the positive, and softplus(-10) = 4.5e-5 for each of the 63 others.
    assert float(loss_only(zimg, ztxt, *INIT)) == pytest.approx(10 + 63 * 4.54e-5, abs=0.1)


@pytest.mark.parametrize("n, chunk_size", [(12, None), (2048, 256)])
def test_the_mean_is_over_images_not_pairs(n, chunk_size):
    # Equal terms are the worst case for float32 sums: every rounding goes the same way.
    zimg, ztxt = np.zeros((2, n, 4), np.float32)
    loss = float(loss_only(zimg, ztxt, 0.0, 0.0, chunk_size=chunk_size))
    assert loss == pytest.approx(n * math.log(2), rel=tolerance(n, 4))


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_stay_finite_and_right(scale, chunk_size):
    # Cosines of exactly -1, 0 and 1: between them a logit of 1e4 has no sixth decimal in float32.
    rng = np.random.default_rng(0)
    zimg, ztxt = rng.choice([-1, 1], (2, 13, 1)) * np.eye(16)[rng.integers(0, 4, (2, 13))]
    for b in (0, -scale / 2, scale / 2, -2 * scale, 2 * scale):
        scalars = np.array([[math.log(scale)], [b]], np.float32)
        check([zimg.astype(np.float32), ztxt.astype(np.float32), *scalars], chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_permuting_rows_permutes_gradients(chunk_size):
    args, pairs = arguments(13), groups(13)
    order = np.random.default_rng(1).permutation(13)
    shuffled = [args[0][order], args[1][order], *args[2:]]
    pairs_shuffled = {k: v[order] for k, v in pairs.items()}
    got = loss_and_grads(*shuffled, chunk_size=chunk_size, **pairs_shuffled)
    want, (gimg, gtxt, gt, gb) = reference(args, **pairs)
    assert_close(got, (want, (gimg[order], gtxt[order], gt, gb)))


def test_negative_and_distinct_ids_match_only_themselves():
    args, n = arguments(13), 13
    alone = reference(args)
    extremes = [-(2**31), 2**31 - 1, -1, -1, 0, -2, 1, -3, 2, -13, -14, 3, -(2**31)]
    for ids in (np.full(n, -1), np.arange(n)[::-1], np.array(extremes)):
        assert_close(loss_and_grads(*args, positives=ids.astype(np.int32)), alone)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_masked_rows_do_not_exist(garbage, chunk_size):
    zimg, ztxt, t, b = arguments(13, scalars=EVEN)
    pairs = groups(13)
    mask = pairs["mask"]
    kept = [zimg[mask], ztxt[mask], t, b]
    want, (gimg, gtxt, gt, gb) = reference(kept, positives=pairs["positives"][mask])
    zimg[~mask], ztxt[~mask] = garbage, garbage
    got, grads = loss_and_grads(zimg, ztxt, t, b, chunk_size=chunk_size, **pairs)
    assert_close((got, (grads[0][mask], grads[1][mask], *grads[2:])), (want, (gimg, gtxt, gt, gb)))
    for g in grads[:2]:
        assert np.array_equal(g[~mask], np.zeros_like(g[~mask]))


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_all_rows_masked_is_zero(chunk_size):
    args = arguments(13)
    args[0][:], args[1][:] = np.nan, np.inf
    result = loss_and_grads(*args, mask=np.zeros(13, bool), chunk_size=chunk_size)
    for leaf in jax.tree.leaves(result):
        assert np.array_equal(leaf, np.zeros_like(leaf))


def test_nan_in_a_valid_row_is_not_hidden():
    zimg, ztxt, t, b = arguments(13)
    zimg[2] = np.nan
    assert math.isnan(loss_only(zimg, ztxt, t, b, chunk_size=5))


# ------------------------------------------------------------------------------- cost: memory, work


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def largest_array(function, *args):
    """Number of elements of the largest array that an equation of the function makes."""
    made = (v.aval for e in equations(jax.make_jaxpr(function)(*args).jaxpr) for v in e.outvars)
    return max(math.prod(aval.shape) for aval in made)


@pytest.mark.parametrize("chunk_size", [1, 25, 99])
@pytest.mark.parametrize("differentiate", [False, True])
def test_no_n_by_n_array_with_chunks(chunk_size, differentiate):
    n, d = 100, 3
    args = arguments(n, d)

    def largest(chunk_size):
        loss = functools.partial(sigmoid_loss, chunk_size=chunk_size, **groups(n))
        return largest_array(value_and_grad(loss) if differentiate else loss, *args)

    rows = math.ceil(n / math.ceil(n / chunk_size))
    assert largest(chunk_size) <= max(rows**2, (n + chunk_size) * d)
    assert largest(None) == n * n  # The measure does see the dense path.


@pytest.mark.parametrize("check_vma", [True, False])
def test_no_local_square_in_the_ring_with_chunks(check_vma):
    n, d, local = 800, 1, 100
    args = arguments(n, d)
    loss = ring(check_vma=check_vma, chunk_size=20)
    # The whole [n, d] arrays outside the shard_map are the largest thing there may be.
    assert largest_array(value_and_grad(loss), *args) == n * d < local**2
    assert largest_array(value_and_grad(ring(check_vma=check_vma)), *args) == local**2


def temporary_bytes(chunk_size, n, d):
    loss = functools.partial(sigmoid_loss, chunk_size=chunk_size)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (n, d), (1,), (1,))]
    compiled = jax.jit(value_and_grad(loss)).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_compiled_memory_is_linear_with_chunks():
    n, d, chunk = 8192, 8, 128
    square = 4 * n * n  # 268 MB
    # A few [n, d] accumulators of 262 kB and a few tiles of 66 kB each: 2 MB measured.
    assert temporary_bytes(chunk, n, d) < 4 * (12 * n * d + 12 * chunk * chunk) < square / 50
    assert temporary_bytes(None, n, d) >= square


@pytest.mark.parametrize("chunk_size", [None, 10])
def test_residuals_hold_nothing_per_pair(chunk_size):
    n, d = 50, 3
    loss = functools.partial(sigmoid_loss, chunk_size=chunk_size)
    residuals = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *arguments(n, d))
    assert max(leaf.size for leaf in jax.tree.leaves(residuals)) == n * d


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_one_matmul_to_evaluate_and_three_to_differentiate(chunk_size):
    loss = functools.partial(sigmoid_loss, chunk_size=chunk_size)
    args = arguments(10)
    for function, expected in ((loss, 1), (value_and_grad(loss), 3)):
        found = jax.jit(function).lower(*args).as_text().count("stablehlo.dot_general")
        assert found == expected


def test_matmuls_ask_for_full_precision():
    jaxpr = jax.make_jaxpr(value_and_grad(sigmoid_loss))(*arguments(4)).jaxpr
    dots = [e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert {p for pair in dots for p in pair} == {jax.lax.Precision.HIGHEST}


# ----------------------------------------------------------------------------------------- the ring


def mesh(shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def shard(function, axis, out_specs, check_vma, on=None, pairs=()):
    """`function(zimg, ztxt, t, b, **pairs)` on shards of rows; pairs are named arrays [n]."""
    rows = P(axis)
    mapped = jax.shard_map(
        lambda zimg, ztxt, t, b, *values: function(
            zimg, ztxt, t, b, **dict(zip(pairs, values, strict=True))
        ),
        mesh=on or mesh(),
        in_specs=(rows, rows, P(), P(), *(rows for _ in pairs)),
        out_specs=out_specs,
        check_vma=check_vma,
    )
    return lambda *args, **values: mapped(*args, *(values[k] for k in pairs))


def ring(axis="data", check_vma=True, chunk_size=None, on=None, pairs=()):
    loss = functools.partial(sigmoid_loss, axis_name=axis, chunk_size=chunk_size)
    return shard(loss, axis, P(), check_vma, on, pairs)


def pairs_across_shards(n):
    """Groups of eight, one member on each of eight shards; a wholly masked shard; NaN there."""
    pairs = groups(n)
    pairs["positives"] = np.where(pairs["positives"] < 0, -1, np.arange(n) % (n // 8))
    pairs["positives"] = pairs["positives"].astype(np.int32)
    pairs["mask"][n // 8 : n // 4] = False
    return pairs


@pytest.mark.parametrize("check_vma, chunk_size", [(True, 3), (False, 3), (True, None)])
def test_ring_gradient_outside(check_vma, chunk_size):
    n = 64
    args, pairs = arguments(n, scalars=EVEN), pairs_across_shards(n)
    want = reference(args, **pairs)
    args[0][~pairs["mask"]] = np.nan
    loss = ring(check_vma=check_vma, chunk_size=chunk_size, pairs=tuple(pairs))
    assert_close(jax.jit(value_and_grad(loss))(*args, **pairs), want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_ring_without_gradient(check_vma):
    args, pairs = arguments(64), pairs_across_shards(64)
    loss = jax.jit(ring(check_vma=check_vma, chunk_size=3, pairs=tuple(pairs)))
    want = reference(args, **pairs)[0]
    assert float(loss(*args, **pairs)) == pytest.approx(want, rel=tolerance(64))


def test_ring_gradient_inside():
    n = 64
    args, pairs = arguments(n), pairs_across_shards(n)
    loss = functools.partial(sigmoid_loss, axis_name="data", chunk_size=3)
    out_specs = (P(), (P("data"), P("data"), P(), P()))
    inside = shard(value_and_grad(loss), "data", out_specs, True, pairs=tuple(pairs))
    assert_close(jax.jit(inside)(*args, **pairs), reference(args, **pairs))


def test_ring_gradient_inside_without_vma_follows_psum():
    # There JAX transposes psum to psum, whatever is summed: see the docstring of sigmoid_loss.
    args = arguments(64)

    def step(*args):
        loss = functools.partial(sigmoid_loss, axis_name="data", chunk_size=3)
        value, (gimg, gtxt, *scalars) = value_and_grad(loss)(*args)
        size = jax.lax.axis_size("data")
        return value, (gimg / size, gtxt / size, *jax.lax.pmean(scalars, "data"))

    inside = shard(step, "data", (P(), (P("data"), P("data"), P(), P())), False)
    assert_close(jax.jit(inside)(*args), reference(args))


@pytest.mark.parametrize(
    "axis, check_vma",
    [("data", True), ("model", False), (("data", "model"), True)],
)
def test_ring_over_axes_of_a_larger_mesh(axis, check_vma):
    args, pairs = arguments(48), groups(48)
    on = mesh((4, 2), ("data", "model"))
    loss = ring(axis, check_vma, 5, on, tuple(pairs))
    assert_close(jax.jit(value_and_grad(loss))(*args, **pairs), reference(args, **pairs))


def test_ring_float64_under_x64():
    args = [np.asarray(x, np.float64) for x in arguments(32)]
    want = reference(args)
    with jax.enable_x64(True):
        assert_close(jax.jit(value_and_grad(ring(chunk_size=3)))(*args), want, np.float64)


def test_ring_reaches_the_towers():
    """A replicated parameter before the loss gets the gradient of the global batch."""
    zimg, ztxt, t, b = arguments(64)
    w = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32) / 4

    def loss(w, zimg, ztxt):
        return sigmoid_loss(zimg @ w, ztxt @ w, t, b, axis_name="data")

    rows = P("data")
    inside = jax.shard_map(jax.grad(loss), mesh=mesh(), in_specs=(P(), rows, rows), out_specs=P())
    gimg, gtxt = reference((zimg @ w, ztxt @ w, t, b))[1][:2]
    want = zimg.T @ gimg + ztxt.T @ gtxt
    error = np.abs(jax.jit(inside)(w, zimg, ztxt) - want).max()
    assert error <= tolerance(64, 3 * 16) * np.abs(want).max()


def test_each_device_its_own_loss():
    """Without `axis_name` in a shard_map the shards are separate batches; t and b still sum."""
    args = arguments(64)
    local = shard(lambda *a: sigmoid_loss(*a)[None], "data", P("data"), True)
    total = jax.jit(value_and_grad(lambda *a: local(*a).sum()))(*args)
    shards = [[z[i : i + 8] for z in args[:2]] + args[2:] for i in range(0, 64, 8)]
    losses, grads = zip(*map(reference, shards), strict=True)
    gimg, gtxt, gt, gb = zip(*grads, strict=True)
    want = (
        np.sum(losses),
        (np.concatenate(gimg), np.concatenate(gtxt), np.sum(gt, 0), np.sum(gb, 0)),
    )
    assert_close(total, want)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_sharded_arrays_under_jit(chunk_size):
    args, pairs = arguments(64), groups(64)
    rows = jax.NamedSharding(mesh(), P("data"))
    sharded = [jax.device_put(z, rows) for z in args[:2]]
    loss = functools.partial(sigmoid_loss, chunk_size=chunk_size, **pairs)
    got = jax.jit(value_and_grad(loss))(*sharded, *args[2:])
    assert_close(got, reference(args, **pairs))


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ztxt": np.zeros((3, 4), np.float32)}, r"zimg and ztxt .*\(4, 4\) and \(3, 4\)"),
        ({"zimg": np.zeros(4, np.float32)}, r"expected the same \(n, d\)"),
        ({k: np.zeros((0, 4), np.float32) for k in ("zimg", "ztxt")}, "n >= 1"),
        ({"zimg": np.zeros((4, 4), np.uint8)}, "zimg is uint8; expected floating-point"),
        ({"t": np.zeros(2, np.float32)}, r"t has shape \(2,\); expected \(\) or \(1,\)"),
        ({"b": np.zeros((1, 1), np.float32)}, r"b has shape \(1, 1\)"),
        ({"chunk_size": 0}, "chunk_size is 0; expected a positive int"),
        ({"chunk_size": 2.0}, "chunk_size is 2.0"),
        ({"positives": np.zeros(4, np.float32)}, "positives is float32 .* expected int32 ids"),
        ({"positives": np.zeros(4, np.uint32)}, "positives is uint32"),
        ({"positives": np.zeros(3, np.int32)}, r"positives is int32 \(3,\); .* shape \(4,\)"),
        ({"positives": np.full(4, 2**40)}, "ids beyond int32"),
        ({"mask": np.ones(4, np.int32)}, "mask is int32 .* expected bool"),
        ({"mask": np.ones((4, 1), bool)}, r"mask is bool \(4, 1\)"),
    ],
)
def test_mistakes_are_named(changes, message):
    z = np.zeros((4, 4), np.float32)
    arguments = {"zimg": z, "ztxt": z, "t": 1.0, "b": -1.0} | changes
    # Unwrapped, because the type checker of the test run would be first to object.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(sigmoid_loss)(**arguments)


def test_host_ids_of_64_bits_are_accepted_where_they_fit():
    args, ids = arguments(6), np.array([0, 0, 1, 1, -5, 2**31 - 1])
    assert ids.dtype == np.int64
    loss = float(sigmoid_loss(*args, positives=ids))
    assert loss == pytest.approx(reference(args, positives=ids)[0], rel=tolerance(6))
