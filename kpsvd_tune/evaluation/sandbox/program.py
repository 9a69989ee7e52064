"""What runs the program under test: set limits, run it, then answer what the judge asks of it.

It holds no test and no expected value. Whatever the program does to this process, the judge sees
nothing but answers (`judge`). Handed to a bare Python interpreter, so it may import only
the standard library and what is handed over with it.
"""

from __future__ import annotations

import builtins
import importlib
import io
import operator
import os
import sys
import types

from kpsvd_tune.evaluation.sandbox.limits import set_limits
from kpsvd_tune.evaluation.sandbox.remote import ConversationError, Peer
from kpsvd_tune.evaluation.sandbox.wire import BASES

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Frames of ours below every call of the program, which must not shorten its own recursion.
_OUR_FRAMES = 20


def main(job: dict[str, Any]) -> None:
    """Run the job's program and serve it until the judge is gone."""
    set_limits(job)
    sys.setrecursionlimit(sys.getrecursionlimit() + _OUR_FRAMES)
    # Registered as a module, because dataclasses and pickle look their classes' module up.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    served = _served(job["program"], module)
    peer = Peer(job["socket"], lambda name, args: served[name](*args), is_judge=False)
    try:
        peer.answer_until_the_end()
    except ConversationError:
        pass
    finally:
        os._exit(0)


def _served(source: str, module: types.ModuleType) -> Mapping[str, Callable[..., Any]]:
    """What the judge may ask, by name: these, and the functions of `operator` and Python's own."""
    compiled: list[types.CodeType] = []
    named = {
        **vars(builtins),
        **vars(operator),
        "hello": lambda: None,
        "compile": lambda: compiled.append(compile(source, "<program>", "exec", dont_inherit=True)),
        "run": lambda: exec(compiled[0], module.__dict__),
        "lookup": lambda name: (name in module.__dict__, module.__dict__.get(name)),
        "await": _later("asyncio", "run"),
        "open": lambda: open,
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "plain": _plain,
        "enter": lambda value: type(value).__enter__(value),
        "exit": lambda value, kind, error: type(value).__exit__(value, kind, error, None),
        "isinstance": lambda kind, value: isinstance(value, kind),
        "issubclass": lambda kind, value: issubclass(value, kind),
        "pickle": _later("pickle", "dumps"),
        "unpickle": _later("pickle", "loads"),
        "copy": _later("copy", "copy"),
        "deepcopy": _later("copy", "deepcopy"),
    }
    return named | {"printing": lambda name, args: _printing(named[name], args)}


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is first called."""
    return lambda *args: getattr(importlib.import_module(module), name)(*args)


def _printing(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any, str]:
    """(whether it went well, answer or error, what it printed)."""
    collected = io.StringIO()
    stream, sys.stdout = sys.stdout, collected
    try:
        try:
            answer = (True, function(*args))
        except BaseException as error:
            answer = (False, error)
        return (*answer, collected.getvalue())
    finally:
        sys.stdout = stream


def _plain(value: Any) -> Any:
    """An object's content in the exact built-in type that its class derives from."""
    base = next(base for base in BASES if isinstance(value, base))
    if base is dict:
        return {key: dict.__getitem__(value, key) for key in dict.__iter__(value)}
    return base(base.__iter__(value))
