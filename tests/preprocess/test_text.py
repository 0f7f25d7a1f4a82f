"""Token ids against transformers' `SiglipTokenizer`, live and from tests/golden/preprocess.json.

The real vocabulary is only in the folder that MEDSIGLIP_TEST_DATA names; without it the same rule
is held with a vocabulary trained here.
"""

import hashlib
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from medsiglip_jax.preprocess.text import Tokenizer, canonicalize, train

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "preprocess.json").read_text())["tokens"]
CAPTIONS = [
    "A chest X-ray with pneumonia.",
    "A chest X-ray without pneumonia.",
    "normal colon mucosa",
    "cancer-associated stroma, 3.5 mm",
    "brain MRI, T2-weighted",
    "a photo of an arm with no rash",
]
ignore_cut = pytest.mark.filterwarnings("ignore:.*texts are longer than:UserWarning")


@pytest.fixture(scope="module")
def model_bytes():
    return train(CAPTIONS, 64)


@pytest.fixture(scope="module")
def tokenizer(model_bytes):
    return Tokenizer(model_bytes)


def reference(path):
    """transformers' tokenizer as a function: list of strings -> int32 [n, 64]."""
    transformers = pytest.importorskip("transformers")
    siglip = transformers.SiglipTokenizer(str(path))

    def tokenize(texts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "This sequence already has </s>", many times
            rows = siglip(texts, padding="max_length", max_length=64, truncation=True)
        return np.array(rows["input_ids"], np.int32)

    return tokenize


def clinical(rng):
    """A phrase as in a report: finding, place, measurement, punctuation."""
    finding = rng.choice(
        "pneumothorax|Ground-glass opacity|St. p. lobectomy|T2-hyperintense lesion|drusen|"
        "café-au-lait macules|H&E stain|IgG4+ plasma cells|No acute findings|β-amyloid".split("|")
    )
    place = rng.choice("left lung|the right eye (OD)|L4/L5|colon|Segment VIII|forearm".split("|"))
    size = f"{rng.uniform(0, 300):.1f} {rng.choice(['mm', 'cm³', 'µm', 'HU', '%', 'mg/dL'])}"
    end = rng.choice([".", "!?", "", "…", "\n", " [ref. 12]", " (see #3)"])
    return f"{finding} {rng.choice(['in', 'of', 'near', '—'])} {place}, {size}{end}"


def scripts(rng):
    """Characters of any block: other scripts, symbols, emoji, control characters, marks."""
    top = rng.choice([0x80, 0x530, 0x3000, 0x10000, 0x110000])
    points = [rng.randrange(top) for _ in range(rng.randrange(1, 30))]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def hostile(rng):
    """Special tokens, their halves, the space symbol, odd white space, compatibility characters."""
    parts = [
        "</s>",
        "<unk>",
        "<pad>",
        "</S>",
        "<",
        "/s>",
        "<un",
        "k>",
        "▁",
        " ",
        "\t",
        "\n",
        "\x00",
    ]
    parts += [
        "\x1c",
        "\x85",
        "\xa0",
        "\xad",
        "\u200b",
        "\u2028",
        "\u3000",
        "\ufeff",
        "＜ｓ＞",
        "ﬁ",
        "½",
    ]
    parts += ["İ", "ẞ", "e\u0301", "ǅ", "㎎", "x-ray", "Lung", "3.5", "...", "🩻", "世界", "उदर"]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(0, 25)))


def long(rng):
    return " ".join(clinical(rng) for _ in range(rng.randrange(2, 12)))


def many_texts(n, seed):
    rng = random.Random(seed)
    return [
        rng.choice([clinical, clinical, scripts, hostile, hostile, long])(rng) for _ in range(n)
    ]


# ------------------------------------------------------------------------------ the real vocabulary


@ignore_cut
def test_real_ids_equal_the_goldens(real_data):
    tokenizer = Tokenizer(real_data / "tokenizer" / "spiece.model")
    assert tokenizer.vocab_size == 32_000
    expected = np.ones((len(GOLDEN), 64), np.int32)
    for row, golden in zip(expected, GOLDEN, strict=True):
        row[: len(golden["ids"])] = golden["ids"]
    ids = tokenizer([golden["text"] for golden in GOLDEN])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("text", "ids"),  # reference: pre_processor_configs and predictor_test.py at 56b1447
    [
        ("A chest X-ray with pneumonia.", [262, 266, 5819, 262, 497, 3036, 275, 24296]),
        ("adipose", [262, 266, 303, 302, 15871]),
        ("cancer-associated stroma", [1822, 25486, 262, 19081, 266]),
        (
            "a photo of an arm with no rash",
            [262, 266, 1304, 267, 299, 3421, 275, 379, 17761],
        ),
        ("test_text_1", [937, 8196, 727]),
        ("test_text_2", [937, 8196, 601]),
        ("", []),
    ],
)
def test_real_ids_of_the_official_examples(real_data, text, ids):
    tokenizer = Tokenizer(str(real_data / "tokenizer"))  # the folder will do
    np.testing.assert_array_equal(tokenizer(text), [ids + [1] * (64 - len(ids))])


@ignore_cut
def test_real_ids_equal_transformers(real_data):
    path = real_data / "tokenizer" / "spiece.model"
    texts = many_texts(10_000, 0)
    ids, expected = Tokenizer(path)(texts), reference(path)(texts)
    wrong = [texts[i] for i in np.flatnonzero((ids != expected).any(axis=1))]
    assert wrong == []
    assert (ids[:, -2] != 1).sum() > 500  # many were long enough to be cut


# --------------------------------------------------------------------------- a vocabulary made here


@ignore_cut
def test_trained_ids_equal_transformers(model_bytes, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model_bytes)
    texts = [*CAPTIONS, *many_texts(3000, 1)]
    ids, expected = Tokenizer(model_bytes)(texts), reference(tmp_path / "spiece.model")(texts)
    wrong = [texts[i] for i in np.flatnonzero((ids != expected).any(axis=1))]
    assert wrong == []


def test_shape_padding_and_end(tokenizer):
    one = tokenizer(CAPTIONS[0])
    assert one.shape == (1, 64) and one.dtype == np.int32
    np.testing.assert_array_equal(one[0], tokenizer(CAPTIONS)[0])
    assert (one[0, -20:] == 1).all() and 0 not in one
    np.testing.assert_array_equal(tokenizer(["", " \t\n", "...", "▁"]), np.ones((4, 64)))
    for empty in [[], (), np.array([], dtype=str)]:
        assert tokenizer(empty).shape == (0, 64) and tokenizer(empty).dtype == np.int32
    np.testing.assert_array_equal(tokenizer(np.array(CAPTIONS)), tokenizer(tuple(CAPTIONS)))


@pytest.mark.parametrize("length", [1, 2, 16, 64])
def test_truncation_keeps_the_end_token_and_warns_once(model_bytes, length):
    tokenizer = Tokenizer(model_bytes, context_length=length)
    pieces = tokenizer._encode("chest " * 100)
    with pytest.warns(UserWarning, match=f"2 of 3 texts are longer than {length} tokens") as caught:
        ids = tokenizer(["chest " * 100, "", "x-ray " * 100])
    assert len(caught) == 1 and ids.shape == (3, length)
    np.testing.assert_array_equal(ids[0], [*pieces[: length - 1], 1])
    assert (ids[:, -1] == 1).all()


def test_a_text_that_just_fits_is_not_cut(tokenizer):
    text = "c" * 63
    n = len(tokenizer._encode(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = Tokenizer(tokenizer.model_bytes, context_length=n + 1)(text)
    assert (fits != 1).sum() == n
    with pytest.warns(UserWarning, match="1 of 1"):
        Tokenizer(tokenizer.model_bytes, context_length=n)(text)


@pytest.mark.parametrize("options", [{}, {"pad": "<unk>"}, {"pad_left": True}])
def test_lengths_count_the_end_token_but_no_padding(model_bytes, options):
    tokenizer = Tokenizer(model_bytes, **options)
    texts = ["", "normal colon", "chest " * 100]
    ids, _ = tokenizer.ids_and_cut(texts)
    pieces = [len(tokenizer._encode(text)) for text in texts]
    assert pieces[0] == 0 < pieces[1] < 62 < pieces[2]
    assert tokenizer.lengths(ids).tolist() == [1, pieces[1] + 1, 64]


def test_literal_special_tokens(tokenizer):
    ids = tokenizer("normal </s> <unk>colon")[0]
    assert ids[:3].tolist() != [1, 1, 1] and 1 in ids[:20] and 2 in ids[:20]
    assert tokenizer("</s>").tolist() == [[1] * 64]
    np.testing.assert_array_equal(tokenizer("</S> colon"), tokenizer("s colon"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A chest X-ray.", "a chest xray"),
        ("T2-weighted, 3.5 mm", "t2weighted 35 mm"),
        (" a\t\n b\xa0c\u3000", "a b c"),
        ("under_score", "underscore"),
        ("ÉCHO “quoted”", "écho “quoted”"),  # only ASCII punctuation goes
        ("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ""),
    ],
)
def test_canonicalize(text, expected):
    assert canonicalize(text) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 3], "text 2 of 2 is of type int, not a string"),
        ([None], "text 1 of 1 is of type NoneType"),
        ([["a"]], "text 1 of 1 is of type list"),
        (b"a", "texts is of type bytes, expected a string or a list"),
        (7, "texts is of type int"),
        ({"a": 1}, "texts is of type dict"),
        ("ok \ud83e broken", r"text 1 of 1 holds the lone surrogate '\\ud83e' at character 3"),
    ],
)
def test_refuses_what_is_not_text(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer(texts)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- model files


def test_files_and_bytes_are_kept_as_given(model_bytes, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model_bytes)
    for source in [tmp_path, str(tmp_path / "spiece.model"), model_bytes]:
        tokenizer = Tokenizer(source)
        assert tokenizer.model_bytes == model_bytes and tokenizer.context_length == 64
    np.testing.assert_array_equal(tokenizer(CAPTIONS), Tokenizer(tmp_path)(CAPTIONS))


@pytest.mark.parametrize("name", ["", "spiece.model", "elsewhere/spiece.model"])
def test_a_missing_file_says_where_it_comes_from(tmp_path, name):
    message = "spiece.model.*google/medsiglip-448 on Hugging Face.*--tokenizer PATH"
    with pytest.raises(FileNotFoundError, match=message):
        Tokenizer(tmp_path / name)


def test_broken_and_hostile_files_are_one_line(model_bytes, tmp_path):
    rng = np.random.default_rng(0)
    files = [b"", b"junk", b"\0" * 1000, model_bytes[:1000], model_bytes[:-1]]
    files += [rng.bytes(rng.integers(1, 5000)) for _ in range(200)]
    for _ in range(200):
        data = bytearray(model_bytes)
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
        files.append(bytes(data))
    refused = 0
    for data in files:  # a crash of the process would end the test run
        try:
            ids = Tokenizer(data)(CAPTIONS)
            assert ids.shape == (6, 64)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "is not a" in str(error)
    assert refused > 205
    (tmp_path / "spiece.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"spiece\.model is not a SentencePiece model"):
        Tokenizer(tmp_path)


def test_another_vocabulary_is_refused(model_bytes):
    other = model_bytes.replace(b"</s>", b"<eos")
    with pytest.raises(ValueError, match="not a SigLIP tokenizer: its first pieces are .*<eos"):
        Tokenizer(other)


# -------------------------------------------------------------------------------------------- train


def test_train_is_deterministic_and_has_siglips_ids(model_bytes):
    assert train(iter(CAPTIONS), 64) == model_bytes
    tokenizer = Tokenizer(model_bytes)
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(3)]
    assert pieces == ["<pad>", "</s>", "<unk>"]
    assert tokenizer._processor.bos_id() == -1
    assert tokenizer.vocab_size <= 64 and Tokenizer(train(CAPTIONS, 40)).vocab_size == 40
    assert 2 not in tokenizer(CAPTIONS)  # every caption is covered
    different = {row.tobytes() for row in tokenizer(CAPTIONS)}
    assert len(different) == len(CAPTIONS)
    assert Tokenizer(train(["one caption"], 5000)).vocab_size < 50  # as many as there are


def test_train_is_silent_and_the_same_in_every_process(model_bytes):
    code = (
        "import hashlib; from medsiglip_jax.preprocess.text import train;"
        f"print(hashlib.sha256(train({CAPTIONS!r}, 64)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == hashlib.sha256(model_bytes).hexdigest() + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("captions", "size", "message"),
    [
        ([], 64, "no text among the 0 captions"),
        (["", "..."], 64, "no text among the 2 captions"),
        (CAPTIONS, 8, "cannot train a tokenizer of 8 pieces: .*smaller than required_chars"),
    ],
)
def test_train_refuses(captions, size, message):
    with pytest.raises(ValueError, match=message):
        train(captions, size)


def test_text_needs_neither_jax_nor_tensorflow():
    code = (
        "import sys, medsiglip_jax.preprocess.text;"
        "sys.exit(str({'jax', 'tensorflow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
