"""Errors that come from other processes say there what they say here."""

import pickle

import pytest

from medsiglip_jax.files.limits import TooLarge
from medsiglip_jax.files.threads import Stalled
from medsiglip_jax.model.weights.checkpoint import CheckpointError
from medsiglip_jax.preprocess.bytes import Outage
from medsiglip_jax.preprocess.facts import NoSuchFile, Refused, UnreadableImage


@pytest.mark.parametrize("error", [
    Stalled("/mnt/1.png", 600.0),
    CheckpointError("model", ["a is missing", "b is NaN"]),
    CheckpointError("model", ["a is missing"]),
    UnreadableImage("cut off", "1.png"),
    UnreadableImage("cut off"),
    NoSuchFile("no such file", "1.png"),
    Refused("404", "https://host/1.png"),
    TooLarge("1 GiB"),
    Outage("50 inputs in a row cannot be fetched"),
], ids=repr)  # fmt: skip
def test_errors_are_pickled_whole(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert vars(again) == vars(error)
