"""Statistics of an evaluation: speed against scikit-learn, and how often intervals cover the truth.

`bench.py evaluate` and `bench.py coverage` run it.
"""

import itertools
import math
import statistics

import measure

# CheXpert test, positive studies of 500; of its 518 frontal images some are of the same patient.
POSITIVES = {
    "Enlarged Cardiomediastinum": 253, "Cardiomegaly": 151, "Lung Opacity": 264, "Lung Lesion": 8,
    "Consolidation": 29, "Edema": 78, "Pneumonia": 11, "Atelectasis": 153, "Pneumothorax": 9,
    "Pleural Effusion": 104, "Pleural Other": 4, "Fracture": 5, "Support Devices": 261,
}  # fmt: skip
PATIENTS, IMAGES = 500, 518
# The loop of scikit-learn takes its resamples in so many turns; between them ours does all of its.
TURNS = 20
AGREE = 1e-12
METHODS = ("delong", "delong student", "bootstrap", "bootstrap stratified")


def evaluate(args) -> dict:
    """Seconds for macro AUC and class AUCs with bootstrap intervals, against scikit-learn."""
    import numpy as np
    import sklearn

    scores, labels, patients = _chest_xrays()
    counts = _weighed(patients, args.samples)
    parts, found, ours = itertools.cycle(np.array_split(counts, TURNS)), [], {}

    def one_by_one():
        found.append(_sklearn_aucs(scores, labels, next(parts)))

    def by_weights():
        ours.update(_our_intervals(scores, labels, patients, args.samples))

    calls = {"ours": by_weights, "sklearn": one_by_one}
    turns = 2 if args.quick else TURNS
    times = measure.interleaved(calls, turns)
    whole = sum(times["sklearn"]) * TURNS / turns
    # The turn of warming up was part 0, which is the last of all turns again.
    theirs = np.concatenate(found[: turns + (turns < TURNS)])
    return {
        "images": IMAGES, "patients": PATIENTS, "findings": len(POSITIVES),
        "resamples": args.samples, "scikit-learn": sklearn.__version__,
        "left_out": len(counts) - args.samples,
        "unit": "seconds for all resamples and the jackknife of the limits (BCa), both by patient; "
        "the loop of scikit-learn is lent our draws, which are not in its time",
        "rows": [{
            "ours": measure.summary(times["ours"]),
            "sklearn": round(whole, 2),
            "sklearn_measured_in_parts": f"{turns} of {TURNS}{', scaled' * args.quick}",
            "ratio": round(whole / statistics.mean(times["ours"]), 1),  # over the same turns
            "ratio_to_our_slowest_turn": round(whole / max(times["ours"]), 1),
            **_agreement(scores, labels, counts, theirs),
            **({} if args.quick else _agreement_of_limits(theirs, args.samples, ours)),
        }],
    }  # fmt: skip


def _chest_xrays():
    """Scores [518, 13], labels [518, 13] of 0 and 1, and the patient of each image."""
    import numpy as np

    rng = np.random.default_rng(0)
    patients = np.append(np.arange(PATIENTS), rng.choice(PATIENTS, IMAGES - PATIENTS, False))
    positive = [rng.permutation(PATIENTS) < count for count in POSITIVES.values()]
    labels = np.stack(positive, axis=1)[patients].astype(float)
    return rng.normal(size=labels.shape) + 1.4 * labels, labels, patients


def _weighed(patients, samples):
    """[resamples + left out, 518], how often each image is drawn, or left out, for an interval."""
    import numpy as np

    from medsiglip_jax.metrics.resampling import Resampling, interval_of

    seen = []

    def note(weights):
        seen.append(np.atleast_2d(weights))
        return np.zeros(weights.shape[:-1])

    interval_of(note, IMAGES, Resampling(patients, None, samples, 0, 0.95))
    return np.concatenate(seen[1:]).astype(int)  # the first is for the estimate


def _our_intervals(scores, labels, patients, samples) -> dict:
    from medsiglip_jax.metrics import auc, bootstrap, macro_auc

    how = {"groups": patients, "samples": samples}
    found = {"macro": bootstrap(macro_auc, scores, labels, **how)}
    for name, s, y in zip(POSITIVES, scores.T, labels.T, strict=True):
        found[name] = bootstrap(auc, s, y, **how)
    return found


def _sklearn_aucs(scores, labels, counts):
    """[resamples, 13], one resample after the other; NaN if all labels of a finding are equal."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    rows, found = np.arange(len(scores)), []
    for count in counts:
        drawn = np.repeat(rows, count)
        s, y = scores[drawn], labels[drawn]
        columns = range(scores.shape[1])
        found.append([_auc(roc_auc_score, y[:, j], s[:, j]) for j in columns])
    return np.array(found)


def _auc(roc_auc_score, labels, scores) -> float:
    return roc_auc_score(labels, scores) if labels.min() != labels.max() else math.nan


def _agreement(scores, labels, counts, theirs) -> dict:
    """The largest difference of AUCs on the same resamples, and with the same patients left out.

    Raises:
        SystemExit: they differ.
    """
    import numpy as np

    from medsiglip_jax.metrics.ranking import auc_of_weights

    of = [auc_of_weights(s, y) for s, y in zip(scores.T, labels.T, strict=True)]
    ours = np.stack([of_weights(counts[: len(theirs)]) for of_weights in of], axis=1)
    _check(np.isnan(ours) == np.isnan(theirs), f"NaN of {np.isnan(theirs).sum()} AUCs")
    apart = float(np.nanmax(abs(ours - theirs)))
    _check(apart <= AGREE, f"up to {apart:g} apart, expected {AGREE:g}")
    return {"compared": len(theirs), "largest_difference": apart}


def _agreement_of_limits(theirs, samples: int, intervals: dict) -> dict:
    """The largest difference between our limits and BCa limits of scikit-learn's AUCs.

    Raises:
        SystemExit: they differ.
    """
    import numpy as np

    from medsiglip_jax.metrics.resampling import limits

    apart = []
    of_all = np.column_stack([np.nanmean(theirs, axis=1), theirs]).T
    for values, found in zip(of_all, intervals.values(), strict=True):
        drawn, left_out = values[:samples], values[samples:]
        pulls = np.nanmean(left_out) - left_out
        acceleration = np.nansum(pulls**3) / np.nansum(pulls**2) ** 1.5 / 6
        low, high = limits(drawn, found.value, float(acceleration), 0.95)
        apart.append(max(abs(low - found.low), abs(high - found.high)))
    _check(max(apart) <= AGREE, f"limits up to {max(apart):g} apart, expected {AGREE:g}")
    return {"largest_difference_of_limits": max(apart)}


def _check(same, problem: str) -> None:
    import numpy as np

    if not np.all(same):
        raise SystemExit(f"not the AUCs of scikit-learn: {problem}")


# -------------------------------------------------------------------------------- coverage


def coverage(args) -> dict:
    """The share of intervals of simulated data sets that contain the truth they were drawn with."""
    import bench_coverage  # which takes the positives of this file

    rows = [] if args.only == "one-auc" else list(bench_coverage.rows(args.draws))
    if args.only == "patients":
        return {"draws": args.draws, "unit": _UNIT.format(_error(args.draws)), "rows": rows}
    for positives, area in itertools.product(args.positives, args.auc):
        found = _intervals(positives, args.negatives, area, args.draws, args.samples)
        row = {"positives": positives, "auc": area}
        for method, intervals in found.items():
            held = sum(area in interval for interval in intervals) / len(intervals)
            width = statistics.mean(i.high - i.low for i in intervals)
            row[method] = f"{held:.1%} ({width:.3f})"
        measure.progress(str(row))
        rows.append(row)
    return {
        "negatives": args.negatives, "draws": args.draws, "resamples": args.samples,
        "unit": _UNIT.format(_error(args.draws)),
        "rows": rows,
    }  # fmt: skip


_UNIT = (
    "share of the 95 % intervals that hold the truth (mean width), of those that are not withheld; "
    "scores of normal distributions; standard error at 95 %: {:.1%}"
)


def _error(draws: int) -> float:
    return math.sqrt(0.95 * 0.05 / draws)


def _intervals(positives: int, negatives: int, area: float, draws: int, samples: int) -> dict:
    import numpy as np
    from scipy import special

    from medsiglip_jax.metrics import auc, bootstrap, delong

    labels = np.arange(positives + negatives) < positives
    apart = math.sqrt(2) * special.ndtri(area)
    found: dict[str, list] = {method: [] for method in METHODS}
    for seed in range(draws):
        scores = np.random.default_rng([positives, seed]).normal(size=len(labels)) + apart * labels
        columns, how = (scores, labels), {"samples": samples, "seed": seed}
        of = (
            delong(*columns),
            delong(*columns, student=True),
            bootstrap(auc, *columns, **how),
            bootstrap(auc, *columns, strata=labels, **how),
        )
        for method, interval in zip(METHODS, of, strict=True):
            found[method].append(interval)
    return found


def add_parsers(commands) -> None:
    """The sub-commands."""
    sub = commands.add_parser("evaluate", help="bootstrap intervals, against scikit-learn")
    sub.add_argument("--samples", type=int, default=2000, help="resamples (default 2,000)")
    sub.add_argument(
        "--quick",
        action="store_true",
        help="run a tenth of scikit-learn's loop and multiply by ten",
    )
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=evaluate)
    sub = commands.add_parser("coverage", help="how often intervals cover the truth")
    sub.add_argument("--only", choices=("one-auc", "patients"), help="half of the cells")
    sub.add_argument("--draws", type=int, default=2000, help="data sets (default 2,000)")
    sub.add_argument("--samples", type=int, default=1000, help="resamples (default 1,000)")
    sub.add_argument("--positives", type=int, nargs="+", default=[5, 30, 100])
    sub.add_argument("--negatives", type=int, default=500)
    sub.add_argument("--auc", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=coverage)
