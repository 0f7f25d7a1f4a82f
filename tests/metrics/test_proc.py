"""AUCs, DeLong's variance and paired tests are those of the R package pROC."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from medsiglip_jax.metrics import auc, delong, delong_test

GOLDEN = json.loads((Path(__file__).parent / "golden/proc.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_aucs_variances_and_tests_are_those_of_proc(case):
    labels, scores = np.array(case["labels"]), [np.array(case[k]) for k in ("first", "second")]
    for x, value, variance in zip(scores, case["auc"], case["variance"], strict=True):
        assert auc(x, labels) == pytest.approx(value, abs=1e-12)
        found = delong(x, labels)
        # Ours is on the logit scale: its width there is that of the standard error.
        step = (special.logit(found.high) - special.logit(found.low)) / 2
        error = step * value * (1 - value) / stats.norm.ppf(0.975)
        assert error == pytest.approx(math.sqrt(variance), rel=1e-9)
    low, _, high = case["low_auc_high"]
    reach = stats.norm.ppf(0.975) * math.sqrt(case["variance"][0])
    # pROC's own limits are not transformed, and cut off at 0 and 1.
    assert (max(0, case["auc"][0] - reach), min(1, case["auc"][0] + reach)) == pytest.approx(
        (low, high), abs=1e-12
    )
    test = delong_test(*scores, labels)
    assert test.z == pytest.approx(case["z"], rel=1e-9)
    # pROC takes the normal distribution, ours Student's t.
    assert 2 * stats.norm.sf(abs(test.z)) == pytest.approx(case["p"], rel=1e-9)
    difference = case["variance"][0] + case["variance"][1] - 2 * case["covariance"]
    assert test.difference.value / test.z == pytest.approx(math.sqrt(difference), rel=1e-9)
