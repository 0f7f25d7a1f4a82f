"""Splits: parts of the data set or drawn by group, disjoint, with the same classes."""

import numpy as np
import pytest
from miniatures import PAIRS, content, picture, write

from medsiglip_jax.data import labels
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.data import splits
from medsiglip_jax.evaluate.data.dataset import Dataset


def drawn_from(groups, n=None):
    ids = [f"{i}.png" for i in range(n or len(groups))]
    labels = np.arange(len(ids), dtype=np.float32)[:, None] % 2
    return Dataset(ids, [f"/d/{name}" for name in ids], labels, ("a",), groups, texts=ids)


def test_parts_are_drawn_by_group_and_seed():
    names = [f"patient {i}" for i in range(100)]
    found = drawn_from([name for i, name in enumerate(names) for _ in range(1 + i % 4)])
    parts = splits.draw(found, 0)
    groups = {name: set(part.groups) for name, part in parts.items()}
    assert {name: len(g) for name, g in groups.items()} == {
        "train": 60,
        "validation": 20,
        "test": 20,
    }
    assert set.union(*groups.values()) == set(names)
    splits.check_disjoint(parts)
    assert sum(map(len, parts.values())) == len(found)
    for part in parts.values():  # rows stay together
        for name, source, label, group, text in zip(
            part.ids, part.sources, part.labels[:, 0], part.groups, part.texts, strict=True
        ):
            i = found.ids.index(name)
            assert (source, group, text) == (f"/d/{name}", found.groups[i], name) and label == i % 2
    order = np.random.default_rng(0).permutation(len(found))
    shuffled = splits.draw(found.select(order), 0)
    assert {n: set(p.ids) for n, p in shuffled.items()} == {n: set(p.ids) for n, p in parts.items()}
    assert set(splits.draw(found, 1)["test"].groups) != groups["test"]
    fewer = splits.draw(found.select(np.flatnonzero(np.array(found.groups) != names[0])), 0)
    assert len(set(fewer["test"].groups) & groups["test"]) >= 19


def test_images_without_a_group_are_groups_of_their_own():
    parts = splits.draw(drawn_from(None, 10), 0)
    assert {name: len(p) for name, p in parts.items()} == {"train": 6, "validation": 2, "test": 2}
    parts = splits.draw(drawn_from(["p"] * 90 + [""] * 4), 0)
    assert sorted(len(p) for p in parts.values()) in ([1, 1, 92], [1, 2, 91], [1, 3, 90])
    splits.check_disjoint(parts)


def test_three_groups_are_enough_whatever_their_sizes():
    for groups in (["a", "b"] + ["c"] * 98, ["a"] * 98 + ["b", "c"], ["a"] + ["b"] * 98 + ["c"]):
        for seed in range(5):
            assert all(map(len, splits.draw(drawn_from(groups), seed).values()))
    with pytest.raises(ValueError, match=r"4 images are of 2 groups \(patients\); three"):
        splits.draw(drawn_from(["a", "a", "b", "b"]), 0)


def test_shared_images_and_groups_are_counted_of_each_two_parts():
    found = drawn_from([f"p{i // 2}" for i in range(12)])
    one, two, three = found.select(range(5)), found.select(range(4, 8)), found.select(range(8, 12))
    splits.check_disjoint(
        {"train": one.select(range(4)), "validation": two.select([2, 3]), "test": three}
    )
    with pytest.raises(ValueError) as caught:
        splits.check_disjoint({"train": one, "validation": two, "test": three})
    assert str(caught.value).endswith(
        "; train and validation share 1 groups (patients): p2; train and validation share 1 "
        "images: /d/4.png"
    )
    with pytest.raises(ValueError, match="train and test share 6 groups .*: p0, p1, p2, …; train"):
        splits.check_disjoint({"train": found, "test": found})


def test_without_parts_the_test_shrinks(tmp_path):
    write(tmp_path / "train.csv", "id_code,diagnosis\n" + "".join(f"i{i},0\n" for i in range(10)))
    for i in range(10):
        picture(tmp_path / f"train_images/i{i}.png")
    task = tasks.read("aptos-2019")
    _, parts = splits.read(task, tmp_path, seed=5)
    assert parts.origin == "all drawn by image, seed 5"
    assert (len(parts.test), len(parts.validation), len(parts.train)) == (2, 2, 6)
    _, less = splits.read(task, tmp_path, seed=5, wanted=["validation"])
    assert less.test.ids == parts.test.ids and less.validation.ids == parts.validation.ids
    assert less.train is None
    _, none = splits.read(task, tmp_path, wanted=[])
    assert len(none.test) == 10 and none.train is None and none.validation is None


def test_a_part_has_the_classes_of_the_test(tmp_path):
    own = content("vindr-cxr") | {"parts": {"train": {"tables": [{"file": ["train.csv"]}]}}}
    own["data"]["images"] = {"path": ["{image_id}.png"]}
    task = tasks.parse("mine", own)
    write(tmp_path / "image_labels_test.csv", "image_id,B,A,No finding\na,1,0,0\nb,0,0,1\n")
    write(tmp_path / "train.csv", "image_id,rad_id,A,B,No finding\nc,R1,1,0,0\n")
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    task, parts = splits.read(task, tmp_path, wanted=["train"])
    assert [c.name for c in task.classes] == ["B", "A"] == list(parts.train.values)
    assert parts.train.labels.tolist() == [[0, 1]]
    for header, odd in (("A,B,C", "C"), ("A,X,No finding", "B, X")):
        write(tmp_path / "train.csv", f"image_id,rad_id,{header}\nc,R1,1,0,0\n")
        with pytest.raises(ValueError, match=f"part train and .* different classes; .*: {odd}$"):
            splits.read(tasks.parse("mine", own), tmp_path)


LABELS = {
    "title": "x", "kind": "multi_label", "score": "cosine", "template": {"present": ["{}"]},
    "data": {"adapter": "csv", "tables": [{"file": ["t.csv"]}], "images": {"path": ["{image}"]},
             "where": {"split": ["test"]}},
    "classes": [{"name": "Edema"}, {"name": "Mass"}],
}  # fmt: skip


def test_parts_have_policies_of_their_own(tmp_path):
    names = "test", "train", "validation"
    write(tmp_path / "t.csv", "image,split,Edema,Mass\n"
          + "".join(f"{n}.png,{n},-1,\n{n}2.png,{n},1,-1\n" for n in names))  # fmt: skip
    for name in names:
        picture(tmp_path / f"{name}.png")
        picture(tmp_path / f"{name}2.png")
    parts = {name: {"where": {"split": [name]}} for name in ("train", "validation")}
    task, nan = tasks.parse("mine", LABELS | {"parts": parts}), np.nan
    policies = labels.parse_policies(
        "test:Edema=negative,train:positive,validation:Mass=negative", "train:negative"
    )
    _, found = splits.read(task, tmp_path, policies.pop(""), part_policies=policies)
    np.testing.assert_array_equal(found.test.labels, [[0, nan], [1, nan]])
    np.testing.assert_array_equal(found.train.labels, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(found.validation.labels, [[1, 0]])
    unread = "labels of validation are given a meaning, but of task mine only train and test are"
    drawn = tasks.parse("mine", LABELS | {"parts": {"train": parts["train"]}})
    with pytest.raises(ValueError, match=unread):
        splits.read(drawn, tmp_path, part_policies=policies)
    with pytest.raises(ValueError, match="labels of train are .* only test are read"):
        splits.read(task, tmp_path, wanted=[], part_policies={"train": labels.Policy()})


def test_parts_of_pairs(tmp_path):
    where = {name: {"where": {"split": [name]}} for name in ("train", "test")}
    own = PAIRS | {"data": PAIRS["data"] | where["test"], "parts": {"train": where["train"]}}
    rows = [f"{i}.png,text {i},{'train' if i < 10 else 'test'}\n" for i in range(12)]
    write(tmp_path / "pairs.csv", "image,text,split\n" + "".join(rows))
    for i in range(12):
        picture(tmp_path / f"{i}.png")
    _, parts = splits.read(tasks.parse("mine", own), tmp_path)
    assert parts.origin == "validation drawn by image from train, seed 0"
    assert parts.train and parts.validation and parts.train.labels.shape == (8, 0)
    assert parts.test.texts == ["text 10", "text 11"] and len(parts.validation) == 2
    for part in (parts.test, parts.train, parts.validation):
        assert part.texts == [f"text {name.removesuffix('.png')}" for name in part.ids]
