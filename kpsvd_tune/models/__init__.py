"""Base models: find them, load them, name their target layers, and stream their weights."""

from kpsvd_tune.models.checkpoint import Checkpoint, StoredTensor, WeightFile
from kpsvd_tune.models.loading import (
    load_model,
    load_plain_model,
    load_skeleton,
    load_tokenizer,
)
from kpsvd_tune.models.source import (
    ModelSource,
    base_fingerprint,
    base_of,
    describe_base,
    find_configuration,
    resolve_model,
)
from kpsvd_tune.models.stream import TensorLocation, WeightReader

__all__ = [
    "Checkpoint",
    "ModelSource",
    "StoredTensor",
    "TensorLocation",
    "WeightFile",
    "WeightReader",
    "base_fingerprint",
    "base_of",
    "describe_base",
    "find_configuration",
    "load_model",
    "load_plain_model",
    "load_skeleton",
    "load_tokenizer",
    "resolve_model",
]
