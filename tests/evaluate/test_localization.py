"""Whether maps lie where the finding is: files of regions, measures by hand, a planted map."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_files import made as dicom_of
from miniatures import content, picture, write
from scipy import special
from test_datasets import CHEXPERT, nih

from medsiglip_jax import cli, explain, metrics
from medsiglip_jax.evaluate import localization, run, scores, tasks, zero_shot
from medsiglip_jax.evaluate.data import reading, regions
from medsiglip_jax.evaluate.options import EvaluateOptions
from medsiglip_jax.evaluate.recompute import recompute
from medsiglip_jax.evaluate.report.failures import known_failures
from medsiglip_jax.metrics import maps
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig
from medsiglip_jax.trust.explanation import Explanation
from medsiglip_jax.trust.maps.faithfulness import Faithfulness


def coded(mask):
    """A mask as COCO writes it, with Python's integers, one character at a time."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
    edges = [*np.flatnonzero(np.diff(flat)), mask.size]
    lengths = np.diff([0, *edges]).tolist()
    text = ""
    for i, x in enumerate(lengths):
        x -= lengths[i - 2] if i > 2 else 0
        more = True
        while more:
            low, x = x & 31, x >> 5
            more = x != (-1 if low & 16 else 0)
            text += chr(48 + low + 32 * more)
    return {"size": list(mask.shape), "counts": text}


def box(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


# --------------------------------------------------------------------------------- run lengths


def test_run_lengths_are_those_of_cocos_encoder():
    # From the sample that CheXlocalize publishes: nothing in images of 2320 x 2828 and 2022 x 2021,
    # and the first runs of a device.
    assert regions.run_lengths("PVWX6").tolist() == [2320 * 2828]
    assert regions.run_lengths("nefl3").tolist() == [2022 * 2021]
    device = regions.run_lengths("VhXf1W1[m1W1YO7I6J6E").tolist()
    assert device == [1778438, 39, 1963, 78, 1940, 85, 1933, 91, 1927, 97, 1916]
    # By hand: 1 is "1", 16 needs a second character to be positive, and 40 = 8 + 32.
    assert regions.run_lengths("1`0X1").tolist() == [1, 16, 40]
    assert regions.run_lengths([1, 16, 40]).tolist() == [1, 16, 40]
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random(rng.integers(1, 90, 2)) < rng.random()
        found = regions._segmentation(coded(mask))
        np.testing.assert_array_equal(found.mask(mask.shape), mask)


@pytest.mark.parametrize(
    "counts, size, say",
    [
        ("1 0", [2, 2], "expected characters from 0 to o"),
        ("1é", [2, 2], "ascii"),
        ("", [2, 2], "expected characters from 0 to o"),
        ("1P", [2, 2], "a length is cut off, or too long"),
        ("1PPPPPPPP1", [2, 2], "a length is cut off, or too long"),
        ("13", [3, 3], "runs of 4 pixels, the shortest 1; expected 9, none below 0"),
        ("O5", [2, 2], "runs of 4 pixels, the shortest -1; expected 4, none below 0"),
        ("4", [4], "not enough values"),
        ("0", [0, 0], "expected 0"),
        ([1, "x"], [2, 2], "invalid literal"),
    ],
)
def test_other_run_lengths_are_refused(tmp_path, counts, size, say):
    write(tmp_path / "s.json", json.dumps({"a": {"Edema": {"size": size, "counts": counts}}}))
    with pytest.raises(ValueError, match=f"s.json: a, Edema: not a segmentation.*{say}"):
        regions.read(task_of({"kind": "rle", "file": ["s.json"]}), tmp_path)


# ------------------------------------------------------------------------------------- measures


def test_the_peak_is_the_middle_of_what_ties():
    values = np.zeros((9, 12), np.float32)
    values[2:5, 6:11] = 1
    values[2, 6] += 1e-6  # float32 does not keep a plateau flat
    assert maps.peak(values) == (3, 8)
    values[7, 1] = 1.5
    assert maps.peak(values) == (7, 1)
    assert maps.peak(-np.ones((3, 3))) == (1, 1)


def test_otsu_separates_two_classes_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = np.concatenate([rng.normal(m, 20, 60) for m in rng.integers(0, 255, 2)])
        levels = levels.clip(0, 255).astype(np.uint8).reshape(10, 12)

        def within(level, x=levels.astype(float)):
            parts = [x[x <= level], x[x > level]]
            return sum(((part - part.mean()) ** 2).sum() for part in parts if len(part))

        found = maps.otsu(levels)
        assert within(found) == pytest.approx(min(map(within, range(256))), rel=1e-9)
    assert maps.otsu(np.array([[7, 7], [200, 7]], np.uint8)) == 7  # of those that tie the lowest


def test_what_is_marked_has_no_holes_and_no_lone_pixels():
    values = np.full((10, 10), -3.0)
    values[1:6, 1:6] = 5.0
    values[3, 3] = -2.9  # a hole
    values[8, 8] = 5.1  # alone
    np.testing.assert_array_equal(maps.segment(values), box(10, 10, 1, 1, 6, 6))
    assert not maps.segment(np.ones((4, 4))).any()  # a map of one value marks nothing


def test_overlap_by_hand():
    first, second = box(6, 6, 0, 0, 2, 3), box(6, 6, 1, 1, 4, 4)
    assert maps.iou(first, second) == 2 / (6 + 9 - 2)
    assert np.isnan(maps.iou(first, np.zeros((6, 6), bool)))


def test_the_mean_overlap_has_an_interval_by_patient():
    rng = np.random.default_rng(0)
    values = rng.random(12)
    found, alone = metrics.mean(values), metrics.mean(values, np.arange(12))
    half = 2.200985160082949 * values.std(ddof=1) / np.sqrt(12)  # t of 11 degrees
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert alone == found
    twice = metrics.mean(np.repeat(values, 3), np.repeat(np.arange(12), 3))
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high))
    one = metrics.mean(values, np.zeros(12))
    assert one.value == pytest.approx(values.mean()) and np.isnan(one.low)
    assert np.isnan(metrics.mean([]).value) and np.isnan(metrics.mean([0.5]).low)


# -------------------------------------------------------------------------------------- readers


def task_of(table, names=("Edema", "Mass")):
    """A task of two findings whose regions are in such a file."""
    return tasks.parse(
        "mine",
        {
            "title": "x", "kind": "multi_label", "score": "pos_minus_neg", "regions": table,
            "data": {"adapter": "csv", "tables": [{"file": ["l.csv"]}], "group": "patient",
                     "images": {"path": ["{image}"]}},
            "classes": [{"name": n, "present": ["photo of a a"], "absent": ["scan of a b"]}
                        for n in names],
        },
    )  # fmt: skip


BOXES = {
    "kind": "boxes", "file": ["b.csv"], "image": "image", "class": "Edema",
    "x": "x", "y": "y", "width": "w", "height": "h",
}  # fmt: skip


@pytest.mark.parametrize(
    "table, say",
    [
        ({"kind": "polygons"}, "regions: kind is 'polygons'; expected one of rle, boxes"),
        ({"kind": "rle"}, "regions: the table lacks file"),
        ({"kind": "rle", "file": ["../s.json"]}, "expected paths below the folder"),
        ({"kind": "rle", "file": ["s"], "image": "i"}, "the table has no key image"),
        ({"kind": "rle", "file": ["s"], "parse": "x"}, "parse and name need each other"),
        ({"kind": "rle", "file": ["s"], "parse": "(", "name": "a"}, "no regular expression"),
        (
            {"kind": "rle", "file": ["s"], "parse": "(?P<a>.)", "name": "{b}"},
            "name takes b, which parse has no group of",
        ),
        (BOXES | {"finding": "f"}, "expected either finding, a column, or class"),
        (BOXES | {"x_max": "x2"}, "expected either width and height, or x_max and y_max"),
        (BOXES | {"size": [3]}, r"size is \[3\]; expected \[height, width\]"),
        (BOXES | {"class": "Hernia"}, "regions name no classes: Hernia"),
        (BOXES | {"names": {"A": "B"}}, "regions name no classes: B"),
    ],
)
def test_wrong_tables_of_regions(table, say):
    with pytest.raises(ValueError, match=say):
        task_of(table)


def found_of(name, folder, **options):
    """The regions of the images of a task of the library, as whole masks of that shape."""
    task, dataset = reading.read(tasks.read(name), folder)
    found = regions.read(task, dataset.root or folder)
    return {id: found.of(id) for id in dataset.ids if found.of(id)}, found


def test_rsna(tmp_path):
    write(
        tmp_path / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target\n"
        "a,,,,,0\nb,264.0,152.0,213.0,379.0,1\nb,562.0,152.0,256.0,453.0,1\n",
    )
    for name in "ab":
        picture(tmp_path / f"stage_2_train_images/{name}.png")
    of_images, found = found_of("rsna-pneumonia", tmp_path)
    assert [*of_images] == ["stage_2_train_images/b.png"] and not found.other
    mask = of_images["stage_2_train_images/b.png"]["Pneumonia"].mask((1024, 1024))
    first, second = box(1024, 1024, 152, 264, 531, 477), box(1024, 1024, 152, 562, 605, 818)
    np.testing.assert_array_equal(mask, first | second)


def test_nih_has_brackets_and_empty_columns_in_its_header(tmp_path):
    nih(tmp_path)
    write(
        tmp_path / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000001_000.png,Cardiomegaly,225.084745762712,547.019216763771,86.77966,79.1864406,,,\n"
        "00000002_000.png,Infiltrate,0,0,2.4,1.5,,,\n"
        "00099999_000.png,Mass,1,2,3,4,,,\n",
    )
    of_images, _ = found_of("nih-cxr14", tmp_path)
    first, second = of_images.values()
    assert [*first] == ["Cardiomegaly"] and [*second] == ["Infiltration"]
    # A pixel is in the box if its centre is: from 225.08 on, and up to 311.86.
    want = box(1024, 1024, 547, 225, 626, 312)
    np.testing.assert_array_equal(first["Cardiomegaly"].mask((1024, 1024)), want)
    np.testing.assert_array_equal(
        second["Infiltration"].mask((1024, 1024)), box(1024, 1024, 0, 0, 1, 2)
    )
    with pytest.raises(ValueError, match="of an image of 1024 x 1024 pixels, and this one has 224"):
        first["Cardiomegaly"].mask((224, 224))


def test_vindr(tmp_path):
    write(
        tmp_path / "annotations/image_labels_test.csv",
        "image_id,Cardiomegaly,Nodule/Mass,No finding\na,1,1,0\nb,0,0,1\n",
    )
    write(
        tmp_path / "annotations/annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max\n"
        "a,Cardiomegaly,1.2,0.5,4.0,3.6\na,Clavicle fracture,1,1,2,2\n"
        "a,Cardiomegaly,5,1,6,2\nb,No finding,,,,\n",
    )
    for name in "ab":
        picture(tmp_path / f"test/{name}.png", size=8)
    of_images, found = found_of("vindr-cxr", tmp_path)
    assert [*of_images] == ["test/a.png"] and found.other == {"Clavicle fracture": 1}
    mask = of_images["test/a.png"]["Cardiomegaly"].mask((8, 8))
    np.testing.assert_array_equal(mask, box(8, 8, 0, 1, 4, 4) | box(8, 8, 1, 5, 2, 6))
    with pytest.raises(ValueError, match=r"from \(1.2, 0.5\) to \(6, 3.6\), and .* 4 x 8 pixels"):
        of_images["test/a.png"]["Cardiomegaly"].mask((8, 4))


@pytest.mark.parametrize(
    "text, say",
    [
        ("image,x,y,w\na,1,2,3\n", "b.csv: no column 'h'; there are image, x, y, w"),
        ("image,x,y,w,h\na,1,2,3,\n", "b.csv: row 1: not a box"),
        ("image,x,y,w,h\na,,,,\nb,1,2,0,3\n", "b.csv: row 2: .* expected a box with an area"),
        ("image,x,y,w,h\nb,1,2,nan,3\n", "b.csv: row 1: .* expected a box with an area"),
        ("image,x,y,w,h\na,,,,\n", "b.csv: has no region; expected regions of Edema, Mass"),
    ],
)
def test_wrong_boxes(tmp_path, text, say):
    write(tmp_path / "b.csv", text)
    with pytest.raises(ValueError, match=say):
        regions.read(task_of(BOXES), tmp_path)


@pytest.mark.parametrize(
    "text, say",
    [
        ("[1]", "s.json.gz: not segmentations in JSON .*holds a list"),
        ('{"a": 3}', "s.json.gz: a: not segmentations by class"),
        ('{"a": {"Edema": 3}}', "s.json.gz: a, Edema: not a segmentation as COCO writes it"),
        (
            '{"a": {"Hernia": {"size": [1, 1], "counts": "01"}}}',
            "s.json.gz: names only 'Hernia'; expected regions of Edema, Mass",
        ),
    ],
)
def test_other_segmentations_are_refused(tmp_path, text, say):
    write(tmp_path / "s.json.gz", text)
    with pytest.raises(ValueError, match=say):
        regions.read(task_of({"kind": "rle", "file": ["s.json"]}), tmp_path)


TWICE = "several regions of Edema; expected one"


def test_a_region_is_never_put_in_place_of_another(tmp_path):
    """Of two names for a class, or of two images whose files have one name."""
    write(tmp_path / "b.csv", "image,x,y,w,h\na,1,2,3,4\nA.png,5,6,7,8\n")
    with pytest.raises(ValueError, match=f"b.csv: A.png, Edema: .*{TWICE}"):
        regions.read(task_of(BOXES), tmp_path)
    whole = '{"size": [1, 1], "counts": [0, 1]}'
    segmented = {"kind": "rle", "file": ["s.json"], "names": {"Oedema": "Edema"}}
    for images in (f'"a": {{"Edema": {whole}, "Oedema": {whole}}}',
                   f'"p1/a": {{"Oedema": {whole}}}, "p2/a": {{"Edema": {whole}}}'):  # fmt: skip
        write(tmp_path / "s.json", f"{{{images}}}")
        with pytest.raises(ValueError, match=f"s.json: .*{TWICE}"):
            regions.read(task_of(segmented), tmp_path)


def test_one_file_has_the_regions(tmp_path):
    for name in "ab":
        write(tmp_path / name / "s.json", "{}")
    with pytest.raises(ValueError, match=r"2 files match \*/s.json, expected one"):
        regions.read(task_of({"kind": "rle", "file": ["*/s.json"]}), tmp_path)


# --------------------------------------------------------------------------------- planted maps

SIZE = 12
REGION = {
    ("patient64741_study1_view1_frontal", "Cardiomegaly"): box(SIZE, SIZE, 4, 4, 10, 10),
    ("patient64741_study1_view1_frontal", "Airspace Opacity"): box(SIZE, SIZE, 0, 0, 3, 4),
    ("patient64741_study1_view2_frontal", "Cardiomegaly"): box(SIZE, SIZE, 0, 0, 6, 6),
    ("patient64742_study1_view1_frontal", "Cardiomegaly"): box(SIZE, SIZE, 0, 8, 2, 12),
    ("patient64741_study1_view3_lateral", "Cardiomegaly"): box(SIZE, SIZE, 0, 0, 6, 6),
}
PLANTED = box(SIZE, SIZE, 6, 4, 12, 10)  # what every map marks


@pytest.fixture
def chexlocalize(tmp_path):
    """The layout of the bundle: three frontal images with regions, a lateral one."""
    paths = [f"patient64741/study1/{view}" for view in ("view1_frontal", "view2_frontal")]
    paths += ["patient64741/study1/view3_lateral", "patient64742/study1/view1_frontal"]
    labels = "0,0,1,1,0,0,0,0,0,0,0,0,0,1"
    write(
        tmp_path / "CheXpert/test_labels.csv",
        f"Path,{CHEXPERT}\n" + "".join(f"test/{path}.jpg,{labels}\n" for path in paths[::3]),
    )
    empty = np.zeros((SIZE, SIZE), bool)
    content = {}
    for path in paths:
        picture(tmp_path / f"CheXpert/test/{path}.jpg", size=SIZE)
        image = path.replace("/", "_")
        names = ("Cardiomegaly", "Airspace Opacity", "Edema")
        content[image] = {name: coded(REGION.get((image, name), empty)) for name in names}
    write(tmp_path / "CheXlocalize/gt_segmentations_test.json", json.dumps(content))
    return tmp_path


class Planted:
    """An explainer whose maps all mark the same; it counts them, and fails where it is told to."""

    made, fails = [], None

    def __init__(self, targets, preprocess, options):
        self.targets, self.options = targets, options

    def __call__(self, pixels, name):
        if name == self.fails:
            raise KeyboardInterrupt
        self.made.extend((name, target.text) for target in self.targets)
        values = np.where(PLANTED, 1.0, -1.0).astype(np.float32)
        curve = np.linspace(0, 1, 3)
        return [
            Explanation(
                name, target.text, target.contrast, self.options.method, values, 1.0, 0.0, 4,
                0.5 if target.text == "Lung Opacity" else 0.001, 0.0,
                Faithfulness(curve, curve, curve, 0.3, (0.4 if "view2" in name else 0.1,)),
            )
            for target in self.targets
        ]  # fmt: skip


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(Planted, "made", [])
    monkeypatch.setattr(Planted, "fails", None)
    monkeypatch.setattr(localization, "Explainer", Planted)
    return Planted


OPTIONS = EvaluateOptions(resamples=20, explain="ig")


def two_findings():
    """The content of the task of the library with two of its 13 findings."""
    own, names = content("chexpert-test"), ("Cardiomegaly", "Lung Opacity")
    own["classes"] = [c for c in own["classes"] if c["name"] in names]
    return {key: own[key] for key in own.keys() - {"published", "means", "readings", "parts"}}


def test_planted_maps_are_measured_by_hand(chexlocalize, model, planted, tmp_path):
    told = []
    found = run.evaluate(
        tasks.parse("two", two_findings()), model, chexlocalize, tmp_path / "out", OPTIONS,
        on_maps=lambda *counts: told.append(counts), on_map=told.append,
    )  # fmt: skip
    assert told == [(4, 3), 2, 1, 1]
    rows = pq.read_table(tmp_path / "out/localization.parquet").to_pylist()
    opacity, heart = "Lung Opacity", "Cardiomegaly"
    test = "CheXpert/test/patient"
    columns = ("id", "class", "group", "hit", "centre")
    assert [tuple(r[key] for key in columns) for r in rows] == [
        (f"{test}64741/study1/view1_frontal.jpg", heart, "patient64741", True, True),
        (f"{test}64741/study1/view1_frontal.jpg", opacity, "patient64741", False, False),
        (f"{test}64741/study1/view2_frontal.jpg", heart, "patient64741", False, False),
        (f"{test}64742/study1/view1_frontal.jpg", heart, "patient64742", False, False),
    ]
    assert [r["iou"] for r in rows] == [24 / 48, 0, 0, 0]
    assert [r["chance"] for r in rows] == [36 / 144, 12 / 144, 36 / 144, 8 / 144]
    assert [r["better_than_random"] for r in rows] == [True, True, False, True]
    assert all(r["method"] == "ig" and r["error"] is None for r in rows)
    measured = found["localization"]
    assert (measured["images"], measured["maps"], measured["errors"]) == (3, 4, 0)
    assert (measured["better_than_random"], measured["incomplete"]) == (3, 1)
    of = {row["class"]: row for row in measured["classes"]}
    assert [*of] == [heart, opacity]
    hits, groups = np.array([True, False, False]), ["a", "a", "b"]
    for key, want in {
        "hit_rate": metrics.proportion(hits, groups),
        "miou": metrics.mean([0.5, 0, 0], groups),
    }.items():
        limits = {"value": want.value, "low": max(0, want.low), "high": min(1, want.high)}
        assert of[heart][key] == limits
    assert of[heart]["chance"] == pytest.approx((36 + 36 + 8) / 3 / 144)
    assert (of[heart]["centre"], of[heart]["groups"]) == (1 / 3, 2)
    assert measured["mean"]["miou"] == pytest.approx((0.5 / 3 + 0) / 2)
    report = (tmp_path / "out/report.md").read_text()
    assert "## Localization" in report and "1 maps are not better than random" in report
    assert "| Cardiomegaly | 3 | 0.333 |" in report and "arXiv 2509.18015" in report
    assert any("Maps of Cardiomegaly are not shown to point" in line
               for line in known_failures(found))  # fmt: skip
    assert recompute(tmp_path / "out") == found  # without model and maps


def test_other_files_of_measures_are_refused(chexlocalize, model, planted, tmp_path):
    task, out = tasks.parse("two", two_findings()), tmp_path / "out"
    run.evaluate(task, model, chexlocalize, out, OPTIONS)
    path = out / localization.FILE
    table, facts = localization.read(path)
    for say, changes in {
        "method is 'lime'; expected one of ig": {"method": "lime"},
        "other is 3; expected a mapping|other is 3": {"other": 3},
        "localization.parquet and scores.parquet are of different runs": {"run": "another"},
    }.items():
        meta = json.dumps(asdict(facts) | changes).encode()
        scores.save(path, table, {b"medsiglip_jax": meta})
        with pytest.raises(ValueError, match=say):
            recompute(out)
    localization.write(path, table.slice(0, 1).drop(["hit"]), facts)
    with pytest.raises(ValueError, match="not measures of maps .*columns are id, class"):
        recompute(out)
    [lines] = (out / "maps").iterdir()
    write(lines, '{"id": "a", "class": "Edema"}\n' + lines.read_text().replace("0.5", '"x"'))
    with pytest.raises(ValueError, match="jsonl: not measures of maps .*; remove it"):
        run.evaluate(task, model, chexlocalize, out, OPTIONS)


def test_a_killed_run_goes_on(chexlocalize, model, planted, tmp_path):
    task = tasks.parse("two", two_findings())
    whole = run.evaluate(task, model, chexlocalize, tmp_path / "whole", OPTIONS)
    names = planted.made.copy()
    planted.made.clear()
    planted.fails = names[-1][0]
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(task, model, chexlocalize, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out/localization.parquet").exists()
    planted.fails = None
    found = run.evaluate(task, model, chexlocalize, tmp_path / "out", OPTIONS)
    assert planted.made == names and found == whole
    run.evaluate(task, model, chexlocalize, tmp_path / "out", OPTIONS)
    assert planted.made == names  # nothing is made again
    # Fewer images are some of the same, another method none of them.
    fewer = replace(OPTIONS, explain_images=2)
    found = run.evaluate(task, model, chexlocalize, tmp_path / "out", fewer)
    assert planted.made == names and found["localization"]["images"] == 2
    other = replace(fewer, explain="rollout")
    assert run.evaluate(task, model, chexlocalize, tmp_path / "out", other)["localization"]
    assert len(planted.made) > len(names)
    # Without maps the file of those before stays, and belongs to no result.
    plain = run.evaluate(task, model, chexlocalize, tmp_path / "out", EvaluateOptions(resamples=20))
    assert plain["localization"] is None


def test_sizes_that_do_not_fit_are_error_rows(
    chexlocalize, model, planted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("medsiglip_jax.cli.evaluate._model", lambda args, recorded: model)
    picture(chexlocalize / "CheXpert/test/patient64742/study1/view1_frontal.jpg", size=SIZE // 2)
    write(tmp_path / "two.json", json.dumps(two_findings()))
    command = [
        "evaluate", "--task", str(tmp_path / "two.json"), "--model", "x", "--data",
        str(chexlocalize), "--output", str(tmp_path / "out"), "--resamples", "20", "--explain",
        "occlusion",
    ]  # fmt: skip
    assert cli.main([*command, "--json"]) == 3
    out, err = capsys.readouterr()
    assert "4 maps of 3 images to make by occlusion" in err
    assert "1 maps could not be measured; localization.parquet has the reasons" in err
    found = json.loads(out)["localization"]
    reason = "the region is of an image of 12 x 12 pixels, and this one has 6 x 6"
    assert found["errors"] == 1 and found["reasons"] == [{"reason": reason, "maps": 1}]
    assert [row["images"] for row in found["classes"]] == [2, 1]
    rows = pq.read_table(tmp_path / "out/localization.parquet").to_pylist()
    assert rows[-1]["error"] == reason and rows[-1]["hit"] is None
    assert cli.main(["evaluate", "--from", str(tmp_path / "out")]) == 3
    out = capsys.readouterr().out
    assert "hit rate" in out and out.strip().endswith("report.html")
    assert reason in (tmp_path / "out/report.md").read_text()
    assert cli.main(["evaluate", "--from", str(tmp_path / "out"), "--explain", "ig"]) == 2
    assert "--explain, which needs the whole evaluation again" in capsys.readouterr().err


def test_what_cannot_be_measured_fails_before_the_model_is_loaded(chexlocalize, tmp_path):
    def never():
        raise AssertionError("the model was loaded")

    def evaluate(name, data=chexlocalize, **options):
        given = replace(OPTIONS, **options)
        run.evaluate(tasks.read(name), never, data, tmp_path / "out", given)

    with pytest.raises(ValueError, match="no map of the maximum over prompts"):
        evaluate("chexpert-test", over_prompts="max")
    file = chexlocalize / "CheXlocalize/gt_segmentations_test.json"
    text = file.read_text()
    write(file, text.replace("patient", "person"))
    with pytest.raises(ValueError, match="none of its 4 images, such as person64741_.*CheXpert/"):
        evaluate("chexpert-test")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no gt_segmentations_test.json or .*; get CheX"):
        evaluate("chexpert-test")
    write(tmp_path / "nih/l.csv", "image,patient,Edema,Mass\na.png,1,1,0\n")
    picture(tmp_path / "nih/a.png")
    write(tmp_path / "plain.json", json.dumps(PLAIN))
    with pytest.raises(ValueError, match="--explain measures .* and task plain names none"):
        evaluate(str(tmp_path / "plain.json"), tmp_path / "nih")
    for wrong, say in {
        "explain_images is 0": {"explain_images": 0},
        "method is 'lime'": {"explain": "lime"},
        "together with --explain": {"explain": "", "explain_images": 3},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            replace(OPTIONS, **say)


PLAIN = {key: value for key, value in content("rsna-pneumonia").items() if key != "regions"} | {
    "data": {"adapter": "csv", "tables": [{"file": ["l.csv"]}], "images": {"path": ["{image}"]}},
    "classes": [{"name": "Edema", "present": ["a"], "absent": ["b"]}],
}


# ------------------------------------------------------------------------------------ real maps


@pytest.mark.parametrize("rule", ["pos_minus_neg", "pair_softmax", "cosine", "class_softmax"])
@pytest.mark.parametrize("over", ["embedding", "mean"])
def test_what_is_explained_is_what_images_are_ranked_by(model, rule, over):
    groups = [["photo of a a", "photo of a b"], ["scan of a c"], ["drawing of a d"]]
    absent = [["scan of a b"], ["photo of a d", "scan of a a"], ["scan of a f"]]
    task = replace(task_of(BOXES, ("Edema", "Mass", "Nodule")), score=rule)
    pairs = zero_shot.RULES[rule].pairs
    prompts = zero_shot.class_prompts(model, groups, over)
    others = zero_shot.class_prompts(model, absent, over) if pairs else None
    factor = zero_shot.factor(model, "logit_scale")
    zimg = np.random.default_rng(0).normal(size=(5, model.config.embed_dim)).astype(np.float32)
    values = zero_shot.score(rule, zimg, prompts, others, factor)
    want = {"class_softmax": special.logit, "pair_softmax": np.array}.get(
        rule, lambda x: factor * x
    )
    targets = localization.targets_of_prompts(model, task, prompts, others, factor)
    got = np.stack([targets[c.name].logits(zimg) for c in task.classes], axis=1)
    np.testing.assert_allclose(got, want(values), rtol=2e-5, atol=2e-5 * factor)


def test_a_classifiers_own_label_is_explained(model, planted, tmp_path):
    own = ClassifierConfig(("mass", "edema"), "map", True, preprocess="serving")
    config = ModelConfig(model.config.vision, None, own)
    head = {"kernel": np.ones((config.embed_dim, 2), np.float32), "bias": np.zeros(2, np.float32)}
    classifier = Model({"img": model.params["img"], "classifier": head}, config)
    write(tmp_path / "l.csv", "image,patient,Edema,Mass\na.png,1,1,0\nb.png,2,0,1\n")
    write(tmp_path / "b.csv", "image,x,y,w,h\na.png,0,0,12,6\n")
    for name in "ab":
        picture(tmp_path / f"{name}.png", size=SIZE)
    found = run.evaluate(task_of(BOXES), classifier, tmp_path, tmp_path / "out", OPTIONS)
    assert planted.made == [("a.png", "edema")]
    assert found["provenance"]["preprocess"] == "serving"
    assert [row["class"] for row in found["localization"]["classes"]] == ["Edema"]


def test_maps_of_a_model_end_to_end(model, tmp_path):
    """Of an image, a DICOM file that is not square, on the pixels of each, and a broken file."""
    write(tmp_path / "l.csv", "image,patient,Edema,Mass\na.png,1,1,0\nb.dcm,1,1,1\nc.png,2,0,0\n")
    write(tmp_path / "c.png", "broken")
    write(tmp_path / "b.csv", "image,x,y,w,h\na.png,0,0,20,10\nb,20,3,1,1\nc.png,0,0,1,1\n")
    picture(tmp_path / "a.png", size=20)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 30), np.uint8)
    (tmp_path / "b.dcm").write_bytes(dicom_of(pixels))
    options = EvaluateOptions(resamples=20, explain="rollout", preprocess="serving")
    options = replace(options, allow_missing=True)
    found = run.evaluate(task_of(BOXES), model, tmp_path, tmp_path / "out", options)
    measured = found["localization"]
    assert [row["class"] for row in measured["classes"]] == ["Edema"]
    assert measured["maps"] == 2 and measured["classes"][0]["miou"] is None
    *rows, broken = pq.read_table(tmp_path / "out/localization.parquet").to_pylist()
    assert broken["id"] == "c.png" and broken["error"] and "c.png" not in broken["error"]
    assert measured["reasons"] == [{"reason": broken["error"], "maps": 1}]
    assert [row["chance"] for row in rows] == [0.5, 1 / 300]
    assert [row["iou"] for row in rows] == [None, None]
    path = tmp_path / "a.png"
    [made] = explain(model, [path], "photo of a a", method="rollout", preprocess="serving")
    assert rows[0]["hit"] == (maps.peak(made.map)[0] < 10)
