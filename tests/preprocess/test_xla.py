"""The fast resize against the exact one, to the bit."""

import io

import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.preprocess import image, xla
from medsiglip_jax.preprocess.decode import decode, decode_with_facts

FAST = [(xla.preset(name)[1], image.PRESETS[name]) for name in ("big_vision", "big_vision_pad")]


def spread(pixels):
    """A picture as PIL holds it, and as `xla` sees it."""
    return xla.rgbx_view(Image.fromarray(pixels))


@pytest.mark.float
@pytest.mark.parametrize("fast, slow", FAST)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_sizes_are_equal_to_the_bit(seed, fast, slow):
    """Noise: 0.1 pixels of 600,000 differ where the product is not rounded by itself."""
    rng = np.random.default_rng(seed)
    for _ in range(30):
        shape = tuple(rng.integers(1, 1400, 2))
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        view = spread(pixels)
        assert view.strides[1] == 4
        np.testing.assert_array_equal(fast(view, 448), slow(pixels, 448))


@pytest.mark.float
@pytest.mark.parametrize("fast, slow", FAST)
@pytest.mark.parametrize("size", [1, 7, 56, 224])
def test_other_results(size, fast, slow):
    rng = np.random.default_rng(size)
    for shape in [(1, 1), (1, 500), (300, 2), (size, size), (size, 40), (333, 777)]:
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        np.testing.assert_array_equal(fast(spread(pixels), size), slow(pixels, size))


@pytest.mark.parametrize("fast, slow", FAST)
def test_what_is_not_four_bytes_apart_is_right_too(fast, slow):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 80, 4), np.uint8)
    for view in (pixels[..., :3], pixels[..., 1:], pixels[::2, :, :3], pixels[..., :3].copy()):
        want = slow(np.ascontiguousarray(view), 56)
        np.testing.assert_array_equal(fast(view, 56), want)


@pytest.mark.parametrize("fast, slow", FAST)
def test_windows_of_a_view(monkeypatch, fast, slow):
    """What augmentation cuts out: fast as well."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    want = slow(pixels[5:70, 11:60], 56)
    monkeypatch.setattr(image, "_lerp", None)  # of numpy
    np.testing.assert_array_equal(fast(spread(pixels)[5:70, 11:60], 56), want)


@pytest.mark.parametrize("fast, slow", FAST)
def test_without_a_cpu_backend_numpy_does_it(monkeypatch, fast, slow):
    monkeypatch.setattr(xla, "_cpu", lambda: None)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    np.testing.assert_array_equal(fast(spread(pixels), 56), slow(pixels, 56))


def test_every_preset_has_its_function():
    for name, slow in image.PRESETS.items():
        _, resize = xla.preset(name)
        assert getattr(resize, "keywords", {"slow": resize})["slow"] is slow


@pytest.fixture
def block():
    """A picture's block in PIL's memory: 64 KiB instead of 16 MiB."""
    usual = Image.core.get_block_size()
    Image.core.set_block_size(1 << 16)
    yield
    Image.core.set_block_size(usual)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "CMYK", "I;16", "1"])
def test_views_of_every_mode(mode, block):
    """After its file is closed, too, and above one block, where PIL cannot share."""
    rng = np.random.default_rng(0)
    for side, shares in ((50, True), (200, False)):
        grey = Image.fromarray(rng.integers(0, 256, (side, side + 1), np.uint8))
        wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        picture = wide if mode == "I;16" else grey.convert(mode)
        file = io.BytesIO()
        picture.save(file, "TIFF" if mode == "CMYK" else "PNG", compress_level=1)
        view, _ = decode_with_facts(file.getvalue(), xla.rgbx_view)
        # 16 bits become an array of ours, which is four bytes apart at any size.
        assert (view.strides[1] == 4) == (shares or mode == "I;16")
        np.testing.assert_array_equal(view, decode(file.getvalue()))


def test_memory_of_a_view_outlives_its_picture():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 100, 3), np.uint8)
    views = [spread(pixels) for _ in range(50)]
    junk = [Image.new("RGB", (100, 100), "red") for _ in range(200)]
    assert all(np.array_equal(view, pixels) for view in views) and junk
