"""Checkpoint folders with processor files of their own, beside what transformers makes of them: the
same embeddings from the same texts and image files, or a refusal in one line."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import references
from checkpoint_files import rewrite
from PIL import Image
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.preprocess import text

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>:UserWarning")
transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = [
    "A chest X-ray with pneumonia.",
    "normal colon mucosa, 3.5 mm",
    "brain MRI, T2-weighted; IgG4 lesion",
    "a photo of an arm with no rash",
]
TEXTS = [*CAPTIONS, "IgG4 in the LUNG</s>", "  Lung  x-ray <pad> lungs", "", "IgG4IgG4 " * 40]
PIXELS = np.random.default_rng(2).integers(0, 256, (57, 70, 3), np.uint8)


def write_config(folder: Path, name: str, **changes) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def write_model(folder: Path, vocab_size: int) -> None:
    sizes = references.TINY | {"text": dict(vocab_size=vocab_size)}
    references.siglip(sizes, seed=7).save_pretrained(folder)


def once(make: Callable[..., None]) -> Callable[..., Path]:
    """What is made of the same arguments is made once, which takes a second, and then copied."""
    made: dict[str, dict[str, bytes]] = {}

    @functools.wraps(make)
    def write(folder: Path, *args, **said) -> Path:
        folder.mkdir(parents=True)
        key = repr((args, said))
        if key not in made:
            make(folder, *args, **said)
            made[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
        for name, content in made[key].items():
            (folder / name).write_bytes(content)
        return folder

    return write


@once
def siglip_folder(folder: Path, added=(), vocab_size: int | None = None) -> None:
    """A model, SigLIP's tokenizer with tokens added, and an image processor."""
    (folder / "spiece.model").write_bytes(text.train(CAPTIONS, 64))
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    write_model(folder, vocab_size or len(tokenizer))
    size = {"height": 42, "width": 42}
    transformers.SiglipImageProcessorPil(size=size).save_pretrained(folder)


@once
def siglip2_folder(folder: Path, kind: str, added=(), **said) -> None:
    """A model with Gemma's kind of pieces, and an image processor that resizes bilinearly."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    learned.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    learned.train_from_iterator([*CAPTIONS, *(c.lower() for c in CAPTIONS)], trainer)
    model = json.loads(learned.to_str())["model"]
    tokenizer = getattr(transformers, kind)(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=False, add_eos_token=True, **said,
    )  # fmt: skip
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    write_model(folder, len(tokenizer))
    size = {"height": 42, "width": 42}
    transformers.SiglipImageProcessorPil(size=size, resample=2).save_pretrained(folder)


def theirs(folder: Path, image: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings by transformers."""
    model = transformers.SiglipModel.from_pretrained(folder)
    make = transformers.SiglipImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = make(images=Image.open(image), return_tensors="pt")["pixel_values"]
    ids = tokenizer(TEXTS, padding="max_length", max_length=64, truncation=True)["input_ids"]
    with torch.no_grad():
        zimg = model.vision_model(pixel_values=pixels).pooler_output
        ztxt = model.text_model(input_ids=torch.tensor(ids)).pooler_output
    return zimg.numpy(), ztxt.numpy()


def ours(folder: Path, image: Path) -> tuple[np.ndarray, np.ndarray]:
    model = medsiglip_jax.load(folder)
    pixels = model.processor.images(image, preprocess="huggingface")
    zimg = model.encode_image(pixels, normalize=False)
    ztxt = model.encode_text(model.processor.tokenizer(TEXTS, warn=False), normalize=False)
    return np.asarray(zimg), np.asarray(ztxt)


@pytest.fixture
def image(tmp_path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def added(folder):
    lung = tokenizers.AddedToken("lung", single_word=True)
    sharp = tokenizers.AddedToken("x-ray", lstrip=True, rstrip=True, special=True)
    return siglip_folder(folder, ["IgG4", "</s", lung, sharp])


def added_by_json(folder):
    """As older versions of transformers wrote it."""
    siglip_folder(folder, vocab_size=72)
    pieces = text.Tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"IgG4": pieces, "<img>": pieces + 1}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    write_config(folder, "special_tokens_map.json", pad_token={"content": "<pad>"})
    return folder


def said(name, **changes) -> Callable[[Path], Path]:
    def make(folder):
        siglip_folder(folder)
        write_config(folder, name, **changes)
        return folder

    return make


def nested(folder, make=siglip_folder):
    """transformers 5 writes the image processor into processor_config.json, which comes first."""
    make(folder)
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    write_config(folder, "processor_config.json", image_processor=inner | dict(image_std=[0.2] * 3))
    return folder


def siglip2(folder):
    return siglip2_folder(folder, "Siglip2Tokenizer", padding_side="right")


def siglip2_added(folder):
    return siglip2_folder(folder, "Siglip2Tokenizer", ["IgG4", "Rash"])


def gemma(folder):
    return siglip2_folder(folder, "GemmaTokenizer", padding_side="right")


MEAN_AND_STD = dict(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
LARGE = dict(image_mean=[128.0] * 3, image_std=[64.0] * 3)
# A tokenizer, and what an image processor says beside it: texts and images are compared apart.
SAME = {
    "siglip": (siglip_folder, {}),
    "added tokens; mean and std": (added, MEAN_AND_STD),
    "added_tokens.json; bilinear": (added_by_json, dict(resample=2)),
    "cased; normalisation null": (
        said("tokenizer_config.json", do_lower_case=False), dict(do_normalize=None)),
    "padded with <pad>; rescaling null": (
        said("tokenizer_config.json", pad_token="<pad>"), dict(do_rescale=None) | LARGE),
    "padded on the left; not normalised": (
        said("tokenizer_config.json", padding_side="left"), dict(do_normalize=False)),
    "SigLIP 2; not rescaled": (siglip2, dict(do_rescale=False) | LARGE),
    "SigLIP 2 with added tokens; rescaled otherwise": (
        siglip2_added, dict(rescale_factor=1 / 127.5)),
    "Gemma's tokenizer; processor_config.json": (lambda folder: nested(folder, gemma), {}),
}  # fmt: skip


@pytest.mark.float
@pytest.mark.parametrize("make, changes", SAME.values(), ids=SAME)
def test_same_files_same_embeddings(make, changes, image, tmp_path):
    folder = make(tmp_path / "model")
    write_config(folder, "preprocessor_config.json", **changes)
    for got, want in zip(ours(folder, image), theirs(folder, image), strict=True):
        assert_close(got, want, model_terms(medsiglip_jax.load(folder).config), 10)


@pytest.mark.parametrize("make", [siglip_folder, siglip2, siglip2_added])
def test_lengths_of_texts_are_those_of_the_attention_mask(make, tmp_path):
    folder = make(tmp_path / "model")
    texts = [*CAPTIONS, "", "IgG4IgG4 " * 40]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=64, truncation=True, return_attention_mask=True
    )
    tokenizer = medsiglip_jax.load(folder).processor.tokenizer
    ids, _ = tokenizer.ids_and_cut(texts)
    lengths = tokenizer.lengths(ids)
    assert lengths.tolist() == np.sum(theirs["attention_mask"], axis=1).tolist()
    assert len(set(lengths.tolist())) > 3 and lengths.max() == 64


def cut_on_the_left(folder):
    """As `tokenizer.json` keeps it; transformers takes it from there."""
    siglip2_folder(folder, "Siglip2Tokenizer")
    cut = dict(direction="Left", max_length=16, strategy="LongestFirst", stride=0)
    write_config(folder, "tokenizer.json", truncation=cut)
    return folder


REFUSED = {
    "size": said("preprocessor_config.json", size={"height": 224, "width": 224}),
    "shortest edge": said("preprocessor_config.json", size={"shortest_edge": 42}),
    "nearest": said("preprocessor_config.json", resample=0),
    "no resize": said("preprocessor_config.json", do_resize=False),
    "crop": said("preprocessor_config.json", do_center_crop=True),
    "another processor": said("preprocessor_config.json",
                              image_processor_type="CLIPImageProcessor"),
    "std 0": said("preprocessor_config.json", image_std=[0.5, 0.0, 0.5]),
    "two means": said("preprocessor_config.json", image_mean=[0.5, 0.5]),
    "a shorter text": said("tokenizer_config.json", model_max_length=16),
    "the shorter edge": said("preprocessor_config.json", size=42),
    "resize null": said("preprocessor_config.json", do_resize=None),
    "resample in a list": said("preprocessor_config.json", resample=[3]),
    "padded on both sides": said("tokenizer_config.json", padding_side="both"),
    "cut on the left": said("tokenizer_config.json", truncation_side="left"),
    "cut on the left by tokenizer.json": cut_on_the_left,
    "another class": said("tokenizer_config.json", tokenizer_class="CLIPTokenizer"),
    "sampling": said("tokenizer_config.json", sp_model_kwargs={"enable_sampling": True}),
    "another end": said("tokenizer_config.json", eos_token="."),
    "no number": said("tokenizer_config.json", extra_special_tokens=["<x>"]),
    "more tokens than embeddings": lambda f: siglip_folder(f, ["IgG4"], vocab_size=60),
    "more embeddings than tokens": lambda f: siglip_folder(f, vocab_size=96),
    "no tokens": said("tokenizer_config.json", extra_special_tokens=True),
    "no list": said("tokenizer_config.json", added_tokens_decoder={"1": "</s>"}),
}  # fmt: skip
WHAT = {
    "size": "size is {'height': 224, 'width': 224}, and the image tower takes 42 x 42",
    "shortest edge": "size is {'shortest_edge': 42}",
    "nearest": "resample is 0; expected 2 (bilinear) or 3 (bicubic)",
    "no resize": "do_resize is False",
    "crop": "do_center_crop is true",
    "another processor": "image_processor_type is 'CLIPImageProcessor'",
    "std 0": "image_std is [0.5, 0.0, 0.5]; expected finite numbers other than 0",
    "two means": "expected three finite numbers",
    "a shorter text": "model_max_length is 16, and the text tower reads 64 tokens",
    "the shorter edge": "size is 42, and the image tower takes 42 x 42",
    "resize null": "do_resize is None",
    "resample in a list": "resample is [3]; expected 2 (bilinear) or 3 (bicubic)",
    "padded on both sides": "padding_side is 'both'; expected 'left' or 'right'",
    "cut on the left": "truncation_side is 'left', and only 'right' is supported",
    "cut on the left by tokenizer.json": "tokenizer.json cuts long texts at 'Left'",
    "another class": "tokenizer_class is 'CLIPTokenizer'",
    "sampling": "sp_model_kwargs is {'enable_sampling': True}",
    "another end": "eos_token is '.'; expected '</s>'",
    "no number": "special token '<x>', which has no number",
    "more tokens than embeddings": "belong to different models",
    "more embeddings than tokens": "belong to different models",
    "no tokens": "extra_special_tokens is True; expected a list of tokens",
    "no list": "added_tokens_decoder is not a table of tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_one_line(name, image, tmp_path, capsys):
    folder = REFUSED[name](tmp_path / "model")
    capsys.readouterr()
    command = ["classify", "--model", str(folder), "--text", "a lung", str(image)]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert WHAT[name] in err and err.strip().count("\n") == 0 and not out


def test_rows_behind_added_tokens_are_spare(tmp_path):
    """`resize_token_embeddings(..., pad_to_multiple_of=64)` leaves them."""
    folder = siglip_folder(tmp_path / "model", ["IgG4"], vocab_size=128)
    assert medsiglip_jax.load(folder).processor.texts("IgG4 lesion").max() < 128


@pytest.mark.parametrize("change", [{"tokenizer.json": None}, {"tokenizer.json": "{}"}],
                         ids=["missing", "damaged"])  # fmt: skip
def test_the_vocabulary_of_siglip2_must_be_there(change, image, tmp_path, capsys):
    folder = siglip2_folder(tmp_path / "model", "Siglip2Tokenizer")
    for name, content in change.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    capsys.readouterr()
    assert cli.main(["classify", "--model", str(folder), "--text", "a", str(image)]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and ("tokenizer.json" in err or "has no tokenizer" in err)


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model"])
def test_naflex_is_refused_by_name(kind, tmp_path, capsys):
    folder = siglip_folder(tmp_path / "model")
    write_config(folder, "config.json", model_type=kind)
    assert cli.main(["info", str(folder)]) == 2
    assert "a SigLIP 2 NaFlex model" in capsys.readouterr().err


# ----------------------------------------------------------------- what convert and exports keep


@pytest.mark.float
@pytest.mark.parametrize("make, format", [
    (lambda folder: nested(folder, added), "huggingface"), (siglip2, "huggingface"),
    (added, "orbax"), (nested, "big_vision"),
], ids=["tokens, nested", "SigLIP 2", "tokens-orbax", "nested-big_vision"])  # fmt: skip
def test_convert_keeps_the_files_of_its_source(make, format, image, tmp_path):
    source = make(tmp_path / "source")
    (source / "README.md").write_text("# a card")
    (source / "LICENSE").write_text("terms")
    rewrite(source, lambda tensors: None)
    target = tmp_path / "target"
    assert cli.main(["convert", str(source), str(target), "--format", format]) == 0
    kept = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
    for name in kept:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    for a, b in zip(ours(source, image), ours(target, image), strict=True):
        np.testing.assert_array_equal(a, b)
    if format == "huggingface":
        for a, b in zip(theirs(source, image), theirs(target, image), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [siglip_folder, nested], ids=["preprocessor", "nested"])
def test_another_resolution_stands_in_every_file(make, tmp_path):
    source, target = make(tmp_path / "source"), tmp_path / "target"
    options = ["--format", "huggingface", "--resolution", "56"]
    assert cli.main(["convert", str(source), str(target), *options]) == 0
    made = transformers.SiglipImageProcessorPil.from_pretrained(target)
    assert dict(made.size) == {"height": 56, "width": 56}
    assert medsiglip_jax.load(target).config.image_size == 56


def test_another_tokenizer_replaces_all_files_of_the_first(tmp_path):
    source, other = added(tmp_path / "source"), tmp_path / "other"
    other.mkdir()
    (other / "spiece.model").write_bytes(text.train([*CAPTIONS, "gastric ulcer"], 64))
    model = medsiglip_jax.load(source, tokenizer=other)
    medsiglip_jax.save(model, tmp_path / "target")
    assert "IgG4" not in (tmp_path / "target" / "tokenizer_config.json").read_text()
    kept = (tmp_path / "target" / "spiece.model").read_bytes()
    assert kept == (other / "spiece.model").read_bytes()


def test_a_tokenizer_of_another_model_is_not_put_into_one(tmp_path, capsys):
    source, other = siglip_folder(tmp_path / "source"), added(tmp_path / "other")
    command = ["convert", str(source), str(tmp_path / "target"), "--format", "huggingface"]
    assert cli.main([*command, "--tokenizer", str(other)]) == 2
    assert "they belong to different models" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_file_of_weights_alone_cannot_hold_a_normalisation(image, tmp_path, capsys):
    source = said("preprocessor_config.json", **MEAN_AND_STD)(tmp_path / "source")
    target = tmp_path / "m.npz"
    assert cli.main(["convert", str(source), str(target), "--format", "big_vision"]) == 2
    assert "write a folder instead" in capsys.readouterr().err and not target.exists()


@pytest.mark.float
def test_an_npz_and_orbax_know_the_normalisation_without_the_files(image, tmp_path):
    source = said("preprocessor_config.json", **MEAN_AND_STD)(tmp_path / "source")
    model = medsiglip_jax.load(source)
    model.companions = ()
    for format in ("orbax", "big_vision", "huggingface"):
        medsiglip_jax.save(model, tmp_path / format, format=format)
        shutil.copy(source / "spiece.model", tmp_path / format)
        for a, b in zip(ours(source, image), ours(tmp_path / format, image), strict=True):
            np.testing.assert_array_equal(a, b)
