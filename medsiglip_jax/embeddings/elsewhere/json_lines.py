"""Vectors in JSON lines: those of a batch prediction of MedSigLIP at Vertex, and plain ones.

A line of Vertex is {"instance": what was asked, "prediction": what was answered}. A plain line is
{"id" or "source": name, "embedding": [numbers]}.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.data.columns import decode, read_text_bytes
from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.embeddings.elsewhere.text_tables import of_list, stacked
from medsiglip_jax.files import places
from medsiglip_jax.files.credentials import without
from medsiglip_jax.files.documents import parse

# Where an image of an instance comes from; "input_bytes" have no name.
_ADDRESSES = ("gcs_uri", "dicomweb_uri", "image_url")
_Named = tuple[str, str, str]  # id, source and kind


class _Reason(str):
    """Why there is no vector; no answer of another program is one, not even a text."""


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`. A folder is that of a batch prediction."""
    files = sorted(results(path)) if path.is_dir() else [path]
    rows, named, lacking = [], [], []
    for file in files:
        text = decode(str(file), read_text_bytes(str(file)))
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"line {number}" if file == path else f"{file.name}, line {number}"
                own = f"{file.name}:{number}"
                for name, vector in _of_line(_parsed(line, where), own, where):
                    if isinstance(vector, _Reason):
                        lacking.append((name[1], vector))
                    else:
                        named.append(name)
                        rows.append(of_list(vector, where))
    if not rows:
        first = f", the first since {lacking[0][1]}" if lacking else ""
        raise ValueError(f"no vectors{first}")
    ids, sources, kinds = (list(column) for column in zip(*named, strict=True))
    return found.Found(found.as_vectors(stacked(rows)), ids, sources, kinds, lacking)


def results(folder: places.Place) -> list[places.Place]:
    """The files of a batch prediction in a folder."""
    names = (n for n in places.visible(folder) if n.startswith("prediction.results-"))
    return [folder / name for name in names]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        return parse(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected an object in JSON ({error})") from None


def _of_line(row: Mapping[str, Any], own: str, where: str) -> Iterator[tuple[_Named, Any]]:
    """Each vector of a line with its names, or the `_Reason` why there is none."""
    if "instance" not in row:
        yield _plain(row, where)
        return
    name, answer = _of_instance(row["instance"], own), row.get("prediction", row)
    if not isinstance(answer, Mapping) or "error" in answer:
        yield name, _reason(answer)
    elif "patch_embeddings" in answer:
        yield from _patches(name, answer["patch_embeddings"], where)
    else:
        yield name, answer.get("embedding")


def _plain(row: Mapping[str, Any], where: str) -> tuple[_Named, Any]:
    lists = [name for name, value in row.items() if isinstance(value, list)]
    texts = [name for name, value in row.items() if isinstance(value, str | int)]
    vector = found.pick_vectors(lists)
    id, source = (found.pick(role, texts, False) for role in (found.IDS, found.SOURCES))
    if (name := id or source) is None:
        raise ValueError(f"{where}: expected an id or a source beside the vector")
    return (str(row[name]), str(row[source or name]), found.kind_of(row.get("kind"))), row[vector]


def _of_instance(instance: Any, own: str) -> _Named:
    image = instance.get("image") if isinstance(instance, Mapping) else None
    if not isinstance(image, Mapping):
        is_text = isinstance(instance, Mapping) and "text" in instance
        return own, own, "text" if is_text else "image"
    given = next((image[key] for key in _ADDRESSES if image.get(key)), own)
    address = given.get("url", own) if isinstance(given, Mapping) else given
    name = without(str(address))  # signed addresses and tokens are no part of a name
    return name, name, "image"


def _reason(answer: Any) -> _Reason:
    error = answer.get("error") if isinstance(answer, Mapping) else answer
    words = error.get("code") or error.get("message") if isinstance(error, Mapping) else error
    return _Reason(f"its answer is an error: {' '.join(str(words).split())[:100]}")


def _patches(name: _Named, patches: Any, where: str) -> Iterator[tuple[_Named, Any]]:
    if not isinstance(patches, list):
        raise ValueError(f"{where}: patch_embeddings is no list")
    for patch in patches:
        place = patch.get("patch_coordinate") if isinstance(patch, Mapping) else None
        if not isinstance(place, Mapping):
            raise ValueError(f"{where}: expected embedding and patch_coordinate of each patch")
        corner = ",".join(str(place.get(k, 0)) for k in ("x_origin", "y_origin", "width", "height"))
        named = f"{name[0]}#patch={corner}"
        yield (named, named, name[2]), patch.get("embedding")
