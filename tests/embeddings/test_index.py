"""The approximate index, and its recall."""

import json

import numpy as np
import pytest
from embedding_runs import write_run

from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.store import Embeddings


def test_the_index_and_what_it_misses(tmp_path):
    pytest.importorskip("usearch")
    from medsiglip_jax.embeddings import index

    x = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    x[5], x[6] = 0, np.nan
    kinds = ["text" if i < 20 else "image" for i in range(600)]
    folder = write_run(tmp_path / "run", np.split(x, [200]), kinds)
    with pytest.raises(FileNotFoundError, match="--build-index"):
        index.top_k(x[30:31], Embeddings(folder), 5)
    facts = index.build(Embeddings(folder))
    assert facts == json.loads((folder / index.FACTS).read_text())
    assert facts["rows"] == 580 and 0.9 < facts["recall_at_10"] <= 1
    scores, rows = index.top_k(x[30:40], Embeddings(folder), 5)
    want_scores, want = top_k(x[30:40], Embeddings(folder), 5)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, want, strict=True)]) > 4
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-3)
    np.testing.assert_allclose(scores[rows == want], want_scores[rows == want], atol=1e-3)
    with pytest.raises(ValueError, match="stale or of other rows .*--kind any"):
        index.top_k(x[:1], Embeddings(folder, "any"), 5)
    write_run(folder, [x[:599]], kinds)
    with pytest.raises(ValueError, match="stale"):
        index.top_k(x[30:31], Embeddings(folder), 5)
