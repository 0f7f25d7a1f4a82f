"""Opens what a path or URI names, as it stands: fsspec would take "::" for a chain of systems."""

from typing import Any

import fsspec

from medsiglip_jax.files import places


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system that a remote URI is on, and its name there.

    Raises:
        ValueError: a protocol that nothing installed here speaks.
    """
    places.check_protocol(uri)
    protocol = uri.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)


def open_binary(path: str) -> Any:
    """A stream of the bytes of a file, local or remote."""
    if not places.is_remote(path):
        return places.at(path).open("rb")
    system, name = file_system(path)
    return system.open(name, "rb")


def read_bytes(path: str) -> bytes:
    """The content of a file, local or remote; of a remote one in one request."""
    if not places.is_remote(path):
        return places.at(path).read_bytes()
    system, name = file_system(path)
    return system.cat_file(name)
