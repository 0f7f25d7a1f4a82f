"""From statistics of a window and of windows in control to p-values, thresholds and alarms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from medsiglip_jax import metrics

_DRAWS = 999  # windows in control, if few tests share the level


@dataclass(frozen=True, eq=False)
class Measured:
    """The statistic of one window, and those of windows in control.

    Attributes:
        statistic: that of the window; larger is further from usual.
        null: those of windows of the same size in control.
    """

    statistic: float
    null: Float64[np.ndarray, " b"]

    @property
    def constant(self) -> bool:
        """Whether no window could have another statistic, as where all files can be read."""
        return bool((self.null == self.statistic).all())

    @property
    def p(self) -> float:
        """The share of windows in control, with this one, that lie at least as far from usual."""
        # Statistics are sums whose last digits depend on their order.
        reached = self.null >= self.statistic - 1e-9 * max(1.0, abs(self.statistic))
        return (1 + int(reached.sum())) / (1 + len(self.null))

    def quantile(self, level: float) -> float:
        """What the statistic has to exceed for a p-value of at most `level`."""
        rank = math.floor(level * (1 + len(self.null)) + 1e-9)
        return float(np.sort(self.null)[-rank]) if rank else math.inf


@dataclass(frozen=True)
class Verdict:
    """What a report says of one test; `alarm` is whether the statistic exceeds the threshold."""

    statistic: float
    p: float
    threshold: float
    alarm: bool


def draws_needed(tests: int, level: float) -> int:
    """How many windows in control to draw, so that the smallest p-value is far below Holm's."""
    return max(_DRAWS, math.ceil(3 * tests / level))


def judge(measured: Mapping[str, Measured], level: float) -> dict[str, Verdict]:
    """Which tests alarm, so that a window in control alarms in any of them with `level` at most.

    By Holm's procedure. It rejects those with a p-value of at most level / (tests that it does not
    reject), which is therefore the threshold of all of them. Tests that are constant cannot alarm
    and do not count (Tarone, Biometrics 46 (1990), 515).

    Args:
        measured: by the name of the test.
        level: the level of all tests together, in (0, 1), such as 0.05.
    """
    adjusted = metrics.holm([math.nan if m.constant else m.p for m in measured.values()])
    kept = max(1, int((adjusted > level).sum()))
    return {
        name: Verdict(m.statistic, m.p, m.quantile(level / kept), bool(a <= level))
        for (name, m), a in zip(measured.items(), adjusted.tolist(), strict=True)
    }
