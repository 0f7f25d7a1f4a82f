"""finetune: training on image-text pairs or labels, and the export of what was learned."""

import argparse
import logging
import os
import sys
import threading
import time
from contextlib import closing, suppress
from typing import Any

from medsiglip_jax.cli import loading, output
from medsiglip_jax.cli.parser import Parser, add_config, add_flags, refuse_unused

_LOOK_SECONDS = 2.0

_FLAGS = {
    "--keys": "list all keys of a config, and do nothing else",
    "--copy-config": "write a recipe to a file of your own, to be edited, and do nothing else",
    "--workdir D": "gets checkpoints/, metrics.jsonl, config.json, export/, report.html, and with "
    "lora adapter/, for PEFT",
    "--export-only": "train no further: write export/ and report.html from the last checkpoint of "
    "the run in D, which needs no --config",
    "--push-to-hub NAME": "upload the export with its model card to the Hugging Face hub as NAME "
    "(user/model), for nobody else to see until you publish it there",
}


def define_flags(sub: Parser) -> None:
    add_config(sub, required=False)
    copy = {"nargs": 2, "metavar": ("NAME", "FILE")}
    add_flags(sub, _FLAGS, copy_config=copy)
    loading.add_processes(sub)


def finetune(args: argparse.Namespace) -> int:
    """Fine-tune on your own image-text pairs or labels. The same command again resumes
    a stopped run; --export-only makes a model of what it has learnt so far.
    --config.KEY=VALUE changes a key of the config. With several hosts, start it on
    each of them with --distributed.

    example:
      medsiglip-jax finetune --config lora --workdir run --config.data.path=train.csv
      medsiglip-jax finetune --copy-config lora my.py
      medsiglip-jax finetune --workdir run --export-only --push-to-hub me/my-model
    """
    from medsiglip_jax.train import configs
    from medsiglip_jax.train import recipe as recipes
    from medsiglip_jax.train.finetune import export_last, run

    if args.keys:
        output.show(recipes.keys(), args.json, lambda _: recipes.describe().rstrip("\n"))
        return 0
    if args.copy_config:
        name, file = args.copy_config
        configs.copy(name, file)
        output.show({"recipe": name, "file": file}, args.json, _copy_text)
        return 0
    recipe = None if _only_export(args) else configs.read(args.config, args.overrides)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates every save
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(name, value)  # else TensorFlow reports how it was built
    if args.push_to_hub:
        _check_push(args)
    if recipe is None:
        output.show(_pushed(args, export_last(args.workdir)), args.json, _text)
        return 0
    main_process = loading.join_other_processes(args, lambda: _resumes(args.workdir))
    with closing(_Training(quiet=not main_process)) as shown:
        result = run(recipe, args.workdir, shown.start, shown.step, shown.warn)
    if main_process:
        output.show(_pushed(args, result), args.json, _text)
    return 3 if result["unreadable"] else 0


def _copy_text(copied: dict[str, str]) -> str:
    command = f"medsiglip-jax finetune --config {copied['file']} --workdir run"
    return f"wrote {copied['file']}; edit it, then: {command}"


def _check_push(args: argparse.Namespace) -> None:
    """Fails now, and not after hours of training."""
    from medsiglip_jax.files import places
    from medsiglip_jax.model.weights import hub

    if not hub.is_repo_id(args.push_to_hub):
        raise ValueError(f"--push-to-hub is {args.push_to_hub!r}; expected user/model")
    places.refuse_remote(args.workdir)
    hub.check_login()


def _pushed(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    from pathlib import Path

    from medsiglip_jax.model.weights import hub

    if not args.push_to_hub:
        return result
    return result | {"hub": hub.push(Path(result["export"]), args.push_to_hub)}


def _only_export(args: argparse.Namespace) -> bool:
    """Whether nothing is to be trained; an error if a flag is missing or has no effect."""
    if args.workdir is None:
        raise ValueError("--workdir is missing")
    if args.export_only:
        where, flags = "with --export-only", ("config", "distributed", "coordinator")
        refuse_unused(args, where, (*flags, "processes", "process_id"))
        if args.overrides:
            raise ValueError(f"{where} these flags have no effect: {', '.join(args.overrides)}")
    elif args.config is None:
        raise ValueError("--config is missing (or --export-only, to export a run that has stopped)")
    return args.export_only


def _resumes(workdir: str) -> str:
    """What the same command does with a run that has been stopped.

    The disk may be what the other process was lost for: it has two seconds, and may fail.
    """
    from medsiglip_jax.files import places
    from medsiglip_jax.train import loop

    found: list[list[int]] = []

    def look() -> None:
        with suppress(Exception):
            found.append(loop.saved_steps(places.at(workdir)))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(_LOOK_SECONDS)
    if not found:
        return "resumes from its last checkpoint"
    saved = max(found[0], default=None)
    return f"resumes from step {saved}" if saved else "starts over: no checkpoint is saved yet"


class _Training:
    """Progress with loss, images/s and time left, and lines that the user should see."""

    def __init__(self, quiet: bool):
        self._quiet, self._bar = quiet, None
        self._batch = self._steps = self._before = 0
        self._clock = 0.0

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, prepared) -> None:
        from medsiglip_jax.model import tree

        if self._quiet:
            return
        loading.note_export(prepared.model)
        trained, total = tree.size(prepared.state["params"]), tree.size(prepared.model.params)
        rows, held_out = (sum(map(len, part)) for part in (prepared.training, prepared.held_out))
        self.warn(
            f"{rows:,} examples, {held_out:,} held out; training {trained:,} of "
            f"{total:,} parameters; the first step compiles"
        )
        self._batch, self._steps = prepared.recipe.batch_size, prepared.recipe.total_steps

    def step(self, done: int, values: dict[str, float] | None) -> None:
        if self._quiet:
            return
        if (bar := self._bar) is None:  # the steps of an earlier run do not count for the speed
            self._before, self._bar = done, output.progress_bar("step", self._steps, initial=done)
            return
        if done == self._before + 1:
            bar.unpause()  # else the time left would count the compilation for every step
            self._clock = time.perf_counter()
        if values:
            shown = {"loss": f"{values['loss']:.3f}"}
            if (steps := done - self._before - 1) > 0:
                rate = steps * self._batch / (time.perf_counter() - self._clock)
                shown["images/s"] = f"{rate:.1f}"
            for name, key in (("exp(t)", "temperature"), ("b", "bias"), ("grad", "grad_norm")):
                if key in values:
                    shown[name] = f"{values[key]:.3g}"
            bar.set_postfix(shown, refresh=False)
        bar.update(done - bar.n)

    def warn(self, line: str) -> None:
        from tqdm import tqdm

        if not self._quiet:
            tqdm.write(line, file=sys.stderr)


def _text(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    shown = {k: v for k, v in metrics.items() if k == "loss" or k.startswith("val_")}
    scores = "\n".join(
        f"{name:18} {'undefined' if value is None else format(float(value), '.4f')}"
        for name, value in shown.items()
    )
    return f"""\
{scores}{_test_text(result.get("test"))}
at step            {result["exported_step"]}
model              {result["export"]}
report             {result["report"]}{_hub_text(result)}"""


def _test_text(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    auc = test["macro_auc"]
    return f"\n{'test macro AUC':18} {'not defined' if auc is None else f'{auc:.4f}'}"


def _hub_text(result: dict[str, Any]) -> str:
    return f"\nuploaded to        {result['hub']}" if "hub" in result else ""
