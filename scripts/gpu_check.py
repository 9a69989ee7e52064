"""Run the tests marked gpu, then benchmarks, and write one JSON with the device's name.

    scripts/gpu_check [FILE]           on a machine with at least one CUDA device; gpu_check.json
    scripts/gpu_check --rehearse       on the CPU, with tiny models: whether the benchmarks run

Nothing is downloaded: every model is made on the spot. Each part has a limit of time, and together
they take at most ten minutes. A part that fails or runs out of time is named in the file, and loses
nothing of the others: the file is written anew after each part. Exit code 0: all went well, 1: a
part did not, 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as tree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 600.0
# A part that is out of time is asked to end, so that pytest writes what it found, then killed.
GRACE_SECONDS = 5.0
_TAIL = 3000  # characters of a failed part's output that the JSON keeps
_METHODS = ("none", "lora-r4", "lokr-r4", "thin-r4", "balanced-r4", "left64-r1", "core-r16")
_ABOUT = """
import json, platform, torch
from kpsvd_tune import __version__
devices = []
for number in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(number)
    devices.append({"name": found.name, "memory_bytes": found.total_memory,
                    "compute_capability": f"{found.major}.{found.minor}"})
print(json.dumps({"device": devices[0]["name"] if devices else None, "devices": devices,
                  "kpsvd_tune": __version__, "torch": torch.__version__,
                  "cuda": torch.version.cuda, "python": platform.python_version()}))
"""


@dataclass(frozen=True)
class Part:
    """A command, and where it leaves its figures: JSON, or the XML of pytest's --junitxml."""

    name: str
    command: tuple[str, ...]
    seconds: float  # the most that it may take
    figures: Path | None


def parts(folder: Path, device: str) -> list[Part]:
    """The parts of the check, in order; on the CPU the benchmarks alone, with tiny models."""
    is_gpu = device == "cuda"
    model, size = ("llama7b", "llama2-7b-4-layers") if is_gpu else ("tiny", "tiny")
    benchmarks, checkpoint = ROOT / "scripts" / "benchmarks", folder / "checkpoint"
    on = ("--device", device)

    def benchmark(name: str, seconds: float, script: str, *options: str) -> Part:
        figures = folder / f"{name}.json"
        command = (sys.executable, str(benchmarks / f"{script}.py"), *options)
        return Part(name, (*command, "--json", str(figures)), seconds, figures)

    def step(dtype: str, *more: str) -> Part:
        length, turns = ("512", "3") if is_gpu else ("32", "1")
        options = ("--model", model, "--dtype", dtype, "--length", length, "--repetitions", turns)
        methods = ("--methods", *_METHODS, *more)
        return benchmark(f"step-{dtype}", 55, "step", *options, *on, *methods)

    tests = folder / "tests.xml"
    pytest = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-q")
    make = (sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), size, str(checkpoint))
    found = [
        Part("tests", (*pytest, "--junitxml", str(tests)), 230, tests),
        step("float32"),
        step("bfloat16", "lora-r4-16bit"),
        benchmark("generation", 50, "generation", "--model", model, *on),
        benchmark("decomposition", 50, "decompose", *on, *(() if is_gpu else ("--size", "256"))),
        # Merging is work of processor and disk, whatever the device.
        Part("checkpoint", make, 60, None),
        benchmark("merge", 90, "merge", str(checkpoint)),
    ]
    return found if is_gpu else found[1:]


def check(
    asked: Sequence[Part], out: Path, about: dict[str, Any], total: float = TOTAL_SECONDS
) -> int:
    """Run the parts one after the other, and write the JSON after each; the exit code."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    for part in asked:
        limit = min(part.seconds, total - GRACE_SECONDS - (time.monotonic() - began))
        print(f"{part.name}: at most {max(limit, 0):.0f} s", file=sys.stderr, flush=True)
        found[part.name] = run(part, limit)
        told = found[part.name]
        print(f"  {told['status']}, {told['seconds']:.0f} s", file=sys.stderr, flush=True)
        if told["status"] != "ok":
            print(told.get("output", ""), file=sys.stderr, flush=True)
        missing = [each.name for each in asked if each.name not in found]
        write(out, about, found, missing, time.monotonic() - began)
    wrong = [name for name, told in found.items() if told["status"] != "ok"]
    print(f"written: {out}" + (f"; not well: {', '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


def run(part: Part, limit: float) -> dict[str, Any]:
    """What became of a part, and its figures."""
    told: dict[str, Any] = {"status": "not started", "seconds": 0.0, "limit_seconds": limit}
    if limit <= 0:
        return told | {"output": "the parts before it took all the time"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        # A session of its own: what the part has started ends with it.
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
        try:
            code = process.wait(timeout=limit)
            told["status"] = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            told["status"] = "out of time"
            with contextlib.suppress(subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(timeout=GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told["seconds"] = round(time.monotonic() - began, 1)
        if told["status"] != "ok":
            output.seek(0)
            told["output"] = output.read().decode(errors="replace")[-_TAIL:]
    if part.figures is not None:
        try:
            told["figures"] = figures(part.figures)
        except (OSError, ValueError, tree.ParseError) as error:
            if told["status"] == "ok":
                told |= {"status": "failed: it left no figures", "output": str(error)}
    return told


def hear_interrupts() -> None:
    """In a new process: let SIGINT end it, which is ignored in what a script starts with `&`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def figures(file: Path) -> Any:
    """The figures of a part, from its file."""
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    cases = []
    for case in tree.parse(file).getroot().iter("testcase"):
        ends = [each for each in case if each.tag in ("failure", "error", "skipped")]
        told: dict[str, Any] = {
            "test": case.get("name"),
            "outcome": ends[0].tag if ends else "passed",
            "seconds": float(case.get("time", 0)),
        }
        if ends:
            told["why"] = (ends[0].get("message") or "")[:_TAIL]
        told |= {str(each.get("name")): each.get("value") for each in case.iter("property")}
        cases.append(told)
    outcomes = [each["outcome"] for each in cases]
    counts = {each: outcomes.count(each) for each in ("passed", "failure", "error", "skipped")}
    return counts | {"cases": cases}


def write(
    out: Path, about: dict[str, Any], found: dict[str, Any], missing: list[str], seconds: float
) -> None:
    """Write the JSON, whole or not at all."""
    content = {
        **about,
        "is_well": not missing and all(told["status"] == "ok" for told in found.values()),
        "not_well": {k: told["status"] for k, told in found.items() if told["status"] != "ok"},
        "not_run_yet": missing,
        "seconds": round(seconds, 1),
        "parts": found,
    }
    aside = out.with_name(f"{out.name}.part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(out)


def describe() -> dict[str, Any]:
    """The devices and versions, as another process tells them, which holds no memory of a GPU."""
    command = [sys.executable, "-c", _ABOUT]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    about: dict[str, Any] = json.loads(done.stdout)
    return {**about, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny models")
    options = parser.parse_args(arguments)
    out: Path = options.file.resolve()
    if not out.parent.is_dir():
        print(f"gpu_check: {out.parent} is no folder; expected a file in one", file=sys.stderr)
        return 2
    # A SIGTERM ends the part that runs, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about = describe()
    if not about["devices"] and not options.rehearse:
        print(
            "gpu_check: PyTorch finds no CUDA device here; kpsvd-tune doctor says why, and "
            "--rehearse runs the benchmarks on the CPU with tiny models",
            file=sys.stderr,
        )
        return 2
    if options.rehearse:
        about |= {"device": None, "rehearsal": "on the CPU with tiny models: no figure counts"}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        device = "cpu" if options.rehearse else "cuda"
        return check(parts(Path(folder), device), out, about)


if __name__ == "__main__":
    sys.exit(main())
