"""The task "digits" brings its own data and model: a whole report in a minute, no download."""

from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.files import places, storage
from medsiglip_jax.train import quickstart

NAME = "digits"
_DATA, _MODEL, _SEED = "digits.npz", "quickstart", 0


def prepare(output: places.Given) -> tuple[Path, Path]:
    """The folder of the digits and the quickstart's model, below `output`.

    The model is trained on first use, on the other digits, and then reused.

    Raises:
        ModuleNotFoundError: what the quickstart needs is missing.
    """
    places.refuse_remote(output)
    data, workdir = Path(str(output), NAME), Path(str(output), _MODEL)
    if not (workdir / "model").is_dir():
        quickstart.run(workdir, _SEED)
    if not (data / _DATA).is_file():
        with storage.new_file(data / _DATA) as partial, open(partial, "wb") as file:
            np.savez(file, **_arrays())
    return data, workdir / "model"


def _arrays() -> dict[str, Any]:
    """The held-out digits are the test; of the others a fifth, by chance, is for validation."""
    training, held_out = quickstart.load_digits(_SEED, quickstart.QuickstartSettings().held_out)
    order = np.random.default_rng(_SEED).permutation(len(training.labels))
    chosen, rest = np.split(order, [len(order) // 5])
    found = {"test_images": held_out.scans, "test_labels": held_out.labels}
    for name, rows in (("train", np.sort(rest)), ("val", np.sort(chosen))):
        found[f"{name}_images"] = training.scans[rows]
        found[f"{name}_labels"] = training.labels[rows]
    return found
