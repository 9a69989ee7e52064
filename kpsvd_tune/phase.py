"""What a command is doing now, and what it says when a signal or a lack of memory ends it there."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kpsvd_tune.errors import KpsvdTuneError, StoppedBySignal
from kpsvd_tune.launch import tell_phase
from kpsvd_tune.recipe import EvaluationRecipe, Recipe
from kpsvd_tune.signals import StopSignals
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory


class Phase:
    """The stage a command is in, for the message when it ends there, or another process does."""

    def __init__(self) -> None:
        self.name = "starting"
        self.cures: Sequence[str] = ()
        self.kept = ""

    def enter(self, name: str, cures: Sequence[str] = (), kept: str = "") -> None:
        """Begin a stage, and tell the launcher its name.

        The name is such as "training, step 3 of 100". `cures` helps when memory runs out, the most
        useful first; `kept` is what a stop leaves, such as "finished matrices are kept".
        """
        self.name, self.cures, self.kept = name, cures, kept
        tell_phase(name)


@contextmanager
def watched(*, goes_on: bool = True) -> Iterator[Phase]:
    """Turn a signal or a lack of memory inside into an error that names the phase.

    SIGINT and SIGTERM stop the command at once, because its stages have nothing to finish; only the
    training handles them in its own way. `goes_on` says that the same command, typed again, goes on
    where this one was stopped.

    Raises:
        StoppedBySignal: The message says in which phase, and what is kept.
        ResourceError: Memory ran out; the message says how much was asked for and is free, and what
            helps in that phase.
    """
    phase = Phase()
    signals = StopSignals(
        lambda: f"stopping as soon as the computation in progress returns ({phase.name})",
        lambda: phase.kept or "nothing that was finished is lost",
        is_immediate=True,
    )
    try:
        with signals:
            yield phase
    except StoppedBySignal:
        raise
    except (KeyboardInterrupt, Exception) as error:
        # When a signal has stopped one process, the others fail in other ways.
        if isinstance(error, Exception) and not signals.requested:
            if isinstance(error, KpsvdTuneError) or not is_out_of_memory(error):
                raise
            raise out_of_memory(error, phase.name, phase.cures) from error
        kept = f"; {phase.kept}" if phase.kept else ""
        number = signals.requested or signal.SIGINT
        raise StoppedBySignal(number, f" while {phase.name}{kept}", goes_on) from error


def loading_cures(dtype: str, key: str = "model.dtype") -> list[str]:
    """What helps to load a base model of that dtype, which ``key`` sets."""
    half = f"{key} bfloat16, which holds the weights in half the memory (now {dtype})"
    return [
        *([half] if dtype == "float32" else []),
        "fewer processes on this machine: each loads the whole base",
        "a smaller base model, or other programs ended",
    ]


def data_cures(recipe: Recipe) -> list[str]:
    """What helps to read the data."""
    length = recipe.dataset.max_length if recipe.dataset else None
    return [
        "dataset.streaming: true, for a set of the hub",
        "a smaller part of it: dataset.split, or a smaller file",
        f"a lower dataset.max_length (now {length})",
    ]


def decomposition_cures(recipe: Recipe) -> list[str]:
    """What helps to decompose, and to train meanwhile where the recipe asks for that."""
    adapter = recipe.adapter
    trains = adapter.rank.energy == "auto"
    return [
        *(training_cures(recipe) if trains else ()),
        f"a lower adapter.rank.window (now {adapter.rank.window}): fewer terms are computed",
        "fewer processes: each holds a matrix and its terms",
        "adapter.target_modules without the largest matrices",
    ]


def training_cures(recipe: Recipe) -> list[str]:
    """What helps to train: the same steps with fewer rows at a time, then less of everything."""
    train, cures = recipe.train, []
    if train.batch_size > 1:
        rows, twice = (train.batch_size + 1) // 2, 2 * train.gradient_accumulation
        cures.append(
            f"train.batch_size={rows} train.gradient_accumulation={twice}: half of the rows at a "
            "time in the same steps; train.on_oom=halve does that by itself, in one process"
        )
    if not train.gradient_checkpointing:
        cures.append("train.gradient_checkpointing=true: activations are computed twice, not kept")
    if recipe.dataset is not None:
        cures.append(f"a lower dataset.max_length (now {recipe.dataset.max_length}): shorter rows")
    if recipe.model.dtype == "float32":
        cures.append("model.dtype=bfloat16: the base in half the memory")
    if recipe.model.quantization is None and recipe.model.device_map is None:
        cures.append("model.quantization=nf4: the base in a quarter of bfloat16's memory")
        if train.gradient_checkpointing:
            cures.append(
                "on a GPU, model.device_map=auto: blocks that do not fit stay in the host's memory"
            )
    return cures[:3]


def answering_cures(tasks: Sequence[EvaluationRecipe]) -> list[str]:
    """What helps to score."""
    sizes = ", ".join(f"{task.task}: {task.batch_size}" for task in tasks)
    return [
        f"a lower batch_size of the evaluation (now {sizes}): fewer questions at a time",
        "a lower max_new_tokens, or fewer shots: shorter texts",
        "--dtype bfloat16 of `eval`: the model in half of float32's memory",
    ]


def merging_cures() -> list[str]:
    """What helps to merge, where the logits of the base and of the result are compared."""
    return [
        "--proof tensors: the model is not loaded, and every tensor is compared as it is written",
        "a machine with more memory: to compare logits, the model is held in float32",
        "other programs ended",
    ]


def exporting_cures() -> list[str]:
    """What helps to export, which holds the base in float32, and later a second process too."""
    return [
        "a machine with more memory: the base is held in float32",
        "a lower --max-rank: fewer directions of each update are kept",
        "other programs ended",
    ]
