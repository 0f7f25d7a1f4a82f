"""embed: images and texts to vectors in Parquet."""

import argparse
import dataclasses
import os
import time
from typing import Any

from medsiglip_jax.cli import abstaining, loading, reading, runners
from medsiglip_jax.cli.output import note, progress_bar, show
from medsiglip_jax.cli.parser import REQUIRED, Parser, add_flags

_NAMED = 20  # parts that are missing, of maybe a thousand
_COLUMNS = {
    "--image-column NAME": "default %(default)s, or what others call it, such as file_name or path",
    "--text-column NAME": "default %(default)s, or what others call it, such as caption or report",
    "--id-column NAME": "default %(default)s",
    "--root DIR": "folder of relative image paths; default the table's folder",
}
_PATIENTS = {
    "--groups": "add the columns patient, study and series of DICOM files, to split and evaluate "
    "by patient: hashes under a secret of yours (MEDSIGLIP_JAX_SALT, or a file in ~/.config); "
    "implied by --series",
    "--keep-uids": "write these identifiers as they are in the files",
}


def define_flags(sub: Parser) -> None:
    from medsiglip_jax.preprocess.formats import FORMATS

    flags = {
        "inputs INPUT...": f"files ({', '.join(format.name for format in FORMATS)}), folders "
        "(searched recursively) and globs; .txt with one text per line; tables (.csv .tsv .jsonl "
        ".parquet); .tar (WebDataset) and .tfrecord shards; local or gs://; studies, series and "
        "instances of DICOMweb, https://HOST/…/studies/UID",
        "--output DIR": "new folder for the result",
        "--shard-size N": "rows per Parquet file, default %(default)s",
        "--raw": "do not divide by the L2 norm",
        "--stored": "data type of the vectors in the files, default %(default)s",
        "--max-errors N": "stop when more than N inputs are unreadable; by default list them all "
        "and continue",
    }
    stored = {"default": "float32", "choices": ("float32", "float16")}
    add_flags(sub, flags, output=REQUIRED, shard_size=8192, stored=stored, max_errors=int)
    columns = sub.add_argument_group("columns of tables")
    add_flags(columns, _COLUMNS, image_column="image", text_column="text", id_column="id")
    add_flags(sub.add_argument_group("patients"), _PATIENTS)
    most = "what fits their memory, up to 128 images per device"
    loading.add_model(sub, batch_on_accelerators=most)
    reading.add_preprocess(sub)
    reading.add_parts(sub)
    abstaining.add_abstention(sub)
    loading.add_processes(sub)
    runners.add_runners(sub)


def embed(args: argparse.Namespace) -> int:
    """Embed images and texts to Parquet, any number, resumable. Writes the columns id,
    source, kind (image or text) and embedding; for tiles also x, y, level, size and
    mpp; with --groups or --series also patient, study and series; with --reference
    also distance and no_assist. Part of a file is named FILE#frame=N or
    FILE#tile=X,Y,LEVEL,SIZE. The same command again resumes a
    killed run and ends with the same files. On several hosts start it on each with
    --distributed, or with --part I/N where they need no contact, or once with --runner
    ray.

    example:
      medsiglip-jax embed --model google/medsiglip-448 --output embeddings scans/ notes.txt
      medsiglip-jax embed --model M --output gs://BUCKET/out --stored float16 rows.parquet
      medsiglip-jax embed --model M --output out 'shards/*.tar'
      medsiglip-jax embed --model M --output out --series --frame every=5 --volume ct ct/
      medsiglip-jax embed --model M --output out --mpp 0.5 slides/
      medsiglip-jax embed --model M --output out --part $SLURM_ARRAY_TASK_ID/64 scans/
      medsiglip-jax embed --model M --output out --runner ray --address auto scans/
    """
    part = runners.part(args)
    # Before anything asks for a device.
    main_process = loading.join_other_processes(args, lambda: "embeds what is missing")
    import jax

    from medsiglip_jax.data import expansion
    from medsiglip_jax.embeddings import provenance
    from medsiglip_jax.files import places
    from medsiglip_jax.inference import embed as embedding
    from medsiglip_jax.inference import run_folder
    from medsiglip_jax.inference.share import Share
    from medsiglip_jax.model import processes

    runner = runners.runner(args)
    rules, parts = reading.rules_and_parts(args)
    identifiers = "kept" if args.keep_uids else "hashed" if args.groups or args.series else None
    options = embedding.EmbedOptions(
        normalize=not args.raw, stored=args.stored,
        shard_size=args.shard_size, batch_size=8 if args.batch_size is None else args.batch_size,
        max_errors=args.max_errors,
        dicom=rules, identifiers=identifiers, workers=args.workers,
    )  # fmt: skip
    known = processes.run_on(lambda: abstaining.known_images(args))
    rows = processes.run_on(lambda: _rows(args, parts))
    assert rows is not None
    expansion.warn_of_unused(rules, rows.images)
    recorded = processes.run_on(lambda: run_folder.recorded_dtype(places.at(args.output)))
    mesh = None if runner else loading.local_mesh()
    model = processes.run_on(lambda: loading.load(args, mesh, recorded, weights=not runner))
    assert model is not None
    preparation = reading.prepared(args, rules, model.config)
    images = "image" in rows.table["kind"].unique().to_pylist()
    size = processes.run_on(lambda: loading.batch_size(args, model if images else None))
    origin = provenance.of_model(model, preparation.preprocess, not args.raw, preparation.dicom)
    judge = processes.run_on(lambda: abstaining.abstention(args, known, lambda: origin))
    options = dataclasses.replace(
        options,
        preprocess=preparation.preprocess,
        dicom=preparation.dicom,
        batch_size=size,
        abstention=judge,
    )
    mine = part or Share(jax.process_index(), jax.process_count())
    count = mine.rows(len(rows), options.shard_size)
    with progress_bar("input", count) as bar:
        progress = _EmbedProgress(bar)
        to_run = (model, rows, args.output)
        if part:
            made = embedding.embed_part(*to_run, part, options, progress.update)
        else:
            made = embedding.embed(*to_run, options, progress.update, runner)
    result = made.to_dict()
    if isinstance(made, embedding.Incomplete):
        show(result, args.json, lambda r: _to_come(args.output, r))
        return 0
    if main_process:
        show(result, args.json, lambda r: progress.summary(args.output, r))
        reading.note_skipped(result["skipped"], args)
        _warn(result, args.output)
    return 3 if result["errors"] else 0


def _rows(args: argparse.Namespace, parts: Any) -> Any:
    """The `Rows` of the inputs."""
    from medsiglip_jax.data import inputs

    return reading.listed(lambda on_file: inputs.rows(
        args.inputs, root=args.root, parts=parts, all_files=args.all_files, on_file=on_file,
        image=args.image_column, text=args.text_column, id=args.id_column,
    ))  # fmt: skip


def _to_come(output: str, result: dict[str, Any]) -> str:
    """What a part says that is not the last to finish."""
    parts = result["missing_parts"]
    named = ", ".join(map(str, parts[:_NAMED]))
    named += f" and {len(parts) - _NAMED:,} more" if len(parts) > _NAMED else ""
    return (
        f"{output}: part {result['part']} is done; {result['missing_shards']:,} of "
        f"{result['shards']:,} shards are missing, of parts {named}. The last to finish writes the "
        "manifest and lists what was unreadable"
    )


def _warn(result: dict[str, Any], output: str) -> None:
    """Says on stderr what of the inputs needs a look."""
    from medsiglip_jax.inference.manifest import ERRORS
    from medsiglip_jax.preprocess.facts import DARK

    frame = result["dicom"]["frame"]
    for key, line in {
        "errors": f"unreadable inputs are listed in {os.path.join(output, ERRORS)}",
        "turned": "images carry an EXIF orientation, which is not applied: pixels are used as "
        "stored",
        "burned_in": "DICOM files say that annotations are burned into their pixels; they may "
        "identify people",
        "multi_frame": "files have several frames, slices or pages; one of each is embedded "
        f"(--frame {frame}{', of pictures the first' * (frame == 'middle')}; all and every=K embed "
        "more)",
        "unusual": "DICOM files have something unusual about their units, windows, colours or "
        "bits; medsiglip-jax preview says of each what was done",
        "dark": DARK,
        "cut": "texts are longer than the model reads and were truncated",
    }.items():
        if result[key]:
            note(f"{result[key]} {line}")


class _EmbedProgress:
    """A bar with inputs/s, time left, how busy the device is, and how many are unreadable."""

    def __init__(self, bar):
        self._bar = bar
        self._start, self._rows, self._busy, self._errors = time.perf_counter(), 0, 0.0, 0

    def update(self, progress) -> None:
        if progress.busy is None:
            self._bar.initial += progress.rows  # rows of an earlier run do not count for the rate
        else:
            self._rows, self._busy = self._rows + progress.rows, progress.busy
            self._errors += progress.errors
            shown = {"device busy": f"{progress.busy:.0%}"}
            if progress.actors is not None:
                shown["actors"] = str(progress.actors)
            if self._errors:
                shown["unreadable"] = str(self._errors)
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(progress.rows)

    def summary(self, output: str, result: dict[str, Any]) -> str:
        text = f"{output}: {result['embedded']:,} of {result['rows']:,} embedded"
        if self._rows:
            seconds = time.perf_counter() - self._start
            text += (
                f"; {self._rows:,} now, in {seconds:.1f} s, {self._rows / seconds:.1f}/s, "
                f"device busy {self._busy:.0%} of the time"
            )
        return text
