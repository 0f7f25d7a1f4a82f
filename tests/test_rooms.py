"""The house of the design: imports go downward only, one heavy dependency per room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import medsiglip_jax

PACKAGE = Path(medsiglip_jax.__file__).parent

# From the bottom up; a module may import modules on lower floors, or beside it in its own package.
FLOORS = [
    [f"metrics.{n}" for n in "checks intervals ranking delong classes bootstrap".split()],
    [f"metrics.{n}" for n in "calibration retrieval subgroups thresholds".split()],
    ["config", "tree", "metrics", "losses", "places", "charts", "attention"],
    ["locks", "opener"],
    ["storage"],
    ["model", "freeze", "lora"],
    ["sharding", "checkpoint", "optim", "objectives"],
    ["step"],
    ["preprocess.dicom", "preprocess.dicom.rules", "preprocess.dicom.sniff"],
    ["preprocess.parts"],
    [
        *(f"preprocess.{n}" for n in "decode image text augment files xla".split()),
        *(f"preprocess.{n}" for n in "sources handles volumes slides tissue".split()),
        *(f"preprocess.dicom.{n}" for n in "header file samples frames series".split()),
        *(f"preprocess.dicom.{n}" for n in "grey colour official pixels".split()),
    ],
    ["recipe"],
    ["weights"],
    [f"weights.{n}" for n in "names hub positions random huggingface big_vision orbax".split()],
    ["columns", "listing", "order", "rows"],
    ["tables", "tar", "expansion"],
    ["examples", "manifest"],
    ["api", "loader"],
    ["data", "validation", "train", "report"],
    ["tfds"],
    ["job"],
    ["plan"],
    ["plan.topologies", "plan.collectives", "plan.flops"],
    ["plan.program", "plan.worker", "plan.bound"],
    ["plan.verdict"],
    ["identifiers"],
    ["embeddings", "engine", "products", "contact_sheet"],
    ["nearest"],
    ["index", "features", "logistic"],
    ["probe"],
    ["learning", "probe_files"],
    ["classify", "embed", "finetune", "preview", "search"],
    ["heatmap", "quickstart"],
    ["evaluate"],
    ["evaluate.zero_shot", "evaluate.scores"],
    ["evaluate.tasks"],
    ["evaluate.dataset"],
    ["evaluate.labels", "evaluate.images"],
    [f"evaluate.{n}" for n in "csv_tables folders arrays vectors".split()],
    ["evaluate.datasets", "evaluate.digits", "evaluate.tables", "evaluate.aucs"],
    [f"evaluate.{n}" for n in "held_out learned learned_sections sections".split()],
    ["evaluate.probed", "evaluate.options"],
    ["evaluate.results", "evaluate.retrieval"],
    ["evaluate.report", "evaluate.job"],
    ["evaluate.run", "evaluate.compare"],
    [
        *(f"cli.{n}" for n in "common models preview embed search probe".split()),
        *(f"cli.{n}" for n in "evaluate compare finetune plan".split()),
    ],
    ["cli"],
    ["cli.__main__"],
]
# The weights front door picks a reader by the look of the source.
UPWARD = {("weights", reader) for reader in ("hub", "huggingface", "big_vision", "orbax")}
HEAVY = {
    "flax": {"model"},
    "orbax": {"checkpoint"},
    "optax": {"optim"},
    "ml_collections": {"recipe"},
    "tensorflow": {"data"},
    "sentencepiece": {"preprocess.text"},
    "safetensors": {"weights.huggingface"},
    "huggingface_hub": {"weights.hub"},
    "pyarrow": {
        "columns",
        "embed",
        "embeddings",
        "evaluate.retrieval",
        "evaluate.scores",
        "expansion",
        "heatmap",
        "manifest",
        "preprocess.xla",
        "rows",
        "tables",
    },
    "h5py": {"evaluate.arrays"},
    "pydicom": {"preprocess.dicom.file"},
    "imagecodecs": {"preprocess.dicom.frames"},
    "nibabel": {"preprocess.volumes"},
    "openslide": {"preprocess.slides"},
    "skimage": {"preprocess.tissue"},
    "sklearn": {"logistic", "quickstart"},
    "usearch": {"index"},
    "torch": set(),
    "transformers": set(),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(name: str) -> int | None:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), None)


def test_every_module_has_a_floor():
    homeless = [n for n in modules() if n not in ("__init__", "preprocess") and floor(n) is None]
    assert not homeless, "add them to FLOORS, where the design puts them"


@pytest.mark.parametrize("name", sorted(n for n in modules() if floor(n) is not None))
def test_imports_go_downward(name):
    internal = {n.removeprefix("medsiglip_jax.") for n in imports(modules()[name])}
    for other in internal:
        if floor(other) is None or other == name:
            continue
        allowed = floor(other) < floor(name) or (name, other.split(".")[-1]) in UPWARD
        same_package = "." in other and other.split(".")[0] == name.split(".")[0]
        beside = same_package and floor(other) == floor(name)
        assert allowed or beside, f"{name} imports {other}, which is not below it"


def test_one_heavy_dependency_per_room():
    for name, path in modules().items():
        for imported in imports(path):
            rooms = HEAVY.get(imported.split(".")[0])
            assert rooms is None or name in rooms, f"{name} imports {imported}; see HEAVY"


def assert_never_imports(heavy: set[str], code: str) -> None:
    code += f"\nimport sys\nfound = {heavy!r} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    assert_never_imports({"jax", "tensorflow", "numpy", "flax", "PIL"}, "import medsiglip_jax")


def test_the_loader_imports_neither_jax_nor_tensorflow():
    assert_never_imports({"jax", "tensorflow", "torch"}, "import medsiglip_jax.loader")


def test_training_needs_no_tensorflow():
    assert_never_imports(
        {"tensorflow", "torch", "orbax", "sklearn", "transformers"},
        "import medsiglip_jax.train, medsiglip_jax.finetune",
    )


def test_loading_and_encoding_never_import_tensorflow_torch_or_the_training_stack(tmp_path):
    code = (
        "import numpy as np, medsiglip_jax, medsiglip_jax.losses\n"
        "model = medsiglip_jax.init('tiny-56')\n"
        f"medsiglip_jax.save(model, {str(tmp_path / 'm')!r})\n"
        f"model = medsiglip_jax.load({str(tmp_path / 'm')!r})\n"
        "model.encode_image(np.zeros((1, 56, 56, 3), np.uint8))\n"
        "model.encode_text(np.ones((1, 64), np.int32))\n"
    )
    assert_never_imports({"tensorflow", "torch", "transformers", "orbax"}, code)
