"""Scores of images against classes that prompts describe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from scipy import special

from medsiglip_jax.model.api import Model


@dataclass(frozen=True)
class Rule:
    """How cosines become the scores of classes.

    Attributes:
        pairs: whether every class needs prompts of its absence, too.
        score: (cosines [n, c] with present, with absent prompts, factor of the softmax) -> [n, c].
        log_odds: whether these are log odds of probabilities.
    """

    pairs: bool
    score: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    log_odds: bool = False


CLASSIFIER = "classifier"  # the model's own, which no prompts have a part in


def _no_prompts(present: np.ndarray, absent: np.ndarray, factor: float) -> np.ndarray:
    raise ValueError(f"score {CLASSIFIER!r} is of models that have a classifier; this one has none")


RULES = {
    "pos_minus_neg": Rule(True, lambda p, a, f: p - a),
    # Over {absent, present}: the same ranks as by the difference. Probabilities would tie: with the
    # factor 117 they are all 1 from a difference of 0.31 on.
    "pair_softmax": Rule(True, lambda p, a, f: f * (p - a), log_odds=True),
    "class_softmax": Rule(False, lambda p, a, f: special.softmax(f * p, axis=1)),
    "cosine": Rule(False, lambda p, a, f: p),
    CLASSIFIER: Rule(False, _no_prompts),
}
TEMPERATURES = ("logit_scale", "none")


def rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RULES:
        raise ValueError(f"score is {name!r}; expected one of {', '.join(RULES)}")
    return RULES[name]


def check_temperature(name: str) -> None:
    """Raises ValueError unless it is one of `TEMPERATURES`."""
    if name not in TEMPERATURES:
        raise ValueError(f"temperature is {name!r}; expected one of {', '.join(TEMPERATURES)}")


def factor(model: Model, temperature: str) -> float:
    """What cosines are multiplied by before a softmax: exp(t) of the model, or 1.

    Raises:
        ValueError: `temperature` is neither "logit_scale" nor "none".
    """
    check_temperature(temperature)
    if temperature == "none":
        return 1.0
    return float(np.exp(np.asarray(model.params["t"], np.float64)).reshape(()))


# How several prompts of a class become one cosine.
OVER_PROMPTS = ("embedding", "mean", "max")


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """What images are compared with.

    Attributes:
        vectors: unit vectors: one of each class, or of each prompt.
        first: where the prompts of each class begin; None for one vector of each class.
        over: "mean" or "max" of the cosines with the prompts of a class; "embedding" has one.
    """

    vectors: Float[np.ndarray, "p d"]
    first: Int64[np.ndarray, " c"] | None = None
    over: str = "embedding"

    def cosines(self, zimg: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Of images, in float64."""
        cosines = unit(zimg) @ self.vectors.T
        if self.first is None:
            return cosines
        if self.over == "max":
            return np.maximum.reduceat(cosines, self.first, axis=1)
        counts = np.diff(np.append(self.first, len(self.vectors)))
        return np.add.reduceat(cosines, self.first, axis=1) / counts


def class_prompts(
    model: Model, prompts: Sequence[Sequence[str]], over: str = "embedding"
) -> ClassPrompts:
    """Embeds the prompts of every class.

    By default a class is one unit vector: its prompts embedded, normalised, averaged, normalised
    again. The mean is taken before the cosine, as in big_vision's discriminative_classifier and
    CheXzero. Because it is divided by its length, images are ranked otherwise than by the mean of
    the cosines, which `over` can ask for, as for their maximum. A prompt that is given twice counts
    twice.

    Args:
        model: with a text tower and a tokenizer.
        prompts: the prompts of every class, at least one each.
        over: one of `OVER_PROMPTS`.
    """
    texts = list(dict.fromkeys(text for group in prompts for text in group))
    tokens = model.processor.texts(texts)
    vectors = dict(zip(texts, unit(np.asarray(model.encode_text(tokens))), strict=True))
    groups = [np.stack([vectors[text] for text in group]) for group in prompts]
    if over == "embedding":
        return ClassPrompts(unit(np.stack([group.mean(axis=0) for group in groups])))
    sizes = [len(group) for group in groups]
    return ClassPrompts(np.concatenate(groups), np.cumsum([0, *sizes[:-1]]), over)


def unit(vectors: np.ndarray) -> Float[np.ndarray, "n d"]:
    """Float64 vectors divided by their lengths."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def score(
    name: str,
    zimg: Float[np.ndarray, "n d"],
    present: ClassPrompts,
    absent: ClassPrompts | None = None,
    factor: float = 1.0,
) -> Float[np.ndarray, "n c"]:
    """Scores images by the rule of that name, in float64; log odds where `Rule.log_odds`.

    Args:
        name: a key of `RULES`.
        zimg: image embeddings, of any length.
        present: the prompts of presence.
        absent: and of absence, for rules of pairs.
        factor: what cosines are multiplied by before a softmax.
    """
    chosen = rule(name)
    if chosen.pairs and absent is None:
        raise ValueError(f"score {name} compares with prompts of absence, and there are none")
    with_present = present.cosines(zimg)
    with_absent = with_present if absent is None else absent.cosines(zimg)
    return chosen.score(with_present, with_absent, factor)
