"""Scores of images against classes that prompts describe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from medsiglip_jax.model.api import Model


@dataclass(frozen=True)
class Rule:
    """How cosines become the scores of classes.

    Attributes:
        pairs: whether every class needs prompts of its absence, too.
        score: (cosines [n, c] with present, with absent prompts, factor of the softmax) -> [n, c].
    """

    pairs: bool
    score: Callable[[np.ndarray, np.ndarray, float], np.ndarray]


CLASSIFIER = "classifier"  # the model's own, which no prompts have a part in


def _no_prompts(present: np.ndarray, absent: np.ndarray, factor: float) -> np.ndarray:
    raise ValueError(f"score {CLASSIFIER!r} is of models that have a classifier; this one has none")


RULES = {
    "pos_minus_neg": Rule(True, lambda p, a, f: p - a),
    # Over {absent, present}: the same ranks as by the difference.
    "pair_softmax": Rule(True, lambda p, a, f: np.exp(-np.logaddexp(0.0, f * (a - p)))),
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


def class_embeddings(model: Model, prompts: Sequence[Sequence[str]]) -> Float[np.ndarray, "c d"]:
    """One unit vector per class: prompts embedded, normalised, averaged, normalised again.

    The mean is taken before the cosine, as in big_vision's discriminative_classifier and CheXzero.
    Because it is divided by its length, images are ranked otherwise than by the mean of the
    cosines. A prompt that is given twice counts twice.

    Args:
        model: with a text tower and a tokenizer.
        prompts: of every class, at least one each.

    Returns:
        float64 [c, d].
    """
    texts = list(dict.fromkeys(text for group in prompts for text in group))
    tokens = model.processor.texts(texts)
    vectors = dict(zip(texts, unit(np.asarray(model.encode_text(tokens))), strict=True))
    return unit(np.stack([np.mean([vectors[text] for text in group], 0) for group in prompts]))


def unit(vectors: np.ndarray) -> Float[np.ndarray, "n d"]:
    """Float64 vectors divided by their lengths."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def score(
    name: str,
    zimg: np.ndarray,
    present: Float[np.ndarray, "c d"],
    absent: Float[np.ndarray, "c d"] | None = None,
    factor: float = 1.0,
) -> Float[np.ndarray, "n c"]:
    """Scores images by the rule of that name, in float64.

    Args:
        name: a key of `RULES`.
        zimg: image embeddings [n, d], of any length.
        present: `class_embeddings` of the prompts of presence.
        absent: and of absence, for rules of pairs.
        factor: of the softmax.
    """
    zimg, chosen = unit(zimg), rule(name)
    if chosen.pairs and absent is None:
        raise ValueError(f"score {name} compares with prompts of absence, and there are none")
    return chosen.score(zimg @ present.T, zimg @ (present if absent is None else absent).T, factor)
