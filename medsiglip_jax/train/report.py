"""The report of a fine-tuning run: one HTML file with its curves, readable without a network."""

from collections.abc import Mapping, Sequence
from typing import Any

from medsiglip_jax.files import places, storage
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.pages import card, charts, html

Values = Mapping[str, Any]

# (title, keys of one figure); a figure without a logged key is left out.
_PLOTS = (
    ("Loss", ("loss", "val_loss")),
    ("Held-out AUC and accuracy", ("val_auc", "val_accuracy", "val_recall@1")),
    ("Mean logit of matching pairs and of others", ("val_positive", "val_negative")),
    ("Gradient norm", ("grad_norm",)),
    ("Temperature exp(t)", ("temperature",)),
    ("Bias b", ("bias",)),
    ("Learning rate", ("learning_rate",)),
    ("Images per second", ("images_per_second",)),
)

_STYLE = f"""body{{max-width:980px}}
pre{{background:{html.themed(html.PAPER)};padding:12px;overflow:auto;font-size:13px}}
figure{{display:inline-block;margin:8px 32px 16px 0;vertical-align:top}}"""
_CAUTION = (
    "Not a medical device. Scores on a validation split that was used to choose between runs are "
    "optimistic; report those of a test set that was used once."
)


def write(
    path: places.Place,
    run: Values,
    lines: Sequence[Values],
    exported: int,
    metrics: Values,
    test: Values | None = None,
) -> None:
    """Writes the report.

    Args:
        path: the HTML file, replaced atomically.
        run: the content of `config.json`.
        lines: the content of `metrics.jsonl`.
        exported: the step whose weights were exported.
        metrics: the latest values at that step.
        test: scores of the test rows, as from `metrics.judge_classes`.
    """
    plots = [_plot(title, keys, lines) for title, keys in _PLOTS]
    body = [
        html.table(_facts(run, lines, exported, metrics).items(), headed=True),
        _test_table(test) if test else "",
        *plots,
        f"<h2>Config</h2><pre>{html.escape(dumps(run['recipe'], indent=2))}</pre>\n",
    ]
    with storage.new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(html.page("Fine-tuning report", _STYLE, body, _CAUTION))


def _facts(run: Values, lines: Sequence[Values], exported: int, metrics: Values) -> dict[str, str]:
    facts = {
        "objective": run["recipe"]["objective"]["name"],
        "started from": run["recipe"]["init"] or "random weights",
        "trained": f"{run['trained']:,} of {run['parameters']:,} parameters",
        "examples": f"{sum(run['examples']):,} to train, {run['held_out']:,} held out",
        "devices": f"{len(run['devices'])} x {run['devices'][0]}",
        "versions": ", ".join(f"{k} {v}" for k, v in run["versions"].items()),
        "steps": f"{lines[-1]['step'] if lines else 0:,}",
        "exported": f"step {exported:,}; the scores are from that step",
        "updates skipped": f"{metrics.get('skipped', 0):.0f}",
    }
    scores = {k: f"{v:.4f}" for k, v in metrics.items() if k.startswith("val_") and _number(v)}
    return facts | scores


def _test_table(test: Values) -> str:
    """The scores of every class on the test rows; thresholds are those of the validation rows."""
    said = (
        f"Macro AUC {card.number(test['macro_auc'])}. Thresholds were chosen on validation rows "
        "(highest sensitivity + specificity) and are judged on test rows, which had no part in "
        "training."
    )
    table = html.table(card.test_rows(test), card.TEST_COLUMNS)
    return f"<h2>Test rows</h2>{html.paragraph(said)}{table}\n"


def _plot(title: str, keys: Sequence[str], lines: Sequence[Values]) -> str:
    """A figure of metrics over steps, or nothing if none was logged twice."""
    curves = {key: [(x["step"], x[key]) for x in lines if _number(x.get(key))] for key in keys}
    # A single curve is named by the title.
    series = [
        charts.Series(key if len(keys) > 1 else "", points)
        for key, points in curves.items()
        if len(points) > 1
    ]
    last = max((x for s in series for x, _ in s.points), default=0)
    # What is a share of 1 says where its axis is cut; the title names the others.
    y = charts.Axis("share" if "val_auc" in keys else "")
    return charts.lines(title, series, charts.Axis("step", (0.0, float(last))), y)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))
