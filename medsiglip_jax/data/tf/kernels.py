"""TensorFlow's kernels as a codec for `loader`, bit-equal to PIL and numpy, without an accelerator.

TensorFlow decodes JPEG with the DCT that PIL uses, and resizes for the default preset, which is
defined by `tf.image.resize`. Everything else, and every file that TensorFlow refuses, goes through
`preprocess.decode`, so that verdicts and messages are the same with and without TensorFlow.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL.JpegImagePlugin import JpegImageFile

from medsiglip_jax.preprocess import codec
from medsiglip_jax.preprocess.costs import Costs
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset


def tf_codec(
    preprocess: str,
    dicom: Rules = Rules(),
    resample: str = "bicubic",
    others: codec.Codec | None = None,
) -> codec.Codec:
    """TensorFlow's decoder, and its resize for the preset "big_vision".

    Args:
        preprocess: name of a preset of `preprocess.image`.
        dicom: how DICOM files become pixels.
        resample: how the model's own processor resizes, see `preprocess.image.preset`.
        others: what decodes and resizes all but plain JPEG, such as `preprocess.xla.codec`, which
            reads DICOM files at 1.4 times the rate; by default PIL decodes and TensorFlow resizes.

    Raises:
        ValueError: no preset of that name.
    """
    tf.config.set_visible_devices([], "GPU")  # or it takes the memory that JAX needs
    resize = _resize if preprocess == "big_vision" else _by_numpy(preset(preprocess, resample))
    others = others or codec.Codec(lambda data: decode(data, dicom), resize, dicom)

    def resized(image: Any, size: int) -> np.ndarray:
        return (resize if isinstance(image, tf.Tensor) else others.resize)(image, size)

    return codec.Codec(lambda data: _decode(data, dicom, others), resized, dicom)


def _decode(data: bytes, dicom: Rules, others: codec.Codec) -> Any:
    """uint8 [H,W,3], a tensor of plain JPEG, bit-equal to `decode`; raises what that raises."""
    if size_of_plain_jpeg(data, dicom):
        try:
            return decode_jpeg(data)
        except tf.errors.InvalidArgumentError:
            pass
    return others.decode(data)


def _by_numpy(resize: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Any, int], np.ndarray]:
    return lambda image, size: resize(np.asarray(image), size)


def size_of_plain_jpeg(data: bytes, rules: Rules) -> tuple[int, int] | None:
    """Height and width of a file whose header PIL accepts, and of which TensorFlow then gives the
    same pixels or none; None of any other.

    Of 6,000 mutated files none was judged differently after PIL had read the header, and pixels
    differed only where scans of a progressive file were missing.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        header = JpegImageFile(io.BytesIO(data))
        rules.check_size(*header.size)
        Costs(header).check(rules)
    except Exception:  # `decode` says what is wrong
        return None
    plain = header.mode in ("L", "RGB") and "progressive" not in header.info
    return (header.height, header.width) if plain else None


def _resize(image: Any, size: int) -> np.ndarray:
    """The preset "big_vision", by the kernel that defines it."""
    if tuple(image.shape[:2]) == (size, size):
        return np.array(image)
    # The cast truncates (big_vision pp/ops_image.py:57-87).
    return bilinear(image, size).numpy()[0].astype(np.uint8)


def decode_jpeg(data: Any, channels: int = 3) -> tf.Tensor:
    """uint8 [H,W,channels] of the bytes of a JPEG, with the DCT that PIL uses; also in a graph."""
    return tf.io.decode_jpeg(data, channels=channels, dct_method="INTEGER_ACCURATE")


def bilinear(image: Any, size: int) -> tf.Tensor:
    """float32 [1,size,size,3] of an image [H,W,3]; also in a graph.

    It is what tf.image.resize(antialias=False) calls, without 0.1 ms of Python around it.
    """
    return tf.raw_ops.ResizeBilinear(
        images=tf.expand_dims(image, 0), size=(size, size), half_pixel_centers=True
    )
