"""Slices of series in the order of their places; patients as hashes."""

import errno
import functools
import gzip
import io
import json
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from dicom_files import IMPLICIT, item, made, with_value
from PIL import Image

from medsiglip_jax import cli
from medsiglip_jax.data import expansion, inputs
from medsiglip_jax.inference import pseudonyms
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.decode import decode_with_facts
from medsiglip_jax.preprocess.facts import Subject, UnreadableImage
from medsiglip_jax.preprocess.parts import Parts

RNG = np.random.default_rng(0)
ALL = Parts("all", series=True)
AXIAL, CORONAL, SAGITTAL = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])
PATIENT = {"PatientID": "MRN-7731", "StudyInstanceUID": "9.8.7", "SeriesInstanceUID": "9.8.7.1"}


def texts(values):
    return [f"{x:.9g}"[:16] for x in values]


def tags_of(n, position=None, orientation=AXIAL, **tags):
    placed = {}
    if position is not None:
        placed = {
            "ImagePositionPatient": texts(position),
            "ImageOrientationPatient": texts(orientation),
        }
    return {"SOPInstanceUID": f"9.8.7.1.{n}", "InstanceNumber": str(n), **PATIENT, **placed, **tags}


def write(folder, slices, syntax=None):
    """A file of each slice, under names that say nothing; the level of all its pixels is its
    number in the order given."""
    folder.mkdir(exist_ok=True)
    names = RNG.permutation(len(slices))
    for level, (name, tags) in enumerate(zip(names, slices, strict=True)):
        content = made(np.full((6, 5), level, np.uint8), *([syntax] if syntax else []), **tags)
        (folder / f"{name:03}.dcm").write_bytes(content)
    return folder


@functools.cache
def level(name):
    return int(sources.read(name)[0][0, 0, 0])


def levels(found):
    return [level(name) for name in found]


def names(folder, parts=ALL):
    return expansion.names([str(folder)], parts)


# ---------------------------------------------------------------------------------------- the order


def oblique(angle):
    """Rows and columns of an axial slice, tilted about the x axis."""
    return [1, 0, 0, 0, float(np.cos(angle)), float(np.sin(angle))]


@pytest.mark.parametrize("orientation, number", [
    (AXIAL, "1"), (CORONAL, None), (SAGITTAL, "shuffled"), (oblique(0.3), "1"),
    (oblique(-1.2), None), ([1, 0, 0, 0, -1, 0], "shuffled"), ([0, 1, 0, 1, 0, 0], "1"),
])  # fmt: skip
def test_shuffled_slices_come_out_in_the_order_of_their_places(tmp_path, orientation, number):
    """Along the normal, also where it is reversed; numbers and names do not matter."""
    normal = np.cross(orientation[:3], orientation[3:])
    corner = np.array([-120.5, 33.25, 1400])
    shuffled = RNG.permutation(12)
    slices = []
    for n in range(12):
        # In the plane of a slice the first pixel may lie anywhere.
        within = RNG.normal() * np.array(orientation[:3]) * 50
        tags = tags_of(n, corner + 2.5 * n * normal + within, orientation)
        tags["InstanceNumber"] = str(shuffled[n]) if number == "shuffled" else number
        slices.append({k: v for k, v in tags.items() if v is not None})
    folder = write(tmp_path / "in", slices)
    assert levels(names(folder)) == list(range(12))
    assert levels(names(folder, Parts("every=5", series=True))) == [0, 5, 10]
    assert levels(names(folder, Parts(series=True))) == [6]  # the middle is the default
    assert levels(names(folder, Parts(3, series=True))) == [3]


def test_slices_without_places_are_sorted_by_number_or_else_by_name(tmp_path):
    numbered = write(tmp_path / "a", [tags_of(n) for n in range(12)])  # as text, 10 is before 2
    with pytest.warns(UserWarning, match="1 series do not say where .* sorted by instance number"):
        assert levels(names(numbered)) == list(range(12))
    nameless = [{k: v for k, v in tags_of(n).items() if k != "InstanceNumber"} for n in range(9)]
    folder = write(tmp_path / "b", nameless)
    with pytest.warns(UserWarning, match="sorted by name"):
        found = names(folder)
    assert found == sorted(found) and len(found) == 9
    odd = tags_of(9, [0, 0, 3])
    odd["ImageOrientationPatient"] = texts([0] * 6)  # no direction is no place
    folder = write(tmp_path / "c", [tags_of(1), odd, tags_of(20)])
    with pytest.warns(UserWarning, match="sorted by instance number"):
        assert levels(names(folder)) == [0, 1, 2]


def test_series_are_kept_apart_and_localisers_split(tmp_path):
    """Three planes in one series, and another series at the same places."""
    slices = []
    for k, orientation in enumerate((AXIAL, CORONAL, SAGITTAL)):
        normal = np.cross(orientation[:3], orientation[3:])
        for n in range(3):
            slices.append(tags_of(10 * k + n, 10 * n * normal, orientation))
    other = {"SeriesInstanceUID": "9.8.7.2"}
    slices += [tags_of(50 + n, [0, 0, 10 * n], SOPInstanceUID=f"5.{n}", **other) for n in range(3)]
    folder = write(tmp_path / "in", slices)
    with pytest.warns(UserWarning, match="1 series have several orientations"):
        found = levels(names(folder))
    stacks = [found[k : k + 3] for k in range(0, 12, 3)]
    assert sorted(stacks) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.warns(UserWarning):
        assert sorted(levels(names(folder, Parts(series=True)))) == [1, 4, 7, 10]


def test_copies_are_left_out(tmp_path):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, 3 * n]) for n in range(6)])
    first = sorted(folder.iterdir())[0]
    (folder / "zz.dcm").write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="1 files are copies of others and left out"):
        found = names(folder)
    assert levels(found) == list(range(6)) and f"{folder}/zz.dcm" not in found


# ------------------------------------------------------------------- several images at one place


def at_places(places, kinds):
    """Slices place by place, and at each place one of each kind; kinds are tags."""
    return [
        tags_of(k + len(kinds) * z, [0, 0, 5 * z], **tags)
        for z in range(places) for k, tags in enumerate(kinds)
    ]  # fmt: skip


M, P = (["ORIGINAL", "PRIMARY", name, "NONE"] for name in ("M", "P"))
SW = (["ORIGINAL", "PRIMARY", name, name] for name in ("SW_M", "SW_P"))
KINDS = {
    "fmri": ([{"TemporalPositionIdentifier": k + 1} for k in range(4)], "time=0 to time=3"),
    "phases": ([{"TriggerTime": f"{90 * k}"} for k in range(3)], "time=0 to time=2"),
    "acquisitions": ([{"AcquisitionNumber": f"{k}"} for k in (2, 4)], "time=0 to time=1"),
    "unsaid": ([{}] * 2, "time=0 to time=1"),
    "complex": ([{"ImageType": M}, {"ImageType": P}], "type=M, type=P"),
    "philips": ([{"ImageType": value} for value in SW], "type=M, type=P"),
    "component": (
        [{"ComplexImageComponent": c} for c in ("MAGNITUDE", "PHASE")], "type=M, type=P",
    ),
    "own-types": ([{"ImageType": [*M[:2], x]} for x in ("WATER", "FAT")], "type=NAME"),
    "b-values": ([{"DiffusionBValue": b} for b in (0.0, 50.0, 1000.0)], "b=0, b=50, b=1000"),
    "echoes": ([{"EchoTime": t} for t in ("4.92", "7.38")], "echo=4.92, echo=7.38"),
    "directions": (
        [{"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}, {"DiffusionBValue": 800.0}],
        "b=0, b=800, time=0 to time=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(KINDS))
def test_several_images_at_one_place_are_said_and_kept_apart(tmp_path, name):
    kinds, choices = KINDS[name]
    many = len(kinds)
    folder = write(tmp_path / "in", at_places(5, kinds))
    said = f"up to {many} at each of 5 places.*takes one kind: {choices}"
    with pytest.warns(UserWarning, match=f"1 series have several images at one place, {said}") as w:
        found = levels(names(folder))
    assert "WATER" not in str(w[0].message)  # a file may hold anything there, even a name
    stacks = [found[5 * k : 5 * (k + 1)] for k in range(many)]
    assert sorted(stacks) == [[many * z + k for z in range(5)] for k in range(many)]
    with warnings.catch_warnings():  # which say the same
        warnings.simplefilter("ignore")
        every = levels(names(folder, Parts("every=2", series=True)))
        middle = levels(names(folder, Parts(series=True)))
    # Each place once, and the middle of each.
    assert sorted(every) == sorted(many * z + k for z in (0, 2, 4) for k in range(many))
    assert sorted(middle) == [2 * many + k for k in range(many)]


@pytest.mark.parametrize(("name", "frame", "expected"), [
    ("fmri", "time=2", [2, 6, 10, 14, 18]), ("fmri", "time=0,every=2", [0, 8, 16]),
    ("fmri", "time=3,middle", [11]), ("fmri", "4,time=1", [17]), ("phases", "time=1,0", [1]),
    ("unsaid", "time=1", [1, 3, 5, 7, 9]), ("complex", "type=M", [0, 2, 4, 6, 8]),
    ("component", "type=p", [1, 3, 5, 7, 9]), ("philips", "type=P,every=4", [1, 9]),
    ("philips", "type=SW_M,middle", [4]), ("own-types", "type=FAT,0", [1]),
    ("b-values", "b=50", [1, 4, 7, 10, 13]), ("echoes", "echo=7.4", [1, 3, 5, 7, 9]),
    ("directions", "b=800,time=1", [2, 5, 8, 11, 14]), ("directions", "b=0,middle", [6]),
])  # fmt: skip
def test_the_flag_of_frames_takes_one_kind(tmp_path, name, frame, expected):
    folder = write(tmp_path / "in", at_places(5, KINDS[name][0]))
    assert levels(names(folder, Parts(frame, series=True))) == expected


def test_a_kind_that_a_series_lacks_is_said(tmp_path):
    write(tmp_path / "in", at_places(3, KINDS["complex"][0]))
    plain = [tags_of(n, [0, 0, n], SeriesInstanceUID="1.1", SOPInstanceUID=f"1.1.{n}",
                     ImageType=M) for n in range(2)]  # fmt: skip
    write(tmp_path / "in" / "sub", plain)
    said = "1 series have no images for --frame type=P and are left out"
    with pytest.warns(UserWarning, match=said):
        assert levels(names(tmp_path / "in", Parts("type=P", series=True))) == [1, 3, 5]
    assert len(names(tmp_path / "in", Parts("type=M", series=True))) == 5
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no series has .*b=5"):
        names(tmp_path / "in", Parts("b=5", series=True))
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "x.png")
    with pytest.warns(UserWarning, match="1 files are in no series, so that --frame does not ch"):
        assert len(names(tmp_path / "in", Parts("type=M", series=True))) == 6


def test_a_time_that_one_place_lacks_does_not_shift_the_others(tmp_path):
    slices = at_places(4, KINDS["fmri"][0])
    del slices[5]  # the second time of the second place
    folder = write(tmp_path / "in", slices)
    found = levels(names(folder, Parts("time=1", series=True)))
    assert [slices[level]["TemporalPositionIdentifier"] for level in found] == [2, 2, 2]


def test_times_of_a_single_place_are_one_stack_in_their_order(tmp_path):
    """A cine: the middle is that of the times, and phase images are not among the others."""
    kinds = [{"TriggerTime": f"{40 * (6 - k)}"} for k in range(7)]
    folder = write(tmp_path / "a", at_places(1, kinds))
    assert levels(names(folder)) == [6, 5, 4, 3, 2, 1, 0]
    assert levels(names(folder, Parts(series=True))) == [3]
    assert levels(names(folder, Parts("time=1", series=True))) == [5]
    folder = write(
        tmp_path / "b", at_places(1, [k | {"ImageType": t} for k in kinds for t in (M, P)])
    )
    with pytest.warns(UserWarning, match="up to 14 at each of 1 .*takes one kind: type=M, type=P"):
        # Both kinds lie at one place, so that only the names of the files order them: any.
        assert sorted(levels(names(folder, Parts(series=True)))) == [6, 7]
    assert levels(names(folder, Parts("type=P,every=3", series=True))) == [13, 7, 1]


def test_types_that_differ_from_place_to_place_split_nothing(tmp_path):
    slices = [tags_of(n, [0, 0, n], ImageType=(M, P)[n % 2]) for n in range(4)]
    assert levels(names(write(tmp_path / "in", slices))) == [0, 1, 2, 3]


def test_frames_of_enhanced_files_are_kept_apart(tmp_path):
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=texts([0, 0, 5 * z]))],
            FrameContentSequence=[item(TemporalPositionIndex=t + 1)],
            MRDiffusionSequence=[item(DiffusionBValue=float(700 * t))],
            MRImageFrameTypeSequence=[item(FrameType=M, ComplexImageComponent="MAGNITUDE")],
        )
        for z in range(3) for t in range(2)
    ]  # fmt: skip
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=texts(AXIAL))])
    (tmp_path / "a.dcm").write_bytes(made(
        np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4), NumberOfFrames="6",
        SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=frames, **PATIENT,
    ))  # fmt: skip
    assert levels(names(tmp_path, Parts("b=700", series=True))) == [1, 3, 5]
    assert levels(names(tmp_path, Parts("type=M,b=0,every=2", series=True))) == [0, 4]


@pytest.mark.parametrize(("tag", "creator", "vr", "values"), [
    (0x0019100C, "SIEMENS MR HEADER", "IS", ["0", "900"]),
    (0x20011003, "Philips Imaging DD 001", "FL", [0.0, 900.0]),
    (0x00431039, "GEMS_PARM_01", "IS", [["0", "8"], ["1000000900", "8"]]),
])  # fmt: skip
@pytest.mark.parametrize("syntax", [IMPLICIT, None])
def test_b_values_in_the_elements_of_manufacturers(tmp_path, tag, creator, vr, values, syntax):
    folder = write(tmp_path / "in", at_places(3, [{}] * 2), syntax)
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        block = file.private_block(tag >> 16, creator, create=True)
        block.add_new(tag & 0xFF, vr, values[int(file.InstanceNumber) % 2])
        file.save_as(path)
    assert levels(names(folder, Parts("b=900", series=True))) == [1, 3, 5]


def test_kinds_are_those_of_a_series():
    for frame in ("time=0", "type=M,every=2"):
        with pytest.raises(ValueError, match=f"frame is '{frame}'.* expected --series"):
            Parts(frame)
    for frame in (
        "time=x",
        "time=-1",
        "b=",
        "type=",
        "time=0,time=1",
        "every=2,all",
        "time=0,last",
    ):
        with pytest.raises(ValueError, match=r"frame is .*time=N, type=NAME, b=X or echo=MS"):
            Parts(frame, series=True)


# ----------------------------------------------------------------------- series, files and frames


def test_files_that_hold_no_images_are_in_no_series_and_say_why(tmp_path):
    """Segmentations, doses and maps, of however many frames; in their own class or another."""
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(3)])
    masks = np.zeros((4, 6, 5), np.uint8)
    for name, tags in {
        "a": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "Modality": "SEG"},
        "b": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.7"},
        "c": {"Modality": "SEG"},
        "d": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2", "Modality": "RTDOSE"},
        "e": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.30"},
    }.items():
        own = tags_of(ord(name), [0, 0, 1], NumberOfFrames="4", **tags)
        (folder / f"{name}.dcm").write_bytes(made(masks, **own))
    for parts in (ALL, Parts("all")):
        found = names(folder, parts)
        assert sorted(levels(found[:3])) == [0, 1, 2] and len(found) == 8
        for source in found[3:]:
            with pytest.raises(UnreadableImage, match="DICOM that holds a .*, which is not an im"):
                sources.read(source)


def test_a_series_without_that_slice_is_said(tmp_path):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(3)])
    write(tmp_path / "in" / "sub", [
        tags_of(n, [0, 0, n], SeriesInstanceUID="1.1", SOPInstanceUID=f"1.1.{n}") for n in range(5)
    ])  # fmt: skip
    with pytest.warns(UserWarning, match="1 series have no images for --frame 4 and are left out"):
        assert levels(names(folder, Parts(4, series=True))) == [4]


def test_enhanced_files_have_places_of_their_own(tmp_path):
    """Two files of a series, whose frames lie between each other; shared orientation."""
    folder = tmp_path / "in"
    folder.mkdir()
    want = {}
    for k in range(2):
        places = RNG.permutation(4) * 2 + k
        frames = [
            item(PlanePositionSequence=[item(ImagePositionPatient=texts([0, 0, 5 * p]))])
            for p in places
        ]
        shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=texts(AXIAL))])
        stored = np.stack([np.full((4, 4), p, np.uint8) for p in places])
        (folder / f"{k}.dcm").write_bytes(
            made(
                stored, IMPLICIT if k else "1.2.840.10008.1.2.1", NumberOfFrames="4",
                SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=frames,
                SOPInstanceUID=f"9.{k}", **PATIENT,
            )
        )  # fmt: skip
        want |= {int(p): f"{folder}/{k}.dcm#frame={n}" for n, p in enumerate(places)}
    found = names(folder)
    assert found == [want[p] for p in range(8)] and levels(found) == list(range(8))


def test_other_files_stay_where_they_are(tmp_path):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, -n]) for n in range(3)])
    Image.new("RGB", (4, 4)).save(folder / "001.png")
    cut = tags_of(7, SeriesInstanceUID="1.2", SOPInstanceUID="1.2.1", NumberOfFrames="3")
    (folder / "a.dcm").write_bytes(made(np.zeros((3, 5, 5), np.uint8), **cut))
    (folder / "b.dcm").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("one\ntwo\n")
    with pytest.warns(UserWarning, match="by instance number"):
        rows = inputs.rows([folder], parts=ALL)
    assert levels(s for s in (row.source for row in rows[:3])) == [2, 1, 0]
    assert [row.id for row in rows][3:] == [
        "001.png", "a.dcm#frame=0", "a.dcm#frame=1", "a.dcm#frame=2", "b.dcm", "notes.txt:1",
        "notes.txt:2",
    ]  # fmt: skip


def test_pixels_are_not_read_to_find_the_order(tmp_path):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(4)])
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\xe0\x7f\x10\x00") + 6])  # cut in the pixels
    found = names(folder)
    assert [sources.planes(name)[0].position[2] for name in found] == [0, 1, 2, 3]


class Failing(io.BytesIO):
    """A stream that fails from some call on, of one kind."""

    def __init__(self, content, name, calls, error):
        super().__init__(content)
        self._name, self._calls, self._error = name, calls, error

    def _count(self, name):
        self._calls -= name == self._name
        if self._calls < 0:
            raise self._error

    def read(self, size=-1):
        self._count("read")
        return super().read(size)

    def seek(self, *place):
        self._count("seek")
        return super().seek(*place)


@pytest.mark.parametrize(("name", "calls"), [("read", 0), ("read", 1), ("read", 5), ("seek", 1)])
@pytest.mark.parametrize("parts", [ALL, Parts("all")])
def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch, parts, name, calls):
    """Or other slices would be embedded, without a word."""
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(5)])
    nifti = tmp_path / "v.nii.gz"
    nifti.write_bytes(gzip.compress(bytes(1000)))
    error, real = OSError(errno.EIO, "Input/output error"), content.places.open_binary

    def opened(path):
        if not path.endswith(("000.dcm", "v.nii.gz")):
            return real(path)
        return Failing(Path(path).read_bytes(), name, calls, error)

    monkeypatch.setattr(content.places, "open_binary", opened)
    with pytest.raises(content.Outage, match="000.dcm: cannot be read: Input/output error"):
        names(folder, parts)
    if calls < 2 and name == "read":
        with pytest.raises(content.Outage, match="v.nii.gz: cannot be read: Input"):
            expansion.names([str(nifti)], parts)


def test_a_network_that_fails_is_asked_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(5)])
    remote, real = fsspec.filesystem("memory"), content.places.open_binary
    uris = [f"memory://series/{path.name}" for path in sorted(folder.iterdir())]
    for path in folder.iterdir():
        remote.pipe_file(f"/series/{path.name}", path.read_bytes())
    failures, slept = [], []

    def opened(path):
        if len(failures) >= most or not path.endswith("2.dcm"):
            return real(path)
        failures.append(path)
        if len(failures) == 1:
            raise RuntimeError("503")  # as file systems raise types of their own
        return Failing(real(path).read(), "read", 3, RuntimeError("504"))

    monkeypatch.setattr(content.places, "open_binary", opened)
    monkeypatch.setattr(content.time, "sleep", slept.append)
    most = 3
    assert levels(expansion.names(uris, ALL)) == list(range(5))
    assert (len(failures), tuple(slept)) == (3, content._PAUSES)
    most = 9
    with pytest.raises(content.Outage, match="002.dcm: cannot be read: RuntimeError: 504"):
        expansion.names(uris, ALL)


# -------------------------------------------------------------------------------------- identifiers

SALT = "0123456789abcdef-of-the-tests"


@pytest.fixture
def salted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(pseudonyms.VARIABLE, SALT)


def columns_of(folder):
    return pq.read_table(folder / "part-00000.parquet").drop_columns(["embedding"]).to_pylist()


def test_the_command_hashes_series_and_keeps_uids_when_asked(
    tmp_path, checkpoint, salted, capsys, monkeypatch
):
    folder = write(tmp_path / "in", [tags_of(n, [0, 0, n]) for n in range(5)])

    def run(*argv):
        code = cli.main([str(a) for a in ("embed", "--model", checkpoint, *argv, folder)])
        return code, capsys.readouterr()

    code, said = run("--output", tmp_path / "a", "--series", "--json")
    assert code == 0, said.err
    assert json.loads(said.out)["expansion"]["series"]
    (row,) = columns_of(tmp_path / "a")
    assert len(row["patient"]) == 16 and row["source"] == names(folder)[2]
    code, said = run("--output", tmp_path / "b", "--series", "--frame", "all", "--keep-uids")
    assert code == 0 and {r["patient"] for r in columns_of(tmp_path / "b")} == {"MRN-7731"}
    assert len(columns_of(tmp_path / "b")) == 5
    written = b"".join(p.read_bytes() for p in (tmp_path / "a").iterdir())
    for secret in (b"MRN-7731", b"9.8.7"):
        assert secret not in written and secret.decode() not in said.err + said.out
    monkeypatch.setenv(pseudonyms.VARIABLE, "short")
    code, said = run("--output", tmp_path / "c", "--groups")
    assert code == 2 and "at least 16" in said.err and not (tmp_path / "c").exists()


def test_malformed_identifiers_do_not_make_an_image_unreadable():
    data = made(np.zeros((4, 4), np.uint8), SpecificCharacterSet="ISO_IR 100", **PATIENT)
    assert decode_with_facts(data)[1].subject == Subject("MRN-7731", "9.8.7", "9.8.7.1")
    odd = with_value(data, b"\x08\x00\x05\x00", b"CS", "NONSENSE")
    odd = with_value(odd, b"\x10\x00\x20\x00", b"LO", "a\\b")
    _, facts = decode_with_facts(odd)
    assert facts.subject is not None and facts.subject.study == "9.8.7"
