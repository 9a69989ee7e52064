"""Several calls of compare on one folder: no trial twice, none lost, one budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import warm

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.account import Account, recorded_seconds
from kpsvd_tune.comparison.ray_tasks import _resources
from kpsvd_tune.comparison.taking import Taking
from kpsvd_tune.comparison.trial_log import open_results
from kpsvd_tune.errors import CheckpointError, FolderInUseError, ResourceError, RunError
from kpsvd_tune.report.comparison import TrialRow
from kpsvd_tune.storage.locks import join_folder, lock_folder

SBATCH = Path(__file__).parents[2] / "recipes" / "slurm" / "compare.sbatch"
ARGUMENTS = (
    *("--methods", "kpsvd,lora", "--budgets", "3k", "--learning-rates", "1e-3,1e-2"),
    *("--seeds", "1"),
)


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 4, "max": 4}},
        train={"max_steps": 4, "eval_every": 2},
        compare={"price_per_hour": 2},
        output_dir=str(tmp_path / "comparison"),
    )


def lines(folder: Path) -> list[TrialRow]:
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [TrialRow.from_dict(json.loads(line)) for line in text.splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(row.trial.folder_name for row in lines(folder))


def losses(folder: Path) -> dict[str, Any]:
    return {row.trial.folder_name: (row.losses, row.validation_loss) for row in lines(folder)}


def test_a_task_is_taken_once_and_is_free_again_afterwards(tmp_path: Path) -> None:
    one, two = Taking(tmp_path), Taking(tmp_path)
    with one.joined(), two.joined():
        with one.take(["a", "b"]) as first:
            with two.take(["a", "b"]) as second, two.take(["a", "b"]) as third:
                assert (first.number, second.number, third.number) == (0, 1, None)
                assert list(second.others) == [0]
                assert time.time() - 60 < third.others[0] <= time.time()
            with two.take(["b", "a"], lambda number, others: bool(others)) as taken:
                assert taken.number == 0
            with two.take(["b"], lambda number, others: bool(others)) as taken:
                assert (taken.number, taken.others) == (None, {})
        with two.take(["a"]) as taken:
            assert taken.number == 0


def test_a_killed_worker_gives_its_task_back(tmp_path: Path) -> None:
    taking = Taking(tmp_path)
    with taking.joined():
        code = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from kpsvd_tune.comparison.taking import Taking\n"
            "with Taking(Path(sys.argv[1])).take(['a']) as taken:\n"
            "    print(taken.number, flush=True)\n"
            "    time.sleep(600)\n"
        )
        worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1)
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"0\n"
        with taking.take(["a"]) as taken:
            assert taken.number is None
        worker.kill()
        worker.wait()
        worker.stdout.close()
        with taking.take(["a"]) as taken:
            assert taken.number == 0


def test_workers_and_a_call_that_wants_the_folder_alone_keep_each_other_out(
    tmp_path: Path,
) -> None:
    with (
        join_folder(tmp_path, "workers"),
        join_folder(tmp_path, "workers"),
        pytest.raises(FolderInUseError, match=r"another run \(workers\)"),
        lock_folder(tmp_path),
    ):
        pass
    with (
        lock_folder(tmp_path),
        pytest.raises(FolderInUseError, match="a call that does not share it .process"),
        join_folder(tmp_path, "workers"),
    ):
        pass


def test_workers_need_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("kpsvd_tune.storage.locks.fcntl.flock", refuse)
    reason = "has no locks .*keep several workers from the same"
    with pytest.raises(ResourceError, match=reason), join_folder(tmp_path, "workers"):
        pass


def test_several_calls_add_to_one_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kpsvd_tune.comparison.account.time.monotonic", lambda: now[0])
    one, two = (Account(tmp_path, [], devices=1, since=0.0) for _ in range(2))
    now[0] = 3.0
    one.tick()
    two.tick()
    assert two.device_seconds == recorded_seconds(tmp_path, []) == 6.0
    now[0] = 6.0
    one.tick()
    assert one.device_seconds == 9.0


def test_settings_of_workers_in_their_first_trials_stay(tmp_path: Path) -> None:
    open_results(tmp_path, {"recipe": {"model": "a"}}, {}, has_workers=True)
    (tmp_path / "base.json").write_text("{}")
    open_results(tmp_path, {"recipe": {"model": "a"}}, {}, has_workers=True)
    assert (tmp_path / "base.json").exists()
    with pytest.raises(CheckpointError, match="model: 'a' in the run, 'b' now"):
        open_results(tmp_path, {"recipe": {"model": "b"}}, {}, has_workers=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "1"], "--trials 1 needs --shared"),
        (["--shared", "--jobs", "2"], "runs one trial at a time; start more such calls"),
        (["--shared", "--ray", "local"], "--ray and --shared exclude each other"),
    ],
)
def test_options_that_make_no_sense_together(
    recipe: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", str(recipe), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_share_the_trials_and_a_killed_one_loses_none(
    recipe: Path, tmp_path: Path, warm_below: None
) -> None:
    folder = tmp_path / "comparison"
    command = [sys.executable, "-m", "kpsvd_tune", "compare", str(recipe), *ARGUMENTS]
    command += ["--offline", "--shared", "--plan", "staged"]

    def worker() -> warm.Popen:
        quiet = subprocess.DEVNULL
        return warm.Popen([*command, "--json"], stdout=quiet, stderr=quiet, start_new_session=True)

    workers = [worker(), worker()]
    try:
        deadline = time.monotonic() + 180
        while not (folder / "results.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # With all its processes, as a batch system does.
        os.killpg(workers[0].pid, signal.SIGKILL)
        assert workers[0].wait() == -signal.SIGKILL
        workers.append(worker())
        assert [each.wait(timeout=240) for each in workers[1:]] == [0, 0]
    finally:
        for each in workers:
            if each.poll() is None:
                each.kill()
    found = names(folder)
    assert len(found) == len(set(found)) == 4
    # The same trials as those of one call.
    alone = tmp_path / "alone"
    again = ["compare", str(recipe), *ARGUMENTS, "--offline", "--plan", "staged"]
    assert cli.run([*again, f"output_dir={alone}"]) == 0
    assert losses(folder) == losses(alone)
    verdict = json.loads((folder / "comparison.json").read_text())
    assert {each["method"] for each in verdict["summaries"]} == {"kpsvd", "lora"}
    # A call that wants it alone goes on with the same folder, and has nothing to do.
    assert cli.run(again) == 0
    assert names(folder) == found


@pytest.mark.slow
def test_one_task_of_an_array_runs_one_trial(recipe: Path, tmp_path: Path) -> None:
    program = tmp_path / "kpsvd-tune"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kpsvd_tune "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def task(number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SBATCH), str(recipe), *ARGUMENTS],
            env=os.environ
            | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "17"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    for number in (1, 2):
        done = task(number)
        assert done.returncode == 0, done.stderr
        assert f"task {number} of job 17 on" in done.stdout
        assert len(lines(tmp_path / "comparison")) == number
    verdict = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert len(verdict["summaries"]) == 2


@pytest.mark.slow
def test_one_budget_of_money_holds_over_workers(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(recipe), *ARGUMENTS, "--offline", "--plan", "full", "--shared"]
    assert cli.run([*command, "--trials", "1", "--money", "100"]) == 0
    spent = json.loads((tmp_path / "comparison" / "account.json").read_text())["device_seconds"]
    capsys.readouterr()
    # What is spent already leaves nothing for another trial.
    assert cli.run([*command, "--money", repr(spent * 2 / 3600)]) == 0
    captured = capsys.readouterr()
    assert "the money buys 0 of the 3 trials to come" in captured.err
    assert len(lines(tmp_path / "comparison")) == 1


def test_a_task_takes_a_gpu_or_its_part_of_the_processors() -> None:
    assert _resources({"CPU": 64.0, "GPU": 8.0}, None) == {"num_cpus": 8, "num_gpus": 1}
    assert _resources({"CPU": 6.0}, 2) == {"num_cpus": 3}
    assert _resources({"CPU": 6.0}, None) == {"num_cpus": 1}


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_ray_is_asked_for_where_it_is_not_installed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", str(recipe), *ARGUMENTS, "--ray", "local"]) == 2
    assert "pip install 'kpsvd-tune[ray]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
@pytest.mark.filterwarnings("ignore")  # Ray warns about its own insides
def test_tasks_of_ray_run_the_trials(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kpsvd_tune", "compare", str(recipe), *ARGUMENTS]
    done = subprocess.run(
        [*command, "--offline", "--ray", "local", "--jobs", "2", "--json"],
        # Ray gives its workers the lowest priority otherwise: beside other tests they get no time.
        env=os.environ | {"RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "comparison"
    found = names(folder)
    assert len(found) == len(set(found)) == 4
    assert json.loads(done.stdout)["summaries"]
    assert cli.run(["compare", str(recipe), *ARGUMENTS, f"output_dir={tmp_path / 'alone'}"]) == 0
    assert losses(folder) == losses(tmp_path / "alone")
    # An error of a worker is told.
    failed = subprocess.run(
        [*command, "--ray", "local", "train.max_steps=9"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert failed.returncode == RunError.exit_code
    assert "train.max_steps: 4 in the run, 9 now" in failed.stderr
