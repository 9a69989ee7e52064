"""The judge from outside: honest programs of every kind pass, no cheat does."""

from __future__ import annotations

import textwrap

import pytest
from cheats import CHEATS, CHEATS_OF_HELPERS, TESTS

from kpsvd_tune.evaluation.sandbox import (
    Limits,
    Program,
    RunResult,
    Sandbox,
    run_program,
    sandbox_available,
)

# Without bubblewrap the judge is a process of its own too, so the same must hold.
SANDBOX: Sandbox = "bwrap" if sandbox_available() else "none"


def judge(source: str, *tests: str) -> RunResult:
    limits = Limits(cpu_seconds=2, wall_seconds=20)
    program = Program(textwrap.dedent(source), tuple(textwrap.dedent(test) for test in tests))
    return run_program(program, SANDBOX, limits)


def test_there_are_enough_cheats():
    assert len(CHEATS) >= 40
    assert judge("def f(x): return x + 1", *TESTS).passed


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str):
    result = judge(CHEATS[name], *TESTS)
    assert not result.passed
    assert result.status in ("failed", "crashed", "timeout"), result


@pytest.mark.parametrize("name", CHEATS_OF_HELPERS)
def test_no_cheat_reaches_what_the_tests_compare_with(name: str):
    source, test = CHEATS_OF_HELPERS[name]
    assert not judge(source, test).passed


def test_cheats_fail_without_a_sandbox_too():
    for name in ("exec replaced", "tests cleared through gc", "equal to everything"):
        assert not run_program(Program(CHEATS[name], TESTS), "none").passed, name


HONEST = {
    "argument changed in place": (
        "def f(x):\n x.append(1)\n x[0].append(2)",
        "a = [[1]]\nf(a)\nassert a == [[1, 2], 1]",
    ),
    "dict, set and bytearray changed": (
        "def f(d, s, b):\n d['k'] = d.pop('j')\n s.add(3)\n b.extend(b'x')",
        "d, s, b = {'j': 1}, {2}, bytearray(b'a')\nf(d, s, b)\n"
        "assert (d, s, b) == ({'k': 1}, {2, 3}, bytearray(b'ax'))",
    ),
    "the same object back": ("def f(x): return x", "a = [1]\nassert f(a) is a"),
    "attribute changed by the test": (
        "class S:\n def __init__(s): s.items = []\n def pop(s): return s.items.pop()",
        "s = S()\ns.items.append(3)\nassert s.pop() == 3 and s.items == []",
    ),
    "cache of the program": (
        "cache = {}\ndef f(x):\n cache[x] = 1\n return cache",
        "c = f(1)\nf(2)\nassert c == {1: 1, 2: 1}",
    ),
    "list in itself": ("def f():\n x = []\n x.append(x)\n return x", "x = f()\nassert x[0] is x"),
    "callback": (
        "def f(k, x): return sorted(x, key=k)",
        "assert f(lambda v: -v, [1, 3, 2]) == [3, 2, 1]",
    ),
    "callback in threads": (
        "from concurrent.futures import ThreadPoolExecutor as T\n"
        "def f(k, x):\n with T(3) as p: return list(p.map(k, x))",
        "assert f(lambda v: v + 1, [1, 2, 3]) == [2, 3, 4]",
    ),
    "callback that raises": (
        "def f(k):\n try: k()\n except IndexError as e: return str(e)",
        "def k(): raise IndexError('i')\nassert f(k) == 'i'",
    ),
    "functions of Python": (
        "def f(k, x): return k(x)",
        "import math\nassert f(len, [1]) == 1 and f(str.upper, 'a') == 'A'\n"
        "assert f(int, '3') == 3 and f(math.sqrt, 4) == 2",
    ),
    "class of the tests": (
        "def f(t): return 0 if t is None else 1 + max(f(t.left), f(t.right))",
        "class T:\n def __init__(s, l=None, r=None): s.left, s.right = l, r\n"
        "assert f(T(T(), T(T()))) == 3",
    ),
    "object of the tests back": (
        "def f(x): return [x]",
        "class T: pass\nt = T()\nassert f(t)[0] is t",
    ),
    "generator": (
        "def f(n):\n for i in range(n): yield i",
        "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6\n"
        "a, b = f(2)\nassert next(f(1)) == 0",
    ),
    "map": ("def f(): return map(str, [1, 2])", "assert list(f()) == ['1', '2']"),
    "error of its own": (
        "class E(ValueError):\n def __str__(s): return 'own'\ndef f(): raise E(3)",
        "try: f()\nexcept E as e: assert str(e) == 'own'\nelse: assert 0",
        "try: f()\nexcept ValueError: pass\nelse: assert 0",
    ),
    "error of Python": (
        "def f(): raise KeyError('a')",
        "try: f()\nexcept KeyError as e: assert e.args == ('a',)\nelse: assert 0",
    ),
    "error of a module": (
        "import json\ndef f(): return json.loads('{')",
        "import json\ntry: f()\nexcept json.JSONDecodeError as e: assert 'line 1' in str(e)\n"
        "else: assert 0",
    ),
    "numbers": (
        "def f(): return float('nan'), 10**5000, -0.0, 1j, True, -7",
        "a = f()\nassert a[0] != a[0] and a[1] == 10**5000 and str(a[2]) == '-0.0'\n"
        "assert a[3:] == (1j, True, -7) and a[4] is True",
    ),
    "texts": (
        "def f(): return 'ü\\ud800\\0', b'\\xff'",
        "assert f() == ('ü\\ud800\\0', b'\\xff')",
    ),
    "deep nesting": (
        "def f(n):\n x = []\n for _ in range(n): x = [x]\n return x",
        "x, n = f(5000), 0\nwhile x: x, n = x[0], n + 1\nassert n == 5000",
    ),
    "deep recursion": (
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)",
        "assert f(950) == 950\ntry: f(5000)\nexcept RecursionError: pass\nelse: assert 0",
    ),
    "printed text": (
        "def f(): print('hey')",
        "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b): f()\n"
        "assert b.getvalue() == 'hey\\n'",
    ),
    "collections": (
        "from collections import *\n"
        "def f(): return Counter('aab'), OrderedDict(a=1), deque([1]), defaultdict(int, a=1)",
        "a, b, c, d = f()\nassert a.most_common(1) == [('a', 2)] and b == {'a': 1} == d\n"
        "assert list(c) == [1] and a == Counter('aba')",
    ),
    "value types": (
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "from datetime import date, timedelta\n"
        "def f(): return Fraction(1, 3), Decimal('1.10'), date(2020, 1, 2), timedelta(1), range(3)",
        "from fractions import Fraction\nimport decimal, datetime\n"
        "assert f() == (Fraction(1, 3), decimal.Decimal('1.10'), datetime.date(2020, 1, 2), "
        "datetime.timedelta(1), range(3))\nassert f()[2] == date(2020, 1, 2)",
    ),
    "views": (
        "d = {1: 2}\ndef f(): return d.keys(), d.items(), d.values()",
        "k, i, v = f()\nassert k == {1} and i == {(1, 2)} and list(v) == [2]",
    ),
    "namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2) and f().x == 1 and f()[1] == 2 and f() == P(1, 2)\n"
        "x, y = f()\nassert [f()] == [(1, 2)] and f() in {(1, 2)} and 2 in f()\n"
        "assert sorted([f(), P(0, 1)]) == [(0, 1), (1, 2)] and f() + (3,) == (1, 2, 3)",
    ),
    "enum": (
        "import enum\nclass C(enum.Enum):\n R = 1\ndef f(): return C.R",
        "assert f() is C.R and f() == C(1) and C['R'].value == 1 and {C.R: 1}[f()] == 1",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\n y: int = 0\n"
        "def f(): return P(1)",
        "import copy\nassert f() == P(1, 0) and f() != P(2) and repr(f()) == 'P(x=1, y=0)'\n"
        "p = P(x=1)\np.x = 5\nq = copy.deepcopy(p)\nq.x = 6\nassert (p.x, q.x) == (5, 6)\n"
        "del p.x\nassert not hasattr(p, 'x') and hasattr(q, 'y')",
    ),
    "operators": (
        """
        class V:
            def __init__(s, x): s.x = x
            def __add__(s, o): return V(s.x + o.x)
            def __neg__(s): return V(-s.x)
            def __lt__(s, o): return s.x < o.x
            def __len__(s): return s.x
            def __getitem__(s, i): return i
            def __bool__(s): return s.x > 0
            def __enter__(s): return s
            def __exit__(s, *a): s.x = 99; return True
            def __call__(s, a, *, b=1): return a + b
            def __format__(s, spec): return spec + str(s.x)
            def __float__(s): return 0.3
        """,
        "import math\nassert (V(1) + V(2)).x == 3 and (-V(1)).x == -1 and max(V(1), V(3)).x == 3\n"
        "assert len(V(4)) == 4 and V(1)[5] == 5 and not V(0) and V(1)(1, b=5) == 6\n"
        "assert f'{V(2):a}' == 'a2' and math.isclose(V(1), 0.3)\n"
        "v = V(1)\nwith v: raise ValueError\nassert v.x == 99 and isinstance(v, V)",
    ),
    "global that changes": (
        "x = 0\ndef f():\n global x\n x += 1",
        "f()\nf()\nassert x == 2",
    ),
    "set-up with its classes": (
        "class Node:\n def __init__(s, v): s.v, s.left = v, None\n"
        "def f(n): return 0 if n is None else n.v + f(n.left)",
        "root = Node(1)\r\nroot.left = Node(2)\r\n",
        "assert f(root) == 3",
    ),
    "name of a built-in function": ("def sum(a, b): return 6", "assert sum(10, 15) == 6"),
    "helper beside it": ("def sum(a, b): return [6]", "assert set(sum(1, 2)) == {6}"),
    "modules of the program": (
        "import sys, datetime\nfrom datetime import datetime",
        "assert sys.getsizeof(()) > 0 and datetime.strptime('2020', '%Y') == datetime(2020, 1, 1)",
    ),
    "coroutine": (
        "async def f(x): return x + 1",
        "import asyncio\nassert asyncio.run(f(1)) == 2",
    ),
    "pool of processes": (
        "from multiprocessing import Pool\ndef sq(x): return x * x\n"
        "def f(x):\n with Pool(2) as p: return p.map(sq, x)",
        "assert f([1, 2, 3]) == [1, 4, 9]",
    ),
    "many calls": ("def f(x): return x", "for i in range(2000): assert f([i]) == [i]"),
    "large value": ("def f(n): return list(range(n))", "assert f(10**5) == list(range(10**5))"),
    "types as values": (
        "def f(s): return eval(s)",
        "assert f('int') is int and f('ValueError') is ValueError and f('...') is ...",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str):
    source, *tests = HONEST[name]
    result = judge(source, *tests)
    assert result.passed, result


@pytest.mark.parametrize("name", ["callback", "dataclass", "printed text", "generator"])
def test_honest_programs_pass_without_a_sandbox_too(name: str):
    source, *tests = HONEST[name]
    assert run_program(Program(source, tuple(tests)), "none").passed


def test_an_object_in_an_operator_with_a_plain_value_is_explained():
    result = judge("class V: pass", "assert V() < 3")
    assert result.status == "failed"
    assert "an object of the program met a plain value in an operator" in result.detail


def test_an_end_in_the_middle_of_the_tests_is_told():
    result = judge("import os\ndef f(x): os._exit(0)", "assert f(1) == 2")
    assert (result.status, result.detail) == ("crashed", "the program ended before its tests did")


def test_a_message_that_cannot_be_read_is_told():
    result = judge(CHEATS["rubbish"], *TESTS)
    assert result.status == "crashed"
    assert "a message that cannot be read" in result.detail
