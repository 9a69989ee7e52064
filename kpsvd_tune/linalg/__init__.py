"""The mathematics of KPSVD on plain tensors: no paths, no configuration, no printing."""

from kpsvd_tune.linalg.drawn import drawn_factor
from kpsvd_tune.linalg.kpsvd import KPSVD, kpsvd
from kpsvd_tune.linalg.kronecker import (
    FORMS,
    KroneckerShape,
    kron_sum,
    kron_sum_rows,
    num_trained,
    rearrange,
    unrearrange,
)
from kpsvd_tune.linalg.plan import LayerPlan, decompose_layer
from kpsvd_tune.linalg.rank import check_rule, choose_ranks
from kpsvd_tune.linalg.rule import RankRule
from kpsvd_tune.linalg.shape import ShapeChoice, choose_shape, nearest_shape

__all__ = [
    "FORMS",
    "KPSVD",
    "KroneckerShape",
    "LayerPlan",
    "RankRule",
    "ShapeChoice",
    "check_rule",
    "choose_ranks",
    "choose_shape",
    "decompose_layer",
    "drawn_factor",
    "kpsvd",
    "kron_sum",
    "kron_sum_rows",
    "nearest_shape",
    "num_trained",
    "rearrange",
    "unrearrange",
]
