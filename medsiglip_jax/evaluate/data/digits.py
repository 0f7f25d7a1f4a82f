"""The task "digits" brings its own data and model: a whole report in a minute, no download."""

from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.files import places, storage
from medsiglip_jax.train import quickstart

NAME = "digits"
_DATA, _MODEL, _SEED = "digits.npz", "quickstart", 0
FOLDERS = NAME, _MODEL  # that `prepare` makes


def prepare(output: places.Given) -> tuple[Path, Path]:
    """Writes the digits and has the quickstart train its model, unless both are below `output`
    already: the quickstart to the end, of which a run that was killed may have left a part.

    The model is trained on other digits than those of the test.

    Returns:
        The folders of the data and of the model.

    Raises:
        ModuleNotFoundError: the quickstart needs scikit-learn.
    """
    places.refuse_remote(output)
    data, workdir = Path(str(output), NAME), Path(str(output), _MODEL)
    if not (workdir / quickstart.LAST).is_dir():
        quickstart.run(workdir, _SEED)
    if not (data / _DATA).is_file():
        with storage.new_file(data / _DATA) as partial, open(partial, "wb") as file:
            np.savez(file, **_arrays())
    return data, workdir / "model"


def _arrays() -> dict[str, Any]:
    """The held-out digits are the test; of the others a random fifth is for validation."""
    training, held_out = quickstart.load_digits(_SEED, quickstart.QuickstartSettings().held_out)
    order = np.random.default_rng(_SEED).permutation(len(training.labels))
    chosen, rest = np.split(order, [len(order) // 5])
    arrays = {"test_images": held_out.scans, "test_labels": held_out.labels}
    for name, rows in (("train", np.sort(rest)), ("val", np.sort(chosen))):
        arrays[f"{name}_images"] = training.scans[rows]
        arrays[f"{name}_labels"] = training.labels[rows]
    return arrays
