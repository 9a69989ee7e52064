"""Training data, from files to batches.

A line of a file is trained on this way; each step names what it gives:

    read.files      Row: its columns by name, its place, or its fault
    encode.format   Pair or Chat: the text or messages in it
    encode.encoder  Layout: the text as the template writes it, learnt or not; then TokenizedRow
    rows.store      flat arrays on disk, and StoredRows, whose TokenizedRows are slices of them
    rows.split      which rows are trained and which held out
    rows.batches    which rows a step takes, and how they are padded or packed

`rows.prepare` calls these in order. Training goes on from there: `training.batches` makes the
tensors of a batch, and `training.loss` gives the sum of the cross-entropies of its learnt tokens.
"""

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
