"""Why an image has its score: maps of the logit of a text, or of a label, on its own pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, UInt8

from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.files import settings
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess import image as presets
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict
from medsiglip_jax.preprocess.facts import describe
from medsiglip_jax.preprocess.load import as_list, decoded, warn_about_pixels
from medsiglip_jax.trust.maps import faithfulness, geometry, gradients, occlusion, rollout, targets
from medsiglip_jax.trust.maps.faithfulness import Faithfulness
from medsiglip_jax.trust.maps.targets import Target
from medsiglip_jax.trust.maps.tower import Tower

METHODS = ("ig", "occlusion", "rollout")


@dataclass(frozen=True)
class ExplainOptions:
    """How maps are made.

    Attributes:
        method: "ig", integrated gradients; "occlusion"; or "rollout", the attention, which does not
            depend on the text and so explains none: it shows where the model looks.
        steps: of integrated gradients, over the whole line from mid-grey to the image, as other
            implementations take them; None takes more where the logit bends more, and doubles them
            from 4 on until the map sums to the difference that it explains within 1 %.
        max_steps: the number of steps at which doubling ends, at least 4.
        fill: what parts of the image are replaced by for the curves of insertion and deletion:
            "mean" (its mean colour) or "blur".
        seed: the seed of the random maps that each map is compared with.
        batch_size: images in each call of the tower; on a CPU often fewer, which is faster there.
    """

    method: Annotated[str, settings.one_of(METHODS)] = "ig"
    steps: Annotated[int | None, settings.at_least(1)] = None
    max_steps: Annotated[int, settings.at_least(gradients.FIRST_STEPS)] = gradients.MAX_STEPS
    fill: Annotated[str, settings.one_of(faithfulness.FILLS)] = "mean"
    seed: Annotated[int, settings.at_least(0)] = 0
    batch_size: Annotated[int, settings.at_least(1)] = 8

    def __post_init__(self):
        settings.verify(self)


@dataclass(frozen=True, eq=False)
class Explanation:
    """A map of one image for one text or label.

    Attributes:
        image: its name.
        text: what the logit belongs to: a text, or a label of a probe or a classifier.
        contrast: the text whose logit was subtracted, or None.
        method: one of `METHODS`.
        map: on the pixels of the original. Of "ig" and "occlusion" logits per pixel, positive where
            a pixel speaks for the text; of "rollout" shares.
        score, baseline_score: the logit of the image, and that of mid-grey.
        steps: gradients of "ig", occluded images of "occlusion", None for "rollout".
        completeness: of "ig", the relative error of the sum of the map, before what lies on padding
            is left out: |sum - (score - baseline_score)| / max(|score - baseline_score|, 0.1). None
            for other methods, whose sums have no such meaning.
        on_padding: the sum of what the map has on the padding of a preset that pads.
        faithfulness: how good the map is, beside random ones.
    """

    image: str
    text: str
    contrast: str | None
    method: str
    map: Float32[np.ndarray, "h w"]
    score: float
    baseline_score: float
    steps: int | None
    completeness: float | None
    on_padding: float
    faithfulness: Faithfulness

    @property
    def insertion_minus_deletion(self) -> float:
        """The area between the two curves, -1 to 1; see `Faithfulness`."""
        return self.faithfulness.insertion_minus_deletion

    @property
    def random(self) -> float:
        """The mean insertion - deletion of the random maps."""
        return self.faithfulness.random

    @property
    def better(self) -> bool:
        """Whether the map is better than all random maps; if not, it should not be believed."""
        return self.faithfulness.better

    @property
    def of_text(self) -> bool:
        """Whether the map depends on the text; a rollout does not."""
        return self.method != "rollout"

    @cached_property
    def record(self) -> dict[str, Any]:
        """What JSON has of it: everything but the map."""
        measured = self.faithfulness
        return {
            "image": self.image, "text": self.text, "contrast": self.contrast,
            "method": self.method, **({} if self.of_text else {"note": rollout.LABEL}),
            "steps": self.steps, "completeness": self.completeness,
            "score": self.score, "baseline_score": self.baseline_score,
            "on_padding": self.on_padding,
            "insertion_minus_deletion": self.insertion_minus_deletion,
            "random": self.random, "random_maps": list(measured.random_maps),
            "better_than_random": self.better,
            "width": self.map.shape[1], "height": self.map.shape[0],
            "curves": {
                "shares": measured.shares.tolist(), "insertion": measured.insertion.tolist(),
                "deletion": measured.deletion.tolist(),
            },
        }  # fmt: skip


class Explainer:
    """Makes the maps of images, for one or several targets of one model.

    Attributes:
        targets: the logits that are explained.
        preprocess: the pixel preset.
        options: see `ExplainOptions`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        preprocess: str | None = None,
        options: ExplainOptions = ExplainOptions(),
    ):
        self.targets, self.options, model = targets, options, targets[0].model
        self.preprocess = preprocess or targets[0].preprocess or model.config.prepared().preprocess
        self._tower = Tower.of(model, options.batch_size)
        assert model.config.vision is not None
        resample = model.config.vision.pixels.resample
        self._resize = presets.preset(self.preprocess, resample)

    def __call__(self, pixels: UInt8[np.ndarray, "h w 3"], name: str) -> list[Explanation]:
        """The maps of one image, one for each target.

        Args:
            pixels: uint8 [h, w, 3], those of the original.
            name: the name of the image, for the result.

        Raises:
            UnreadableImage: it is too elongated to be padded.
            ValueError: the model gives numbers that are not finite.
        """
        image = self._tower.pixels(self._resize(pixels, self._tower.size))
        z = self._tower.embed([image, np.ascontiguousarray(self._tower.grey)])
        scores = [target.logits(z).astype(np.float64).tolist() for target in self.targets]
        if not np.isfinite(scores).all():
            raise ValueError(f"{name}: the model gave logits that are not finite")
        return [
            self._explanation(name, target, score, image, made, pixels.shape[:2])
            for target, score, made in zip(
                self.targets, scores, self._maps(image, scores), strict=True
            )
        ]

    def _maps(
        self, image: np.ndarray, scores: Sequence[Sequence[float]]
    ) -> list[tuple[np.ndarray, int | None, float | None]]:
        """Map, steps and completeness for each target."""
        tower, options = self._tower, self.options
        if options.method == "rollout":
            return [(rollout.roll_out(tower, image), None, None)] * len(self.targets)
        if options.method == "occlusion":
            maps, count = occlusion.occlude(tower, self.targets, image)
            return [(values, count, None) for values in maps]
        if options.steps:
            made = [
                gradients.integrate_evenly(tower, target, image, own - grey, options.steps)
                for target, (own, grey) in zip(self.targets, scores, strict=True)
            ]
        else:
            line, most = gradients.profile(tower, image), options.max_steps
            made = [gradients.integrate(tower, each, image, line, most) for each in self.targets]
        return [(map_.values, map_.steps, map_.completeness) for map_ in made]

    def _explanation(
        self, name: str, target: Target, score: Sequence[float], image: np.ndarray,
        made: tuple[np.ndarray, int | None, float | None], shape: tuple[int, int],
    ) -> Explanation:  # fmt: skip
        (values, steps, completeness), options = made, self.options
        own, grey = score
        measured = faithfulness.measure(
            self._tower, target, image, values, options.fill, options.seed
        )
        return Explanation(
            name, target.text, target.contrast, options.method,
            geometry.to_original(values, shape, self.preprocess), own, grey, steps, completeness,
            geometry.on_padding(values, shape, self.preprocess), measured,
        )  # fmt: skip


def explain(
    model: Model,
    images: Any,
    texts: str | Sequence[str] = (),
    *,
    contrast: str | None = None,
    probe: Probe | None = None,
    label: str | None = None,
    method: str = "ig",
    preprocess: str | None = None,
    dicom: Rules | None = None,
    steps: int | None = None,
    max_steps: int = gradients.MAX_STEPS,
    fill: str = "mean",
    seed: int = 0,
    batch_size: int = 8,
    on_image: Callable[[int], Any] = int,
) -> list[Explanation]:
    """Maps of what speaks for a text, or for a label, in images.

    What is explained is the logit exp(t) * cosine + b of the text, or how far it is above that of
    `contrast`, or the logit log(p / (1 - p)) of a label's probability p. It is computed in float32.

    Args:
        model: with an image tower; for texts with both, and a tokenizer.
        images: one or several, of any kind that `model.processor.images` takes.
        texts: one or several.
        contrast: a text to compare with, such as "a normal chest X-ray". Without
            one, what the image shows of any text counts, too.
        probe: explain a label of this probe instead of texts.
        label: a label of the probe; without a probe, one of the classifier that the model was
            fine-tuned with.
        method: "ig", "occlusion" or "rollout"; see `ExplainOptions` for this and the next ones.
        preprocess: pixel preset; by default that of the probe or of the model's training, or
            "big_vision".
        dicom: how DICOM files become pixels; default likewise.
        steps, max_steps, fill, seed, batch_size: see `ExplainOptions`.
        on_image: called with 1 after each image, for progress.

    Returns:
        For each image, and of it for each text, in order, a map on the pixels of the original and
        how good it is. See `Explanation`.

    Raises:
        UnreadableImage: an image cannot be used.
        OSError: a disk or a network fails.
        ValueError: an argument is wrong, or the arguments do not fit together.

    Warns:
        UserWarning: integrated gradients that are not complete; and what is unusual about pixels,
            as `model.processor.images` does.
    """
    options = ExplainOptions(method, steps, max_steps, fill, seed, batch_size)
    texts = [texts] if isinstance(texts, str) else list(texts)
    chosen = targets_of(model, texts, contrast, probe, label, preprocess)
    explainer = Explainer(chosen, preprocess, options)
    rules = rules_of(model, probe, dicom)
    results, all_facts = [], []
    for item in as_list(images):
        pixels, facts = decoded(item, rules)
        all_facts.append(facts)
        results += explainer(pixels, describe(item))
        on_image(1)
    warn_about_pixels(
        sum(f.orientation != 1 for f in all_facts), sum(f.burned_in for f in all_facts),
        sum(f.unusual for f in all_facts), sum(f.dark for f in all_facts), len(all_facts),
    )  # fmt: skip
    return results


def targets_of(
    model: Model,
    texts: Sequence[str],
    contrast: str | None,
    probe: Probe | None,
    label: str | None,
    preprocess: str | None,
) -> list[Target]:
    """What is explained; the arguments are those of `explain`.

    Raises:
        ValueError: as `explain`.
    """
    if bool(texts) == (probe is not None or label is not None):
        raise ValueError(
            "expected either texts, or a label of a probe or of the model's classifier, to explain"
        )
    if texts:
        return targets.of_texts(model, texts, contrast)
    if contrast is not None:
        raise ValueError("contrast is for texts; a label is explained by itself")
    if probe is None:
        return [targets.of_classifier(model, label)]
    target = targets.of_probe(model, probe, label)
    if preprocess not in (None, target.preprocess):
        raise ValueError(
            f"preprocess is {preprocess!r}; the probe was fitted to {target.preprocess!r}"
        )
    return [target]


def rules_of(model: Model, probe: Probe | None, dicom: Rules | None = None) -> Rules:
    """How images are read: as asked for, and else as for the probe or in the model's training.

    Raises:
        ValueError: other rules than those of the probe are asked for.
    """
    if probe is not None:
        recorded = from_dict(probe.provenance.dicom)
        rules = recorded if dicom is None else dicom
        probe.provenance.check(provenance.of_model(model, dicom=rules), "these images")
        return rules
    return model.config.prepared(dicom=dicom).dicom
