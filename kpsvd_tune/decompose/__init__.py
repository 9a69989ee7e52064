"""From the base weights to the rank report and the initial factors, with a cache on disk."""

from kpsvd_tune.decompose.cache import default_cache_dir
from kpsvd_tune.decompose.collect import Spectra, collect_spectra
from kpsvd_tune.decompose.decomposition import Decomposition, decompose, layers_of
from kpsvd_tune.decompose.progress import Progress

__all__ = [
    "Decomposition",
    "Progress",
    "Spectra",
    "collect_spectra",
    "decompose",
    "default_cache_dir",
    "layers_of",
]
