"""explain: which parts of an image a score comes from."""

import argparse
from collections import Counter
from typing import Any

from medsiglip_jax.cli import loading, output, outputs, parser, reading

_FLAGS = {
    "images IMAGE...": "image files, or parts of them: FILE#frame=N, SLIDE#tile=X,Y,LEVEL,SIZE",
    "--text T": "explain the logit of this text; repeat for several",
    "--contrast T": "explain how far the logit of each text is above that of this one",
    "--probe P": "explain a label of this probe, which probe fit wrote, instead of texts",
    "--label L": "which label of the probe; without --probe, of the classifier that finetune "
    "--config classification trained",
    "--method M": "ig (default), integrated gradients; occlusion; or rollout, where the model "
    "looks, whatever the text",
    "--output DIR": "new folder for maps (.npz), pictures (.png), explain.html and explain.json; "
    "one that explain wrote is replaced",
    "--steps N": "steps of ig, spread evenly; by default as many as the map needs to sum to the "
    "logit's difference from mid-grey within 1 %%",
    "--max-steps N": "the most that are tried, default %(default)s",
    "--fill F": "what replaces parts of the image when a map is measured: mean (default), its mean "
    "colour, or blur",
}


def define_flags(sub: parser.Parser) -> None:
    values = {"method": "ig", "steps": int, "max_steps": 64, "fill": "mean"}
    parser.add_flags(sub, _FLAGS, text=parser.REPEATED, output=parser.REQUIRED, **values)
    loading.add_model(sub)
    reading.add_preprocess(sub, own="the probe's or the model's")
    reading.add_parts(sub)
    outputs.add_overwrite(sub)


def explain(args: argparse.Namespace) -> int:
    """Show which parts of an image a score comes from, and how good that answer is.
    Every map is measured: the cells that it ranks highest are inserted into an
    empty image, and deleted from the image. The area between the two curves of the
    logit stands beside that of random maps which are as smooth, and a map that is
    not better than all four of these is drawn grey; one in five of maps without any
    meaning is better by chance.

    ig         integrated gradients of the logit, from mid-grey to the image
    occlusion  what the logit loses when squares of two sizes turn mid-grey; 274
               passes of the image tower
    rollout    where the model looks, whatever the text: no explanation of a text

    An ig that needs 16 steps takes about as long as 120 passes, and measuring any
    map 92.

    example:
      medsiglip-jax explain --model google/medsiglip-448 --text "a chest X-ray with pneumonia"
        --contrast "a normal chest X-ray" --output why scan1.png scan2.dcm
    """
    from medsiglip_jax.data import expansion
    from medsiglip_jax.embeddings.probe import linear
    from medsiglip_jax.files import places
    from medsiglip_jax.preprocess.dicom.rules import from_dict
    from medsiglip_jax.trust import explanation, explanation_run

    if args.method != "ig":
        parser.refuse_unused(args, f"with --method {args.method}", ("steps", "max_steps"))
    elif args.steps:
        parser.refuse_unused(args, "with --steps", ("max_steps",))
    rules, parts = reading.rules_and_parts(args)
    options = explanation.ExplainOptions(
        args.method, args.steps, args.max_steps, args.fill, batch_size=args.batch_size
    )
    skipped: Counter[str] = Counter()
    images = reading.listed(
        lambda on_file: expansion.names(args.images, parts, on_file, args.all_files, skipped)
    )
    expansion.warn_of_unused(rules, images)
    explanation_run.check_folder(places.at(args.output), images, args.overwrite)
    probe = linear.open_probe(args.probe) if args.probe else None
    model = loading.load(args)
    asked = args.text or [], args.contrast, probe, args.label, args.preprocess
    targets = explanation.targets_of(model, *asked)
    preset = args.preprocess
    if probe:
        rules = rules.as_trained(from_dict(probe.provenance.dicom), reading.asked(args))
    else:
        preparation = reading.prepared(args, rules, model.config)
        preset, rules = preparation.preprocess, preparation.dicom
    rules = explanation.rules_of(model, probe, rules)
    explainer = explanation.Explainer(targets, preset, options)
    with output.progress_bar("image", len(images)) as bar:
        result = explanation_run.run(
            explainer, images, args.output, rules, args.overwrite, bar.update
        )
    output.show(result, args.json, lambda r: _text(r, args.output))
    reading.note_skipped(skipped, args)
    return 3 if any("error" in image for image in result["images"]) else 0


def _text(result: dict[str, Any], folder: str) -> str:
    from medsiglip_jax.preprocess.facts import describe

    lines = [f"{'logit':>9}  {'ins-del':>7}  {'random':>7}  map"]
    for image in result["images"]:
        if "error" in image:
            lines.append(f"{describe(image['image'])}\n  unreadable: {image['error']}")
            continue
        numbers = (image["score"], image["insertion_minus_deletion"], image["random"])
        score, own, random = (f"{number:.3f}" for number in numbers)
        grey = "" if image["better_than_random"] else ", grey: not better than random maps"
        text = " ".join(image["text"].split())
        lines.append(f"{score:>9}  {own:>7}  {random:>7}  {image['overlay']}, for {text}{grey}")
    return "\n".join([*lines, f"{folder}: explain.html shows all of them"])
