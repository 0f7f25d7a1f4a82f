"""Tiles of whole slides against OpenSlide itself, and against what was painted."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import imagecodecs
import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import tifffile
from dicom_files import DEFLATED, EXPLICIT, HTJ2K, IMPLICIT, JPEG_LS, item, made
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from references import SMALL, assert_close, model_terms
from skimage.color import rgb2lab
from skimage.morphology import dilation, erosion

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import expansion, inputs
from medsiglip_jax.files import limits
from medsiglip_jax.files.threads import Stalled
from medsiglip_jax.inference import heatmap, shards
from medsiglip_jax.pages import colours
from medsiglip_jax.preprocess import codec as files
from medsiglip_jax.preprocess import slides, sources, tissue, xla
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import big_vision
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.parts import Parts

TERMS = model_terms(SMALL)
GLASS, PINK, PURPLE = (243, 242, 244), (224, 170, 200), (120, 60, 140)
ALL = Parts(mpp=0.5, tissue=0.0)
# Of no use to a heatmap.
IDLE = "--frame 7 --ct-window 9/9 --window 1 --volume ct --dicom-rules official --series".split()


def write_slide(path, levels, mpp=0.5, aperio=True, compression="jpeg", side=256):
    """A pyramid as Aperio writes it, or any tiled TIFF with its resolution in the tags."""
    with tifffile.TiffWriter(path) as file:
        for level, pixels in enumerate(levels):
            height, width = pixels.shape[:2]
            said = f"Aperio Image Library v11.2.1\n{width}x{height} ({side}x{side}) JPEG/RGB Q=90"
            said += f"|AppMag = 20|MPP = {mpp}" if mpp else "|AppMag = 20"
            per_cm = 1e4 / (mpp or 1)
            tags = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            file.write(
                pixels, tile=(side, side), photometric="rgb", compression=compression,
                description=said if aperio else None, metadata=None,
                subfiletype=int(level > 0), **({} if aperio else tags),
            )  # fmt: skip
    return str(path)


def tiles(path, parts):
    return slides.tiles(str(path), parts).columns


def pyramid(pixels, *factors):
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    small = (image.resize((width // f, height // f), Image.Resampling.BOX) for f in factors)
    return [pixels, *map(np.asarray, small)]


def painted(width, height):
    """Glass with two pieces of tissue, a speck and a hole; and where tissue is."""
    y, x = np.mgrid[:height, :width]
    large = ((x - width * 0.3) / (width * 0.2)) ** 2 + ((y - height * 0.5) / (height * 0.35)) ** 2
    small = np.hypot(x - width * 0.75, y - height * 0.3) / (height * 0.2)
    truth = (large < 1) | (small < 1)
    pixels = np.where(truth[..., None], np.uint8(PINK), np.uint8(GLASS))
    pixels[large < 0.2] = PURPLE
    return pixels, truth


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide of 0.5 um/px with levels of 1, 3 and 13, and the truth about its tissue."""
    pixels, truth = painted(3301, 2203)
    path = tmp_path_factory.mktemp("slides") / "painted.svs"
    return write_slide(path, pyramid(pixels, 3, 13)), truth


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Noise at every level, so that no two regions are alike; Aperio's and a plain tiled TIFF."""
    folder, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    levels = pyramid(rng.integers(0, 256, (1500, 2100, 3), dtype=np.uint8), 3, 13)
    return {
        "aperio": write_slide(folder / "a.svs", levels, compression="adobe_deflate"),
        "generic-tiff": write_slide(folder / "g.tif", levels, aperio=False),
    }


def reference(path, x, y, level, size):
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((x, y), level, (size, size))
    page = Image.new("RGB", region.size, "white")
    page.paste(region, mask=region)
    return np.array(page)


# ----------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("vendor", ["aperio", "generic-tiff"])
@pytest.mark.parametrize(
    "where",
    [
        (0, 0, 0, 448), (257, 511, 0, 300), (300, 600, 1, 200), (301, 602, 1, 200), (0, 0, 2, 115),
        (-100, -50, 0, 200), (1950, 1400, 0, 400), (1901, 1301, 1, 300), (2099, 1499, 0, 1),
        (-60, 40, 2, 200),
    ],
)  # fmt: skip
def test_pixels_are_those_of_openslide(noisy, vendor, where):
    assert openslide.OpenSlide.detect_format(noisy[vendor]) == vendor
    found = slides.read(noisy[vendor], *where)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference(noisy[vendor], *where))


def test_pixels_of_a_dicom_slide(real_data):
    path = str(real_data / "images" / "multiframe_camelyon_challenge_image.dcm")
    assert slides.is_slide(path)
    found = tiles(path, Parts(mpp=29.0, tissue=0.0))
    places = list(zip(*(found[name].tolist() for name in ("x", "y", "level", "size")), strict=True))
    assert len(places) == 6  # 1152 x 700 pixels
    for place in places:
        np.testing.assert_array_equal(slides.read(path, *place), reference(path, *place))


def test_threads_share_a_slide(noisy):
    places = [(x, y, 0, 100) for x in range(0, 2000, 150) for y in range(0, 1400, 150)]
    expected = [reference(noisy["aperio"], *place) for place in places]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda place: slides.read(noisy["aperio"], *place), places)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_reader_of_images_takes_tiles(noisy):
    """Inference by PIL, by XLA, and training: a tile is an image like others."""
    for where in [(0, 0, 0, 448), (100, 200, 0, 700), (1950, 1400, 0, 500)]:
        source = f"{noisy['aperio']}#tile={','.join(map(str, where))}"
        expected = big_vision(reference(noisy["aperio"], *where), 448)
        np.testing.assert_array_equal(load_images([source], 448)[0], expected)
        for codec in (files.pil_codec("big_vision"), xla.codec("big_vision")):
            np.testing.assert_array_equal(files.load_image(source, 448, codec), expected)
        to_array, resize = xla.preset("big_vision")
        found = resize(sources.read(source, to_array)[0], 448)
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def damaged(tmp_path, noisy):
    """The slide with one of its compressed tiles overwritten, and the place of that tile."""
    path = tmp_path / "damaged.svs"
    data = bytearray(Path(noisy["aperio"]).read_bytes())
    with tifffile.TiffFile(noisy["aperio"]) as file:
        page = file.pages[0]
        start, length = page.dataoffsets[12], page.databytecounts[12]
    data[start : start + length] = b"\xff" * length
    path.write_bytes(data)
    return str(path), (3 * 256, 1 * 256, 0, 256)  # nine tiles a row


def test_one_damaged_tile_costs_no_other(damaged, capfd):
    path, bad = damaged
    places = [(256 * column, 256 * row, 0, 256) for row in range(5) for column in range(8)]

    def outcome(place):
        try:
            return slides.read(path, *place)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(places * 3, pool.map(outcome, places * 3), strict=True))
    for place in places:
        if place == bad:
            assert found[place] == "damaged slide"
            continue
        np.testing.assert_array_equal(found[place], reference(path, *place))
    assert capfd.readouterr() == ("", "")  # nor do the libraries below say anything


def test_what_openslide_says_of_dicom_is_kept_back(real_data, tmp_path):
    """It may quote tags, and those identify."""
    path = tmp_path / "a.dcm"
    data = (real_data / "images" / "multiframe_camelyon_challenge_image.dcm").read_bytes()
    start = data.index(b"\xff\xd8\xff")  # of the first frame
    path.write_bytes(data[:start] + bytes(2000) + data[start + 2000 :])
    with pytest.raises(UnreadableImage) as caught:
        slides.read(str(path), 0, 0, 0, 200)
    assert str(caught.value) == "damaged slide"


def test_a_handle_that_others_broke_is_replaced(noisy, tmp_path, monkeypatch):
    """OpenSlide's errors are for good, and the next handle may meet the same other thread."""
    opened, broken, real = [], set(), openslide.OpenSlide

    class Counted(real):
        def __init__(self, path):
            super().__init__(path)
            self.number = len(opened)
            opened.append(path)

        def read_region(self, *where):
            if self.number in broken:
                raise openslide.OpenSlideError("broken")
            return super().read_region(*where)

    path = str(tmp_path / "new.svs")
    os.link(noisy["aperio"], path)
    monkeypatch.setattr(openslide, "OpenSlide", Counted)
    where = (100, 200, 0, 50)
    # One handle; then it, the next, and one to read alone; then the next again.
    for numbers, opens in [((), 1), ((0, 1), 3), ((0,), 3)]:
        broken.clear()
        broken.update(numbers)
        pixels = slides.read(path, *where)
        assert len(opened) == opens
        with real(path) as slide:
            region = slide.read_region(where[:2], where[2], (50, 50))
        np.testing.assert_array_equal(pixels, np.asarray(region)[..., :3])


def test_what_is_no_tile_of_a_slide_is_said_in_one_line(noisy, tmp_path):
    path = noisy["aperio"]
    text = tmp_path / "text.svs"
    text.write_text("not a slide")
    whole = Path(path).read_bytes()
    cut = tmp_path / "cut.svs"
    cut.write_bytes(whole[:5000])
    for source, where, said in [
        (path, (0, 0, 3, 10), "no level 3; the slide has 3"),
        (path, (2100, 0, 0, 10), "outside of the slide of 2100x1500"),
        (path, (-10, 0, 0, 10), "outside"),
        (path, (0, 10**30, 0, 10), "outside"),
        (path, (0, 0, 0, 0), "its finest level has 0.5 um/px; expected --mpp 0.5 or more"),
        (path, (0, 0, 0, 10**6), "longer than the limit"),
        (str(text), (0, 0, 0, 10), "not a slide that OpenSlide can read"),
        (str(cut), (0, 0, 0, 10), "slide"),
        ("gs://bucket/a.svs", (0, 0, 0, 10), "local files only"),
        (str(tmp_path / "none.svs"), (0, 0, 0, 10), "no such file"),
    ]:
        with pytest.raises(UnreadableImage, match=said) as caught:
            slides.read(source, *where)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# -------------------------------------------------------------------------------------------- grid


def places(found):
    return zip(*(found[name].tolist() for name in ("x", "y", "level", "size")), strict=True)


def covered(path, found):
    """How often each pixel of the level is in a tile."""
    with openslide.OpenSlide(path) as slide:
        level = int(found["level"][0])
        width, height = slide.level_dimensions[level]
        downsample = slide.level_downsamples[level]
    count = np.zeros((height, width), int)
    for x, y, _, size in places(found):
        left, top = round(x / downsample), round(y / downsample)
        assert abs(x - left * downsample) <= 0.5 and abs(y - top * downsample) <= 0.5
        count[top : top + size, left : left + size] += 1
    return count


@pytest.mark.parametrize("mpp", [0.5, 0.77, 1.0, 1.5, 1.7, 2.0, 6.4, 6.52, 10.0])
def test_tiles_cover_the_slide_once_at_the_resolution_asked_for(slide, mpp):
    path, _ = slide
    found = tiles(path, Parts(mpp=mpp, tissue=0.0))
    assert {name: str(values.dtype) for name, values in found.items()} == {
        "x": "int32", "y": "int32", "level": "int32", "size": "int32", "mpp": "float32",
    }  # fmt: skip
    assert (covered(path, found) == 1).all()
    with openslide.OpenSlide(path) as opened:
        levels = [0.5 * d for d in opened.level_downsamples]
    level, size = int(found["level"][0]), int(found["size"][0])
    assert level == max(i for i, own in enumerate(levels) if own <= mpp * 1.1)
    # A tile spans 448 pixels of the resolution asked for, to half a pixel of its level.
    assert abs(size * levels[level] - 448 * mpp) <= levels[level] / 2 + 1e-6
    np.testing.assert_allclose(found["mpp"], size * levels[level] / 448, rtol=1e-6)


@pytest.mark.parametrize("least", [0.05, 0.25, 0.6, 1.0])
def test_tiles_are_those_with_enough_tissue(slide, least):
    path, truth = slide
    found = set(places(tiles(path, Parts(mpp=0.5, tissue=least))))
    for x, y, level, size in places(tiles(path, ALL)):
        share = truth[y : y + size, x : x + size].sum() / size**2
        if abs(share - least) > 0.02:  # the thumbnail has a pixel of 3 x 3
            assert ((x, y, level, size) in found) == (share >= least), (x, y, share)
    assert 0 < len(found) < len(tiles(path, ALL)["x"])


def test_neighbours_are_near_in_the_order(tmp_path):
    path = write_slide(tmp_path / "wide.svs", [np.full((900, 9000, 3), 200, np.uint8)])
    found = tiles(path, ALL)
    strip = list(zip(found["x"] // 448, found["y"] // 448, strict=True))
    assert strip == [
        (x, y) for first in range(0, 21, 8) for y in range(3) for x in range(first, first + 8)
        if x < 21
    ]  # fmt: skip


def test_a_slide_of_one_level_and_one_smaller_than_a_tile(tmp_path):
    pixels, _ = painted(300, 200)
    path = write_slide(tmp_path / "small.svs", [pixels], mpp=0.25)
    found = tiles(path, ALL)
    assert list(places(found)) == [(0, 0, 0, 896)]
    tile = slides.read(path, 0, 0, 0, 896)
    assert (tile[200:] == 255).all() and (tile[:, 300:] == 255).all()


def test_a_level_that_is_coarser_by_a_little_will_do(tmp_path):
    levels = pyramid(np.full((1200, 1200, 3), 200, np.uint8), 4)
    path = write_slide(tmp_path / "s.svs", levels, mpp=0.2627)  # as Leica's GT 450
    assert tiles(path, Parts(mpp=1.0, tissue=0.0))["level"].tolist() == [1]
    assert tiles(path, Parts(mpp=0.25, tissue=0.0))["level"][0] == 0
    assert tiles(path, Parts(mpp=0.9, tissue=0.0))["level"][0] == 0


def test_resolutions_that_cannot_be_had_are_said_in_one_line(slide, tmp_path):
    plain = write_slide(tmp_path / "no.svs", [np.full((300, 300, 3), 200, np.uint8)], mpp=None)
    with pytest.raises(UnreadableImage, match=r"^does not say its resolution; .* \(--slide-mpp\)"):
        tiles(plain, ALL)
    with pytest.raises(ValueError, match=f"{plain}: --slide-mpp 1 is coarser than --mpp 0.5"):
        tiles(plain, Parts(mpp=0.5, slide_mpp=1.0))
    found = tiles(plain, Parts(mpp=0.5, slide_mpp=0.25, tissue=0.0))
    assert found["size"].tolist() == [896]
    path, _ = slide
    with pytest.raises(UnreadableImage, match="has 0.5 um/px; expected --mpp 0.5 or .*--slide-mpp"):
        tiles(path, Parts(mpp=0.25))
    with pytest.raises(ValueError, match="--mpp 10000 asks for .* at most") as caught:
        tiles(path, Parts(mpp=1e4))
    assert not isinstance(caught.value, UnreadableImage)  # the flag is wrong, and not the file


@pytest.mark.parametrize("wrong", [352.8, 264.6, 0.25, None])  # 72 dpi, 96 dpi
def test_a_resolution_that_is_wrong_can_be_corrected(tmp_path, wrong):
    pixels = np.full((1000, 900, 3), 200, np.uint8)
    path = write_slide(tmp_path / "a.svs", [pixels], mpp=wrong)
    right = write_slide(tmp_path / "b.svs", [pixels], mpp=1.0)
    parts = Parts(mpp=2.0, slide_mpp=1.0, tissue=0.0)
    expected = tiles(right, replace(parts, slide_mpp=None))
    said = f"1 record another resolution, such as {wrong} um/px; that of --slide-mpp, 1.0 um/px"
    with pytest.warns(UserWarning, match=said) if wrong else contextlib.nullcontext():
        rows = inputs.rows([path, right], parts=parts)
    assert len(rows) == 2 * len(expected["x"])
    for name, values in tiles(path, parts).items():
        np.testing.assert_array_equal(values, expected[name])


# ------------------------------------------------------------------------------------------ tissue


def test_tissue_is_where_it_was_painted_to_a_pixel(slide):
    path, truth = slide
    pixels, scale = slides.thumbnail(path)
    found = tissue.mask(pixels)
    centre = [((np.arange(n) + 0.5) * scale).astype(int) for n in found.shape]
    expected = truth[np.minimum(centre[0], truth.shape[0] - 1)[:, None],
                     np.minimum(centre[1], truth.shape[1] - 1)]  # fmt: skip
    nine = np.ones((3, 3), bool)
    assert not (erosion(expected, nine) & ~found).any()
    assert not (found & ~dilation(expected, nine)).any()


def test_a_thumbnail_whose_disk_does_not_answer_is_given_up(monkeypatch):
    """And its threads do not keep the process: those of a ThreadPoolExecutor would."""

    class Hanging:
        sizes, downsamples, mpp, shared, nbytes = ((600, 600),), (1.0,), None, None, 0
        release = threading.Event()

        def region(self, x, y, level, width, height):
            self.release.wait(5)
            return np.zeros((height, width, 3), np.uint8)

    monkeypatch.setattr(slides.handles, "opened", lambda path, opener: Hanging())
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.2))
    with pytest.raises(Stalled, match="^a.svs: not read within 0.2 s"):
        slides.thumbnail("a.svs")
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("thumbnail"))
    Hanging.release.set()


def test_glass_and_black_margins_are_no_tissue_and_specks_and_holes_go():
    rng = np.random.default_rng(0)
    glass = np.uint8(GLASS) - rng.integers(0, 5, (400, 600, 3), dtype=np.uint8)
    assert not tissue.mask(glass).any()
    assert not tissue.mask(rng.integers(0, 9, (400, 600, 3), dtype=np.uint8)).any()
    stained = np.uint8(PINK) - rng.integers(0, 60, (400, 600, 1), dtype=np.uint8)
    assert tissue.mask(stained).all()
    glass[50:53, 50:53] = PURPLE
    glass[100:200, 100:200] = PINK
    glass[150:154, 150:154] = GLASS
    expected = np.zeros(glass.shape[:2], bool)
    expected[100:200, 100:200] = True
    np.testing.assert_array_equal(tissue.mask(glass), expected)


def test_shares_of_squares_that_cut_pixels():
    rng = np.random.default_rng(0)
    mask = rng.random((30, 40)) < 0.5
    left, top, side = np.array([0.0, 7.5, 35.25]), np.array([-2.5, 11.125]), 8.25
    found = tissue.fractions(mask, left, top, side)
    fine = np.kron(mask, np.ones((8, 8)))  # eighths
    for row, y in enumerate(top):
        for column, x in enumerate(left):
            a, b = (max(0, round(8 * v)) for v in (y, x))
            part = fine[a : round(8 * (y + side)), b : round(8 * (x + side))]
            assert found[row, column] == pytest.approx(part.sum() / (8 * side) ** 2, abs=1e-6)


def test_what_is_damaged_counts_as_tissue_and_says_so_itself(tmp_path, slide):
    path, _ = slide
    cut = tmp_path / "cut.svs"
    data = bytearray(Path(path).read_bytes())
    with tifffile.TiffFile(path) as file:  # the level that the thumbnail is made of
        page = file.pages[1]
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            data[start : start + length] = bytes(length)
    cut.write_bytes(data)
    found = tiles(str(cut), Parts(mpp=0.5))
    assert set(places(tiles(path, Parts(mpp=0.5)))) < set(places(found))
    assert set(places(found)) == set(places(tiles(path, ALL)))


def write_sparse(path, side, small, held):
    """A slide whose tiles are empty but for those of `held`, the same at two levels."""
    full = np.full((256, 256, 3), PURPLE, np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, sides in enumerate((side, small)):
            columns = math.ceil(sides / 256)
            tiles = (full if held(*divmod(i, columns), level) else None for i in range(columns**2))
            file.write(
                tiles, shape=(sides, sides, 3), dtype=np.uint8, tile=(256, 256), metadata=None,
                photometric="rgb", compression="jpeg", resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER", subfiletype=level,
            )  # fmt: skip
    return str(path)


_LARGE = """
import resource, sys
from medsiglip_jax.preprocess import slides
from medsiglip_jax.preprocess.parts import Parts
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, path = peak(), sys.argv[1]
found = slides.tiles(path, Parts(mpp=0.5)).columns
columns = (found[name].tolist() for name in ("x", "y", "level", "size"))
means = {int(slides.read(path, *place).mean()) for place in list(zip(*columns))[::10]}
print(len(found["x"]), len(means), peak() - before)
"""


def test_a_large_slide_is_never_in_memory(tmp_path):
    """60,000 x 60,000 pixels are 10.8 GB; tissue is in a square of 4,096."""
    path = write_sparse(
        tmp_path / "large.tif", 60000, 3750,
        lambda row, column, level: max(row, column) < (1 if level else 16),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, path], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    count, means, kib = map(int, done.stdout.split())
    assert count == 81  # nine tiles of 448 a side are 4,032, and the tenth holds 64 pixels
    assert means == 1 and kib < 250 << 10


# ----------------------------------------------------------------------------------------- commands


def run(*argv):
    return cli.main([str(a) for a in argv])


def test_embedding_a_slide(slide, checkpoint, tmp_path, monkeypatch):
    path, _ = slide
    folder = tmp_path / "scans"
    folder.mkdir()
    os.link(path, folder / "a.svs")
    Image.new("RGB", (40, 30), "red").save(folder / "b.png")
    argv = ["--model", checkpoint, "--shard-size", 2, folder]
    assert run("embed", *argv, "--mpp", 1, "--output", tmp_path / "whole") == 0
    whole = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "whole").glob("part-*"))))
    names = ["id", "source", "kind", "x", "y", "level", "size", "mpp", "embedding"]
    assert whole.column_names == names
    assert [str(whole.schema.field(n).type) for n in names[3:8]] == ["int32"] * 4 + ["float"]
    expected = tiles(path, Parts(mpp=1.0))
    rows = whole.to_pylist()
    assert len(rows) == len(expected["x"]) + 1 and rows[-1]["x"] is None
    for row, place in zip(rows, places(expected), strict=False):
        assert tuple(row[n] for n in names[3:7]) == place
        assert row["id"] == "a.svs#tile={},{},{},{}".format(*place)
        assert row["source"] == f"{folder}/{row['id']}"
    model = medsiglip_jax.load(checkpoint)
    pixels = [reference(path, *place) for place in places(expected)]
    vectors = model.encode_image(model.processor.images(pixels))
    assert_close([r["embedding"] for r in rows[:-1]], vectors, TERMS)

    versions = json.loads((tmp_path / "whole" / "manifest.json").read_text())["versions"]
    assert versions["libopenslide"] == openslide.__library_version__ and "nibabel" not in versions

    # Killed after a shard, and started again.
    monkeypatch.setattr(shards, "write_parquet", stopping(shards.write_parquet))
    with pytest.raises(RuntimeError):
        run("embed", *argv, "--mpp", 1, "--output", tmp_path / "again")
    monkeypatch.undo()
    assert run("embed", *argv, "--mpp", 1, "--output", tmp_path / "again") == 0
    for file in (tmp_path / "whole").glob("*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert run("embed", *argv, "--mpp", 2, "--output", tmp_path / "again") == 2  # another run


def stopping(write):
    def first_only(path, table):
        if "part-00001" in path.name:
            raise RuntimeError("killed")
        write(path, table)

    return first_only


def test_slides_without_a_resolution_for_tiles(slide, noisy, checkpoint, tmp_path, capsys):
    path, _ = slide
    model = ["--model", checkpoint]
    assert run("classify", *model, "--text", "a", path) == 3
    said = "a whole slide; expected tiles of it: --mpp, or FILE#tile=X,Y,LEVEL,SIZE"
    assert said in capsys.readouterr().out
    assert run("embed", *model, "--output", tmp_path / "e", Path(path).parent) == 2
    said = capsys.readouterr().err
    assert "files skipped: .svs 1" in said and "slides with --mpp" in said and " .nii" in said
    for argv, said in [
        (["--slide-mpp", "1", path], "without --mpp these flags have no effect: --slide-mpp"),
        (["--tissue", "0.5", "--slide-mpp", "1", path], "no effect: --slide-mpp, --tissue"),
        (["--mpp", "0", path], "mpp is 0.0"),
        (["--mpp", "0.5", "--tissue", "2", path], "tissue is 2.0"),
        (["--mpp", "1", "--tissue", "1", noisy["generic-tiff"] + "x"], "no such file"),
    ]:
        assert run("embed", *model, "--output", tmp_path / "e", *argv) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_slide_of_glass_says_so(tmp_path, checkpoint, capsys):
    path = write_slide(tmp_path / "glass.svs", [np.full((900, 900, 3), GLASS, np.uint8)])
    for argv in (["embed", "--output", tmp_path / "e"], ["classify", "--text", "a"]):
        assert run(*argv, "--model", checkpoint, "--mpp", 0.5, path) == 2
        assert "no tile holds enough tissue (--tissue 0.25" in capsys.readouterr().err
    assert len(expansion.names([str(path)], Parts(mpp=0.5, tissue=0.0))) == 9


def test_what_cannot_be_opened_is_an_error_of_its_own(damaged, checkpoint, tmp_path):
    path, bad = damaged
    (tmp_path / "text.svs").write_text("not a slide")
    argv = ["--model", checkpoint, "--mpp", 0.5, "--tissue", 0, "--output", tmp_path / "out"]
    assert run("embed", *argv, path, tmp_path / "text.svs") == 3
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert errors[-1] == {
        "source": str(tmp_path / "text.svs"), "reason": "not a slide that OpenSlide can read",
    }  # fmt: skip
    broken = {error["source"].partition("#tile=")[2] for error in errors[:-1]}
    touched = {
        f"{x},{y},0,448" for x, y, *_ in places(tiles(path, ALL))
        if x < bad[0] + 256 and bad[0] < x + 448 and y < bad[1] + 256 and bad[1] < y + 448
    }  # fmt: skip
    assert broken == touched and all(e["reason"].startswith("damaged slide") for e in errors[:-1])


def test_dicom_slides_are_taken_once(real_data, tmp_path):
    """Each level is a file, and OpenSlide opens all of them by any."""
    source = real_data / "images" / "multiframe_camelyon_challenge_image.dcm"
    (tmp_path / "a.dcm").write_bytes(source.read_bytes())
    small = pydicom.dcmread(source)
    frames = list(generate_frames(small.PixelData, number_of_frames=int(small.NumberOfFrames)))
    small.PixelData, small.NumberOfFrames = encapsulate(frames[:2]), 2
    small.TotalPixelMatrixColumns, small.TotalPixelMatrixRows = 288, 175
    small.SOPInstanceUID += ".9"
    small.file_meta.MediaStorageSOPInstanceUID = small.SOPInstanceUID
    measures = small.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = [4 * float(x) for x in measures.PixelSpacing]
    small.save_as(tmp_path / "b.dcm")
    found = inputs.rows([tmp_path], parts=Parts(mpp=29.0, tissue=0.0))
    assert len(found) == 6 and all(row.source.startswith(f"{tmp_path}/a.dcm#") for row in found)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.dcm").write_bytes(source.read_bytes())
    assert len(inputs.rows([tmp_path], parts=Parts(mpp=29.0, tissue=0.0))) == 12


def folder_of_four(folder, slide):
    """A slide, one that does not say its resolution, a tiled TIFF of nonsense, and glass."""
    folder.mkdir()
    os.link(slide[0], folder / "a.svs")
    grey, glass = (np.full((300, 300, 3), level, np.uint8) for level in (200, 243))
    write_slide(folder / "b.svs", [grey], mpp=None)
    write_slide(folder / "c.tif", [grey], mpp=352.8, aperio=False)  # 72 dpi
    write_slide(folder / "d.svs", [glass])
    return folder


def test_slides_that_cannot_be_cut_are_errors_and_others_go_on(slide, tmp_path, monkeypatch):
    folder, opens, real = folder_of_four(tmp_path / "in", slide), [], openslide.OpenSlide

    def counted(path):
        opens.append(path)
        return real(path)

    counted.detect_format = real.detect_format
    monkeypatch.setattr(openslide, "OpenSlide", counted)
    monkeypatch.setattr("medsiglip_jax.preprocess.handles.MAX_OPEN", 0)
    with pytest.warns(
        UserWarning, match=r"slides: 1 have no tile with .*\(--tissue 0.25\) and are"
    ):
        found = inputs.rows([folder], parts=Parts(mpp=1.0))
    assert sorted(opens) == [f"{folder}/{name}" for name in ("a.svs", "b.svs", "c.tif", "d.svs")]
    names = [row.id for row in found]
    assert names[-2:] == ["b.svs#tile=0,0,0,0", "c.tif#tile=0,0,0,0"]
    assert len(names) == 2 + len(tiles(slide[0], Parts(mpp=1.0))["x"])
    for row, said in zip(
        found[-2:], ("does not say its res", "finest level has 352.8"), strict=True
    ):
        with pytest.raises(UnreadableImage, match=f"{row.source}: .*{said}"):
            sources.read(row.source)
    with pytest.warns(UserWarning, match="1 have no tile"):
        assert expansion.names([str(folder)], Parts(mpp=1.0)) == [row.source for row in found]
    with pytest.raises(ValueError, match="no images in this folder, nor slides with --mpp"):
        (folder / "c.tif").unlink()
        expansion.names([str(folder)], Parts())


def test_a_slide_that_cannot_be_opened_is_never_an_ordinary_image(real_data, tmp_path):
    slide = pydicom.dcmread(real_data / "images" / "multiframe_camelyon_challenge_image.dcm")
    slide.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.106"  # JPEG XL, of which there is none
    del slide.TotalPixelMatrixColumns
    slide.save_as(tmp_path / "a.dcm")
    (row,) = inputs.rows([tmp_path], parts=Parts(mpp=29.0, tissue=0.0))
    assert row.id == "a.dcm#tile=0,0,0,0"
    with pytest.raises(UnreadableImage, match="DICOM without TotalPixelMatrixColumns"):
        sources.read(row.source)


def slide_image(kind, array=None, **tags):
    """A DICOM image of a slide of one kind, such as its label."""
    array = np.full((64, 96, 3), 200, np.uint8) if array is None else array
    return made(
        array, Modality="SM", SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6",
        ImageType=["ORIGINAL", "PRIMARY", kind, "NONE"], **tags,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [Parts(), Parts("all"), Parts(mpp=29.0), Parts(series=True)])
def test_labels_and_overviews_of_slides_are_listed_and_not_read(tmp_path, parts):
    """They bear the patient's name; THUMBNAIL shows tissue only, unless the file says otherwise."""
    kinds = {"a": "LABEL", "b": "OVERVIEW", "c": "THUMBNAIL", "d": "THUMBNAIL"}
    for name, kind in kinds.items():
        labelled = {"SpecimenLabelInImage": "YES" if name == "d" else "NO"}
        (tmp_path / f"{name}.dcm").write_bytes(
            slide_image(
                kind, SOPInstanceUID=f"1.2.{ord(name)}", SeriesInstanceUID="1.2", **labelled
            )
        )
    rows = {row.id[0]: row for row in inputs.rows([tmp_path], parts=parts)}
    assert rows.keys() == kinds.keys()
    for name, said in {"a": "label", "b": "overview", "d": "specimen label"}.items():
        with pytest.raises(UnreadableImage, match=f"{name}.dcm.*shows the {said} of a slide.*name"):
            sources.read(rows[name].source)
        pixels, _ = sources.read(f"{tmp_path}/{name}.dcm", rules=Rules(slide_labels=True))
        assert pixels.shape == (64, 96, 3)
        with pytest.raises(UnreadableImage, match="of a slide|not a slide"):
            sources.read(f"{tmp_path}/{name}.dcm#tile=0,0,0,64")
    if parts.mpp is None:
        assert (sources.read(rows["c"].source)[0] == 200).all()


def test_the_command_reads_labels_when_asked(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.dcm").write_bytes(slide_image("LABEL"))
    argv = ["preview", tmp_path / "in", "--output", tmp_path / "sheet.html"]
    assert run(*argv) == 3
    assert "x.dcm: DICOM that shows the label of a slide" in capsys.readouterr().out
    assert run(*argv, "--slide-labels") == 0


# What OpenSlide 4.0 says of each: "Unsupported transfer syntax", or another message of its own.
RECODED = {
    "jpeg-ls": (JPEG_LS, imagecodecs.jpegls_encode),
    "htj2k": (HTJ2K, lambda x: imagecodecs.jpeg2k_encode(x, level=0, codecformat="j2k")),
    "implicit": (IMPLICIT, None),
    "deflated": (DEFLATED, None),
}


def dicom_slide(path, array, tile, syntax=EXPLICIT, encode=None, mpp=0.5, **tags):
    """A level of a slide in DICOM, in tiles side by side; beyond its edges they are black."""
    height, width = array.shape[:2]
    frames = []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            frame = np.zeros((tile, tile, *array.shape[2:]), array.dtype)
            piece = array[top : top + tile, left : left + tile]
            frame[: piece.shape[0], : piece.shape[1]] = piece
            frames.append(frame)
    measures = item(PixelMeasuresSequence=[item(PixelSpacing=[mpp / 1e3, mpp / 1e3])])
    told = {
        "Modality": "SM", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "NumberOfFrames": len(frames),
        "DimensionOrganizationType": "TILED_FULL", "TotalPixelMatrixColumns": width,
        "TotalPixelMatrixRows": height, "SharedFunctionalGroupsSequence": [measures],
        "SeriesInstanceUID": "1.2.3", "SOPInstanceUID": f"1.2.3.{width}",
    }  # fmt: skip
    encoded = [encode(frame) for frame in frames] if encode else None
    path.write_bytes(made(np.stack(frames), syntax, encoded, **(told | tags)))
    return str(path)


@pytest.mark.parametrize("kind", list(RECODED))
def test_slides_that_openslide_cannot_read_are_read_from_their_frames(tmp_path, kind):
    """With the pixels and tiles that OpenSlide has of the same slide without compression."""
    array = np.random.default_rng(0).integers(0, 99, (300, 500, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(array).resize((250, 150)))
    syntax, encode = RECODED[kind]
    found = {}
    for name, how in {"plain": (), "coded": (syntax, encode)}.items():
        (tmp_path / name).mkdir()
        dicom_slide(tmp_path / name / "b.dcm", small, 128, *how, mpp=1.0)
        found[name] = dicom_slide(tmp_path / name / "a.dcm", array, 128, *how, mpp=0.5)
    with openslide.OpenSlide(found["plain"]) as opened:
        sizes = opened.level_dimensions
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(found["coded"])
    assert sizes == ((500, 300), (250, 150)) and slides.downsamples(found["coded"]) == (1.0, 2.0)
    for where in [(0, 0, 0, 300), (100, 37, 0, 200), (-20, -30, 0, 200), (400, 200, 0, 200),
                  (0, 0, 1, 150), (122, 60, 1, 128)]:  # fmt: skip
        expected = reference(found["plain"], *where)
        np.testing.assert_array_equal(slides.read(found["coded"], *where), expected)
    for mpp in (0.5, 1.0):
        parts = Parts(mpp=mpp, tissue=0.0)
        rows = {name: inputs.rows([tmp_path / name], parts=parts) for name in found}
        assert [r.id.partition("#")[2] for r in rows["coded"]] == [
            r.id.partition("#")[2] for r in rows["plain"]
        ]
        assert len({row.source.partition("#")[0] for row in rows["coded"]}) == 1  # not each level


def test_a_sparse_slide_in_grey_is_read_from_its_frames(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (300, 500), dtype=np.uint8)
    corners = [(left, top) for top in range(0, 300, 128) for left in range(0, 500, 128)]
    names = [f"{name}PositionInTotalImagePixelMatrix" for name in ("Column", "Row")]
    places = [
        item(PlanePositionSlideSequence=[item(**dict(zip(names, (x + 1, y + 1), strict=True)))])
        for x, y in reversed(corners)
    ]
    path = dicom_slide(tmp_path / "a.dcm", array, 128)
    full = slides.read(path, 0, 0, 0, 500)
    np.testing.assert_array_equal(full[:300], np.dstack([array] * 3))
    assert (full[300:] == 255).all()
    stored = pydicom.dcmread(path)
    stored.DimensionOrganizationType = "TILED_SPARSE"
    stored.PerFrameFunctionalGroupsSequence = places
    tiles = np.frombuffer(stored.PixelData, np.uint8).reshape(-1, 128 * 128)
    stored.PixelData = tiles[::-1].tobytes()
    stored.save_as(tmp_path / "sparse.dcm")
    np.testing.assert_array_equal(slides.read(f"{tmp_path}/sparse.dcm", 0, 0, 0, 500), full)


def test_slides_of_frames_that_cannot_be_read_say_why(tmp_path):
    array = np.zeros((300, 500), np.uint8)
    for name, said, tags in [
        ("a", "a slide of 12 tiles, with 11 frames", {"NumberOfFrames": 11}),
        ("b", "without TotalPixelMatrixRows", {"TotalPixelMatrixRows": None}),
        ("c", "grey of more than 8 bits", {"BitsStored": 12}),
    ]:
        own = {"SeriesInstanceUID": f"1.{ord(name)}", **tags}
        stored = array.astype(np.uint16) if "BitsStored" in tags else array
        path = dicom_slide(tmp_path / f"{name}.dcm", stored, 128, **own)
        with pytest.raises(UnreadableImage, match=said):
            slides.read(path, 0, 0, 0, 128)


def test_slides_among_series_are_cut(real_data, slide, tmp_path):
    source = real_data / "images" / "multiframe_camelyon_challenge_image.dcm"
    (tmp_path / "a.dcm").write_bytes(source.read_bytes())
    plane = {"SeriesInstanceUID": "1.2", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    for n in range(3):
        placed = {"ImagePositionPatient": [0, 0, -n], "SOPInstanceUID": f"1.2.{n}", **plane}
        (tmp_path / f"b{n}.dcm").write_bytes(made(np.zeros((4, 4), np.uint8), **placed))
    parts = Parts("all", series=True, mpp=29.0, tissue=0.0)
    names = [row.id for row in inputs.rows([tmp_path], parts=parts)]
    assert [name.partition("#tile=")[0] for name in names[:6]] == ["a.dcm"] * 6
    assert names[6:] == ["b2.dcm", "b1.dcm", "b0.dcm"]


def test_remote_files_that_may_be_slides_are_counted():
    remote = fsspec.filesystem("memory")
    for name in ("a.tif", "b.dcm", "c.png", "d.svs"):
        remote.pipe_file(f"/pathology/{name}", b"x")
    said = "slides: 2 remote files are not cut into tiles: OpenSlide reads local files only"
    with pytest.warns(UserWarning, match=f"^{said}$"):
        assert len(inputs.rows(["memory://pathology"], parts=ALL)) == 4


def test_without_openslide_one_line_says_what_to_install(slide, checkpoint, monkeypatch, capsys):
    path, _ = slide
    monkeypatch.setitem(sys.modules, "openslide", None)
    monkeypatch.delitem(sys.modules, "medsiglip_jax.preprocess.slides")
    monkeypatch.delattr("medsiglip_jax.preprocess.slides")
    for argv in (
        ["--mpp", 1, path],
        [path],
        ["--heatmap", "x.png", path],
        [f"{path}#tile=0,0,0,9"],
    ):
        assert run("classify", "--model", checkpoint, "--text", "a", *argv) == 1
        assert "reading slides needs openslide: pip install 'medsiglip-jax[slides]'" in (
            capsys.readouterr().err
        )


# ------------------------------------------------------------------------------------------ heatmap


def test_colours_get_lighter_evenly():
    """In CIELAB: equal steps of the score look equal, in grey, too."""
    lightness = rgb2lab(colours.viridis(np.linspace(0, 1, 101))[None] / 255)[0, :, 0]
    assert (np.diff(lightness) > 0).all()
    steps = lightness[10:] - lightness[:-10]
    assert steps.max() < 1.3 * steps.min()


def test_pixels_are_hot_where_the_score_is(slide):
    path, _ = slide
    found = tiles(path, Parts(mpp=0.5))
    score = np.random.default_rng(0).random(len(found["x"])).astype(np.float32)
    table = pa.table({**found, "score": score})
    pixels, scale = slides.thumbnail(path)
    side = found["size"].astype(float)
    page = np.asarray(heatmap.draw(pixels, scale, table, side, ["hot", "cold"]), float)[24:, 24:]
    grey = np.asarray(Image.fromarray(pixels).convert("L"), float)[..., None]
    seen = np.zeros(pixels.shape[:2], bool)
    for (x, y, _, size), hot in zip(places(found), colours.viridis(score), strict=True):
        left, top, right, bottom = (round(v / scale) for v in (x, y, x + size, y + size))
        inner = np.s_[top:bottom, left:right]
        seen[inner] = True
        np.testing.assert_allclose(page[:1100, :1100][inner], 0.4 * grey[inner] + 0.6 * hot, atol=1)
    height, width = seen.shape
    np.testing.assert_allclose(page[:height, :width][~seen], np.broadcast_to(
        grey, (height, width, 3))[~seen], atol=1)  # fmt: skip


@pytest.mark.parametrize("others", [[0.01, 0.02], [0.6, 0.99]])
def test_a_colour_is_the_same_score_in_every_heatmap(others):
    """Whatever other scores there are in the picture."""
    glass = np.full((64, 96, 3), 243, np.uint8)
    table = pa.table({"x": [0, 32, 64], "y": [0, 0, 0], "score": np.float32([0.3, *others])})
    page = np.asarray(heatmap.draw(glass, 1.0, table, np.full(3, 32.0), ["a"]), float)
    want = 0.4 * 243 + 0.6 * colours.viridis(np.float32([0.3]))[0]
    np.testing.assert_allclose(page[24 + 16, 24 + 16], want, atol=1)


def test_the_heatmap_of_a_slide(slide, checkpoint, tmp_path, capsys):
    path, _ = slide
    texts = ["a b", "c d", "e f"]
    flags = [flag for text in texts for flag in ("--text", text)]
    out = tmp_path / "maps" / "map.png"
    argv = ["classify", "--model", checkpoint, *flags, "--mpp", 1, "--batch-size", 3, path]
    assert run(*argv, "--heatmap", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    table = pq.read_table(out.with_suffix(".parquet"))
    expected = tiles(path, Parts(mpp=1.0))
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name].to_numpy(), values)
    assert run(*argv, "--json") == 0  # each tile as an image of its own
    single = json.loads(capsys.readouterr().out)
    logits = [[score["logit"] for score in image["scores"]] for image in single]
    assert_close(np.stack(table["logits"].to_numpy()), logits, TERMS)
    # The derivative of a softmax is at most its value: so far the logits may be off.
    scores = [image["scores"][0]["softmax"] for image in single]
    assert_close(table["score"].to_numpy(), scores, TERMS, np.abs(logits).max() * max(scores))
    assert result["score"] == "softmax" and result["texts"] == texts and not result["errors"]
    assert [tile["score"] for tile in result["tiles"]] == table["score"].to_pylist()
    with Image.open(result["picture"]) as picture:
        assert picture.width == slides.thumbnail(path)[0].shape[1] + 48
    one_text = ["classify", "--model", checkpoint, "--text", "a b", "--mpp", 1, path]
    assert run(*one_text, "--heatmap", out) == 0  # its score is a sigmoid
    table = pq.read_table(out.with_suffix(".parquet"))
    logit = np.stack(table["logits"].to_numpy())[:, 0]
    np.testing.assert_allclose(table["score"].to_numpy(), 1 / (1 + np.exp(-logit)), rtol=1e-5)
    best = capsys.readouterr().out.splitlines()[2].split()
    assert float(best[0]) == pytest.approx(table["score"].to_numpy().max(), rel=1e-2)
    assert sources.read(best[1])[0].shape[2] == 3  # its name is a source


def test_a_heatmap_wants_one_slide_and_a_png(slide, checkpoint, tmp_path, capsys):
    path, _ = slide
    picture = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 30)).save(picture)
    for out, images, said in [
        ("m.png", [picture], "photo.jpg: not a slide that OpenSlide can read; a heatmap is drawn"),
        ("m.png", [path, path], "one slide; got 2"),
        ("m.png", [tmp_path / "none.svs"], "none.svs: no such file; a heatmap"),
        ("m.jpg", [path], "m.jpg: expected a name ending in .png"),
        ("m.png", ["--batch-size", 0, path], "batch_size is 0; expected at least 1"),
        (
            "m.png",
            [path, *IDLE],
            "no effect: --dicom-rules, --ct-window, --window, --volume",
        ),
    ]:
        argv = ["--model", checkpoint, "--text", "a", "--heatmap", tmp_path / out, *images]
        assert run("classify", *argv) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_heatmap_wants_tiles(real_data, tmp_path):
    path = str(real_data / "images" / "multiframe_camelyon_challenge_image.dcm")
    rows = heatmap.tiles(path, Parts(mpp=29.0, tissue=0.0, series=True))
    assert len(rows) == 6 and not rows.parts.series
    plain = write_slide(tmp_path / "no.svs", [np.full((300, 300, 3), 200, np.uint8)], mpp=None)
    with pytest.raises(ValueError, match="no.svs: does not say its resolution.*; a heatmap is"):
        heatmap.tiles(plain, Parts())


def test_tiles_that_cannot_be_read_are_left_out_of_the_heatmap(damaged, checkpoint, tmp_path):
    path, _ = damaged
    argv = ["--model", checkpoint, "--text", "a", "--tissue", 0, path]
    assert run("classify", *argv, "--heatmap", tmp_path / "m.png") == 3
    table = pq.read_table(tmp_path / "m.parquet")
    assert 0 < len(table) < len(tiles(path, ALL)["x"])
    model, rows = medsiglip_jax.load(checkpoint), heatmap.tiles(path, Parts(tissue=0.0))
    made = heatmap.heatmap(model, path, rows, ["a"], tmp_path / "n.png")
    assert made["preprocess"] == "big_vision"  # what was used, where nothing is asked for
