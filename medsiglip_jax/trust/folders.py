"""Folders of results that are replaced as a whole."""

from collections.abc import Collection

from medsiglip_jax.files import places
from medsiglip_jax.preprocess.facts import describe


def check(folder: places.Place, own: Collection[str] | None, writer: str, advice: str) -> None:
    """Raises FileExistsError for a folder that holds anything but an earlier result.

    Args:
        folder: the folder that would be replaced.
        own: names of the files of an earlier result in it; None if anything may be replaced.
        writer: what writes such results, for the message.
        advice: what to do.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; --output wants a folder")
    if own is not None and (others := places.foreign(folder, own)):
        raise FileExistsError(
            f"{folder}: holds {describe(min(others))}, which no {writer} wrote; {advice}"
        )
