"""load, save, init, and the model object that they give and take."""

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsiglip_jax.files import places, storage
from medsiglip_jax.files.places import Given
from medsiglip_jax.model import attention as attentions
from medsiglip_jax.model import bits, devices, portable, sharding, towers, tree
from medsiglip_jax.model.config import ModelConfig, TextConfig, VisionConfig, named
from medsiglip_jax.model.processor import Processor, tokenizer_path
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.model.weights import layouts, processors, random, reading, readme
from medsiglip_jax.model.weights.checkpoint import Checkpoint, dtype_name, dtype_of
from medsiglip_jax.preprocess import tokenizer_files


class Model:
    """A model: parameters, architecture, and compiled encoders.

    It can be pickled and copied. A pickle holds the parameters as numpy arrays, the tokenizer and
    the other small files, and becomes a model on the default device of the process that reads it;
    `copy.deepcopy` shares the arrays, which cannot change, and stays on the same devices.

    Attributes:
        config: the architecture.
        params: plain nested dict of arrays, big_vision names: img/…, txt/…, t, b.
        processor: makes the encoders' inputs from files and strings.
        compute: dtype, matmul precision and attention back end in use.
        mesh: the devices the parameters lie on, or None for the default device.
        checkpoint: what was loaded, or None for other weights.
        companions: files that `save` puts beside the weights: processors, model card, licence.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        *,
        tokenizer: str | os.PathLike | bytes | Mapping[str, bytes] | None = None,
        compute: Compute = Compute(),
        mesh: jax.sharding.Mesh | None = None,
        checkpoint: Checkpoint | None = None,
        companions: Sequence[portable.Companion] = (),
        identity: str = "",
    ):
        self.config, self.params, self.compute, self.mesh = config, params, compute, mesh
        self.checkpoint, self.companions = checkpoint, tuple(companions)
        self._identity = identity
        self.processor = Processor(config, tokenizer)
        self._image, self._tokens = _image_encoders(config.vision, compute)
        self._text = _text_encoder(config.text, compute)

    def __repr__(self) -> str:
        return portable.line(self)

    def __getstate__(self) -> dict[str, Any]:
        return portable.state(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        sha256 = state.pop("sha256")
        params = jax.tree.map(jax.device_put, state.pop("params"))
        compute = portable.compute_here(state.pop("compute"), state["config"])
        self.__init__(params, compute=compute, **state)
        self.__dict__["sha256"] = sha256  # the weight files may not be on this machine

    def __copy__(self) -> "Model":
        other = object.__new__(Model)
        other.__dict__ |= self.__dict__
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        other = self.__copy__()
        copied = lambda x: x if isinstance(x, jax.Array) else copy.deepcopy(x, memo)  # noqa: E731
        other.params = jax.tree.map(copied, self.params)
        return other

    @property
    def source(self) -> str | None:
        """Where the weights were loaded from."""
        return self.checkpoint.source if self.checkpoint else None

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of the weight files (`layouts.digest`); None for weights that no file holds."""
        return layouts.digest(self.checkpoint) + self._identity if self.checkpoint else None

    @functools.cached_property
    def features(self) -> "Model":
        """The image tower as the classifier reads it: `encode_image(images, normalize=False)`
        gives the features whose `class_logits` are the scores."""
        if self.config.classifier is None or self.config.vision is None:
            raise ValueError(
                "this model has no classifier; finetune --config classification trains one"
            )
        pool = self.config.classifier.pool
        img, vision = self.params["img"], dataclasses.replace(self.config.vision, pool=pool)
        if pool == "map" and self.config.vision.pool != "map":
            raise ValueError("the classifier reads the attention-pooling head, and there is none")
        if pool == "mean":
            img = {name: part for name, part in img.items() if name != "MAPHead_0"}
        same = pool == self.config.vision.pool
        config = ModelConfig(vision, None, preparation=self.config.trained)
        return Model(
            {"img": img}, config, compute=self.compute, mesh=self.mesh,
            checkpoint=self.checkpoint, identity="" if same else f" {pool}",
        )  # fmt: skip

    def classify(self, images: Any, batch_size: int = 32) -> Float[Array, "n c"]:
        """The classifier's logits of images, float32 [n, labels], for `config.classifier.labels`;
        their sigmoids, or for one class per image their softmax, are probabilities."""
        z = self.features.encode_image(images, normalize=False, batch_size=batch_size)
        return towers.class_logits(self.params["classifier"], z)

    def encode_image(
        self, images: Any, normalize: bool = True, batch_size: int = 32
    ) -> Float[Array, "n d"]:
        """Embeds images.

        Args:
            images: uint8 [n, H, W, 3] from `processor.images`, or float32 already in [-1, 1].
            normalize: divide by the L2 norm, as similarity and retrieval want; False gives the
                raw pooled output.
            batch_size: maximum number of images per call of the compiled encoder (on a CPU often
                fewer, which is faster there).

        Returns:
            float32 [n, D]; for models without a pooling head (MedGemma, Gemma 3) the mean of the
            patch tokens.

        Raises:
            ValueError: another shape or type, or floats beyond the range that the model takes.

        Warns:
            UserWarning: floats that look like [0, 1], since none of them is negative.
        """
        images = self._check_images(images)
        z = self._run(self._image, images, batch_size, self.config.vision, self.config.embed_dim)
        return towers.normalize(z) if normalize else z

    def encode_tokens(self, images: Any, batch_size: int = 32) -> Float[Array, "n t d"]:
        """The patch tokens after encoder_norm, row by row of the grid; float32 [n, T, D]."""
        images = self._check_images(images)
        vision = self.config.vision
        assert vision is not None
        shape = (vision.num_tokens, self.config.embed_dim)
        return self._run(self._tokens, images, batch_size, vision, *shape)

    def encode_text(
        self, tokens: Any, normalize: bool = True, batch_size: int = 256
    ) -> Float[Array, "n d"]:
        """Embeds texts.

        Args:
            tokens: a string or a sequence of strings, or their token ids int32
                [n, context_length] from `processor.texts`.
            normalize: divide by the L2 norm.
            batch_size: maximum number of texts per call of the compiled encoder.

        Returns:
            float32 [n, D]; [1, D] for one string.
        """
        strings = _strings(tokens)
        tokens = tokens if strings is None else self.processor.texts(strings)
        tokens = self._check_tokens(tokens)
        z = self._run(self._text, tokens, batch_size, self.config.text, self.config.embed_dim)
        return towers.normalize(z) if normalize else z

    def similarity(self, image_embeddings: Any, text_embeddings: Any) -> Float[Array, "i t"]:
        """Logits exp(t) * cos + b, float32 [n_images, n_texts]; their sigmoid is the probability
        that image and text belong together."""
        if "t" not in self.params:
            raise ValueError("this model has no temperature: it holds only one tower")
        given = image_embeddings, text_embeddings
        zimg, ztxt = (z if isinstance(z, jax.Array) else np.asarray(z) for z in given)
        width = self.config.embed_dim
        for name, z in (("image_embeddings", zimg), ("text_embeddings", ztxt)):
            if z.ndim != 2 or z.shape[1] != width:
                raise ValueError(f"{name} has shape {z.shape}; expected [n, {width}]")
        t, b = (jnp.asarray(self.params[k], jnp.float32) for k in "tb")
        return towers.similarity(towers.normalize(zimg), towers.normalize(ztxt), t, b)

    def _check_images(self, images: Any) -> Any:
        side = self.config.image_size
        if side is None:
            raise ValueError("this model has no image tower")
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            expected = f"[n, {side}, {side}, 3] (processor.images makes it)"
            raise ValueError(f"images has shape {images.shape}; expected {expected}")
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images is {images.dtype}; expected uint8, or float32 in [-1, 1]")
        if images.size and not isinstance(images, Tracer):
            low, high = float(images.min()), float(images.max())
            darkest, brightest = self._range()
            if not (low >= darkest - 1e-3 and high <= brightest + 1e-3):  # NaN fails too
                raise ValueError(
                    f"images spans [{low:.3g}, {high:.3g}]; expected floats in [{darkest:.4g}, "
                    f"{brightest:.4g}], or uint8 (SigLIP takes x / 127.5 - 1, not ImageNet's "
                    "mean and deviation)"
                )
            if darkest < 0 <= low < high <= 1:
                warnings.warn(
                    f"images spans [{low:.3g}, {high:.3g}] and has nothing below mid-grey, which "
                    "is 0: floats in [0, 1] must become [-1, 1] first (2 * x - 1), or give uint8",
                    stacklevel=3,
                )
        return images.astype(np.float32)

    def _range(self) -> tuple[float, float]:
        """What black and white are to the image tower."""
        assert self.config.vision is not None
        pixels = self.config.vision.pixels
        ends = [(x - m) / s for x in (0, 1) for m, s in zip(pixels.mean, pixels.std, strict=True)]
        return min(ends), max(ends)

    def _check_tokens(self, tokens: Any) -> Any:
        text = self.config.text
        if text is None:
            return self.processor.tokenizer  # raises the error that says why
        tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != text.context_length:
            expected = f"[n, {text.context_length}] (processor.texts pads to it)"
            raise ValueError(f"tokens has shape {tokens.shape}; expected {expected}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens is {tokens.dtype}; expected int32")
        if tokens.size and not isinstance(tokens, Tracer):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= text.vocab_size:
                expected = f"the vocabulary is 0…{text.vocab_size - 1}"
                raise ValueError(f"tokens holds ids {low}…{high}; {expected}")
        return tokens.astype(np.int32)

    def _run(self, encode: Callable, rows: Any, batch_size: int, tower: Any, *shape: int) -> Array:
        """Applies `encode` to pieces of equal size (the last one padded), which share a program."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        n = len(rows)
        if n == 0:
            return jnp.zeros((0, *shape), jnp.float32)
        if isinstance(rows, Tracer):
            return encode(self.params, rows)
        halves = self._on_one_cpu() and self.compute.dtype == "bfloat16"
        params, pieces = bits.of_blocks(self.params) if halves else self.params, []
        for start, size in self._cuts(n, batch_size, tower):
            piece = rows[start : start + size]
            missing = size - len(piece)
            if missing:
                xp = jnp if isinstance(piece, jax.Array) else np
                piece = xp.concatenate([piece, xp.zeros((missing, *piece.shape[1:]), piece.dtype)])
            if self.mesh:
                piece = jax.device_put(piece, sharding.batch_sharding(self.mesh))
            pieces.append(encode(params, piece)[: size - missing])
        return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _cuts(self, rows: int, batch_size: int, tower: Any) -> list[tuple[int, int]]:
        """Where each piece starts, and its size: at most two sizes, of which programs are made, and
        one for whole batches, in which a row then has the same bits at every place."""
        size, end = self.piece_size(rows, batch_size, tower), 0
        together = next(k for k in range(_ONE_BY_ONE, 0, -1) if batch_size % k == 0)
        if encoding(self.compute, tower).one_by_one and rows >= together:
            end = rows - rows % together
        cuts = [(start, together) for start in range(0, end, together)]
        return cuts + [(start, size) for start in range(end, rows, size)]

    def piece_size(self, rows: int, batch_size: int, tower: VisionConfig | TextConfig) -> int:
        """Rows per call: on a CPU as many as stay in cache; elsewhere a power of two up to
        `batch_size`, so that few programs are compiled, and a multiple of the mesh."""
        if self._on_one_cpu():
            return min(rows, batch_size, max(1, _fitting(tower)))
        devices = self.mesh.shape["data"] if self.mesh else 1
        size = min(batch_size, 1 << (rows - 1).bit_length())
        return -(-size // devices) * devices

    def _on_one_cpu(self) -> bool:
        return jax.default_backend() == "cpu" and not self.mesh


def _strings(texts: Any) -> list[str] | None:
    """Texts that are not tokenized yet, as a list (an empty one is a list of no texts), or None."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, list | tuple):
        return list(texts) if all(isinstance(text, str) for text in texts) else None
    kind = getattr(getattr(texts, "dtype", None), "kind", "")  # of numpy and pandas
    return list(texts) if kind and kind in "OUT" else None


def _fitting(tower: VisionConfig | TextConfig) -> int:
    """How many rows a CPU computes at once without more than `_CPU_PIECE_BYTES` a buffer."""
    return _CPU_PIECE_BYTES // (4 * tower.num_tokens * tower.mlp_dim)


def encoding(compute: Compute, tower: VisionConfig | TextConfig) -> Compute:
    """How a tower is computed when nothing is trained: on one CPU one row after another, where two
    are too much at a time."""
    alone = compute.attention == "blocked" and not compute.rows and _fitting(tower) < 2
    alone = alone and jax.default_backend() == "cpu"
    return dataclasses.replace(compute, one_by_one=alone)


# Models of one architecture share their encoders, so that only the first is traced and compiled.
@functools.lru_cache(maxsize=32)
def _image_encoders(vision: VisionConfig | None, compute: Compute) -> tuple[Any, Any]:
    """Compiled functions of (params, images): embeddings, and patch tokens."""
    compute = encoding(compute, vision) if vision else compute

    def encode(params, images):
        return towers.encode_image(params, images, ModelConfig(vision, None), compute)

    return jax.jit(lambda p, x: encode(p, x)[0]), jax.jit(lambda p, x: encode(p, x)[1])


@functools.lru_cache(maxsize=32)
def _text_encoder(text: TextConfig | None, compute: Compute) -> Any:
    compute = encoding(compute, text) if text else compute
    return jax.jit(lambda p, x: towers.encode_text(p, x, ModelConfig(None, text), compute))


# The MLP's hidden activations of one 1,024-token image are 17.6 MB. malloc gives buffers above
# 32 MiB back to the system and gets them again as fresh pages, which costs more than it saves.
_CPU_PIECE_BYTES = 32 << 20
# Rows of a program that takes `one_by_one` in each block.
_ONE_BY_ONE = 4


def load(
    source: str | os.PathLike,
    dtype: DTypeLike = "float32",
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: str | os.PathLike | None = None,
    matmul_precision: str | None = None,
    *,
    attention: str | None = None,
    fsdp: bool = False,
    token: str | None = None,
) -> Model:
    """Loads a model.

    Args:
        source: a Hugging Face repo id, a checkpoint folder in HF layout, a folder of a PEFT (LoRA)
            adapter, which is merged with its base, a big_vision .npz, or a folder this project
            wrote.
        dtype: storage and compute type: "float32", "bfloat16", "float16" or what numpy and jax
            call so (jnp.bfloat16), or "auto" (bfloat16 on accelerators that have it, float32
            elsewhere).
        mesh: from `make_mesh`; parameters are replicated over it and batches split.
        tokenizer: a spiece.model, a tokenizer.json or a folder that has one, to use instead of the
            checkpoint's.
        matmul_precision: a jax precision name; default "highest" for float32, so that float32
            means float32 on every device ("tensorfloat32" or "default" are faster on GPU).
        attention: back end by name, see `medsiglip_jax.model.attention.ATTENTION`; default
            "blocked" on a CPU, "splash" on TPUs, "cudnn" on NVIDIA GPUs since 2020, else "xla".
        fsdp: split large parameters over the mesh instead of replicating them.
        token: Hugging Face token; default the stored login.

    Raises:
        FileNotFoundError: nothing at `source`.
        CheckpointError: the checkpoint is damaged or of another model; the message lists every
            problem, and nothing is loaded.
    """
    model = without_weights(source, dtype, mesh, tokenizer, matmul_precision, attention, token)
    assert model.checkpoint
    shapes = towers.param_shapes(model.config, model.compute.dtype)
    shardings = sharding.param_shardings(shapes, mesh, fsdp) if mesh else None
    model.params = reading.load_params(model.checkpoint, model.compute.dtype, shardings)
    return model


def without_weights(
    source: str | os.PathLike,
    dtype: DTypeLike = "float32",
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: str | os.PathLike | None = None,
    matmul_precision: str | None = None,
    attention: str | None = None,
    token: str | None = None,
) -> Model:
    """What `load` gives, but with empty `params`: for who needs only the architecture, the
    processor and what identifies the weights. The arguments are those of `load`."""
    dtype = _resolved(dtype, mesh)
    compute = compute_for(dtype, matmul_precision, attention, mesh)  # before anything is fetched
    opened = layouts.open_checkpoint(source, token)
    if attention:  # now with what the architecture asks of it
        compute_for(dtype, matmul_precision, attention, mesh, config=opened.config)
    companions = opened.companions
    if tokenizer:
        companions = [path for path in companions if path.name not in tokenizer_files.NAMES]
    return Model(
        {}, opened.config, tokenizer=tokenizer_path(tokenizer) or opened.tokenizer, compute=compute,
        mesh=mesh, checkpoint=opened, companions=companions,
    )  # fmt: skip


def init(name: str | ModelConfig, seed: int = 0, dtype: DTypeLike = "float32") -> Model:
    """A model with random weights of a named size ("so400m-448") or a given architecture."""
    dtype = _resolved(dtype)
    config, compute = named(name) if isinstance(name, str) else name, compute_for(dtype)
    drawn = random.init_params(config, seed)
    params = jax.tree.map(lambda x: jax.device_put(x.astype(dtype_of(dtype))), drawn)
    return Model(params, config, compute=compute)


def save(
    model: Model,
    folder: Given,
    format: str = "huggingface",
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model with its dtype, tokenizer and the files that lay beside the weights; the
    folder appears whole or not at all.

    A Hugging Face folder has a README.md with the metadata of the hub (that of the source, if there
    is one) and, for both towers, the files by which sentence-transformers loads it and pads texts
    as in training.

    Args:
        model: what to write.
        folder: a new folder, local or in a bucket (gs://…); for "big_vision" also a path that ends
            in .npz.
        format: "huggingface" (loads in transformers), "orbax" or "big_vision" (an .npz).
        overwrite: replace what is there.
        extra: name -> content of more files in the folder.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    if format not in layouts.WRITABLE:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(layouts.WRITABLE)}")
    layout = layouts.WRITABLE[format]
    path = places.at(folder)
    if layout.write_file and path.suffix == os.path.splitext(layout.marker)[1]:
        processors.check_plain(model.config)
        if not overwrite:
            places.check_new(path)
        with storage.new_file(path) as partial:
            layout.write_file(partial, model.params)
        return
    files = {file.name: file.read_bytes() for file in model.companions}
    files |= (model.processor.tokenizer_files() if model.config.text else {}) | dict(extra or {})
    if layout is layouts.LAYOUTS["huggingface"] and readme.NAME not in files:
        terms = readme.terms((), model.config, model.source)
        content = readme.written(model.config, model.checkpoint, terms)
        files[readme.NAME] = content.encode()
    with storage.new_folder(path, overwrite, layout.marker) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        processors.complete(partial, model.config)
        assert layout.write
        layout.write(partial, model.params, model.config)


def describe(source: str | os.PathLike, token: str | None = None) -> dict[str, Any]:
    """What `info` prints about a checkpoint, which is checked in full, one parameter at a time."""
    checkpoint = layouts.open_checkpoint(source, token)
    shapes = layouts.check(checkpoint)
    reading.check_values(checkpoint)
    return {
        "source": checkpoint.source,
        "format": checkpoint.format,
        "parameters": tree.size(shapes),
        "dtype": checkpoint.dtype,
        "sha256": layouts.digest(checkpoint),
        "tokenizer": str(checkpoint.tokenizer) if checkpoint.tokenizer else None,
        "config": checkpoint.config.to_dict(),
        "contains": {top: tree.size({top: shapes[top]}) for top in shapes},
        "notes": list(checkpoint.notes),
    }


def _resolved(dtype: DTypeLike, mesh: jax.sharding.Mesh | None = None) -> str:
    """The name of a dtype; of "auto", that on a mesh, or on this process's device."""
    dtype = dtype_name(dtype)
    device = mesh.devices.flat[0] if mesh else devices.default()
    return devices.auto_dtype(device) if dtype == devices.AUTO else dtype


def compute_for(
    dtype: str,
    matmul_precision: str | None = None,
    attention: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    device: Any = None,
    config: ModelConfig | None = None,
) -> Compute:
    """The defaults of `load` for `dtype` on `mesh`, or on one device (default: the one that this
    process uses; it may be one to compile for).

    Raises:
        ValueError: the precision is unknown, or the attention cannot be used there, or not for the
            image tower of `config`.
    """
    dtype_of(dtype)
    precision = matmul_precision or ("highest" if dtype == "float32" else "default")
    try:
        jax.default_matmul_precision(precision)
    except ValueError as error:
        raise ValueError(f"matmul_precision is {matmul_precision!r}: {error}") from None
    device = mesh.devices.flat[0] if mesh else device or devices.default()
    if attention:
        attentions.check(attention, device, dtype, config and config.vision)
    attention = attention or attentions.default(device, mesh.size if mesh else 1)
    rows = sharding.batch_sharding(mesh) if mesh else None
    wide = devices.wide_products(device, dtype)
    return Compute(dtype=dtype, precision=precision, attention=attention, rows=rows, wide=wide)
