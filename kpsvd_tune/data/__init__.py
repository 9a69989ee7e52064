"""From rows to batches: read, find the form, encode, store, select, mix, check, sample, pad."""

from kpsvd_tune.data.batch import collate, pack
from kpsvd_tune.data.encode import Encoder
from kpsvd_tune.data.grouping import row_lengths
from kpsvd_tune.data.prepare import PreparedData, prepare, read_examples
from kpsvd_tune.data.sampler import StatelessSampler
from kpsvd_tune.data.sources import source_names
from kpsvd_tune.data.stored_rows import StoredRows
from kpsvd_tune.data.tokenized import IGNORED, TokenizedRow

__all__ = [
    "IGNORED",
    "Encoder",
    "PreparedData",
    "StatelessSampler",
    "StoredRows",
    "TokenizedRow",
    "collate",
    "pack",
    "prepare",
    "read_examples",
    "row_lengths",
    "source_names",
]
