"""Config files: those that come along, by name from anywhere, and people's own."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from medsiglip_jax import cli
from medsiglip_jax.model import towers
from medsiglip_jax.model.config import named
from medsiglip_jax.train import configs, freeze, lora

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.name)
def test_the_recipes_people_copy(path):
    """Each reads, names its command, and freezes what the full-size model has."""
    found = configs.read(str(path), ["--config.data.path=mine.csv"])
    assert found.data[0].path == "mine.csv"
    text = path.read_text()
    assert f"--config {path.stem}" in text and "--workdir" in text and "xpect" in text
    if found.init:
        shapes = towers.param_shapes(named("so400m-448"))
        assert freeze.partition(found.freeze, shapes) is not None
        if found.lora:
            assert lora.LoRA().targets == found.lora.targets
        assert configs.read(f"{path}:elsewhere").init == "elsewhere"


def test_there_is_a_recipe_for_each_job():
    names = "classification contrastive frozen_image lora smoke tpu_slice".split()
    assert configs.names() == names == sorted(path.stem for path in CONFIGS.glob("*.py"))


def test_overrides():
    found = configs.read(
        "contrastive",
        ["--config.lora.rank=4", "--config.validation=held out", "--config.mesh.fsdp=True",
         "--config.data.label=('a', 'b')", "--config.learning_rate=1e-3", "--config.init=x",
         "--config.augment.crop=(0.5, 1)", "--config.seed=7"],
    )  # fmt: skip
    assert found.lora == lora.LoRA(rank=4) and found.validation == "held out" and found.mesh.fsdp
    assert found.data[0].label == ("a", "b") and found.learning_rate == 1e-3 and found.init == "x"
    assert found.augment.crop == (0.5, 1) and found.seed == 7


@pytest.mark.parametrize("text", ["{[]: 1}", "{{1}}", "[" * 300])
def test_a_value_that_is_no_literal_is_a_string(text):
    assert configs.read("contrastive", [f"--config.init={text}"]).init == text


def test_files_that_are_no_configs(tmp_path):
    say = "no/such.py: neither a config file nor a recipe; the recipes are classification, contr"
    with pytest.raises(FileNotFoundError, match=say):
        configs.read("no/such.py")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="not a Python file"):
        configs.read(str(tmp_path / "a.txt"))
    (tmp_path / "a.py").write_text("x = 1 +")
    with pytest.raises(ValueError, match="a.py: SyntaxError"):
        configs.read(str(tmp_path / "a.py"))
    (tmp_path / "b.py").write_text("x = 1")
    with pytest.raises(ValueError, match="get_config"):
        configs.read(str(tmp_path / "b.py"))


def test_a_recipe_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.read("lora:elsewhere").init == "elsewhere"
    Path("lora").write_text((CONFIGS / "smoke.py").read_text())  # no .py: not a Python file
    with pytest.raises(ValueError, match="not a Python file"):
        configs.read("lora")
    Path("mine.py").write_text((CONFIGS / "lora.py").read_text().replace("rank=16", "rank=2"))
    assert configs.read("mine.py").lora.rank == 2


def test_a_recipe_is_copied_to_be_edited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", "--copy-config", "lora", "my.py"]) == 0
    assert "edit it, then: medsiglip-jax finetune --config my.py" in capsys.readouterr().out
    assert Path("my.py").read_text() == (CONFIGS / "lora.py").read_text()
    for name, file, say in (
        ("lora", "my.py", "my.py: exists already; choose another name"),
        ("loar", "x.py", "loar: no recipe; the recipes are classification, contrastive"),
    ):
        assert cli.main(["finetune", "--copy-config", name, file]) == 2
        error = capsys.readouterr().err
        assert say in error and len(error.splitlines()) == 1 and not Path("x.py").exists()


def test_what_became_of_a_copied_recipe_is_told_as_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["finetune", "--copy-config", "lora", "my.py", "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {"recipe": "lora", "file": "my.py"}

    def full(name, file):
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr(configs, "copy", full)
    assert cli.main(argv) == 1  # it is the machine that has failed
    assert capsys.readouterr().err.endswith("my.py: No space left on device\n")


@pytest.mark.slow
def test_a_wheel_holds_the_recipes(tmp_path):
    """Built from the sdist, as a package registry would; without the network."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from medsiglip_jax.train import configs\n"
        "print(configs.__file__, *configs.names(), configs.read('lora').lora.rank)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    file, *names, rank = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and names == configs.names() and rank == "16"
