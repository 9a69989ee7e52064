"""The judge: runs the tests of a program that runs in another process.

Names that the tests do not define are looked up in the program; what they stand for comes as plain
values or as stand-ins (`remote`). Handed to a bare Python interpreter, so it may import only the
standard library and what is handed over with it. The verdict leaves on what was standard output.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys

from kpsvd_tune.evaluation.sandbox.limits import set_limits
from kpsvd_tune.evaluation.sandbox.remote import Peer
from kpsvd_tune.evaluation.sandbox.wire import text_of

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_TESTS = "__tests__"
# Built-in functions with which tests prepare what they compare.
_HELPERS = set("abs all any bool dict float frozenset int isinstance len list max min".split())
_HELPERS |= set("repr round set sorted str sum tuple type zip".split())


def main(job: dict[str, Any]) -> None:
    """Judge the job; tell "started", then "<status> <detail>"."""
    verdict = os.dup(1)
    os.dup2(2, 1)
    set_limits(job)
    peer = _JudgingPeer(job["socket"])
    peer.ask("hello")
    _tell(verdict, "started", "")
    status, detail = _judge(peer, job["tests"])
    if peer.fault is not None:
        # Whatever the tests made of it: they cannot pass without the program.
        status, detail = "crashed", peer.fault
    _tell(verdict, status, detail)
    os._exit(0)


def _tell(verdict: int, status: str, detail: str) -> None:
    line = f"{status} {' '.join(detail.split())}\n"
    os.write(verdict, line.encode("utf-8", "backslashreplace"))


def _judge(peer: Peer, tests: Sequence[str]) -> tuple[str, str]:
    try:
        peer.ask("compile")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return "invalid", _describe(error)
    except BaseException as error:
        return "failed", _describe(error)
    try:
        peer.ask("run")
        namespace = Namespace(peer, tests)
        for test in tests:
            exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # SystemExit too: a program that leaves has not passed
        return "failed", _describe(error)
    return "passed", ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}"[:200]


class _JudgingPeer(Peer):
    """The judge's side: the program may only use what the tests handed to it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, self._serve_program, is_judge=True)
        self._stdout = sys.stdout

    def ask(self, name: str, *args: Any) -> Any:
        """Ask the program; what it prints comes along where a test collects it."""
        if sys.stdout is self._stdout:
            return super().ask(name, *args)
        stdout = sys.stdout
        answer = super().ask("printing", name, args)
        if type(answer) is not tuple or [type(answer[0]), type(answer[-1])] != [bool, str]:
            raise self._end("an answer of no known kind")
        went_well, value, printed = answer
        stdout.write(printed)
        if not went_well:
            raise value if isinstance(value, BaseException) else RuntimeError("no error")
        return value

    def _serve_program(self, name: str, args: tuple[Any, ...]) -> Any:
        target, *rest = args
        if not self.codec.owns(target):
            raise TypeError("this object was not handed to the program")
        if name == "call":
            return target(*rest[0], **rest[1])
        if name in ("iter", "next", "len", "bool", "str", "repr"):
            return getattr(builtins, name)(target)
        if name == "getitem":
            return target[rest[0]]
        kind = target if isinstance(target, type) else type(target)
        if name in ("getattr", "setattr") and kind.__module__ == _TESTS:
            attribute = rest[0]
            if not isinstance(attribute, str) or attribute.startswith("_"):
                raise AttributeError(f"{attribute!r} is out of the program's reach")
            return getattr(builtins, name)(target, *rest)
        if name == "eq":
            return target is rest[0]
        raise TypeError(f"the program may not use {name} on an object of the tests")


class Namespace(dict[str, object]):
    """Global names of the tests; the rest are the program's.

    A name of Python's own stays Python's, `math.isclose` too, so that a program cannot put its own
    `sorted` into the comparison. The function under test has such a name only where the tests use
    no other name of the program.
    """

    def __init__(self, peer: Peer, tests: Sequence[str]) -> None:
        super().__init__(__name__=_TESTS, __builtins__=builtins.__dict__)
        self._peer = peer
        nodes: list[ast.AST] = []
        for test in tests:
            try:
                nodes += ast.walk(ast.parse(test))
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue  # which is told when its turn comes
        names = {node.id: type(node.ctx) for node in nodes if isinstance(node, ast.Name)}
        used = {name for name in names if names[name] is ast.Load}
        self._protected = {name for name in used if hasattr(builtins, name)}
        if self._protected == used:
            # No other name can be the function under test; a helper is it only where it is alone.
            self._protected &= _HELPERS if used - _HELPERS else set()
        self._modules = {
            node.value.id
            for node in nodes
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in sys.stdlib_module_names
        }

    def __missing__(self, name: str) -> Any:
        if name == "open":
            return self._peer.ask("open")  # files are the program's: the judge sees other ones
        if name in self._protected:
            raise KeyError(name)
        answer = self._peer.ask("lookup", name)
        if type(answer) is not tuple or len(answer) != 2 or answer[0] is not True:
            raise KeyError(name)
        if name in self._modules and type(answer[1]) is not type(sys):
            # "from datetime import datetime": Python's own, whatever the program says it is.
            return getattr(importlib.import_module(name), name)
        return answer[1]
