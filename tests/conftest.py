"""Eight CPU devices for every test, so that sharding is tested where there is no accelerator."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files, or a skip that says how to get it."""
    folder = os.environ.get("MEDSIGLIP_TEST_DATA")
    if not folder:
        pytest.skip("MEDSIGLIP_TEST_DATA is unset: it names a folder with images/ and tokenizer/")
    return Path(folder)
