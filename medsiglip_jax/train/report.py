"""The report of a fine-tuning run: one HTML file with its curves, readable without a network."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from medsiglip_jax.files import storage
from medsiglip_jax.files.places import Place
from medsiglip_jax.pages import charts

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

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:980px;margin:32px auto;
padding:0 16px}h1{font-size:24px}figure{display:inline-block;margin:8px 32px 16px 0;
vertical-align:top}
table{border-collapse:collapse;margin:12px 0}td,th{padding:3px 14px 3px 0;text-align:left;
vertical-align:top}th{color:#616e7c;font-weight:500}pre{background:#f5f7fa;padding:12px;
overflow:auto;font-size:13px}"""


def write(
    path: Place, run: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], exported: int
) -> None:
    """Writes the report.

    Args:
        path: the HTML file, replaced atomically.
        run: the content of `config.json`.
        lines: the content of `metrics.jsonl`.
        exported: the step whose weights were exported.
    """
    plots = [_plot(title, keys, lines) for title, keys in _PLOTS]
    recipe = html.escape(json.dumps(run["recipe"], indent=2))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Fine-tuning report</title>
<style>{_STYLE}</style><h1>Fine-tuning report</h1>{_table(_facts(run, lines, exported))}
{"".join(plots)}<h2>Config</h2><pre>{recipe}</pre>
<p>Not a medical device. Scores on a validation split that was used to choose between runs are
optimistic; report those of a test set that was used once.</p>
"""
    with storage.new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _facts(
    run: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], exported: int
) -> dict[str, str]:
    last: dict[str, Any] = {}
    for line in lines:
        last |= line if line["step"] <= exported else {}
    facts = {
        "objective": run["recipe"]["objective"]["name"],
        "started from": run["recipe"]["init"] or "random weights",
        "trained": f"{run['trained']:,} of {run['parameters']:,} parameters",
        "examples": f"{sum(run['examples']):,} to train, {run['held_out']:,} held out",
        "devices": f"{len(run['devices'])} x {run['devices'][0]}",
        "versions": ", ".join(f"{k} {v}" for k, v in run["versions"].items()),
        "steps": f"{lines[-1]['step'] if lines else 0:,}",
        "exported": f"step {exported:,}; the scores are from that step",
        "updates skipped": f"{last.get('skipped', 0):.0f}",
    }
    scores = {k: f"{v:.4f}" for k, v in last.items() if k.startswith("val_") and _number(v)}
    return facts | scores


def _table(facts: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _plot(title: str, keys: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    """A figure of metrics over steps, or nothing if none was logged twice."""
    curves = {key: [(x["step"], x[key]) for x in lines if _number(x.get(key))] for key in keys}
    # A single curve is named by the title.
    series = [
        charts.Series(key if len(keys) > 1 else "", points)
        for key, points in curves.items()
        if len(points) > 1
    ]
    last = max((x for s in series for x, _ in s.points), default=0)
    return charts.lines(title, series, charts.Axis("step", (0.0, float(last))))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))
