"""Fixtures of tests that run trainers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import (  # type: ignore[import-untyped]
    AcceleratorState,
    GradientState,
    PartialState,
)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Trainers set up Accelerate's state, which other tests must not find."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
