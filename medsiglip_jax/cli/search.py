"""search: hits, near duplicates, and the approximate index."""

import argparse
from collections import Counter
from typing import Any

from medsiglip_jax.cli import outputs
from medsiglip_jax.cli.loading import ADDED, add_model, load
from medsiglip_jax.cli.output import note, progress_bar, show
from medsiglip_jax.cli.parser import REPEATED, REQUIRED, VECTORS, Parser, add_flags, refuse_unused
from medsiglip_jax.cli.reading import QUERIES, add_queries, note_skipped, prepared, queries

# Flags without effect on each kind of search.
_UNUSED = {
    "in a search for near duplicates": (
        "text", "image", "top_k", "sheet", "build_index", "approximate", *ADDED, *QUERIES),
    "with --build-index": (
        "text", "image", "top_k", "sheet", "approximate", "threshold", "limit", "output", *ADDED,
        *QUERIES),
    "in a search by image": ("threshold", "limit"),
    "in a search by text": ("threshold", "limit", *QUERIES),
}  # fmt: skip


_FLAGS = {
    "--embeddings E": VECTORS,
    "--text Q": "a text to search for; repeat for several",
    "--image F": "an image to search by; repeat for several",
    "--top-k K": "number of hits, default 10",
    "--kind": "which embeddings to search, default %(default)s",
    "--sheet FILE": "draw the hits on a page, .html or .png",
    "--output FILE": "also write the hits or pairs, to a .csv or .parquet file",
}
_WHICH_PAIRS = {
    "--self": "list pairs of near duplicates among the embeddings",
    "--against E": "list pairs with the embeddings in E: test and train",
}
_PAIRS = {
    "--threshold S": "minimum cosine of a pair, default 0.98",
    "--limit N": "list the N nearest pairs, default 100000",
}
_APPROXIMATE = {
    "--build-index": "write index.usearch into the folder of --embeddings and report its recall",
    "--approximate": "search through the index",
}


def define_flags(sub: Parser) -> None:
    kind = {"default": "image", "choices": ("image", "text", "any")}
    add_flags(sub, _FLAGS, embeddings=REQUIRED, text=REPEATED, image=REPEATED, top_k=int, kind=kind)
    pairs = sub.add_argument_group("near duplicates (no model needed)")
    add_flags(pairs.add_mutually_exclusive_group(), _WHICH_PAIRS)
    add_flags(pairs, _PAIRS, threshold=float, limit=int)
    title = "approximate search (pip install 'medsiglip-jax[index]')"
    add_flags(sub.add_argument_group(title), _APPROXIMATE)
    add_queries(sub)
    add_model(sub, required=False)
    hits, pairs = "query,rank,id,source,score", "id,source,other_id,other_source,score"
    own = outputs.is_table_of(hits, pairs)
    outputs.add_overwrite(sub, sheet=outputs.is_picture, output=own)


def search(args: argparse.Namespace) -> int:
    """Find images by text or image, and near duplicates, in embeddings. Searches
    exactly, in one pass over the files and little memory. The score is the cosine.
    Query images are prepared as the embedded ones were.

    example:
      medsiglip-jax search --embeddings embeddings --model google/medsiglip-448
        --text "a chest X-ray with pneumonia" --image case.png --top-k 5 --sheet hits.html
      medsiglip-jax search --embeddings test --against train --threshold 0.98
    """
    if args.self or args.against:
        run, where = _pairs, "in a search for near duplicates"
    elif args.build_index:
        run, where = _build_index, "with --build-index"
    else:
        run, where = _hits, "in a search by image" if args.image else "in a search by text"
    refuse_unused(args, where, _UNUSED[where])
    return run(args)


def _hits(args: argparse.Namespace) -> int:
    from medsiglip_jax.data import expansion
    from medsiglip_jax.embeddings import output
    from medsiglip_jax.embeddings.search import search, write_hits
    from medsiglip_jax.files import places
    from medsiglip_jax.inference.manifest import UNKNOWN
    from medsiglip_jax.pages import contact_sheet

    if not (args.text or args.image) or not args.model:
        raise ValueError(
            "expected --model with --text or --image, or one of --self, --against, --build-index"
        )
    if args.sheet:
        places.check_suffix(args.sheet, *contact_sheet.SUFFIXES)
    if args.output:
        places.check_suffix(args.output, *output.SUFFIXES)
    with progress_bar("row") as bar:
        embeddings = _opened(args, bar)
        recorded = embeddings.manifest.dicom_rules
        dicom, parts = queries(args, recorded, args.image or [])
        skipped: Counter[str] = Counter()
        images = expansion.names(args.image or [], parts, all_files=args.all_files, skipped=skipped)
        model = load(args, recorded=embeddings.manifest.dtype)
        if images and embeddings.manifest.preprocess == UNKNOWN:
            dicom = prepared(args, dicom, model.config).dicom
        results = search(
            model, embeddings, args.text or [], images,
            10 if args.top_k is None else args.top_k,
            approximate=args.approximate, batch_size=args.batch_size, dicom=dicom,
        )  # fmt: skip
    _note_left_out(args.embeddings, results[0]["left_out"])
    if args.sheet:
        contact_sheet.write(args.sheet, results, images, recorded, dicom)
    if args.output:
        write_hits(args.output, results)
    show(results, args.json, _text)
    note_skipped(skipped, args)
    return 0


def _text(results: list[dict[str, Any]]) -> str:
    from medsiglip_jax.preprocess.facts import describe

    lines = []
    for result in results:
        lines += [describe(result["query"]), f"  {'score':>7}  id"]
        lines += [f"  {hit['score']:7.4f}  {describe(hit['id'])}" for hit in result["hits"]]
    return "\n".join(lines)


def _pairs(args: argparse.Namespace) -> int:
    from medsiglip_jax.embeddings import output
    from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
    from medsiglip_jax.embeddings.search import duplicates, write_pairs
    from medsiglip_jax.files import places

    if args.output:
        places.check_suffix(args.output, *output.SUFFIXES)
    threshold = 0.98 if args.threshold is None else args.threshold
    limit = 100_000 if args.limit is None else args.limit
    first = open_embeddings(args.embeddings, args.kind)
    second = open_embeddings(args.against, args.kind) if args.against else None
    pairs = len(first) * (len(second) if second else (len(first) + 1) / 2)
    with progress_bar("pair", pairs) as bar:
        result = duplicates(first, threshold, second, limit, bar.update)
    if args.output:
        write_pairs(args.output, result["pairs"])
    show(result, args.json, _pairs_text)
    _note_left_out(args.embeddings, result["left_out"])
    if args.against:
        _note_left_out(args.against, result["other_left_out"])
    if result["cut"]:
        note(f"there are more pairs; these are the {limit} nearest (--limit)")
    return 0


def _pairs_text(result: dict[str, Any]) -> str:
    from medsiglip_jax.preprocess.facts import describe

    lines = [
        f"{p['score']:7.4f}  {describe(p['id'])}  {describe(p['other_id'])}"
        for p in result["pairs"]
    ]
    return "\n".join([*lines, f"pairs: {len(lines)}, groups of connected rows: {result['groups']}"])


def _build_index(args: argparse.Namespace) -> int:
    from medsiglip_jax.embeddings.index import build

    with progress_bar("row") as bar:
        facts = build(_opened(args, bar, passes=2))
    _note_left_out(args.embeddings, facts["left_out"])
    show(facts, args.json, lambda f: (
        f"{args.embeddings}: {f['rows']} rows indexed, recall@10 {f['recall_at_10']:.3f} "
        f"against exact search ({f['sampled']} sampled rows)"
    ))  # fmt: skip
    return 0


def _note_left_out(folder: str, left_out: dict[str, Any]) -> None:
    """Says so if some rows have no cosine with anything."""
    from medsiglip_jax.embeddings.store import NO_DIRECTION
    from medsiglip_jax.preprocess.facts import describe

    if count := left_out["rows"]:
        first = left_out["first"][0]
        note(
            f"{folder}: left out {count} embeddings that are {NO_DIRECTION}, the first of "
            f"{describe(first['id'])} in {first['file']}"
        )


def _opened(args: argparse.Namespace, bar, passes: int = 1):
    from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings

    embeddings = open_embeddings(args.embeddings, args.kind, bar.update)
    bar.total = passes * len(embeddings)
    return embeddings
