"""The two towers in Flax Linen, as pure functions of a plain parameter dict.

The only file that imports flax. Parameter names and shapes are big_vision's
(models/vit.py, models/proj/image_text/{text_transformer,two_towers}.py at commit 0127fb6), with
the blocks of a tower stacked on axis 0 under "encoderblock" and run under `scan`. Initialisers only
give shapes here: `weights.random` draws the values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from medsiglip_jax.model import bits
from medsiglip_jax.model.attention import ATTENTION, attend, mean_weights
from medsiglip_jax.model.config import ModelConfig, PixelConfig, TextConfig, VisionConfig

Params = dict[str, Any]
Tower = VisionConfig | TextConfig
Images = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
_ZEROS = nn.initializers.zeros
_ATTENTION = "attention"  # the collection of `attention_weights`


@dataclass(frozen=True)
class Compute:
    """How the arithmetic is done; hashable, so jit can take it as a static argument.

    Attributes:
        dtype: of activations; parameters are cast to it where they are used.
        precision: matmul precision by jax's names; "highest" is true float32 on every device
            (TF32 and bf16 passes are the defaults on GPU and TPU).
        attention: back end, one of `attention.ATTENTION`.
        remat: what a block recomputes in the backward pass instead of storing it, one of `REMAT`.
        rows: sharding of the rows of activations over a mesh. Without it the compiler, where
            parameters are split too, splits the width of the activations instead and has every
            device work on the whole batch. Most attention back ends need it as well.
        wide: whether products give float32, which is then rounded to `dtype`; faster on some CPUs,
            see `devices.wide_products`.
        flat: whether gradients of products are taken as those of matrices; faster on CPUs, see
            `devices.flat_gradients`. For training, since it rules out forward-mode differentiation.
        one_by_one: whether a block takes one row of activations after another, in inference on
            CPUs: they stay in the cache, and a block's weights, which the loop over the blocks
            copies from their stack, are copied once for all rows.
    """

    dtype: str = "float32"
    precision: str | None = "highest"
    attention: str = "xla"
    remat: str = "none"
    rows: NamedSharding | None = None
    wide: bool = False
    flat: bool = False
    one_by_one: bool = False

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(
                f"attention back end {self.attention!r} is unknown; expected one of "
                f"{', '.join(ATTENTION)}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is unknown; expected one of {', '.join(REMAT)}")


# What `jax.checkpoint` stores of a block. For a So400m block, for one 448 px image in float32 with
# "xla" attention: "none" 140 MB, "dots" 41 MB, "block" the 4.7 MB of its input.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


# --------------------------------------------------------------------------------- modules


def _float32_dot(x: Array, y: Array, dimensions: Any, precision: Any = None, **_: Any) -> Array:
    """`lax.dot_general` in float32, and not rounded."""
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _wide_dot(x: Array, y: Array, dimensions: Any, precision: Any = None, **_: Any) -> Array:
    """The same, rounded to the element type of `x`."""
    return _float32_dot(x, y, dimensions, precision).astype(x.dtype)


def _plain_dot(compute: Compute, rounded: bool = True) -> Callable:
    """`lax.dot_general`, in float32 where products are wide."""
    if not compute.wide:
        return jax.lax.dot_general
    return _wide_dot if rounded else _float32_dot


def _dot(compute: Compute, rounded: bool = True) -> Callable:
    """`lax.dot_general` of the last axes of activations with the first axes of a kernel; `rounded`
    is for wide products only."""
    return partial(_flat_dot, compute, rounded) if compute.flat else _plain_dot(compute, rounded)


def _flat_dot(
    compute: Compute, rounded: bool, x: Array, kernel: Array, dimensions: Any, **_: Any
) -> Array:
    return _product(compute, rounded, len(dimensions[0][0]), x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(compute: Compute, rounded: bool, axes: int, x: Array, kernel: Array) -> Array:
    contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    dot = _plain_dot(compute, rounded)
    return dot(x, kernel, (contracted, ((), ())), precision=compute.precision)


def _product_forward(compute: Compute, rounded: bool, axes: int, x: Array, kernel: Array):
    # Stores `x` as it is: of one flattened here, each layer that takes it would store its own.
    return _product(compute, rounded, axes, x, kernel), (x, kernel)


def _product_backward(
    compute: Compute, rounded: bool, axes: int, stored: tuple[Array, Array], gradient: Array
):
    x, kernel = stored
    weights = kernel.reshape(math.prod(kernel.shape[:axes]), -1)
    rows = x.reshape(-1, len(weights))
    gradient = gradient.reshape(-1, weights.shape[1]).astype(x.dtype)  # float32 if not rounded
    dot = partial(_plain_dot(compute), precision=compute.precision)
    of_x = dot(gradient, weights, (((1,), (1,)), ((), ())))
    of_kernel = dot(rows, gradient, (((0,), (0,)), ((), ())))
    return of_x.reshape(x.shape), of_kernel.reshape(kernel.shape)


_product.defvjp(_product_forward, _product_backward)


def _dense(compute: Compute, *, general: bool = False, rounded: bool = True) -> Callable:
    """nn.Dense, or nn.DenseGeneral, that computes so; `rounded` is for wide products only."""
    dense = nn.DenseGeneral if general else nn.Dense
    return partial(dense, dtype=compute.dtype, dot_general=_dot(compute, rounded))


def _adapt(module: nn.Module, name: str, x: Array, y: Array) -> Array:
    """Adds scale * x @ a @ b to a layer's output, if there is "{name}_lora" (`train/lora.py`).

    Two thin products instead of one with `kernel + a @ b`, whose gradient would be as large as the
    kernel and cost as much as training it.
    """
    if not module.has_variable("params", f"{name}_lora"):
        return y
    adapter = module.get_variable("params", f"{name}_lora")
    a, b, scale = (adapter[key].astype(y.dtype) for key in ("a", "b", "scale"))
    return y + (scale * (x.reshape(*y.shape[:2], -1) @ a) @ b).reshape(y.shape)


class MultiHeadDotProductAttention(nn.Module):
    """Unmasked multi-head attention: SigLIP attends to padding too."""

    num_heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self, x_q: Float[Array, "b q d"], x_kv: Float[Array, "b k d"]
    ) -> Float[Array, "b q d"]:
        width = x_q.shape[-1]
        dense = _dense(self.compute, general=True)
        heads = (self.num_heads, width // self.num_heads)
        q = _adapt(self, "query", x_q, dense(heads, name="query")(x_q))
        k = _adapt(self, "key", x_kv, dense(heads, name="key")(x_kv))
        v = _adapt(self, "value", x_kv, dense(heads, name="value")(x_kv))
        q = q * heads[1] ** -0.5
        if self.is_mutable_collection(_ATTENTION):  # only for `attention_weights`
            self.sow(_ATTENTION, "weights", mean_weights(q, k))
        x = attend(self.compute.attention, q, k, v, self.compute.rows, self.compute.wide)
        return _adapt(self, "out", x, dense(width, axis=(-2, -1), name="out")(x))


@partial(jax.checkpoint, prevent_cse=False)
def _gelu(x: Array) -> Array:
    """The tanh form, as HF's gelu_pytorch_tanh. Backward recomputes the tanh: stored, it and
    the products around it would be five more arrays of the size of the hidden layer."""
    return nn.gelu(x, approximate=True)


class LayerNorm(nn.Module):
    """Over the last axis, eps 1e-6, statistics in float32; backward stores only its input."""

    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale, bias = (self.param(name, _ZEROS, (x.shape[-1],)) for name in ("scale", "bias"))
        return _layer_norm(x, scale, bias).astype(self.compute.dtype)


@partial(jax.checkpoint, prevent_cse=False)
def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + bias


class MlpBlock(nn.Module):
    mlp_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        dense, width = _dense(self.compute), x.shape[-1]
        # A CPU computes bfloat16's GELU in float32 anyhow, and rounds after each of its steps.
        hidden = _dense(self.compute, rounded=False)(self.mlp_dim, name="Dense_0")(x)
        x = _gelu(_adapt(self, "Dense_0", x, hidden)).astype(self.compute.dtype)
        return _adapt(self, "Dense_1", x, dense(width, name="Dense_1")(x))


class EncoderBlock(nn.Module):
    """Pre-LN block; the (carry, output) signature is the one `nn.scan` wants."""

    config: Tower
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], None]:
        if self.compute.rows is not None:
            x = jax.lax.with_sharding_constraint(x, self.compute.rows)
        y = LayerNorm(self.compute)(x)
        x = x + MultiHeadDotProductAttention(self.config.num_heads, self.compute)(y, y)
        y = LayerNorm(self.compute)(x)
        return x + MlpBlock(self.config.mlp_dim, self.compute)(y), None


class Encoder(nn.Module):
    config: Tower
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        block, policy = EncoderBlock, REMAT[self.compute.remat]
        if policy is not None:
            block = nn.remat(EncoderBlock, prevent_cse=False, policy=policy)
        # Blocks that `train/freeze.py` keeps apart come first, in a scan of their own: no gradient
        # has to pass through it.
        blocks = self.variables.get("params", {}).get("frozen_blocks")
        frozen = len(jax.tree.leaves(blocks)[0]) if blocks else 0
        stacked: Any = {"params": 0, _ATTENTION: 0}
        scan = partial(nn.scan, block, variable_axes=stacked, split_rngs={"params": True})
        lengths = {"frozen_blocks": frozen, "encoderblock": self.config.depth - frozen}
        for name, length in lengths.items():
            blocks = self.variables.get("params", {}).get(name, {})
            if length and (self.compute.one_by_one or bits.are_in(blocks)):
                x = self._encode(blocks, x)
            elif length:
                x, _ = scan(length=length)(self.config, self.compute, name=name)(x)
        return LayerNorm(self.compute, name="encoder_norm")(x)

    def _encode(self, blocks: Params, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The loop of inference on one CPU."""
        block = EncoderBlock(self.config, self.compute, parent=None)

        def each(x: Array, params: Params) -> tuple[Array, None]:
            def encode(x: Array) -> Array:
                return cast(Any, block.apply({"params": bits.back(params)}, x))[0]

            if not self.compute.one_by_one:
                return encode(x), None
            return jax.lax.map(lambda row: encode(row[None])[0], x), None

        return jax.lax.scan(each, x, blocks)[0]


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe, no residual from it, no LN on its inputs."""

    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        n, _, width = x.shape
        probe = jnp.tile(self.param("probe", _ZEROS, (1, 1, width)).astype(x.dtype), (n, 1, 1))
        x = MultiHeadDotProductAttention(self.config.num_heads, self.compute)(probe, x)
        y = LayerNorm(self.compute)(x)
        return (x + MlpBlock(self.config.mlp_dim, self.compute)(y))[:, 0]


class PatchEmbedding(nn.Module):
    """The patch convolution, written as one matmul; the kernel keeps its [p, p, 3, d] shape."""

    patch_size: int
    width: int
    pixels: PixelConfig
    compute: Compute

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "b n d"]:
        p = self.patch_size
        kernel = self.param("kernel", _ZEROS, (p, p, 3, self.width))
        bias = self.param("bias", _ZEROS, (self.width,))
        return _embed_patches(images, kernel, bias, self.pixels, self.compute)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _embed_patches(
    images: Array, kernel: Array, bias: Array, pixels: PixelConfig, compute: Compute
) -> Array:
    """Backward recomputes the patches from the images, which stay uint8 until then."""
    p, width, dtype = kernel.shape[0], kernel.shape[-1], compute.dtype
    b, h, w = images.shape[0], images.shape[1] // p, images.shape[2] // p
    x = normalize_pixels(images, pixels)[:, : h * p, : w * p].astype(dtype)
    x = x.reshape(b, h, p, w, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, p * p * 3)
    x = _dot(compute)(x, kernel.astype(dtype).reshape(-1, width), (((2,), (0,)), ((), ())))
    return x + bias.astype(dtype)


def _add_positions(module: nn.Module, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return x + module.param("pos_embedding", _ZEROS, (1, *x.shape[1:])).astype(x.dtype)


class ImageTower(nn.Module):
    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, images: Images) -> tuple[Float[Array, "b d"], Float[Array, "b n d"]]:
        """Returns the pooled embedding (not normalised) and the tokens after encoder_norm."""
        c = self.config
        patches = PatchEmbedding(c.patch_size, c.width, c.pixels, self.compute, name="embedding")
        x = patches(images)
        x = _add_positions(self, x)
        x = Encoder(c, self.compute, name="Transformer")(x)
        if c.pool == "mean":
            return x.astype(jnp.float32).mean(axis=1), x
        return MAPHead(c, self.compute, name="MAPHead_0")(x), x


class TextTower(nn.Module):
    config: TextConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b d"]:
        c = self.config
        x = nn.Embed(c.vocab_size, c.width, dtype=self.compute.dtype, name="Embed_0")(tokens)
        x = _add_positions(self, x)
        x = Encoder(c, self.compute, name="Encoder_0")(x)
        # Last position, which sticky EOS makes an </s> (big_vision ops_text.py:77-111).
        return _dense(self.compute)(c.embed_dim, name="head")(x[:, -1])


# ------------------------------------------------------------------------- pure functions


def normalize_pixels(
    images: UInt8[Array, "... 3"] | Float[Array, "... 3"], pixels: PixelConfig = PixelConfig()
) -> Float[Array, "... 3"]:
    """uint8 [0, 255] -> float32 [-1, 1] as value_range(-1, 1) does (pp/ops_general.py:32-64), or
    with the mean and deviation of `pixels`; floats pass through."""
    if images.dtype != jnp.uint8:
        return images
    x = images.astype(jnp.float32) / 255.0
    if pixels.plain:
        return x * 2.0 - 1.0
    return (x - jnp.asarray(pixels.mean)) / jnp.asarray(pixels.std)


# Called eagerly these three would be a dozen programs, which compile in 20 to 300 ms each.
@jax.jit
def normalize(z: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """z / (||z|| + 1e-8), the epsilon added to the norm (two_towers.py:60-74), in float32."""
    z = z.astype(jnp.float32)
    return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


def encode_image(
    params: Params,
    images: Images,
    config: ModelConfig,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "b d"], Float[Array, "b n d"]]:
    """Runs the image tower.

    Args:
        params: the model's tree; only "img" is used.
        images: uint8, or floats as `config.vision.pixels` has them ([-1, 1]); NHWC,
            `config.image_size` square.
        config: the architecture.
        compute: dtype, precision and back ends.

    Returns:
        The pooled embedding, not normalised, and the patch tokens after encoder_norm, both
        float32.
    """
    assert config.vision is not None
    with jax.default_matmul_precision(compute.precision):
        tower = ImageTower(config.vision, compute)
        z, tokens = cast(Any, tower.apply({"params": params["img"]}, images))
    return z.astype(jnp.float32), tokens.astype(jnp.float32)


def attention_weights(
    params: Params, images: Images, config: ModelConfig, compute: Compute = Compute()
) -> tuple[Float[Array, "l b n n"], Float[Array, "b n"]]:
    """Runs the image tower for its attention, as means over the heads.

    They take 113 MB of an image of 1,024 tokens in 27 blocks.

    Args:
        params, images, config, compute: as for `encode_image`.

    Returns:
        float32, which sum to 1 over the last axis: of each block, from the first on, the weight
        that each token (row) gives to each (column); and of the pooling head. Without a head all
        tokens have the same weight.
    """
    assert config.vision is not None
    with jax.default_matmul_precision(compute.precision):
        tower = ImageTower(config.vision, compute)
        sown = tower.apply({"params": params["img"]}, images, mutable=[_ATTENTION])[1][_ATTENTION]
    blocks = sown["Transformer"]
    names = [name for name in ("frozen_blocks", "encoderblock") if name in blocks]
    weights = [jax.tree.leaves(blocks[name])[0] for name in names]
    if config.vision.pool == "mean":
        n = config.vision.num_tokens
        return jnp.concatenate(weights), jnp.full((len(images), n), 1 / n)
    return jnp.concatenate(weights), jax.tree.leaves(sown["MAPHead_0"])[0][:, 0]


def encode_text(
    params: Params, tokens: Int[Array, "b n"], config: ModelConfig, compute: Compute = Compute()
) -> Float[Array, "b d"]:
    """Runs the text tower; float32, not normalised."""
    assert config.text is not None
    with jax.default_matmul_precision(compute.precision):
        tower = TextTower(config.text, compute)
        z = cast(Any, tower.apply({"params": params["txt"]}, tokens))
    return z.astype(jnp.float32)


@jax.jit
def similarity(
    zimg: Float[Array, "i d"],
    ztxt: Float[Array, "t d"],
    t: Float[Array, "..."],
    b: Float[Array, "..."],
) -> Float[Array, "i t"]:
    """Logits exp(t) * zimg @ ztxt.T + b of normalised embeddings; `t` is the log temperature."""
    with jax.default_matmul_precision("highest"):
        return jnp.exp(t.reshape(())) * (zimg @ ztxt.T) + b.reshape(())


@jax.jit
def class_logits(
    classifier: Params, features: Float[Array, "b d"] | Float[np.ndarray, "b d"]
) -> Float[Array, "b c"]:
    """features @ kernel + bias, float32."""
    with jax.default_matmul_precision("highest"):
        kernel, bias = (classifier[name].astype(jnp.float32) for name in ("kernel", "bias"))
        return jnp.asarray(features) @ kernel + bias


def param_shapes(config: ModelConfig, dtype: str = "float32") -> Params:
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint of this architecture must fill.

    Raises:
        ValueError: a number is larger than that of any model that could be made.
    """
    config.check_sizes()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _float32_shapes(config))


@lru_cache
def _float32_shapes(config: ModelConfig) -> Params:
    def init(key, images, tokens):
        params: Params = {}
        if config.vision:
            params["img"] = ImageTower(config.vision, Compute()).init(key, images)["params"]
        if config.text:
            params["txt"] = TextTower(config.text, Compute()).init(key, tokens)["params"]
        if config.vision and config.text:
            params["t"] = params["b"] = jnp.zeros((1,))
        if config.classifier:
            shape = (config.embed_dim, len(config.classifier.labels))
            params["classifier"] = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])}
        return params

    side = config.image_size or 1
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, config.context_length or 1), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)  # a real one would compile a program, for 0.1 s
    return jax.eval_shape(init, key, images, tokens)
