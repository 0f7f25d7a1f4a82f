"""No answer: how often on known images, and what the commands say instead."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from embeddings.embedding_runs import read_csv
from known_images import DIM, vectors

from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.inference import abstain
from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.trust.monitor import images, reference


def test_known_images_get_no_answer_as_rarely_as_asked_for():
    """Mean over 50 random splits; the rate of one split varies with its reference."""
    x = np.random.default_rng(0).standard_t(5, size=(900, DIM)).astype(np.float32)
    rates = {0.9: [], 0.99: []}
    for split in range(50):
        order = np.random.default_rng(split).permutation(900)
        known, new = x[order[:400]], x[order[400:]]
        made = reference.build(images.from_arrays(known), Provenance(DIM))
        distances = made.gaussian.distances(new)
        for at, found in rates.items():
            found.append((distances > abstain.conformal_quantile(made.mahalanobis, at)).mean())
    for at, found in rates.items():
        assert np.mean(found) == pytest.approx(1 - at, abs=0.005)


def test_the_quantile_is_that_of_one_more_image():
    distances = np.arange(1.0, 100.0)
    assert abstain.conformal_quantile(distances, 0.9) == 90
    assert abstain.conformal_quantile(distances, 0.99) == 99
    with pytest.raises(ValueError, match="cannot tell; expected at least 99 images"):
        abstain.conformal_quantile(distances[:98], 0.99)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="abstain-at"):
            abstain.conformal_quantile(distances, wrong)


def judged(unsure, probabilities, exclusive):
    identity = abstain.Gaussian(np.zeros(2), np.eye(2, dtype=np.float32), np.ones(2), 0.0, 100)
    far = Abstention(identity, 3.0, 0.99, "sha", unsure)
    x = np.array([[0.0, 1.0], [5.0, 0.0], [np.nan, 0.0]])
    return far.judge(x, np.array(probabilities), ("a", "b"), exclusive)


def test_reasons_name_the_distance_or_the_class():
    certain = [[0.9, 0.1]] * 3
    distances, reasons = judged((0.3, 0.7), certain, True)
    assert distances[:2] == pytest.approx([1, 5]) and reasons[0] is None
    assert "distance 5 is above 3" in reasons[1] and "distance nan" in reasons[2]
    assert judged((0.3, 0.7), [[0.6, 0.4]] * 3, True)[1][0] == (
        "unsure: a 0.6, the likeliest, is below 0.7"
    )
    assert judged((0.3, 0.7), [[0.2, 0.4]] * 3, True)[1][0].startswith("unsure: b 0.4")
    assert judged((0.45, 0.7), [[0.2, 0.4]] * 3, True)[1][0].startswith("unsure: b 0.4")
    assert judged((0.3, 0.7), [[0.6, 0.1]] * 3, False)[1][0] == (
        "unsure: a 0.6 lies between 0.3 and 0.7"
    )
    assert judged((0.3, 0.7), [[0.99, 0.5]] * 3, True)[1][0] is None
    assert judged((0.3, 0.7), [[0.99, 0.5]] * 3, False)[1][0].startswith("unsure: b 0.5")
    assert judged((0.3, 0.7), [[0.99, np.nan]] * 3, False)[1][0] is None
    unknown = [certain[0], certain[0], [np.nan, np.nan]]  # of an embedding that is not finite
    assert "distance nan" in judged((0.3, 0.7), unknown, True)[1][2]
    assert judged(None, [[0.5, 0.5]] * 3, False)[1][0] is None
    with pytest.raises(ValueError, match="LOW below HIGH"):
        judged((0.7, 0.3), certain, True)


def test_a_table_of_scores_has_no_answer_for_unknown_images(run, write, probe, reference, tmp_path):
    x, _ = vectors(40, 5)
    x[3], x[7] = 9, -9
    new, out = write("new", x), tmp_path / "scores.csv"
    flags = ["--probe", probe, "--embeddings", new, "--output", out, "--reference", reference]
    assert run("probe", "predict", *flags)[0] == 0
    rows = read_csv(out)
    unknown = [row["id"] for row in rows if row["no_assist"]]
    assert {"new3", "new7"} <= set(unknown) and len(unknown) <= 4
    assert rows[3]["a"] == rows[3]["positive"] == "" and float(rows[3]["distance"]) > 10
    assert float(rows[0]["a"]) >= 0 and not rows[0]["no_assist"]
    assert run("probe", "predict", *flags, "--rank", "uncertainty")[0] == 0  # the file is its own
    rows = read_csv(out)
    assert {"new3", "new7"} <= {row["id"] for row in rows[: len(unknown)]}
    highest = [max(float(row[c]) for c in "abc") for row in rows[len(unknown) :]]
    assert highest == sorted(highest)
    code, _, err = run("probe", "predict", *flags, "--unsure", 0.4, 0.95)
    rows = read_csv(out)
    assert sum("unsure" in row["no_assist"] for row in rows) == sum(h < 0.95 for h in highest)


def test_triage_of_findings_and_classes():
    from medsiglip_jax.embeddings.probe.prediction import ranked, triage

    shares = np.array([[0.9, 0.5], [0.2, 0.1], [0.99, np.nan]])
    assert triage(shares, False, "score") == pytest.approx([0.9, 0.2, 0.99])
    assert triage(shares, False, "uncertainty") == pytest.approx([0.5, 0.2, 0.01])
    assert triage(shares[:2], True, "uncertainty") == pytest.approx([0.1, 0.8])
    with pytest.raises(ValueError, match="rank is 'age'"):
        triage(shares, False, "age")
    results = [{"image": "e", "error": "gone"}, {"image": "n", "no_assist": "far"}]
    results += [{"image": str(p), "scores": [{"probability": p}]} for p in (0.1, 0.8, 0.4)]
    order = [r["image"] for r in ranked(results, False, "score")]
    assert order == ["n", "0.8", "0.4", "0.1", "e"]


@pytest.fixture(scope="module")
def known_pixels(checkpoint):
    """One picture of noise with a little more noise, 121 times."""
    import medsiglip_jax

    side, rng = medsiglip_jax.load(checkpoint).config.image_size, np.random.default_rng(0)
    one = rng.integers(40, 200, (1, side, side, 3))
    return (one + rng.integers(-30, 30, (121, side, side, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def of_images(checkpoint, known_pixels, tmp_path_factory):
    """A reference that knows all but the last of them."""
    import medsiglip_jax
    from medsiglip_jax.embeddings import provenance
    from medsiglip_jax.preprocess.dicom.rules import Rules

    model = medsiglip_jax.load(checkpoint)
    z = np.asarray(model.encode_image(known_pixels[:-1]), np.float32)
    made = provenance.of_model(model, "big_vision", True, Rules())
    path = tmp_path_factory.mktemp("known") / "known.npz"
    reference.build(images.from_arrays(z), made).save(path)
    return path


@pytest.fixture
def pair(known_pixels, tmp_path):
    """The last of them, and its negative."""
    from PIL import Image

    for name, pixels in (("a", known_pixels[-1]), ("b", 255 - known_pixels[-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_classify_and_embed_know_what_the_reference_knows(
    run, checkpoint, of_images, pair, tmp_path
):
    flags = ["--model", checkpoint, "--reference", of_images, "--abstain-at", 0.99]
    code, text, _ = run("classify", *flags, "--text", "photo of a a", "--json", *pair)
    known, unknown = json.loads(text)
    assert code == 0 and known["scores"] and known["distance"] < unknown["distance"]
    assert "scores" not in unknown and unknown["no_assist"].startswith("unlike the reference")
    assert "no answer: unlike" in run("classify", *flags, "--text", "a", *pair)[1]
    (tmp_path / "t.txt").write_text("photo of a b\n")
    code, _, _ = run("embed", *flags, "--output", tmp_path / "e", *pair, tmp_path / "t.txt")
    table = pq.read_table(tmp_path / "e" / "part-00000.parquet").to_pydict()
    assert code == 0
    assert table["distance"][:2] == pytest.approx([known["distance"], unknown["distance"]])
    assert table["no_assist"][:2] == [None, unknown["no_assist"]]
    assert table["distance"][2] is table["no_assist"][2] is None
    code, _, err = run("embed", *flags[:2], "--output", tmp_path / "e", *pair, tmp_path / "t.txt")
    assert code == 2 and "reference differ" in err  # another run


def test_wrong_flags_and_other_pixels_are_one_line(run, checkpoint, of_images, pair, tmp_path):
    flags = ["--model", checkpoint, "--text", "a", "--reference", of_images, *pair]
    cases = {
        "preprocess is 'serving', wanted 'big_vision'": [*flags, "--preprocess", "serving"],
        "abstain-at is 0.999: a reference of 120": [*flags, "--abstain-at", 0.999],
        "scores are not calibrated, these flags have no effect: --unsure": [
            *flags, "--unsure", 0.2, 0.8],
        "need --reference": [*flags[:4], *pair, "--abstain-at", 0.9],
        "not a reference": [*flags[:5], tmp_path / "a.png", *pair],
        "no such file": [*flags[:5], tmp_path / "none.npz", *pair],
    }  # fmt: skip
    for message, argv in cases.items():
        code, _, err = run("classify", *argv)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_the_server_says_no_assist(checkpoint, of_images, pair):
    """On its own route; see tests/serve for the others."""
    import base64

    pytest.importorskip("starlette")
    from serve.conftest import _serving

    import medsiglip_jax
    from medsiglip_jax.serve.settings import Settings

    model = medsiglip_jax.load(checkpoint)
    known = abstain.open_reference(of_images)
    sent = [{"bytes": base64.b64encode(path.read_bytes()).decode()} for path in pair]
    settings = Settings(port=0, max_batch=4, drain_delay=0.0)
    options = {"known": known, "abstention": known.abstention(0.99)}
    with _serving(model, settings, **options) as client:
        answer = client.post("/v1/classify", {"images": sent, "texts": ["photo of a a"]})
    first, second = answer.body["results"]
    assert first["scores"] and first["distance"] < second["distance"]
    assert set(second) == {"distance", "no_assist"}
    from medsiglip_jax.serve.state import State

    state = State(Settings(port=0, preprocess="serving"), "tiny", known=known)
    with pytest.raises(ValueError, match="--reference: these images: .*preprocess is 'serving'"):
        state.check(model)
