"""The golden checkpoint, loaded once for all tests of this folder, and copies to damage."""

import shutil
from pathlib import Path

import pytest
from checkpoint_files import GOLDEN

import medsiglip_jax


@pytest.fixture(scope="session")
def golden() -> medsiglip_jax.Model:
    """Not to be changed."""
    return medsiglip_jax.load(GOLDEN)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden checkpoint."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))
