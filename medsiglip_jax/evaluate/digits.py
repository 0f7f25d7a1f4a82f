"""The task "digits" brings its own data and model: a whole report in a minute, no download."""

from pathlib import Path

import numpy as np

from medsiglip_jax import places, quickstart, storage

NAME = "digits"
_DATA, _MODEL, _SEED = "digits.npz", "quickstart", 0


def prepare(output: places.Given) -> tuple[Path, Path]:
    """The folder of the held-out digits and the quickstart's model, below `output`.

    The model is trained on first use, on the other digits, and then reused.

    Raises:
        ModuleNotFoundError: what the quickstart needs is missing.
    """
    places.refuse_remote(output)
    data, workdir = Path(str(output), NAME), Path(str(output), _MODEL)
    if not (workdir / "model").is_dir():
        quickstart.run(workdir, _SEED)
    if not (data / _DATA).is_file():
        _, held_out = quickstart.load_digits(_SEED, quickstart.Recipe().held_out)
        with storage.new_file(data / _DATA) as partial, open(partial, "wb") as file:
            np.savez(file, test_images=held_out.scans, test_labels=held_out.labels)
    return data, workdir / "model"
