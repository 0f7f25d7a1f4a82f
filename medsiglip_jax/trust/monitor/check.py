"""`monitor check`: windows of an embedding run against a reference."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import numpy as np
from jaxtyping import Int64

from medsiglip_jax import __version__, metrics
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.inference.abstain import conformal_quantile
from medsiglip_jax.trust.monitor import control, gaussian, samples, scores
from medsiglip_jax.trust.monitor.control import Control
from medsiglip_jax.trust.monitor.images import Given, Images, read
from medsiglip_jax.trust.monitor.reference import Reference
from medsiglip_jax.trust.monitor.scores import Scored
from medsiglip_jax.trust.monitor.thresholds import Measured, draws_needed, judge
from medsiglip_jax.trust.monitor.windows import FEWEST, Window, cut

_UNUSUAL = 24  # images that are named
_KNOWN = 0.99  # share of images in control that count as known, in descriptions


def check(
    reference: Reference,
    embeddings: Embeddings,
    given: Given = Given(),
    *,
    size: int | timedelta | None = None,
    level: float = 0.05,
    seed: int = 0,
    on_window: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Compares the images of a run with a reference.

    Args:
        reference: images in control.
        embeddings: new ones, of kind image.
        given: tables about them, with the columns of the reference.
        size: the size of windows, see `windows.cut`; None is one window of all images.
        level: the probability, in (0, 1), with which a window in control alarms in any of its
            tests at most.
        seed: the seed of the windows in control that are drawn.
        on_window: called after each window, for progress.

    Returns:
        The content of monitor.json: "alarm"; "windows", each with "strata": stratum -> test ->
        `{"statistic", "p", "threshold", "alarm"}`; "window" and "strata" of the last that was
        tested; "unusual" images; "notes" on what was not tested.

    Raises:
        ValueError: the run was made differently, or the reference is too small for the windows.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected more than 0 and less than 1, such as 0.05")
    reference.provenance.check(provenance.of_run(embeddings.manifest), embeddings.folder)
    if embeddings.digest == reference.facts.get("embeddings"):
        raise ValueError(
            f"{embeddings.folder}: the reference was made of these embeddings; expected new ones"
        )
    images = read(embeddings, given)
    run, cutting = Comparison(reference, images, level, seed), cut(len(images), size, images.times)
    run.check_sizes(cutting)
    if left := len(images) - sum(len(window.rows) for window in cutting):
        run.notes.append(f"the last {left:,} images are too few for a window; not tested")
    files, windows = run.unreadable(embeddings), []
    if len(cutting) > 1:  # which window an unreadable file belongs to is not known
        whole = Window("whole run", np.arange(len(images)))
        windows.append(run.verdict(whole, {"all": {"unreadable": files}}))
    for window in cutting:
        # Judged at once, since windows in control take megabytes for each window and stratum.
        measured = run.measure(window)
        if len(cutting) == 1:
            measured["all"]["unreadable"] = files
        windows.append(run.verdict(window, measured))
        on_window()
    last = next((window for window in windows[::-1] if window["strata"]), windows[-1])
    return {
        "alarm": any(window["alarm"] for window in windows), "level": level,
        "embeddings": str(embeddings.folder), "images": len(images),
        "window": last["name"], "strata": last["strata"], "rows": last["rows"], "windows": windows,
        "unusual": run.unusual(embeddings), "notes": run.notes,
        "reference": {**reference.facts, "source": reference.provenance.source,
                      "sha256": reference.provenance.model},
        "version": __version__,
    }  # fmt: skip


class Comparison:
    """New images beside a reference.

    Attributes:
        notes: what was not tested, and why.
    """

    def __init__(self, reference: Reference, images: Images, level: float, seed: int):
        self.reference, self.images, self.level, self._seed = reference, images, level, seed
        self.new, self.notes = scores.of_images(reference, images), []
        before = scores.of_reference(reference)
        if before.labels is None and self.new.labels is not None:
            self.notes.append("labels are described, not tested: the reference has none (--labels)")
        if _all_different(reference.groups) and not _all_different(images.groups):
            self.notes.append(
                "the reference knows no patients and these images do (--group), so that thresholds "
                "take images of one patient for independent ones"
            )
        self._labels_compared = before.labels is not None and self.new.labels is not None
        self._strata = {}
        for name, column, value, rows in reference.strata():
            if name == "all" or len(rows) >= 2 * FEWEST:
                self._strata[name] = column, value, Control(reference, before, rows, seed)
            else:
                self.notes.append(f"{name}: {len(rows):,} images of the reference are too few")
        self._draws = draws_needed(12 * len(self._strata), level)

    def check_sizes(self, windows: list[Window]) -> None:
        """Raises a ValueError if the reference cannot tell what windows so large look like."""
        largest, most = max(len(w.rows) for w in windows), len(self.reference) // 2
        if largest > most:
            raise ValueError(
                f"a window of {largest:,} images against a reference of {len(self.reference):,}: "
                f"expected at most half as many; fit a larger reference, or cut the images into "
                f"windows of at most {most:,} (--window {most})"
            )
        if largest < FEWEST:
            raise ValueError(
                f"the largest window has {largest} images, such as {self.images.ids[0]!r}; "
                f"expected at least {FEWEST}: nothing can be said of fewer"
            )

    def measure(self, window: Window) -> dict[str, dict[str, Measured]]:
        """Stratum -> test -> what was measured."""
        measured: dict[str, dict[str, Measured]] = {}
        for name, (column, value, usual) in self._strata.items():
            rows = self._rows(window, column, value)
            if FEWEST <= len(rows) <= usual.largest:
                measured[name] = self._measure(usual, rows, name == "all")
                if self._labels_compared and "auc" not in measured[name]:
                    self.notes.append(
                        f"{window.name}, {name}: labels are described, not tested: there are fewer "
                        f"than {FEWEST} labelled images, or more than half of the reference's"
                    )
            elif len(rows) >= FEWEST:
                self.notes.append(
                    f"{window.name}, {name}: {len(rows):,} images, and the reference has only "
                    f"{len(usual):,}; not tested"
                )
        if not measured:
            self.notes.append(f"{window.name}: fewer than {FEWEST} images; not tested")
        return measured

    def _measure(self, usual: Control, rows: np.ndarray, metadata: bool) -> dict[str, Measured]:
        images, new = self.images.take(rows), self.new.take(rows)
        if not metadata:  # a stratum is one value of a column; the others are looked at in all
            kept = {n: c for n, c in new.categories.items() if not n.startswith("metadata:")}
            new = replace(new, categories=kept)
        return usual.measure(images.vectors, new, images.groups, self._draws)

    def _rows(self, window: Window, column: str, value: str) -> Int64[np.ndarray, " n"]:
        if not column:
            return window.rows
        cells = self.images.categories[column]
        return np.array([row for row in window.rows.tolist() if cells[row] == value], np.int64)

    def verdict(
        self, window: Window, measured: Mapping[str, Mapping[str, Measured]]
    ) -> dict[str, Any]:
        """One window as JSON: Holm over the tests of all strata, and what is described only."""
        flat = {(s, t): m for s, tests in measured.items() for t, m in tests.items()}
        names = {f"{s}\n{t}": (s, t) for s, t in flat}
        verdicts = judge({key: flat[names[key]] for key in names}, self.level) if flat else {}
        strata: dict[str, dict[str, Any]] = {name: {} for name in measured}
        for key, verdict in verdicts.items():
            stratum, test = names[key]
            strata[stratum][test] = asdict(verdict)
        rows = {name: len(self._rows(window, *self._strata[name][:2])) for name in measured}
        return {
            "name": window.name, "alarm": any(v.alarm for v in verdicts.values()), "rows": rows,
            "strata": strata, "described": self._described(window.rows),
        }  # fmt: skip

    def _described(self, rows: Int64[np.ndarray, " n"]) -> dict[str, Any]:
        """Figures that no threshold goes with."""
        reference, new = self.reference, self.new.take(rows)
        before, now = reference.mahalanobis, new.distances["mahalanobis"]
        figures: dict[str, Any] = {
            "psi": samples.population_stability(before, now),
            "frechet": gaussian.frechet_distance(reference.gaussian, self.images.vectors[rows]),
        }
        if len(reference) >= 1 / (1 - _KNOWN):
            figures["unlike_reference"] = float((now > conformal_quantile(before, _KNOWN)).mean())
        if "disagreement" in new.categories:
            figures["disagreement"] = float(new.categories["disagreement"].mean())
        if new.labels is not None:
            figures["classes"] = self._of_classes(new, self.images.take(rows))
        return figures

    def _of_classes(self, new: Scored, images: Images) -> dict[str, Any]:
        """AUC with its interval, and calibration where scores are probabilities, by class."""
        assert new.labels is not None and new.predicted is not None and images.labels is not None
        figures = {}
        for k, name in enumerate(images.labels.classes):
            rows = np.isfinite(new.labels[:, k])
            score, label = new.predicted[rows, k], new.labels[rows, k]
            area = metrics.delong(score, label, groups=images.groups[rows], student=True)
            figures[name] = {"auc": area.value, "low": area.low, "high": area.high,
                           "positives": int(label.sum()), "labels": len(label)}  # fmt: skip
            if new.calibrated:
                error = metrics.expected_calibration_error(score, label)
                figures[name] |= {"calibration_error": error, "predicted": float(score.mean())}
        return figures

    def unreadable(self, embeddings: Embeddings) -> Measured:
        """Of all files of the run."""
        errors = embeddings.manifest.errors
        now = errors, errors + len(embeddings)
        return control.unreadable(self.reference.unreadable, now, self._draws, self._seed)

    def unusual(self, embeddings: Embeddings) -> list[dict[str, Any]]:
        """The images furthest from the reference, the furthest first."""
        distances = self.new.distances["mahalanobis"]
        order = np.argsort(-distances, kind="stable")[:_UNUSUAL]
        named = embeddings.ids(self.images.rows[order].tolist())
        known = np.sort(self.reference.mahalanobis)
        return [
            {"id": row["id"], "source": row["source"], "distance": float(distances[i]),
             "p": float((1 + (known >= distances[i]).sum()) / (1 + len(known)))}
            for row, i in zip(named, order.tolist(), strict=True)
        ]  # fmt: skip


def _all_different(groups: Int64[np.ndarray, " n"]) -> bool:
    return len(np.unique(groups)) == len(groups)
