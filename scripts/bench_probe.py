"""The probe's fit side by side with scikit-learn; `bench.py probe` runs it.

Both choose among the same strengths on the same validation rows and stop after the same number of
worse ones. scikit-learn fits one finding after the other, warm-started, as the probe did before.
"""

import time

import measure
import numpy as np


def probe(args) -> dict:
    """Seconds to choose and fit a regression for every finding, and the AUCs of both."""
    import sklearn
    from threadpoolctl import threadpool_limits

    from medsiglip_jax import metrics
    from medsiglip_jax.embeddings.probe import logistic
    from medsiglip_jax.embeddings.probe.logistic import Labelled

    train, validation, test = (Labelled(*_draw(args, n, seed)) for seed, n in
                               enumerate((args.rows, args.rows // 5, args.rows // 5)))  # fmt: skip
    start = time.perf_counter()
    fitted = logistic.fit(train, validation, args.findings)
    ours = time.perf_counter() - start
    measure.progress(f"ours: {ours:.1f} s")
    rows, seconds = [], 0.0
    for k in range(min(args.reference_findings, args.findings)):
        start = time.perf_counter()
        with threadpool_limits(1):  # faster here than with two, which wait for each other
            w, strength = _by_scikit_learn(train, validation, k)
        seconds += (took := time.perf_counter() - start)
        theirs = metrics.auc(test.vectors @ w, test.labels[:, k])
        own = metrics.auc(test.vectors @ fitted.coefficients[k], test.labels[:, k])
        rows.append(
            {
                "finding": k,
                "positives": int(train.labels[:, k].sum()),
                "strengths": [fitted.strengths[k], strength],
                "auc": [round(own, 5), round(theirs, 5)],
                "difference": round(own - theirs, 6),
                "sklearn_seconds": round(took, 1),
            }
        )
        measure.progress(str(rows[-1]))
    whole = seconds * args.findings / len(rows)
    summary = {
        "ours": round(ours, 1),
        "sklearn": round(whole, 1),
        "sklearn_measured": f"{len(rows)} of {args.findings} findings, scaled",
        "ratio": round(whole / ours, 1),
    }
    return {
        "rows_of_training": args.rows, "dim": args.dim, "findings": args.findings,
        "scikit-learn": sklearn.__version__, "unit": "seconds", "rows": [summary, *rows],
    }  # fmt: skip


def _draw(args, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of variance 1 with the falling spectrum of embeddings, and findings of 2 to 40 %."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, args.dim + 1) ** -0.5
    rotation = np.linalg.qr(rng.normal(size=(args.dim, args.dim)))[0]
    truth = rng.normal(size=(args.dim, args.findings)) * spectrum[:, None] / 2
    rng = np.random.default_rng([1, seed])
    hidden = rng.normal(size=(n, args.dim))
    logits = hidden @ truth - np.linspace(0.5, 4, args.findings)
    labels = (logits + rng.logistic(size=logits.shape) > 0).astype(np.float64)
    x = (hidden * spectrum) @ rotation
    return x / np.sqrt((spectrum**2).mean()), labels


def _by_scikit_learn(train, validation, k: int) -> tuple[np.ndarray, float]:
    """The best coefficients of one finding, and their C."""
    from sklearn.linear_model import LogisticRegression

    from medsiglip_jax import metrics
    from medsiglip_jax.embeddings.probe import logistic

    model = LogisticRegression(warm_start=True, max_iter=10_000, tol=1e-5)
    found: list[tuple[float, np.ndarray, float]] = []
    for strength in logistic.STRENGTHS:
        model.set_params(C=strength).fit(train.vectors, train.labels[:, k])
        area = metrics.auc(validation.vectors @ model.coef_[0], validation.labels[:, k])
        found.append((area, model.coef_[0].copy(), strength))
        if all(area < max(area for area, *_ in found) for area, *_ in found[-3:]):
            break
    return max(found, key=lambda fit: fit[0])[1:]


def add_parsers(commands) -> None:
    """The sub-command."""
    sub = commands.add_parser("probe", help="fitting a linear probe, against scikit-learn")
    sub.add_argument("--rows", type=int, default=4096, help="training rows (default 4,096)")
    sub.add_argument("--dim", type=int, default=1152, help="numbers of a vector (default 1,152)")
    sub.add_argument("--findings", type=int, default=14, help="findings (default 14)")
    sub.add_argument(
        "--reference-findings",
        type=int,
        default=2,
        help="findings that scikit-learn fits; its time is scaled (default 2)",
    )
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=probe)
