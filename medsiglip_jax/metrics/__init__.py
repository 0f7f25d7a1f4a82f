"""Statistics of an evaluation, on the host, in float64, with NumPy and SciPy alone.

Functions that return a single number refuse rows without a label, since nobody would see that they
were left out. Functions that return counts leave such rows out (`known`) and count them.
"""

from typing import TYPE_CHECKING

from medsiglip_jax import lazy

if TYPE_CHECKING:
    from medsiglip_jax.metrics.agreement import (
        balanced_accuracy,
        class_figures,
        class_figures_pair,
        cohen_kappa,
        macro_f1,
        matthews,
        quadratic_kappa,
        top_k_accuracy,
        weighted_f1,
    )
    from medsiglip_jax.metrics.auc_variance import Comparison, delong, delong_test
    from medsiglip_jax.metrics.calibration import (
        Platt,
        Recalibration,
        Reliability,
        Temperature,
        brier,
        expected_calibration_error,
        fit_platt,
        fit_temperature,
        recalibration,
        reliability,
        top_label,
    )
    from medsiglip_jax.metrics.checks import Known, fewest_units, known
    from medsiglip_jax.metrics.classes import (
        ClassAuc,
        ClassAucs,
        accuracy,
        class_aucs,
        macro_auc,
    )
    from medsiglip_jax.metrics.intervals import Interval, holm, mean, proportion, wilson
    from medsiglip_jax.metrics.means import MeanAuc, macro_delong, macro_delong_test
    from medsiglip_jax.metrics.paired import PairedShares, paired_shares
    from medsiglip_jax.metrics.ranking import Roc, auc, average_precision, roc_curve
    from medsiglip_jax.metrics.resampling import Pair, bootstrap, bootstrap_pair
    from medsiglip_jax.metrics.retrieval import (
        Ranks,
        Retrieval,
        median_rank,
        ranks,
        recall,
        recall_at_k,
    )
    from medsiglip_jax.metrics.selective import Selective, aurc, selective_accuracy
    from medsiglip_jax.metrics.subgroups import (
        FEW,
        Subgroup,
        SubgroupShare,
        subgroup_aucs,
        subgroup_shares,
    )
    from medsiglip_jax.metrics.thresholds import (
        OperatingPoint,
        check_rule,
        choose_threshold,
        judge_classes,
        operating_point,
        predictive_values,
    )

__all__ = [
    "ClassAuc", "ClassAucs", "Comparison", "FEW", "Interval", "Known", "MeanAuc",
    "OperatingPoint", "Pair", "PairedShares", "Platt", "Ranks", "Recalibration", "Reliability",
    "Retrieval", "Roc", "Selective", "Subgroup", "SubgroupShare", "Temperature", "accuracy", "auc",
    "aurc", "average_precision", "balanced_accuracy", "bootstrap", "bootstrap_pair", "brier",
    "check_rule", "choose_threshold", "class_aucs", "class_figures", "class_figures_pair",
    "cohen_kappa", "delong", "delong_test", "expected_calibration_error", "fewest_units",
    "fit_platt", "fit_temperature", "holm", "judge_classes", "known", "macro_auc",
    "macro_delong", "macro_delong_test", "macro_f1", "matthews", "mean", "median_rank",
    "operating_point", "paired_shares", "predictive_values", "proportion", "quadratic_kappa",
    "ranks", "recalibration", "recall", "recall_at_k", "reliability", "roc_curve",
    "selective_accuracy", "subgroup_aucs", "subgroup_shares", "top_k_accuracy", "top_label",
    "weighted_f1", "wilson",
]  # fmt: skip

# No file is named like one of these: importing it would put the module in the place of the name.
__getattr__, __dir__ = lazy(
    __name__,
    agreement="balanced_accuracy class_figures class_figures_pair cohen_kappa macro_f1 "
    "matthews quadratic_kappa top_k_accuracy weighted_f1",
    auc_variance="Comparison delong delong_test",
    calibration="Platt Recalibration Reliability Temperature brier expected_calibration_error "
    "fit_platt fit_temperature recalibration reliability top_label",
    checks="Known fewest_units known",
    classes="ClassAuc ClassAucs accuracy class_aucs macro_auc",
    intervals="Interval holm mean proportion wilson",
    means="MeanAuc macro_delong macro_delong_test",
    paired="PairedShares paired_shares",
    ranking="Roc auc average_precision roc_curve",
    resampling="Pair bootstrap bootstrap_pair",
    retrieval="Ranks Retrieval median_rank ranks recall recall_at_k",
    selective="Selective aurc selective_accuracy",
    subgroups="FEW Subgroup SubgroupShare subgroup_aucs subgroup_shares",
    thresholds="OperatingPoint check_rule choose_threshold judge_classes operating_point "
    "predictive_values",
)
