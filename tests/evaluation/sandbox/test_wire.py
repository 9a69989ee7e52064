"""What two processes that do not trust each other say to one another."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import math
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kpsvd_tune.evaluation.sandbox.remote import ConversationError, Peer, Remote
from kpsvd_tune.evaluation.sandbox.wire import Codec, WireError


class Stand(SimpleNamespace):
    """A stand-in of an object of the other side, as a codec makes it."""


def codec(*, is_judge: bool) -> Codec:
    return Codec(
        is_judge,
        lambda number, nature, hash_value: Stand(number=number, nature=nature, hash=hash_value),
        lambda value: value.number if isinstance(value, Stand) else None,
    )


@pytest.fixture
def sides() -> tuple[Codec, Codec]:
    """The judge and the program."""
    return codec(is_judge=True), codec(is_judge=False)


VALUES: list[Any] = [
    *(None, True, 0, -1, 2**53, -(2**53), 2**63, 10**5000, 0.1, -0.0, math.inf, 5e-324),
    *("", "ü\0\n", "\ud800", "a" * 10**5, b"", b"\xff\x00", 1j, complex(-0.0, math.inf)),
    *((), (1, (2, ())), [], [[]], {}, {"a": [1], 2: {3}}, set(), {1, "a"}, frozenset({(1,)})),
    *(bytearray(b"\xff"), collections.deque([1]), collections.Counter("aab")),
    *(collections.OrderedDict(b=1, a=2), collections.defaultdict(None, {1: 2})),
    *(range(3), range(5, 1, -2), slice(1, None), ..., NotImplemented),
    *(fractions.Fraction(1, 3), decimal.Decimal("1.10"), decimal.Decimal("-Infinity")),
    *(datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4, 5, 6)),
    *(datetime.time(1, 2, 3, 4), datetime.timedelta(-1, 2, 3)),
    *(int, type(None), ValueError, json.JSONDecodeError, math, os.path),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_arrive_as_they_were(sides: tuple[Codec, Codec], value: Any):
    judge, program = sides
    for sender, receiver in ((judge, program), (program, judge)):
        got = receiver.read(sender.write((value,)))[0]
        assert type(got) is type(value)
        assert repr(got) == repr(value) if not isinstance(value, int) else got == value


def test_views_of_dicts_arrive_as_views(sides: tuple[Codec, Codec]):
    judge, program = sides
    view = {1: 2}
    keys, items, values = judge.read(program.write((view.keys(), view.items(), view.values())))
    assert keys == {1}
    assert items == {(1, 2)}
    assert list(values) == [2]


def test_subclasses_of_scalars_arrive_as_the_exact_type(sides: tuple[Codec, Codec]):
    judge, program = sides
    for base, value in ((int, 5), (float, 0.5), (str, "a"), (bytes, b"a")):
        kind = type("K", (base,), {"__eq__": lambda *_: True, "__hash__": None})
        got = judge.read(program.write(kind(value)))
        assert type(got) is base
        assert got == value


def test_random_values_arrive_as_they_were(sides: tuple[Codec, Codec]):
    judge, program = sides
    numbers = random.Random(0)

    def value(depth: int) -> Any:
        kind = numbers.randrange(9 if depth else 5)
        if kind < 5:
            return (
                None,
                numbers.random() < 0.5,
                numbers.getrandbits(70),
                numbers.gauss(0, 1),
                "x",
            )[kind]
        parts = [value(depth - 1) for _ in range(numbers.randrange(4))]
        if kind == 5:
            return parts
        if kind == 6:
            return tuple(parts)
        if kind == 7:
            return {repr(part): part for part in parts}
        return collections.deque(parts)

    for _ in range(300):
        sent = value(5)
        assert judge.read(program.write(sent)) == sent


def test_any_depth_arrives(sides: tuple[Codec, Codec]):
    judge, program = sides
    value: Any = ()
    for _ in range(20_000):
        value = (value,)
    got, depth = judge.read(program.write(value)), 0
    while got:
        got, depth = got[0], depth + 1
    assert depth == 20_000


def test_changes_are_seen_on_both_sides(sides: tuple[Codec, Codec]):
    judge, program = sides
    ours: list[Any] = [[1], {"a": 1}, {2}]
    theirs = program.read(judge.write(ours))
    theirs[0].append(theirs)
    theirs[1]["b"] = theirs[1].pop("a")
    theirs[2].clear()
    assert judge.read(program.write("done")) == "done"
    assert ours[0][1] is ours
    assert ours[1:] == [{"b": 1}, set()]
    ours[0][:] = [0]
    assert program.read(judge.write(ours)) is theirs
    assert theirs[0] == [0]


def test_true_in_place_of_one_is_a_change(sides: tuple[Codec, Codec]):
    judge, program = sides
    ours: list[Any] = [1]
    theirs = program.read(judge.write(ours))
    theirs[0] = True
    judge.read(program.write(None))
    assert ours[0] is True


def test_what_nobody_holds_is_forgotten(sides: tuple[Codec, Codec]):
    judge, program = sides
    for _ in range(5):
        program.read(judge.write([[1], [2]]))
    assert json.loads(judge.write(None))[0] != []
    held = [1]
    program.read(judge.write(held))
    assert json.loads(judge.write(None))[0] == []
    held.append(2)
    assert json.loads(judge.write(None))[1] != [None]


def test_objects_stay_where_they_are(sides: tuple[Codec, Codec]):
    judge, program = sides
    thing = object()
    stand, again = judge.read(program.write((thing, thing)))
    assert stand is again
    assert stand.nature == ""
    assert stand.hash == stand.number
    assert program.read(judge.write(stand)) is thing
    assert program.owns(thing)
    assert not program.owns(object())


def test_the_nature_of_an_object_is_told(sides: tuple[Codec, Codec]):
    judge, program = sides

    async def coroutine() -> None: ...

    running = coroutine()
    unhashable = type("U", (), {"__hash__": lambda self: [][0]})()
    stands = judge.read(program.write((type("L", (list,), {})(), running, unhashable)))
    running.close()
    assert [each.nature for each in stands] == ["container", "coroutine", ""]
    assert stands[2].hash is None


def test_functions_of_python_go_to_the_program_by_name_only(sides: tuple[Codec, Codec]):
    judge, program = sides
    assert program.read(judge.write((len, str.upper, math.sqrt, json.loads))) == (
        *(len, str.upper, math.sqrt, json.loads),
    )
    assert isinstance(judge.read(program.write(os.system)), Stand)
    assert isinstance(program.read(judge.write(lambda: 0)), Stand)


def test_errors_arrive_with_their_class(sides: tuple[Codec, Codec]):
    judge, program = sides

    class Base(LookupError):
        def __str__(self) -> str:
            return "shown"

    class Own(Base):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a)
            self.b = b

    kind, base = judge.read(program.write((Own, Base)))
    assert issubclass(kind, base)
    assert issubclass(base, LookupError)
    error = judge.read(program.write(Own(1, 2)))
    assert type(error) is kind
    assert (str(error), error.args) == ("shown", (1,))
    assert program.read(judge.write(kind)) is Own
    again = judge.read(program.write(json.JSONDecodeError("m", "d", 0)))
    assert type(again) is json.JSONDecodeError
    assert again.args == ("m: line 1 column 1 (char 0)",)


def test_an_error_that_cannot_be_shown_arrives(sides: tuple[Codec, Codec]):
    judge, program = sides
    kind = type("E", (Exception,), {"__str__": lambda self: [][0]})
    assert str(judge.read(program.write(kind()))) == "an error that cannot be shown"


FORGED: list[Any] = [
    *("", "{", "[]", "1", "[[], []]", "[[], [1, 2]]", "[[], [[]]]", "[[], {}]", "[" * 10**5),
    *([[], [["t", 1]]], [[], [["t", -1]]], [[], [["t", True]]], [[], [1, ["t", 0.5]]]),
    *([[], [["new", "list", 2]]], [[], [["new", "object", 1]]], [[], [["new", "list", "1"]]]),
    *([[], [["ref", 1]]], [[], [["own", 0]]], [[], [["fill", 0]]], [[], [1, ["fill", 0]]]),
    *([[], [["g", "eval"]]], [[], [["g", "__import__"]]], [[], [["n", "os", "system"]]]),
    *([[], [["m", "kpsvd_tune"]]], [[], [["m", "antigravity"]]], [[], [["m", "test.__main__"]]]),
    *([[], [["m", "unittest.__main__"]]], [[], [["m", 1]]], [[], [["x", "os", "system"]]]),
    *(
        [[], [["x", "kpsvd_tune", "a"]]],
        [[], [["xs", [[1, "a"]], "int"]]],
        [[], [["xs", [], "int"]]],
    ),
    *([[], ["os", "a", ["v", "os", "system", 1]]], [[], [1, ["v", "builtins", "eval", 1]]]),
    *([[], [["g", "int"], ["t", 0], "", ["e"]]], [[], [["g", "KeyError"], 1, "", ["e"]]]),
    *([[], [["o", "1", "", 0]]], [[], [["o", 1, "", "0"]]], [[], [["i", "zz"]]], [[], [["b", 1]]]),
    *([[], [["c"]]], [[], [["nothing"]]], [[1], [None]], [[], [["new", "list", 1], 1]]),
    *(
        [[], [["new", "dict", 1], 1, ["fill", 1]]],
        [[], [["new", "set", 1], ["new", "list", 3], ["fill", 1]]],
    ),
]


@pytest.mark.parametrize("message", FORGED, ids=lambda message: str(message)[:40])
def test_forged_messages_are_refused(sides: tuple[Codec, Codec], message: Any):
    judge, _ = sides
    text = message if isinstance(message, str) else json.dumps(message)
    with pytest.raises(WireError):
        judge.read(text.encode())


def test_random_messages_make_plain_values_or_an_error(sides: tuple[Codec, Codec]):
    judge, program = sides
    numbers = random.Random(1)
    message = bytearray(program.write((1, [2, {"a": (3.5, "x")}], ValueError("a"), object())))
    for _ in range(2000):
        mutated = bytearray(message)
        for _ in range(numbers.randrange(1, 4)):
            mutated[numbers.randrange(len(mutated))] = numbers.randrange(32, 127)
        try:
            codec(is_judge=True).read(bytes(mutated))
        except WireError:
            continue


class Thing:
    """An object that lives in the program and claims much."""

    value = 3

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __sub__(self, other: object) -> int:
        return 0

    def __contains__(self, item: object) -> bool:
        return True

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


class Named(tuple[int, ...]):
    """An object derived from a container, which claims too."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = tuple.__hash__


@pytest.fixture
def judge() -> Iterator[Peer]:
    """The judge's side, and in a thread a program that holds a `Thing` and a `Named`."""
    ours, theirs = socket.socketpair()
    served: dict[str, Any] = {
        "thing": Thing,
        "named": lambda: Named((1, 2)),
        "getattr": getattr,
        "len": len,
        "iter": iter,
        "next": next,
        "plain": tuple,
        "eq": lambda a, b: a == b,
        "contains": lambda a, b: b in a,
        "sub": lambda a, b: a - b,
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "back": lambda function: function(2),
        "fail": lambda: [][0],
        "unsendable": lambda: type("U", (), {"__module__": property(lambda self: [][0])}),
    }
    program = Peer(theirs.fileno(), lambda name, args: served[name](*args), is_judge=False)

    def serve() -> None:
        with pytest.raises(ConversationError):
            program.answer_until_the_end()

    thread = threading.Thread(target=serve)
    thread.start()
    yield Peer(ours.fileno(), lambda name, args: args[0](*args[1]), is_judge=True)
    ours.close()
    thread.join(10)
    theirs.close()
    sys.modules.pop("kpsvd_tune_remote", None)
    assert not thread.is_alive()


def test_an_object_decides_nothing_about_plain_values(judge: Peer):
    thing: Any = judge.ask("thing")
    assert type(thing) is Remote
    assert thing != 3
    assert 3 not in [thing]
    assert thing == judge.ask("thing")
    assert thing.value == 3
    assert list(thing) == [1, 2]
    assert 1 in thing
    assert 3 not in thing
    assert thing in thing
    assert (thing - judge.ask("thing")) == 0
    object_: Any = thing
    for compute in (lambda: object_ - 3, lambda: 3 - object_, lambda: object_ < 3):
        with pytest.raises(TypeError, match="an object of the program met a plain value"):
            compute()
    with pytest.raises(TypeError, match="unhashable"):
        hash(thing)


def test_an_object_derived_from_a_container_is_compared_by_its_content(judge: Peer):
    named = judge.ask("named")
    assert named == (1, 2)
    assert named != (1, 3)
    assert named + (3,) == (1, 2, 3)
    assert named < (1, 3)
    assert 2 in named
    assert 3 not in named
    assert hash(named) == hash((1, 2))


def test_questions_nest(judge: Peer):
    assert judge.ask("back", lambda x: judge.ask("thing").value + x) == 5


def test_errors_come_back(judge: Peer):
    with pytest.raises(IndexError, match="list index out of range"):
        judge.ask("fail")
    with pytest.raises(KeyError, match="nothing"):
        judge.ask("nothing")
    assert judge.fault is None


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (b"", "ended before its tests did"),
        (b"\xff\xff\xff\xff", "a message of 4294967295 bytes; at most 67108864 are read"),
        (b"\0\0\0\1{", "a message that cannot be read"),
        (b"\0\0\0\x0b[[], [null]]"[:4] + b"[[],[null]]", "a message of no known kind"),
        (b'\0\0\0\x25[[],["ask",1,["t",0],["t",3]]]       ', "a question without a name"),
        (b'\0\0\0\x25[[],["answer",1,2,["t",3]]]          ', "a message of another length"),
    ],
)
def test_what_no_honest_program_sends_ends_the_conversation(message: bytes, fault: str):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        judge = Peer(ours.fileno(), lambda name, args: None, is_judge=True)
        theirs.sendall(message)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConversationError, match=fault):
            judge.ask("anything")
        assert judge.fault is not None
    sys.modules.pop("kpsvd_tune_remote", None)
