"""What runs inside the sandbox: set limits, run one program, run its tests, say how it went.

Never imported: `sandbox` hands this file's text to a bare Python interpreter that sees the
standard library alone, so it may import nothing of ours. A job comes as JSON on standard input;
the verdict leaves on what was standard output, which the program under test does not get: its
own output goes to standard error.
"""

import builtins
import json
import os
import resource
import sys
import types
from typing import Any


def main() -> None:
    """Run the job from standard input; tell "<nonce> started", then "<nonce> <status> <detail>"."""
    job = json.loads(sys.stdin.buffer.read())
    verdict = _private_verdict_channel()
    _limit(job)
    _tell(verdict, job["nonce"], "started", "")
    status, detail = _run(job["program"], job["tests"])
    _tell(verdict, job["nonce"], status, detail)
    # At once: threads, exit handlers and destructors of the program get no turn.
    os._exit(0)


def _private_verdict_channel() -> int:
    verdict = os.dup(1)
    os.dup2(2, 1)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return verdict


def _limit(job: dict[str, Any]) -> None:
    if job["uid"] is not None:  # root outside: become nobody before anything foreign runs
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    for name, value in job["limits"].items():
        limit = getattr(resource, name)
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # A second more before the kill: the signal that comes first tells why a program ended.
        hard = value + (name == "RLIMIT_CPU" and value != most)
        resource.setrlimit(limit, (value, hard))


def _tell(verdict: int, nonce: str, status: str, detail: str) -> None:
    line = f"\n{nonce} {status} {' '.join(detail.split())}\n"
    os.write(verdict, line.encode("utf-8", "backslashreplace"))


def _run(program: str, tests: list[str]) -> tuple[str, str]:
    try:
        compiled = compile(program, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return "invalid", _describe(error)
    # Registered as a module, because dataclasses and pickle look their classes' module up.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        builtins.exec(compiled, module.__dict__)
        for test in tests:
            builtins.exec(compile(test, "<test>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: a program that leaves has not passed
        return "failed", _describe(error)
    return "passed", ""


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an error that cannot be shown"


main()
