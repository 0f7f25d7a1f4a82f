"""The pairwise sigmoid loss: in tiles, in a ring over devices, its gradients in the same pass.

Every pair adds `softplus(-sign * logit)`, and its gradient is known the moment its logit is. Value
and gradients are therefore plain sums over tiles of pairs: the forward rule of the custom gradient
goes through the tiles once (three matmuls each, nothing stored per pair), and the backward rule
only scales. Over several devices the texts travel round a ring, and their gradient with them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

# The id of rows that belong to no pair: masked by the caller, or padding of the last tile.
_MASKED = jnp.iinfo(jnp.int32).min


class _Tiles(NamedTuple):
    """The embeddings of one tower, cut into tiles; rows with equal ids are a positive pair."""

    z: Array  # [tiles, rows, d]
    ids: Array  # [tiles, rows]


class _Sums(NamedTuple):
    """Sums over the texts, one per image, so that each float32 is the sum of few terms.

    The gradients are None where only the loss is computed.
    """

    loss: Array  # [tiles, rows]
    z: Array | None = None  # [tiles, rows, d]
    t: Array | None = None  # [tiles, rows]
    b: Array | None = None  # [tiles, rows]


def sigmoid_loss(
    zimg: Float[ArrayLike, "n d"],
    ztxt: Float[ArrayLike, "n d"],
    t: Real[ArrayLike, ""] | Real[ArrayLike, "1"],
    b: Real[ArrayLike, ""] | Real[ArrayLike, "1"],
    *,
    positives: Int[ArrayLike, " n"] | None = None,
    mask: Bool[ArrayLike, " n"] | None = None,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """Returns the mean over images of the sum over texts of softplus(-sign * logit).

    The logits are `exp(t) * zimg @ ztxt.T + b`; the sign is +1 for a positive pair and -1 for any
    other. Source: SigLIP, arXiv 2303.15343, algorithm 1; big_vision
    trainers/proj/image_text/siglip.py:287-308, whose chunked version was never published. As there,
    the sum is divided by the number of images, not of pairs: at initialisation (t = log 10,
    b = -10) the loss is about 10.

    Computes in float32, or in float64 where an argument is float64, at matmul precision "highest".
    Gradients are reverse-mode, with respect to the first four arguments, each in the shape and
    dtype of its argument.

    With `axis_name`, nothing needs to be added to gradients taken outside the `shard_map`, nor to
    those taken inside under `check_vma=True`, the default. Inside under `check_vma=False` JAX
    differentiates the sum of the loss over the devices: `pmean` the gradients of replicated values
    and divide those of sharded ones by the axis size.

    Args:
      zimg: image embeddings, L2-normalised by the caller.
      ztxt: text embeddings; row i belongs to row i of `zimg`.
      t: log temperature.
      b: bias.
      positives: ids. Rows with equal ids are positive pairs; a row with a negative id matches only
        itself. None: every row matches only itself.
      mask: False excludes a row, image and text, from every pair and from the count; nothing in it,
        not even NaN, reaches the loss or a gradient. The loss of no rows is 0.
      chunk_size: upper bound on the sides of the tiles of logits, of which one exists at a time,
        forward and backward. It need not divide n. None: one tile of n x n. For arrays sharded over
        devices use `axis_name` too: under plain `jit` every device would compute all the tiles.
      axis_name: mesh axis or axes of the enclosing `jax.shard_map` over which rows are split. Every
        argument is then a local shard (`t` and `b` replicated, `positives` with global ids) and the
        result is the loss of the global batch, the same on every device.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `chunk_size` is not positive.
    """
    _check_embeddings(zimg, ztxt)
    _check_scalars(t, b, chunk_size)
    _check_rows(jnp.shape(zimg)[0], positives, mask)
    zimg, ztxt, t, b = map(jnp.asarray, (zimg, ztxt, t, b))
    dtype = jnp.promote_types(jnp.result_type(zimg, ztxt, t, b), jnp.float32)
    zimg, ztxt, t, b = (x.astype(dtype) for x in (zimg, ztxt, t, b))
    ids = _pair_ids(len(zimg), positives, mask, axis_name)
    zimg, ztxt, t, b, ids = _vary_alike(axis_name, zimg, ztxt, t.reshape(()), b.reshape(()), ids)
    valid = ids != _MASKED
    # `where` stays outside the custom gradient: its transpose makes masked gradients exactly 0.
    zimg, ztxt = (jnp.where(valid[:, None], z, 0) for z in (zimg, ztxt))
    total = _local_sum(zimg, ztxt, t, b, ids, chunk_size, axis_name)
    count = valid.sum(dtype=dtype)
    # Outside too, because only JAX knows which transpose of psum its vma mode asks for.
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)  # pyright: ignore[reportOperatorIssue]


def cross_entropy(
    logits: Float[Array, "n c"],
    labels: Int[ArrayLike, " n"],
    mask: Bool[ArrayLike, " n"],
    class_weight: Float[ArrayLike, " c"] | None = None,
) -> Float[Array, ""]:
    """Mean softmax cross-entropy over the rows that are not masked and have no negative label.

    Args:
      logits: one per class.
      labels: number of the class, negative for unknown.
      mask: False excludes a row.
      class_weight: of each class in the mean, as torch's CrossEntropyLoss has it.
    """
    labels, mask = jnp.asarray(labels), jnp.asarray(mask)
    valid = mask & (labels >= 0)
    log_p, known = jax.nn.log_softmax(logits), jnp.maximum(labels, 0)
    picked = jnp.take_along_axis(log_p, known[:, None], axis=1)[:, 0]
    if class_weight is None:
        return -jnp.where(valid, picked, 0).sum() / jnp.maximum(valid.sum(), 1)
    weight = jnp.where(valid, jnp.asarray(class_weight)[known], 0)
    total = weight.sum()
    return -(weight * picked).sum() / jnp.where(total > 0, total, 1)


def binary_cross_entropy(
    logits: Float[Array, "n c"],
    labels: Float[ArrayLike, "n c"],
    mask: Bool[ArrayLike, " n"],
    pos_weight: Float[ArrayLike, " c"] | None = None,
) -> Float[Array, ""]:
    """Mean multi-label loss over the entries whose label is known; NaN is an unknown label.

    Args:
      logits: one per class.
      labels: 0, 1 or NaN.
      mask: False excludes a row.
      pos_weight: factor on the positives of each class, as torch's BCEWithLogitsLoss has it.
    """
    labels, mask = jnp.asarray(labels), jnp.asarray(mask)
    known = mask[:, None] & ~jnp.isnan(labels)
    weight = 1.0 if pos_weight is None else jnp.asarray(pos_weight)
    labels = jnp.where(known, labels, 0)
    loss = weight * labels * jax.nn.softplus(-logits) + (1 - labels) * jax.nn.softplus(logits)
    return jnp.where(known, loss, 0).sum() / jnp.maximum(known.sum(), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _local_sum(zimg, ztxt, t, b, ids, chunk_size, axis_name):
    """Returns the summed loss of this device's images with the texts of all devices."""
    img, txt = _tiles(zimg, ids, chunk_size), _tiles(ztxt, ids, chunk_size)
    sums, _ = _ring(img, txt, _Sums(jnp.zeros_like(img.z[..., 0])), None, t, b, axis_name)
    return _total(sums.loss)


def _local_sum_fwd(zimg, ztxt, t, b, ids, chunk_size, axis_name):
    img, txt = _tiles(zimg, ids, chunk_size), _tiles(ztxt, ids, chunk_size)
    zero, zeros = jnp.zeros_like(img.z[..., 0]), jnp.zeros_like(img.z)
    sums, gtxt = _ring(img, txt, _Sums(zero, zeros, zero, zero), zeros, t, b, axis_name)
    gimg, gtxt = (g.reshape(-1, g.shape[-1])[: len(zimg)] for g in (sums.z, gtxt))
    return _total(sums.loss), (gimg, gtxt, _total(sums.t), _total(sums.b))


def _local_sum_bwd(chunk_size, axis_name, gradients, cotangent):
    return *(cotangent * g for g in gradients), None


_local_sum.defvjp(_local_sum_fwd, _local_sum_bwd)


def _ring(img, txt, sums, gtxt, t, b, axis_name):
    """Adds the pairs of `img` with the texts of every device; `gtxt` returns to its own device."""
    if axis_name is None:
        return _all_tiles(img, txt, sums, gtxt, t, b)
    size = jax.lax.axis_size(axis_name)

    def hop(state, _):
        txt, sums, gtxt = state
        sums, gtxt = _all_tiles(img, txt, sums, gtxt, t, b)
        to_next = [(i, (i + 1) % size) for i in range(size)]
        txt, gtxt = jax.lax.ppermute((txt, gtxt), axis_name, to_next)
        return (txt, sums, gtxt), None

    (_, sums, gtxt), _ = jax.lax.scan(hop, (txt, sums, gtxt), None, length=size)
    return sums, gtxt


def _all_tiles(img, txt, sums, gtxt, t, b):
    """Adds the pairs of `img` and `txt` to `sums` and `gtxt`, one tile after the other."""
    with_gradients = gtxt is not None

    def image_tile(gtxt, xs):
        x, sums = xs

        def text_tile(sums, ys):
            y, gy = ys
            return jax.tree.map(jnp.add, (sums, gy), _tile(x, y, t, b, with_gradients))

        sums, gtxt = jax.lax.scan(text_tile, sums, (txt, gtxt))
        return gtxt, sums

    gtxt, sums = jax.lax.scan(image_tile, gtxt, (img, sums))
    return sums, gtxt


def _tile(x, y, t, b, with_gradients):
    """Returns the sums of one tile of pairs and the gradient of its texts."""
    matmul = functools.partial(jnp.matmul, precision="highest")
    scaled = jnp.exp(t) * matmul(x.z, y.z.T)
    valid = (x.ids != _MASKED)[:, None] & (y.ids != _MASKED)[None]
    sign = jnp.where(x.ids[:, None] == y.ids[None], 1, -1).astype(scaled.dtype)
    against = -sign * (scaled + b)
    loss = jnp.where(valid, jax.nn.softplus(against), 0).sum(1)
    if not with_gradients:
        return _Sums(loss), None
    g = jnp.where(valid, -sign * jax.nn.sigmoid(against), 0)
    gdot = jnp.exp(t) * g
    sums = _Sums(loss, matmul(gdot, y.z), (g * scaled).sum(1), g.sum(1))
    return sums, matmul(gdot.T, x.z)


@jax.jit  # One compilation instead of one for each halving, when the loss is called eagerly.
def _total(x):
    """Sum by halves; XLA on CPU adds one by one, 3e-6 wrong for 4,000 nearly equal losses."""
    x = jnp.pad(x.reshape(-1), (0, (1 << (x.size - 1).bit_length()) - x.size))
    while x.size > 1:
        x = jnp.add(*jnp.split(x, 2))
    return x[0]


def _tiles(z, ids, chunk_size):
    """Splits rows into the fewest tiles of at most `chunk_size`, all of one size to pad little."""
    n = len(z)
    tiles = -(-n // (chunk_size or n))
    rows = -(-n // tiles)
    pad = tiles * rows - n
    z = jnp.pad(z, ((0, pad), (0, 0)))
    ids = jnp.pad(ids, (0, pad), constant_values=_MASKED)
    return _Tiles(z.reshape(tiles, rows, -1), ids.reshape(tiles, rows))


def _pair_ids(n, positives, mask, axis_name):
    """Returns ids [n] that are equal exactly for positive pairs, over all devices."""
    row = jnp.arange(n, dtype=jnp.int32)
    if axis_name is not None:
        row += n * jax.lax.axis_index(axis_name)
    ids = -1 - row
    if positives is not None:
        positives = jnp.asarray(positives)
        ids = jnp.where(positives >= 0, positives, ids)
    return ids if mask is None else jnp.where(jnp.asarray(mask), ids, _MASKED)


def _vary_alike(axis_name, *arrays):
    """Casts all arrays to vary over the same manual mesh axes, as cotangents of a vjp must.

    Without it `t` and `b`, replicated, would meet gradients that vary over `axis_name`. With
    `check_vma=False` no array varies as far as its type says, and pcast does nothing.
    """
    named = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset(named).union(*varying) - axes) for axes in varying]
    return [jax.lax.pcast(x, m, to="varying") for x, m in zip(arrays, missing, strict=True)]


def _check_embeddings(zimg, ztxt):
    if jnp.ndim(zimg) != 2 or jnp.shape(zimg) != jnp.shape(ztxt) or not jnp.shape(zimg)[0]:
        raise ValueError(
            f"zimg and ztxt have shapes {jnp.shape(zimg)} and {jnp.shape(ztxt)}; expected the same"
            " (n, d) with n >= 1. Pass one text embedding per image; mask the rows without one."
        )
    for name, z in (("zimg", zimg), ("ztxt", ztxt)):
        if not jnp.issubdtype(jnp.result_type(z), jnp.floating):
            raise ValueError(
                f"{name} is {jnp.result_type(z)}; expected floating-point embeddings."
                " Pass what the towers return, not images or tokens."
            )


def _check_scalars(t, b, chunk_size):
    for name, x in (("t", t), ("b", b)):
        if jnp.shape(x) not in ((), (1,)):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}; expected () or (1,). Pass one value for all."
            )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"chunk_size is {chunk_size!r}; expected a positive int, or None for one n x n tile."
        )


def _check_rows(n, positives, mask):
    for name, x, kind, what in (
        ("positives", positives, jnp.signedinteger, "int32 ids"),
        ("mask", mask, jnp.bool_, "bool"),
    ):
        if x is None:
            continue
        dtype = jnp.result_type(x)
        if jnp.shape(x) != (n,) or not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"{name} is {dtype} {jnp.shape(x)}; expected {what} of shape ({n},),"
                " one for each row of zimg and ztxt. Cast or reshape it."
            )
    # JAX would silently truncate 64-bit ids, which could make two of them equal.
    by_jax = positives is None or isinstance(positives, jax.Array)
    if not by_jax and (positives != np.asarray(positives).astype(jnp.result_type(positives))).any():
        raise ValueError(
            "positives has ids beyond int32; expected int32 ids. Number the groups instead, for"
            " example with np.unique(ids, return_inverse=True)[1]."
        )
