"""evaluate: a model on a data set, beside the published figures."""

import argparse
from typing import Any

from medsiglip_jax.cli import parser, reading
from medsiglip_jax.cli.loading import add_model, batch_size, load, local_mesh
from medsiglip_jax.cli.output import note, progress_bar, show, table

_WHAT = {
    "--task T": "a name (see --list), or your own .toml or .json",
    "--from DIR": "recompute report and results from the scores in DIR, without a model; takes "
    "--resamples, --prevalence, --per, --aggregate and --export",
    "--average DIR...": "the mean of the scores of several evaluations, of checkpoints for "
    "instance, as a new one in --output; takes what --from takes",
    "--list": "list the tasks and where to get their data",
}
_FILES = {
    "--data D": "folder of the data set",
    "--output DIR": "folder for embeddings, scores and report",
    "--allow-missing": "go on without images that are missing or unreadable; default: stop and "
    "list them",
    "--prefer RULE": "which file is read where a search for images finds several of one, such as "
    "a resized copy: largest (most pixels), or a folder below --data; default: stop and list them",
    "--allow-leaks": "go on with training, validation and test parts that share patients, images "
    "or copies of images, which the report then says; default: stop and list them",
    "--embeddings E": "output folder of embed, or vectors of another program as for search, for "
    "these images and this checkpoint",
    "--export": "also write every table as .csv and .tex and every figure as .svg (and .png with "
    "the extra figures) to DIR/export",
}
_LEARNING = {
    "--learn WHAT": "thresholds: operating points and calibration, from validation images; probe "
    "(the default of --learn, and of the task digits): also a linear probe, nearest neighbours, "
    "few-shot learning and a learning curve, from training images",
    "--sizes N": "numbers of training images of the learning curve; default 64 512 4096 32768; all "
    "of them are always the last point",
    "--seeds N": "draws of each size, default 3",
    "--prevalence X": "prevalence at which to state PPV and NPV, besides that of the test images",
}
_EXPLAIN = {
    "--explain METHOD": "make maps of what speaks for a class, in images for which the data set "
    "says where it lies, and measure whether the maps lie there: ig (integrated gradients), "
    "occlusion or rollout; of tasks with regions, see --list",
    "--explain-images N": "draw N of these images by --seed; default all",
}
_STATISTICS = {
    "--uncertain P": f"{parser.UNCERTAIN}; a rule may begin with a part, such as "
    "test:ignore,train:positive,train:Edema=negative",
    "--blank P": "what an empty cell means, in the same form: ignore (default) or negative; of a "
    "column of class names (SCIN, NIH), negative is an image that shows none of the classes",
    "--by COLUMN": "compare subgroups by this column of the tables, too, such as the hospital; "
    "repeat for several",
    "--per COLUMN": "judge one score for each patient, or for each value of another attribute of "
    "the task, such as study; default: for each image, which --per image says again after --from",
    "--aggregate HOW": "with --per: mean (default), max, topN (mean of the N highest, such as "
    "top3) or noisy-or of the scores of its images",
    "--resamples N": "number of resamples of the bootstrap; default 2000",
    "--seed N": "seed of the bootstrap, and of splits and images that have to be drawn",
}


def define_flags(sub: parser.Parser) -> None:
    scores = {
        "--preprocess P": "default big_vision, or that of the model's training where that is "
        f"known; {reading.preset_help()}",
        "--prompts FILE": ".toml or .json: class = [prompts]",
        "--reading NAME": "one of the task's readings of prompts that were published ambiguously",
        "--score RULE": "pos_minus_neg, pair_softmax, class_softmax or cosine",
        "--over-prompts HOW": "how several prompts of a class become one: embedding (default), the "
        "mean of their embeddings, or the mean or max of the cosines with each",
        "--temperature T": "temperature of class_softmax: logit_scale (default), which is the "
        "model's own, or none",
        "--grid": "run all presets, readings and temperatures that the published figures leave "
        "open",
    }
    again = {"dest": "again"}  # `from` is a keyword
    parser.add_flags(sub.add_mutually_exclusive_group(required=True), _WHAT, **{"from": again})
    parser.add_flags(sub, _FILES)
    group = sub.add_argument_group("scores")
    how = {"reading": "as given", "temperature": "logit_scale", "over_prompts": "embedding"}
    parser.add_flags(group, scores, **how)
    group, sizes = sub.add_argument_group("learning"), {"nargs": "*", "type": int}
    learn = {"nargs": "?", "const": "probe"}
    parser.add_flags(group, _LEARNING, learn=learn, sizes=sizes, seeds=int, prevalence=float)
    parser.add_flags(sub.add_argument_group("maps"), _EXPLAIN, explain_images=int)
    group = sub.add_argument_group("labels and statistics")
    statistics = {"by": parser.REPEATED, "uncertain": "ignore", "blank": "ignore"}
    parser.add_flags(group, _STATISTICS, **statistics, resamples=int, seed=0)
    reading.add_dicom(sub)
    add_model(sub, required=False, batch_on_accelerators="64 per device")


def evaluate(args: argparse.Namespace) -> int:
    r"""AUCs of a model on a data set, beside the published ones. Zero-shot: the prompts
    of a class are embedded and averaged, and images are scored by their cosine with
    it. With --learn, a linear probe and thresholds are also fitted to training and
    validation images. Writes scores.parquet, report.html, report.md and
    results.json. The same command again resumes a killed run.

    example:
      medsiglip-jax evaluate --task digits --output first   # brings its own data and model
      medsiglip-jax evaluate --list
      medsiglip-jax evaluate --task chexpert-test --model google/medsiglip-448 \
        --data CheXpert --output results
      medsiglip-jax evaluate --task idrid --model google/medsiglip-448 --data IDRiD \
        --output idrid --learn   # also fits a linear probe to its training images
      medsiglip-jax evaluate --from results
    """
    if args.list:
        return _list(args)
    output = args.again or args.output
    results = _recompute(args) if args.again or args.average else _run(args)
    show(results, args.json, lambda r: _text(output, r))
    lost = {k: n for k, n in results["counts"].items() if k.startswith(("missing", "unreadable"))}
    if maps := (results["localization"] or {}).get("errors"):
        note(f"{maps:,} maps could not be measured; localization.parquet has the reasons")
    if any(lost.values()):
        shown = ", ".join(f"{count:,} {name}" for name, count in lost.items() if count)
        note(f"went on without {shown} images")
    return 3 if maps or any(lost.values()) else 0


# What --from takes; any other flag would need other scores than those in the folder.
_WITH_FROM = ("resamples", "prevalence", "per", "aggregate", "export", "json")


def _recompute(args: argparse.Namespace) -> dict[str, Any]:
    from medsiglip_jax.evaluate.ensemble import average
    from medsiglip_jax.evaluate.recompute import recompute

    what, own = ("--average", ("average", "output")) if args.average else ("--from", ("again",))
    others = (name for name in vars(args) if name not in (*own, *_WITH_FROM))
    if wrong := parser.given(args, others):
        raise ValueError(
            f"{what} takes {', '.join(f'--{name}' for name in _WITH_FROM)}; got "
            f"{', '.join(wrong)}, which needs the whole evaluation again"
        )
    if args.average:
        if not args.output:
            raise ValueError("--average needs --output, the folder of the new evaluation")
        average(args.average, args.output)
    folder = args.again or args.output
    return recompute(folder, args.resamples, args.prevalence, args.export, _unit(args))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from medsiglip_jax.evaluate import run, tasks
    from medsiglip_jax.evaluate.data import digits
    from medsiglip_jax.files import places

    if args.task == digits.NAME:
        if args.output and not (args.data or args.model):
            run.check_folder(places.at(args.output))
            args.data, args.model = map(str, digits.prepare(args.output))
            args.learn = args.learn or "probe"
    needed = ("model", "data", "output")
    if lacking := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise ValueError(f"--task needs {', '.join(lacking)}")
    task, options = tasks.read(args.task), _options(args)
    task = task.with_prompts(args.prompts) if args.prompts else task
    recorded = run.recorded_dtype(args.output, args.embeddings)
    bars = progress_bar("image"), progress_bar("fit", delay=0.5), progress_bar("map", delay=0.5)
    with bars[0] as images, bars[1] as fits, bars[2] as maps:

        def begin_maps(count: int, of_images: int) -> None:
            note(f"{count:,} maps of {of_images:,} images to make by {options.explain}")
            maps.reset(count)

        return run.evaluate(
            task, lambda: _model(args, recorded), args.data, args.output, options,
            args.embeddings, lambda progress: images.update(progress.rows), images.reset,
            fits.update, begin_maps, maps.update,
        )  # fmt: skip


def _model(args: argparse.Namespace, recorded: str | None):
    model = load(args, local_mesh(), recorded)
    if model.config.classifier and args.prompts:
        raise ValueError("the model is a classifier, which scores without prompts: no --prompts")
    reading.prepared(args, reading.dicom_rules(args), model.config)  # says what is unlike training
    return model


def _unit(args: argparse.Namespace):
    from medsiglip_jax.evaluate.units import Unit

    if args.aggregate and args.per is None:
        raise ValueError("--aggregate combines the scores of images, and needs --per")
    return None if args.per is None else Unit(args.per, args.aggregate or "mean")


def _options(args: argparse.Namespace):
    from medsiglip_jax.data.labels import parse_policies
    from medsiglip_jax.evaluate.options import Draws, EvaluateOptions

    sizes = None if args.sizes is None else tuple(args.sizes)
    asked = {"sizes": sizes, "seeds": args.seeds}
    draws = {name: value for name, value in asked.items() if value is not None}
    if draws and args.learn != "probe":
        raise ValueError("--sizes and --seeds are of learning curves: they need --learn")
    as_given = (
        "preprocess", "score", "reading", "temperature", "over_prompts", "allow_missing",
        "allow_leaks", "seed", "grid", "prevalence", "export",
    )  # fmt: skip
    policies = parse_policies(args.uncertain, args.blank)
    return EvaluateOptions(
        **{name: getattr(args, name) for name in as_given},
        prefer=args.prefer or "",
        policy=policies.pop(""),
        part_policies=policies,
        resamples=EvaluateOptions.resamples if args.resamples is None else args.resamples,
        batch_size=batch_size(args),
        learn=args.learn or "",
        draws=Draws(**draws),
        dicom=reading.dicom_rules(args),
        asked=frozenset(reading.asked(args)),
        by=tuple(args.by or ()),
        unit=_unit(args),
        explain=args.explain or "",
        explain_images=args.explain_images,
    )


def _list(args: argparse.Namespace) -> int:
    from medsiglip_jax.evaluate import tasks

    content = [task.to_dict() for task in tasks.library()]
    show(content, args.json, lambda tasks: "\n".join(map(_task, tasks)))
    return 0


def _task(task: dict[str, Any]) -> str:
    lines = [f"{task['name']}: {task['title']}"]
    for key in ("source", "access", "trained_on", "prompts_source"):
        if task[key]:
            lines.append(f"    {key.replace('_', ' ')}: {task[key]}")
    if task["regions"]:
        lines.append(f"    regions: {' or '.join(task['regions']['file'])}")
    return "\n".join(lines)


def _text(output: str, results: dict[str, Any]) -> str:
    from medsiglip_jax.evaluate.report import localization
    from medsiglip_jax.evaluate.report.sections import classes, recalls
    from medsiglip_jax.evaluate.report.tables import judged, number

    macro, images = results["macro_auc"], f"{results['images']:,} {judged(results)}"
    head = f"macro AUC {number(macro['auc'])}, {images}" if macro else images
    sections = filter(None, (classes(results), recalls(results), localization.section(results)))
    lines = [line for section in sections for line in table(section.header, section.rows)]
    return "\n".join(
        [f"{results['title']}: {head}", *lines, *_learned(results), f"{output}/report.html"]
    )


def _learned(results: dict[str, Any]) -> list[str]:
    from medsiglip_jax.evaluate.report.learning import probe_line

    probe, held_out = results["probe"], results["held_out"]
    lines = [f"linear probe: {probe_line(probe)}"] if probe else []
    if held_out:
        validation, test = (held_out[part]["images"] for part in ("validation", "test"))
        lines.append(
            f"thresholds and calibration: chosen on {validation:,} validation images, judged on "
            f"{test:,} test images; see the report"
        )
    return lines
