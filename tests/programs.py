"""Programs for the sandbox: cheats, escapes and bombs, and honest ones of every kind.

The cheats solve nothing and try to be judged right all the same. Each is judged by `TESTS`, whose
function `f` would have to add one; none may pass.
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

_TRY = """
import ctypes, glob, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def works(act):
    try:
        return act() not in (None, False, -1, [])
    except BaseException:
        return False
"""


def _escape(*acts: str) -> str:
    return f"{_TRY}def escaped(): return any(works(act) for act in acts)\nacts = [" + (
        "".join(f"lambda: {act}, " for act in acts) + "]\n"
    )


# Each defines `escaped`, which is true where one of its ways out works.
ESCAPES = {
    "reads files": _escape(
        *("open('/etc/passwd').read()", "open('/root/.bashrc')", "os.listdir('/home')"),
        *("os.listdir('/proc')", "os.listdir('/sys')", "os.listdir('/var')", "os.listdir('/mnt')"),
    ),
    "writes files": _escape(
        *("open('/x', 'w')", "open('/usr/x', 'w')", "open('/dev/x', 'w')", "open('/etc/x', 'w')"),
        *(
            "os.mkdir('/x')",
            "os.mkfifo('/usr/x')",
            "open(os.__file__, 'a')",
            "os.mknod('/tmp/../x')",
        ),
    ),
    "devices": _escape(
        *("open('/dev/mem')", "open('/dev/sda')", "open('/dev/tty')", "open('/dev/kvm')"),
        "os.mknod('/tmp/null', 0o20666, os.makedev(1, 3)) or True",
    ),
    "becomes root": _escape(
        *("os.setuid(0) or True", "os.setgid(0) or True", "os.setgroups([0]) or True"),
        *("os.setresuid(0, 0, 0) or True", "0 in (os.getuid(), os.geteuid(), os.getgid())"),
    ),
    "capabilities": _escape(
        *("libc.prctl(24, 0) or -1", "os.chroot('/tmp') or True", "os.nice(-5)"),
        *("libc.sethostname(b'x', 1)", "libc.reboot(0)", "libc.swapon(b'/tmp', 0)"),
    ),
    "namespaces": _escape(
        *(f"libc.unshare({flag})" for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000)),
        *("libc.setns(0, 0)", "libc.syscall(56, 0x10000011, 0, 0, 0, 0)"),
    ),
    "mounts": _escape(
        *("libc.mount(b'n', b'/tmp', b'tmpfs', 0, None)", "libc.umount2(b'/tmp', 2)"),
        *("libc.pivot_root(b'/', b'/tmp')", "libc.mount(b'/', b'/tmp', None, 4096, None)"),
        "libc.mount(None, b'/', None, 32, None)",
    ),
    "debugging": _escape(
        *("libc.ptrace(0, 0, 0, 0)"),
        "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    ),
    "other processes": _escape(
        *(f"os.path.exists('/proc/{pid}')" for pid in (1, 2, 3)),
        "[p for p in range(4, 400) if works(lambda: os.kill(p, 0) or True) and p != os.getpid()]",
    ),
    "network": _escape(
        *("socket.create_connection(('127.0.0.1', 22), 1)", "socket.getaddrinfo('a.example', 80)"),
        *("socket.create_connection(('8.8.8.8', 53), 1)", "socket.if_nameindex()[1:]"),
    ),
    "socket families": _escape(
        *(f"socket.socket({family}, {kind})" for family in (16, 17, 38, 40) for kind in (1, 2, 3)),
    ),
    "sockets of the machine": _escape(
        *("socket.socket(1).connect('\\0/tmp/.X11-unix/X0') or True",),
        *("socket.socket(1).connect('/run/dbus/system_bus_socket') or True",),
    ),
    "memory outside the limits": _escape(
        *("os.memfd_create('a')", "libc.shmget(0, 4096, 0o1600)", "libc.semget(0, 1, 0o1600)"),
        *("libc.msgget(0, 0o1600)", "libc.io_uring_setup(1, 0)", "libc.syscall(425, 1, 0)"),
    ),
    "limits raised": _escape(
        "__import__('resource').setrlimit(9, (-1, -1)) or True",
        "__import__('resource').setrlimit(6, (10**6, 10**6)) or True",
    ),
    "environment": _escape(
        "[k for k in os.environ if k not in ('HOME LANG PATH PWD PYTHONHASHSEED LC_CTYPE').split()]"
    ),
    "packages": _escape("__import__('kpsvd_tune')", "__import__('numpy')", "__import__('torch')"),
    "descriptors": _escape(
        "[fd for fd in range(64) if fd > 3 and works(lambda: os.fstat(fd).st_size)]"
    ),
}

# Each would take all there is of something; every one also stops by itself at a harmless size.
BOMBS = {
    "processes": "import os\nfor _ in range(99):\n try: os.fork()\n except OSError: pass\n"
    "while True: pass",
    "threads": "import threading, time\nfor _ in range(999): "
    "threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "x = []\nfor _ in range(4000): x.append(bytearray(b'a' * 2**20))",
    "memory of many": "import os, time\nfor _ in range(8):\n if os.fork() == 0:\n"
    "  x = b'a' * (300 * 2**20)\n  time.sleep(99)\ntime.sleep(99)",
    "files": "import os\nfor i in range(100_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))\n"
    "import time\ntime.sleep(99)",
    "folders": "import os\nfor i in range(50_000): os.mkdir(f'/tmp/{i}')\nimport time\n"
    "time.sleep(99)",
    "bytes in files": "for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(2**23))",
    "output": "while True: print('a' * 10_000)",
    "answers": "def __getattr__(n): pass\nimport os\nwhile True: os.write(2, b'a' * 65536)",
    "a loop": "while True: pass",
    "a sleep": "import time\ntime.sleep(600)",
    "a number": "10 ** 10 ** 10",
    "a pattern": "import re\nre.match('(a+)+b', 'a' * 99)",
    "source": "exec('(' * 10**6)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "ignored signals": "import signal\nfor s in range(1, 32):\n"
    " try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
    "while True: pass",
}

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
