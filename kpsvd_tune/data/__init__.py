"""Training data, from files to batches: read/ the rows, encode/ them, and keep the rows/."""

from kpsvd_tune.data.encode.encoder import IGNORED, Encoder, TokenizedRow
from kpsvd_tune.data.read.sources import source_names
from kpsvd_tune.data.rows.batches import StatelessSampler, collate, pack, row_lengths
from kpsvd_tune.data.rows.prepare import PreparedData, prepare, read_examples
from kpsvd_tune.data.rows.store import StoredRows

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
