"""The values of a KPSVD adapter, saved as adapter_config.json."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from kpsvd_tune.adapter.registration import NAME
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import FORMS, RankRule, nearest_shape

PATHS = ("auto", "activations", "weight")
Names = set[str] | list[str] | str | None


@dataclass(frozen=True)
class Filling:
    """How a configuration came to its layers, where a decomposition of this process made them."""

    tuner: weakref.ref[Any] | None  # the model that they are of, if it lives
    base_name: str | None
    asked: Names  # target_modules as the user gave them
    left: Names  # target_modules as PEFT left them in the configuration


@dataclass
class KpsvdConfig(PeftConfig):
    """Configuration of a KPSVD adapter.

    Args:
        target_modules: ``all-linear``, a list of module names or suffixes, or a regular
            expression, with PEFT's meaning. Linear and Conv1D layers only.
        exclude_modules: Names or a regular expression of modules to leave alone.
        form: What of the terms is trained: both, left, right or core; see
            :mod:`kpsvd_tune.adapter.forms`.
        factor_shape: balanced, thin, pissa, or ``{"n": n, "p": p}``.
        factor_size: Rows and columns of the trained factor in place of a shape, for the forms
            left and right: a number, or two. The nearest divisors are taken.
        rank: A Kronecker rank for every layer, or a mapping with some of the fields of
            :class:`kpsvd_tune.linalg.RankRule`.
        rank_pattern: Patterns of module names to a rank or a mapping, for single layers.
        dropout: Probability of dropping an input of the update, in [0, 1).
        modules_to_save: Modules trained and saved whole beside the adapter.
        trainable_token_indices: Rows of the input embedding that are trained, or a mapping of
            embedding names to rows, with PEFT's meaning.
        init_weights: Whether training starts at the base model. False draws random offsets, so
            that the fresh adapter changes the outputs; for tests.
        path: How the update is applied: auto, activations or weight.
        seed: Seeds the truncated decomposition.
        frozen_seed: Draws frozen factors of random directions in place of the weight's own terms,
            for all forms but both. No file holds them: this seed gives them again.
        layers: Per adapted module its ``shape`` (m, n, p, q), ``rank`` and ``fingerprint``
            <W, A0_1 kron B0_1>, and with a ``frozen_seed`` its ``norm`` ||W||_F. Filled when the
            adapter is made; with it nothing is decomposed.
        base_files: sha256 of the base model's weight files, where they are known.
        base_config: What of the base's configuration decides its outputs. Filled when the adapter
            is made; None in adapters of older versions.
        base_tensors: A random projection of each tensor without adapters, by which messages name
            the one that differs. Filled as well.

    Raises:
        AdapterError: A value is out of range or of the wrong kind.
    """

    target_modules: Names = field(default=None)
    exclude_modules: Names = field(default=None)
    form: str = field(default="both")
    factor_shape: str | dict[str, int] = field(default="balanced")
    factor_size: int | list[int] | None = field(default=None)
    rank: int | dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    dropout: float = field(default=0.0)
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    init_weights: bool = field(default=True)
    path: str = field(default="auto")
    seed: int = field(default=0)
    frozen_seed: int | None = field(default=None)
    layers: dict[str, dict[str, Any]] | None = field(default=None)
    base_files: dict[str, str] | None = field(default=None)
    base_config: dict[str, Any] | None = field(default=None)
    base_tensors: dict[str, float] | None = field(default=None)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        self._filling: Filling | None = None
        self._check_kinds()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.form not in FORMS:
            raise AdapterError(f"form {self.form!r}: expected one of {', '.join(FORMS)}")
        if self.factor_size is not None and self.form not in ("left", "right"):
            raise AdapterError(
                f"factor_size is the size of the one factor that the forms left and right train, "
                f"and form is {self.form}: set factor_shape instead"
            )
        if self.factor_size is not None:
            try:
                nearest_shape(1, 1, self.form, self.factor_size)
            except ValueError as error:
                raise AdapterError(str(error)) from error
            if self.factor_shape != "balanced" and self.layers is None:
                raise AdapterError(
                    f"factor_size {self.factor_size} and factor_shape {self.factor_shape!r}: each "
                    "decides the sizes of the factors; set one of the two"
                )
        if self.frozen_seed is not None and self.form == "both":
            raise AdapterError(
                "frozen_seed draws the frozen factors of the forms left, right and core; the form "
                "both trains from the weight's own terms"
            )
        if self.path not in PATHS:
            raise AdapterError(f"path {self.path!r}: expected one of {', '.join(PATHS)}")
        self.rank_rule()

    def _check_kinds(self) -> None:
        """Refuse values of other kinds, at which PEFT or torch would fail without a name."""
        kinds = {
            "target_modules": ("a string or a list of names", _is_names(self.target_modules, str)),
            "exclude_modules": (
                "a string or a list of names",
                _is_names(self.exclude_modules, str),
            ),
            "modules_to_save": ("a list of names", _is_names(self.modules_to_save)),
            "trainable_token_indices": (
                "a list of token ids, or a mapping of names to such lists",
                _is_rows(self.trainable_token_indices),
            ),
            "dropout": ("a number", isinstance(self.dropout, (int, float))),
            "rank_pattern": (
                "a mapping of patterns to ranks",
                _is_patterns(self.rank_pattern),
            ),
            "layers": (
                "a mapping of names to a shape of four sizes and a rank",
                _is_layers(self.layers),
            ),
        }
        for key, (expected, is_right) in kinds.items():
            if not is_right:
                value = repr(getattr(self, key))
                shown = value if len(value) <= 200 else f"{value[:200]}..."
                raise AdapterError(f"{key}: expected {expected}, got {shown}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the weak reference, which cannot be pickled or copied."""
        state = dict(self.__dict__)
        if self._filling is not None:
            state["_filling"] = replace(self._filling, tuner=None)
        return state

    @property
    def is_to_decompose(self) -> bool:
        """Whether a model that takes this configuration is decomposed first.

        Not with layers that a file or the user gave; those of another model do not count.
        """
        return self.layers is None or self._filling is not None

    def asked_targets(self) -> Names:
        """``target_modules`` without what PEFT made of them for an earlier model."""
        filling = self._filling
        if filling is None or self.target_modules != filling.left:
            return self.target_modules
        return filling.asked

    def take_layers(self, layers: dict[str, dict[str, Any]], tuner: Any, adapter_name: str) -> None:
        """Hold the layers of an adapter; one that this object was filled for keeps a copy.

        So the object given to PEFT stays the one that PEFT writes into, and may be given again.
        """
        asked, earlier = self.asked_targets(), self._filling
        held_by = None if earlier is None or earlier.tuner is None else earlier.tuner()
        if earlier is not None and held_by is not None:
            for name, config in held_by.peft_config.items():
                if config is self and (held_by is not tuner or name != adapter_name):
                    own = copy.deepcopy(self)
                    own.base_model_name_or_path = earlier.base_name
                    held_by.peft_config[name] = own
        if earlier is not None:
            self.base_files = None
        self.layers = layers
        self.target_modules = copy.copy(asked)
        self._filling = Filling(weakref.ref(tuner), self.base_model_name_or_path, asked, asked)

    def note_targets(self) -> None:
        """Remember what PEFT has made of ``target_modules``."""
        if self._filling is not None:
            self._filling = replace(self._filling, left=copy.copy(self.target_modules))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; sets become sorted lists, so that equal adapters make equal files."""
        fields: dict[str, Any] = super().to_dict()
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in fields.items()
        }

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
                return RankRule(
                    method="fixed",
                    window=window,
                    min=self.rank,
                    max=self.rank,
                    overrides=self.rank_pattern,
                )
            return RankRule(**self.rank, overrides=self.rank_pattern)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"rank: {error}") from error


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object, *others: type) -> bool:
    """Whether a value is None, a collection of names, or of one of the other kinds."""
    if value is None or isinstance(value, others):
        return True
    return isinstance(value, (list, tuple, set)) and all(map(_is_name, value))


def _is_size(value: object, least: int = 1) -> bool:
    # No matrix of any model is larger; torch counts in 64 bits.
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**31


def _is_patterns(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_name, value))


def _is_rows(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, Mapping) else [() if value is None else value]
    names = list(value) if isinstance(value, Mapping) else []
    return all(map(_is_name, names)) and all(
        isinstance(rows, (list, tuple)) and all(_is_size(row, 0) for row in rows) for rows in lists
    )


def _is_layers(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(
        _is_name(name)
        and isinstance(layer, Mapping)
        and isinstance(layer.get("shape"), (list, tuple))
        and len(layer["shape"]) == 4
        and all(map(_is_size, (*layer["shape"], layer.get("rank"))))
        for name, layer in value.items()
    )
