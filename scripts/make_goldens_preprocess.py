"""Writes tests/golden/preprocess.json: what TensorFlow and transformers make of pixels and texts.

The tests check parity with it where neither is installed. Inputs are generated (`pattern`); outputs
are stored as SHA-256, a few small ones in full. Made with tensorflow 2.21, transformers 5.23 and
Pillow 13:

    MEDSIGLIP_TEST_DATA=../shared/data python scripts/make_goldens_preprocess.py
"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).parent.parent / "tests" / "golden" / "preprocess.json"

# The prompts and captions of the official notebooks and container tests, then one string for each
# thing the rule does: case, punctuation, white space, numbers, scripts, special tokens, length.
TEXTS = [
    *(
        "A chest X-ray with pneumonia.",
        "a photo of an arm with no rash",
        "a photo of a leg with a rash",
    ),
    *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle"),
    *("normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    *("test_text_1", "test_text_2", "", " ", "...", "X-ray", "T2-weighted", "3.5 mm", "1/2"),
    *(
        "12,000/mm3",
        "HbA1c 7.2%",
        "β-blocker 5 µg",
        "5 × 10⁹/L",
        "≥ 3 cm², ½ dose",
        "ＣＴ　ｓｃａｎ",
    ),
    *(
        "  two  spaces\tand\na line\r\n",
        "no\u00a0break\u2003em\u200bzero",
        "ÉCHOGRAPHIE",
        "İstanbul ẞ",
    ),
    *(
        "胸部X線写真",
        "рентген грудной клетки",
        "الأشعة السينية للصدر",
        "छाती का एक्स-रे",
        "흉부 엑스레이",
    ),
    *("🩻 x-ray 🫁", "e\u0301 vs é", "a\x00b\x07c", "▁block ▁▁ text▁", "</s>", "<unk>", "<pad>"),
    *(
        "normal</s>abnormal",
        "a <unk> b",
        "<s> </s> </s> x",
        "</S> <UNK>",
        "＜unk＞ ＜／s＞",
        "no finding </s>",
    ),
    " ".join(["ground glass opacity in the right lower lobe"] * 12),
    "antidisestablishmentarianism" * 20,
    "word " * 61 + "x y",
    "word " * 61 + "x y z",
]

RESIZES = [
    *([1, 1, 1, 1, 1], [1, 1, 3, 7, 5], [5, 7, 3, 1, 1], [2, 2, 1, 3, 3], [3, 2, 4, 2, 3]),
    *([64, 64, 3, 64, 64], [64, 64, 3, 64, 63], [100, 67, 3, 448, 448], [67, 100, 1, 448, 448]),
    *(
        [600, 500, 3, 448, 448],
        [449, 447, 3, 448, 448],
        [1000, 10, 3, 448, 448],
        [31, 997, 4, 113, 29],
    ),
    *(
        [1024, 768, 3, 448, 448],
        [333, 777, 3, 224, 224],
        [17, 19, 2, 97, 101],
        [250, 251, 3, 251, 250],
    ),
    *(
        [2000, 1500, 1, 448, 448],
        [448, 896, 3, 448, 448],
        [200, 300, 5, 77, 700],
        [3000, 2000, 3, 448, 448],
    ),
]

SQUARES = [
    *(
        [1, 1, 448],
        [100, 67, 448],
        [67, 100, 448],
        [448, 448, 448],
        [600, 500, 448],
        [31, 997, 448],
    ),
    *([700, 1152, 448], [1000, 10, 56], [50, 50, 224], [449, 447, 448], [13, 14, 16]),
]


def pattern(height: int, width: int, channels: int) -> np.ndarray:
    """Noise from integer arithmetic alone, the same everywhere: uint8 [height, width, channels]."""
    x = np.arange(1, height * width * channels + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    return (x >> np.uint64(56)).astype(np.uint8).reshape(height, width, channels)


def sha(pixels: np.ndarray) -> str:
    assert pixels.dtype == np.uint8
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


def resize_goldens() -> list[dict]:
    import tensorflow as tf

    rows = []
    for height, width, channels, h, w in RESIZES:
        image = pattern(height, width, channels)
        out = tf.image.resize(image, (h, w), method="bilinear", antialias=False)
        out = tf.cast(out, tf.uint8).numpy()
        row = {"shape": [height, width, channels], "size": [h, w], "sha256": sha(out)}
        rows.append(row | ({"pixels": out.tolist()} if out.size <= 64 else {}))
    return rows


def square_goldens() -> list[dict]:
    from transformers import SiglipImageProcessorPil

    rows = []
    for height, width, size in SQUARES:
        image = pattern(height, width, 3)
        square = {"height": size, "width": size}
        squashed = SiglipImageProcessorPil(size=square)(image, input_data_format="channels_last")
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        padded = np.zeros((side, side, 3), np.float32)
        padded[top : top + height, left : left + width] = image.astype(np.float32) / 255
        served = SiglipImageProcessorPil(size=square, do_rescale=False)(
            padded, input_data_format="channels_last"
        )
        rows.append(
            {
                "shape": [height, width, 3],
                "size": size,
                "huggingface": sha(as_uint8(squashed["pixel_values"][0])),
                "serving": sha(as_uint8(served["pixel_values"][0])),
            }
        )
    return rows


def as_uint8(values: np.ndarray) -> np.ndarray:
    """[-1, 1] float [3, h, w] -> uint8 [h, w, 3]; the values are multiples of 2/255."""
    return np.rint((np.asarray(values).transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def token_goldens() -> list[dict]:
    from transformers import SiglipTokenizer

    tokenizer = SiglipTokenizer.from_pretrained(
        Path(os.environ["MEDSIGLIP_TEST_DATA"]) / "tokenizer"
    )
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, padding="max_length", max_length=64, truncation=True)["input_ids"]
        last = max((i + 1 for i, token in enumerate(ids) if token != 1), default=0)
        rows.append({"text": text, "ids": ids[:last]})  # the rest, up to 64, is 1
    return rows


def main() -> None:
    names = ["tensorflow-cpu", "transformers", "pillow", "numpy", "sentencepiece"]
    goldens = {
        "made_with": {name: importlib.metadata.version(name) for name in names},
        "resize": resize_goldens(),
        "squares": square_goldens(),
        "tokens": token_goldens(),
    }
    lines = [f'"made_with": {json.dumps(goldens.pop("made_with"))}']
    for key, rows in goldens.items():
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
