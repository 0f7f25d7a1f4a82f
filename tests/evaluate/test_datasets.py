"""Every data set in miniature, with its real headers, odd spaces and folders."""

import ast
import contextlib
import dataclasses
import gzip
import json
import pkgutil
import shutil
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from miniatures import PAIRS, content, part, picture, read, shown, write
from pyarrow import parquet

from medsiglip_jax import cli
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate import run, tasks
from medsiglip_jax.evaluate.data import arrays, folders, labels, reading, splits
from medsiglip_jax.evaluate.data.arrays import pixmap
from medsiglip_jax.evaluate.data.layout import LabelColumns
from medsiglip_jax.files import limits
from medsiglip_jax.files.threads import Stalled
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.sources import read_bytes

CHEXPERT = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
    "Support Devices"
)


@pytest.fixture
def chexpert(tmp_path):
    """Two frontal images of the first study, one of the second, a lateral and a training image."""
    write(
        tmp_path / "groundtruth.csv",
        f"Study,{CHEXPERT}\n"
        "CheXpert-v1.0/test/patient64741/study1,0,0,1,1,0,0,0,0,0,0,0,0,0,1\n"
        "CheXpert-v1.0/test/patient64742/study1,1,0,0,0,0,0,0,0,0,0,0,0,0,0\n",
    )
    for name in (
        "test/patient64741/study1/view1_frontal.jpg", "test/patient64741/study1/view2_frontal.jpg",
        "test/patient64741/study1/view3_lateral.jpg", "test/patient64742/study1/view1_frontal.jpg",
        "val/patient00001/study1/view1_frontal.jpg",
    ):  # fmt: skip
        picture(tmp_path / "CheXpert" / name)
    return tmp_path


def test_chexpert_joins_frontal_images_by_patient_and_study(chexpert):
    rows, found = read("chexpert-test", chexpert)
    first, second = {"Cardiomegaly", "Lung Opacity", "Support Devices"}, set()
    assert shown(rows) == {
        "CheXpert/test/patient64741/study1/view1_frontal.jpg": first,
        "CheXpert/test/patient64741/study1/view2_frontal.jpg": first,
        "CheXpert/test/patient64742/study1/view1_frontal.jpg": second,
    }
    assert all(len(row) == 13 for row in rows.values())
    assert found.groups == ["patient64741", "patient64741", "patient64742"]
    assert found.counts["images without a label"] == 1 and found.counts["missing"] == 0
    assert read("chexpert-test", chexpert / ".")[0].keys() == rows.keys()


def test_remote_folders(chexpert):
    system = fsspec.filesystem("memory")
    for path in chexpert.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/chexpert/{path.relative_to(chexpert)}", path.read_bytes())
    try:
        assert read("chexpert-test", "memory://chexpert")[0] == read("chexpert-test", chexpert)[0]
    finally:
        system.rm("/chexpert", recursive=True)


def test_what_is_missing_is_counted(chexpert):
    (chexpert / "CheXpert/test/patient64742/study1/view1_frontal.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 missing, 2 images found: .*patient64742/study1"
    ):
        read("chexpert-test", chexpert)
    rows, found = read("chexpert-test", chexpert, allow_missing=True)
    assert len(rows) == 2 and found.counts["missing"] == 1


def test_uncertain_and_blank_labels(chexpert):
    write(
        chexpert / "groundtruth.csv",
        f"Study,{CHEXPERT}\n"
        "CheXpert/test/patient64741/study1,,,1.0,-1.0,0.0,-1,,,,,,,,\n"
        "CheXpert/test/patient64742/study1,,,,,,,,,,,,,,\n",
    )
    image = "CheXpert/test/patient64741/study1/view1_frontal.jpg"
    rows, found = read("chexpert-test", chexpert)
    assert rows[image] == {"Cardiomegaly": 1, "Lung Lesion": 0}
    assert len(rows) == 2 and found.counts["unlabelled"] == 1
    rows, _ = read("chexpert-test", chexpert, policy=Policy("positive", "negative"))
    assert shown(rows)[image] == {"Cardiomegaly", "Lung Opacity", "Edema"}
    assert all(len(row) == 13 for row in rows.values()) and len(rows) == 3
    rows, _ = read("chexpert-test", chexpert, policy=Policy("negative"))
    assert rows[image] == {"Cardiomegaly": 1, "Lung Lesion": 0, "Lung Opacity": 0, "Edema": 0}


@pytest.fixture
def chexpert_parts(chexpert):
    """Its training and validation images, with the prefix of the small version in their tables."""
    header = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT}\n"
    small = "CheXpert-v1.0-small"
    write(
        chexpert / "CheXpert/train.csv",
        header
        + f"{small}/train/patient00010/study2/view1_frontal.jpg,Female,68,Frontal,AP"
        + ",,,1.0,-1.0,,,,,,0.0,,,,1.0\n"
        f"{small}/train/patient00010/study2/view2_lateral.jpg,Female,68,Lateral,"
        + ",,,1.0,,,,,,,,,,,\n"
        f"{small}/train/patient00011/study1/view1_frontal.jpg,Male,9,Frontal,PA"
        + ",1.0,,,,,,,,,,,,,\n",
    )
    write(
        chexpert / "CheXpert/valid.csv",
        header
        + f"{small}/valid/patient00001/study1/view1_frontal.jpg,Male,73,Frontal,AP"
        + ",0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
        f"{small}/valid/patient00001/study1/view2_lateral.jpg,Male,73,Lateral,"
        + ",0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
    )
    for name in (
        "patient00010/study2/view1_frontal.jpg", "patient00010/study2/view2_lateral.jpg",
        "patient00011/study1/view1_frontal.jpg",
    ):  # fmt: skip
        picture(chexpert / "CheXpert/train" / name)
    return chexpert


def test_chexpert_parts_are_frontal_images_of_any_prefix(chexpert_parts):
    rows, found = part("chexpert-test", "validation", chexpert_parts)
    image = "CheXpert/val/patient00001/study1/view1_frontal.jpg"
    assert rows == {image: {"Enlarged Cardiomediastinum"}} and not np.isnan(found.labels).any()
    assert found.attributes == {"sex": ["Male"], "age": ["73"], "view": ["AP"]}
    _, found = part("chexpert-test", "train", chexpert_parts)
    assert found.ids == ["CheXpert/train/patient00010/study2/view1_frontal.jpg"]
    assert found.groups == ["patient00010"] and found.counts["unlabelled"] == 1
    assert np.isnan(found.labels).sum() == 10  # 1 positive, 1 negative, 1 device; -1 is unknown
    rows, _ = part("chexpert-test", "train", chexpert_parts, policy=Policy("negative", "negative"))
    assert list(rows.values()) == [{"Cardiomegaly", "Support Devices"}, set()]
    assert len(read("chexpert-test", chexpert_parts)[0]) == 3  # the test is what it was


def test_a_patient_of_the_test_in_training_is_refused(chexpert_parts):
    table = chexpert_parts / "CheXpert/train.csv"
    write(table, table.read_text().replace("train/patient00010/study2", "test/patient64741/study1"))
    (chexpert_parts / "CheXpert/test/patient64741/study1/view2_frontal.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"train and test share 1 groups \(patients\): patient64741; train and test share 1 "
        "images: .*view1_frontal.jpg$",
    ):
        part("chexpert-test", "train", chexpert_parts)


def test_what_is_missing_of_a_part_is_said_of_it(chexpert_parts):
    (chexpert_parts / "CheXpert/train/patient00011/study1/view1_frontal.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 missing, 1 images found"):
        part("chexpert-test", "train", chexpert_parts)
    _, found = part("chexpert-test", "train", chexpert_parts, allow_missing=True)
    assert found.counts["missing"] == 1
    (chexpert_parts / "CheXpert/train.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no train.csv or .*; get .*, part train from: "):
        part("chexpert-test", "train", chexpert_parts)


NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {},View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)


def nih(folder, sex="Gender"):
    write(
        folder / "Data_Entry_2017.csv",
        NIH.format(sex)
        + "00000001_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
        "00000002_000.png,No Finding,0,2,081,F,AP,2500,2048,0.171,0.171,\n"
        "00000003_000.png,Hernia,0,3,20,F,AP,2500,2048,0.171,0.171,\n",
    )
    write(folder / "test_list.txt", "00000001_000.png\n00000002_000.png\n")
    picture(folder / "images_001/images/00000001_000.png")
    picture(folder / "images_012/images/00000002_000.png")
    picture(folder / "images_012/images/00000003_000.png")


@pytest.mark.parametrize("sex", ["Gender", "Sex"])
def test_nih_takes_the_official_test_list(tmp_path, sex):
    nih(tmp_path, sex)
    rows, found = read("nih-cxr14", tmp_path)
    assert shown(rows) == {
        "images_001/images/00000001_000.png": {"Cardiomegaly", "Emphysema"},
        "images_012/images/00000002_000.png": set(),
    }
    assert found.groups == ["1", "2"]
    assert found.attributes == {"sex": ["M", "F"], "age": ["058Y", "081"], "view": ["PA", "AP"]}


def test_a_list_names_images_in_text_and_those_without_a_row_are_counted(tmp_path):
    nih(tmp_path)
    assert "listed in test_list.txt without a row" not in read("nih-cxr14", tmp_path)[1].counts
    names = "00000001_000.png\n00000002_000.png\n00000009_000.png\n00000009_001.png\n"
    write(tmp_path / "test_list.txt", names)
    assert read("nih-cxr14", tmp_path)[1].counts["listed in test_list.txt without a row"] == 2
    (tmp_path / "test_list.txt").write_bytes(names.encode("utf-16"))
    with pytest.raises(ValueError, match="test_list.txt: not a list of images"):
        read("nih-cxr14", tmp_path)


def test_nih_has_no_validation_part_so_patients_of_the_training_part_are_drawn(tmp_path):
    rows = "".join(
        f"{i:08}_{j:03}.png,Mass,{j},{i},9,F,AP,,,,,\n" for i in range(3, 13) for j in (0, 1)
    )
    nih(tmp_path)
    table = tmp_path / "Data_Entry_2017.csv"
    write(
        table,
        table.read_text().replace(
            "00000003_000.png,Hernia,0,3,20,F,AP,2500,2048,0.171,0.171,\n", rows
        ),
    )
    write(
        tmp_path / "train_val_list.txt", "\n".join(row.split(",")[0] for row in rows.splitlines())
    )
    for row in rows.splitlines():
        picture(tmp_path / "images_012/images" / row.split(",")[0])
    _, parts = splits.read(tasks.read("nih-cxr14"), tmp_path, seed=1)
    assert parts.origin == "validation drawn by Patient ID from train, seed 1"
    assert (len(parts.test), len(parts.validation), len(parts.train)) == (2, 4, 16)
    assert set(parts.train.groups).isdisjoint(parts.validation.groups)
    assert (parts.train.labels[:, 4] == 1).all() and parts.train.labels.sum() == 16
    _, alone = splits.read(tasks.read("nih-cxr14"), tmp_path, seed=1, wanted=["validation"])
    assert alone.validation.ids == parts.validation.ids and alone.train is None
    # Whatever is drawn is embedded with the whole training part.
    for drawn in (parts.train, parts.validation, alone.validation):
        assert drawn.part == "train" and len(drawn.pool) == 20
    assert parts.test.part == "" and list(parts.test.pool) == parts.test.ids
    _, whole = splits.read(tasks.read("nih-cxr14"), tmp_path, wanted=["train"])
    assert len(whole.train) == 20 and whole.origin == "of the data set"


@pytest.mark.parametrize("patients", [True, False])
def test_nih_adjudicated(tmp_path, patients):
    nih(tmp_path)
    write(
        tmp_path / "four_findings_expert_labels/test_labels.csv",
        "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass\n"
        "00000003_000.png,NO,YES,NO,YES\n",
    )
    if not patients:
        (tmp_path / "Data_Entry_2017.csv").unlink()
    rows, found = read("nih-cxr14-adjudicated", tmp_path)
    image = "images_012/images/00000003_000.png"
    assert shown(rows) == {image: {"Pneumothorax", "Nodule or mass"}}
    assert found.groups == ["3"] and bool(found.attributes) == patients
    write(
        tmp_path / "four_findings_expert_labels/validation_labels.csv",
        "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass\n"
        "00000001_000.png,YES,NO,NO,NO\n",
    )
    rows, found = part("nih-cxr14-adjudicated", "validation", tmp_path)
    assert rows == {"images_001/images/00000001_000.png": {"Fracture"}}
    assert found.groups == ["1"]


def test_rsna_has_several_rows_of_a_patient(tmp_path):
    write(
        tmp_path / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target\na,,,,,0\nb,1,2,3,4,1\nb,5,6,7,8,1\n",
    )
    for name in "ab":
        picture(tmp_path / f"stage_2_train_images/{name}.png")
    rows, found = read("rsna-pneumonia", tmp_path)
    assert {k[-5:]: v for k, v in rows.items()} == {
        "a.png": {"Pneumonia": 0}, "b.png": {"Pneumonia": 1}
    }  # fmt: skip
    assert found.counts["repeated"] == 1 and found.counts["conflicting"] == 0
    write(tmp_path / "stage_2_train_labels.csv", "patientId,Target\na,0\nb,0\nb,1\n")
    rows, found = read("rsna-pneumonia", tmp_path)
    assert len(rows) == 1 and found.counts["conflicting"] == 1


def test_images_that_are_none_are_said_to_be_at_once(tmp_path):
    write(tmp_path / "stage_2_train_labels.csv", "patientId,Target\na,0\nb,1\n")
    for name in "ab":
        write(tmp_path / f"stage_2_train_images/{name}.dcm", "DICM")
    with pytest.raises(ValueError, match="first images cannot be read: .*a.dcm: .*not an image"):
        read("rsna-pneumonia", tmp_path)


def test_vindr_takes_its_classes_from_the_header(tmp_path):
    write(
        tmp_path / "annotations/image_labels_test.csv",
        "image_id,Aortic enlargement,Other lesion,No finding\na,1,0,0\nb,0,0,1\n",
    )
    for name in "ab":
        picture(tmp_path / f"test/{name}.png")
    task, found = reading.read(tasks.read("vindr-cxr"), tmp_path)
    assert [(c.name, c.present, c.absent) for c in task.classes] == [
        ("Aortic enlargement", ("Aortic enlargement",), ("no Aortic enlargement",)),
        ("Other lesion", ("Other lesion",), ("no Other lesion",)),
    ]
    assert found.labels.tolist() == [[1, 0], [0, 0]] and found.groups is None


@pytest.fixture
def mimic(tmp_path):
    findings = (
        "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,"
        "Lung Lesion,Airspace Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,"
        "Pneumothorax,Support Devices"
    )
    write(
        tmp_path / "mimic-cxr-2.1.0-test-set-labeled.csv",
        f"study_id,{findings}\n50414267,0,0,0,1,0,0,0,1,0,0,0,0,0,-1\n",
    )
    write(
        tmp_path / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split\nd1,50414267,10000032,test\nd2,50414267,10000032,test\n"
        "d3,50000000,10000033,train\n",
    )
    write(
        tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz",
        "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns\nd1,10000032,50414267,PA,1,1\n"
        "d2,10000032,50414267,LATERAL,1,1\nd3,10000033,50000000,AP,1,1\n",
    )
    picture(tmp_path / "files/p10/p10000032/s50414267/d1.jpg")
    return tmp_path


def test_mimic_joins_three_tables(mimic):
    rows, found = read("mimic-cxr-test", mimic)
    assert shown(rows) == {"files/p10/p10000032/s50414267/d1.jpg": {"Edema", "Lung Opacity"}}
    (row,) = rows.values()
    assert len(row) == 12 and "Support Devices" not in row
    assert found.groups == ["10000032"] and found.attributes == {"view": ["PA"]}


def test_mimic_parts_have_other_labels_of_another_name(mimic):
    write(
        mimic / "mimic-cxr-2.0.0-chexpert.csv.gz",
        "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged "
        "Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural "
        "Other,Pneumonia,Pneumothorax,Support Devices\n"
        "10000032,50414267,1.0,,,,,,,,,,,,,\n10000033,50000000,,0.0,,,,,,1.0,,-1.0,,,,\n"
        "10000034,50000001,,,,,,1.0,,,,,,,,\n",
    )
    for path in mimic.glob("*split*"), mimic.glob("*metadata*"):
        path = next(path)
        row = (
            "d4,50000001,10000034,validate\n"
            if "split" in path.name
            else "d4,10000034,50000001,PA,1,1\n"
        )
        write(path, gzip.decompress(path.read_bytes()).decode() + row)
    picture(mimic / "files/p10/p10000033/s50000000/d3.jpg")
    picture(mimic / "files/p10/p10000034/s50000001/d4.jpg")
    rows, found = part("mimic-cxr-test", "train", mimic)
    names = [c.name for c in tasks.read("mimic-cxr-test").classes]
    assert found.ids == ["files/p10/p10000033/s50000000/d3.jpg"] and found.groups == ["10000033"]
    assert found.labels[0, names.index("Lung Opacity")] == 1 and np.nansum(found.labels) == 1
    assert (~np.isnan(found.labels)).sum() == 2
    policy = Policy("negative", "negative")
    rows, found = part("mimic-cxr-test", "validation", mimic, policy=policy)
    assert rows == {"files/p10/p10000034/s50000001/d4.jpg": {"Fracture"}}


def test_a_join_that_meets_nothing_says_so(mimic):
    write(
        mimic / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split\nd1,s50414267,p10000032,test\n",
    )
    with pytest.raises(ValueError, match="no study_id in common: 50414267 in one, s50414267 in"):
        read("mimic-cxr-test", mimic)


GRADES = ["No", "Mild", "Moderate", "Severe", "Proliferative"]


def test_eyepacs_groups_both_eyes(tmp_path):
    write(tmp_path / "trainLabels.csv", "image,level\n10_left,0\n10_right,4\n13_left,2\n")
    for name in ("10_left", "10_right", "13_left"):
        picture(tmp_path / f"train/{name}.jpeg")
    rows, found = read("eyepacs", tmp_path)
    assert list(shown(rows).values()) == [{"No"}, {"Proliferative"}, {"Moderate"}]
    assert found.groups == ["10", "10", "13"] and found.values == tuple("01234")
    write(tmp_path / "retinopathy_solution.csv", "image,level,Usage\n1_left,3,Private\n")
    picture(tmp_path / "test/1_left.jpeg")
    assert list(shown(read("eyepacs", tmp_path)[0]).values()) == [{"Severe"}]
    rows, found = part("eyepacs", "train", tmp_path)
    assert list(rows.values()) == [{"No"}, {"Proliferative"}, {"Moderate"}]
    assert found.groups == ["10", "10", "13"]


def test_eyepacs_without_labels_of_the_test_part_is_drawn_from_the_training_part(tmp_path):
    names = [f"{i}_{side}" for i in range(10) for side in ("left", "right")]
    write(tmp_path / "trainLabels.csv", "image,level\n" + "".join(f"{n},1\n" for n in names))
    for name in names:
        picture(tmp_path / f"train/{name}.jpeg")
    _, parts = splits.read(tasks.read("eyepacs"), tmp_path, seed=3)
    assert parts.origin == "all drawn by patient, seed 3"
    assert (len(parts.test), len(parts.validation), len(parts.train)) == (4, 4, 12)


def test_aptos(tmp_path):
    write(tmp_path / "train.csv", "id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,4\n")
    for name in ("000c1434d8d7", "001639a390f0"):
        picture(tmp_path / f"train_images/{name}.png")
    rows, found = read("aptos-2019", tmp_path)
    assert list(shown(rows).values()) == [{"Moderate"}, {"Proliferative"}]
    assert found.groups is None


def test_messidor(tmp_path):
    write(
        tmp_path / "messidor_data.csv",
        "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable\n"
        "20051020_43808_0100_PP.png,0,0,1\nIM000001.jpg,3,0,1\nIM000002.jpg,,,0\n",
    )
    picture(tmp_path / "IMAGES/20051020_43808_0100_PP.png")
    picture(tmp_path / "IMAGES/im000001.JPG")
    rows, found = read("messidor-2", tmp_path)
    assert list(shown(rows).values()) == [{"No"}, {"Severe"}] and found.groups is None
    write(tmp_path / "messidor-2.csv", "left,right\nIM000001.JPG,20051020_43808_0100_PP.png\n")
    assert read("messidor-2", tmp_path)[1].groups == ["0", "0"]
    write(tmp_path / "messidor-2.csv", "left,right\nIM000001.JPG,other.png\n")
    found = read("messidor-2", tmp_path)[1]
    assert found.groups[1] == "0" != found.groups[0]
    assert found.counts["rows without a match in messidor-2.csv"] == 2


def messidor(folder, pairs):
    """Its graded images and its table of pairs, as they can be downloaded."""
    write(folder / "messidor_data.csv", "image_id,adjudicated_dr_grade,adjudicated_gradable\n"
          "a.png,0,1\nb.png,3,1\nc.png,2,1\n")  # fmt: skip
    for name in "abc":
        picture(folder / f"IMAGES/{name}.png")
    write(folder / "messidor-2.csv", pairs)


def test_the_official_table_of_pairs_has_semicolons(tmp_path):
    messidor(tmp_path, "left;right\na.png;b.png\nc.png;d.png\n")
    with pytest.warns(UserWarning, match="messidor-2.csv: read as cells separated by ';', not ','"):
        _, found = read("messidor-2", tmp_path)
    assert found.groups == ["0", "0", "1"] and not found.notes


@pytest.mark.parametrize("pairs, says", [
    ("left,right\none.png,other.png\n", "no image_id in common"),
    ("image,patient\na.png,1\n", "no column 'left', 'right'; there are image, patient"),
    ("left,right\na.png\n", "1 fields, expected 2"),
    ("", "messidor-2.csv: no rows"),
    ("left,right\n", "messidor-2.csv: no rows"),
    ('left,right\n"a.png,b.png\n', "not CSV"),
])  # fmt: skip
def test_an_optional_table_that_cannot_be_joined_is_said_and_left_out(tmp_path, pairs, says):
    messidor(tmp_path, pairs)
    with pytest.warns(UserWarning, match=f"optional table messidor-2.csv is not used: .*{says}"):
        rows, found = read("messidor-2", tmp_path)
    assert len(rows) == 3 and found.groups is None
    assert [file.name for file in found.files] == ["messidor_data.csv"]
    assert found.notes == ["The optional table messidor-2.csv does not fit and was not used."]


def test_a_table_that_is_not_optional_is_needed(mimic):
    write(mimic / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,split\nd1,test\n")
    with pytest.raises(ValueError, match="no column 'study_id'"):
        read("mimic-cxr-test", mimic)


def test_any_table_may_be_compressed(tmp_path):
    messidor(tmp_path, "left,right\na.png,b.png\nc.png,d.png\n")
    for path in (tmp_path / "messidor_data.csv", tmp_path / "messidor-2.csv"):
        text = path.read_text()
        path.unlink()
        write(tmp_path / f"{path.name}.gz", text)
    assert read("messidor-2", tmp_path)[1].groups == ["0", "0", "1"]


def test_idrid_has_a_mark_a_space_and_empty_columns_and_rows(tmp_path):
    folder = tmp_path / "B. Disease Grading"
    write(
        folder / "2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv",
        "\ufeffImage name,Retinopathy grade,Risk of macular edema ,,,\nIDRiD_001,4,0,,,\n"
        "IDRiD_002,1,1,,,\n,,,,,\n",
    )
    for name in ("IDRiD_001", "IDRiD_002"):
        picture(folder / f"1. Original Images/b. Testing Set/{name}.jpg")
    write(
        folder / "2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv",
        "Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,\n"
        "IDRiD_001,3,2,,,,,,,,,\nIDRiD_003,0,0,,,,,,,,,\n",
    )
    for name in ("IDRiD_001", "IDRiD_003"):  # numbers start anew
        picture(folder / f"1. Original Images/a. Training Set/{name}.jpg")
    for given in (tmp_path, folder):
        rows, _ = read("idrid", given)
        assert list(shown(rows).values()) == [{"Proliferative"}, {"Mild"}]
        rows, _ = part("idrid", "train", given)
        assert list(rows.values()) == [{"Severe"}, {"No"}]
        assert all("a. Training Set" in name for name in rows)


def test_pad_ufes(tmp_path):
    header = (
        "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,"
        "gender,skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,"
        "region,diameter_1,diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,"
        "biopsed"
    )
    one = "PAT_1516,1765,,,,,8,,FEMALE,,,,,3.0,ARM,,,NEV,FALSE,,,,,,PAT_1516_1765_530.png,FALSE"
    two = "PAT_46,881,,,,,55,,,,,,,,NECK,6.0,5.0,BCC,,,,,,,PAT_46_881_939.png,TRUE"
    write(tmp_path / "metadata.csv", f"{header}\n{one}\n{two}\n")
    picture(tmp_path / "images/imgs_part_1/PAT_1516_1765_530.png")
    picture(tmp_path / "images/imgs_part_3/PAT_46_881_939.png")
    rows, found = read("pad-ufes-20", tmp_path)
    assert list(shown(rows).values()) == [{"Melanocytic Nevus"}, {"Basal Cell Carcinoma"}]
    assert found.groups == ["PAT_1516", "PAT_46"]
    assert found.attributes == {"sex": ["FEMALE", ""], "age": ["8", "55"], "skin_type": ["3-4", ""]}


@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.csv"])
def test_ham10000_groups_by_lesion(tmp_path, name):
    write(
        tmp_path / name,
        "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
        "HAM_1,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir\n"
        "HAM_1,ISIC_0025030,bkl,histo,80.0,male,scalp,vidir\n"
        "HAM_2,ISIC_0026769,vasc,histo,,female,ear,vidir\n",
    )
    picture(tmp_path / "HAM10000_images_part_1/ISIC_0027419.jpg")
    picture(tmp_path / "HAM10000_images_part_1/ISIC_0025030.jpg")
    picture(tmp_path / "HAM10000_images_part_2/ISIC_0026769.jpg")
    rows, found = read("ham10000", tmp_path)
    assert found.groups == ["HAM_1", "HAM_1", "HAM_2"]
    assert list(shown(rows).values()) == [{"benign keratosis"}] * 2 + [{"vascular lesion"}]


def test_isic_2019_is_one_hot(tmp_path):
    write(
        tmp_path / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
        "ISIC_0000000,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
        "ISIC_0000001,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
        "ISIC_0000002,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0\n",
    )
    write(
        tmp_path / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex\n"
        "ISIC_0000000,55.0,anterior torso,,female\nISIC_0000001,30.0,,MSK4_0011169,male\n"
        "ISIC_0000002,,,,\n",
    )
    for i in range(3):
        picture(tmp_path / f"ISIC_2019_Training_Input/ISIC_000000{i}.jpg")
    rows, found = read("isic-2019", tmp_path)
    assert list(shown(rows).values()) == [{"Melanocytic Nevus"}, {"Melanoma"}, set()]
    assert found.groups[1] == "MSK4_0011169" and len(set(found.groups)) == 3


def test_fitzpatrick17k_takes_its_conditions_from_the_data(tmp_path):
    write(
        tmp_path / "fitzpatrick17k.csv",
        "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,"
        "three_partition_label,qc,url,url_alphanum\n"
        "5e82,3,3,drug induced pigmentary changes,inflammatory,non-neoplastic,,http://x,x\n"
        "fa2e,-1,1,acne,inflammatory,non-neoplastic,,http://y,y\n",
    )
    for name in ("5e82", "fa2e"):
        picture(tmp_path / f"images/{name}.jpg")
    rows, found = read("fitzpatrick17k", tmp_path)
    assert list(shown(rows).values()) == [{"drug induced pigmentary changes"}, {"acne"}]
    assert found.attributes == {"skin_type": ["3-4", ""]}


def test_ddi(tmp_path):
    write(
        tmp_path / "ddi_metadata.csv",
        ",DDI_ID,DDI_file,skin_tone,malignant,disease\n0,1,000001.png,56,True,melanoma-in-situ\n"
        "1,2,000002.png,12,False,acrochordon\n",
    )
    for i in (1, 2):
        picture(tmp_path / f"images/00000{i}.png")
    rows, found = read("ddi", tmp_path)
    assert list(rows.values()) == [{"Malignant": 1}, {"Malignant": 0}]
    assert found.attributes == {"skin_type": ["5-6", "1-2"]}


def test_scin_has_lists_in_cells_and_up_to_three_images_a_case(tmp_path):
    yes = "DEFAULT_YES_IMAGE_QUALITY_SUFFICIENT"
    write(
        tmp_path / "dataset/scin_labels.csv",
        "case_id,dermatologist_gradable_for_skin_condition_1,"
        "dermatologist_skin_condition_on_label_name\n"
        f"-1,{yes},\"['Eczema', 'Acne']\"\n-2,{yes},\"['Acne']\"\n"
        f"-3,{yes},\"['Tinea']\"\n-4,NO,\"['Tinea']\"\n-5,{yes},[]\n",
    )
    missing = "dataset/images/-2243186711511406658.png"
    write(
        tmp_path / "dataset/scin_cases.csv",
        "case_id,image_1_path,image_2_path,image_3_path,age_group,sex_at_birth,"
        "fitzpatrick_skin_type\n"
        "-1,dataset/images/1.png,dataset/images/2.png,,AGE_18_TO_29,FEMALE,FST2\n"
        "-2,dataset/images/3.png,,,AGE_UNKNOWN,MALE,NONE\n"
        f"-3,{missing},,dataset/images/4.png,,,\n"
        "-4,dataset/images/5.png,,,,,\n-5,dataset/images/6.png,,,,,\n",
    )
    for i in range(1, 7):
        picture(tmp_path / f"dataset/images/{i}.png")
    rows, found = read("scin", tmp_path)
    names = [name.removeprefix("dataset/images/") for name in found.ids]
    assert names == ["1.png", "2.png", "3.png", "4.png"]
    assert list(shown(rows).values()) == [{"Eczema"}, {"Eczema"}, set(), {"Tinea"}]
    assert found.groups == ["-1", "-1", "-2", "-3"]
    assert found.counts["missing in the data set itself"] == 1 and found.counts["unlabelled"] == 1


CRC = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]


def write_class_folders(folder):
    for i, name in enumerate(CRC):
        picture(folder / f"CRC-VAL-HE-7K/{name}/{name}-TCGA-{i}.tif")


def test_class_folders(tmp_path):
    write_class_folders(tmp_path)
    for given in (tmp_path, tmp_path / "CRC-VAL-HE-7K"):
        rows, found = read("crc-val-he-7k", given)
        np.testing.assert_array_equal(found.labels, np.eye(9))
        assert list(shown(rows).values())[8] == {"colorectal adenocarcinoma epithelium"}
    with pytest.raises(FileNotFoundError, match="NCT-CRC-HE-100K: no folders of the classes ADI"):
        part("crc-val-he-7k", "train", tmp_path)
    (tmp_path / "CRC-VAL-HE-7K/ADI/scan.CT").write_bytes(bytes(128) + b"DICM")
    task = {**content("crc-val-he-7k"), "parts": {}}
    for all_files, images in ((False, 9), (True, 10)):
        task["data"] = {**content("crc-val-he-7k")["data"], "all_files": all_files}
        layout = tasks.parse("mine", task).layout
        found = folders.read(tasks.parse("mine", task), layout, tmp_path, Policy())
        assert len(found) == images and found.counts == {"other files": 10 - images}
    (tmp_path / "CRC-VAL-HE-7K/ADI/scan.CT").unlink()
    for name in ("Adipose", ".cache"):  # one is a class that the task may have missed
        picture(tmp_path / f"CRC-VAL-HE-7K/{name}/a.tif")
    assert read("crc-val-he-7k", tmp_path)[1].counts["folders of no class of the task"] == 1
    for name in ("Adipose", ".cache"):
        shutil.rmtree(tmp_path / f"CRC-VAL-HE-7K/{name}")
    for name in reversed(CRC):
        picture(tmp_path / f"NCT-CRC-HE-100K/{name}/{name}-AAAA.tif")
    rows, found = part("crc-val-he-7k", "train", tmp_path)
    np.testing.assert_array_equal(found.labels, np.eye(9))
    assert (
        list(rows)[8] == "NCT-CRC-HE-100K/TUM/TUM-AAAA.tif"
        and len(read("crc-val-he-7k", tmp_path)[0]) == 9
    )
    for file in (tmp_path / "CRC-VAL-HE-7K/TUM").iterdir():
        file.unlink()
    (tmp_path / "CRC-VAL-HE-7K/TUM").rmdir()
    with pytest.raises(FileNotFoundError, match="no folders of the classes TUM; there are ADI"):
        read("crc-val-he-7k", tmp_path)


@pytest.mark.parametrize("name, where", [
    ("crc-val-he-7k", "medsiglip_jax.data.listing.walk"), ("ddi", "pathlib.Path.glob"),
    ("scin", "pathlib.Path.is_file"),
])  # fmt: skip
def test_a_data_set_on_a_disk_that_is_gone_is_given_up(tmp_path, monkeypatch, name, where):
    """Where its folders are listed, where images are looked for, and where they are looked up."""
    three = test_scin_has_lists_in_cells_and_up_to_three_images_a_case
    {"ddi": test_ddi, "scin": three, "crc-val-he-7k": write_class_folders}[name](tmp_path)
    released, thread = threading.Event(), threading.current_thread()

    def hang(*args, real=pkgutil.resolve_name(where)):
        released.wait(0 if threading.current_thread() is thread else 30)
        return real(*args)

    monkeypatch.setattr(where, hang)
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.3))
    with pytest.raises(Stalled, match=r"the list of images in .*: not read within 0\.3 s"):
        read(name, tmp_path)
    released.set()


@pytest.mark.parametrize("compressed", [False, True])
def test_patchcamelyon(tmp_path, compressed, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)
    labels = {"test": [1, 0, 1], "train": [0, 0, 1], "valid": [1, 1, 0]}
    for i, (name, values) in enumerate(labels.items()):
        stem = f"camelyonpatch_level_2_split_{name}"
        with h5py.File(tmp_path / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=pixels + np.uint8(i), compression="gzip")
        with h5py.File(tmp_path / f"{stem}_y.h5", "w") as file:
            file.create_dataset("y", data=np.array(values, np.uint8).reshape(3, 1, 1, 1))
    for path in [*tmp_path.glob("*.h5")] if compressed else ():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    unpacking = pytest.warns(UserWarning, match="h5.gz: unpacked once to .*, which may be deleted")
    with unpacking if compressed else contextlib.nullcontext():
        _, parts = splits.read(tasks.read("patchcamelyon"), tmp_path)
    found = {"test": parts.test, "train": parts.train, "valid": parts.validation}
    assert {name: f.labels[:, 0].tolist() for name, f in found.items()} == labels
    assert len({name for f in found.values() for name in f.ids}) == 9  # one key in three files
    for i, f in enumerate(found.values()):
        for source, want in zip(f.sources, pixels + np.uint8(i), strict=True):
            np.testing.assert_array_equal(decode(read_bytes(source)), want)
    assert parts.test.ids[0] == "camelyonpatch_level_2_split_test_x.h5/x/0"  # either way
    splits.read(tasks.read("patchcamelyon"), tmp_path)  # unpacks nothing again


def test_a_gzip_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(arrays, "_MOST", 3 << 20)
    (tmp_path / "x.h5.gz").write_bytes(gzip.compress(bytes((3 << 20) + 1)))
    with pytest.raises(ValueError, match="x.h5.gz: holds more than 3,145,728 bytes; unpack it"):
        arrays.unpacked(tmp_path / "x.h5.gz")
    (tmp_path / "y.h5.gz").write_bytes(gzip.compress(bytes(100))[:-9])
    with pytest.raises(ValueError, match="y.h5.gz: not readable as gzip"):
        arrays.unpacked(tmp_path / "y.h5.gz")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (tmp_path / "x.h5.gz").write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.warns(UserWarning, match="unpacked once"):
        assert arrays.unpacked(tmp_path / "x.h5.gz").stat().st_size == 3 << 20


@pytest.mark.parametrize("file", ["pathmnist.npz", "pathmnist_224.npz"])
def test_medmnist_of_classes(tmp_path, file):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), np.uint8)
    labels = np.array([[0], [8], [3], [3]], np.uint8)
    np.savez(tmp_path / file, test_images=pixels, test_labels=labels, train_images=pixels[:1])
    rows, found = read("pathmnist", tmp_path)
    assert found.labels.argmax(1).tolist() == [0, 8, 3, 3]
    np.testing.assert_array_equal(decode(read_bytes(found.sources[2])), pixels[2])
    np.savez(tmp_path / file, test_images=pixels[::-1], test_labels=labels)
    np.testing.assert_array_equal(decode(read_bytes(found.sources[2])), pixels[1])  # as it is now
    np.savez(tmp_path / file, test_images=pixels, test_labels=labels + 0.5)
    with pytest.raises(ValueError, match=r"values \[0.5, 3.5, 8.5\]; .* multi_class"):
        read("pathmnist", tmp_path)
    np.savez(tmp_path / file, test_images=pixels, test_labels=labels + 5)
    with pytest.raises(ValueError, match="multi_class with 9 classes"):
        read("pathmnist", tmp_path)


@pytest.mark.parametrize("images, labels, says", [
    (complex, np.uint8, "test_images is complex128; expected uint8"),
    (np.uint8, complex, "test_labels is complex128; expected numbers"),
    (np.uint8, object, "test_labels holds pickled objects, which could run code"),
    (np.uint8, np.float32, "test_labels is float32; expected finite numbers"),
    (np.float32, np.uint8, "test_images is float32; expected uint8"),
])  # fmt: skip
def test_arrays_of_other_numbers_are_refused_before_anything_is_embedded(
    tmp_path, images, labels, says
):
    cells = np.zeros((2, 14)) + (np.nan if labels is np.float32 else 0)
    content = {"test_images": np.zeros((2, 4, 4), images), "test_labels": cells.astype(labels)}
    np.savez(tmp_path / "chestmnist.npz", **content)
    with pytest.raises(ValueError, match=f"{tmp_path}/chestmnist.npz: .*{says}"):
        read("chestmnist", tmp_path)


def test_medmnist_of_findings_in_grey(tmp_path):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    labels = np.zeros((2, 14), np.uint8)
    labels[0, [1, 13]] = 1
    np.savez(tmp_path / "chestmnist.npz", test_images=pixels, test_labels=labels)
    rows, found = read("chestmnist", tmp_path)
    assert list(shown(rows).values()) == [{"Cardiomegaly", "Hernia"}, set()]
    want = np.repeat(pixels[1][..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(read_bytes(found.sources[1])), want)


@pytest.mark.parametrize("name", [name for name in tasks.names() if "mnist" in name])
def test_medmnist_parts(tmp_path, name):
    task, arrays, want = tasks.read(name), {}, {}
    for i, (key, n) in enumerate({"train": 3, "val": 2, "test": 1}.items()):
        numbers = (np.arange(n) + i) % len(task.classes)
        want[key] = np.eye(len(task.classes), dtype=np.uint8)[numbers]
        arrays[f"{key}_images"] = np.full((n, 28, 28), i, np.uint8)
        arrays[f"{key}_labels"] = want[key] if task.kind == "multi_label" else numbers[:, None]
    np.savez(tmp_path / f"{name}_64.npz", **arrays)
    _, parts = splits.read(task, tmp_path)
    for i, found in enumerate((parts.train, parts.validation, parts.test)):
        np.testing.assert_array_equal(found.labels, list(want.values())[i])
        assert all((decode(read_bytes(source)) == i).all() for source in found.sources)
    assert parts.origin == "of the data set"


def test_digits_parts_are_all_of_the_quickstarts_digits(tmp_path, monkeypatch):
    from medsiglip_jax.evaluate.data import digits
    from medsiglip_jax.train import quickstart

    pytest.importorskip("sklearn")
    made = iter((["model"], ["digits"]))  # the first run is killed before it is done

    def train(workdir, seed):
        for name in next(made):
            (workdir / name).mkdir(parents=True)

    monkeypatch.setattr(quickstart, "run", train)
    for _ in range(3):  # the last of which has nothing to train
        folder, _ = digits.prepare(tmp_path)
    run.check_folder(tmp_path)  # evaluate goes on in it
    task, parts = splits.read(tasks.read("digits"), folder)
    training, held_out = quickstart.load_digits(0, 0.25)
    np.testing.assert_array_equal(parts.test.labels.argmax(1), held_out.labels)
    with np.load(folder / "digits.npz") as file:
        pixels = [scan.tobytes() for key in ("train", "val") for scan in file[f"{key}_images"]]
    assert sorted(pixels) == sorted(scan.tobytes() for scan in training.scans)
    assert 0.19 < len(parts.validation) / len(pixels) < 0.21
    label_of = dict(zip((x.tobytes() for x in training.scans), training.labels, strict=True))
    labels = np.concatenate([part.labels.argmax(1) for part in (parts.train, parts.validation)])
    assert [label_of[scan] for scan in pixels] == labels.tolist()
    word = quickstart.WORDS[held_out.labels[0]]
    assert reading.texts(task, parts.test)[0] == f"a handwritten {word}"
    assert "trained on the images of the parts train" in task.notes[1]


def test_digits_are_not_written_into_a_folder_of_something_else(tmp_path, capsys):
    write(tmp_path / "thesis.txt", "x")
    assert cli.main(["evaluate", "--task", "digits", "--output", str(tmp_path)]) == 2
    assert "not an evaluation; choose a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 4), np.uint8)])
def test_only_bytes_are_pixels(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        pixmap(pixels)


@pytest.mark.parametrize("name", ["derm-79", "histopathology-cervix"])
def test_ones_own_csv(tmp_path, name):
    task = tasks.read(name)
    label = task.classes[0].name
    write(tmp_path / "labels.csv", f"image,label,patient\nx/1.png,{label},p\nx/2.png,,p\n")
    picture(tmp_path / "x/1.png")
    picture(tmp_path / "x/2.png")
    rows, found = read(name, tmp_path)
    assert shown(rows) == {"x/1.png": {label}} and found.groups == ["p"]
    write(tmp_path / "labels.csv", "image,label\nx/1.png,Melanoma of the moon\n")
    with pytest.raises(ValueError, match="'Melanoma of the moon' "):
        read(name, tmp_path)


@pytest.mark.parametrize("name", tasks.names())
def test_a_wrong_folder_is_one_message(tmp_path, name):
    (tmp_path / "unrelated.txt").write_text("x")
    with pytest.raises(FileNotFoundError) as caught:
        read(name, tmp_path)
    message, task = str(caught.value), tasks.read(name)
    assert str(tmp_path) in message and "\n" not in message
    assert task.source in message
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read(name, tmp_path / "gone")


def test_missing_columns_are_listed_at_once(chexpert):
    text = (chexpert / "groundtruth.csv").read_text()
    write(chexpert / "groundtruth.csv", text.replace("Edema,", "edema,").replace("Frac", "frac"))
    with pytest.raises(ValueError, match="no column 'Edema', 'Fracture'; there are Study, No Find"):
        read("chexpert-test", chexpert)
    write(chexpert / "groundtruth.csv", text.replace("Study", "Image"))
    with pytest.raises(ValueError, match="no column 'Study'"):
        read("chexpert-test", chexpert)
    write(chexpert / "groundtruth.csv", text.replace("/study1,0", "/first,0"))
    with pytest.raises(ValueError, match="1 cells do not look like .*64741/first"):
        read("chexpert-test", chexpert)
    write(chexpert / "groundtruth.csv", text.replace("study1,0,0", "study1,0,2"))
    with pytest.raises(ValueError, match="'Enlarged Cardiomediastinum': expected 0, 1, .*'2'$"):
        read("chexpert-test", chexpert)


def test_a_split_that_is_not_there(chexpert):
    own = content("chexpert-test")
    own["data"]["where"] = {"study": ["study7"]}
    with pytest.raises(ValueError, match="no row is of the part that is evaluated: .*study7"):
        reading.read(tasks.parse("mine", own), chexpert)


@pytest.mark.parametrize("cell", [
    "__import__('os').getcwd()", "{['a']: 1}", "{{1}, {2}}", "3", "[" * 300,
])  # fmt: skip
def test_cells_are_never_run(cell):
    with pytest.raises(ValueError, match="is no Python list"):
        labels._literal(cell, "column")
    assert ast.literal_eval("['a']") == labels._literal("['a']", "column")


# ------------------------------------------------------------------------------------------ texts


def test_pairs_are_images_and_texts(tmp_path):
    write(
        tmp_path / "pairs.csv",
        'image,text,case\na.png,"a mass,\nlarge",1\nb.png,,1\nc.png,  ,2\nd.png,normal,3\n'
        "b.png,late,1\nd.png,again,3\n",
    )
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    task, found = reading.read(tasks.parse("mine", PAIRS), tmp_path)
    assert task.retrieval == "text" and task.score == "" and not task.classes
    task.check_prompts()
    assert found.ids == ["a.png", "d.png", "b.png"] and found.groups == ["1", "3", "1"]
    assert reading.texts(task, found) == ["a mass,\nlarge", "normal", "late"]
    assert found.labels.shape == (3, 0) and found.values == ()
    assert found.counts["without a text"] == 2 and found.counts["repeated"] == 1
    assert found.select([2, 0]).texts == ["late", "a mass,\nlarge"]
    other = found.select([0, 1, 2])
    assert other.labels_sha256() == found.labels_sha256()
    changed = dataclasses.replace(found, texts=["x", *found.texts[1:]])
    assert changed.labels_sha256() != found.labels_sha256()
    json.dumps(task.to_dict())
    write(tmp_path / "pairs.csv", "image,text\na.png,\n")
    with pytest.raises(ValueError, match="none of the images of x has a text"):
        reading.read(task, tmp_path)
    write(tmp_path / "pairs.csv", "image,caption\na.png,x\n")
    with pytest.raises(ValueError, match="no column 'text'; there are image, caption"):
        reading.read(task, tmp_path)


def test_texts_of_images_with_labels(tmp_path):
    own = content("derm-79") | {"retrieval": "text"}
    own["data"] |= {"text": "note"}
    write(tmp_path / "labels.csv", "image,label,note\nx.png,Acne,spots\ny.png,Cyst,\nz.png,,gone\n")
    for name in "xyz":
        picture(tmp_path / f"{name}.png")
    task, found = reading.read(tasks.parse("mine", own), tmp_path)
    assert found.ids == ["x.png", "y.png"] and reading.texts(task, found) == ["spots", ""]
    task, found = reading.read(tasks.parse("mine", own | {"retrieval": "prompts"}), tmp_path)
    assert reading.texts(task, found) == ["Acne", "Cyst"]
    none = dataclasses.replace(found, labels=np.zeros_like(found.labels))
    assert reading.texts(task, none) == ["", ""]
    with pytest.raises(ValueError, match="task mine has no texts for retrieval"):
        reading.texts(dataclasses.replace(task, retrieval=""), found)


def test_pictures_in_parquet_are_images_with_labels(tmp_path):
    """As Hugging Face's `datasets` writes them, in a table that a task names like any other."""
    picture(tmp_path / "a.png", 7)
    held = (tmp_path / "a.png").read_bytes()
    cells = [{"bytes": held, "path": "x.png"}, {"bytes": None, "path": "../a.png"}]
    columns = {"image": cells, "label": [1, 0], "boxes": [[1], [2]]}
    (tmp_path / "data").mkdir()
    parquet.write_table(pa.table(columns), tmp_path / "data" / "0.parquet")
    data = {"adapter": "csv", "tables": [{"file": ["data/*.parquet"]}],
            "images": {"path": ["{image}"]}, "labels": {"column": "label"}}  # fmt: skip
    task = {**content("idrid"), "data": data, "parts": {}, "classes": [
        {"name": name, "value": value, "present": [name]} for name, value in ("a0", "b1")
    ]}  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(task))
    _, found = reading.read(tasks.read(f"{tmp_path}/t.json"), tmp_path)
    assert found.ids == ["data/0.parquet#row=0,image", "data/../a.png"]
    assert found.labels.tolist() == [[0, 1], [1, 0]]
    assert [read_bytes(source) for source in found.sources] == [held, held]


def test_arrays_in_other_files_are_refused(tmp_path):
    """HDF5 may name other files, whose bytes would be taken for images: links, raw and virtual
    data."""
    h5py = pytest.importorskip("h5py")
    secret, shape = tmp_path / "secret", (3, 96, 96, 3)
    secret.write_bytes(bytes(3 * 96 * 96 * 3))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("x", shape, np.uint8)
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("y", data=np.array([1, 0, 1], np.uint8))
    layout = h5py.VirtualLayout(shape, np.uint8)
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", shape)
    data = {"adapter": "h5", "images": {"key": "x", "file": ["x.h5"]},
            "labels": {"key": "y", "file": ["y.h5"]}}  # fmt: skip
    task = tasks.parse("own", {**content("patchcamelyon"), "data": data, "parts": {}})
    for fill, say in (
        (lambda file: file.create_dataset("x", shape, np.uint8, external=str(secret)), "another"),
        (lambda file: file.create_virtual_dataset("x", layout), "in another file; copy it into"),
        (lambda file: file.update({"x": h5py.ExternalLink("other.h5", "x")}), "in another file"),
        (lambda file: file.create_group("x"), "'x' is no array"),
    ):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            fill(file)
        with pytest.raises(ValueError, match=f"{tmp_path}/x.h5: .*{say}"):
            reading.read(task, tmp_path)


def test_images_that_cells_name_stay_below_the_data(tmp_path):
    """Paths in tables may go up and down again, but not out of the folder that was given."""
    picture(tmp_path / "a.png", 7)
    (tmp_path / "data").mkdir()
    data = {"adapter": "csv", "tables": [{"file": ["t.csv"]}],
            "images": {"path": ["{image}"]}, "labels": {"column": "label"}}  # fmt: skip
    changes = {"data": data, "parts": {}, "classes": [
        {"name": name, "value": name, "present": [name]} for name in "01"
    ]}  # fmt: skip
    task = tasks.parse("own", {**content("idrid"), **changes})
    for cell in ("../a.png", str(tmp_path / "a.png"), "x/../../a.png"):
        (tmp_path / "data" / "t.csv").write_text(f"image,label\n{cell},1\n")
        with pytest.raises(ValueError, match="a.png' leads out of .*data; expected a path below"):
            reading.read(task, tmp_path / "data")
    (tmp_path / "t.csv").write_text(f"image,label\n{tmp_path / 'a.png'},1\ndata/../a.png,0\n")
    assert len(reading.read(task, tmp_path)[1].ids) == 2


def test_an_empty_cell_of_exclusive_classes_is_negative_of_none():
    layout, rows = LabelColumns(column="dx"), [{"dx": "a"}, {"dx": ""}, {"dx": "b"}]
    of_rows, _ = labels.of_rows(rows, ("a", "b"), layout, Policy(), exclusive=True)
    assert np.isnan(of_rows[1]).all() and of_rows[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"'dx': blank is 'negative', but .* leave out --blank"):
        labels.of_rows(rows, ("a", "b"), layout, Policy(blank="negative"), exclusive=True)
    findings, _ = labels.of_rows(rows, ("a", "b"), layout, Policy(blank="negative"))
    assert findings[1].tolist() == [0, 0]
