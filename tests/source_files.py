"""The files of the package as they lie in a checkout, for tests that read the code."""

from pathlib import Path

# Not the installed package: a wheel also holds copies of `configs/` and of the worked examples.
PACKAGE = Path(__file__).parents[1] / "medsiglip_jax"


def texts() -> dict[str, str]:
    """The code of every file by its path below the package, as "files/storage.py"."""
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }
