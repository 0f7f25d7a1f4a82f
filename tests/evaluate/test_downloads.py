"""Data sets as people download and unpack them: folders in folders, other names, other roots."""

import json
import shutil

import numpy as np
import pytest
from miniatures import content, part, picture, read, shown, write

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.data import reading, splits
from medsiglip_jax.evaluate.data.dataset import Dataset

NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position\n"
ROWS = "00000013_005.png,Mass,5,13,060Y,M,PA\n00000014_000.png,No Finding,0,14,20,F,AP\n"


def said():
    return pytest.warns(UserWarning, match="the only folder below --data that fits")


@pytest.mark.parametrize("folder", [
    "images_001/images", "images", ".", "images/images", "images-224/images-224",
])  # fmt: skip
@pytest.mark.parametrize("table", [
    "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "Data_Entry_2017_v2020.csv.gz",
])  # fmt: skip
def test_nih(tmp_path, folder, table):
    write(tmp_path / table, NIH + ROWS)
    write(tmp_path / "test_list.txt", "00000013_005.png\n00000014_000.png\n")
    for row in ROWS.splitlines():
        picture(tmp_path / folder / row.split(",")[0])
    rows, found = read("nih-cxr14", tmp_path)
    assert list(shown(rows).values()) == [{"Mass"}, set()] and found.groups == ["13", "14"]


def test_of_two_versions_of_a_table_the_later_is_read(tmp_path):
    write(tmp_path / "Data_Entry_2017.csv", NIH + ROWS.replace("Mass", "Nodule"))
    write(tmp_path / "Data_Entry_2017_v2020.csv", NIH + ROWS)
    write(tmp_path / "test_list.txt", "00000013_005.png\n")
    picture(tmp_path / "images/00000013_005.png")
    assert shown(read("nih-cxr14", tmp_path)[0]) == {"images/00000013_005.png": {"Mass"}}


def test_nih_patients_are_in_the_file_names_where_the_table_has_none(tmp_path):
    names = ["00000013_005.png", "00000013_006.png", "00000114_000.png", "renamed.png"]
    rows = "".join(f"{name},Mass\n" for name in names)
    write(tmp_path / "Data_Entry_2017.csv", f"Image Index,Finding Labels\n{rows}")
    write(tmp_path / "test_list.txt", "\n".join(names))
    for name in names:
        picture(tmp_path / "images" / name)
    _, found = read("nih-cxr14", tmp_path)
    assert found.groups == ["13", "13", "114", "image images/renamed.png"]
    rows = "".join(f"{name},Mass,{'' if i else 7}\n" for i, name in enumerate(names))
    write(tmp_path / "Data_Entry_2017.csv", f"Image Index,Finding Labels,Patient ID\n{rows}")
    assert read("nih-cxr14", tmp_path)[1].groups[:3] == ["7", "13", "114"]


def test_a_task_with_a_column_of_patients_needs_one_of_them(tmp_path):
    write(tmp_path / "labels.csv", "image,label,b\nx.png,Acne,p\ny.png,Cyst,\n")
    for name in "xy":
        picture(tmp_path / f"{name}.png")
    own = content("derm-79")
    own["data"] |= {"group": ["a", "b"], "group_optional": False}
    groups = reading.read(tasks.parse("mine", own), tmp_path)[1].groups
    assert groups == ["p", "image y.png"]
    own["data"]["group"] = ["a", "c"]
    with pytest.raises(ValueError, match="no column 'a'; there are image, label, b"):
        reading.read(tasks.parse("mine", own), tmp_path)
    own["data"]["group_optional"] = True
    assert reading.read(tasks.parse("mine", own), tmp_path)[1].groups is None


FINDINGS = [c["name"] for c in content("chexpert-test")["classes"]]


def localize(folder, prefix):
    """CheXlocalize: one row for each image, lateral ones too."""
    header, edema = (
        f"Path,{','.join(FINDINGS)}\n",
        ",".join(str(int(n == "Edema")) for n in FINDINGS),
    )
    for name, patient in (("test", 64741), ("val", 64541)):
        study = f"patient{patient}/study1"
        views = "view1_frontal.jpg", "view2_lateral.jpg"
        rows = [f"{prefix}{name}/{study}/{view},{edema}\n" for view in views]
        write(folder / f"{name}_labels.csv", header + "".join(rows))


@pytest.mark.parametrize("tables", [".", "CheXpert"])
@pytest.mark.parametrize("prefix", ["", "CheXpert/", "CheXpert-v1.0/"])
def test_chexlocalize(tmp_path, tables, prefix):
    localize(tmp_path / tables, prefix)
    for name, patient in (("test", 64741), ("val", 64541)):
        for view in ("view1_frontal.jpg", "view2_lateral.jpg"):
            picture(tmp_path / f"CheXpert/{name}/patient{patient}/study1/{view}")
    given = [tmp_path] if tables == "." else [tmp_path, tmp_path / "CheXpert"]
    for data in given:
        rows, found = read("chexpert-test", data)
        assert list(shown(rows).values()) == [{"Edema"}] and found.groups == ["patient64741"]
        rows, found = part("chexpert-test", "validation", data)
        assert list(rows.values()) == [{"Edema"}] and found.groups == ["patient64541"]


@pytest.mark.parametrize("folder", [
    "images/imgs_part_1", "images/imgs_part_1/imgs_part_1", "imgs_part_1", "images",
    "imgs_part_1/imgs_part_1",
])  # fmt: skip
def test_pad_ufes(tmp_path, folder):
    header = "patient_id,lesion_id,age,gender,fitspatrick,diagnostic,img_id\n"
    write(
        tmp_path / "metadata.csv", header + "PAT_1516,1765,8,FEMALE,3.0,NEV,PAT_1516_1765_530.png\n"
    )
    picture(tmp_path / folder / "PAT_1516_1765_530.png")
    assert list(shown(read("pad-ufes-20", tmp_path)[0]).values()) == [{"Melanocytic Nevus"}]


@pytest.mark.parametrize("task, table, folders", [
    ("isic-2019", "ISIC_2019_Training", [
        "ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input", ".",
    ]),
    ("ham10000", "HAM10000", ["HAM10000_images_part_1", "HAM10000_images", ".", "images/part_1"]),
    ("aptos-2019", "train.csv", ["train_images", "train_images/train_images"]),
])  # fmt: skip
def test_images_may_lie_in_any_folder(tmp_path, task, table, folders):
    for folder in folders:
        if task == "isic-2019":
            header = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
            write(tmp_path / f"{table}_GroundTruth.csv", header + "ISIC_1,1,0,0,0,0,0,0,0,0\n")
            write(tmp_path / f"{table}_Metadata.csv", "image,lesion_id\nISIC_1,\n")
        elif task == "ham10000":
            write(tmp_path / f"{table}_metadata.csv", "lesion_id,image_id,dx\nHAM_1,ISIC_1,mel\n")
        else:
            write(tmp_path / table, "id_code,diagnosis\nISIC_1,0\n")
        suffix = "png" if task == "aptos-2019" else "jpg"
        picture(tmp_path / folder / f"ISIC_1.{suffix}")
        (name,) = read(task, tmp_path)[0]
        assert (tmp_path / name).is_file()
        (tmp_path / name).unlink()


def scin(folder):
    yes = "DEFAULT_YES_IMAGE_QUALITY_SUFFICIENT"
    header = (
        "dermatologist_gradable_for_skin_condition_1,dermatologist_skin_condition_on_label_name"
    )
    rows = f"-1,{yes},['Eczema']\n-2,{yes},[]\n"
    write(folder / "scin_labels.csv", f"case_id,{header}\n{rows}")
    write(folder / "scin_cases.csv",
          "case_id,image_1_path,image_2_path,image_3_path\n-1,dataset/images/1.png,,\n"
          "-2,dataset/images/2.png,,\n")  # fmt: skip
    picture(folder / "images/1.png")
    picture(folder / "images/2.png")


def test_scin_at_its_folder_or_above(tmp_path):
    scin(tmp_path / "dataset")
    rows, _ = read("scin", tmp_path)
    assert shown(rows) == {"dataset/images/1.png": {"Eczema"}}
    rows, _ = read("scin", tmp_path / "dataset")
    assert shown(rows) == {"images/1.png": {"Eczema"}}


@pytest.mark.parametrize("blank, images", [("ignore", 1), ("negative", 2)])
def test_scin_cases_without_a_condition_are_negatives_if_asked(tmp_path, blank, images):
    """As in the official notebook, where rows without any of the ten conditions stay."""
    scin(tmp_path / "dataset")
    rows, found = read("scin", tmp_path, policy=Policy(blank=blank))
    assert len(rows) == images and found.counts["unlabelled"] == 2 - images
    assert list(shown(rows).values()) == [{"Eczema"}, set()][:images]
    assert all(len(row) == 10 for row in rows.values())
    assert any("--blank negative keeps them" in note for note in tasks.read("scin").notes)


# ------------------------------------------------------------------------------- the folder above


def aptos(folder, grade=0):
    write(folder / "train.csv", f"id_code,diagnosis\na,{grade}\n")
    picture(folder / "train_images/a.png")


def test_the_only_folder_that_fits_is_read_and_said(tmp_path):
    aptos(tmp_path / "aptos")
    aptos(tmp_path / ".hidden")
    write(tmp_path / "other/test.csv", "x\n")
    with said():
        rows, found = read("aptos-2019", tmp_path)
    assert shown(rows) == {"train_images/a.png": {"No"}}  # the ids do not depend on it
    assert found.notes == ["The data was read from aptos/, the only folder below --data that fits."]
    assert read("aptos-2019", tmp_path / "aptos")[1].notes == []
    shutil.rmtree(tmp_path / "aptos")
    aptos(tmp_path, grade=4)
    assert list(shown(read("aptos-2019", tmp_path)[0]).values()) == [{"Proliferative"}]


def test_two_folders_that_fit_are_refused(tmp_path):
    aptos(tmp_path / "one")
    aptos(tmp_path / "two")
    with pytest.raises(
        ValueError, match="APTOS.* is in several folders: one, two; pass one of the"
    ):
        read("aptos-2019", tmp_path)


def test_class_folders_and_arrays_below(tmp_path):
    for c in content("crc-val-he-7k")["classes"]:
        picture(tmp_path / "zenodo/CRC-VAL-HE-7K" / c["value"] / "1.tif")
    with said():
        rows, _ = read("crc-val-he-7k", tmp_path)
    assert list(rows)[0] == "CRC-VAL-HE-7K/ADI/1.tif"
    arrays = {"test_images": np.zeros((2, 28, 28), np.uint8), "test_labels": np.eye(2, 14)}
    (tmp_path / "medmnist").mkdir()
    np.savez(tmp_path / "medmnist/chestmnist_64.npz", **arrays)
    with said():
        assert len(read("chestmnist", tmp_path)[0]) == 2


def test_parts_are_found_in_the_folder_below_too(tmp_path):
    localize(tmp_path / "stanford/CheXpert", "")
    for name, patient in (("test", 64741), ("val", 64541)):
        picture(tmp_path / f"stanford/CheXpert/{name}/patient{patient}/study1/view1_frontal.jpg")
    with said():
        _, parts = splits.read(tasks.read("chexpert-test"), tmp_path, wanted=["validation"])
    assert len(parts.test) == len(parts.validation) == 1


# ---------------------------------------------------------------------------------------- readers


def vindr(folder):
    """Three readers for each of three training images; two test images."""
    header = "Aortic enlargement,Other disease{},No finding\n"
    write(folder / "annotations/image_labels_test.csv",
          "image_id," + header.format("") + "t1,1,0,0\nt2,0,1,0\n")  # fmt: skip
    votes = {"a": ((1, 0), (1, 1), (0, 0)), "b": ((0, 1), (0, 1), (0, 1)), "c": ((0, 0),) * 3}
    rows = [
        f"{i},R{r},{x},{y},0\n" for i, readers in votes.items() for r, (x, y) in enumerate(readers)
    ]
    write(folder / "annotations/image_labels_train.csv",
          "image_id,rad_id," + header.format("s") + "".join(rows))  # fmt: skip
    for name in ("test/t1", "test/t2", "train/a", "train/b", "train/c"):
        picture(folder / f"{name}.png")


def test_vindr_has_the_majority_of_three_readers(tmp_path):
    vindr(tmp_path)
    _, parts = splits.read(tasks.read("vindr-cxr"), tmp_path, wanted=["train"])
    found = parts.train
    assert found.ids == ["train/a.png", "train/b.png", "train/c.png"]
    assert found.values == ("Aortic enlargement", "Other disease")
    assert found.labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert found.counts["labels on which readers differ"] == 2
    assert found.counts["labels without a majority"] == found.counts["conflicting"] == 0
    _, parts = splits.read(tasks.read("vindr-cxr"), tmp_path)
    assert parts.origin == "validation drawn by image from train, seed 0"


def test_a_majority_is_more_than_half_of_those_who_know():
    nan = np.nan
    labels = np.array([[1, 1, nan, 0], [0, 1, nan, nan], [1, 0, 0, nan], [0, nan, 1, nan]])
    found = Dataset(list("xyxy"), list("xyxy"), labels.astype(np.float32), tuple("abcd"))
    merged = found.by_majority(exclusive=False)
    assert merged.ids == ["x", "y"]
    np.testing.assert_array_equal(merged.labels, [[1, nan, 0, 0], [0, 1, 1, nan]])
    assert merged.counts["labels without a majority"] == 1
    one_hot = np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 1, 2]]
    found = Dataset(list("xxxyyy"), list("xxxyyy"), one_hot, tuple("abc"))
    merged = found.by_majority(exclusive=True)
    np.testing.assert_array_equal(merged.labels, [[1, 0, 0], [nan] * 3])


def test_readers_are_named_in_the_task():
    own = json.loads(json.dumps(content("vindr-cxr")))
    own["parts"]["train"]["readers"] = "mean"
    with pytest.raises(ValueError, match="readers is 'mean'; expected one of"):
        tasks.parse("mine", own)
