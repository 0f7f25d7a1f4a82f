"""classify: images against texts, zero-shot, and heatmaps of slides."""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from medsiglip_jax.cli import abstaining, loading, output, outputs, parser, reading

_FLAGS = {
    "images IMAGE...": "image files, or parts of them: FILE#frame=N, SLIDE#tile=X,Y,LEVEL,SIZE",
    "--text T": "a text to score the images against; repeat for several",
    "--labels": "score with the labels of a model that finetune --config classification trained, "
    "instead of texts",
    "--heatmap OUT.png": "score the tiles of one slide (at --mpp, default 0.5) against the first "
    "text, draw the scores over the slide, and write them to OUT.parquet",
}


def define_flags(sub: parser.Parser) -> None:
    parser.add_flags(sub, _FLAGS, text=parser.REPEATED)
    loading.add_model(sub)
    reading.add_preprocess(sub)
    reading.add_parts(sub)
    abstaining.add_abstention(sub, unsure=True)
    outputs.add_overwrite(sub, heatmap=outputs.is_heatmap)


def classify(args: argparse.Namespace) -> int:
    """Score images against texts, zero-shot, or with the labels of a fine-tuned classifier.

    logit    exp(t) * cos(image, text) + b, what the model was trained on
    sigmoid  the model's probability that this text belongs to this image, for each text on
             its own; often tiny for every text, because almost all pairs in training were
             mismatched: compare it between texts, or calibrate it on your own data
    softmax  the same logits as shares of the given texts, which sum to 100%: the answer
             to 'which of these fits best', even when none fits

    With --labels: the logit and the probability of each label, and whether it reaches
    the threshold that was chosen on the validation rows of the training. With
    --reference images unlike the known ones get no_assist and a reason, no scores.

    example:
      medsiglip-jax classify --model google/medsiglip-448 --text "a chest X-ray with pneumonia"
        --text "a normal chest X-ray" scan1.png scan2.jpg
      medsiglip-jax classify --model run/export --labels scan1.png
    """
    from medsiglip_jax.data import expansion
    from medsiglip_jax.embeddings import provenance
    from medsiglip_jax.inference import classifier
    from medsiglip_jax.inference.classify import classify as run

    if bool(args.text) == args.labels:
        raise ValueError("expected either --text, once for each text, or --labels")
    if args.heatmap is not None:
        return _heatmap(args)
    if args.text:
        parser.refuse_unused(args, "with --text, whose scores are not calibrated,", ("unsure",))
    rules, parts = reading.rules_and_parts(args)
    known = abstaining.known_images(args)
    skipped: Counter[str] = Counter()
    images = reading.listed(
        lambda on_file: expansion.names(args.images, parts, on_file, args.all_files, skipped)
    )
    expansion.warn_of_unused(rules, images)
    model = loading.load(args)
    preparation = reading.prepared(args, rules, model.config)
    with output.progress_bar("image", len(images)) as bar:
        options = preparation.preprocess, args.batch_size, bar.update, preparation.dicom
        encoder = model.features if args.labels else model  # or an error: there are no labels
        made = encoder, preparation.preprocess, not args.labels, preparation.dicom
        judge = abstaining.abstention(args, known, lambda: provenance.of_model(*made))
        if args.labels:
            results = classifier.classify_labels(model, images, *options, abstention=judge)
        else:
            results = run(model, images, args.text, *options, judge)
    lines = _labels if args.labels else _logits
    output.show(results, args.json, lambda r: output.scored(r, lines))
    reading.note_skipped(skipped, args)
    return 3 if any("error" in result for result in results) else 0


def _logits(scores: list[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'softmax':>8}  {'sigmoid':>10}  {'logit':>9}  text"
    for score in sorted(scores, key=lambda s: -s["logit"]):
        numbers = f"{score['softmax']:8.1%}  {score['sigmoid']:10.3g}  {score['logit']:9.3f}"
        yield f"  {numbers}  {score['text']}"


def _labels(scores: list[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'probability':>11}  {'logit':>9}  {'':8}  label"
    for score in sorted(scores, key=lambda s: -s["logit"]):
        mark = "positive" if score["positive"] else ""
        numbers = f"{score['probability']:11.2%}  {score['logit']:9.3f}"
        yield f"  {numbers}  {mark:8}  {' '.join(score['label'].split())}"


def _heatmap(args: argparse.Namespace) -> int:
    from medsiglip_jax.files import places
    from medsiglip_jax.inference import heatmap
    from medsiglip_jax.preprocess.parts import Parts

    unused = *reading.DICOM, "series", "labels", "all_files", "reference", "abstain_at", "unsure"
    parser.refuse_unused(args, "with --heatmap", unused)
    parts = Parts(mpp=args.mpp, slide_mpp=args.slide_mpp, tissue=args.tissue)
    if len(args.images) != 1:
        raise ValueError(f"--heatmap draws over one slide; got {len(args.images)}")
    places.check_suffix(args.heatmap, ".png")
    rows = heatmap.tiles(args.images[0], parts)
    model = loading.load(args, loading.local_mesh())
    preparation = reading.prepared(args, None, model.config)
    with output.progress_bar("tile", len(rows)) as bar:
        result = heatmap.heatmap(
            model, args.images[0], rows, args.text, args.heatmap, preparation.preprocess,
            args.batch_size, bar.update,
        )  # fmt: skip
    output.show(result, args.json, _heatmap_text)
    return 3 if result["errors"] else 0


def _heatmap_text(result: dict[str, Any]) -> str:
    best = sorted(result["tiles"], key=lambda tile: -tile["score"])[:5]
    lines = [
        f"{result['picture']}, {result['table']}: {len(result['tiles']):,} tiles",
        f"  {result['score']:>8}  tile, for {result['texts'][0]}",
    ]
    lines += [
        f"  {tile['score']:8.3g}  {result['slide']}#tile="
        f"{tile['x']},{tile['y']},{tile['level']},{tile['size']}"
        for tile in best
    ]
    unreadable = [f"  unreadable: {e['source']}: {e['reason']}" for e in result["errors"]]
    return "\n".join(lines + unreadable)
