"""probe fit, probe predict, probe curve: a linear classifier on embeddings."""

import argparse
from collections.abc import Iterator
from typing import Any

from medsiglip_jax.cli import abstaining, output, outputs, reading
from medsiglip_jax.cli.loading import ADDED, add_model, load
from medsiglip_jax.cli.parser import (
    REPEATED,
    REQUIRED,
    SEPARATOR,
    UNCERTAIN,
    VECTORS,
    Parser,
    add_flags,
    group,
    refuse_unused,
)

_GROUP = """
    A linear classifier on embeddings: fit, predict, curve. Learns labels from the vectors that
    embed wrote, and scores new images or vectors with what it learned.

    example:
      medsiglip-jax embed --model google/medsiglip-448 --output embeddings scans/
      medsiglip-jax probe fit --data labels.csv --embeddings embeddings --label pneumonia
        --group patient --output pneumonia.npz
      medsiglip-jax probe predict --probe pneumonia.npz --model google/medsiglip-448 scan.png
"""


def add(commands) -> None:
    group(commands, "probe", _GROUP, {
        probe_fit: _add_fit_flags, probe_predict: _add_predict_flags, probe_curve: _add_curve_flags,
    })  # fmt: skip


_DATA = {
    "--data D": "table of labels: CSV, TSV, Parquet or JSONL; or the folder of class folders that "
    "was embedded",
    "--embeddings E": VECTORS,
    "--label COL": "column of class names, or of a finding: 0, 1, true, false, yes, no, and -1 "
    "(uncertain); repeat for several findings",
    "--label-separator S": SEPARATOR,
    "--uncertain P": UNCERTAIN,
    "--group COL": "column of patients, each of whom stays within one split; if D has no such "
    "column, also patient, study or series of embed --groups",
    "--split COL": "column of train, validation and test",
    "--id-column COL": "column of the ids of the embeddings, or of the paths of their images",
    "--validation X": "fraction of the rows to draw for validation if no split names them; default "
    "%(default)s",
    "--seed N": "seed of that draw, default %(default)s",
    **reading.ALL_FILES,
}
_FIT = {
    "--output P": "file for the probe, .npz",
    "--scale S": "how vectors are scaled: standard (default), unit or raw",
    "--strength C": "inverse strength of regularisation, as scikit-learn's C; default the best of "
    "ten on validation rows",
    "--hidden N": "train a hidden layer of N units before the regression; default none",
    "--rule R": "how thresholds are chosen: youden (default), sensitivity or specificity",
    "--at-least X": "the minimum sensitivity or specificity on validation rows",
}
_PREDICT = {
    "inputs INPUT": "images, as for embed",
    "--probe P": "file that probe fit wrote; not needed for a --model that has a classifier",
    "--embeddings E": f"{VECTORS}; instead of images",
    "--output FILE": "file for the scores of --embeddings, .csv or .parquet",
    "--rank R": "sort as a triage list: uncertainty, the least certain first; or score, the "
    "highest probability first; images without an answer come before all",
}
_CURVE = {
    "--method M": "logistic (default), knn or prototypes",
    "--sizes N...": "numbers of training rows to try",
    "--seeds N": "draws of each size, default %(default)s",
}


def _add_data(sub: Parser) -> None:
    add_flags(
        sub, _DATA, data=REQUIRED, embeddings=REQUIRED, label=REPEATED, validation=0.2, seed=0,
        uncertain="ignore",
    )  # fmt: skip


def _add_fit_flags(sub: Parser) -> None:
    _add_data(sub)
    add_flags(sub, _FIT, output=REQUIRED, scale="standard", rule="youden", at_least=float,
              strength=float, hidden=0)  # fmt: skip
    outputs.add_overwrite(sub, output=outputs.is_probe)


def _add_predict_flags(sub: Parser) -> None:
    add_flags(sub, _PREDICT, inputs={"nargs": "*"})
    reading.add_queries(sub)
    add_model(sub, required=False)
    abstaining.add_abstention(sub, unsure=True)
    own = outputs.is_table_of("id,.*,positive(,distance,no_assist)?")
    outputs.add_overwrite(sub, output=own)


def _add_curve_flags(sub: Parser) -> None:
    _add_data(sub)
    add_flags(sub, _CURVE, method="logistic", sizes=int, seeds=5)


def probe_fit(args: argparse.Namespace) -> int:
    """Learn labels from embeddings. Fits a logistic regression; its strength of
    regularisation and its thresholds are chosen on validation rows. The table has
    the id of each embedding, one column of class names or several of 0 and 1, and
    if known the split and the patient. --scale raw --strength 1 is the probe of the
    official notebook; --hidden 64 puts a small hidden layer before the regression.

    example:
      medsiglip-jax probe fit --data labels.csv --embeddings embeddings --label pneumonia
        --group patient --output pneumonia.npz
    """
    from medsiglip_jax.data.labels import parse_uncertain
    from medsiglip_jax.embeddings.probe.fitting import fit

    result = fit(
        args.data, args.embeddings, args.output, label=args.label or (), group=args.group,
        split=args.split, id=args.id_column, scale=args.scale, strength=args.strength,
        hidden=args.hidden, rule=args.rule, at_least=args.at_least, validation=args.validation,
        seed=args.seed,
        uncertain=parse_uncertain(args.uncertain), label_separator=args.label_separator,
        all_files=args.all_files,
    )  # fmt: skip
    output.show(result, args.json, _fit_text)
    if result["missing"] or result["unlabelled"] or result["joined_by"] != "id":
        output.note(result["joined"])
    return 0


def _fit_text(result: dict[str, Any]) -> str:
    part = "test" if "test" in result else "validation"
    caveat = "" if part == "test" else ", which chose the settings: expect less on new data"
    lines = [
        f"probe       {result['probe']}",
        f"rows        {', '.join(f'{name} {n:,}' for name, n in result['rows'].items())}",
        f"macro AUC   {_number(result[part]['macro_auc'])} on {part} rows{caveat}",
        f"  {'AUC':>6}  {'95 % interval':^15}  {'sens.':>6}  {'spec.':>6}  {'n+':>6}  class",
    ]
    for name, row in result[part]["classes"].items():
        interval = f"{_number(row['low'])} {_number(row['high'])}"
        lines.append(
            f"  {_number(row['auc'])}  {interval:^15}  {_number(row['sensitivity'])}  "
            f"{_number(row['specificity'])}  {row['positives']:6,}  {name}"
        )
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "   n/a" if x is None else f"{x:6.4f}"


def probe_predict(args: argparse.Namespace) -> int:
    """Score images, or embeddings, with a probe. Images are prepared as those that the
    probe learned from; embeddings must have been made that way. Without --probe, with
    the classifier of a model that finetune --config classification trained.

    example:
      medsiglip-jax probe predict --probe pneumonia.npz --model google/medsiglip-448 scan.png
      medsiglip-jax probe predict --probe pneumonia.npz --embeddings new --output new.csv
      medsiglip-jax probe predict --model run/export scan.png
      medsiglip-jax probe predict --probe pneumonia.npz --embeddings new --output new.csv
        --reference reference.npz --rank uncertainty
    """
    from medsiglip_jax.embeddings import provenance
    from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
    from medsiglip_jax.embeddings.probe import linear, prediction
    from medsiglip_jax.preprocess.dicom.rules import from_dict

    if args.rank is not None and args.rank not in prediction.RANKS:
        raise ValueError(f"--rank is {args.rank}; expected one of {', '.join(prediction.RANKS)}")
    if not args.probe:
        return _predict_by_classifier(args)
    probe = linear.open_probe(args.probe)
    if args.embeddings:
        if args.inputs or not args.output:
            raise ValueError("--embeddings needs --output FILE and no INPUT")
        refuse_unused(args, "with --embeddings", (*ADDED, *reading.QUERIES))
        run, known = open_embeddings(args.embeddings), abstaining.known_images(args)
        judge = abstaining.abstention(args, known, lambda: provenance.of_run(run.manifest))
        count = prediction.predict(probe, run, args.output, judge, args.rank)
        result = {"output": args.output, "rows": count}
        output.show(result, args.json, lambda r: f"{args.output}: {count:,}")
        return 0
    if not args.inputs or not args.model or args.output:
        raise ValueError("expected --model with INPUT, or --embeddings with --output")
    dicom, parts = reading.queries(args, from_dict(probe.provenance.dicom), args.inputs)
    known = abstaining.known_images(args)
    with output.progress_bar("image") as bar:
        model = load(args)
        made = provenance.of_model(model, *prediction.check_model(probe, model), dicom)
        results = prediction.predict_inputs(
            probe, model, args.inputs, batch_size=args.batch_size, dicom=dicom, parts=parts,
            all_files=args.all_files, on_progress=bar.update,
            abstention=abstaining.abstention(args, known, lambda: made),
        )  # fmt: skip
    if args.rank:
        results = prediction.ranked(results, probe.exclusive, args.rank)
    return _show_scores(results, args)


def _predict_by_classifier(args: argparse.Namespace) -> int:
    from medsiglip_jax.embeddings import provenance
    from medsiglip_jax.embeddings.probe import prediction
    from medsiglip_jax.preprocess.dicom.rules import Rules

    if not (args.model and args.inputs) or args.embeddings or args.output:
        raise ValueError(
            "expected --probe P, or without it --model M, which has a classifier, and INPUT"
        )
    dicom, parts = reading.queries(args, Rules(), args.inputs)
    known = abstaining.known_images(args)
    with output.progress_bar("image") as bar:
        model = load(args)
        features, own = model.features, model.config.classifier  # or an error that there is none
        assert own is not None
        dicom = reading.prepared(args, dicom, model.config).dicom
        made = features, own.preprocess, False, dicom
        results = prediction.predict_by_classifier(
            model, args.inputs, batch_size=args.batch_size, dicom=dicom, parts=parts,
            all_files=args.all_files, on_progress=bar.update,
            abstention=abstaining.abstention(args, known, lambda: provenance.of_model(*made)),
        )  # fmt: skip
    if args.rank:
        results = prediction.ranked(results, not own.multi_label, args.rank)
    return _show_scores(results, args)


def _show_scores(results: list[dict[str, Any]], args: argparse.Namespace) -> int:
    output.show(results, args.json, lambda r: output.scored(r, _probabilities))
    return 3 if any("error" in result for result in results) else 0


def _probabilities(scores: list[dict[str, Any]]) -> Iterator[str]:
    for score in scores:
        mark = "positive" if score["positive"] else ""
        yield f"  {score['probability']:7.2%}  {mark:8}  {' '.join(score['class'].split())}"


def probe_curve(args: argparse.Namespace) -> int:
    """AUC on test rows against the number of training rows. Data-efficient
    classification: trains on 64, 512, 4,096, 32,768 and all rows, with several
    seeds. Needs a test split.

    example:
      medsiglip-jax probe curve --data labels.csv --embeddings embeddings --label grade
        --split split --group patient
    """
    from medsiglip_jax.data.labels import parse_uncertain
    from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
    from medsiglip_jax.embeddings.probe import features, learning
    from medsiglip_jax.embeddings.probe.logistic import Labelled

    examples = features.read(
        args.data, open_embeddings(args.embeddings), label=args.label or (), group=args.group,
        split=args.split, id=args.id_column, uncertain=parse_uncertain(args.uncertain),
        label_separator=args.label_separator, all_files=args.all_files,
    )  # fmt: skip
    splits = features.split(examples, args.validation, args.seed)
    if splits.test is None:
        raise ValueError(
            "there are no test rows to measure on; name the column of the splits with --split"
        )
    rows = [Labelled(s.vectors, s.labels) for s in splits if s is not None]
    with output.progress_bar("fit") as bar:
        result = learning.learning_curve(
            *rows, sizes=args.sizes or learning.SIZES, seeds=range(args.seeds), method=args.method,
            on_row=lambda row: bar.update(),
        )  # fmt: skip
    output.show(result, args.json, _curve_text)
    return 0


def _curve_text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'rows':>8}  {'seed':>4}  {'AUC':>6}"]
    lines += [f"{row['n']:8,}  {row['seed']:4}  {_number(row['auc'])}" for row in rows]
    return "\n".join(lines)
