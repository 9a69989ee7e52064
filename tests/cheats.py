"""Programs that solve nothing and try to be judged right all the same.

Each is judged by `TESTS`, whose function `f` would have to add one. None may pass.
"""

from __future__ import annotations

TESTS = ("assert f(1) == 2", "assert f(41) == 42")

_F = "def f(x): return 0\n"
_EQUAL = "class E{base}:\n def __eq__(s, o): return True\n __hash__ = None\n"
_FRAMES = """
import sys
def walk(act):
    frame = sys._getframe()
    while frame is not None:
        for space in (frame.f_locals, frame.f_globals):
            for name, value in list(space.items()):
                try:
                    act(space, name, value)
                except BaseException:
                    pass
        frame = frame.f_back
"""
# A message as the judge's conversation has it; whoever sends one is only answering early.
_SEND = """
import json, os, struct
def send(value):
    data = json.dumps(value).encode()
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack('!I', len(data)) + data)
        except OSError:
            pass
"""

CHEATS = {
    "exec replaced": "import builtins\nbuiltins.exec = lambda *a, **k: None\n" + _F,
    "compile replaced": "import builtins\nold = compile\n"
    "builtins.compile = lambda *a, **k: old('pass', 'a', 'exec')\n" + _F,
    "all builtins replaced": "import builtins\nbuiltins.AssertionError = None\n"
    "builtins.__build_class__ = None\n" + _F,
    "assert's error replaced": "import builtins\nclass Quiet(BaseException): pass\n"
    "builtins.AssertionError = Quiet\n" + _F,
    "bool replaced": "import builtins\nbuiltins.bool = lambda *_: True\n" + _F,
    "isinstance replaced": "import builtins\nbuiltins.isinstance = lambda *_: True\n" + _F,
    "functions of the runner wrapped": "import __main__\nfor name, value in "
    "list(vars(__main__).items()):\n if callable(value): setattr(__main__, name, lambda *a: "
    "('passed', ''))\n" + _F,
    "functions of every module wrapped": "import sys\nfor module in list(sys.modules.values()):\n"
    " for name in ('_judge', '_run', '_tell', '_serve', '_answer', '_compile'):\n"
    "  if hasattr(module, name): setattr(module, name, lambda *a, **k: ('passed', ''))\n" + _F,
    "os.write wrapped": "import os\nold = os.write\nos.write = lambda fd, data: "
    "old(fd, bytes(data).replace(b'failed', b'passed')) and len(data)\n" + _F,
    "os.read wrapped": "import os\nos.read = lambda fd, n: b''\n" + _F,
    "tests cleared through frames": _FRAMES
    + "walk(lambda space, name, value: type(value) is list and value.clear())\n"
    + _F,
    "tests cleared through gc": "import gc\nfor each in gc.get_objects():\n"
    " if type(each) is list and any(type(v) is str and 'assert' in v for v in each[:9]):\n"
    "  each.clear()\n" + _F,
    "tests rewritten in the job": _FRAMES
    + "walk(lambda space, name, value: type(value) is dict and 'tests' in value "
    "and value.update(tests=[]))\n" + _F,
    "verdict through frames": _FRAMES
    + "import os\nfor fd in range(64):\n try: os.write(fd, b'\\nstarted \\npassed \\n')\n"
    " except OSError: pass\n" + _F,
    "equal to everything": _EQUAL.format(base="") + "def f(x): return E()",
    "int equal to everything": _EQUAL.format(base="(int)") + "def f(x): return E(0)",
    "str equal to everything": _EQUAL.format(base="(str)") + "def f(x): return E()",
    "float equal to everything": _EQUAL.format(base="(float)") + "def f(x): return E()",
    "list equal to everything": _EQUAL.format(base="(list)") + "def f(x): return E()",
    "tuple equal to everything": _EQUAL.format(base="(tuple)") + "def f(x): return E()",
    "equal by its metaclass": "class M(type):\n def __eq__(s, o): return True\n"
    " __hash__ = None\nclass f(metaclass=M):\n def __new__(c, x): return c\n",
    "unequal never": "class E:\n def __ne__(s, o): return False\n"
    " def __eq__(s, o): return True\ndef f(x): return E()",
    "function is equal": "class F:\n def __call__(s, x): return s\n"
    " def __eq__(s, o): return True\nf = F()",
    "mock that is equal": "from unittest.mock import ANY\ndef f(x): return ANY",
    "proxy of its class": "class E:\n __class__ = int\n def __eq__(s, o): return True\n"
    "def f(x): return E()",
    "difference of zero": "class E:\n def __sub__(s, o): return 0\n __rsub__ = __sub__\n"
    " def __eq__(s, o): return not s - o\ndef f(x): return E()",
    "leaves well": "import os\nos._exit(0)",
    "leaves well when called": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
    "exits in a thread": "import os, threading\n"
    "threading.Timer(0.2, os._exit, (0,)).start()\nimport time\ndef f(x): time.sleep(9)",
    "thread that answers": _SEND
    + "import threading\nthreading.Thread(target=send, args=([[], ['answer', True, ['t', 2]]],))"
    ".start()\n" + _F,
    "json replaced": 'import json\njson.dumps = lambda *a, **k: \'[[], ["answer", true, '
    '["t", 2]]]\'\njson.loads = lambda *a: [[], []]\n' + _F,
    "json encoder replaced": "import json.encoder\n"
    "json.encoder.JSONEncoder.encode = lambda *a: '[[], [\"passed\"]]'\n" + _F,
    "module of its own name": "import sys, types\nsys.modules['builtins'] = types.ModuleType('b')\n"
    "sys.modules['operator'] = None\nsys.modules.clear()\n" + _F,
    "random word from memory": "import gc\nwords = [v for o in gc.get_objects() if type(o) is dict "
    "for v in o.values() if type(v) is str and len(v) == 32]\nimport os\nfor word in words:\n"
    " os.write(1, f'\\n{word} passed \\n'.encode())\n" + _F,
    "forged answer": _SEND + "send([[], ['answer', 2, ['t', 2]]])\n" + _F,
    "forged error": _SEND + "send([[], ['error', ['g', 'SystemExit'], ['t', 0], '', ['e'], "
    "['t', 2]]])\n" + _F,
    "forged question": _SEND
    + "send([[], ['ask', '_tell', 1, 'passed', '', ['t', 3], ['t', 3]]])\n"
    + _F,
    "forged reference": _SEND + "send([[], ['answer', ['own', 0], ['t', 2]]])\n" + _F,
    "forged module": _SEND + "send([[], ['answer', ['m', 'os'], ['t', 2]]])\n"
    "send([[], ['answer', ['n', 'os', '_exit'], ['t', 2]]])\n" + _F,
    "rubbish": _SEND + "send('passed')\n" + _F,
    "huge message": "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'\\xff' * 99)\n"
    " except OSError: pass\n" + _F,
    "signal handler": "import signal, os\nfor s in (signal.SIGTERM, signal.SIGALRM, "
    "signal.SIGPIPE):\n signal.signal(s, lambda *_: os._exit(0))\nsignal.alarm(1)\n"
    "def f(x):\n while True: pass",
    "closes everything": "import os\nos.closerange(0, 64)\n" + _F,
    "closes the verdict": "import os\nos.close(1)\n" + _F,
    "forks and leaves": "import os\nif os.fork(): os._exit(0)\n" + _F,
    "forks when called": "import os\ndef f(x):\n os.fork()\n return 0",
    "kills its parent": "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGKILL)",
    "kills all": "import os, signal\ndef f(x): os.kill(-1, signal.SIGKILL)",
    "runs another program": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "trace function": "import sys\ndef trace(frame, event, arg):\n frame.f_trace_lines = False\n"
    " return trace\nsys.settrace(trace)\n" + _F,
    "profile function leaves": "import sys, os\nsys.setprofile(lambda *_: None)\n"
    "def f(x): os.abort()",
    "excepthook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)\ndef f(x): 1 / 0",
    "import hook": "import sys\nclass F:\n def find_spec(s, *a): raise SystemExit\n"
    "sys.meta_path.insert(0, F())\n" + _F,
    "error that cannot be shown": "class B(Exception):\n def __str__(s): raise SystemExit(0)\n"
    " __repr__ = __str__\ndef f(x): raise B()",
    "generator that is right once": "def f(x):\n yield True",
    "name that is looked up": "def __getattr__(name): return 2\n",
    "f not defined": "x = 1",
    "writes the file of the tests": "import glob, os\nfor p in glob.glob('/tmp/**', recursive=True)"
    ":\n try: open(p, 'w').write('')\n except OSError: pass\n" + _F,
    "reads the judge": "import os\nfound = [p for p in range(1, 99) if os.path.exists(f'/proc/{p}')"
    "]\nassert found\n" + _F,
    "corrupts memory": "import ctypes\nctypes.memset(id(0), 0, 8)\n" + _F,
    "changes a small int": "import ctypes, sys\n"
    "ctypes.c_ssize_t.from_address(id(2) + 24).value = 0\n" + _F,
}

# (program, tests): helpers of the tests, put out of order by the program.
CHEATS_OF_HELPERS = {
    "set replaced": ("def set(*a): return 0\ndef f(x): return 5", "assert set(f(1)) == set([1])"),
    "sorted replaced": ("sorted = len\ndef f(x): return [5]", "assert sorted(f(1)) == sorted([1])"),
    "len replaced": ("len = lambda x: 3\ndef f(x): return []", "assert len(f(1)) == 3"),
    "round replaced": ("def round(*a): return 0\ndef f(x): return 0", "assert round(f(1)) == 7"),
    "abs replaced": ("def abs(x): return 0\ndef f(x): return 0", "assert abs(f(1) - 7) < 1e-6"),
    "isclose replaced": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0",
        "assert math.isclose(f(1), 7.0)",
    ),
    "math is no module": (
        "class math:\n isclose = lambda *a, **k: True\ndef f(x): return 0",
        "assert math.isclose(f(1), 7.0)",
    ),
    "imported math replaced": (
        "import sys\nclass M:\n isclose = lambda *a, **k: True\nsys.modules['math'] = M\n"
        "def f(x): return 0",
        "import math\nassert math.isclose(f(1), 7.0)",
    ),
    "no difference": (
        "class E:\n def __sub__(s, o): return 0.0\n __rsub__ = __sub__\ndef f(x): return E()",
        "assert abs(f(1) - 7) < 1e-6",
    ),
    "below and above": (
        "class E:\n __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\ndef f(x): return E()",
        "assert 6 < f(1) < 8",
    ),
    "holds everything": (
        "class E:\n def __contains__(s, o): return True\n def __iter__(s): return iter(())\n"
        "def f(x): return E()",
        "assert 7 in f(1)",
    ),
    "member of everything": (
        "class E:\n def __eq__(s, o): return True\n def __hash__(s): return hash(7)\n"
        "def f(x): return E()",
        "assert f(1) in {7} or f(1) in [7] or f(1) in {7: 1}",
    ),
    "list of what is equal": (
        "class E:\n def __eq__(s, o): return True\ndef f(x): return [E(), E()]",
        "assert f(1) == [1, 2]",
    ),
    "dict of what is equal": (
        "class E:\n def __eq__(s, o): return True\n def __hash__(s): return hash('a')\n"
        "def f(x): return {E(): E()}",
        "assert f(1) == {'a': 1}",
    ),
    "changes the expected value": (
        "def f(x):\n import gc\n for each in gc.get_objects():\n"
        "  if type(each) is list and each == [1, 2, 3]: each[:] = [0]\n return [0]",
        "expected = [1, 2, 3]\nassert f(1) == expected",
    ),
    "reads a callback's globals": (
        "def f(call):\n call.__globals__['f'] = None\n return call.__code__",
        "assert f(lambda: 0) == 7",
    ),
    "caught by the tests": (
        "import os\ndef f(x): os._exit(0)",
        "try:\n f(1)\nexcept BaseException:\n pass",
    ),
}
