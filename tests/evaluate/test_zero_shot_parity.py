"""The whole zero-shot path against a plain script of transformers, TensorFlow and scikit-learn."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import references
from PIL import Image
from sklearn.metrics import roc_auc_score

import medsiglip_jax
from medsiglip_jax.evaluate import run, tasks
from medsiglip_jax.evaluate.options import EvaluateOptions

pytestmark = pytest.mark.float

COUNT = 24
FINDINGS = ["Cardiomegaly", "Edema", "Pneumothorax", "Pleural Effusion"]


@pytest.fixture(scope="module")
def theirs(real_data, tmp_path_factory):
    """A random SigLIP with the real tokenizer, as transformers writes it."""
    pytest.importorskip("torch", reason="a check against transformers")
    sizes = {**references.TINY, "text": {"vocab_size": 32000}}
    model, folder = references.siglip(sizes), tmp_path_factory.mktemp("theirs")
    references.save(model, folder)
    spiece = (real_data / "tokenizer" / "spiece.model").read_bytes()
    (folder / "spiece.model").write_bytes(spiece)
    return model, folder


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    """The layout of the CheXpert test set with grey images, and the labels of some findings."""
    folder, rng = tmp_path_factory.mktemp("chexpert"), np.random.default_rng(0)
    names = [c.name for c in tasks.read("chexpert-test").classes]
    labels = np.zeros((COUNT, len(names)), int)
    labels[:, [names.index(name) for name in FINDINGS]] = rng.random((COUNT, 4)) < 0.4
    lines = [f"Study,{','.join(names)}"]
    for i, row in enumerate(labels):
        lines.append(f"CheXpert-v1.0/test/patient{i:05}/study1,{','.join(map(str, row))}")
        path = folder / f"CheXpert/test/patient{i:05}/study1/view1_frontal.jpg"
        path.parent.mkdir(parents=True)
        shape = (50 + i, 70 - i)
        pixels = rng.normal(rng.uniform(30, 220, (shape[0], 1)), 40, shape).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    (folder / "groundtruth.csv").write_text("\n".join(lines))
    return folder, labels


def plain_scores(model, spiece, folder):
    """Cosines with the present minus those with the absent prompts, [images, findings]."""
    import tensorflow as tf
    import torch
    from transformers import SiglipTokenizer

    tokenizer = SiglipTokenizer.from_pretrained(spiece)

    def text(prompts):
        ids = tokenizer(prompts, padding="max_length", max_length=64, truncation=True)["input_ids"]
        out = model.text_model(input_ids=torch.tensor(ids)).pooler_output.double()
        out = torch.nn.functional.normalize(out, dim=-1).mean(0)
        return torch.nn.functional.normalize(out, dim=-1)

    images = []
    for path in sorted(folder.rglob("*_frontal.jpg")):
        pixels = tf.constant(np.array(Image.open(path).convert("RGB")))
        pixels = tf.cast(tf.image.resize(pixels, (42, 42), "bilinear", antialias=False), tf.uint8)
        images.append(pixels.numpy().astype(np.float32) / 255 * 2 - 1)
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        zimg = model.vision_model(pixel_values=values).pooler_output.double()
        zimg = torch.nn.functional.normalize(zimg, dim=-1)
        columns = [
            zimg @ text(list(c.present)) - zimg @ text(list(c.absent))
            for c in tasks.read("chexpert-test").classes
        ]
    return torch.stack(columns, dim=1).numpy()


def test_chexpert_zero_shot_is_that_of_a_plain_script(theirs, chexpert, tmp_path):
    (reference, checkpoint), (folder, labels) = theirs, chexpert
    pytest.importorskip("tensorflow", reason="a check against its resize")
    want = plain_scores(reference, checkpoint, folder)
    model = medsiglip_jax.load(checkpoint)
    options = EvaluateOptions(resamples=20)
    got = run.evaluate(tasks.read("chexpert-test"), model, folder, tmp_path / "out", options)
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    scores = table["score"].to_numpy().reshape(want.shape)
    # Differences of two cosines.
    references.assert_close(scores, want, references.model_terms(model.config), largest=1)
    assert want.std(axis=0).min() > 1e-3  # or anything would be near
    for j, found in enumerate(got["classes"]):
        if found["class"] not in FINDINGS:
            assert found["auc"] is None
            continue
        apart = np.abs(np.subtract.outer(want[:, j], want[:, j]))[~np.eye(COUNT, dtype=bool)]
        error = np.abs(scores[:, j] - want[:, j]).max()
        assert apart.min() > 2 * error, "another seed: two scores are too close to compare ranks"
        assert found["auc"] == pytest.approx(roc_auc_score(labels[:, j], want[:, j]), abs=1e-12)
    assert got["classes_in_mean"] == 4 and len(got["undefined"]) == 9
