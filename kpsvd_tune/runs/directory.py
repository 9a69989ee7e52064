"""The folder of one run: where everything lies, who may write it, and where it goes on.

A signal can stop a run between a step and its validation; the checkpoint is then named
`step-000100-pending`. The run that goes on from it first makes that validation. Where a run without
the signal would have saved the step, it commits `step-000100` beside the pending checkpoint, and
only then deletes that one. So it ends with the checkpoints of a run that was never stopped, and
there is a whole one at every moment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.report.events import EVENTS_FILE
from kpsvd_tune.report.results import Event
from kpsvd_tune.report.run_files import SECONDS_KEY, SESSIONS_KEY
from kpsvd_tune.runs.identity import (
    NOT_THE_SAME_BYTES,
    PROCESSES,
    changes,
    refusal,
    run_id,
)
from kpsvd_tune.runs.ownership import is_run, refuse_foreign
from kpsvd_tune.runs.state import TrainingState, from_files, to_files
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.commit import commit, read_committed, run_of
from kpsvd_tune.storage.json_files import as_read_back, read_json, to_json
from kpsvd_tune.storage.locks import lock_folder

_log = logging.getLogger(__name__)
# What a run owns in its folder, in the order in which it is set aside.
_ENTRIES = (
    "recipe.yaml",
    "preflight.json",
    "init",
    "probes",
    "metrics.jsonl",
    EVENTS_FILE,
    "checkpoints",
    "adapter",
    "learned.json",
    "results.json",
    "report.html",
    "run.json",
)
# What may lie beside them before run.json does: earlier runs, and a tracker's files.
_BESIDE = ("previous", "logs")
# The files of init/, by which that of init-only is known.
_INIT_FILES = ("rank_report.", "factors.", "plotly")
# Keys of run.json that say how a session ended.
_OF_THE_END = ("ended", "reason")
_CHECKPOINT = re.compile(r"step-(\d{6,})(-pending)?")


def checkpoint_name(step: int, is_pending: bool = False) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}{'-pending' if is_pending else ''}"


def time_text(seconds: float) -> str:
    """A moment as run.json writes it, from seconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _now() -> str:
    return time_text(time.time())


class Saved(NamedTuple):
    """One checkpoint, whole or not; the larger one is the newer."""

    step: int  # optimiser steps done
    is_settled: bool  # False for a pending one: its step is not done
    folder: Path


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on."""

    checkpoint: Path | None = None  # to continue from; None: from the first step
    is_finished: bool = False  # nothing is left to do; the results are in results.json
    # The folder held this run already, with equal settings: what earlier stages left still holds.
    is_same: bool = False
    # Settings that differ from those of the session before, each as "OLD -> NEW".
    changed: Mapping[str, str] = field(default_factory=dict)


class RunRecord(TypedDict, total=False):
    """What run.json holds that a run goes on by; other keys stay as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    status: str
    id: str
    identity: dict[str, Any]
    changes: list[dict[str, Any]]
    started: str  # of this session
    sessions: list[dict[str, Any]]


class RunDirectory:
    """The layout of `output_dir`, its lock, its logs of metrics and events, and its checkpoints.

    Making it touches nothing. Only the main process writes; others use its paths, and load.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.run_file = self.path / "run.json"
        self.init = self.path / "init"
        self.preflight_file = self.path / "preflight.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.events_file = self.path / EVENTS_FILE
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.learned_file = self.path / "learned.json"
        self.results_file = self.path / "results.json"
        # Of this session until now; run.json then keeps them with each checkpoint and at the end.
        self.device_seconds: Callable[[], float] | None = None
        self._is_begun = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder; the system lifts it however this process ends.

        FolderInUseError: another process holds it; ResourceError: the folder cannot be made.
        """
        durable.make_folder(self.path)
        with lock_folder(self.path):
            yield

    def check_ours(self, resume: str = "auto") -> None:
        """Refuse a folder with files that no run of ours wrote, or that lost the record of its run.

        Raises:
            InputError: The folder holds files of the user's.
            CheckpointError: There are checkpoints, and no run.json that says what they belong to,
                unless `resume` is never; or it names no checkpoint of this run.
        """
        self._named(resume)
        if self.run_file.exists():
            read_json(self.run_file)  # one that is damaged is named as such
            if is_run(self.path) or self._saved():
                return
        if any(is_run(folder) for folder in self.path.glob("previous/*")):
            # A run was set aside here, and the one to follow it was killed before its first file.
            return
        if self._saved():
            if resume == "never":
                return
            raise CheckpointError(
                f"{self.path} holds checkpoints of a run and no run.json that says what they "
                "belong to; put that file back, or pass --resume never to start anew: what is "
                "there is then kept in previous/"
            )
        refuse_foreign(self.path, (*_BESIDE, *(["init"] if self._is_init_ours() else [])))

    def _is_init_ours(self) -> bool:
        """Whether init/ holds what init-only writes, and nothing else."""
        return self.init.is_dir() and all(
            each.name.startswith((".", *_INIT_FILES)) for each in self.init.iterdir()
        )

    def begin(
        self,
        recipe_text: str,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        resume: str = "auto",
        allow_change: Collection[str] = (),
        rebuild: bool = False,
    ) -> Start:
        """Start a run, or find where it goes on.

        A folder whose run never reached a checkpoint is begun again, whatever its settings were:
        there is nothing to lose in it.

        Args:
            recipe_text: The resolved recipe as YAML.
            identity: What must stay the same, as JSON values: `recipe` (a mapping) and anything
                else, such as `base`, `dataset` and `num_processes`.
            about: More for run.json: versions, command, device.
            resume: auto (go on if there is a run), never (set an earlier run aside in
                `previous/`, start from the first step) or the path of a checkpoint.
            allow_change: Dotted keys that may differ from the run's.
            rebuild: Go on from the newest checkpoint of a finished run too, if it has one.

        Raises:
            CheckpointError: The folder holds a run with other settings, or no whole checkpoint.
            InputError: The folder holds files that no run of ours wrote.
        """
        self.check_ours(resume)
        durable.make_folder(self.path)
        if resume == "never":
            self._set_aside()
        if not self.run_file.exists():
            return self._anew(recipe_text, identity, about)
        recorded = read_json(self.run_file, RunRecord)
        # Through JSON first, so that it can be compared with what was read back.
        found = changes(recorded.get("identity", {}), as_read_back(identity))
        explicit = self._named(resume)
        is_finished = recorded.get("status") == "finished" and self.results_file.exists()
        rebuild = rebuild and bool(self._saved())
        if is_finished and not found and explicit is None and not rebuild:
            return Start(is_finished=True, is_same=True)
        checkpoint = explicit or self.newest_checkpoint()
        if checkpoint is None and not is_finished:
            earlier = [] if found else _sessions(recorded)
            return self._anew(recipe_text, identity, about, is_same=not found, earlier=earlier)
        if reason := refusal(found, allow_change):
            raise CheckpointError(
                f"{self.path} holds a run with other settings:\n{reason} "
                "To start another, choose another output_dir or pass --resume never."
            )
        if checkpoint is None:
            raise CheckpointError(
                f"{self.path} holds a finished run without checkpoints, which cannot go on with "
                "other settings; choose another output_dir or pass --resume never"
            )
        state = self._return_to(checkpoint)
        self._end_events()
        durable.replace_file(self.recipe_file, recipe_text.encode())
        history = recorded.get("changes", []) + [
            {"step": state.step, "key": key, "old": old, "new": new}
            # The time until then was that of another number of devices.
            | (
                {"seconds": state.progress.get("seconds", 0.0), "note": NOT_THE_SAME_BYTES}
                if key == PROCESSES
                else {}
            )
            for key, (old, new) in found.items()
        ]
        self._write_run(
            {**recorded, **about, "status": "running", "identity": identity, "changes": history}
            | {SESSIONS_KEY: [*_sessions(recorded), _session(about)]}
        )
        changed = {key: f"{old!r} -> {new!r}" for key, (old, new) in found.items()}
        return Start(checkpoint=checkpoint, is_same=not found, changed=changed)

    def holds_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint, whole or not, that a run could go on from."""
        return bool(self._saved())

    def update(self, **about: Any) -> None:
        """Add to run.json."""
        self._write_run({**read_json(self.run_file, RunRecord), **about})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json and mark the run as finished, in this order."""
        self.replace_results(results)
        self.update(status="finished", ended=_now())

    def replace_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json of a run that is finished already."""
        durable.replace_file(self.results_file, to_json(dict(results)))

    def interrupted(self, status: str, reason: str) -> bool:
        """Record that this session ended before the run did: stopped, or failed.

        False where this session has not begun the run or has finished it: nothing is recorded.
        """
        if not self._is_begun or read_json(self.run_file, RunRecord).get("status") != "running":
            return False
        self.update(status=status, reason=reason, ended=_now())
        return True

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        text = json.dumps(line, allow_nan=False)
        durable.append_file(self.metrics_file, f"{text}\n".encode())

    def tell(self, event: Event) -> None:
        """Append one line to events.jsonl, which no return to a checkpoint shortens.

        It is on the disk afterwards: what was told once is not told again, whatever happens next.
        """
        text = json.dumps(event.to_dict(), allow_nan=False)
        durable.append_file(self.events_file, f"{text}\n".encode())
        durable.sync_file(self.events_file)

    def save(
        self,
        state: TrainingState,
        keep: int,
        best_step: int | None = None,
        *,
        is_pending: bool = False,
        keep_first: bool = False,
    ) -> Path:
        """Commit a checkpoint and give its folder, then delete the oldest beyond the newest `keep`.

        The one of `best_step` stays, however old, and with `keep_first` that of step 0. One that
        `is_pending` waits for a validation of its step, may be saved again after it, and is
        replaced by any newer one. NonFiniteError: a tensor is infinite or NaN; ResourceError leaves
        the earlier checkpoints as they were.
        """
        durable.make_folder(self.checkpoints)
        # The log reaches the disk before the checkpoint that counts on its length.
        state = replace(state, metrics_bytes=durable.sync_file(self.metrics_file))
        folder = self.checkpoints / checkpoint_name(state.step, is_pending)
        commit(folder, to_files(state), self._id())
        self._clean(folder)
        if self.device_seconds is not None:
            self.update()
        for old in self._saved()[keep:]:
            if old.step != best_step and not (keep_first and old.step == 0):
                durable.remove_folder(old.folder)
        return folder

    def rewind(self, accept: Callable[[Mapping[str, Any]], bool] | None = None) -> Path:
        """Go back to the newest whole checkpoint and give it; later ones are moved away.

        `accept` is asked with a checkpoint's `progress`; where it accepts none, the oldest is
        taken.
        """
        checkpoint = self.newest_checkpoint(accept)
        if checkpoint is None:
            raise CheckpointError(f"{self.checkpoints} holds no checkpoint to go back to")
        self._return_to(checkpoint)
        return checkpoint

    def load(self, checkpoint: Path) -> TrainingState:
        """Read a checkpoint, every file checked; CheckpointError names the one that is damaged."""
        return from_files(self._read(checkpoint))

    def newest_checkpoint(
        self, accept: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> Path | None:
        """The newest whole checkpoint; warns of damaged newer ones, CheckpointError if all are.

        With `accept` the newest one whose `progress` it accepts, else the oldest.
        """
        faults: list[str] = []
        refused: Path | None = None
        for _, _, folder in self._saved():
            try:
                files = self._read(folder)
                if accept is not None and not accept(from_files(files).progress):
                    refused = folder
                    continue
            except CheckpointError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                _log.warning("%s; using %s instead", fault, folder.name)
            return folder
        if refused is not None:
            return refused
        if faults:
            raise CheckpointError(
                "no checkpoint of the run can be used:\n  "
                + "\n  ".join(faults)
                + "\nPass --resume never to start again; this run is then kept in previous/."
            )
        return None

    def _return_to(self, checkpoint: Path) -> TrainingState:
        state = self.load(checkpoint)
        if durable.sync_file(self.metrics_file) < state.metrics_bytes:
            _log.warning("%s lost lines that %s counts on", self.metrics_file, checkpoint.name)
        # Before the log is cut: a newer checkpoint that could still be chosen needs those lines.
        self._abandon_newer(checkpoint)
        durable.truncate_file(self.metrics_file, state.metrics_bytes)
        self._clean(checkpoint)
        return state

    def _end_events(self) -> None:
        """Cut off half a line that a kill has left, so that the next one begins a line."""
        if self.events_file.exists():
            durable.truncate_file(self.events_file, self.events_file.read_bytes().rfind(b"\n") + 1)

    def _saved(self) -> list[Saved]:
        """Every checkpoint, newest first, whole or not."""
        found = []
        for folder in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            if match := _CHECKPOINT.fullmatch(folder.name):
                found.append(Saved(int(match[1]), match[2] is None, folder))
        return sorted(found, reverse=True)

    def _clean(self, newest: Path) -> None:
        """Delete pending checkpoints that a newer one replaced, and what kills left behind."""
        for old in self._saved():
            if not old.is_settled and old.folder.name != newest.name:
                durable.remove_folder(old.folder)
        durable.remove_leftovers(self.checkpoints, is_alone=True)
        for leftover in self.checkpoints.glob(".removed-*"):
            durable.remove_folder(leftover)

    def _abandon_newer(self, chosen: Path) -> None:
        """Move newer checkpoints than `chosen` away: damaged ones, or of a path not taken."""
        saved = [each.folder for each in self._saved()]
        for newer in saved[: saved.index(chosen)]:
            abandoned = newer.with_name(f"abandoned-{newer.name}")
            if abandoned.exists():
                durable.remove_folder(abandoned)
            durable.rename(newer, abandoned)

    def _named(self, resume: str) -> Path | None:
        """The checkpoint that a path names; None for auto and never."""
        if resume in ("auto", "never"):
            return None
        saved = [each.folder for each in self._saved()]
        for folder in saved:
            if folder.resolve() == Path(resume).resolve():
                return folder
        one = (
            f"one of {', '.join(map(str, saved))}"
            if saved
            else f"nothing else: {self.path} holds no checkpoint"
        )
        raise CheckpointError(
            f"--resume {resume} is no checkpoint of this run; expected auto, never, or {one}. To "
            "begin with what another run has trained, name its adapter in adapter.from"
        )

    def _id(self) -> str | None:
        """What the run is known by; None for one of an older version."""
        return read_json(self.run_file, RunRecord).get("id") if self.run_file.exists() else None

    def _read(self, checkpoint: Path) -> dict[str, bytes]:
        files = read_committed(checkpoint)
        # A checkpoint that was copied from another run is whole, but belongs to other factors.
        if run_of(checkpoint) != self._id():
            raise CheckpointError(f"{checkpoint} is of another run; was it copied here?")
        return files

    def _anew(
        self,
        recipe_text: str,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        is_same: bool = False,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> Start:
        durable.truncate_file(self.metrics_file, 0)
        durable.truncate_file(self.events_file, 0)
        # First, because this file shows that the others belong to a run.
        self._write_run(
            {"status": "running", **about, "id": run_id(identity), "identity": identity}
            | {SESSIONS_KEY: [*earlier, _session(about)]}
        )
        durable.replace_file(self.recipe_file, recipe_text.encode())
        return Start(is_same=is_same)

    def _write_run(self, content: Mapping[str, Any]) -> None:
        if content["status"] == "running":
            # How an earlier session ended holds no longer.
            self._is_begun = True
            content = {key: content[key] for key in content if key not in _OF_THE_END}
        if self._is_begun:
            content = {**content, SESSIONS_KEY: self._counted(content)}
        durable.replace_file(self.run_file, to_json(content))

    def _counted(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The sessions of run.json with what is known by now of this one, the last."""
        *earlier, own = content[SESSIONS_KEY]
        if self.device_seconds is not None:
            own = {**own, SECONDS_KEY: self.device_seconds()}
        if "ended" in content:
            own = {**own, "ended": content["ended"]}
        return [*earlier, own]

    def _set_aside(self) -> None:
        # A folder with no more than init/ was made by init-only, and is as good as new.
        if not self.run_file.exists() and not self.checkpoints.exists():
            return
        number = 1
        while (folder := self.path / "previous" / f"{number:03d}").exists():
            number += 1
        durable.make_folder(folder)
        # run.json goes last: while it is there, a second try goes on with the rest.
        for name in _ENTRIES:
            if (self.path / name).exists():
                durable.rename(self.path / name, folder / name)
        _log.warning("the earlier run in %s was moved to %s", self.path, folder)


def _session(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"started": about.get("started", _now())}


def _sessions(recorded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sessions until now; older versions kept when the last one started, and no seconds."""
    known = {key: recorded[key] for key in ("started", "ended") if key in recorded}
    found: list[dict[str, Any]] = recorded.get(SESSIONS_KEY, [known])
    return found
