"""Which Hugging Face SigLIP v1 tensor holds which parameter, and in what axis order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights.copies import copy


@dataclass(frozen=True)
class Entry:
    """One (part of a) parameter and the tensor it comes from.

    The tensor, or its rows `third` of three where HF fuses q, k and v, is reshaped to the
    un-permuted target shape and transposed by `perm`.
    """

    path: str
    layer: int | None
    name: str
    perm: tuple[int, ...] | None = None
    third: int | None = None

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one layer of a parameter of this shape, or of all of one without layers."""
        return shape if self.layer is None else shape[1:]

    def unpermuted(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The target shape in the tensor's own axis order."""
        if self.perm is None:
            return shape
        return tuple(shape[self.perm.index(axis)] for axis in range(len(shape)))

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        tensor = tensor.reshape(self.unpermuted(shape))
        return tensor if self.perm is None else tensor.transpose(self.perm)

    def to_huggingface(self, leaf: np.ndarray) -> np.ndarray:
        if self.perm is None:
            return leaf
        out = np.empty(self.unpermuted(leaf.shape), leaf.dtype)
        copy(out.transpose(self.perm), leaf)
        return out


# Permutations from the tensor's axes (heads split out) to the parameter's.
_LINEAR = (1, 0)  # [out, in] -> [in, out]
_HEADS_IN = (2, 0, 1)  # [heads, size, in] -> [in, heads, size]
_HEADS_OUT = (1, 2, 0)  # [out, heads, size] -> [heads, size, out]
_CONV = (2, 3, 1, 0)  # OIHW -> HWIO

_NORM = (("weight", "scale", None), ("bias", "bias", None))
_DENSE = (("weight", "kernel", _LINEAR), ("bias", "bias", None))
_BLOCK = {
    "layer_norm1": ("LayerNorm_0", _NORM),
    "layer_norm2": ("LayerNorm_1", _NORM),
    "mlp.fc1": ("MlpBlock_0/Dense_0", _DENSE),
    "mlp.fc2": ("MlpBlock_0/Dense_1", _DENSE),
}
_QKV = (("weight", "kernel", _HEADS_IN), ("bias", "bias", None))
_OUT = (("weight", "kernel", _HEADS_OUT), ("bias", "bias", None))
MHA = "MultiHeadDotProductAttention_0"


def _pairs(name: str, path: str, rules, layer: int | None = None) -> Iterator[Entry]:
    for hf, ours, perm in rules:
        yield Entry(f"{path}/{ours}", layer, f"{name}.{hf}", perm)


def _encoder(name: str, norm: str, path: str, depth: int) -> Iterator[Entry]:
    for i in range(depth):
        layer, block = f"{name}.encoder.layers.{i}", f"{path}/encoderblock"
        for hf, (ours, rules) in _BLOCK.items():
            yield from _pairs(f"{layer}.{hf}", f"{block}/{ours}", rules, i)
        for hf, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            yield from _pairs(f"{layer}.self_attn.{hf}", f"{block}/{MHA}/{ours}", _QKV, i)
        yield from _pairs(f"{layer}.self_attn.out_proj", f"{block}/{MHA}/out", _OUT, i)
    yield from _pairs(f"{name}.{norm}", f"{path}/encoder_norm", _NORM)


def _map_head(name: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{path}/probe", None, f"{name}.probe")
    for third, part in enumerate(("query", "key", "value")):
        mha, attention = f"{path}/{MHA}/{part}", f"{name}.attention"
        yield Entry(f"{mha}/kernel", None, f"{attention}.in_proj_weight", _HEADS_IN, third)
        yield Entry(f"{mha}/bias", None, f"{attention}.in_proj_bias", None, third)
    yield from _pairs(f"{name}.attention.out_proj", f"{path}/{MHA}/out", _OUT)
    yield from _pairs(f"{name}.layernorm", f"{path}/LayerNorm_0", _NORM)
    yield from _pairs(f"{name}.mlp.fc1", f"{path}/MlpBlock_0/Dense_0", _DENSE)
    yield from _pairs(f"{name}.mlp.fc2", f"{path}/MlpBlock_0/Dense_1", _DENSE)


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every parameter of the architecture with the HF tensor it comes from."""
    if config.vision:
        name = "vision_model"
        embedding = f"{name}.embeddings.patch_embedding"
        yield Entry("img/embedding/kernel", None, f"{embedding}.weight", _CONV)
        yield Entry("img/embedding/bias", None, f"{embedding}.bias")
        yield Entry("img/pos_embedding", None, f"{name}.embeddings.position_embedding.weight")
        yield from _encoder(name, "post_layernorm", "img/Transformer", config.vision.depth)
        if config.vision.pool == "map":
            yield from _map_head(f"{name}.head", "img/MAPHead_0")
    if config.text:
        name = "text_model"
        yield Entry("txt/Embed_0/embedding", None, f"{name}.embeddings.token_embedding.weight")
        yield Entry("txt/pos_embedding", None, f"{name}.embeddings.position_embedding.weight")
        yield from _encoder(name, "final_layer_norm", "txt/Encoder_0", config.text.depth)
        yield from _pairs(f"{name}.head", "txt/head", _DENSE)
    if config.classifier:
        yield from _pairs("classifier", "classifier", _DENSE)
    if config.vision and config.text:
        yield Entry("t", None, "logit_scale")
        yield Entry("b", None, "logit_bias")


def tensor_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape HF gives the tensor behind a parameter (one layer of it) of this shape."""
    shape = entry.unpermuted(shape)
    if entry.perm == _HEADS_IN or (entry.perm is None and entry.path.endswith(_HEAD_BIASES)):
        shape = (shape[0] * shape[1], *shape[2:])
    elif entry.perm == _HEADS_OUT:
        shape = (shape[0], shape[1] * shape[2])
    elif entry.path.endswith("pos_embedding"):
        shape = shape[1:]
    return (3 * shape[0], *shape[1:]) if entry.third is not None else shape


_HEAD_BIASES = ("query/bias", "key/bias", "value/bias")
