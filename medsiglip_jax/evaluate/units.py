"""What an evaluation judges instead of single images, and how their scores are combined."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

PATIENT, IMAGE, NOISY_OR = "patient", "image", "noisy-or"
_TOP = re.compile(r"top([1-9]\d*)")
EXPECTED = "mean, max, topN (the mean of the N highest, such as top3) or noisy-or"
# Scores of the images of one unit, [k, c], to its scores.
Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Unit:
    """What is judged instead of single images.

    Attributes:
        per: "patient" (the group of the data set, also a lesion or slide), an attribute, or
            "image", which undoes an earlier choice.
        aggregate: how the scores of its images become one; see `EXPECTED`.
    """

    per: str
    aggregate: str = "mean"

    def __post_init__(self):
        combine(self.aggregate)


def combine(name: str) -> Combine:
    """How scores become one.

    Noisy-or is the probability that at least one image shows a finding, if each did so
    independently: 1 - (1 - p1)(1 - p2)… (Pearl, Probabilistic Reasoning, 1988, 4.3.2).

    Raises:
        ValueError: an unknown name.
    """
    plain: dict[str, Combine] = {
        "mean": lambda x: x.mean(axis=0),
        "max": lambda x: x.max(axis=0),
        NOISY_OR: lambda x: 1 - (1 - x).prod(axis=0),
    }
    if name in plain:
        return plain[name]
    if not (top := _TOP.fullmatch(name)):
        raise ValueError(f"aggregate is {name!r}; expected {EXPECTED}")
    return lambda x: np.sort(x, axis=0)[-int(top[1]) :].mean(axis=0)


def noisy_or_of_log_odds(x: Float[np.ndarray, "k c"]) -> Float[np.ndarray, " c"]:
    """Log odds of the noisy-or of the probabilities that have these log odds.

    The probability itself is 1 in float64 from log odds of 37 on, or for a few hundred images of
    0.9 each. As log odds, units that are beyond that still differ.
    """
    absent = special.log_expit(-x).sum(axis=0)  # the logarithm of the probability of no image
    return np.log(-np.expm1(absent)) - absent
