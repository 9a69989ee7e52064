"""The values of a KPSVD adapter, saved as adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from kpsvd_tune.adapter.registration import NAME
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import RankRule

PATHS = ("auto", "activations", "weight")


@dataclass
class KpsvdConfig(PeftConfig):
    """Configuration of a KPSVD adapter.

    Args:
        target_modules: ``all-linear``, a list of module names or suffixes, or a regular
            expression, with PEFT's meaning. Linear and Conv1D layers only.
        exclude_modules: Names or a regular expression of modules to leave alone.
        factor_shape: balanced, thin, pissa, auto, or ``{"n": n, "p": p}``.
        rank: A Kronecker rank for every layer, or a mapping with some of the fields of
            :class:`kpsvd_tune.linalg.RankRule`.
        rank_pattern: Patterns of module names to a rank or a mapping, for single layers.
        dropout: Probability of dropping an input of the update, in [0, 1).
        modules_to_save: Modules trained and saved whole beside the adapter.
        path: How the update is applied: auto, activations or weight.
        seed: Seeds the truncated decomposition.
        layers: Per adapted module its ``shape`` (m, n, p, q), ``rank`` and ``fingerprint``
            <W, A0_1 kron B0_1>. Filled when the adapter is made; with it nothing is decomposed.
        base_files: sha256 of the base model's weight files, where they are known.

    Raises:
        AdapterError: A value is out of range or of the wrong kind.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    factor_shape: str | dict[str, int] = field(default="balanced")
    rank: int | dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    dropout: float = field(default=0.0)
    modules_to_save: list[str] | None = field(default=None)
    path: str = field(default="auto")
    seed: int = field(default=0)
    layers: dict[str, dict[str, Any]] | None = field(default=None)
    base_files: dict[str, str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = sorted(set(self.target_modules))
        if isinstance(self.exclude_modules, (list, tuple, set)):
            self.exclude_modules = sorted(set(self.exclude_modules))
        if self.target_modules is None and self.layers is None:
            raise AdapterError(
                "KpsvdConfig needs target_modules: 'all-linear', a list of names, or a regex"
            )
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.path not in PATHS:
            raise AdapterError(f"path {self.path!r}: expected one of {', '.join(PATHS)}")
        self.rank_rule()

    def rank_rule(self) -> RankRule:
        """Return ``rank`` as a rule; an integer means that many terms in every layer.

        Raises:
            AdapterError: An unknown field or a value out of range.
        """
        if isinstance(self.rank, bool) or not isinstance(self.rank, (int, Mapping)):
            raise AdapterError(f"rank must be an integer or a mapping, got {self.rank!r}")
        try:
            if isinstance(self.rank, int):
                ranks = [self.rank, *(r for r in self.rank_pattern.values() if isinstance(r, int))]
                window = max(1, *ranks)
                return RankRule(method="fixed", window=window, min=self.rank, max=self.rank)
            return RankRule(**self.rank)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"rank: {error}") from error
