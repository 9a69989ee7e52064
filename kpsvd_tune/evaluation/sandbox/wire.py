"""Python values as text for two processes that do not trust each other.

A value becomes a flat list of steps for a small stack machine, written as JSON. Whatever the
other side sends, reading it can make only exact built-in types, a few value types of the standard
library, exceptions, and references to objects that stay on the other side (`Remote`). No code
of the other side runs while it is read.

Lists, dicts, sets and their like are shared: each has a number, and every message begins with the
new contents of those that changed since the last one. So a function may change a list that it was
given, and both sides see it. Only one side runs at a time.

Imports the standard library alone, because it runs in a bare interpreter too.
"""

from __future__ import annotations

import builtins
import collections
import importlib
import json
import operator
import sys
import types

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MOST_BYTES = 64 * 2**20
_PLAIN_INT = 2**53

# Containers that are shared, by the name they travel under.
_SHARED: dict[str, type] = {
    "list": list,
    "dict": dict,
    "set": set,
    "bytearray": bytearray,
    "deque": collections.deque,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
}
_SHARED_NAMES = {kind: name for name, kind in _SHARED.items()}
# Values of other types, by module and name: what to build them of again.
_VALUES: dict[tuple[str, str], Callable[[Any], tuple[Any, ...]]] = {
    ("builtins", "range"): lambda v: (v.start, v.stop, v.step),
    ("builtins", "slice"): lambda v: (v.start, v.stop, v.step),
    ("builtins", "dict_keys"): lambda v: tuple(v),
    ("builtins", "dict_values"): lambda v: tuple(v),
    ("builtins", "dict_items"): lambda v: tuple(v),
    ("builtins", "ellipsis"): lambda _: (),
    ("builtins", "NotImplementedType"): lambda _: (),
    ("fractions", "Fraction"): lambda v: (v.numerator, v.denominator),
    ("decimal", "Decimal"): lambda v: (str(v),),
    ("datetime", "date"): lambda v: (v.year, v.month, v.day),
    ("datetime", "time"): lambda v: (v.hour, v.minute, v.second, v.microsecond),
    ("datetime", "datetime"): lambda v: (*v.timetuple()[:6], v.microsecond),
    ("datetime", "timedelta"): lambda v: (v.days, v.seconds, v.microseconds),
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    "dict_keys": lambda *keys: dict.fromkeys(keys).keys(),
    "dict_values": lambda *values: dict(enumerate(values)).values(),
    "dict_items": lambda *items: dict(items).items(),
    "ellipsis": lambda: ...,
    "NotImplementedType": lambda: NotImplemented,
}
# Classes that mean the same on both sides.
_BUILT_IN_CLASSES = {
    kind.__name__: kind
    for kind in list[type](
        (
            *(int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset),
            *(object, type, range, slice, type(None)),
        )
    )
} | {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}
# Modules that do something when they are imported, or hold programs that do.
_MODULES_THAT_ACT = {"antigravity", "idlelib", "lib2to3", "test", "this", "turtle", "turtledemo"}
# Base types whose content decides, by a judge's rules, whether an object equals a plain value.
BASES = (list, tuple, dict, set, frozenset, collections.deque)


class WireError(Exception):
    """The other side sent what no honest side sends."""


class _Step(list["Any"]):
    """A step of the stack machine: its name and what it needs."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(parts)


class Codec:
    """Turns values into text and back for one side of a connection.

    The judge names functions and classes of the standard library to the program, which imports
    them; for the program nothing is imported but modules and exceptions of the standard library.
    It is also the judge that tells which shared containers it no longer holds.

    Args:
        is_judge: which side it is; the two number what they share evenly and oddly.
        remote: makes the stand-in of an object of the other side, of (number, nature, hash); its
            nature is "container" for classes derived from one, "coroutine", or empty.
        remote_id: the number of such a stand-in, or None for any other object.
    """

    def __init__(
        self,
        is_judge: bool,
        remote: Callable[[int, str, int | None], Any],
        remote_id: Callable[[Any], int | None],
    ) -> None:
        self._next_id = 0 if is_judge else 1
        self._remote = remote
        self._remote_id = remote_id
        self._is_judge = is_judge
        self._shared: dict[int, list[Any]] = {}  # number: [container, its content when last sent]
        self._shared_ids: dict[int, int] = {}
        self._own: dict[int, Any] = {}
        self._own_ids: dict[int, int] = {}
        self._others: dict[int, Any] = {}
        self._classes: dict[type, int] = {}
        self.is_reading = False

    def owns(self, value: Any) -> bool:
        """Whether the other side was given this very object to ask about."""
        return id(value) in self._own_ids

    # Writing ------------------------------------------------------------------------------------

    def write(self, value: Any) -> bytes:
        """A message: what changed, then a value."""
        steps: list[Any] = []
        for number, entry in list(self._shared.items()):
            if not _same(_content(entry[0]), entry[1]):
                entry[1] = _content(entry[0])
                steps.append(["ref", number])
                self._write(steps, entry[1])
                steps += [["fill", len(entry[1])], ["pop"]]
        forgotten = self._forget() if self._is_judge else []
        self._write(steps, [value])
        return json.dumps([forgotten, steps], check_circular=False).encode("ascii")

    def _forget(self) -> list[int]:
        forgotten = []
        for number in list(self._shared):
            # Held by its entry and by the call on this line, but by nobody else.
            if sys.getrefcount(self._shared[number][0]) <= 2:
                forgotten.append(number)
                self._drop(number)
        return forgotten

    def _drop(self, number: int) -> None:
        container, _ = self._shared.pop(number)
        del self._shared_ids[id(container)]

    def _number(self) -> int:
        self._next_id += 2
        return self._next_id

    def _own_number(self, value: Any) -> int:
        """The number of an object of this side, a new one where it has none."""
        number = self._own_ids.get(id(value))
        if number is None:
            number = self._number()
            self._own[number] = value
            self._own_ids[id(value)] = number
        return number

    def _write(self, steps: list[Any], values: list[Any]) -> None:
        """Write values one after another; no recursion, so that any depth can be written."""
        pending = values[::-1]
        while pending:
            value = pending.pop()
            kind = type(value)
            # By identity: a metaclass may call its classes equal to any.
            is_small = kind is int and abs(value) < _PLAIN_INT
            is_plain = is_small or kind is str or kind is float or kind is bool or value is None
            if is_plain or kind is _Step:
                steps.append(value)
            else:
                pending += reversed(self._parts(value, kind))

    def _parts(self, value: Any, kind: type) -> list[Any]:
        """What is written in place of a value: simpler values, and steps that make it of them."""
        if isinstance(value, int):
            value = int.__int__(value)
            return [value if abs(value) < _PLAIN_INT else _Step("i", hex(value))]
        if isinstance(value, str):
            return [str.__str__(value)]
        if isinstance(value, float):
            return [float.__float__(value)]
        if isinstance(value, bytes):
            return [_Step("b", bytes.hex(value))]
        if isinstance(value, complex):
            return [value.real, value.imag, _Step("c")]
        if kind is tuple or kind is frozenset:
            return [*value, _Step("t" if kind is tuple else "f", len(value))]
        if kind in _SHARED_NAMES:
            return self._parts_of_container(value, _SHARED_NAMES[kind])
        if (number := self._remote_id(value)) is not None:
            return [_Step("own", number)]
        return self._parts_of_object(value, kind)

    def _parts_of_container(self, value: Any, name: str) -> list[Any]:
        number = self._shared_ids.get(id(value))
        if number is not None:
            return [_Step("ref", number)]
        number = self._number()
        content = _content(value)
        self._shared[number] = [value, content]
        self._shared_ids[id(value)] = number
        return [_Step("new", name, number), *content, _Step("fill", len(content))]

    def _parts_of_object(self, value: Any, kind: type) -> list[Any]:
        where = (kind.__module__, kind.__name__)
        # Another type may bear such a name; nothing is imported to find that out.
        if where in _VALUES and (
            where[0] == "builtins" or kind is getattr(sys.modules.get(where[0]), where[1], None)
        ):
            parts = _VALUES[where](value)
            return [*parts, _Step("v", *where, len(parts))]
        if isinstance(value, type):
            if value is _BUILT_IN_CLASSES.get(value.__name__):
                return [_Step("g", value.__name__)]
            if issubclass(value, BaseException):
                return [self._step_of_exception(value)]
        if isinstance(value, BaseException):
            return [kind, value.args, text_of(value), _Step("e")]
        if isinstance(value, type(sys)) and _is_importable(value.__name__):
            return [_Step("m", value.__name__)]
        if self._is_judge and (name := _public_name(value)):
            return [_Step("n", *name)]
        number = self._own_number(value)
        nature = "coroutine" if isinstance(value, types.CoroutineType) else ""
        nature = "container" if isinstance(value, BASES) else nature
        return [_Step("o", number, nature, _hash(value, number))]

    def _step_of_exception(self, value: type[BaseException]) -> _Step:
        if value in self._classes:
            return _Step("own", self._classes[value])
        if _is_importable(value.__module__):
            return _Step("x", value.__module__, value.__name__)
        lineage: list[list[Any]] = []
        for each in value.__mro__:
            if each is _BUILT_IN_CLASSES.get(each.__name__):
                return _Step("xs", lineage, each.__name__)
            lineage.append([self._own_number(each), each.__name__])
        raise AssertionError("every exception has a built-in base")

    # Reading ------------------------------------------------------------------------------------

    def read(self, message: bytes) -> Any:
        """The value of a message, after the changes with it; WireError if `write` wrote none."""
        self.is_reading = True
        touched: list[int] = []
        try:
            forgotten, steps = json.loads(message)
            stack: list[Any] = []
            for step in steps:
                if step == ["pop"]:
                    stack.pop()
                else:
                    is_step = isinstance(step, list)
                    stack.append(self._made(step, stack, touched) if is_step else step)
            (value,) = stack
            for number in forgotten:
                self._drop(number)
        except Exception as error:
            raise WireError(f"{type(error).__name__}: {error}") from None
        finally:
            self.is_reading = False
        for entry in [self._shared[number] for number in touched if number in self._shared]:
            entry[1] = _content(entry[0])
        return value

    def _made(self, step: list[Any], stack: list[Any], touched: list[int]) -> Any:
        """What a step makes of the values on the stack, which it takes from there."""
        match step:
            case ["t", count]:
                return tuple(_take(stack, count))
            case ["f", count]:
                return frozenset(_take(stack, count))
            case ["i", text]:
                return int(text, 16)
            case ["b", text]:
                return bytes.fromhex(text)
            case ["c"]:
                return complex(*_take(stack, 2))
            case ["new", name, number]:
                return self._new_container(_SHARED[name](), number)
            case ["ref", number]:
                return self._shared[number][0]
            case ["fill", count]:
                items = _take(stack, count)
                touched.append(self._shared_ids[id(stack[-1])])
                _fill(stack[-1], items)
                return stack.pop()
            case ["own", number]:
                return self._own[number]
            case ["o", number, nature, hash_value]:
                if number not in self._others:
                    if type(number) is not int or type(hash_value) not in (int, type(None)):
                        raise WireError("an object without a number")
                    self._others[number] = self._remote(number, nature, hash_value)
                return self._others[number]
            case ["v", module, kind, count]:
                if (module, kind) not in _VALUES:
                    raise WireError(f"no value type {module}.{kind}")
                build = _BUILDERS.get(kind) or getattr(importlib.import_module(module), kind)
                return build(*_take(stack, count))
            case ["g", name]:
                return _BUILT_IN_CLASSES[name]
            case ["m", name]:
                return _module(name)
            case ["n", module, name] if not self._is_judge:
                return operator.attrgetter(name)(importlib.import_module(module))
            case ["x", module, name]:
                return _checked_exception(getattr(_module(module), name), name)
            case ["xs", lineage, base_name]:
                return self._exception_class(lineage, base_name)
            case ["e"]:
                return _exception(*_take(stack, 3))
        raise WireError(f"no step {step!r}")

    def _new_container(self, container: Any, number: Any) -> Any:
        is_ours = type(number) is int and number % 2 == self._next_id % 2
        if type(number) is not int or number in self._shared or is_ours:
            raise WireError(f"the number {number!r} cannot be a new one")
        self._shared[number] = [container, []]
        self._shared_ids[id(container)] = number
        return container

    def _exception_class(self, lineage: list[list[Any]], base_name: str) -> type:
        base: Any = _BUILT_IN_CLASSES[base_name]
        for number, name in reversed(lineage):
            if number not in self._others:
                # Its text was made by the other side; it comes with each exception.
                made = type(name, (base,), {"__str__": lambda self: self.__dict__.get("text", "")})
                self._others[number] = made
                self._classes[made] = number
            base = self._others[number]
        return _checked_exception(base, base_name)


def _checked_exception(found: Any, name: str) -> type[BaseException]:
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise WireError(f"{name} is no exception")
    return found


def _is_importable(name: Any) -> bool:
    """Whether a module is of the standard library and importing it only defines things."""
    parts = name.split(".") if isinstance(name, str) else [""]
    known = parts[0] in sys.stdlib_module_names and parts[0] not in _MODULES_THAT_ACT
    return known and not any(part.startswith("_") for part in parts)


def _module(name: Any) -> Any:
    if not _is_importable(name):
        raise WireError(f"no module {name!r}")
    return importlib.import_module(name)


def _take(stack: list[Any], count: Any) -> list[Any]:
    if type(count) is not int or not 0 <= count <= len(stack):
        raise WireError(f"{count!r} values are not there")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _content(container: Any) -> list[Any]:
    """What a shared container holds, as a flat list."""
    if isinstance(container, dict):
        return [part for item in list(container.items()) for part in item]
    return list(container)


def _fill(container: Any, items: list[Any]) -> None:
    if isinstance(container, dict):
        container.clear()
        for key, value in zip(items[::2], items[1::2], strict=True):
            container[key] = value
    elif isinstance(container, bytearray):
        container[:] = bytes(items)
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(items)


def _same(content: list[Any], before: list[Any]) -> bool:
    return len(content) == len(before) and all(map(operator.is_, content, before))


def _hash(value: Any, number: int) -> int | None:
    """The object's own hash, for sets and dict keys; its number where it has none of its own."""
    own_hash: Any = type(value).__hash__
    if own_hash is object.__hash__:
        return number
    try:
        return hash(value)
    except BaseException:
        return None


def text_of(error: BaseException) -> str:
    """What an error says; of one that raises instead, that it does."""
    try:
        return str(error)
    except BaseException:
        return "an error that cannot be shown"


def _public_name(value: Any) -> tuple[str, str] | None:
    """Module and name under which the standard library has a function or class."""
    # Methods of Python's own classes know their class alone.
    module = getattr(value, "__module__", None) or getattr(
        getattr(value, "__objclass__", None), "__module__", None
    )
    name = getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module.split(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return (module, name) if found is value else None


def _exception(kind: Any, args: Any, text: Any) -> BaseException:
    kind = _checked_exception(kind, "what was raised")
    if type(args) is not tuple:
        raise WireError("an exception without arguments")
    try:
        error: BaseException = kind(*args)
    except Exception:
        error = kind.__new__(kind)
        error.args = args
    error.__dict__["text"] = text
    return error
