"""quickstart, info, convert, classify."""

import argparse
from typing import Any

from medsiglip_jax.cli.common import (
    DICOM,
    add_batch_size,
    add_json,
    add_model,
    add_parts,
    add_preprocess,
    command,
    load,
    local_mesh,
    progress_bar,
    refuse_idle,
    rules_and_parts,
    show,
)


def add(commands) -> None:
    _add_quickstart(commands)
    _add_info(commands)
    _add_convert(commands)
    _add_classify(commands)


def quickstart(args: argparse.Namespace) -> int:
    from medsiglip_jax.train.quickstart import run

    result = run(args.workdir, seed=args.seed)
    show(result, args.json, _quickstart_text)
    return 0


def _quickstart_text(result: dict[str, Any]) -> str:
    return f"""\
held-out accuracy  {result["held_out_accuracy"]:.4f}   (1.0 is perfect, chance is 0.1)
macro AUC          {result["macro_auc"]:.4f}
model              {result["model"]}
picture            {result["picture"]}
seconds            {result["seconds"]:.1f}

Next, with the real weights (accept the terms at https://huggingface.co/google/medsiglip-448,
then `hf auth login`):
  medsiglip-jax classify --model google/medsiglip-448 \\
    --text "a chest X-ray with pneumonia" --text "a normal chest X-ray" YOUR_IMAGE.png"""


def _add_quickstart(commands) -> None:
    sub = command(
        commands, quickstart, "train, save, load and evaluate a small model on real digits",
        "medsiglip-jax quickstart --workdir quickstart",
        "The whole loop on CPU in about a minute, no download.",
    )  # fmt: skip
    sub.add_argument("--workdir", default="quickstart", metavar="D", help="default ./quickstart")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    add_json(sub)


def info(args: argparse.Namespace) -> int:
    from medsiglip_jax.model.api import describe

    show(describe(args.source), args.json, _info_text)
    return 0


def _info_text(content: dict[str, Any]) -> str:
    lines = [
        f"source      {content['source']}",
        f"format      {content['format']}",
        f"parameters  {content['parameters']:,}",
        f"dtype       {content['dtype']}",
        f"sha256      {content['sha256']}",
        f"tokenizer   {content['tokenizer'] or 'none beside the weights; pass --tokenizer'}",
    ]
    for tower, fields in content["config"].items():
        text = ", ".join(f"{k} {v}" for k, v in fields.items()) if fields else "none"
        lines.append(f"{tower:<11} {text}")
    lines += [
        f"contains    {top}: {size:,} parameters" for top, size in content["contains"].items()
    ]
    return "\n".join(lines + [f"note        {note}" for note in content["notes"]])


def _add_info(commands) -> None:
    sub = command(
        commands, info, "show what a checkpoint holds, without loading it",
        "medsiglip-jax info google/medsiglip-448 --json",
    )  # fmt: skip
    sub.add_argument("source", metavar="SRC", help="folder, .npz or Hugging Face repo id")
    add_json(sub)


def convert(args: argparse.Namespace) -> int:
    from medsiglip_jax.files import places
    from medsiglip_jax.model import api
    from medsiglip_jax.model.weights import layouts
    from medsiglip_jax.model.weights.positions import resize_positions

    places.check_new(places.at(args.destination))
    stored = layouts.open_checkpoint(args.source).dtype
    dtype = args.dtype or (stored if stored in layouts.DTYPES else "float32")
    model = api.load(args.source, dtype=dtype, tokenizer=args.tokenizer)
    if args.resolution is not None:
        model.params, model.config = resize_positions(model.params, model.config, args.resolution)
    api.save(model, args.destination, format=args.format)
    print(f"{args.destination}: {args.format}, {dtype}, {api.tree.size(model.params):,} parameters")
    return 0


def _add_convert(commands) -> None:
    sub = command(
        commands, convert, "rewrite a checkpoint in another format, dtype or resolution",
        "medsiglip-jax convert google/medsiglip-448 medsiglip-bf16 --format orbax --dtype bfloat16",
    )  # fmt: skip
    sub.add_argument("source", metavar="SRC", help="folder, .npz or Hugging Face repo id")
    sub.add_argument("destination", metavar="DST", help="new folder (big_vision: also a new .npz)")
    sub.add_argument(
        "--format", required=True, choices=("huggingface", "orbax", "big_vision"), help="of DST"
    )
    sub.add_argument(
        "--resolution", type=int, metavar="N",
        help="new image size in pixels; position embeddings are resampled as big_vision does: "
        "bilinear, aligned corners, no antialias (scipy.ndimage.zoom of order 1)",
    )  # fmt: skip
    sub.add_argument("--dtype", metavar="T", help="default: as stored")
    sub.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model to put into DST")


def classify(args: argparse.Namespace) -> int:
    from medsiglip_jax.data import expansion
    from medsiglip_jax.inference.classify import classify as run

    if args.heatmap is not None:
        return _heatmap(args)
    rules, parts = rules_and_parts(args)
    with progress_bar("file", delay=2.0) as files:
        images = expansion.names(args.images, parts, files.update)
    model = load(args)
    with progress_bar("image") as bar:
        bar.total = len(images)
        results = run(model, images, args.text, args.preprocess, args.batch_size, bar.update, rules)
    show(results, args.json, _classify_text)
    return 3 if any("error" in result for result in results) else 0


def _heatmap(args: argparse.Namespace) -> int:
    from medsiglip_jax.inference import heatmap
    from medsiglip_jax.preprocess.parts import Parts

    refuse_idle(args, "--heatmap", (*DICOM, "series"))
    parts = Parts(mpp=args.mpp, slide_mpp=args.slide_mpp, tissue=args.tissue)
    if len(args.images) != 1:
        raise ValueError(f"--heatmap draws over one slide; {len(args.images)} are given")
    heatmap.check(args.heatmap)
    rows = heatmap.tiles(args.images[0], parts)
    model = load(args, local_mesh())
    with progress_bar("tile") as bar:
        bar.total = len(rows)
        result = heatmap.heatmap(
            model, args.images[0], rows, args.text, args.heatmap, args.preprocess,
            args.batch_size, bar.update,
        )  # fmt: skip
    show(result, args.json, _heatmap_text)
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


def _classify_text(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        lines.append(result["image"])
        if "error" in result:
            lines.append(f"  unreadable: {result['error']}")
            continue
        lines.append(f"  {'softmax':>8}  {'sigmoid':>10}  {'logit':>9}  text")
        for score in sorted(result["scores"], key=lambda s: -s["logit"]):
            lines.append(
                f"  {score['softmax']:8.1%}  {score['sigmoid']:10.3g}  {score['logit']:9.3f}  "
                f"{score['text']}"
            )
    return "\n".join(lines)


def _add_classify(commands) -> None:
    sub = command(
        commands, classify, "score images against texts, zero-shot",
        'medsiglip-jax classify --model google/medsiglip-448 --text "a chest X-ray with '
        'pneumonia"\n    --text "a normal chest X-ray" scan1.png scan2.jpg',
        "\n\nlogit    exp(t) * cos(image, text) + b, what the model was trained on"
        "\nsigmoid  the model's probability that this text belongs to this image, each text by"
        "\n         itself; often tiny for every text, because almost all pairs in training were"
        "\n         mismatched: compare it between texts, or calibrate it on your own data"
        "\nsoftmax  the same logits as shares of the texts given, which sum to 100%: the answer"
        "\n         to 'which of these fits best', also when none fits",
    )  # fmt: skip
    sub.add_argument(
        "images", nargs="+", metavar="IMAGE",
        help="image files, or parts of them: FILE#frame=N, SLIDE#tile=X,Y,LEVEL,SIZE",
    )  # fmt: skip
    sub.add_argument(
        "--text", action="append", required=True, metavar="T", help="repeat for each text"
    )
    sub.add_argument(
        "--heatmap", metavar="OUT.png",
        help="draw how tiles of one slide score for the first text (at --mpp, default 0.5) over "
        "it, and write the scores to OUT.parquet",
    )  # fmt: skip
    add_model(sub)
    add_batch_size(sub)
    add_preprocess(sub)
    add_parts(sub)
    add_json(sub)
