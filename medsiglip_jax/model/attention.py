"""Back ends of attention: the same function of q, k and v, computed as suits the device.

Two blocks of the image tower (16 images of 1,024 tokens, 16 heads of 72, bfloat16), compiled for a
v5e by libtpu 0.0.52 (`python scripts/bench.py attention`, 2026-11-22); others are similar:

| | temporaries, MiB: xla | splash | moved, GB: xla | splash |
|---|---|---|---|---|
| forward | 1,119 | 308 | 4.6 | 1.9 |
| with gradients, remat none | 5,365 | 2,142 | 24.2 | 9.8 |
| remat dots | 2,846 | 1,577 | 18.0 | 8.2 |
| remat block | 1,923 | 663 | 19.8 | 7.1 |

Pallas's older flash attention, at remat block: 1,476 MiB and 9.8 GB, padded to heads of 128 1,293
and 11.3; XLA's own padded 1,979 and 19.9; splash padded 715 and 9.3.

All blocks of the image tower, 128 images, bfloat16, forward, compiled for GPUs by jax 0.10.2 and
cuDNN 9.28 on 2026-11-29 (`bench.py attention --topology h100 --images 128 --depth 27`): 12.28 GiB
of temporaries with xla on an H100 and an A100, 1.37 and 1.35 with cudnn. Attention alone over 128
texts of 64 tokens: forward 82 and 0 MiB, with gradients 117 and 37. float32 stays
xla on GPUs: blocked with blocks of 512 MiB needs 1.56 instead of 4.14 GiB for 32 images, and 8.15
instead of 11.07 with gradients at remat block, but its speed on a GPU is not known.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from medsiglip_jax.model import devices
from medsiglip_jax.model.config import TextConfig, VisionConfig


def _xla(q, k, v, wide=False):
    """Plain einsum attention; logits and softmax in float32 whatever the input dtype. `wide` asks
    for float32 of the second product, too (`devices.wide_products`)."""
    mixed = jnp.float32 if wide else None
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)  # stores only the logits for the backward pass
    def mix(logits, v):
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=mixed)
        return x.astype(v.dtype)

    return mix(logits, v)


def _cudnn(q, k, v):
    """cuDNN's fused kernel, for NVIDIA GPUs: no logits in memory; backward recomputes them.

    Training takes an even number of tokens only: an odd one gets a token that nothing attends to.
    """
    n, lengths = q.shape[1], None
    if n % 2:
        lengths = jnp.full(len(q), n, jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    x = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, implementation="cudnn", query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
    )  # fmt: skip
    return x[:, :n]


# One head of 1,024 tokens has 4 MiB of logits. On a 2-core Sapphire Rapids two heads at a time were
# fastest; 1 and 4 came within 10 %, and 16 took 1.5 times as long.
_BLOCK_BYTES = 8 << 20


def _blocked(q, k, v):
    """For CPUs: only as many heads at a time as have 8 MiB of logits.

    With "xla" the logits of all heads are allocated at once, and again for each step of the
    softmax: 690 MB of fresh pages per encoder block for four images, against 170 MB here. The
    second product also gives the sum of the weights, by a column of ones, and the division comes
    after it, on [tokens, size] instead of [tokens, tokens]. The backward pass recomputes the logits
    instead of storing them, and takes half the time of "xla", as the forward pass does.
    """
    b, n, h, d = q.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def head(qkv):
        q, k, v = qkv
        logits = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        weights = jnp.exp(logits - top)
        x = jnp.einsum("qk,kd->qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (x[:, :d] / x[:, d:]).astype(v.dtype)

    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    heads = [x.swapaxes(1, 2).reshape(b * h, n, -1) for x in (q, k, v)]
    at_once = min(b * h, max(1, _BLOCK_BYTES // (4 * n * n)))
    x = jax.lax.map(head, heads, batch_size=at_once)
    return x.reshape(b, h, n, d).swapaxes(1, 2)


# Block sizes to choose from, in tokens; the kernel takes multiples of 128.
_QUERIES, _KEYS = (512, 384, 256, 128), (1024, 768, 512, 384, 256, 128)


def _splash(q, k, v, interpret=False):
    """For TPUs: jax's Pallas kernel, whose logits never leave the chip; backward recomputes
    them.

    One backward kernel computes the gradients of q, k and v together; two kernels, or smaller
    blocks, move 5 % more bytes. It has been compiled for every TPU generation and run in Pallas's
    interpreter, but not on a TPU yet.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    n, heads = q.shape[1], q.shape[2]
    queries, keys = (next(size for size in sizes if n % size == 0) for sizes in (_QUERIES, _KEYS))
    blocks = splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=keys, block_q_dkv=queries,
        block_kv_dkv=keys, block_kv_dkv_compute=keys, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((n, n))] * heads),
        block_sizes=blocks,
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)  # pyright: ignore


# Each takes q (already divided by sqrt(head size)), k, v of shape [batch, tokens, heads, size].
ATTENTION: dict[str, Callable] = dict(xla=_xla, blocked=_blocked, splash=_splash, cudnn=_cudnn)
# Fraction of the forward pass that the backward pass recomputes: "blocked" both products, the
# others the one of the logits.
RECOMPUTES = {"blocked": 1.0, "splash": 0.5, "cudnn": 0.5}


def default(device: Any, count: int = 1) -> str:
    """The default back end on one or several devices of the kind of `device`.

    For several CPU devices in one process it is "xla": beside the loops of "blocked", collectives
    of jaxlib 0.10.2 sometimes wait for each other until jaxlib aborts (one run in three on 8 forced
    devices and 2 cores).
    """
    if device.platform == "cpu":
        return "blocked" if count == 1 else "xla"
    return next((name for name in ("splash", "cudnn") if not _lacks(name, device)), "xla")


def check(name: str, device: Any, dtype: str, image_tower: VisionConfig | None = None) -> None:
    """Raises a ValueError if a back end that was asked for cannot be used.

    Texts of 64 tokens are too short for "splash", which leaves them to "xla".
    """
    problems = [_lacks(name, device)]
    if name in ("splash", "cudnn") and jnp.dtype(dtype).itemsize != 2:
        problems.append(f"it computes in half precision, and dtype is {dtype}")
    elif image_tower and used_in(image_tower, name, dtype) != name:
        wants = {"splash": "a multiple of 128 tokens", "cudnn": "heads of 8, 16, … or 128"}
        tokens, size = image_tower.num_tokens, image_tower.head_size
        problems.append(f"it needs {wants[name]}, these are {tokens} tokens, heads of {size}")
    if problems := [problem for problem in problems if problem]:
        raise ValueError(
            f"attention back end {name!r} cannot be used: {'; '.join(problems)}. Leave attention "
            "out for the fastest that can be, or give 'xla'"
        )


def _lacks(name: str, device: Any) -> str:
    """What a back end misses on a device; "" if it can be used there."""
    if name == "splash" and device.platform != "tpu":
        return f"it needs a TPU, this is {device.device_kind}"
    if name == "cudnn" and (devices.capability(device) or (0, 0)) < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0, this is {_described(device)}"
    return ""


def _described(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    return device.device_kind + (f" of {capability}" if capability else "")


def used(name: str, dtype: str, tokens: int, head_size: int) -> str:
    """The back end that is really used in a tower when `name` is asked for.

    The kernels of accelerators multiply in half precision only. "splash" needs a multiple of 128
    tokens, "cudnn" a multiple of 8, up to 128, of numbers a head. Anything else is left to "xla".
    """
    half = jnp.dtype(dtype).itemsize == 2
    fits = {"splash": tokens % 128 == 0, "cudnn": head_size % 8 == 0 and head_size <= 128}
    return name if name not in fits or (half and fits[name]) else "xla"


def used_in(tower: VisionConfig | TextConfig, name: str, dtype: str) -> str:
    """`used` of the blocks of a tower."""
    return used(name, dtype, tower.num_tokens, tower.head_size)


def attend(
    name: str,
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    rows: NamedSharding | None = None,
    wide: bool = False,
) -> Float[Array, "b q h d"]:
    """Softmax attention without a mask.

    Args:
        name: of a back end.
        q: already divided by sqrt(head size).
        k: as many tokens as q, or another number, as in the pooling head, for which "xla" is used:
            its logits are few (8 MiB for 128 images of 1,024 tokens; "cudnn" would save 11 MiB).
        v: as k.
        rows: sharding of the batch over a mesh. The compiler splits "xla" by itself; with the other
            back ends each device computes its own rows.
        wide: whether products give float32, of all element types, where "xla" is used; those of
            "blocked" always do.
    """
    alike = q.shape == k.shape
    name = used(name, q.dtype.name, q.shape[1], q.shape[3]) if alike else "xla"
    compute = partial(_xla, wide=wide) if name == "xla" else ATTENTION[name]
    if rows is not None and name != "xla":
        specs = (rows.spec,) * 3
        compute = jax.shard_map(
            compute, mesh=rows.mesh, in_specs=specs, out_specs=rows.spec, check_vma=False
        )
    return compute(q, k, v)


def mean_weights(q: Float[Array, "b q h d"], k: Float[Array, "b k h d"]) -> Float[Array, "b q k"]:
    """The weights of softmax attention, float32, averaged over the heads; `q` is as for `attend`.

    One head at a time: those of all heads together would take 64 MB for 1,024 tokens.
    """

    def head(qk):
        logits = jnp.einsum("bqd,bkd->bqk", *qk, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits, axis=-1)

    total, _ = jax.lax.scan(
        lambda total, qk: (total + head(qk), None),
        jnp.zeros((q.shape[0], q.shape[1], k.shape[1]), jnp.float32),
        (jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)),
    )
    return total / q.shape[2]
