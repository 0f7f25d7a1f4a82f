"""Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of a logit.

The map of an image x is (x - x0) times the mean gradient on the straight line from the baseline x0,
mid-grey, to x. It sums to F(x) - F(x0), as far as the mean, here a Gauss-Legendre quadrature, is
exact; `completeness` says how far it is.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medsiglip_jax.trust.maps.targets import Target
from medsiglip_jax.trust.maps.tower import Pixels, Tower

FIRST_STEPS, MAX_STEPS = 4, 64
TOLERANCE = 0.01  # of completeness
LEAST = 0.1  # logits: smaller differences are measured against this one


@dataclass(frozen=True, eq=False)
class Integrated:
    """A map of integrated gradients.

    Attributes:
        values: of each pixel, the sum over its channels, in logits.
        steps: gradients that the last quadrature took.
        completeness: |sum - (F(x) - F(x0))| / max(|F(x) - F(x0)|, 0.1).
    """

    values: Float[np.ndarray, "s s"]
    steps: int
    completeness: float


def relative_error(total: float, difference: float) -> float:
    """How far the sum of a map is from the difference of the logits that it explains."""
    return abs(total - difference) / max(abs(difference), LEAST)


def integrate(
    tower: Tower,
    target: Target,
    image: Pixels,
    difference: float,
    steps: int | None = None,
    max_steps: int = MAX_STEPS,
) -> Integrated:
    """The map of one image.

    Without `steps` they are doubled from 4 on until the completeness is at most 0.01. The points of
    two quadratures have none in common, so each begins anew: to stop at n steps takes 2n - 4
    gradients, each of which takes about as long as three forward passes.

    Args:
        tower: the image tower.
        target: the logit.
        image: as the tower takes it.
        difference: the logit of the image less that of mid-grey.
        steps: points of the quadrature, instead of doubling them.
        max_steps: where doubling ends.

    Warns:
        UserWarning: the completeness is above 0.01.
    """
    count = steps or min(FIRST_STEPS, max_steps)
    while True:
        values = _quadrature(tower, target, image, count)
        error = relative_error(values.sum(), difference)
        if error <= TOLERANCE or steps or 2 * count > max_steps:
            break
        count *= 2
    if not error <= TOLERANCE:
        advice = "take more (steps=)" if steps else "allow more (max_steps=, --max-steps)"
        warnings.warn(
            f"integrated gradients for {target.text!r}: after {count} steps the map sums to "
            f"{values.sum():.4g} instead of {difference:.4g} logits, off by {error:.1%} of them "
            f"(of {LEAST} logits at least), and expected at most {TOLERANCE:.0%}; {advice}",
            stacklevel=3,
        )
    return Integrated(values, count, float(error))


def _quadrature(
    tower: Tower, target: Target, image: Pixels, steps: int
) -> Float[np.ndarray, "s s"]:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    start = tower.grey
    mean = tower.gradient(target, start, image, (1 + nodes) / 2, weights / 2)
    return ((image - start) * mean).sum(axis=-1)
