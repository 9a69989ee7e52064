"""Whether the network may be used is asked of the environment, and set there once."""

from __future__ import annotations

import os

import pytest

from kpsvd_tune.data.read.sources import _hub_access
from kpsvd_tune.offline import go_offline, is_offline


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)]
)
def test_offline_is_what_the_hubs_client_reads(monkeypatch, value: str | None, expected: bool):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if value is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is expected


def test_going_offline_tells_every_library(monkeypatch):
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
    for name in names:
        monkeypatch.setenv(name, "")
    go_offline()
    assert [os.environ[name] for name in names] == ["1", "1", "offline"]
    assert is_offline()


def test_datasets_have_a_variable_of_their_own(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert not is_offline()
    assert _hub_access("some/set")[0], "no call of the network"
