"""big_vision's strings: each op against direct calls of TensorFlow, bit for bit."""

import io

import numpy as np
import pytest
from PIL import Image
from test_tf import jpeg
from test_tf_dataset import make

from medsiglip_jax.preprocess import text
from medsiglip_jax.preprocess.load import load_images

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data.tf import pp, pp_dataset  # noqa: E402

KEY = np.array([7, 0, 1, 5], np.int64)


@pytest.fixture(scope="module")
def picture():
    return jpeg(size=(53, 41), quality=90)


@pytest.fixture(scope="module")
def tokenizer():
    return text.Tokenizer(text.train(["a dark scan of it", "a bright scan, again"] * 3, 40))


def run(string, tokenizer=None, **values):
    return pp(string, tokenizer)(example(KEY, **values))


def example(key, **values):
    return {"key": tf.constant(key), **{name: tf.constant(x) for name, x in values.items()}}


def truncated(pixels):
    return tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8)


def reference_small(image, smaller):
    factor = np.float32(smaller) / np.float32(min(image.shape[:2]))
    size = [int(np.round(np.float32(side) * factor)) for side in image.shape[:2]]
    return truncated(tf.image.resize(image, size, "area"))


REFERENCES = {
    "resize(16)": lambda x: truncated(tf.image.resize(x, (16, 16))),
    "resize((9, 70))": lambda x: truncated(tf.image.resize(x, (9, 70))),
    "resize(16, 'bicubic', antialias=True)": lambda x: truncated(
        tf.image.resize(x, (16, 16), "bicubic", antialias=True)
    ),
    "resize_small(20)": lambda x: reference_small(x, 20),
    "central_crop(30)": lambda x: tf.image.crop_to_bounding_box(x, 5, 11, 30, 30),
    "central_crop": lambda x: x[:, 6:47],
    "value_range(-1, 1)": lambda x: -1 + (tf.cast(x, tf.float32) / 255.0) * 2,
    "value_range(0, 1, 50, [200, 100, 150], True)": lambda x: tf.clip_by_value(
        (tf.cast(x, tf.float32) - 50) / tf.constant([150.0, 50.0, 100.0]), 0, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", REFERENCES)
def test_an_op_is_the_call_that_defines_it(picture, op):
    whole = tf.io.decode_image(picture, channels=3, expand_animations=False)
    ours = run(f"|decode||{op}|", image=picture)
    assert ours.keys() == {"image"}
    expected = REFERENCES[op](whole)
    assert ours["image"].dtype == expected.dtype
    np.testing.assert_array_equal(ours["image"], expected)


def test_decode_as_tensorflow_and_precisely(picture):
    precise = tf.io.decode_jpeg(picture, channels=3, dct_method="INTEGER_ACCURATE")
    np.testing.assert_array_equal(run("decode(precise=True)", image=picture)["image"], precise)
    np.testing.assert_array_equal(precise, np.asarray(Image.open(io.BytesIO(picture))))
    grey = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(grey, "PNG")
    out = run("decode(1)|copy('image', 'again')|drop('image')", image=grey.getvalue())
    assert out["again"].shape == (3, 4, 1) and out.keys() == {"again"}


def test_what_is_drawn_depends_on_the_key_alone(picture):
    string = "decode|inception_crop(24)|flip_lr|random_crop((8, 12))"
    one, again = (run(string, image=picture)["image"].numpy() for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert one.shape == (8, 12, 3)
    other = pp(string)(example(KEY + 1, image=picture))["image"].numpy()
    assert (one != other).any()
    whole = run("decode", image=picture)["image"].numpy()
    rows = [example(np.array([0, 0, 0, row]), image=picture) for row in range(16)]
    flips = [pp("decode|flip_lr")(row)["image"].numpy() for row in rows]
    flipped = [(image == whole[:, ::-1]).all() for image in flips]
    assert 2 < sum(flipped) < 14
    assert all((f == whole).all() or mirrored for f, mirrored in zip(flips, flipped, strict=True))
    crops = [pp("decode|random_crop(9)")(row)["image"].numpy() for row in rows]
    windows = {whole[y : y + 9, x : x + 9].tobytes() for y in range(33) for x in range(45)}
    drawn = {crop.tobytes() for crop in crops}
    assert drawn <= windows and len(drawn) > 5
    with pytest.raises(ValueError, match="op 2 'flip_lr': draws, and the example has no 'key'"):
        pp("decode|flip_lr")({"image": tf.constant(picture)})


@pytest.mark.parametrize("eos, pad", [("sticky", 1), ("yes", 0), ("none", 0)])
def test_tokens_are_those_of_sentencepiece_with_punctuation(tokenizer, eos, pad):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    string = f"tokenize(max_len=8, eos='{eos}', model='c4_en', pad_value={pad}, inkey='text')"
    for words in ("A scan", "a dark scan, of it again, of it", ""):
        ids = reference.encode(words.lower()) + [1] * (eos != "none")
        if eos == "sticky" and len(ids) >= 8:
            ids = [*ids[:7], 1]
        out = run(string, tokenizer, text=words)
        assert out["labels"].numpy().tolist() == (ids + [pad] * 8)[:8]
    assert run("lower", text="ÀB C")["text"].numpy().decode() == "Àb c"  # of ASCII alone


@pytest.mark.parametrize(
    "string, message",
    [
        (
            "decode|randaug(2,10)",
            r"op 2 'randaug\(2,10\)': unknown op 'randaug'; known are ce",
        ),
        ("resize(size)", "op 1.*literals"),
        ("resize(448", "op 1.*literals"),
        ("decode|resize(4, sise=3)", "op 2.*unexpected keyword argument 'sise'"),
        ("resize", "op 1 'resize': missing"),
        ("tokenize(max_len=3, eos='sticky', inkey='text')", "needs tokenizer="),
        ("__import__('os').getcwd()", "unknown op"),
    ],
)
def test_a_wrong_string_says_which_op(string, message):
    with pytest.raises(ValueError, match=f"pp, {message}|{message}"):
        pp(string)


def test_a_value_that_is_not_there_is_named(picture):
    with pytest.raises(
        ValueError, match="op 2 'lower': no value 'text' in the example; there are image"
    ):
        run("decode|lower", image=picture)


def test_batches_of_a_string_keep_places_and_resume(tmp_path, tokenizer):
    files = {"a.jpg": jpeg(), "half.jpg": jpeg()[:400], "b.jpg": jpeg("L"), "c.png": b"no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [*(str(tmp_path / name) for name in files), str(tmp_path / "none.jpg")]
    input, said = make(paths), []
    string = (
        "decode(precise=True)|resize(24)|value_range(-1, 1)|copy('label', 'kept')|"
        "tokenize(max_len=5, eos='sticky', pad_value=1, inkey='text')|keep('image','kept','labels')"
    )
    given = dict(tokenizer=tokenizer, on_error=lambda *a: said.append(a))
    first = list(pp_dataset(input, string, 4, 0, 3, **given).as_numpy_iterator())
    last = list(pp_dataset(input, string, 4, 2, 3, tokenizer=tokenizer).as_numpy_iterator())
    for name, value in last[0].items():
        np.testing.assert_array_equal(value, first[2][name])
    pixels = load_images([paths[0], paths[2]], 24)
    for step, batch in enumerate(first):
        _, _, rows = input.order.at(np.arange(4 * step, 4 * step + 4))
        assert batch["mask"].tolist() == [row in (0, 2) for row in rows.tolist()]
        for place, row in enumerate(rows.tolist()):
            readable = row in (0, 2)
            image = pixels[row // 2].astype(np.float32) / 255 * 2 - 1 if readable else 0
            np.testing.assert_array_equal(
                batch["image"][place], np.broadcast_to(image, (24, 24, 3))
            )
            assert batch["kept"][place] == (row if readable else 0)
    reasons = dict(said)
    assert reasons[paths[4]] == "no such file" and "pp" in reasons[paths[1]]
    with pytest.raises(ValueError, match="leaves 'image' with the shape"):
        pp_dataset(input, "decode", 4)
