"""A model card: what runs have recorded, and questions that only a person can answer.

The headings follow Mitchell et al., "Model Cards for Model Reporting" (2019), with the terms of
TRIPOD+AI (2024) for data and figures.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from medsiglip_jax import __version__
from medsiglip_jax.evaluate.report import learning, sections, tables
from medsiglip_jax.evaluate.report.failures import TESTED, known_failures
from medsiglip_jax.pages import card, markdown
from medsiglip_jax.pages.card import Facts, fill

MOST_ROWS = 60  # of subgroups in a card; the report has all


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning run has recorded.

    Attributes:
        config: the content of its config.json.
        exported: the content of its exported.json.
        sha256: of the weights that it exported (`layouts.digest`).
        labels: of its classifier, if it trained one.
        base: the terms that its export states (`readme.terms`).
    """

    config: Facts
    exported: Facts
    sha256: str
    labels: Sequence[str] = ()
    base: Facts = field(default_factory=dict)


def write(title: str, run: FineTuned | None, evaluations: Sequence[Facts]) -> str:
    """The model card of a fine-tuned or evaluated model, as Markdown.

    Args:
        title: the name of the model.
        run: of the model, if it was fine-tuned here.
        evaluations: contents of results.json of evaluations of its weights.
    """
    parts = {
        "Model": _model(run, evaluations),
        "Intended use": _intended(run, evaluations),
        "Contraindicated uses": [markdown.bullets(_contraindicated(run, evaluations))],
        "Training data": _training_data(run),
        "Training": _training(run),
        "Evaluation data": _evaluation_data(evaluations),
        "Results": _results(run, evaluations),
        "Known failures": _failures(evaluations),
        "Care after deployment": [markdown.bullets(map(fill, _CARE))],
        "Provenance": [markdown.table(("", ""), _provenance(run, evaluations))],
        "Terms": [card.terms(run.config, run.base) if run else fill(_TERMS)],
    }
    text = [f"# {markdown.escape(title)}", _PREFACE]
    for heading, content in parts.items():
        text += [f"## {heading}", *content]
    return "\n\n".join(text) + "\n"


_PREFACE = (
    f"Written by medsiglip-jax {__version__} from what its runs have recorded. {card.NO_DEVICE} "
    "What no run can know, a person has to fill in; these fields are marked."
)
_TERMS = "the terms of the weights and of the data."
_CARE = (
    "who watches the scores for drift, with which reference and how often (`monitor check`).",
    "what happens with images that are unlike those below (`--abstain-at`), and after an alarm.",
    "how users report a wrong score, and who answers.",
)


# ------------------------------------------------------------------------------------------ model


def _model(run: FineTuned | None, evaluations: Sequence[Facts]) -> Iterator[str]:
    if run:
        yield card.origin(run.config, run.exported["step"])
        yield f"SHA-256 of its weights: {markdown.code(run.sha256)}."
    else:
        model = evaluations[0]["provenance"]["model"]
        name = markdown.code(PurePath(str(model["source"])).name)
        yield f"{name}, SHA-256 of its weights {markdown.code(str(model.get('sha256')))}."
    yield fill("owner and contact, version, date of release.")


def _preset(run: FineTuned | None, evaluations: Sequence[Facts]) -> str:
    return run.config["recipe"]["preprocess"] if run else evaluations[0]["provenance"]["preprocess"]


def _intended(run: FineTuned | None, evaluations: Sequence[Facts]) -> Iterator[str]:
    names = markdown.escape(", ".join(run.labels if run else ()))
    what = f"a score for each of {names}" if names else "an embedding, and scores for texts"
    yield (
        f"The model gives {what} of an image that was prepared with the preset "
        f"`{_preset(run, evaluations)}`."
    )
    yield markdown.bullets(map(fill, _INTENDED))


_INTENDED = (
    "users, setting and workflow: who sees the output, and what a person decides with it.",
    "patients: age, sex, disease, and how they come to be imaged.",
    "images: modality, body part, devices and protocols.",
    "the operating point, and what a false positive and a false negative cost.",
)


def _contraindicated(run: FineTuned | None, evaluations: Sequence[Facts]) -> Iterator[str]:
    yield "Diagnosis or treatment of patients without the judgement of a qualified person."
    titles = [markdown.escape(results["title"]) for results in evaluations]
    seen = f"those of {'; '.join(titles)}" if titles else "those that it was trained on"
    yield (
        f"Images unlike {seen}: another modality, body part, device, age group or population, "
        "until its scores have been measured on them."
    )
    yield (
        "Scores read as probabilities of disease: only calibrated ones come near them, and only "
        "at the prevalence of the images that they were calibrated on."
    )
    yield (
        f"Images that are not prepared with the preset `{_preset(run, evaluations)}`, such as "
        "screenshots, photographs of screens and burned-in windows."
    )
    yield "The only reader of images, where a missed finding harms a patient."
    yield fill("other uses that are known to be unsafe at this site.")


# ------------------------------------------------------------------------------------------- data


def _training_data(run: FineTuned | None) -> Iterator[str]:
    if run:
        yield markdown.bullets(card.training_data(run.config))
        yield markdown.bullets(map(fill, _DATA))
    else:
        yield fill("what the weights were trained on; the evaluations do not tell.")


_DATA = (
    "where, when and with which devices the images were taken.",
    "who labelled them, by which rules, and how well readers agree.",
    "consent or waiver, de-identification, and the terms of use.",
    "populations that are missing or rare.",
)


def _training(run: FineTuned | None) -> Iterator[str]:
    if run:
        yield markdown.table(("setting", "value"), card.settings(run.config["recipe"]))
        skipped = run.exported["metrics"].get("skipped") or 0
        yield f"{skipped:,.0f} updates with gradients that are not finite were skipped."
    else:
        yield "Nothing was trained by a run that this card knows."


def _evaluation_data(evaluations: Sequence[Facts]) -> Iterator[str]:
    for results in evaluations:
        yield f"### {markdown.escape(results['title'])}"
        if results["source"]:
            yield f"Data from {markdown.escape(results['source'])}."
        if answer := results["trained_on"]:
            yield f"Was MedSigLIP trained on these images? {markdown.escape(answer)}."
        yield from (tables.in_markdown(section, 4) for section in sections.cohort(results))
    if evaluations:
        yield fill("how the patients of these images differ from those of the intended use.")
    else:
        yield fill("an evaluation on images of the intended use (`evaluate`).")


# ---------------------------------------------------------------------------------------- results


def _results(run: FineTuned | None, evaluations: Sequence[Facts]) -> Iterator[str]:
    if run and (scores := card.scores(run.exported["metrics"], run.exported["test"])):
        yield scores.replace("## Scores", "### Of the fine-tuning run", 1)
    for results in evaluations:
        yield f"### {markdown.escape(results['title'])}"
        shown = *sections.figures(results), *learning.sections(results, curves=False)
        shown = *shown, sections.subgroups(results), sections.recalls(results)
        yield from (tables.in_markdown(_shortened(one), 4) for one in shown if one)


def _shortened(section: tables.ReportSection) -> tables.ReportSection:
    """Tables of subgroups have a row for each value and class, which may be hundreds."""
    left_out = len(section.rows) - MOST_ROWS
    if left_out <= 0:
        return section
    text = f"{section.text} {left_out:,} further rows are in the report of the evaluation."
    rows = section.rows[:MOST_ROWS]
    return tables.ReportSection(section.title, text, section.header, rows)


def _failures(evaluations: Sequence[Facts]) -> Iterator[str]:
    sentences = [
        f"{markdown.escape(results['title'])}: {markdown.escape(sentence)}"
        for results in evaluations
        for sentence in known_failures(results)
    ]
    if evaluations:
        yield f"Looked for: {TESTED}."
        yield markdown.bullets(sentences) if sentences else "Nothing of these was found."
    yield markdown.bullets(card.LIMITS[1:])
    yield fill("failures that users or reviewers have seen.")


# ------------------------------------------------------------------------------------- provenance


def _provenance(run: FineTuned | None, evaluations: Sequence[Facts]) -> Iterator[Sequence[str]]:
    if run:
        yield "weights, SHA-256", run.sha256
        if run.config["init_sha256"]:  # or it started from random weights
            yield "weights it started from, SHA-256", run.config["init_sha256"]
        yield "training data, SHA-256", run.config["data_sha256"]
        yield "trained with", _versions(run.config["versions"])
    for results in evaluations:
        made, name = results["provenance"], results["task"]
        hashes = {
            "weights": made["model"].get("sha256"),
            "tokenizer": made.get("tokenizer_sha256"),
            "prompts": made.get("prompts_sha256"),
        }
        yield from ((f"{name}: {key}, SHA-256", value) for key, value in hashes.items() if value)
        yield f"{name}: evaluated with", _versions(made["versions"])


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def check(results: Facts) -> None:
    """Raises an error for contents of results.json that lack what a card is written of."""
    write("", None, [results])


def different_weights(run: FineTuned | None, evaluations: Mapping[str, Facts]) -> Iterable[str]:
    """Names of the evaluations that are of other weights than the run, or than the first one, or
    may be: weights that no file holds have no hash."""
    shas = {name: _weights(results) for name, results in evaluations.items()}
    of_model = run.sha256 if run else next(iter(shas.values()), None)
    alone = run is None and len(shas) == 1
    return [name for name, sha in shas.items() if not alone and (sha is None or sha != of_model)]


def _weights(results: Facts) -> str | None:
    """The hash of the weight files, without what says how their features are pooled."""
    sha256 = results["provenance"]["model"].get("sha256")
    return sha256.split()[0] if sha256 else None
