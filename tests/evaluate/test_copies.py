"""No image counts twice: copies of files, of pixels and of pictures, in a part and across parts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from miniatures import content, part, picture, read, write
from PIL import Image
from pyarrow import parquet

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.evaluate import near_copies, run, tasks
from medsiglip_jax.evaluate.data import copies, splits
from medsiglip_jax.evaluate.options import Draws, EvaluateOptions
from medsiglip_jax.model import api, config
from medsiglip_jax.model.processor import tokenizer_path


@pytest.fixture
def doubled(tmp_path):
    """Three images, each also in half its size."""
    rows = "".join(f"{i}.png,12,{i % 2}\n" for i in range(3))
    write(tmp_path / "ddi_metadata.csv", f"DDI_file,skin_tone,malignant\n{rows}")
    for i in range(3):
        picture(tmp_path / f"images/{i}.png", size=16)
        picture(tmp_path / f"images_8/{i}.png", size=8)
    return tmp_path


def test_an_image_with_several_files_is_refused_with_them(doubled):
    with pytest.raises(ValueError) as caught:
        read("ddi", doubled)
    message = str(caught.value)
    assert f"{doubled}: 3 images have several files" in message and "\n" not in message
    assert "images/0.png and images_8/0.png; images/1.png and images_8/1.png; " in message
    assert "--prefer largest" in message and "…" not in message
    for i in range(3, 5):
        picture(doubled / f"images/{i}.png")
        picture(doubled / f"images_8/{i}.png")
    read_table = (doubled / "ddi_metadata.csv").read_text()
    write(doubled / "ddi_metadata.csv", read_table + "3.png,12,0\n4.png,12,0\n")
    with pytest.raises(ValueError, match=r"5 images have .* images_8/2.png; …\. --prefer"):
        read("ddi", doubled)


def test_a_file_that_no_row_names_is_no_copy(doubled):
    picture(doubled / "images/9.png")
    picture(doubled / "images_8/9.png")
    _, found = read("ddi", doubled, prefer="largest")
    assert found.counts["images without a label"] == 2


@pytest.mark.parametrize("prefer, folder", [
    ("largest", "images"), ("images", "images"), ("images_8/", "images_8"), ("./images", "images"),
])  # fmt: skip
def test_a_rule_chooses_and_is_counted(doubled, prefer, folder):
    _, found = read("ddi", doubled, prefer=prefer)
    assert found.ids == [f"{folder}/{i}.png" for i in range(3)]
    assert found.counts[f"copies not read (--prefer {prefer})"] == 3


def test_largest_means_pixels_not_bytes(doubled):
    for i in range(3):
        Image.new("RGB", (40, 40)).save(doubled / f"images/{i}.png")  # 100 bytes
        assert (doubled / f"images/{i}.png").stat().st_size < (
            doubled / f"images_8/{i}.png"
        ).stat().st_size
    assert read("ddi", doubled, prefer="largest")[1].ids[0] == "images/0.png"


def test_what_a_rule_does_not_decide_is_refused(doubled):
    picture(doubled / "images_8/1.png", size=16)
    with pytest.raises(ValueError, match="1 images have .* --prefer largest does not choose"):
        read("ddi", doubled, prefer="largest")
    (doubled / "empty").mkdir()
    with pytest.raises(ValueError, match="3 images have .* --prefer empty does not choose"):
        read("ddi", doubled, prefer="empty")
    picture(doubled / "images/deeper/0.png")
    with pytest.raises(ValueError, match="1 images have several .*images/deeper/0.png"):
        read("ddi", doubled, prefer="images")
    with pytest.raises(ValueError, match="--prefer gone: neither 'largest' nor a folder below"):
        read("ddi", doubled, prefer="gone")
    with pytest.raises(ValueError, match="leads out of"):
        read("ddi", doubled, prefer="../x")


def test_of_files_with_the_same_bytes_any_is_the_largest(doubled):
    shutil.copy(doubled / "images/1.png", doubled / "images_8/1.png")
    assert read("ddi", doubled, prefer="largest")[1].ids[1] == "images/1.png"


def test_a_damaged_file_is_not_the_largest(doubled):
    (doubled / "images/2.png").write_bytes(b"damaged")
    assert read("ddi", doubled, prefer="largest")[1].ids[2] == "images_8/2.png"


def test_copies_in_a_class_folder_differ_in_their_suffix(tmp_path):
    own = content("crc-val-he-7k") | {"parts": {}}
    for c in own["classes"]:
        for name in ("a/1", "b/1"):  # two patients
            picture(tmp_path / c["value"] / f"{name}.png", size=8)
    task = tasks.parse("mine", own)
    assert len(splits.read(task, tmp_path, wanted=[])[1].whole) == 18
    picture(tmp_path / "TUM/b/1.jpg", size=4)
    with pytest.raises(ValueError, match="1 images have several files.* TUM/b/1.jpg and TUM/b/1.p"):
        splits.read(task, tmp_path, wanted=[])
    whole = splits.read(task, tmp_path, wanted=[], prefer="largest")[1].whole
    assert len(whole) == 18 and whole.counts["copies not read (--prefer largest)"] == 1
    assert whole.ids[-1] == "TUM/b/1.png" and whole.labels[-1, -1] == 1


def test_a_row_with_several_images_has_one_file_for_each_name(tmp_path):
    findings = [c["name"] for c in content("chexpert-test")["classes"]]
    row = "test/patient1/study1" + ",0" * len(findings)
    write(tmp_path / "groundtruth.csv", f"Study,{','.join(findings)}\n{row}\n")
    for view in (1, 2):
        picture(tmp_path / f"CheXpert/test/patient1/study1/view{view}_frontal.jpg")
    assert len(read("chexpert-test", tmp_path)[0]) == 2
    picture(tmp_path / "CheXpert-small/test/patient1/study1/view2_frontal.jpg")
    with pytest.raises(ValueError, match="1 images have several files.*CheXpert-small/test.*view2"):
        read("chexpert-test", tmp_path)
    rows, _ = read("chexpert-test", tmp_path, prefer="CheXpert")
    assert sorted(rows) == [f"CheXpert/test/patient1/study1/view{i}_frontal.jpg" for i in (1, 2)]


def test_several_is_of_images_that_are_found_by_a_pattern():
    own = content("ddi")
    own["data"]["images"]["several"] = True
    with pytest.raises(ValueError, match="several is of images that are found with parse"):
        tasks.parse("mine", own)


def test_identical_files_are_found_by_size_then_bytes(tmp_path):
    rng, names = np.random.default_rng(0), {}
    base = rng.bytes(9000)
    for name, data in {
        "a": base, "b": base, "shorter": base[1:], "start": b"x" + base[1:], "c": base,
        "end": base[:-1] + b"x", "e1": b"", "e2": b"", "alone": b"1",
    }.items():  # fmt: skip
        names[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(data)
    remote = ["memory://a", "memory://b", str(tmp_path / "gone")]
    found = copies.identical([*names.values(), *remote, names["a"]])
    assert found == [[names[n] for n in "abc"], [names["e1"], names["e2"]]]


# ------------------------------------------------------------------------------------------ parts

TASK = {
    "title": "Two parts", "kind": "multi_label", "score": "pos_minus_neg",
    "data": {
        "adapter": "csv", "tables": [{"file": ["t.csv"]}], "images": {"path": ["{image}"]},
        "where": {"split": ["test"]}, "group": "patient",
    },
    "parts": {name: {"where": {"split": [name]}} for name in ("train", "validation")},
    "classes": [{"name": "Alpha", "present": ["photo of a a"], "absent": ["scan of a a"]}],
}  # fmt: skip
QUICK = EvaluateOptions(resamples=20, learn="thresholds")


@pytest.fixture
def parts(tmp_path):
    """48 images of as many patients, 16 to a part."""
    names = [f"{i}.png" for i in range(48)]
    split = ["train", "validation", "test"] * 16
    rows = [f"{n},p{i},{split[i]},{i // 3 % 2}\n" for i, n in enumerate(names)]
    write(tmp_path / "t.csv", "image,patient,split,Alpha\n" + "".join(rows))
    for name in names:
        picture(tmp_path / name, size=32)
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    return tmp_path


def evaluated(folder, model, task=None, **changes):
    task = tasks.parse("mine", TASK if task is None else task)
    return run.evaluate(task, model, folder, folder / "out", replace(QUICK, **changes))


def test_files_with_the_same_bytes_in_two_parts_are_refused(parts):
    shutil.copy(parts / "0.png", parts / "2.png")
    shutil.copy(parts / "1.png", parts / "5.png")
    shutil.copy(parts / "1.png", parts / "8.png")
    with pytest.raises(ValueError) as caught:
        part(tasks.parse("mine", TASK), "train", parts)
    assert str(caught.value).endswith(
        "; train and test share 1 files with the same bytes: 0.png = 2.png"
    )
    with pytest.raises(ValueError, match="validation and test share 1 files .*: 1.png = 5.png$"):
        splits.read(tasks.parse("mine", TASK), parts)
    _, found = splits.read(tasks.parse("mine", TASK), parts, allow_leaks=True)
    shared = [("train", "test"), ("validation", "test")]
    assert [leak.parts for leak in found.leaks if leak.refused] == shared
    assert [(leak.parts, len(leak.found)) for leak in found.leaks[2:]] == [(("test", "test"), 1)]


def test_shared_patients_go_on_where_leaks_are_allowed(parts):
    write(parts / "t.csv", (parts / "t.csv").read_text().replace("2.png,p2,", "2.png,p0,"))
    with pytest.raises(ValueError, match=r"share 1 groups \(patients\): p0$"):
        splits.read(tasks.parse("mine", TASK), parts)
    _, found = splits.read(tasks.parse("mine", TASK), parts, allow_leaks=True)
    assert [str(leak) for leak in found.leaks] == ["train and test share 1 groups (patients): p0"]


def again(source, target, how):
    pixels = np.array(Image.open(source))
    pixels[0, 0] ^= how == "touched"
    Image.fromarray(pixels).save(target, compress_level=0)


@pytest.mark.parametrize("how", ["pixels", "touched"])
def test_copies_with_other_bytes_in_two_parts_are_refused(parts, model, how):
    again(parts / "1.png", parts / "2.png", how)
    what = "images with the same pixels" if how == "pixels" else "images that were saved again"
    with pytest.raises(ValueError, match=f"validation and test share 1 {what}: 1.png = 2.png$"):
        evaluated(parts, model)
    assert not (parts / "out/scores.parquet").exists()
    with pytest.warns(UserWarning, match=f"validation and test share 1 {what}: 1.png = 2.png"):
        results = evaluated(parts, model, allow_leaks=True)
    (leak,) = results["leaks"]
    assert (leak["parts"], leak["found"], leak["refused"]) == (
        ["validation", "test"], [["1.png", "2.png"]], True
    )  # fmt: skip
    for name in ("report.md", "report.html"):
        text = (parts / "out" / name).read_text()  # without names: it goes to others
        assert f"Validation and test share 1 {what}." in text and "2.png" not in text


def test_images_in_one_table_are_compared(parts, model):
    """A shard or a table of pictures is no volume: its images are of different patients."""
    rows = [line.split(",") for line in (parts / "t.csv").read_text().splitlines()[1:]]
    rows[2][0] = rows[1][0]
    columns = {
        name: [row[i] for row in rows] for i, name in ((1, "patient"), (2, "split"), (3, "Alpha"))
    }
    columns["image"] = [(parts / row[0]).read_bytes() for row in rows]
    parquet.write_table(pa.table(columns), parts / "t.parquet")
    task = json.loads(json.dumps(TASK).replace("t.csv", "t.parquet"))
    with pytest.raises(
        ValueError, match="validation and test share 1 images with the same pixels: t"
    ):
        evaluated(parts, model, task)


def test_copies_of_one_patient_are_not_compared(parts, model):
    again(parts / "2.png", parts / "5.png", "pixels")
    write(parts / "t.csv", (parts / "t.csv").read_text().replace("5.png,p5,", "5.png,p2,"))
    assert evaluated(parts, model, learn="")["leaks"] == []


def test_copies_within_the_test_are_told(parts, model):
    again(parts / "2.png", parts / "5.png", "pixels")
    shutil.copy(parts / "8.png", parts / "11.png")
    with pytest.warns(UserWarning) as caught:
        results = evaluated(parts, model, learn="")
    bytes_, pixels = results["leaks"]
    assert (bytes_["found"], pixels["found"]) == ([["8.png", "11.png"]], [["2.png", "5.png"]])
    assert not bytes_["refused"] and not pixels["refused"]
    pairs = "among the test images are 1 pairs of"
    assert f"{pairs} files with the same bytes: 8.png = 11.png" in str(caught[0])
    report = (parts / "out/report.md").read_text()
    assert f"A{pairs[1:]} images with the same pixels." in report


def test_slices_of_one_volume_are_not_copies(parts, model, tmp_path):
    frames = [Image.open(parts / f"{i}.png") for i in (0, 0, 0, 0)]
    frames[0].save(parts / "v.tif", save_all=True, append_images=frames[1:])
    table = (parts / "t.csv").read_text()
    for i, name in enumerate(("2.png", "5.png", "8.png")):
        table = table.replace(f"\n{name},", f"\nv.tif#frame={i + 1},")
    write(parts / "t.csv", table.replace("\n1.png,", "\nv.tif#frame=0,"))
    assert evaluated(parts, model)["leaks"] == []


def test_vectors_that_are_all_alike_prove_nothing(parts, model, monkeypatch):
    """Of a model whose vectors are nearly the same, only pictures that look the same are copies."""
    again(parts / "1.png", parts / "2.png", "touched")
    monkeypatch.setattr(near_copies, "COSINE", 0.01)
    monkeypatch.setattr(near_copies, "_MOST", 200)
    said = pytest.warns(UserWarning, match="more than 200 pairs of images have cosines above")
    with pytest.raises(ValueError) as caught, said:
        evaluated(parts, model)
    assert str(caught.value).endswith(
        "; validation and test share at least 1 images that were saved again: 1.png = 2.png"
    )


@pytest.mark.filterwarnings("default")
def test_leaks_are_a_flag(parts, model, checkpoint, capsys):
    shutil.copy(parts / "1.png", parts / "2.png")
    flags = ["evaluate", "--task", f"{parts}/task.json", "--model", str(checkpoint), "--data",
             str(parts), "--output", str(parts / "out"), "--learn", "thresholds",
             "--resamples", "20"]  # fmt: skip
    assert cli.main(flags) == 2
    assert "(--allow-leaks goes on" in capsys.readouterr().err
    assert cli.main([*flags, "--allow-leaks"]) == 0
    assert "warning: validation and test share 1 files" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- simulation


def noise(folder, seed):
    """Images of noise with labels of noise, and a larger copy of each image."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0, 1] * 60)
    rows = [f"{i}.png,12,{label}\n" for i, label in enumerate(labels)]
    write(folder / "ddi_metadata.csv", "DDI_file,skin_tone,malignant\n" + "".join(rows))
    for i in range(len(labels)):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        for size in (16, 32):
            path = folder / f"images_{size}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            image.resize((size, size), Image.Resampling.NEAREST).save(path)


@pytest.mark.slow
def test_labels_of_noise_on_a_doubled_folder_predict_nothing(tmp_path, checkpoint):
    """Counted twice, copies of training images were in the test: 0.847 (0.685 to 0.934)."""
    noise(tmp_path, 2)
    size = config.two_towers(
        image_size=28, patch_size=7, width=256, depth=1, mlp_dim=64, num_heads=2, vocab_size=22
    )  # wide enough to know each image by heart
    wide = api.Model(medsiglip_jax.init(size).params, size, tokenizer=tokenizer_path(checkpoint))
    task, output = tasks.parse("noise", content("ddi")), tmp_path / "out"
    with pytest.raises(ValueError, match="120 images have several files"):
        run.evaluate(task, wide, tmp_path, output, QUICK)
    probe = {"learn": "probe", "draws": Draws((), 1)}
    options = replace(QUICK, prefer="largest", resamples=200, **probe)
    results = run.evaluate(task, wide, tmp_path, output, options)
    (probe,) = results["probe"]["classes"]
    assert results["images"] == 120 and probe["low"] < 0.5 < probe["high"]
