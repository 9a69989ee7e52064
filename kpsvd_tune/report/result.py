"""What every result can do, and the smallest of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


class Result:
    """What every result can do."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them: lists for tuples, mappings for results within."""
        plain: dict[str, Any] = _plain(self)
        return plain


@dataclass(frozen=True)
class Probe(Result):
    """A short training that tried an energy threshold.

    Attributes:
        energy: The threshold.
        steps: Optimiser steps.
        parameters: Trainable parameters it leads to.
        loss_before: Validation loss before the first step.
        loss: Validation loss after the last.
        seconds: Time it took.
    """

    energy: float
    steps: int
    parameters: int
    loss_before: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class SourceCount(Result):
    """One of several sources of training rows.

    Attributes:
        source: File or hub dataset.
        weight: Times each of its rows is seen in an epoch.
        num_rows: Rows seen in an epoch.
        num_supervised_tokens: Tokens of them that the loss counts.
        format: Form of its rows.
    """

    source: str
    weight: float
    num_rows: int
    num_supervised_tokens: int
    format: str


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
