"""The house: imports go down the list of rooms, never in a circle; one owner per dependency."""

import ast
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from source_files import PACKAGE

import medsiglip_jax

# From the bottom up: a file imports files of its own room and of the rooms before it.
ROOMS = (
    "losses metrics files preprocess model data pages train inference embeddings trust evaluate "
    "plan serve cli"
).split()
# Inside preprocess: what defines or calculates, then readers (all other files), then dispatch.
DEFINE = (
    "facts names parts image text tokenizer_json tokenizer_files augment "
    "dicom.header dicom.rules dicom.series dicom.sniff"
)
DISPATCH = "formats decode sources load codec xla"
# Rooms that people copy out of here: they import nothing of ours.
ALONE = {"losses", "metrics"}
# Who may import what is heavy, or has to be installed on top: rooms or files.
HEAVY = {
    "flax": {"model.towers"},
    "orbax": {"model.weights.orbax", "train.checkpoints"},
    "optax": {"train.optim", "embeddings.probe.hidden"},
    "ml_collections": {"train.configs"},
    "tensorflow": {
        "data.tf.encoded",
        "data.tf.kernels",
        "data.tf.ops",
        "data.tf.pipeline",
        "data.tf.pixels",
        "data.tf.service",
        "data.tfrecord",
        "train.events",
    },
    "sentencepiece": {"preprocess.text"},
    "tokenizers": {"preprocess.tokenizer_json"},
    "safetensors": {"model.weights.safetensors"},
    "huggingface_hub": {"model.weights.hub"},
    "pyarrow": {
        "data",
        "inference",
        "embeddings",
        "evaluate",
        "preprocess.xla",
        "preprocess.parquet",
    },
    "h5py": {"evaluate.data.arrays", "embeddings.elsewhere.hdf5"},
    "pydicom": {"preprocess.dicom.file", "preprocess.dicom.tags"},
    "imagecodecs": {"preprocess.dicom.frames"},
    "nibabel": {"preprocess.volumes"},
    "openslide": {"preprocess.slides", "preprocess.formats"},
    "skimage": {"preprocess.tissue"},
    "sklearn": {"train.quickstart"},
    "usearch": {"embeddings.index"},
    "ray": {"inference.ray_cluster"},
    "shtab": {"cli.completion"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "torch": set(),
    "transformers": set(),
    "peft": set(),
}

Graph = Mapping[str, set[str]]


def sources(package: Path) -> dict[str, Path]:
    """Every file of the package by its dotted name below it; faces end in `.__init__`."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }


def imported(path: Path) -> Iterator[str]:
    """The absolute names that a file imports, inside functions, too: modules, or names in them.

    A string that names a module counts, for it is there to be imported later.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^medsiglip_jax(?:\.\w+){2,}$", node.value)


@functools.cache
def graph(package: Path) -> Graph:
    """File -> the files of the package that it imports; a room's face counts as its `__init__`."""
    files = sources(package)

    def file(name: str) -> str | None:
        parts = name.split(".")[1:]
        for end in range(len(parts), 0, -1):
            stem = ".".join(parts[:end])
            if stem in files or f"{stem}.__init__" in files:
                return stem if stem in files else f"{stem}.__init__"
        return None

    edges = {}
    for name, path in files.items():
        internal = (n for n in imported(path) if n.startswith("medsiglip_jax."))
        edges[name] = {found for n in internal if (found := file(n)) and found != name}
    return edges


def room(name: str) -> str:
    return name.split(".")[0]


def is_face(name: str) -> bool:
    """`__init__` and `__main__` files: they point into their rooms, nothing points back."""
    return name.split(".")[-1] in ("__init__", "__main__")


def upward(edges: Graph) -> list[str]:
    """Imports that do not go down the list of rooms, or out of a room that stands alone."""
    return sorted(
        f"{name} imports {other}, which is not below it"
        for name, others in edges.items()
        if not is_face(name)
        for other in others
        if room(other) != room(name)
        and (room(name) in ALONE or ROOMS.index(room(other)) > ROOMS.index(room(name)))
    )


def against_the_order_of_preprocess(edges: Graph) -> list[str]:
    """Imports inside preprocess that do not go down its three groups of files."""

    def group(name: str) -> int:
        stem = name.removeprefix("preprocess.")
        return 0 if stem in DEFINE.split() else 2 if stem in DISPATCH.split() else 1

    return sorted(
        f"{name} imports {other}, which is above it"
        for name, others in edges.items()
        if room(name) == "preprocess" and not is_face(name)
        for other in others
        if room(other) == "preprocess" and not is_face(other) and group(other) > group(name)
    )


def own_face(edges: Graph) -> list[str]:
    """Files that import the face of their own room, which would close a circle."""
    return sorted(
        f"{name} imports its own face {other}"
        for name, others in edges.items()
        if not is_face(name)
        for other in others
        if is_face(other) and name.startswith(other.removesuffix("__init__"))
    )


def circle(edges: Graph) -> list[str]:
    """The files of one import circle, in order, or none. Faces are left out: they are lazy."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done or is_face(name):
            return []
        for other in sorted(edges[name]):
            if found := visit(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_every_file_is_in_a_room():
    strangers = {room(name) for name in sources(PACKAGE)} - set(ROOMS) - {"__init__", "__main__"}
    assert not strangers, "give them a place in ROOMS"


def test_imports_go_down_the_list_of_rooms():
    edges = graph(PACKAGE)
    assert not upward(edges)
    assert not own_face(edges)


def test_preprocess_defines_then_reads_then_dispatches():
    assert not against_the_order_of_preprocess(graph(PACKAGE))


def test_no_files_import_each_other_in_a_circle():
    assert not circle(graph(PACKAGE))


def test_every_name_in_a_face_is_found():
    """A name that is also a file of its room would become that file once somebody imports it."""
    for info in pkgutil.walk_packages(medsiglip_jax.__path__, "medsiglip_jax."):
        if not info.ispkg:
            continue
        face = importlib.import_module(info.name)
        folder = Path(face.__file__).parent
        for name in dir(face) if hasattr(face, "__getattr__") else []:
            value = getattr(face, name)
            if not name.startswith("_") and not isinstance(value, ModuleType):
                assert not folder.joinpath(f"{name}.py").exists(), f"{info.name}.{name}"
                assert not folder.joinpath(name).exists(), f"{info.name}.{name}"


def planted(folder: Path, **files: str) -> Graph:
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graph(folder)


def test_planted_mistakes_are_found(tmp_path):
    edges = planted(
        tmp_path,
        files__a="def f():\n    from medsiglip_jax.files import b\n",
        files__b="from medsiglip_jax.files.c import x\n",
        files__c="from medsiglip_jax.files import a\n",
        files__d="from medsiglip_jax.files.a import x\nfrom medsiglip_jax.train.e import y\n",
        train__e="from medsiglip_jax.files import d\n",
        preprocess__bytes="READER = 'medsiglip_jax.preprocess.sources'\n",
        preprocess__sources="from medsiglip_jax.preprocess import facts\n",
        preprocess__facts="",
        losses="def f():\n    import medsiglip_jax.files.a\n",
    )
    assert circle(edges) == ["files.a", "files.b", "files.c", "files.a"]
    assert upward(edges) == [
        "files.d imports train.e, which is not below it",
        "losses imports files.a, which is not below it",
    ]
    assert against_the_order_of_preprocess(edges) == [
        "preprocess.bytes imports preprocess.sources, which is above it"
    ]


def test_one_owner_per_heavy_dependency():
    for name, path in sources(PACKAGE).items():
        for module in imported(path):
            owners = HEAVY.get(module.split(".")[0])
            assert owners is None or {name, room(name)} & owners, f"{name} imports {module}"


# What a process does, one after the other, and what it must not have imported by then.
LIGHT = {
    "import medsiglip_jax, " + ", ".join(f"medsiglip_jax.{room}" for room in ROOMS
                                         if room not in ALONE):
        "jax tensorflow torch numpy flax PIL pyarrow fsspec",
    "from medsiglip_jax import cli\nassert cli.main(['--help']) == 0":
        "jax tensorflow torch numpy flax PIL",
    "import medsiglip_jax.data.loader": "jax tensorflow torch",
    # The public submodules need no import of their own.
    "import medsiglip_jax as m\n"
    "m.losses.sigmoid_loss, m.metrics.auc, m.preprocess.image.resize_bilinear\n"
    "m.preprocess.sources.read, m.preprocess.sources.UnreadableImage\n"
    "m.preprocess.decode.decode, m.preprocess.dicom.rules.Rules": "tensorflow torch flax",
    "import tempfile, numpy as np\n"
    "model = m.init('tiny-56')\n"
    "with tempfile.TemporaryDirectory() as folder:\n"
    "    m.save(model, folder + '/m')\n"
    "    model = m.load(folder + '/m')\n"
    "model.encode_image(np.zeros((1, 56, 56, 3), np.uint8))\n"
    "model.encode_text(np.ones((1, 64), np.int32))": "tensorflow torch transformers orbax optax",
    "import medsiglip_jax.train.loop, medsiglip_jax.train.finetune":
        "tensorflow torch orbax sklearn transformers",
}  # fmt: skip


def test_nothing_heavy_is_imported_before_it_is_needed():
    """In one process, since a module that is not there yet has not been imported before either."""
    code = ["import sys"]
    for step, heavy in LIGHT.items():
        found = f"{set(heavy.split())!r} & set(sys.modules)"
        code += [step, f"assert not {found}, ({found}, {step!r})"]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)
