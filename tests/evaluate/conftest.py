"""One small model for all evaluations."""

import pytest

import medsiglip_jax


@pytest.fixture(scope="session")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)
