"""NIfTI slices against arrays turned by hand; windows, laziness, and files that lie."""

import gzip
import json
import re
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import fsspec
import nibabel
import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input, epoch_batches
from medsiglip_jax.data.order import Order
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.preprocess import sources, volumes
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.parts import Parts

CT, PERCENTILE = Rules(volume="ct"), Rules(volume="percentile")
RNG = np.random.default_rng(0)


def write(path, values, affine=None, slope=None, inter=None, kind=nibabel.Nifti1Image, **header):
    """A file of values as they are stored; `as_closest_canonical` and scaling are not used here."""
    image = kind(values, np.eye(4) if affine is None else affine, dtype=values.dtype)
    for name, value in header.items():
        image.header[name] = value
    image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    if slope is not None:  # nibabel writes its own
        content = path.read_bytes()
        raw = np.frombuffer(content[112:120], "<f4").copy()
        raw[:] = slope, inter
        path.write_bytes(content[:112] + raw.tobytes() + content[120:])
    return path


def pixels(path, number, rules=CT):
    return sources.read(f"{path}#frame={number}", rules=rules)[0]


def reason(source, rules=CT):
    with pytest.raises(UnreadableImage) as caught:
        sources.read(str(source), rules=rules)
    assert str(caught.value).startswith(f"{source}: ") and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{source}: ")


# ---------------------------------------------------------------------------------- the orientation

# A head of 2 x 3 x 4 voxels: x from left to right, y from back to front, z from the feet up.
# Which of them it is, a level says: 100 * x + 10 * y + z.
LEVELS = np.array([[[100 * x + 10 * y + z for z in range(4)] for y in range(3)] for x in range(2)])
# Slice z as it is seen: right at the left, front at the top.
SEEN = [np.array([[100 + 10 * y + z, 10 * y + z] for y in (2, 1, 0)]) for z in range(4)]


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "RPI", "SAR", "ASL", "PIR", "SLP"])
def test_slices_are_seen_as_by_radiologists_however_they_are_stored(tmp_path, codes):
    """Axes of each order and direction, with the affine that says so, written here by hand."""
    affine, values = np.zeros((4, 4)), LEVELS
    axes = [next(i for i, pair in enumerate(("LR", "PA", "IS")) if c in pair) for c in codes]
    values = values.transpose(axes)
    for stored, (code, axis) in enumerate(zip(codes, axes, strict=True)):
        up = code in "RAS"
        values = values if up else np.flip(values, stored)
        affine[axis, stored] = 2.5 if up else -2.5
        affine[axis, 3] = -7
    affine[3, 3] = 1
    path = write(tmp_path / "v.nii", values.astype(np.int16), affine)
    assert nibabel.aff2axcodes(affine) == tuple(codes)
    assert sources.frames(str(path)) == 4
    for z in range(4):
        shown = pixels(path, z, Rules(volume="ct", ct_window=(255, 127.5)))
        np.testing.assert_array_equal(shown[..., 0], SEEN[z])


def test_an_oblique_volume_is_turned_to_the_nearest_axes_and_not_resampled(tmp_path):
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = write(tmp_path / "v.nii", LEVELS.astype(np.int16), affine)
    shown = pixels(path, 2, Rules(volume="ct", ct_window=(255, 127.5)))
    np.testing.assert_array_equal(shown[..., 1], SEEN[2])


# ----------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "V.NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_ct_phantom_in_three_windows(tmp_path, name, kind):
    """The levels of tests/test_dicom.py, by hand."""
    hu = [-2000, -1225, -100, 0, 40, 80, 215, 1025, 3000]
    expected = [
        (0, 0, 0), (0, 0, 0), (128, 26, 0), (139, 98, 0), (143, 128, 128), (148, 157, 255),
        (163, 255, 255), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip
    values = np.array(hu, np.int16).reshape(-1, 1, 1)
    path = write(tmp_path / name.lower(), values, np.diag([-1, 1, 1, 1.0]), kind=kind)
    path = path.rename(tmp_path / name)
    np.testing.assert_array_equal(pixels(path, 0)[0], expected)
    one = pixels(path, 0, Rules(volume="ct", ct_window=(350, 40)))
    np.testing.assert_array_equal(one[0], np.array(expected)[:, 1:2].repeat(3, 1))


@pytest.mark.parametrize("kind", "u1 i1 <i2 >i2 <u2 <i4 <f4 >f4 <f8".split())
def test_values_of_every_type_are_scaled(tmp_path, kind):
    values = RNG.integers(0, 100, (5, 4, 3)).astype(kind)
    path = write(tmp_path / "v.nii", values)
    wide = Rules(volume="ct", ct_window=(400, 100))
    want = np.rint(255 * np.clip((values[::-1, ::-1, 1].T + 100.0) / 400, 0, 1))
    np.testing.assert_array_equal(pixels(path, 1, wide)[..., 0], want)


def test_slope_and_intercept(tmp_path):
    values = RNG.integers(0, 100, (5, 4, 3)).astype(np.uint8)
    path = write(tmp_path / "v.nii", values, slope=2.5, inter=-60)
    assert nibabel.Nifti1Image.load(path).get_fdata().min() < -50  # it is as nibabel reads it
    wide = Rules(volume="ct", ct_window=(200, 50))
    want = np.rint(255 * np.clip((values[::-1, ::-1, 1].T * 2.5 - 60 + 50) / 200, 0, 1))
    np.testing.assert_array_equal(pixels(path, 1, wide)[..., 0], want)
    falling = write(tmp_path / "f.nii", values, slope=-1, inter=0)
    turned = pixels(falling, 1, PERCENTILE).astype(int)
    straight = pixels(write(tmp_path / "s.nii", values), 1, PERCENTILE)
    assert np.abs(turned - (255 - straight)).max() <= 3  # the percentiles are of the other end


def test_percentiles_are_of_the_volume(tmp_path):
    """A slice of air stays black, where its own range would be stretched to noise."""
    values = RNG.normal(500, 100, (30, 20, 10)).astype(np.float32)
    values[..., 0] = RNG.normal(0, 1, (30, 20))
    values[3, 4, 5], values[0, 0, 0] = np.nan, np.inf
    path = write(tmp_path / "v.nii", values)
    low, high = np.quantile(values[np.isfinite(values)], (0.005, 0.995), method="inverted_cdf")
    for z in range(10):
        seen = values[::-1, ::-1, z].T.astype(np.float64)
        want = np.rint(255 * np.clip(np.nan_to_num((seen - low) / (high - low), posinf=1), 0, 1))
        want[np.isnan(seen)] = 0
        np.testing.assert_array_equal(pixels(path, z, PERCENTILE)[..., 2], want)
    assert np.ptp(pixels(path, 0, PERCENTILE)[:-1].astype(int)) <= 2  # infinity is in the last row
    constant = write(tmp_path / "c.nii", np.full((4, 4, 4), 7, np.int16))
    assert len(np.unique(pixels(constant, 0, PERCENTILE))) == 1
    nothing = write(tmp_path / "n.nii", np.full((4, 4, 4), np.nan, np.float32))
    assert not pixels(nothing, 0, PERCENTILE).any()


def test_percentiles_of_large_volumes_are_of_some_of_their_values(tmp_path, monkeypatch):
    values = np.linspace(0, 9999, 50 * 60 * 70).reshape(50, 60, 70).astype(np.float32)
    path, sizes, real = write(tmp_path / "v.nii", values), [], np.quantile

    def counted(found, *args, **options):
        sizes.append(found.size)
        return real(found, *args, **options)

    monkeypatch.setattr(np, "quantile", counted)
    monkeypatch.setattr(volumes, "_VALUES", 10_000)
    low, high = volumes.open_file(str(path))._percentiles()
    assert 5_000 < sizes[0] <= 10_000
    assert low == pytest.approx(50, abs=100) and high == pytest.approx(9949, abs=300)


def test_of_four_dimensions_the_first_volume(tmp_path):
    values = RNG.integers(0, 250, (4, 5, 3, 6)).astype(np.int16)
    for name in ("v.nii", "v.nii.gz"):
        path, first = write(tmp_path / name, values), write(tmp_path / f"1{name}", values[..., 0])
        for z in range(3):
            np.testing.assert_array_equal(pixels(path, z, PERCENTILE), pixels(first, z, PERCENTILE))
        facts = sources.read(f"{path}#frame=0", rules=PERCENTILE)[1]
        assert "first of 6 volumes" in facts.seen
    flat = write(tmp_path / "flat.nii", values[..., 0, 0])
    assert pixels(flat, 0).shape == (5, 4, 3)


@pytest.mark.parametrize("letters", ["RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_colours_are_as_nibabel_has_them(letters, suffix, tmp_path):
    colours = RNG.integers(0, 256, (5, 6, 4, len(letters)), np.uint8)
    values = colours.view(np.dtype([(x, "u1") for x in letters]))[..., 0]
    path = write(tmp_path / f"v{suffix}", values, np.diag([-1.0, 1, 1, 1]))
    stored = np.asarray(nibabel.load(path).dataobj)
    for rules in (CT, PERCENTILE):  # neither is asked for: they are no measured values
        seen, facts = sources.read(f"{path}#frame=1", rules=rules)
        # The first axis runs to the left: columns of the picture are as stored.
        want = np.stack([stored[x][:, ::-1, 1].T for x in "RGB"], -1)
        np.testing.assert_array_equal(seen, want)
        assert facts.seen == "NIfTI volume: colours, as stored" and facts.frames == 4


# --------------------------------------------------------------------------------- files that lie


def test_reasons(tmp_path):
    path = write(tmp_path / "v.nii", RNG.integers(0, 99, (40, 50, 60)).astype(np.int16))
    content = path.read_bytes()
    assert reason(f"{path}#frame=60") == "volume of 60 slices; number 60 is asked for"
    assert reason(path, Rules("official", volume="ct")) == (
        "official rules: NIfTI volumes are not served"
    )
    for data, want in [
        (content[:-1], "fewer values than it says"), (content[:200], "fewer values than it says"),
        (b"", "fewer values"), (bytes(1000), "not NIfTI"), (content[:344] + b"ni1\0", "two files"),
        (gzip.compress(content)[:-5000], "cut off"), (gzip.compress(content[:-1]), "fewer values"),
        (gzip.compress(content)[:200] + bytes(5000), "inflated"),
        (content[:40] + b"\3\0\xff\xff" + content[44:], "makes no sense|cannot be read"),
        (content[:70] + b"\x80\0" + content[72:], "fewer values than it says"),  # RGB24
        (content[:70] + b"\x20\0" + content[72:], "complex numbers"),
        (content[:70] + b"\x77\x77" + content[72:], "cannot be read"),
        (content[:108] + b"\0\0\x80\x7f" + content[112:], "cannot be read|no sense"),
    ]:  # fmt: skip
        for name in ("x.nii", "x.nii.gz"):  # what it is, its content says
            (tmp_path / name).write_bytes(data)
            assert re.search(want, reason(tmp_path / name)), (want, reason(tmp_path / name))
    (tmp_path / "d.nii").mkdir()
    assert reason(tmp_path / "d.nii") == "a folder"
    assert reason(tmp_path / "none.nii.gz") == "no such file"


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_a_volume_in_two_files_says_so(kind, tmp_path):
    values = RNG.integers(0, 99, (8, 9, 4)).astype(np.int16)
    nibabel.save(kind(values, np.eye(4)), tmp_path / "v.img")
    for name in ("v.hdr", "v.img"):
        why = reason(tmp_path / name)
        assert "NIfTI in two files" in why and "nibabel.save" in why
    (tmp_path / "v.hdr").unlink()  # voxels that nothing describes
    assert reason(tmp_path / "v.img") == "not an image file PIL can read"


def test_a_bomb_is_refused_before_it_fills_memory(tmp_path):
    header = write(tmp_path / "v.nii", np.zeros((2, 2, 2), np.int16)).read_bytes()[:352]
    shape = np.array([3, 2000, 2000, 2000, 1, 1, 1, 1], "<i2").tobytes()
    bomb = header[:40] + shape + header[56:]
    with gzip.open(tmp_path / "v.nii.gz", "wb") as file:
        file.write(bomb + bytes(1 << 24))
    tracemalloc.start()
    assert "inflates to 16000000000 bytes, more than the limit" in reason(tmp_path / "v.nii.gz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


@pytest.mark.torture
def test_fuzzed_files_are_read_or_refused(tmp_path, torture):
    """Bytes changed, most of them in the header, files cut; numpy's warnings are errors here."""
    seeds, rng = [], np.random.default_rng(5)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for dtype in ("i2", "f4", "u1"):
            values = (rng.random((9, 8, 7)) * 200).astype(dtype)
            seeds.append(write(tmp_path / "v.nii", values, kind=kind).read_bytes())
    outcomes = []
    for n in range(150 * torture):
        content = bytearray(seeds[n % len(seeds)])
        for place in rng.integers(0, [540, len(content)][n % 4 == 0], rng.integers(1, 12)):
            content[place] = rng.integers(256)
        data = bytes(content[: rng.integers(1, len(content))] if n % 5 == 0 else content)
        path = tmp_path / f"{n}.nii"
        path.write_bytes(gzip.compress(data, 1) if n % 2 else data)
        for rules in (CT, PERCENTILE):
            try:
                assert sources.frames(str(path)) <= 1 << 16
                assert sources.read(str(path), rules=rules)[0].dtype == np.uint8
                outcomes.append(True)
            except UnreadableImage as error:
                assert "\n" not in str(error) and len(str(error)) < 300
                outcomes.append(False)
    assert 0.1 < np.mean(outcomes) < 0.9


def test_only_what_is_shown_is_read_of_a_file_that_is_not_compressed(tmp_path):
    """Of 2 GB, nearly all of it a hole."""
    values = np.zeros((2, 2, 2), np.int16)
    header = write(tmp_path / "v.nii", values).read_bytes()[:352]
    shape = np.array([3, 1000, 1000, 1000, 1, 1, 1, 1], "<i2").tobytes()
    with open(tmp_path / "big.nii", "wb") as file:
        file.write(header[:40] + shape + header[56:])
        file.truncate(352 + 2 * 1000**3)
    tracemalloc.start()
    assert pixels(tmp_path / "big.nii", 500).shape == (1000, 1000, 3)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_compressed_volume_is_inflated_once(tmp_path, monkeypatch):
    path = write(tmp_path / "v.nii.gz", RNG.integers(0, 99, (20, 20, 30)).astype(np.int16))
    real, calls = volumes._read, []
    monkeypatch.setattr(volumes, "_read", lambda *args: calls.append(args) or real(*args))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda z: pixels(path, z, PERCENTILE), range(30)))
    assert len(calls) == 1


def test_few_volumes_are_inflated_at_a_time(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{n}.nii.gz", np.zeros((4, 4, 4), np.int16)) for n in range(12)]
    real, now, seen, lock = volumes._read, set(), [], threading.Lock()

    def counted(stream, layout):
        with lock:
            now.add(stream)
            seen.append(len(now))
        time.sleep(0.01)
        found = real(stream, layout)
        with lock:
            now.remove(stream)
        return found

    monkeypatch.setattr(volumes, "_read", counted)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda path: pixels(path, 0), paths))
    assert len(seen) == 12 and max(seen) == 2


# ---------------------------------------------------------------------------------------- commands


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.nii", "b.nii.gz"):
        write(folder / name, RNG.integers(-1000, 1000, (12, 14, 9)).astype(np.int16))
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    return folder


def test_volumes_are_rows(study, checkpoint, tmp_path):
    assert [row.id for row in inputs.rows([study])] == ["a.nii", "b.nii.gz", "c.png"]
    rows = inputs.rows([study], parts=Parts("every=4"))
    assert [row.id for row in rows] == [
        *(f"a.nii#frame={n}" for n in (0, 4, 8)), *(f"b.nii.gz#frame={n}" for n in (0, 4, 8)),
        "c.png",
    ]  # fmt: skip
    model = medsiglip_jax.load(checkpoint)
    with pytest.raises(ValueError, match=r"a\.nii.*does not say what its values are; expected"):
        embed(model, rows, tmp_path / "out", EmbedOptions())
    assert not (tmp_path / "out").exists()
    found = embed(model, rows, tmp_path / "out", EmbedOptions(dicom=CT))
    assert (found.embedded, found.dicom_rules.volume, found.multi_frame) == (7, "ct", 0)
    middle = embed(model, inputs.rows([study]), tmp_path / "middle", EmbedOptions(dicom=CT))
    assert middle.multi_frame == 2
    np.testing.assert_array_equal(
        sources.read(f"{study}/a.nii", rules=CT)[0], pixels(study / "a.nii", 4)
    )


def test_training_reads_slices(study):
    data = pytest.importorskip("medsiglip_jax.data.tf")
    names = [f"{study}/a.nii#frame=2", f"{study}/b.nii.gz", f"{study}/c.png"]
    want = load_images(names, 20, dicom=CT)
    rows = Input((Examples(names),), Order((3,)), 20, dicom=CT)
    for codec in (None, data.tf_codec("big_vision", CT)):
        (batch,) = epoch_batches(rows, 3, codec=codec)
        assert batch["mask"].all()
        np.testing.assert_array_equal(batch["image"], want)
    silent = Input((Examples(names),), Order((3,)), 20)
    with pytest.raises(ValueError, match="does not say what its values are"):
        list(epoch_batches(silent, 3))


def test_remote_volumes(study):
    remote = fsspec.filesystem("memory")
    for name in ("a.nii", "b.nii.gz"):
        remote.pipe_file(f"/volumes/{name}", (study / name).read_bytes())
    names = [row.source for row in inputs.rows(["memory://volumes"], parts=Parts("every=4"))]
    for name in names:
        local = name.replace("memory://volumes", str(study))
        np.testing.assert_array_equal(*(sources.read(s, rules=CT)[0] for s in (name, local)))
    assert len(names) == 6


def test_commands_ask_what_volumes_hold(study, checkpoint, tmp_path, capsys):
    def run(*argv):
        code = cli.main([str(a) for a in argv])
        return code, capsys.readouterr()

    model, out = ["--model", checkpoint], ["--output", tmp_path / "e"]
    for command in (["classify", *model, "--text", "a"], ["embed", *model, *out]):
        code, said = run(*command, study)
        assert code == 2 and "--volume percentile" in said.err and said.err.count("\n") == 1
    code, said = run("classify", *model, "--text", "a", "--volume", "percentile", "--frame", "2",
                     "--json", study / "a.nii")  # fmt: skip
    assert code == 0, said.err
    assert [r["image"] for r in json.loads(said.out)] == [f"{study}/a.nii"]
    assert run("embed", *model, *out, "--volume", "ct", "--frame", "all", study)[0] == 0
    code, said = run("search", *model, "--embeddings", tmp_path / "e", "--image", study / "a.nii",
                     "--frame", "3", "--top-k", "1", "--json")  # fmt: skip
    assert json.loads(said.out)[0]["hits"][0]["id"] == "a.nii#frame=3"
    code, said = run("search", *model, "--embeddings", tmp_path / "e", "--image", study / "a.nii",
                     "--volume", "percentile")  # fmt: skip
    assert code == 2 and "the embeddings were made with 'ct'" in said.err


def test_without_nibabel_one_line_says_what_to_install(study, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.delitem(sys.modules, "medsiglip_jax.preprocess.volumes")
    argv = ["classify", "--model", checkpoint, "--text", "a", "--volume", "ct", study]
    assert cli.main([str(a) for a in argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    want = "reading NIfTI needs nibabel: pip install 'medsiglip-jax[volumes]'"
    assert [line for line in lines if "nibabel" in line] == [f"medsiglip-jax classify: {want}"]
