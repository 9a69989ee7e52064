"""The logic of scripts/gpu_check, with planted parts; and its benchmarks on the CPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm
from shipped_scripts import script

gpu_check = script("gpu_check")
ABOUT = {"device": "Planted GPU", "torch": "9.9"}
XML = """<testsuites><testsuite tests="3"><testcase name="a" time="0.5"><properties>
<property name="predicted_bytes" value="7"/></properties></testcase>
<testcase name="b" time="1"><failure message="assert 1 == 2">long</failure></testcase>
<testcase name="c" time="0"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


def part(folder: Path, name: str, code: str, seconds: float = 60, kind: str = "json") -> Any:
    """A part that runs the code, in which FILE is where its figures belong."""
    file = folder / f"{name}.{kind}"
    program = f"from pathlib import Path; FILE = Path({str(file)!r})\n{code}"
    return gpu_check.Part(name, (sys.executable, "-c", program), seconds, file)


def good(folder: Path, name: str) -> Any:
    return part(folder, name, "FILE.write_text('{\"seconds\": 3}')")


def test_a_part_that_fails_or_runs_out_of_time_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 10.0)
    child = tmp_path / "child"
    # It writes what it has when it is asked to end, as pytest does, and has a child that does not.
    late = f"""
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import os, signal, time, pathlib;"
    "signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(600)"])
try:
    time.sleep(600)
except KeyboardInterrupt:
    FILE.write_text('{{"half": 1}}')
"""
    asked = [
        part(tmp_path, "tests", f"FILE.write_text({XML!r}); exit(1)", kind="xml"),
        good(tmp_path, "first"),
        part(tmp_path, "broken", "print('before'); raise SystemExit('what went wrong')"),
        part(tmp_path, "late", late, seconds=4),
        part(tmp_path, "silent", "pass"),
        good(tmp_path, "last"),
    ]
    out = tmp_path / "found.json"
    assert gpu_check.check(asked, out, ABOUT) == 1
    found = json.loads(out.read_text())
    assert found["device"] == "Planted GPU"
    assert found["is_well"] is False
    assert found["not_run_yet"] == []
    assert found["not_well"] == {
        "tests": "failed with exit code 1",
        "broken": "failed with exit code 1",
        "late": "out of time",
        "silent": "failed: it left no figures",
    }
    told = found["parts"]
    assert told["first"]["figures"] == told["last"]["figures"] == {"seconds": 3}
    assert told["first"]["status"] == told["last"]["status"] == "ok"
    assert told["late"]["figures"] == {"half": 1}
    assert told["late"]["limit_seconds"] == 4
    assert told["broken"]["output"] == "before\nwhat went wrong\n"
    assert "silent.json" in told["silent"]["output"]
    tests = told["tests"]["figures"]
    counts = [tests[each] for each in ("passed", "failure", "error", "skipped")]
    assert counts == [1, 1, 0, 1]
    assert [each.get("why") for each in tests["cases"]] == [
        None,
        "assert 1 == 2",
        "needs two CUDA devices",
    ]
    assert tests["cases"][0]["predicted_bytes"] == "7"
    assert "not well: tests, broken, late, silent" in capsys.readouterr().out
    # What a part has started is gone with it.
    number = int(child.read_text())
    for _ in range(100):
        status = Path(f"/proc/{number}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {number} of the part that ran out of time is still there")


def test_all_is_well_and_the_file_is_whole_after_each_part(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    peek = f"""
import json
found = json.loads(Path({str(out)!r}).read_text())
FILE.write_text(json.dumps([found["is_well"], found["not_run_yet"], list(found["parts"])]))
"""
    asked = [good(tmp_path, "first"), part(tmp_path, "second", peek)]
    assert gpu_check.check(asked, out, ABOUT) == 0
    found = json.loads(out.read_text())
    assert (found["is_well"], found["not_well"], found["not_run_yet"]) == (True, {}, [])
    assert found["parts"]["second"]["figures"] == [False, ["second"], ["first"]]


def test_nothing_starts_after_the_whole_time(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    asked = [good(tmp_path, "first"), good(tmp_path, "second")]
    assert gpu_check.check(asked, out, ABOUT, total=0.0) == 1
    found = json.loads(out.read_text())
    assert found["not_well"] == {"first": "not started", "second": "not started"}
    assert list(tmp_path.iterdir()) == [out]


def test_the_parts_fit_into_ten_minutes(tmp_path: Path) -> None:
    asked = gpu_check.parts(tmp_path, "cuda")
    assert sum(each.seconds for each in asked) + gpu_check.GRACE_SECONDS <= 600
    names = [each.name for each in asked]
    assert names[0] == "tests"
    assert {"step-float32", "step-bfloat16", "generation", "decomposition", "merge"} < {*names}


def test_a_machine_without_a_gpu_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "signal", SimpleNamespace(signal=print, SIGTERM=15))
    monkeypatch.setattr(gpu_check, "describe", lambda: {"device": None, "devices": []})
    assert gpu_check.main([str(tmp_path / "found.json")]) == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err
    assert gpu_check.main([str(tmp_path / "none" / "found.json")]) == 2
    assert f"{tmp_path / 'none'} is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_benchmarks_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the very commands of a GPU but for the device and the sizes."""

    def start(command: tuple[str, ...], **options: Any) -> Any:
        return warm.Popen([*command], env=warm.unmeasured(OMP_NUM_THREADS="1"), **options)

    real = gpu_check.subprocess
    names = ("DEVNULL", "STDOUT", "TimeoutExpired")
    planted = SimpleNamespace(Popen=start, **{name: getattr(real, name) for name in names})
    monkeypatch.setattr(gpu_check, "subprocess", planted)
    out = tmp_path / "found.json"
    # Limits are those of a machine that does nothing else.
    asked = [replace(each, seconds=600) for each in gpu_check.parts(tmp_path, "cpu")]
    code = gpu_check.check(asked, out, {}, total=3600)
    found = json.loads(out.read_text())
    assert (code, found["not_well"]) == (0, {}), found
    told = {name: each.get("figures") for name, each in found["parts"].items()}
    for dtype in ("float32", "bfloat16"):
        assert all(row["seconds"] > 0 for row in told[f"step-{dtype}"]["rows"])
    assert [row["method"] for row in told["generation"]][-1] == "merged"
    assert told["decomposition"]["runs"][0]["size"] == [256, 256]
    assert told["merge"]["passed"] is True
