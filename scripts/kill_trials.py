"""Kills training runs at seeded moments and shows that going on gives the same bytes.

    .venv/bin/python scripts/kill_trials.py --trials 100                kill -9, one process
    .venv/bin/python scripts/kill_trials.py --trials 20 --processes 2   kill -9 of both
    .venv/bin/python scripts/kill_trials.py --trials 30 --signal TERM   with data workers
    ... --processes 2 --parallel fsdp    or zero1, zero2, zero3, which need the extra deepspeed

Every trial starts `kpsvd-tune train` on a tiny model, kills its whole process group, checks that
the kill landed in an unfinished run, types the same command again and compares everything that the
finished run left with an uninterrupted run: adapter, factors, optimiser, random generators, log.
Of the kills a third or more come inside a save, at a random disk operation, before or after it; a
third or more in the middle of an epoch; the rest anywhere from the first stage to the last. One
line a trial; exit code 1 if any failed. The runs are forked from this process, which has imported
everything, and so take a second each instead of ten.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.commit import read_committed
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.training import stages  # noqa: F401  imported once, here, for all runs

STEPS, EPOCH, SAVE_EVERY = 12, 4, 3
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
SECONDS = 120.0
OPERATIONS = ("makedirs", "open", "write", "fsync", "close", "replace", "unlink", "rmdir")


@dataclass(frozen=True)
class Moment:
    """When to kill: at a disk operation inside a save, or some time after a point of the run."""

    kind: str
    number: int
    after: float

    def __str__(self) -> str:
        """Say when, for the log."""
        if self.kind == "save":
            return f"save: {'after' if self.after else 'before'} disk operation {self.number}"
        return f"{self.kind}: {1000 * self.after:.1f} ms after point {self.number}"


class Hook:
    """Inside a run: counts disk operations of saves, may kill at one, and tells of its points."""

    def __init__(self, pipe: int, moment: Moment | None) -> None:
        self.pipe, self.moment, self.count, self.is_saving = pipe, moment, 0, False

    def install(self) -> None:
        """Stand between the package and the disk, and between it and its listener."""
        durable.os = self  # type: ignore[assignment,attr-defined]
        save, step, stage = RunDirectory.save, ConsoleEvents.step, ConsoleEvents.stage

        def saving(*arguments: Any, **options: Any) -> Any:
            self.is_saving = True
            try:
                return save(*arguments, **options)
            finally:
                self.is_saving = False

        def stepped(events: ConsoleEvents, metrics: Any, total: int) -> None:
            step(events, metrics, total)
            self.tell(f"step {metrics.step}")

        def staged(events: ConsoleEvents, text: str) -> None:
            stage(events, text)
            self.tell("stage")

        RunDirectory.save, ConsoleEvents.step, ConsoleEvents.stage = saving, stepped, staged  # type: ignore[assignment,method-assign]

    def tell(self, point: str) -> None:
        """Report a point of the run to the parent."""
        os.write(self.pipe, f"{point};{self.count}\n".encode())

    def __getattr__(self, name: str) -> Any:
        """Give what `os` has, counted where it touches the disk during a save."""
        function: Callable[..., Any] = getattr(os, name)
        if name not in OPERATIONS or not self.is_saving:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            hits = self.moment and self.moment.kind == "save" and self.moment.number == self.count
            if hits and self.moment and not self.moment.after:
                os.killpg(0, signal.SIGKILL)
            result = function(*arguments, **options)
            if hits:
                os.killpg(0, signal.SIGKILL)
            return result

        return call


class Run:
    """One start of the command, forked from this process as one group of ranks."""

    def __init__(self, recipe: Path, folder: Path, processes: int, moment: Moment | None) -> None:
        reading, writing = os.pipe()
        self.log = folder.with_suffix(".log")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.pids: list[int] = []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                os.close(reading)
                self._train(recipe, folder, rank, processes, port, writing, moment)
            os.setpgid(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)
        os.close(writing)
        self.points = os.fdopen(reading, encoding="utf-8")

    def _train(
        self,
        recipe: Path,
        folder: Path,
        rank: int,
        processes: int,
        port: str,
        pipe: int,
        moment: Moment | None,
    ) -> None:
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if processes > 1:
                os.environ |= {
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            if rank == 0:
                Hook(pipe, moment).install()
            code = cli.run(["train", str(recipe), f"output_dir={folder}"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> list[int]:
        """Wait for every rank; give exit codes, minus the number of a signal where one ended it."""
        codes: list[int] = []
        until = time.monotonic() + SECONDS
        for pid in self.pids:
            while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > until:
                    os.killpg(self.pids[0], signal.SIGKILL)
                    raise TimeoutError(f"rank {len(codes)} did not end in {SECONDS:.0f} s")
                time.sleep(0.002)
            codes.append(os.waitstatus_to_exitcode(found[1]))
        return codes

    def orphans_gone(self) -> bool:
        """Whether nothing of the group is left; data workers look for their parent every 5 s."""
        until = time.monotonic() + 15
        while time.monotonic() < until:
            try:
                os.killpg(self.pids[0], 0)
            except ProcessLookupError:
                return True
            time.sleep(0.02)
        return False


def write_inputs(folder: Path, processes: int, workers: int, parallel: str) -> Path:
    """Write a tiny random model, a byte tokenizer, ten rows and a recipe."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": f"{a} and {a * a % 7}?", "completion": f" {a + a * a % 7}"} for a in range(10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""model: {{path: {folder / "model"}, dtype: float32}}
dataset: {{path: {folder / "rows.jsonl"}, validation: 2, template: "{{prompt}}{{completion}}"}}
adapter: {{dropout: 0.1, rank: {{window: 8, max: 2}}}}
train:
  max_steps: {STEPS}
  batch_size: {2 // processes}
  save_every: {SAVE_EVERY}
  eval_every: 4
  num_workers: {workers}
  parallel: {"fsdp" if parallel == "fsdp" else "ddp"}
  precision: "no"
  learning_rate: 1.0e-2
output_dir: unused
"""
    )
    return recipe


def content(folder: Path) -> dict[str, Any]:
    """All that a finished run left, without times, places and the memory that was held."""
    run = RunDirectory(folder)
    last = run.checkpoints / f"step-{STEPS:06d}"
    found: dict[str, Any] = dict(read_committed(last))
    state = json.loads(found.pop("state.json"))
    # Lines of the log hold times, whose number of digits is not fixed.
    del state["metrics_bytes"]
    for other in ("seconds", "peak_memory_bytes"):
        del state["progress"][other]
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    results = json.loads(run.results_file.read_text())
    return found | {
        "state": state,
        "factors": (run.init / "factors.safetensors").read_bytes(),
        "adapter": (run.adapter / "adapter_model.safetensors").read_bytes(),
        "adapter_config": (run.adapter / "adapter_config.json").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "results": {k: results[k] for k in ("train_loss", "validation_loss", "steps", "best_step")},
    }


class Trials:
    """Draws moments and carries out trials against one uninterrupted run."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.random = random.Random(options.seed)
        self.recipe = write_inputs(folder, options.processes, options.workers, options.parallel)
        began = time.monotonic()
        reference = Run(self.recipe, folder / "reference", options.processes, None)
        points = [(line.strip().split(";"), time.monotonic() - began) for line in reference.points]
        if any(reference.wait()):
            raise SystemExit(f"the reference run failed:\n{reference.log.read_text()}")
        end = time.monotonic() - began
        times = [moment for _, moment in points] + [end]
        self.gaps = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
        self.names = [name for (name, _), _ in points]
        self.num_operations = int(points[-1][0][1])
        self.expected = content(folder / "reference")
        print(
            f"reference: {end:.2f} s, {len(points)} points, {self.num_operations} disk operations "
            f"in saves",
            flush=True,
        )

    def draw(self, number: int) -> Moment:
        """A moment of the kind whose turn it is."""
        kind = ("save", "epoch", "any")[number % 3]
        if kind == "save" and self.options.signal == "KILL":
            return Moment(
                kind, self.random.randint(1, self.num_operations), self.random.randint(0, 1)
            )
        is_amid = [
            name.startswith("step") and int(name[5:]) % EPOCH != 0 and int(name[5:]) < STEPS
            for name in self.names
        ]
        choices = [n for n, amid in enumerate(is_amid) if amid or kind == "any"]
        # The last point is followed by the end of the run, which must not win the race.
        point = self.random.choice([n for n in choices if n < len(self.names) - 1])
        return Moment(
            "epoch" if kind == "save" else kind, point, self.random.random() * self.gaps[point]
        )

    def run(self, number: int) -> tuple[str, str]:
        """Carry out one trial: its moment, and what went wrong or nothing."""
        for _ in range(6):
            moment = self.draw(number)
            folder = self.folder / f"trial-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            codes, gone = self._stop(folder, moment)
            # A kill that came too late, as where the reference was slower, is drawn again.
            if codes is not None and not _is_finished(folder):
                break
        else:
            return str(moment), "the run was faster than the kill six times"
        if fault := self._judge(folder, codes, gone):
            return str(moment), fault
        again = Run(self.recipe, folder, self.options.processes, None)
        if any(codes := again.wait()):
            return str(moment), f"going on ended with {codes}: {again.log.read_text()[-1500:]}"
        found = content(folder)
        differing = [name for name in self.expected if found.get(name) != self.expected[name]]
        if differing or found.keys() != self.expected.keys():
            return str(moment), f"differs from the uninterrupted run in {', '.join(differing)}"
        shutil.rmtree(folder)
        return str(moment), ""

    def _stop(self, folder: Path, moment: Moment) -> tuple[list[int] | None, bool]:
        """Start a run and end it: exit codes, None if it was over before; whether all is gone."""
        run = Run(self.recipe, folder, self.options.processes, moment)
        if moment.kind != "save":
            for _ in range(moment.number + 1):
                run.points.readline()
            time.sleep(moment.after)
            number = signal.SIGKILL if self.options.signal == "KILL" else signal.SIGTERM
            try:
                os.killpg(run.pids[0], number)
            except ProcessLookupError:
                run.wait()
                return None, True
        codes = run.wait()
        return (codes if any(codes) else None), run.orphans_gone()

    def _judge(self, folder: Path, codes: list[int] | None, gone: bool) -> str:
        assert codes is not None
        allowed = {-signal.SIGKILL} if self.options.signal == "KILL" else {143, -signal.SIGTERM}
        if not set(codes) <= allowed:
            log = folder.with_suffix(".log").read_text()[-1500:]
            return f"the ranks ended with {codes}, expected {sorted(allowed)}: {log}"
        if not gone:
            return "a process of the group was left behind"
        # Raises where there are checkpoints and none is whole.
        RunDirectory(folder).newest_checkpoint()
        return ""


def _is_finished(folder: Path) -> bool:
    file = RunDirectory(folder).run_file
    return file.exists() and read_json(file).get("status") == "finished"


def main() -> int:
    """Parse, carry out all trials, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM"))
    parser.add_argument(
        "--workers", type=int, default=None, help="data workers; with TERM 1, else 0"
    )
    parser.add_argument(
        "--parallel", default="ddp", choices=("ddp", "fsdp", "zero1", "zero2", "zero3")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.workers is None:
        options.workers = 1 if options.signal == "TERM" else 0
    if options.parallel.startswith("zero"):
        # As `accelerate launch` tells the ranks of its configuration.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = options.parallel[-1]
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    warnings.simplefilter("ignore")
    # Where DeepSpeed is installed, transformers imports it, and it writes to standard output.
    logging.getLogger("DeepSpeed").disabled = True
    torch.set_num_threads(1)
    failed, kinds = 0, dict.fromkeys(("save", "epoch", "any"), 0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-trials-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name, "cache"))
        trials = Trials(Path(name), options)
        for number in range(options.trials):
            try:
                moment, fault = trials.run(number)
            except Exception as error:
                moment, fault = "?", f"{type(error).__name__}: {error}"
            failed += bool(fault)
            kinds[moment.partition(":")[0]] = kinds.get(moment.partition(":")[0], 0) + 1
            print(f"{number + 1:4d} {moment:44s} {fault or 'same bytes'}", flush=True)
    kind = "kill -9" if options.signal == "KILL" else "SIGTERM"
    print(
        f"{kind}, {options.processes} process(es), {options.parallel}, {options.workers} data "
        f"worker(s), seed {options.seed}: {options.trials - failed} of {options.trials} went on to "
        "the same bytes; "
        f"{kinds['save']} inside a save, {kinds['epoch']} mid-epoch, {kinds['any']} "
        f"anywhere; {time.monotonic() - began:.0f} s"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
