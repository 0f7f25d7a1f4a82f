"""For every test: eight CPU devices, so that sharding is tested where there is no accelerator, and
programs that compile quickly; and the fixtures that several rooms share."""

import contextlib
import gc
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import jax
import pytest

from medsiglip_jax.cli import devices
from medsiglip_jax.files import limits

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
os.environ["EPATH_USE_TF"] = "false"  # TensorFlow's client of gs:// knows no emulators


# Nearly all time of the tests goes into compiling small programs. A train step takes a core 11.5 s
# with XLA's defaults, 6 s without its optimisations, 2 s if it is also emitted one operation at a
# time, which XLA can no longer do in jax 0.11. It ends a process that asks for what it cannot do.
# LLVM takes 1.9 s of a core for a step in one piece, 3.3 for its 32 pieces in several threads.
COMPILE_QUICKLY = [
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]  # fmt: skip
if jax.__version_info__ < (0, 11):
    COMPILE_QUICKLY.append("--xla_cpu_use_fusion_emitters=false")


# What buckets and servers hold in tests that need none.
limits.allow("memory")


def pytest_addoption(parser):
    parser.addoption(
        "--optimised", action="store_true",
        help="compile programs as users do, which takes three times as long; for tests marked "
        "float or slow",
    )  # fmt: skip

    parser.addoption(
        "--no-skips", action="store_true", help="fail where something that tests need is missing"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.config.getoption("no_skips"):
        report.outcome = "failed"
    return report


def pytest_configure(config):
    """Sets XLA's flags, also for the processes that tests start, before anything is compiled."""
    if not config.getoption("optimised"):
        flags = [os.environ.get("XLA_FLAGS", ""), *COMPILE_QUICKLY]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    """What was read stays, and took a fifth of the time when it was searched for garbage. Python's
    usual thresholds then cost the tests of training another twentieth."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def warnings_of_threads():
    """beartype sets aside the warning filters of the whole process whenever it decorates a
    function, and those inside functions each time. In threads that lost warnings of tests."""
    wrap = "beartype._decor._nontype._wrap"
    for module in (import_module(f"{wrap}._wrapargs"), import_module(f"{wrap}._wrapreturn")):
        module.catch_warnings = lambda **_: contextlib.nullcontext([])


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_user(tmp_path_factory):
    """No test reads what this user's commands have kept, or adds to it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """What one test compiled, another, in whatever process, need not compile again."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder within that of the run
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    devices.keep_programs(import_module("jax._src.compilation_cache"))  # where commands look, too


@pytest.fixture
def run(capsys):
    """Runs a command line in this process -> (exit code, stdout, stderr)."""
    from medsiglip_jax import cli

    def call(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files, or a skip that says how to get it."""
    folder = os.environ.get("MEDSIGLIP_TEST_DATA")
    if not folder:
        pytest.skip("MEDSIGLIP_TEST_DATA is unset: it names a folder with images/ and tokenizer/")
    return Path(folder)


@pytest.fixture(scope="session")
def torture() -> int:
    """By how much scripts/torture.py multiplies the kills and the mutated files."""
    return int(os.environ.get("MEDSIGLIP_TORTURE", "1"))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> Iterator[str]:
    """gs://bucket in an emulator of Google Cloud Storage on this machine.

    The emulator's downloads lack the header x-goog-generation, which Google's always have. Without
    it tensorstore takes the generation to be 0, and refuses it as "Malformed StorageGeneration"
    when it asks whether what it has read has changed: in a checkpoint that takes longer, or not.
    """
    server = pytest.importorskip("gcp_storage_emulator.server")
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    pytest.importorskip("gcsfs")
    download = objects.download

    def download_with_generation(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        file = storage.objects["bucket"].get(request.params["object_id"])
        if file:
            response["x-goog-generation"] = file["generation"]

    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    host, port = emulator._api._httpd.server_address[:2]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://{host}:{port}")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(objects, "download", download_with_generation)
        yield "gs://bucket"
    emulator.stop()


CAPTIONS = [f"{what} of a {part}" for what in ("photo", "scan", "drawing") for part in "abcdef"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small Hugging Face folder with random weights and a tokenizer of its own."""
    import references

    import medsiglip_jax
    from medsiglip_jax.model import api
    from medsiglip_jax.preprocess import text

    tokenizer = text.train(CAPTIONS, 40)
    params = medsiglip_jax.init(references.SMALL).params
    model = api.Model(params, references.SMALL, tokenizer=tokenizer)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    medsiglip_jax.save(model, folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Seven readable images in two folders, one damaged, one that is no image, one hidden."""
    return _write_pictures(tmp_path / "pictures")


@pytest.fixture(scope="session")
def untouched_pictures(tmp_path_factory) -> Path:
    """The same, for tests that write nothing beside them."""
    return _write_pictures(tmp_path_factory.mktemp("untouched") / "pictures")


def _write_pictures(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for i in range(7):
        pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
        name = f"{i}.png" if i < 4 else f"sub/{i}.jpg"
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "sub" / "4.jpg").read_bytes()
    (folder / "sub" / "damaged.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.md").write_text("not an image")
    (folder / ".hidden.png").write_bytes(whole)
    return folder


@pytest.fixture
def cine(tmp_path):
    """A cine of seven frames, a single image and a picture."""
    from dicom_files import CINE, made
    from PIL import Image

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(made(CINE, Modality="US", NumberOfFrames="7"))
    (folder / "b.dcm").write_bytes(made(CINE[0, ..., 0], Modality="US"))
    Image.fromarray(CINE[3]).save(folder / "c.png")
    return folder
