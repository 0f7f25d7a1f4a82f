"""Rows in Arrow columns against lists of Python objects."""

import numpy as np
import pyarrow as pa
import pytest

from medsiglip_jax.data import rows
from medsiglip_jax.data.rows import Row, Rows


def some_rows(n=700):
    ids = (f"{i}" for i in range(n))
    kinds = ("image" if i % 3 else "text" for i in range(n))
    texts = ("" if i % 2 else None for i in range(n))
    return list(zip(ids, (f"/{i}" for i in range(n)), kinds, texts, strict=True))


def test_rows_are_a_sequence(monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK", 64)
    want = [Row(*cells) for cells in some_rows()]
    found = Rows(rows.from_tuples(some_rows()))
    assert list(found) == want and len(found) == len(want)
    assert found[660] == want[660] and found[-1] == want[-1]
    for part in (slice(60, 70), slice(-3, None), slice(9, 2), slice(None, None, -200)):
        assert isinstance(found[part], Rows) and list(found[part]) == want[part]
    assert found[5:][2:4][1] == want[8]
    with pytest.raises(IndexError):
        found[len(want)]


def test_the_digest_is_of_the_cells_alone():
    cells = some_rows(1000)
    found = Rows(rows.from_tuples(cells))
    digest = found.sha256()
    pieces = [found[i : i + 7].table for i in range(0, 1000, 7)]
    assert Rows(pa.concat_tables(pieces)).sha256() == digest
    assert Rows(pa.concat_tables(pieces).combine_chunks()).sha256() == digest
    assert found[3:8].sha256() == Rows(rows.from_tuples(cells[3:8])).sha256()
    digests = {digest, found[1:].sha256(), found[:0].sha256()}
    for changes in [
        {500: ("é", "/500", "image", None)}, {500: ("abc", "/500", "image", None)},
        {500: ("500", "/x", "image", None)}, {500: ("500", "/500", "text", None)},
        {500: ("500", "/500", "image", "t")},
        {10: ("101", *cells[10][1:]), 11: ("1", *cells[11][1:])},  # the same bytes, cut elsewhere
        {0: (*cells[0][:3], ""), 1: (*cells[1][:3], None)},
    ]:  # fmt: skip
        changed = [changes.get(i, row) for i, row in enumerate(cells)]
        assert len(changed) == 1000 and changed != cells
        digests.add(Rows(rows.from_tuples(changed)).sha256())
    assert len(digests) == 10


@pytest.mark.parametrize("collide", [False, True])
def test_rows_seen_before(monkeypatch, collide):
    if collide:
        monkeypatch.setattr(rows, "hash", lambda row: len(row[1]), raising=False)
    rng = np.random.default_rng(0)
    kinds, ids = rng.choice(["a", "b"], 20_000), rng.integers(0, 30_000, 20_000).astype(str)
    met, want = set(), []
    for row in zip(kinds, ids, strict=True):
        want.append(row in met)
        met.add(row)
    columns = pa.chunked_array([kinds.tolist()]), pa.chunked_array([ids[:99], ids[99:]])
    assert rows.seen_before(*columns).tolist() == want
    assert any(want) and not rows.seen_before(pa.chunked_array([[]], pa.string())).any()
