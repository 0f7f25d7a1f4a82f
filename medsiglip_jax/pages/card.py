"""Model cards in Markdown, written from what runs have recorded and nothing else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from medsiglip_jax.files import front_matter
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import readme
from medsiglip_jax.pages import markdown

Facts = Mapping[str, Any]

NO_DEVICE = (
    "Not a medical device. It must not be used for diagnosis, and nothing here shows that it is "
    "safe or effective for patients."
)
# What stands before a question that no run can answer.
TO_FILL = "**To be filled in by a person:**"

LIMITS = (
    NO_DEVICE,
    "The scores are of the rows that this card names. Another hospital, scanner, population or "
    "mix of diseases may give other ones; measure them before use, by subgroup.",
    "Labels may have been learned from what goes along with them (a device, a marker, the "
    "scanner) instead of from the finding.",
)
_SETTINGS = (
    "objective total_steps batch_size learning_rate optimizer ema freeze lora augment preprocess "
    "dtype seed validation best"
).split()


def of_run(
    run: Facts,
    exported: int,
    metrics: Facts,
    test: Facts | None,
    base: Facts,
    title: str,
    config: ModelConfig,
) -> str:
    """The card of a fine-tuned model.

    Args:
        run: the content of a run's `config.json`.
        exported: the step whose weights were exported.
        metrics: the latest values at that step; those that begin with "val_" are shown.
        test: of the test rows, from `metrics.judge_classes`, or None.
        base: metadata of the base model's own card (`license`, `license_name`, `license_link`).
        title: the name of the model.
        config: the architecture of the model.

    Returns:
        Markdown that begins with the metadata that the Hugging Face hub reads.
    """
    sections = [
        f"# {markdown.escape(title)}",
        origin(run, exported),
        "## Data\n\n" + markdown.bullets(training_data(run)),
        "## Training\n\n" + markdown.table(("setting", "value"), settings(run["recipe"])),
        scores(metrics, test),
        "## Use\n\n" + _use(run, config),
        "## Limits\n\n" + markdown.bullets(LIMITS),
        "## Terms\n\n" + terms(run, base),
    ]
    metadata = front_matter.written(readme.metadata(config, run.get("init_repo"), base))
    return metadata + "\n\n".join(filter(None, sections)) + "\n"


def origin(run: Facts, exported: int) -> str:
    """What a run started from, and what of it was trained."""
    recipe = run["recipe"]
    weights = f" (sha256 of its weights {run['init_sha256']})" if run.get("init_sha256") else ""
    # Of a path only the last part, which says nothing about a machine.
    name = run.get("init_repo") or PurePath(recipe["init"] or "").name
    start = f"{markdown.code(name)}{weights}" if recipe["init"] else "random weights"
    return (
        f"Fine-tuned with medsiglip-jax from {start} with the objective "
        f"{recipe['objective']['name']}: {run['trained']:,} of {run['parameters']:,} parameters "
        f"were trained. The weights are those of step {exported:,}."
    )


def training_data(run: Facts) -> Iterable[str]:
    """The tables that a run learned from, and how many examples it had, as lines of Markdown."""
    for source in run["recipe"]["data"]:
        label = source.get("label")
        columns = ", ".join(label) if isinstance(label, list | tuple) else label
        what = f", labels from {markdown.escape(columns)}" if columns else ""
        yield f"{markdown.code(PurePath(source['path']).name)}{what}"
    test = f", {run['test']:,} to test" if run.get("test") else ""
    yield f"{sum(run['examples']):,} examples to train, {run['held_out']:,} to validate{test}"
    if run["classes"]:
        yield f"{len(run['classes'])} labels: {markdown.escape(', '.join(run['classes']))}"


def settings(recipe: Facts) -> Iterable[Sequence[str]]:
    """Names and values of the settings that matter to the result."""
    for key in _SETTINGS:
        value = recipe.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}={v}" for k, v in value.items() if v not in (None, (), [], {}))
        if value not in (None, (), [], ""):
            yield key, str(value)


def scores(metrics: Facts, test: Facts | None) -> str:
    """A section on validation and test rows, or nothing."""
    validation = [(k.removeprefix("val_"), number(v)) for k, v in metrics.items()
                  if k.startswith("val_")]  # fmt: skip
    parts = []
    if test:
        macro = f"On test rows: macro AUC {number(test['macro_auc'])}."
        parts += [macro, markdown.table(TEST_COLUMNS, test_rows(test))]
    if validation:
        chosen = ", which also chose the step and the thresholds" if test else ""
        parts += [f"On validation rows{chosen}:", markdown.table(("metric", "value"), validation)]
    return "## Scores\n\n" + "\n\n".join(parts) if parts else ""


TEST_COLUMNS = ("class", "AUC", "95 % interval", "sensitivity", "specificity", "threshold",
                "positives", "negatives")  # fmt: skip


def test_rows(test: Facts) -> list[Sequence[str]]:
    """The scores of `metrics.judge_classes`, a row for each class."""
    return [
        (name, number(x["auc"]), f"{number(x['low'])} to {number(x['high'])}",
         *(number(x[key]) for key in ("sensitivity", "specificity", "threshold")),
         f"{x['positives']:,}", f"{x['negatives']:,}")
        for name, x in test["classes"].items()
    ]  # fmt: skip


def fill(question: str) -> str:
    """A field that nothing recorded, as Markdown."""
    return f"{TO_FILL} {question}"


def number(x: Any) -> str:
    """Four decimals; "not defined" for None and NaN."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "not defined"
    return f"{float(x):.4f}"


def _use(run: Facts, config: ModelConfig) -> str:
    preset, command, what = run["recipe"]["preprocess"], "classify", '--text "a caption"'
    if config.classifier:
        what = "--labels"
    elif not config.text:
        command, what = "embed", "--output vectors"
    return (
        f"Images were prepared with the preset `{preset}`; other preparation gives other results.\n"
        f"\n```\nmedsiglip-jax {command} --model FOLDER {what} --preprocess {preset} IMAGE\n```"
    )


def terms(run: Facts, base: Facts) -> str:
    """A sentence on the terms of the base model, which apply to what is made of it."""
    if not run["recipe"]["init"]:
        return "The weights began at random; no other model's terms apply to them."
    name = base.get("license_name") or base.get("license")
    link = f" ({base['license_link']})" if base.get("license_link") else ""
    if name:
        terms = markdown.escape(f"{name}{link}")
        return f"The terms of the base model apply to this one too: {terms}."
    return (
        "The terms of the base model apply to this one too. Its folder does not name them; for "
        "MedSigLIP they are those of Health AI Developer Foundations "
        "(https://developers.google.com/health-ai-developer-foundations/terms)."
    )
