"""Statistics of an evaluation: on the host, in float64, with NumPy and SciPy alone.

Functions that return one number need complete labels: rows that they left out could not be seen in
it. Those that return counts leave out rows without a label, and count them (`known`).
"""

# Not lazy as the faces of other rooms: `bootstrap` and `delong` are also the names of their files.
from medsiglip_jax.metrics.bootstrap import Pair, bootstrap, bootstrap_pair
from medsiglip_jax.metrics.calibration import (
    Platt,
    Reliability,
    Temperature,
    brier,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    reliability,
    top_label,
)
from medsiglip_jax.metrics.checks import Known, known
from medsiglip_jax.metrics.classes import (
    ClassAuc,
    ClassAucs,
    accuracy,
    class_aucs,
    macro_auc,
    quadratic_kappa,
)
from medsiglip_jax.metrics.delong import Comparison, delong, delong_test
from medsiglip_jax.metrics.intervals import Interval, holm, proportion, wilson
from medsiglip_jax.metrics.ranking import Roc, auc, average_precision, roc_curve
from medsiglip_jax.metrics.retrieval import (
    Ranks,
    Retrieval,
    median_rank,
    ranks,
    recall,
    recall_at_k,
)
from medsiglip_jax.metrics.subgroups import Subgroup, subgroup_aucs
from medsiglip_jax.metrics.thresholds import (
    OperatingPoint,
    check_rule,
    choose_threshold,
    operating_point,
    predictive_values,
)

__all__ = [
    "ClassAuc",
    "ClassAucs",
    "Comparison",
    "Interval",
    "Known",
    "OperatingPoint",
    "Pair",
    "Platt",
    "Ranks",
    "Reliability",
    "Retrieval",
    "Roc",
    "Subgroup",
    "Temperature",
    "accuracy",
    "auc",
    "average_precision",
    "bootstrap",
    "bootstrap_pair",
    "brier",
    "check_rule",
    "choose_threshold",
    "class_aucs",
    "delong",
    "delong_test",
    "expected_calibration_error",
    "fit_platt",
    "fit_temperature",
    "holm",
    "known",
    "macro_auc",
    "median_rank",
    "operating_point",
    "predictive_values",
    "proportion",
    "quadratic_kappa",
    "ranks",
    "recall",
    "recall_at_k",
    "reliability",
    "roc_curve",
    "subgroup_aucs",
    "top_label",
    "wilson",
]
