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
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float


def _xla(q, k, v):
    """Plain einsum attention; logits and softmax in float32 whatever the input dtype."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)  # stores only the logits for the backward pass
    def mix(logits, v):
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return mix(logits, v)


def _cudnn(q, k, v):
    """cuDNN's fused kernel: for NVIDIA GPUs, half precision, head sizes divisible by 8."""
    problems = []
    if jax.default_backend() != "gpu":
        problems.append(f"it needs an NVIDIA GPU, this is {jax.default_backend()}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"it computes in bfloat16 or float16, the model in {q.dtype}")
    if q.shape[-1] % 8:
        problems.append(f"head size {q.shape[-1]} is not a multiple of 8")
    if problems:
        raise ValueError(
            f"attention back end 'cudnn' cannot be used: {'; '.join(problems)}. "
            "Use attention='xla', or a dtype and device that it supports"
        )
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")


# One head of 1,024 tokens has 4 MiB of logits. On a 2-core Sapphire Rapids two heads at a time were
# fastest; 1 and 4 came within 10 %, and 16 took 1.5 times as long.
_BLOCK_BYTES = 8 << 20


def _blocked(q, k, v):
    """For CPUs: only as many heads at a time as have 8 MiB of logits.

    With "xla" the logits of all heads are allocated at once, and again for each step of the
    softmax: 690 MB of fresh pages per encoder block for four images, against 170 MB here. The
    division by the sum comes after the second product, on [tokens, size] instead of
    [tokens, tokens]. The backward pass recomputes the logits instead of storing them, and takes
    half the time of "xla", as the forward pass does.
    """
    b, n, h, d = q.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def head(qkv):
        q, k, v = qkv
        logits = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        weights = jnp.exp(logits - top)
        x = jnp.einsum("qk,kd->qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (x / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    heads = [x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v)]
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
# Fraction of the forward pass that the backward pass recomputes: "blocked" both products, "splash"
# the one of the logits.
RECOMPUTES = {"blocked": 1.0, "splash": 0.5}


def default(platform: str, devices: int = 1) -> str:
    """The default back end on "cpu", "tpu" or "gpu".

    For several CPU devices in one process it is "xla": beside the loops of "blocked", collectives
    of jaxlib 0.10.2 sometimes wait for each other until jaxlib aborts (one run in three on 8 forced
    devices and 2 cores).
    """
    if platform == "cpu":
        return "blocked" if devices == 1 else "xla"
    return "splash" if platform == "tpu" else "xla"


def used(name: str, tokens: int, dtype: str) -> str:
    """The back end that is really used when `name` is asked for.

    "splash" always multiplies in bfloat16 and needs a multiple of 128 tokens; anything else, such
    as texts, is left to "xla".
    """
    fits = jnp.dtype(dtype).itemsize == 2 and tokens % 128 == 0
    return name if name != "splash" or fits else "xla"


def attend(
    name: str,
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    rows: NamedSharding | None = None,
) -> Float[Array, "b q h d"]:
    """Softmax attention without a mask.

    Args:
        name: of a back end.
        q: already divided by sqrt(head size).
        k: as many tokens as q; only "xla" takes another number.
        v: as k.
        rows: sharding of the batch over a mesh. The compiler splits "xla" by itself; with the other
            back ends each device computes its own rows.
    """
    name = used(name, q.shape[1], q.dtype.name)
    compute = ATTENTION[name]
    if rows is not None and name != "xla":
        specs = (rows.spec,) * 3
        compute = jax.shard_map(
            compute, mesh=rows.mesh, in_specs=specs, out_specs=rows.spec, check_vma=False
        )
    return compute(q, k, v)
