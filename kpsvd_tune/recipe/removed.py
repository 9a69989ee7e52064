"""Keys and values of earlier versions: what a recipe that still has them is to use instead.

Where such a key holds its old default nothing was asked for, and it is left out: every recipe that
a run wrote down names all keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kpsvd_tune.recipe.reading import Document, Fault, Path
from kpsvd_tune.recipe.values import show

_FINISH = "; a run that began with it is finished by the version that began it"


class _Removed(NamedTuple):
    """A key that is gone, or a value that a key had."""

    # Of a key its old default, which changes nothing; of a value what stands for it in the recipe
    # of a run that has ended, None for the default of now.
    value: Any
    advice: str  # why it is gone and what to use instead


_KEYS: dict[Path, _Removed] = {
    ("adapter", "gradient_batches"): _Removed(
        4, f"it belonged to adapter.init: gradient, which is gone; leave it out{_FINISH}"
    ),
    ("adapter", "rate_ratio"): _Removed(
        1.0,
        "a ratio of 4 raised the validation loss (0.8154 against 0.8041); leave it out and choose "
        f"train.learning_rate, or adapter.rate: relative{_FINISH}",
    ),
}


def _optimizer(name: str) -> _Removed:
    return _Removed(
        f"torch.optim.{name}",
        f"write torch.optim.{name}, which is the same optimiser; a run that began with the short "
        "name goes on with --allow-change train.optimizer (with train.parallel: fsdp only where it "
        "is Adam or RMSprop)",
    )


# Values of single keys, and of lists, whose other items stay.
_VALUES: dict[Path, dict[str, _Removed]] = {
    ("adapter", "init"): {
        "gradient": _Removed(
            None,
            "it trained to a higher validation loss (0.8486 against 0.8041); use weight, or random "
            f"to compare with{_FINISH}",
        )
    },
    ("adapter", "factor_shape"): {
        "auto": _Removed(
            None, f"no gain of it was ever measured; use balanced, thin, pissa or {{n, p}}{_FINISH}"
        )
    },
    ("train", "optimizer"): {
        each.lower(): _optimizer(each)
        for each in "Adadelta Adagrad Adam Adamax ASGD NAdam RAdam RMSprop".split()
    }
    | {
        "rprop": _Removed(
            "torch.optim.Rprop",
            f"it follows no schedule of the learning rate; use adamw or sgd{_FINISH}",
        )
    },
    ("tracking",): dict.fromkeys(
        ("mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio"),
        _Removed(
            None,
            "it is not among the trackers that the tests run; use tensorboard or wandb, or read "
            "metrics.jsonl in the run's folder, which holds the same numbers",
        ),
    ),
}


def take_removed(document: Document, *, of_run: bool = False) -> None:
    """Take what earlier versions had out of the document, with a fault where it had an effect.

    With `of_run` nothing is a fault: the recipe is read to know a run, whose adapter is as it is.
    """
    for path, removed in _KEYS.items():
        section = _section(document, path)
        if path[-1] not in section:
            continue
        value = section.pop(path[-1])
        if not of_run and value != removed.value:
            told = f"this key was removed (got {show(value)}): {removed.advice}"
            document.faults.append(Fault(document.origin_of(path), path, told))
    for path, values in _VALUES.items():
        section = _section(document, path)
        given = section.get(path[-1])
        listed = given if isinstance(given, list) else [given]
        gone = [each for each in listed if isinstance(each, str) and each in values]
        if not gone:
            continue
        if isinstance(given, list):
            section[path[-1]] = [each for each in given if each not in gone]
        elif (instead := values[gone[0]].value) is None:
            del section[path[-1]]
        else:
            section[path[-1]] = instead
        for each in () if of_run else gone:
            told = f"{each} was removed: {values[each].advice}"
            document.faults.append(Fault(document.origin_of(path), path, told))


def had_no_effect(key: str, value: object) -> bool:
    """Whether a setting (dotted key) that a run began with is a removed key at its old default."""
    return any(
        f".{'.'.join(map(str, path))}".endswith(f".{key.removeprefix('recipe.')}")
        and value == removed.value
        for path, removed in _KEYS.items()
    )


def _section(document: Document, path: Path) -> dict[Any, Any]:
    section: Any = document.value
    for step in path[:-1]:
        section = section.get(step) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}
