"""From the base weights to the rank report and the initial factors, with a cache on disk."""

from kpsvd_tune.decompose.cache import SpectraCache, default_cache_dir
from kpsvd_tune.decompose.ranks import Decomposition, Spectra, collect_spectra, decompose
from kpsvd_tune.decompose.spectra import Progress

__all__ = [
    "Decomposition",
    "Progress",
    "Spectra",
    "SpectraCache",
    "collect_spectra",
    "decompose",
    "default_cache_dir",
]
