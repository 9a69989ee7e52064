"""Several processes from one command: exit codes, a dead rank, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from kpsvd_tune import launch
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import InputError
from kpsvd_tune.training.engines.deepspeed_config import launch_environment


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Ranks run this script instead of the package; the test writes it."""
    path = tmp_path / "rank.py"
    original = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return original([sys.executable, str(path), *command[3:]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(launch.subprocess, "Popen", start)  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    return path


def test_every_rank_gets_its_place(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "import os, sys, pathlib\n"
        "names = ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'ACCELERATE_USE_CPU')\n"
        "text = ' '.join([os.environ[name] for name in names] + sys.argv[1:])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(text)\n"
    )
    assert launch.launch(["train", "r.yaml"], 2, use_cpu=True) == 0
    assert (tmp_path / "rank0").read_text() == "2 0 127.0.0.1 true train r.yaml"
    assert (tmp_path / "rank1").read_text() == "2 1 127.0.0.1 true train r.yaml"


DEEPSPEED = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 8
deepspeed_config: {zero_stage: 3}
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
def test_a_configuration_of_accelerate_reaches_every_rank(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.yml"
    file.write_text(DEEPSPEED)
    program.write_text(
        "import os, pathlib\n"
        "names = ('WORLD_SIZE', 'ACCELERATE_USE_DEEPSPEED', 'ACCELERATE_DEEPSPEED_ZERO_STAGE')\n"
        "text = ' '.join([os.environ[name] for name in names])\n"
        "assert 'ACCELERATE_USE_CPU' not in os.environ\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(text)\n"
    )
    assert launch.launch([], 2, use_cpu=True, deepspeed=launch_environment(str(file), 2)) == 0
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text() == "2 true 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEPSPEED.replace("DEEPSPEED", "MULTI_CPU"), "expected DeepSpeed on one machine"),
        (DEEPSPEED.replace("machines: 1", "machines: 2"), "started by accelerate launch on each"),
        ("distributed_type: [", "while parsing"),
        (None, "no such file"),
    ],
    ids=["plain", "machines", "no yaml", "no file"],
)
def test_a_configuration_that_is_not_for_deepspeed_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "ds.yml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"--accelerate-config {file}: .*{message}"):
        launch_environment(str(file), 2)


def test_a_configuration_needs_a_number_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "gsm8k_llama2", "--accelerate-config", "ds.yml"]) == 2
    assert "--accelerate-config needs --gpus N or --processes N" in capsys.readouterr().err


VERBS = (["train", "gsm8k_llama2"], ["eval", "a-model", "--task", "gsm8k", "-o", "out"])


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, ["init-only", "quickstart"]], ids=lambda verb: verb[0])
@pytest.mark.parametrize(("asked", "found"), [(1, 0), (2, 0), (2, 1), (8, 4)])
def test_more_gpus_than_there_are_are_refused_before_anything_starts(
    verb: list[str],
    asked: int,
    found: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setattr(launch.subprocess, "Popen", None)  # type: ignore[attr-defined]
    assert cli.run([*verb, "--gpus", str(asked)]) == 2
    err = capsys.readouterr().err
    number = {0: "no CUDA GPUs", 1: "1 CUDA GPU", 4: "4 CUDA GPUs"}[found]
    fewer = f"ask for at most {found}, or " if found else ""
    assert err == (
        f"error: --gpus {asked}: PyTorch sees {number} here (CUDA_VISIBLE_DEVICES is '0,1,2,3'); "
        f"{fewer}share the work over CPU processes with --processes {asked}\n"
    )


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_enough_gpus_are_passed_on(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    seen: list[tuple[int, bool]] = []

    def start(_words: list[str], count: int, use_cpu: bool, _config: str | None) -> int:
        seen.append((count, use_cpu))
        return 7

    monkeypatch.setattr(launch, "launch", start)
    assert cli.run([*verb, "--gpus", "2"]) == 7
    assert seen == [(2, False)]


def test_gpus_are_refused_where_the_environment_asks_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cli.run(["train", "gsm8k_llama2", "--gpus", "2"]) == 2
    assert "--gpus 2: the environment says ACCELERATE_USE_CPU=true" in capsys.readouterr().err


@pytest.mark.slow
def test_gpus_of_this_machine_are_counted_as_pytorch_counts_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune", "train", "gsm8k_llama2", "--gpus", "64"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --gpus 64: PyTorch sees "), done.stderr
    assert done.stderr.endswith("with --processes 64\n")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_the_first_failure_is_the_exit_code(program: Path) -> None:
    program.write_text("import os, sys\nsys.exit(3 if os.environ['RANK'] == '1' else 0)\n")
    assert launch.launch([], 2, use_cpu=True) == 3


@pytest.mark.slow
def test_a_killed_rank_ends_those_that_wait_for_it(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    assert launch.launch([], 2, use_cpu=True) == 128 + signal.SIGKILL
    # Long before the other's own end; a busy machine is slow.
    assert time.monotonic() - began < 200
    err = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL while starting; most likely memory ran out: " in err
    assert "are free now. Fewer --processes, or a lower train.batch_size" in err
    assert "stopping rank 0, which still waits" in err


def test_a_killed_rank_is_named_though_another_failed_before_it_was_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import os, signal, sys\nos.kill(os.getpid(), signal.SIGKILL) if {} else sys.exit(1)\n"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code.format(is_killed)])
        for is_killed in (False, True)
    ]
    for rank in ranks:
        rank.wait()
    phases = [tmp_path / "0", tmp_path / "1"]
    assert launch._wait(ranks, phases, ()) == 128 + signal.SIGKILL
    assert "error: rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_a_signal_reaches_every_rank_once(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 30.0)  # a busy machine ends ranks slowly
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        f"    path = pathlib.Path({str(tmp_path)!r}, 'got' + os.environ['RANK'])\n"
        "    with path.open('a') as file:\n        file.write('x')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    handler = signal.getsignal(signal.SIGTERM)
    assert launch.launch([], 2, use_cpu=True) == 143
    sender.join()
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == ["x", "x"]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_two_signals_at_once_are_one_request(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 30.0)  # a busy machine ends ranks slowly
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(number, frame):\n    time.sleep(0.5)\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    # A rank that is killed would end with 137.
    assert launch.launch([], 2, use_cpu=True) == 143
    sender.join()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["ranks end", "ranks hang"])
def test_a_second_signal_ends_the_ranks_with_a_code_of_its_own(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ends: bool,
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 60.0)
    monkeypatch.setattr(launch, "_FORCED_SECONDS", 15.0 if ends else 0.2)
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "count = 0\n"
        "def stop(number, frame):\n"
        "    global count\n    count += 1\n"
        f"    if count == 2 and {ends}:\n        os._exit(5)\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(number, stop)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "while True:\n    time.sleep(1)\n"
    )

    def send() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.3)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch.launch([], 2, use_cpu=True) == 5
    sender.join()
    expected = "" if ends else "stopped at once by a second signal: what was not saved is lost\n"
    assert capfd.readouterr().err == expected


LISTENING = """
import os, pathlib, sys
from kpsvd_tune.launch import init_method
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training import make_accelerator
from kpsvd_tune.processes import end_processes, gather_numbers

accelerator = make_accelerator(TrainRecipe(precision="no"), init_method=init_method())
both = gather_numbers(accelerator, [accelerator.process_index])
own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{fd}")}
found = []
for table in ("tcp", "tcp6"):
    for line in pathlib.Path("/proc/self/net", table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # listens
            found.append(fields[1].partition(":")[0])
pathlib.Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(f"{both} {found}")
gather_numbers(accelerator, [0])
end_processes()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_of_one_machine_listen_to_no_other(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 60.0)
    program.write_text(LISTENING)
    assert launch.launch([str(tmp_path)], 2, use_cpu=True) == 0
    for rank in range(2):
        both, _, found = (tmp_path / f"rank{rank}").read_text().partition("] [")
        assert both == "[[0.0], [1.0]"
        # 127.0.0.1 as the kernel writes it; gloo listens, and nothing else.
        assert set(found.rstrip("]").split(", ")) == {"'0100007F'"}


def test_without_a_launcher_torch_finds_the_others_by_its_own_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert launch.init_method() is None
    for name, value in ((launch.RENDEZVOUS, "/x/store"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert launch.init_method() == "file:///x/store?rank=1&world_size=2"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch.init_method() == "file:///x/store"


def test_a_phase_is_told_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "phase"
    monkeypatch.setenv(launch.PHASE_FILE, str(file))
    launch.tell_phase("training, step 3 of 100")
    assert launch._phase(file) == "while training, step 3 of 100"

    def die(*_: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("kpsvd_tune.launch.os.replace", die)
    launch.tell_phase("training, step 4 of 100")
    assert launch._phase(file) == "while training, step 3 of 100"
