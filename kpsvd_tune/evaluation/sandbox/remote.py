"""The conversation of two processes, and the stand-ins of objects that live in the other one.

An object of the other side never decides how it compares with a plain value: such a comparison is
made here, on its content in exact built-in types where its class derives from a container, and is
unequal or an error where it does not. Two objects of the other side are compared over there.

Imports the standard library and `wire` alone, because it runs in a bare interpreter too.
"""

from __future__ import annotations

import _thread  # what `threading` is made of
import operator
import os
import sys

from kpsvd_tune.evaluation.sandbox.wire import MOST_BYTES, Codec, WireError

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_LENGTH_BYTES = 4
_ENDED = "the program ended before its tests did"


class ConversationError(BaseException):
    """The other side has ended, or does not keep to the rules; no test may go on after that."""


class Peer:
    """One side of the conversation over a connected stream socket.

    `serve` answers what the other side asks: (name of the question, its arguments).
    """

    def __init__(
        self, descriptor: int, serve: Callable[[str, tuple[Any, ...]], Any], *, is_judge: bool
    ) -> None:
        if is_judge:
            _judging[:] = [self]
            # A name without dots, under which pickle finds it in a bare interpreter.
            _unpickle.__module__ = "kpsvd_tune_remote"
            sys.modules[_unpickle.__module__] = sys.modules[__name__]
        self.fault: str | None = None  # what ended the conversation
        self._descriptor = descriptor
        self._serve = serve
        # A thread of the program may ask while another waits; one question at a time.
        self._lock = _thread.RLock()
        self.codec = Codec(
            is_judge,
            lambda *described: _stand_in(self, *described),
            lambda value: Remote.number_in(value, self),
        )

    def ask(self, name: str, *args: Any) -> Any:
        """Ask the other side, answering what it asks meanwhile; raises what it raised."""
        with self._lock:
            if self.codec.is_reading:
                raise self._end("a message that asks for more before it is read")
            self._send(self.codec.write(("ask", name, args)))
            while True:
                kind, *rest = self._receive()
                if kind == "ask":
                    self._answer(*rest)
                elif kind == "error" and isinstance(rest[0], BaseException):
                    raise rest[0]
                else:
                    return rest[0]

    def answer_until_the_end(self) -> None:
        """Answer questions until the other side is gone."""
        while True:
            kind, *rest = self._receive()
            if kind != "ask":
                raise self._end("an answer without a question")
            self._answer(*rest)

    def _answer(self, name: str, args: tuple[Any, ...]) -> None:
        try:
            answer = ("answer", self._serve(name, args))
        except ConversationError:
            raise
        except BaseException as error:
            answer = ("error", error)
        try:
            message = self.codec.write(answer)
        except BaseException as error:
            message = self.codec.write(("error", TypeError(f"cannot be sent: {error!r}"[:200])))
        self._send(message)

    def _send(self, message: bytes) -> None:
        data = memoryview(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise self._end(f"{_ENDED} ({error.strerror})") from None

    def _receive(self) -> tuple[Any, ...]:
        length = int.from_bytes(self._read_bytes(_LENGTH_BYTES), "big")
        if length > MOST_BYTES:
            raise self._end(f"a message of {length} bytes; at most {MOST_BYTES} are read")
        try:
            message = self.codec.read(self._read_bytes(length))
        except WireError as error:
            raise self._end(f"a message that cannot be read ({error})") from None
        if type(message) is not tuple or not message or message[0] not in _SHAPES:
            raise self._end("a message of no known kind")
        if [type(part) for part in message[1:]] != _SHAPES[message[0]] and message[0] == "ask":
            raise self._end("a question without a name")
        if len(message) != 1 + len(_SHAPES[message[0]]):
            raise self._end("a message of another length")
        return message

    def _read_bytes(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = os.read(self._descriptor, min(count - len(parts), 2**20))
            except OSError as error:
                raise self._end(f"{_ENDED} ({error.strerror})") from None
            if not part:
                raise self._end(_ENDED)
            parts += part
        return bytes(parts)

    def _end(self, fault: str) -> ConversationError:
        self.fault = self.fault or fault
        return ConversationError(self.fault)


_SHAPES: dict[Any, list[type]] = {"ask": [str, tuple], "answer": [object], "error": [object]}


class Remote:
    """An object of the other side."""

    __slots__ = ("__has_base", "__hash", "__number", "__peer")

    def __init__(self, peer: Peer, number: int, has_base: bool, hash_value: int | None) -> None:
        keep = super().__setattr__
        keep("_Remote__peer", peer)
        keep("_Remote__number", number)
        keep("_Remote__has_base", has_base)
        keep("_Remote__hash", hash_value)

    @staticmethod
    def number_in(value: Any, peer: Peer) -> int | None:
        """The number of a stand-in of this conversation, None for any other object."""
        return value.__number if type(value) is Remote and value.__peer is peer else None

    @staticmethod
    def plain(value: Any) -> Any:
        """A value to compute with: an object's content in an exact built-in type, or TypeError."""
        if type(value) is not Remote:
            return value
        if not value.__has_base:
            raise TypeError(
                "an object of the program met a plain value in an operator. Only numbers, texts "
                "and containers are computed with by the tests."
            )
        return value.__peer.ask("plain", value)

    def __ask(self, name: str, *args: Any) -> Any:
        return self.__peer.ask(name, self, *args)

    def __getattr__(self, name: str) -> Any:
        return self.__ask("getattr", name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it over there."""
        return self.__ask("call", args, kwargs)

    def __eq__(self, other: object) -> bool:
        if type(other) is Remote:
            return self is other or bool(self.__ask("eq", other))
        return self.__has_base and bool(Remote.plain(self) == other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if self.__hash is None:
            raise TypeError("unhashable object of the program")
        return int(self.__hash)

    def __iter__(self) -> Iterator[Any]:
        return _items(self.__peer, self.__ask("iter"))

    def __contains__(self, item: object) -> bool:
        if type(item) is Remote:
            return bool(self.__ask("contains", item))
        if self.__has_base:
            return item in Remote.plain(self)
        return any(each is item or each == item for each in self)

    def __instancecheck__(self, instance: Any) -> bool:
        return bool(self.__ask("isinstance", instance))

    def __subclasscheck__(self, subclass: Any) -> bool:
        return bool(self.__ask("issubclass", subclass))

    def __exit__(self, *exception: Any) -> bool:
        return bool(self.__ask("exit", *exception[:2]))

    def __reduce__(self) -> Any:
        return _unpickle, (self.__ask("pickle"),)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__ask("deepcopy")


def _items(peer: Peer, iterator: Any) -> Iterator[Any]:
    """What an iterator of the other side gives."""
    while True:
        try:
            item = peer.ask("next", iterator)
        except StopIteration:
            return
        yield item


def _stand_in(peer: Peer, number: int, nature: str, hash_value: int | None) -> Any:
    remote = Remote(peer, number, nature == "container", hash_value)
    return _run_over_there(peer, remote) if nature == "coroutine" else remote


async def _run_over_there(peer: Peer, coroutine: Remote) -> Any:
    return peer.ask("await", coroutine)


_judging: list[Peer] = []


def _unpickle(content: Any) -> Any:
    """An object of the program from its own pickle; the program reads it."""
    return _judging[0].ask("unpickle", content)


def _asking(name: str) -> Any:
    def method(self: Remote, *args: Any) -> Any:
        return self._Remote__ask(name, *args)

    return method


def _binary(function: Callable[[Any, Any], Any], *, is_reflected: bool) -> Any:
    def method(self: Remote, other: Any) -> Any:
        left, right = (other, self) if is_reflected else (self, other)
        if type(left) is Remote and type(right) is Remote:
            return self._Remote__ask(function.__name__, other)
        return function(Remote.plain(left), Remote.plain(right))

    return method


# Methods that are the other side's under the same names.
_ASKED = "abs bool complex copy dir enter float format index int invert len neg next pos".split()
_ASKED += "repr reversed round str setattr delattr getitem setitem delitem".split()
_COMPARISONS = "lt le gt ge".split()
_ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split()
for _name in _ASKED:
    setattr(Remote, f"__{_name}__", _asking(_name))
for _name in [*_COMPARISONS, *_ARITHMETIC]:
    _function, _bare = getattr(operator, _name), _name.strip("_")
    setattr(Remote, f"__{_bare}__", _binary(_function, is_reflected=False))
    if _name in _ARITHMETIC:
        setattr(Remote, f"__r{_bare}__", _binary(_function, is_reflected=True))
