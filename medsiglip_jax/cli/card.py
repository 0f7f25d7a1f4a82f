"""card: the model card of a fine-tuned or evaluated model."""

import argparse
import hashlib
from typing import TYPE_CHECKING, Any

from medsiglip_jax.cli import outputs
from medsiglip_jax.cli.output import show
from medsiglip_jax.cli.parser import REQUIRED, Parser, add_flags

if TYPE_CHECKING:
    from medsiglip_jax.evaluate.report.model_card import FineTuned
    from medsiglip_jax.files.places import Place

_FLAGS = {
    "source FOLDER...": "workdir of finetune, output folders of evaluate, or both",
    "--output FILE": "the card, .md",
    "--title NAME": "name of the model; default the name of the first folder",
}
_MARK = "<!-- medsiglip-jax card, sha256 "


def define_flags(sub: Parser) -> None:
    add_flags(sub, _FLAGS, output=REQUIRED)
    outputs.add_overwrite(sub, output=_is_unedited)


def card(args: argparse.Namespace) -> int:
    """Write the model card of a fine-tuned or evaluated model. It has what the runs
    recorded: data, settings, scores with intervals and by subgroup, calibration,
    known failures and hashes. What no run can know, such as the intended use, is
    marked "to be filled in by a person". A card that somebody has edited is only
    replaced with --overwrite.

    example:
      medsiglip-jax card runs/chest runs/chest_test --output card.md
    """
    from medsiglip_jax.evaluate.report import model_card
    from medsiglip_jax.files import places, storage
    from medsiglip_jax.pages.card import TO_FILL

    places.check_suffix(args.output, ".md")
    folders = [places.at(given) for given in args.source]
    runs, evaluations = _read(folders)
    if len(runs) > 1:
        raise ValueError(f"{', '.join(runs)}: several fine-tuning runs; a card is of one model")
    run = next(iter(runs.values()), None)
    if others := model_card.different_weights(run, evaluations):
        raise ValueError(
            f"{', '.join(others)}: evaluated other weights than those of {args.source[0]}; a card "
            "is of one model, so give the evaluations of that"
        )
    title = args.title or _name(folders[0])
    text = model_card.write(title, run, list(evaluations.values()))
    with storage.new_file(places.at(args.output)) as partial:
        partial.write_text(f"{text}\n{_mark(text)}\n", encoding="utf-8")
    result = {"output": args.output, "to_be_filled_in": text.count(TO_FILL)}
    show(result, args.json, _said)
    return 0


def _name(folder: "Place") -> str:
    """The name of a folder, also of "." and ".."."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _said(result: dict[str, Any]) -> str:
    return f"{result['output']}: {result['to_be_filled_in']} fields are to be filled in by a person"


def _read(folders: "list[Place]") -> tuple[dict[str, "FineTuned"], dict[str, dict[str, Any]]]:
    """The fine-tuning runs and the evaluations, by the names of their folders."""
    from medsiglip_jax.evaluate import recompute
    from medsiglip_jax.train import finetune

    runs, evaluations = {}, {}
    for folder in folders:
        if (folder / recompute.RESULTS).is_file():
            evaluations[str(folder)] = _evaluation(folder / recompute.RESULTS)
        elif (folder / finetune.EXPORTED).is_file():
            runs[str(folder)] = _run(folder)
        else:
            raise ValueError(
                f"{folder}: neither an evaluation (no {recompute.RESULTS}) nor a finished "
                f"fine-tuning run (no {finetune.EXPORTED}); give the folder that evaluate or "
                "finetune wrote"
            )
    return runs, evaluations


def _evaluation(path: "Place") -> dict[str, Any]:
    from medsiglip_jax.evaluate.report import model_card
    from medsiglip_jax.files import json
    from medsiglip_jax.files.failures import explained

    problem = "not the results of an evaluation by this version"
    advice = "compute them again with evaluate --from"
    results = json.read(path, problem)
    with explained(path, problem, advice):
        model_card.check(results)
    return results


def _run(folder: "Place") -> "FineTuned":
    from medsiglip_jax.evaluate.report.model_card import FineTuned
    from medsiglip_jax.files import json
    from medsiglip_jax.model.weights import layouts, readme
    from medsiglip_jax.train import finetune

    config, exported = (
        json.read(folder / name, "not what finetune wrote")
        for name in (finetune.CONFIG, finetune.EXPORTED)
    )
    checkpoint = layouts.open_checkpoint(str(folder / finetune.EXPORT))
    classifier = checkpoint.config.classifier
    labels = classifier.labels if classifier else ()
    init = config["recipe"].get("init")
    terms = readme.terms(checkpoint.companions, checkpoint.config, init)
    return FineTuned(config, exported, layouts.digest(checkpoint), labels, terms)


def _mark(text: str) -> str:
    """The last line of a card, which tells whether somebody has edited it."""
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->"


def _is_unedited(path: str) -> bool:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        text, _, end = file.read().rpartition(f"\n{_MARK}")
    return f"{_MARK}{end}" == f"{_mark(text)}\n"
