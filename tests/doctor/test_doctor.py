"""`doctor` names what is wrong with a machine, which each test plants."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kpsvd_tune import __main__ as program
from kpsvd_tune.commands import main as cli
from kpsvd_tune.doctor import checks, packages, selftest
from kpsvd_tune.evaluation.sandbox.run import sandbox_fault


@pytest.fixture(autouse=True)
def fresh_sandbox() -> Iterator[None]:
    """What was found of the sandbox is kept by a process; the tests change it."""
    sandbox_fault.cache_clear()
    yield
    sandbox_fault.cache_clear()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def diagnosis(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, dict[str, Any]]:
    assert cli.run(["doctor", "--quick", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["can_work"] is (code == 0)
    return {check["name"]: check for check in found["checks"]}


def older(name: str) -> Any:
    return lambda asked: "0.9.0" if asked == name else version(asked)


def test_every_check_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    names = "python packages extras torch devices memory disk cache hub bubblewrap".split()
    for name in names:
        assert f" {name}: " in out
    assert "not asked: HF_HUB_OFFLINE" in out


def test_an_old_typer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "version", older("typer"))
    found = diagnosis(capsys)["packages"]
    assert found["status"] == "warning"
    assert "typer 0.9.0 is installed, expected >=0.29" in found["found"]
    assert found["cure"] == "pip install 'typer>=0.29'"


def test_an_old_typer_is_named_where_the_commands_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "version", older("typer"))
    monkeypatch.setitem(sys.modules, "kpsvd_tune.commands.main", None)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    assert "typer 0.9.0 is installed, expected >=0.29" in capsys.readouterr().err


def test_an_import_that_no_version_explains_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kpsvd_tune.commands.main", None)
    with pytest.raises(ImportError):
        program.main()


def test_a_missing_package_makes_work_impossible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_peft(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(packages, "version", without_peft)
    found = diagnosis(capsys, code=1)["packages"]
    assert found["status"] == "fault"
    assert "peft is not installed, expected" in found["found"]


def test_another_python_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    found = diagnosis(capsys)["python"]
    assert (found["status"], "Python 3.9.1 runs here" in found["found"]) == ("warning", True)


def test_missing_bubblewrap_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = diagnosis(capsys)["bubblewrap"]
    assert found["status"] == "warning"
    assert "which is not installed" in found["found"]
    assert "install bubblewrap" in found["cure"]


@pytest.mark.parametrize(
    ("free", "status", "code"), [(10, "fault", 1), (10**9, "warning", 0), (10**11, "ok", 0)]
)
def test_a_full_disk_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    status: str,
    code: int,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    found = diagnosis(capsys, code)["disk"]
    assert found["status"] == status
    assert ("free some space" in found["cure"]) is (status != "ok")


def test_a_hub_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # Nothing listens at this port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    found = diagnosis(capsys)["hub"]
    assert found["status"] == "warning"
    assert "cannot be reached" in found["found"]
    assert "local paths" in found["cure"]


def test_a_torch_without_the_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(checks, "_NVIDIA", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = diagnosis(capsys)["torch"]
    assert found["status"] == "warning"
    assert "this machine has an NVIDIA driver: its GPUs are not used" in found["found"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU although" in diagnosis(capsys)["torch"]["found"]


def test_little_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: 10**8)
    assert diagnosis(capsys)["memory"]["status"] == "warning"


def test_no_path_of_the_home_folder_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = diagnosis(capsys)
    assert found["cache"]["found"].startswith("~/cache/kpsvd-tune: ")
    assert str(tmp_path) not in json.dumps(found)


def test_a_check_that_fails_itself_does_not_end_the_others() -> None:
    def _broken_driver() -> Any:
        raise RuntimeError("no such device")

    found = checks.checked(_broken_driver)
    assert (found.name, found.status) == ("broken driver", "warning")
    assert "RuntimeError: no such device" in found.found


def fail(commands: Any, folder: Path, run: Any) -> None:
    (folder / "said.txt").write_text("first\nerror: no room\n\nkpsvd-tune train failed")
    os._exit(1)


def crash(commands: Any, folder: Path, run: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (fail, "failed: exit code 1: first / error: no room / kpsvd-tune train failed"),
        (crash, "failed: killed by signal 9: without a word"),
        (lambda *_: time.sleep(60), "failed: it took longer than 1 s"),
    ],
)
def test_a_self_test_that_fails_says_where(
    work: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_work", work)
    monkeypatch.setattr(selftest, "_SECONDS", 1 if "longer" in said else 60)
    found = selftest.self_test(cli.run)
    assert found.status == "fault"
    assert f"training and merging a made-up model {said}" in found.found


@pytest.mark.slow
def test_a_command_of_the_self_test_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest._recipe
    monkeypatch.setattr(selftest, "_recipe", lambda folder: right(folder) | {"seed": 1})
    found = selftest.self_test(cli.run)
    assert found.status == "fault"
    assert "exit code 1: " in found.found
    assert found.found.endswith("kpsvd-tune train failed")
    assert "/tmp" not in found.found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_the_self_test_passes_here(
    way: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "spawn":
        monkeypatch.setattr(selftest, "_context", lambda: multiprocessing.get_context("spawn"))
    else:
        assert selftest._context().get_start_method() == "fork"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = selftest.self_test(cli.run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (found.name, found.status) == ("self-test", "ok"), found.found
    # Nothing of what the commands say reaches the table of checks.
    assert capfd.readouterr() == ("", "")
    if way == "fork":
        # Processor time, which other work on the machine does not change much.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
