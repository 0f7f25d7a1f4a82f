"""The files of scripts/serve: no rights and no tools, and users, ports and flags that agree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medsiglip_jax import cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "serve"
MANIFESTS = ["kubernetes.yaml", "kserve.yaml", "cloudrun.yaml"]
PORT = 8080
BUILD_TOOLS = r"\b(apt|apt-get|dpkg|pip|gcc|g\+\+|make|cmake|build-essential|git|curl|wget)\b"


def stages() -> list[list[tuple[str, str]]]:
    """Instructions and their values by stage; the one before the first FROM has what both need."""
    lines = [line for line in _text("Dockerfile").splitlines() if not re.match(r"\s*#", line)]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(str.strip, joined.splitlines()):
        instruction, value = line.split(None, 1)
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, value.strip()))
    return found


def values(stage, instruction):
    return [value for name, value in stage if name == instruction]


def arguments(stage) -> dict[str, str]:
    return dict(value.split("=", 1) for value in values(stage, "ARG"))


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def documents(name: str) -> list[dict]:
    return list(pytest.importorskip("yaml").safe_load_all(_text(name)))


def pod(name: str) -> dict:
    """What a manifest says of its pods."""
    spec = documents(name)[0]["spec"]
    return spec["predictor"] if "predictor" in spec else spec["template"]["spec"]


def container(name: str) -> dict:
    (only,) = pod(name)["containers"]
    return only


GLOBAL, BUILD, FINAL = stages()


def test_the_base_is_pinned_and_slim():
    assert re.fullmatch(r"3\.12\.\d+-slim-\w+", arguments(GLOBAL)["PYTHON"])
    assert values(BUILD, "FROM") == ["python:${PYTHON} AS build"]
    assert values(FINAL, "FROM") == ["python:${PYTHON}"]


def test_the_image_is_of_no_root_and_has_no_build_tools():
    (user,) = values(FINAL, "USER")
    assert all(int(number) >= 1000 for number in user.split(":"))
    assert not values(FINAL, "RUN")
    assert values(FINAL, "COPY") == ["--from=build /opt/medsiglip /opt/medsiglip"]
    assert not any(re.search(BUILD_TOOLS, value) for _, value in FINAL)
    assert re.search(BUILD_TOOLS, values(BUILD, "RUN")[0])  # the pattern finds what there is
    assert "--without-pip" in values(BUILD, "RUN")[0]


def test_all_that_the_image_writes_is_in_tmp():
    (settings,) = values(FINAL, "ENV")
    paths = dict(item.split("=", 1) for item in settings.split())
    folders = {name for name, value in paths.items() if value.startswith("/") and name != "PATH"}
    assert {"HOME", "HF_HOME", "JAX_COMPILATION_CACHE_DIR"} <= folders
    assert all(Path(paths[name]).is_relative_to("/tmp") for name in folders)
    assert values(FINAL, "WORKDIR") == ["/tmp"]


def copied() -> list[str]:
    """The sources of the build, relative to the root of the repository."""
    return [source for value in values(BUILD, "COPY") for source in value.split()[:-1]]


def test_the_build_gets_what_it_copies_and_nothing_else():
    patterns = [line for line in _text("Dockerfile.dockerignore").splitlines() if line[:1] != "#"]
    assert patterns[0] == "*"
    assert sorted(copied()) == sorted(line[1:] for line in patterns if line.startswith("!"))
    assert all((ROOT / source).exists() for source in copied())


def test_the_extras_are_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chosen = arguments(BUILD)["EXTRAS"].split(",")
    devices = re.search(r"([\w|]+)\) extras=\"\$EXTRAS,\$DEVICE\"", values(BUILD, "RUN")[0])
    assert devices and set(devices[1].split("|")) == {"cuda12", "cuda13", "tpu"}
    assert set(chosen) | {"cuda12", "cuda13", "tpu"} <= set(project["optional-dependencies"])
    assert "serve" in chosen


def test_ports_are_equal_everywhere():
    assert values(FINAL, "EXPOSE") == [str(PORT)]
    for name in MANIFESTS:
        (port,) = container(name)["ports"]
        assert port["containerPort"] == PORT
        for probe in probes(container(name)).values():
            assert probe["port"] in (PORT, port["name"])
    deployment, service = documents("kubernetes.yaml")
    template = deployment["spec"]["template"]["metadata"]
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    assert container("kubernetes.yaml")["ports"][0]["name"] == "http"
    assert service["spec"]["selector"].items() <= template["labels"].items()
    assert template["annotations"]["prometheus.io/port"] == str(PORT)
    assert f"--container-ports={PORT} " in _text("README.md")


def probes(spec: dict) -> dict[str, dict]:
    return {name: spec[name]["httpGet"] for name in spec if name.endswith("Probe")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_probes_ask_the_routes_of_the_server(name):
    paths = {probe: asked["path"] for probe, asked in probes(container(name)).items()}
    assert paths["livenessProbe"] == "/health/live"
    if name == "cloudrun.yaml":  # sends requests as soon as an instance has started
        start = container(name)["startupProbe"]
        assert paths["startupProbe"] == "/health/ready"
        assert start["periodSeconds"] * start["failureThreshold"] <= 240  # its limit
    else:
        assert (paths["startupProbe"], paths["readinessProbe"]) == ("/health/ready",) * 2


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kserve.yaml"])
def test_pods_have_no_rights(name):
    (user,) = values(FINAL, "USER")
    security = pod(name)["securityContext"]
    assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False
    mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
    writable = [mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    assert set(mounts) == {volume["name"] for volume in pod(name)["volumes"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_limits_and_time_to_answer_what_they_accepted(name):
    assert set(container(name)["resources"]["limits"]) >= {"memory"}
    given = dict(flag.split("=", 1) for flag in container(name)["args"])
    assert given["--model"] == "MODEL"
    grace = pod(name).get("terminationGracePeriodSeconds", 10)  # Cloud Run's is fixed
    assert grace > float(given["--drain-delay"])


def flags() -> set[str]:
    """All that these files give to `medsiglip-jax serve`."""
    entry = json.loads(values(FINAL, "ENTRYPOINT")[0])
    assert entry[:2] == ["medsiglip-jax", "serve"]
    given = [*entry[2:], *(flag for name in MANIFESTS for flag in container(name)["args"])]
    after_the_image = " ".join(re.findall(r"medsiglip-serve (--.*)", _text("README.md"))).split()
    in_sentences = re.findall(r"`(--[\w-]+)`", _text("README.md"))
    words = [*given, *after_the_image, *in_sentences]
    return {word.split("=")[0] for word in words if word.startswith("--")}


def test_the_server_knows_the_flags(capsys):
    assert {"--model", "--host", "--drain-delay", "--certfile"} <= flags()
    assert cli.main(["serve", "--help"]) == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert flags() <= known


@pytest.mark.slow
def test_the_steps_of_the_build_install_the_command_without_pip(tmp_path):
    """What RUN says, in plain folders, with the files that the build gets and the fewest extras."""
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "builder"], check=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{tmp_path / 'builder' / 'bin'}:{kept['PATH']}"
    environment = {**kept, "PATH": path, "DEVICE": "cpu", "EXTRAS": "serve"}
    (step,) = values(BUILD, "RUN")
    installed = tmp_path / "installed"
    step = step.replace("/opt/medsiglip", str(installed))
    try:
        run = ["sh", "-euc", step]
        wrong = subprocess.run(run, cwd=tmp_path, env={**environment, "DEVICE": "abacus"})
        assert wrong.returncode == 2 and not installed.exists()
        subprocess.run(run, cwd=tmp_path, env=environment, check=True)
        command = [installed / "bin" / "medsiglip-jax", "--version"]
        done = subprocess.run(command, cwd=tmp_path, env={}, check=True, capture_output=True)
        assert done.stdout.startswith(b"medsiglip-jax ")
        assert not list(installed.glob("lib/*/site-packages/pip*"))
        page = list(installed.glob("lib/*/site-packages/medsiglip_jax/serve/ui.html"))
        assert len(page) == 1
    finally:
        shutil.rmtree(installed, ignore_errors=True)  # a gigabyte
