"""From rows to batches: read, find the form, encode, check, sample, pad."""

from kpsvd_tune.data.batch import collate, pack
from kpsvd_tune.data.encode import IGNORED, Encoder, TokenizedRow
from kpsvd_tune.data.prepare import PreparedData, prepare, read_examples
from kpsvd_tune.data.sampler import StatelessSampler

__all__ = [
    "IGNORED",
    "Encoder",
    "PreparedData",
    "StatelessSampler",
    "TokenizedRow",
    "collate",
    "pack",
    "prepare",
    "read_examples",
]
