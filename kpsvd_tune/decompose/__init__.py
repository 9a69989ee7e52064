"""From the base weights to the rank report and the initial factors, with a cache on disk."""

from kpsvd_tune.decompose.cache import default_cache_dir
from kpsvd_tune.decompose.collect import (
    Progress,
    Spectra,
    cached_spectra,
    collect_spectra,
    layer_plans,
    report_decomposition,
)
from kpsvd_tune.decompose.decomposition import Decomposition, decompose, start_from
from kpsvd_tune.decompose.ranks import layer_report

__all__ = [
    "Decomposition",
    "Progress",
    "Spectra",
    "cached_spectra",
    "collect_spectra",
    "decompose",
    "default_cache_dir",
    "layer_plans",
    "layer_report",
    "report_decomposition",
    "start_from",
]
