"""Vectors in an .npy, as numpy.save writes it, and their names in a .txt beside it."""

from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.files import arrays, places


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`."""
    with path.open("rb") as file:
        array = arrays.Npy(file)
        found.check_bytes(array.header.nbytes)
        return found.named(path, array.read(), {})
