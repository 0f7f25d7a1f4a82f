"""monitor fit, monitor check: has something changed."""

import argparse
from typing import Any

from medsiglip_jax.cli import output, outputs
from medsiglip_jax.cli.loading import add_model, load
from medsiglip_jax.cli.parser import REPEATED, REQUIRED, SEPARATOR, Parser, add_flags, group

_ALARM = 4  # exit code


_GROUP = """
    Has something changed: compare new embeddings with a reference. The reference is fitted once, to
    images that are in control; each later window of images is then checked against it.

    example:
      medsiglip-jax monitor fit --embeddings reference --output reference.npz
      medsiglip-jax monitor check --reference reference.npz --embeddings week --output report
"""


def add(commands) -> None:
    group(commands, "monitor", _GROUP, {
        monitor_fit: _add_fit_flags, monitor_check: _add_check_flags,
    })  # fmt: skip


_TABLES = {
    "--metadata TABLE": "table (.csv .tsv .parquet .jsonl) of the images, by id",
    "--id-column COL": "column of the ids of the embeddings; default id, or that of the images",
    "--group COL": "column of patients; default patient of embed --groups; windows in control are "
    "drawn by patient",
    "--labels TABLE": "table of labels, by id, for AUC and calibration",
    "--label COL": "column of labels, as for probe fit; repeat for several findings",
    "--label-separator S": SEPARATOR,
}
_FIT = {
    "--embeddings E": "folder that embed wrote, or evaluate, or vectors of another program as "
    "for search, of images in control which neither the model nor the probe was trained on",
    "--output FILE": "file for the reference, .npz",
    "--probe P": "file of probe fit, whose scores are watched",
    "--text T": "prompt whose zero-shot scores are watched, which needs --model; repeatable. With "
    "a text for each class of the probe, in its order, their disagreement is watched, too",
    "--by COLUMNS": "columns of --metadata, such as modality,scanner: each value is also looked at "
    "by itself",
    "--compare COLUMNS": "columns of --metadata of which only the mix of values is watched",
    "--rows N": "keep at most N images, drawn by patient, default %(default)s",
    "--seed N": "seed of that draw, default %(default)s",
}
_CHECK = {
    "--reference FILE": "file that monitor fit wrote",
    "--embeddings E": "folder of new images that embed wrote, or evaluate; or vectors as for fit",
    "--output DIR": "folder for report.html, which shows the most unusual images, monitor.json and "
    "metrics.prom; an earlier report there is replaced",
    "--window W": "cut the images into windows: of N images in their order, or of a time such as "
    "7d; default one window of all",
    "--time COL": "column of --metadata with the time of each image, ISO 8601",
    "--level X": "probability that a window in control alarms in any of its tests, default "
    "%(default)s",
    "--seed N": "seed of the windows in control that are drawn, default %(default)s",
}


def _add_fit_flags(sub: Parser) -> None:
    from medsiglip_jax.trust.monitor.reference import MOST_ROWS

    add_flags(sub, _FIT, embeddings=REQUIRED, output=REQUIRED, text=REPEATED, rows=MOST_ROWS,
              seed=0)  # fmt: skip
    add_flags(sub.add_argument_group("tables"), _TABLES, label=REPEATED)
    add_model(sub, required=False, batches=False)
    outputs.add_overwrite(sub, output=outputs.is_reference)


def _add_check_flags(sub: Parser) -> None:
    add_flags(sub, _CHECK, reference=REQUIRED, embeddings=REQUIRED, output=REQUIRED, level=0.05,
              seed=0)  # fmt: skip
    add_flags(sub.add_argument_group("tables"), _TABLES, label=REPEATED)


def monitor_fit(args: argparse.Namespace) -> int:
    """Keep images that are in control as a reference. The file holds their embeddings,
    distances and the columns that were asked for, no ids and no names. The reference
    should have at least twice as many images as the windows to come, and better ten
    times as many. --abstain-at of classify, probe predict, embed and serve uses it, too.

    example:
      medsiglip-jax monitor fit --embeddings reference --probe pneumonia.npz
        --metadata images.csv --by modality,scanner --group patient --output reference.npz
    """
    from medsiglip_jax.embeddings.probe import linear
    from medsiglip_jax.files import places
    from medsiglip_jax.trust.monitor import images, reference, scores

    if bool(args.text) != bool(args.model):
        raise ValueError("--text and --model belong together: the model embeds the texts")
    places.check_suffix(args.output, ".npz")
    probe = linear.open_probe(args.probe) if args.probe else None
    given = _given(args, _names(args.by), _names(args.compare), None, probe)
    with output.progress_bar("row", delay=2.0) as bar:
        run = images.open_run(args.embeddings, bar.update)
        model = load(args, recorded=run.manifest.dtype) if args.model else None
        fitted = reference.fit(
            run, given, model=model, texts=args.text or (), probe=probe, most=args.rows,
            seed=args.seed,
        )  # fmt: skip
    scores.of_reference(fitted)  # labels without scores of them are an error now, not at each check
    fitted.save(args.output)
    sizes = {name: len(rows) for name, _, _, rows in fitted.strata()}
    result = {"reference": args.output, **fitted.facts, "strata": sizes,
              "largest_window": len(fitted) // 2}  # fmt: skip
    output.show(result, args.json, lambda r: (
        f"{args.output}: {r['images']:,} images of {r['patients']:,} patients; windows of up to "
        f"{r['largest_window']:,} images can be checked"
    ))  # fmt: skip
    return 0


def monitor_check(args: argparse.Namespace) -> int:
    """Compare new images with a reference; the exit code is 4 if something has changed.
    Tests distances (mmd, mahalanobis, knn), scores, labels, metadata and the share of
    unreadable files, each with a threshold from windows of the reference, and together
    by Holm. An alarm says that images differ, not that results are wrong, and results
    may be wrong without one. The level is that of one window: of many windows in
    control some alarm by chance, and one that does is enough for exit code 4.

    example:
      medsiglip-jax monitor check --reference reference.npz --embeddings new --output report
      medsiglip-jax monitor check --reference reference.npz --embeddings new --output report
        --metadata images.csv --time acquired --window 7d
    """
    from medsiglip_jax.trust.monitor import check, images, reference, report, windows

    report.check_folder(args.output)
    known = reference.open_reference(args.reference)
    given = _given(args, known.by, tuple(known.columns), args.time, known.probe)
    size = windows.parse_size(args.window) if args.window else None
    run = images.open_run(args.embeddings)
    with output.progress_bar("window", delay=2.0) as bar:
        result = check.check(
            known, run, given, size=size, level=args.level, seed=args.seed, on_window=bar.update
        )
    report.write(args.output, result, run.manifest.dicom_rules)
    output.show(result, args.json, lambda r: report.text(r, args.output))
    for line in result["notes"]:
        output.note(line)
    return _ALARM if result["alarm"] else 0


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def _given(args: argparse.Namespace, by, compare, time: str | None, probe) -> Any:
    """The tables that the flags name."""
    from medsiglip_jax.trust.monitor.images import Columns, Given

    columns = Columns(by, compare, args.group, time, args.id_column)
    classes = probe.classes if probe is not None and probe.exclusive else None
    return Given(args.metadata, columns, args.labels, tuple(args.label or ()), classes,
                 args.label_separator)  # fmt: skip
