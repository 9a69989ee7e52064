"""Every error this project raises on purpose, and the exit code each one ends a command with.

KpsvdTuneError                 1
├── InputError                 2   the recipe, an option or an input is wrong
│   ├── RecipeError            2   the recipe file or an override
│   ├── DataError              2   the dataset: file, columns, template, rows
│   ├── ModelError             2   the base model: path, format, weights
│   └── AdapterError           2   the adapter: targets, factor shapes, ranks, another base model
├── RunError                   1   the input was fine and the run failed
│   ├── CheckpointError        1   a run directory or checkpoint is damaged or of another run
│   │   └── FolderInUseError   1   another process holds the lock of a run's folder
│   ├── MergeError             1   the merged model is not the model that was trained
│   ├── ExportError            1   what was exported is not the model that was trained
│   ├── HubError               1   the hub cannot be reached, or failed
│   └── ResourceError          1   memory, disk or a process ran out
├── NonFiniteError             3   the loss or the gradient norm became infinite or NaN
├── WorseThanBaseError         4   the run is done and saved, and its adapter is worse than the base
└── StoppedBySignal    130 | 143   SIGINT or SIGTERM arrived; what was done is saved

A second signal, a second or more after the first, ends a training or a comparison at once and
without an error: with UNSAVED_EXIT_CODE, 5, for the steps since the last checkpoint are lost.

The message is written for the user: what was got, what was expected, what to do. Anything else
that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence

# Of a process that a second signal ended while it was finishing and saving.
UNSAVED_EXIT_CODE = 5


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are, for messages about many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def closest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that is spelt most like a word, whatever the case; None where none is near.

    ``cutoff`` says how alike they must be: 0 is nothing in common, 1 the same.
    """
    lowered = {each.lower(): each for each in reversed(list(candidates))}
    found = difflib.get_close_matches(word.lower(), lowered, 1, cutoff)
    return lowered[found[0]] if found else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean lora?", or nothing."""
    found = closest(word, candidates)
    return f"; did you mean {found}?" if found else ""


class KpsvdTuneError(Exception):
    """Base of every error raised on purpose."""

    exit_code: int = 1  # what the command line returns
    is_everywhere: bool = False  # whether every process of a run raises it: one message is enough


class InputError(KpsvdTuneError):
    """Something the user gave is wrong: a recipe, an option, a file."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe or an override is wrong; the message holds one line for each fault."""

    is_everywhere = True


class DataError(InputError):
    """The dataset cannot be read or used as the recipe says."""


class ModelError(InputError):
    """The base model cannot be found, read or used."""


class AdapterError(InputError, ValueError):
    """The adapter does not fit the model, or its settings cannot be met.

    A ValueError too, as PEFT's own errors of this kind are, so that code around PEFT catches it.
    """


class RunError(KpsvdTuneError):
    """The input was accepted and the work itself failed."""


class CheckpointError(RunError):
    """A run directory or checkpoint is incomplete, damaged or of another run."""


class FolderInUseError(CheckpointError):
    """Another process holds the lock of the folder of a run."""


class MergeError(RunError):
    """The merged weights differ from base plus adapter by more than the tolerance."""


class ExportError(RunError):
    """What was exported differs from the adapter on its base by more than the tolerance."""


class HubError(RunError):
    """The hub cannot be reached, or failed."""


class ResourceError(RunError):
    """The machine ran out of something: memory, disk space, a process."""


class NonFiniteError(KpsvdTuneError):
    """The loss or the gradient norm is infinite or NaN."""

    exit_code = 3
    is_everywhere = True


class WorseThanBaseError(KpsvdTuneError):
    """A run is done and saved, and its validation loss is above the one before the first step."""

    exit_code = 4
    is_everywhere = True


class StoppedBySignal(KpsvdTuneError):
    """A signal asked the run to stop; raised after what was done was saved."""

    is_everywhere = True

    def __init__(
        self, signum: int, kept: str = "; what was done is saved", goes_on: bool = True
    ) -> None:
        """Take the number of the signal; the exit code is 128 + signum, as shells have it.

        ``kept`` is the end of the message: where the signal came and what that leaves. ``goes_on``
        says whether the same command goes on from there.
        """
        # No more than these go into `args`, so that the error survives pickling between processes.
        super().__init__(int(signum), kept, goes_on)
        self.signum, self.kept, self.goes_on = int(signum), kept, goes_on
        self.exit_code = 128 + self.signum

    def __str__(self) -> str:
        """Name the signal and say what is kept."""
        try:
            name = signal.Signals(self.signum).name
        except ValueError:
            name = f"signal {self.signum}"
        return f"stopped by {name}{self.kept}"
