"""Vectors in an .npz, as numpy.savez writes it."""

from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.files import arrays, places


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`."""
    with path.open("rb") as file, arrays.opened(file) as archive:
        headers = archive.headers
        vectors = [n for n, h in headers.items() if len(h.shape) == 2 and h.dtype.kind == "f"]
        name = found.pick_vectors(vectors)
        count = headers[name].shape[0]
        names = [n for n, h in headers.items() if found.are_names(h.shape, h.dtype, count)]
        found.check_bytes(sum(headers[n].nbytes for n in (name, *names)))
        columns = {n: found.texts(archive.read(n)) for n in names}
        return found.named(path, archive.read(name), columns)
