"""From rows to batches: read, find the form, encode, store, select, mix, check, sample, pad."""

from kpsvd_tune.data.encode.encoder import Encoder
from kpsvd_tune.data.encode.tokenized import IGNORED, TokenizedRow
from kpsvd_tune.data.rows.batch import collate, pack
from kpsvd_tune.data.rows.grouping import row_lengths
from kpsvd_tune.data.rows.prepare import PreparedData, prepare, read_examples
from kpsvd_tune.data.rows.sampler import StatelessSampler
from kpsvd_tune.data.rows.source_settings import source_names
from kpsvd_tune.data.rows.stored_rows import StoredRows

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
