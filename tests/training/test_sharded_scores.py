"""A training with shared-out weights is scored like any other, by a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpsvd_tune import launch
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import RunError, StoppedBySignal
from kpsvd_tune.training.engines.deepspeed_config import launch_environment
from kpsvd_tune.training.scored_apart import score_apart

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], rows_file: Path) -> Path:
    """Trains for a moment, and is scored in two ways."""

    def rows() -> dict[str, Any]:
        columns = {"prompt": "question", "completion": "answer"}
        return {"path": str(rows_file), "columns": columns}

    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={"max_steps": 2, "eval_every": 0, "learning_rate": 1e-2},
        evaluation=[
            {**rows(), "task": "exact_match", "before": True, "max_new_tokens": 4},
            {**rows(), "task": "loss"},
        ],
    )


@pytest.fixture
def unscored(recipe: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run as a training with shared-out weights leaves it, and its results with the scores."""
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe)]) == 0
    return run, forget_scores(run, tmp_path / "evaluation")


def forget_scores(run: Path, evaluation: Path) -> dict[str, Any]:
    """Leave a run as if it had not been scored, and give its results; completions are moved."""
    scored = results_of(run)
    tasks = list(scored["scores"])
    of_scores = {"scores", "base_scores", "score_files", "score_conditions", *tasks}
    left = {key: value for key, value in scored.items() if key not in of_scores}
    (run / "results.json").write_text(json.dumps(left | {"unscored": tasks}))
    (run / "evaluation").rename(evaluation)
    return scored


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def two_ranks(kind: str, tmp_path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Options of `train` under fsdp or ZeRO 3, and what tells the ranks of the latter."""
    if kind == "fsdp":
        return ["train.parallel=fsdp", "--processes", "2"], None
    settings, file = tmp_path / "ds.json", tmp_path / "ds.yml"
    settings.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": ZERO}))
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\n"
        f"num_processes: 2\ndeepspeed_config: {{deepspeed_config_file: {settings}}}\n"
    )
    config = ["--processes", "2", "--accelerate-config", str(file)]
    return config, launch_environment(str(file), 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_two_processes_are_scored_as_one(
    kind: str, recipe: Path, tmp_path: Path, warm_below: None, capfd: pytest.CaptureFixture[str]
) -> None:
    if kind == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.run(["train", str(recipe), f"output_dir={one}"]) == 0
    options, deepspeed = two_ranks(kind, tmp_path)
    words = ["train", str(recipe), f"output_dir={two}", "train.batch_size=1", "--json", *options]
    capfd.readouterr()
    assert launch.launch(words, 2, True, deepspeed) == 0
    said = capfd.readouterr()
    found, alone = results_of(two), results_of(one)
    # Standard output holds the results, and nothing of the process that scores.
    assert json.loads(said.out) == found
    assert "no process holds all weights, which answers need" in said.err
    assert "scoring exact_match: " in said.err
    # The run is what an ordinary one is.
    assert found.keys() == alone.keys()
    assert found["score_conditions"] == alone["score_conditions"]
    assert found["base_scores"] == alone["base_scores"]
    first = Path("evaluation", "before", "exact_match", "completions.jsonl")
    assert (two / first).read_bytes() == (one / first).read_bytes()
    assert "exact_match" in (two / "adapter" / "README.md").read_text()
    assert "exact_match" in (two / "report.html").read_text()
    # The scores are those that one process gives the same adapter.
    for task in found["scores"]:
        assert cli.run(["eval", str(two), "--task", task, "--json"]) == 0
        again = json.loads(capfd.readouterr().out)
        for scorer, score in found["scores"][task].items():
            assert again["scores"][scorer]["n"] == score["n"]
            # Other numbers of threads sum in other orders.
            value = pytest.approx(score["value"], rel=1e-6)
            assert again["scores"][scorer]["value"] == value
    files = [two / "evaluation" / each for each in ("after/exact_match", "exact_match")]
    one_way, other = ((each / "completions.jsonl").read_bytes() for each in files)
    assert one_way == other
    # Typed again the command finds all of it done.
    assert launch.launch(words, 2, True, deepspeed) == 0
    assert "is finished; nothing was done" in capfd.readouterr().err


@pytest.mark.slow
def test_what_a_training_left_is_made_up_for_to_the_letter(
    unscored: tuple[Path, dict[str, Any]], tmp_path: Path, warm_below: None
) -> None:
    run, scored = unscored
    assert score_apart(str(run), results_of(run), ["--offline"]) == scored == results_of(run)
    for file in sorted((tmp_path / "evaluation").rglob("completions.jsonl")):
        again = run / "evaluation" / file.relative_to(tmp_path / "evaluation")
        assert again.read_bytes() == file.read_bytes()
    # Nothing is left, and nothing is started.
    assert score_apart(str(run), scored, ()) is scored


@pytest.mark.slow
def test_before_the_training_is_with_the_adapter_that_it_began_with(
    recipe: Path, tmp_path: Path, warm_below: None
) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    rate = "train.learning_rate=0.1"
    assert cli.run(["train", str(recipe), f"output_dir={first}", rate]) in (0, 4)
    content = yaml.safe_load(recipe.read_text()) | {"adapter": {"from": str(first)}}
    recipe.write_text(yaml.safe_dump(content))
    assert cli.run(["train", str(recipe), rate]) in (0, 4)
    scored = forget_scores(run, tmp_path / "evaluation")
    assert score_apart(str(run), results_of(run), ["--offline"]) == scored
    done = Path("before", "exact_match", "completions.jsonl")
    again = (run / "evaluation" / done).read_bytes()
    assert again == (tmp_path / "evaluation" / done).read_bytes()
    # The base alone answers otherwise.
    assert again != (first / "evaluation" / done).read_bytes()


@pytest.mark.slow
def test_a_scoring_that_fails_loses_nothing_and_can_be_repeated(
    unscored: tuple[Path, dict[str, Any]],
    rows_file: Path,
    warm_below: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, scored = unscored
    left, rows = results_of(run), rows_file.read_bytes()
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    rows_file.unlink()
    with pytest.raises(RunError) as failed:
        score_apart(str(run), left, ["--offline"])
    assert str(failed.value) == (
        f"the run is trained and its adapter is saved in {run / 'adapter'}; it is not scored, for "
        "the process that loads the whole model for that ended with exit code 2, and has said why "
        f"above. When that is mended, `kpsvd-tune eval {run} --offline` scores it, and so does the "
        "command that trained it, typed again"
    )
    assert rows_file.name in capfd.readouterr().err
    assert results_of(run) == left
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert cli.run(["runs", str(run.parent)]) == 0
    assert "not yet" in capfd.readouterr().out
    assert cli.run(["report", str(run)]) == 0
    assert "not scored yet" in capfd.readouterr().out
    rows_file.write_bytes(rows)
    assert cli.run(["eval", str(run), "--dry-run", "--json"]) == 0
    plans = json.loads(capfd.readouterr().out)["tasks"]
    assert [each["disk"]["place"] for each in plans] == [
        str(run / "evaluation" / "after" / task) for task in scored["scores"]
    ]
    assert cli.run(["eval", str(run), "--offline", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == scored == results_of(run)


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (137, RunError, "was killed, most likely because memory ran out: "),
        (130, StoppedBySignal, "stopped by SIGINT while scoring; the run is trained and its "),
        (143, StoppedBySignal, "stopped by SIGTERM while scoring; the run is trained and its "),
    ],
)
def test_how_the_process_ended_is_told(
    code: int,
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "results.json").write_text('{"unscored": ["gsm8k"]}')
    monkeypatch.setattr("kpsvd_tune.training.scored_apart.run_alone", lambda _: code)
    with pytest.raises(error) as raised:
        score_apart(str(tmp_path), {"unscored": ["gsm8k"]}, ())
    assert said in str(raised.value)
    assert f"`kpsvd-tune eval {tmp_path}` scores it" in str(raised.value)


@pytest.mark.slow
def test_a_signal_ends_the_scoring_and_the_same_command_goes_on_with_it(
    recipe: Path,
    rows_file: Path,
    tmp_path: Path,
    warm_below: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, options = tmp_path / "run", ["train.parallel=fsdp", "--processes", "2"]
    words = ["train", str(recipe), "train.batch_size=1", *options]
    done = run / "evaluation" / "after" / "exact_match" / "completions.jsonl"
    seen: list[int] = []
    has_ended = threading.Event()

    def stop() -> None:
        while not (done.exists() and done.stat().st_size):
            if has_ended.wait(0.02):
                return
        seen.extend(started_by_ranks())
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=stop)
    waiting.start()
    try:
        assert launch.launch([*words, sampled(rows_file, 100)], 2, use_cpu=True) == 130
    finally:
        has_ended.set()
        waiting.join()
    (scorer,) = seen
    with pytest.raises(ProcessLookupError):
        os.kill(scorer, 0)
    err = capfd.readouterr().err
    adapter = run / "adapter"
    assert (
        f"stopped by SIGINT while scoring; the run is trained and its adapter is saved in {adapter}"
    ) in err
    assert f"`kpsvd-tune eval {run}` scores it" in err
    assert (adapter / "adapter_model.safetensors").exists()
    assert results_of(run)["unscored"] == ["exact_match"]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    answers = [json.loads(line) for line in done.read_text().splitlines()]
    assert answers
    # With fewer answers, so that the test ends; those that were there are kept.
    steps = (run / "metrics.jsonl").read_bytes()
    assert launch.launch([*words, sampled(rows_file, 2)], 2, use_cpu=True) == 0
    assert "is finished; its scores are missing" in capfd.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == steps
    results = results_of(run)
    assert "unscored" not in results
    assert {each["n"] for each in results["scores"]["exact_match"].values()} == {8}
    after = [json.loads(line) for line in done.read_text().splitlines()]
    assert after[: len(answers)] == answers


def sampled(rows: Path, samples: int) -> str:
    """The recipe's evaluation with that many long answers to each question."""
    return (
        f"evaluation=[{{task: exact_match, path: {rows}, max_new_tokens: 60, batch_size: 1, "
        f"temperature: 1.0, samples: {samples}, "
        "columns: {prompt: question, completion: answer}}]"
    )


def started_by_ranks() -> list[int]:
    """The numbers of the processes that ranks of this one have started in sessions of their own."""
    command = ["ps", "-eo", "pid=,ppid=,sess="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, line.split())) for line in listed.splitlines()]
    ranks = {pid for pid, parent, _ in found if parent == os.getpid()}
    return [pid for pid, parent, session in found if parent in ranks and session == pid]


def test_a_process_that_works_alone_knows_nothing_of_the_launch() -> None:
    rank = {
        "PATH": "/bin",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "TORCHELASTIC_RUN_ID": "none",
        "OMPI_COMM_WORLD_RANK": "0",
        launch.PHASE_FILE: "/tmp/x/0",
        launch.RENDEZVOUS: "/tmp/x/store",
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "1,2",
    }
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1,2"}
    # The threads of all ranks of the machine.
    assert launch.environment_alone(rank) == kept | {"OMP_NUM_THREADS": "12"}
    on_cpu = launch.environment_alone({"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "3"})
    assert on_cpu == {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "3"}
