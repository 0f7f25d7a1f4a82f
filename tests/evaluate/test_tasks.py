"""Task files: those of the library, one's own, and everything that can be wrong with one."""

import json
import tomllib

import numpy as np
import pytest
from miniatures import content

from medsiglip_jax.evaluate import tasks, zero_shot
from medsiglip_jax.evaluate.data import layout, reading


@pytest.mark.parametrize("name", tasks.names())
def test_bundled_tasks_are_well_formed(name):
    task = tasks.read(name)
    assert task.title and task.trained_on and task.prompts_source
    if "none bundled" in task.prompts_source:
        with pytest.raises(ValueError, match="--prompts FILE"):
            task.check_prompts()
    else:
        task.check_prompts()
        prompts = [p for c in task.classes for p in (*c.present, *c.absent)]
        assert all(p == p.strip() and p and "|" not in p for p in prompts)
    assert tasks.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    for part in task.parts:
        assert task.part(part).data != task.data
    published = task.published
    if published and published.probe_auc:
        assert round(np.mean(list(published.probe_auc.values())), 3) == published.probe_mean
    if published and published.auc:
        assert set(published.auc) == {c.name for c in task.classes}
        assert round(np.mean(list(published.auc.values())), 3) == published.mean
    if published and published.mean and len(task.classes) != 13:
        assert not published.same_images  # only the CheXpert test set is public
    for name in task.readings:
        assert task.with_reading(name).prompts_sha256() != task.prompts_sha256()


def test_published_probes_are_those_of_private_images():
    means = {n: p.probe_mean for n in tasks.names() if (p := tasks.read(n).published)}
    pathology = [v for name, v in means.items() if name.startswith("histopathology-")]
    assert len(pathology) == 8 and round(np.mean(pathology), 3) == 0.878  # as the model card says
    assert (means["derm-79"], means["eyepacs"], means["chexpert-test"]) == (0.881, 0.857, None)
    assert not any(tasks.read(n).published.same_images for n, mean in means.items() if mean)


def test_adapters_are_those_that_there_are():
    assert set(reading.ADAPTERS) == set(layout.LAYOUTS)


def test_prompts_of_the_report():
    task = tasks.read("chexpert-test")
    of = {c.name: c for c in task.classes}
    assert of["Pneumothorax"].present == ("apical pneumothorax",)
    assert of["Pneumonia"].absent == ("lungs are clear", "no acute cardiopulmonary process")
    assert sum(len(c.present) for c in task.classes) == 43
    assert sum(len(c.absent) for c in task.classes) == 39
    five = [task.published.auc[name] for name in task.means["5 competition findings"]]
    assert np.mean(five) == pytest.approx(0.885)
    assert [c.present for c in tasks.read("aptos-2019").classes][4] == (
        "diabetic retinopathy severity: proliferative.",
    )
    assert len(tasks.read("derm-79").classes) == 79


def test_each_file_of_the_library_is_read_once(monkeypatch):
    loads, seen = tomllib.loads, []
    monkeypatch.setattr(tomllib, "loads", lambda text: seen.append(text) or loads(text))
    assert [task.name for task in tasks.library()] == tasks.names()
    assert len(seen) == len(set(seen)) == len(tasks.names())


def test_ones_own_task(tmp_path):
    own = content("aptos-2019")
    (tmp_path / "mine.json").write_text(json.dumps(own))
    assert tasks.read(str(tmp_path / "mine.json")).classes == tasks.read("aptos-2019").classes
    with pytest.raises(FileNotFoundError, match="neither a file nor a task; tasks are aptos-2019"):
        tasks.read("aptos")


ATTRIBUTES = {"part": "x", "id": "y", "sex": "z"}


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"tittle": "x"}, "has no key tittle .did you mean title"),
        ({"kind": "ordinal"}, "kind is 'ordinal'; expected one of multi_label, multi_class, pairs"),
        ({"score": "softmax"}, "score is 'softmax'; expected one of pos_minus_neg"),
        ({"retrieval": "images"}, "retrieval is 'images'; expected one of text, prompts"),
        ({"classes": [{"name": "a", "prompt": "x"}], "kind": 1}, "kind is 1.*no key prompt"),
        ({"parts": {"train": "x"}}, "parts.train is 'x'"),
        # What is wrong although every key has the right type, all at once.
        (
            {
                "classes": [{"name": "a"}, {"name": "a"}],
                "means": {"m": ["Nope"]},
                "published": {"where": "x", "auc": {"N": 1.0}, "probe_auc": {"No pe": 1.0}},
            },
            "twice: a; means.m names no classes: Nope; published.auc names no classes: N; "
            "published.probe_auc names no classes: No pe",
        ),
        ({"classes": []}, "neither classes nor a template"),
        ({"data": {"adapter": "zip"}}, "data: adapter is 'zip'; expected one of csv, folders"),
        ({"parts": {"valid": {}}}, "parts.valid: expected train or validation"),
        ({"parts": {"train": {"attributes": ATTRIBUTES}}}, "parts.train: attributes: id, part is"),
        ({"retrieval": "text"}, "retrieval by text needs data.text, the column of texts"),
        ({"kind": "pairs"}, "data.text.*'pairs', which has no classes, score, ordinal_from"),
        ({"kind": "multi_label", "retrieval": "prompts"}, "by prompts needs kind 'multi_class'"),
        ({"title": None, "data": None}, "lacks title, data"),
        ({"score": ""}, "lacks score"),
    ],
)
def test_broken_tasks(change, say):
    with pytest.raises(ValueError, match=f"(?s)^task mine: .*{say}"):
        tasks.parse("mine", content("aptos-2019") | change)


@pytest.mark.parametrize(
    ("name", "change", "say"),
    [
        ("aptos-2019", {"imagse": {}}, "data: the table has no key imagse .did you mean images"),
        ("aptos-2019", {"tables": [{"files": ["x"]}]}, r"tables\[0\] has no key files.*lacks file"),
        ("aptos-2019", {"tables": [{"file": "x"}]}, r"tables\[0\].file is 'x'; expected tuple"),
        ("aptos-2019", {"tables": [{"file": ["x"]}] * 2}, "tables after the first lack on"),
        ("aptos-2019", {"images": {}}, "images: lacks one of path, each, find"),
        ("aptos-2019", {"images": {"find": "*"}}, "images: find needs name, or parse and on"),
        ("retinamnist", {"labels": {"file": ["x"]}}, "labels lacks key"),
        ("retinamnist", {"file": []}, "images and labels: lacks file"),
        ("crc-val-he-7k", {"root": "x"}, "root is 'x'; expected tuple"),
    ],
)
def test_broken_settings_of_an_adapter(name, change, say):
    own = content(name)
    own["data"] |= change
    with pytest.raises(ValueError, match=f"task mine: .*{say}"):
        tasks.parse("mine", own)


def test_prompts_of_a_file(tmp_path):
    task, path = tasks.read("histopathology-cervix"), tmp_path / "prompts.toml"
    path.write_text('normal = ["a", "a", "b"]\n"CIN 1" = ["c"]\n"CIN 2+" = {present = ["d"]}\n')
    given = task.with_prompts(path)
    given.check_prompts()
    assert [c.present for c in given.classes] == [("a", "a", "b"), ("c",), ("d",)]
    assert "prompts.toml" in given.prompts_source
    path.write_text('normal = "a"\nCIN = ["b"]\n')
    with pytest.raises(ValueError, match="no classes of task .*: CIN; normal: present: expected"):
        task.with_prompts(path)
    path.write_text("normal = [")
    with pytest.raises(ValueError, match="not readable as TOML"):
        task.with_prompts(path)


def test_rules_are_those_of_the_tasks():
    assert {tasks.read(name).score for name in tasks.names()} <= set(zero_shot.RULES)


def test_a_part_replaces_whole_settings():
    own = content("messidor-2") | {"parts": {"train": {"where": {}, "group_optional": False}}}
    task = tasks.parse("mine", own)
    got = task.part("train")
    assert got.data == {k: v for k, v in task.data.items() if k not in ("where", "group_optional")}
    assert got.classes == task.classes and not got.parts and "part train" in got.title
    with pytest.raises(ValueError, match="task mine has no part 'validation'; there are: train"):
        task.part("validation")
    with pytest.raises(ValueError, match="no part 'test'; there are: none"):
        tasks.read("ddi").part("test")


def own(**changes):
    return {**content("idrid"), "parts": {}, **changes}


@pytest.mark.parametrize("name", ["../../evil", "a/b", r"a\b", "..", "", "con", "x" * 201, "a\n"])
def test_a_reading_is_part_of_file_names(name):
    readings = {name: {"about": "x"}}
    with pytest.raises(ValueError, match="expected a plain file name of letters, digits, spaces"):
        tasks.parse("own", own(readings=readings))


@pytest.mark.parametrize("names", [["a b", "a_b"], ["v1", "V1"], ["as_given"]])
def test_readings_that_name_one_file_of_scores_are_refused(names):
    """Some disks know no capitals, and a space becomes an underscore: one replaced the other."""
    readings = {name: {"about": "x"} for name in names}
    with pytest.raises(ValueError, match=f"{names[-1]}' and .* name the same file of scores"):
        tasks.parse("own", own(readings=readings))
    tasks.parse("own", own(readings={"v1.0": {"about": "x"}, "v1.1": {"about": "x"}}))


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x", "**/../x", "gs://b/x"])
def test_paths_of_a_task_stay_below_its_data(path):
    labels = {"column": "label"}
    image, tables = {"path": ["{image}"]}, [{"file": ["a"]}]
    arrays = {"images": {"key": "x"}, "labels": {"key": "y"}}
    for where, data in (
        ("root", {"adapter": "folders", "root": [path]}),
        ("tables.0..file", {"adapter": "csv", "tables": [{"file": [path]}], "images": image}),
        ("images.path", {"adapter": "csv", "tables": tables, "images": {"path": [path]}}),
        ("images.find", {"adapter": "csv", "tables": tables,
                         "images": {"find": path, "name": "{id}"}}),
        ("listed.file", {"adapter": "csv", "tables": tables, "images": image,
                         "listed": {"file": path, "column": "id"}}),
        ("file", {"adapter": "npz", **arrays, "file": [path]}),
    ):  # fmt: skip
        data |= {"labels": labels} if data["adapter"] == "csv" else {}
        with pytest.raises(ValueError, match=f"data: {where} is .*; expected paths below the fold"):
            tasks.parse("own", own(data=data))
