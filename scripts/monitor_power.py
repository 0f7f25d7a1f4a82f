"""How often `monitor check` alarms without and with a change, on digits and the quickstart's model.

    python scripts/monitor_power.py                  # 200 windows in control, 40 of each shift
    python scripts/monitor_power.py --size 30 --json

The model learns from a quarter of the digits. The others are split at random, several times, into a
reference and new images, which neither the model nor the reference has seen; windows are drawn from
the new ones. All tests of a check count together, by Holm. Abstention is measured on the same
splits: how often images in control get no answer, and the accuracy of those that get one.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

SHIFTS = ("none", "blur", "noise", "inverted", "mix")
_BLUR, _NOISE = 0.4, 30.0  # deviations in pixels of 8 x 8, and in grey values of 255


def shifted(scans: np.ndarray, shift: str, seed: int) -> np.ndarray:
    """The same digits, changed."""
    if shift == "inverted":
        return 255 - scans
    if shift == "blur":
        blurred = [ndimage.gaussian_filter(scan.astype(float), _BLUR) for scan in scans]
        return np.stack(blurred).round().astype(np.uint8)
    if shift == "noise":
        noise = np.random.default_rng(seed).normal(0, _NOISE, scans.shape)
        return np.clip(scans + noise, 0, 255).round().astype(np.uint8)
    return scans


def draw(labels: np.ndarray, size: int, shift: str, rng: np.random.Generator) -> np.ndarray:
    """Rows of a window; of "mix" one digit comes three times as often as the others."""
    if shift != "mix":
        return rng.permutation(len(labels))[:size]
    weights = np.where(np.arange(10) == rng.integers(10), 3.0, 1.0)
    counts = rng.multinomial(size, weights / weights.sum())
    rows = [np.flatnonzero(labels == digit) for digit in range(10)]
    return np.concatenate(
        [rng.choice(r, n, replace=n > len(r)) for r, n in zip(rows, counts, strict=True)]
    )


def measure(args) -> dict:
    """Alarms, abstention and accuracy, over all splits."""
    from medsiglip_jax.train import quickstart

    settings = dataclasses.replace(quickstart.QuickstartSettings(), held_out=0.75)
    training, digits = quickstart.load_digits(args.seed, settings.held_out)
    with tempfile.TemporaryDirectory() as folder:
        model = quickstart.fit(training, args.seed, settings, Path(folder), progress=False)
    images = {s: shifted(digits.scans, s, args.seed) for s in SHIFTS}
    vectors = {s: _encode(model, scans) for s, scans in images.items()}
    texts = [quickstart.PROMPT.format(word=word) for word in quickstart.WORDS]
    counts = {s: [0, 0] for s in SHIFTS}
    for split in range(args.splits):
        order = np.random.default_rng((args.seed, split)).permutation(len(digits.labels))
        known, new = order[: args.reference], order[args.reference :]
        known_images = {"vectors": vectors["none"][known], "model": model, "texts": texts}
        for shift in SHIFTS:
            windows = args.windows if shift == "none" else args.shifted
            count = windows // args.splits
            found = _alarms(known_images, vectors[shift][new], digits.labels[new], shift, count,
                            args, split)  # fmt: skip
            counts[shift] = [counts[shift][0] + found, counts[shift][1] + count]
    rows = []
    for shift in SHIFTS:
        alarms, windows = counts[shift]
        right = _right(model, vectors[shift], texts, digits.labels)
        rows.append(
            {
                "shift": shift,
                "accuracy": round(float(right.mean()), 3),
                "alarms": alarms,
                "windows": windows,
                "rate": round(alarms / windows, 3),
            }
        )
    coverage = _coverage(model, vectors, texts, digits.labels, args)
    return {"size": args.size, "reference": args.reference, "rows": rows, "abstention": coverage}


def _encode(model, scans: np.ndarray) -> np.ndarray:
    return np.asarray(model.encode_image(model.processor.images(list(scans))), np.float32)


def _right(model, vectors: np.ndarray, texts, labels: np.ndarray) -> np.ndarray:
    from medsiglip_jax.trust.monitor.reference import encode_prompts

    return encode_prompts(model, texts).logits(vectors).argmax(axis=1) == labels


def _reference(model, vectors: np.ndarray, texts):
    from medsiglip_jax.embeddings.provenance import Provenance
    from medsiglip_jax.trust.monitor import images, reference

    prompts = reference.encode_prompts(model, texts) if texts else None
    made = Provenance(vectors.shape[1])
    return reference.build(images.from_arrays(vectors), made, prompts=prompts)


def _alarms(known, new: np.ndarray, labels: np.ndarray, shift: str, count: int, args,
            split: int) -> int:  # fmt: skip
    """In how many windows any test alarms."""
    from medsiglip_jax.trust.monitor import check, images
    from medsiglip_jax.trust.monitor.windows import Window

    texts = () if args.without_texts else known["texts"]
    reference = _reference(known["model"], known["vectors"], texts)
    rng = np.random.default_rng((args.seed, split, SHIFTS.index(shift)))
    rows = [draw(labels, args.size, shift, rng) for _ in range(count)]
    run = check.Comparison(reference, images.from_arrays(new), args.level, split)
    windows = [Window(str(number), of_window) for number, of_window in enumerate(rows)]
    return sum(run.verdict(w, run.measure(w))["alarm"] for w in windows)


def _coverage(model, vectors, texts, labels: np.ndarray, args) -> dict:
    """How often images in control get no answer, and accuracy at 90 % and 100 % coverage."""
    from medsiglip_jax.inference.abstain import conformal_quantile

    rates, novelty, accuracy = {0.9: [], 0.95: [], 0.99: []}, {}, {}
    for split in range(50):
        order = np.random.default_rng((args.seed, 1, split)).permutation(len(labels))
        known, new = order[: args.reference], order[args.reference :]
        reference = _reference(model, vectors["none"][known], ())
        distances = reference.gaussian.distances(vectors["none"][new])
        for at, found in rates.items():
            found.append((distances > conformal_quantile(reference.mahalanobis, at)).mean())
        if split >= args.splits:
            continue
        for shift in ("blur", "noise", "inverted"):
            for name, of in (("mahalanobis", reference.gaussian.distances),
                             ("knn", reference.distance_to_neighbour)):  # fmt: skip
                score = np.concatenate([of(vectors[s][new]) for s in ("none", shift)])
                novelty.setdefault(f"{shift}, {name}", []).append(_auc(score, len(new)))
        mixed = np.where((np.arange(len(new)) % 2 == 0)[:, None], vectors["none"][new],
                         vectors["noise"][new])  # fmt: skip
        for name, shown in (("noise", vectors["noise"][new]), ("half noise", mixed),
                            ("blur", vectors["blur"][new])):  # fmt: skip
            right = _right(model, shown, texts, labels[new])
            far = reference.gaussian.distances(shown)
            kept = far <= np.quantile(far, 0.9)
            accuracy.setdefault(name, []).append((right.mean(), right[kept].mean()))
    return {
        "abstained on images in control": {
            str(at): round(float(np.mean(found)), 4) for at, found in rates.items()
        },
        "AUC of novelty": {name: round(float(np.mean(x)), 3) for name, x in novelty.items()},
        "accuracy at 100 % and 90 % coverage": {
            name: np.mean(x, axis=0).round(4).tolist() for name, x in accuracy.items()
        },
    }


def _auc(scores: np.ndarray, known: int) -> float:
    from medsiglip_jax import metrics

    return metrics.auc(scores, np.arange(len(scores)) >= known)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=100, help="images of a window (default 100)")
    parser.add_argument("--reference", type=int, default=948, help="images (default 948)")
    parser.add_argument("--windows", type=int, default=200, help="in control (default 200)")
    parser.add_argument("--shifted", type=int, default=40, help="of each shift (default 40)")
    parser.add_argument("--splits", type=int, default=10, help="of the digits (default 10)")
    parser.add_argument("--level", type=float, default=0.05, help="of all tests (default 0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-texts", action="store_true", help="embeddings alone")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    report = measure(args)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"windows of {report['size']} against {report['reference']}")
    for row in report["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    for name, value in report["abstention"].items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
