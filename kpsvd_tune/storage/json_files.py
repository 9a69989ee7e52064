"""JSON written, and read back from a disk: of bounded depth, with the types that are expected.

A file may have been cut, edited, damaged, or come from someone else. Whatever it holds, its reader
gets the types it asked for, or an error that names the file, what was found, and what to do.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from kpsvd_tune.errors import CheckpointError, KpsvdTuneError

T = TypeVar("T")
# No file of ours nests deeper than ten; Python's own functions fail at about a thousand.
MAX_DEPTH = 100
_LISTED = 3
# A header is a few kilobytes per thousand tensors; a larger one is a damaged file.
_LARGEST_HEADER_BYTES = 100_000_000


@overload
def read_json(
    path: Path, *, error: type[KpsvdTuneError] = ..., cure: str = ...
) -> dict[str, Any]: ...
@overload
def read_json(
    path: Path, expected: type[T], *, error: type[KpsvdTuneError] = ..., cure: str = ...
) -> T: ...
def read_json(
    path: Path,
    expected: Any = dict[str, Any],
    *,
    error: type[KpsvdTuneError] = CheckpointError,
    cure: str = "was it edited or cut? Restore it from a copy",
) -> Any:
    """Read one JSON value of the expected type from a file.

    Args:
        path: The file.
        expected: What it must hold: any type that pydantic can check, such as a dataclass. Lists
            become tuples where it says so; by default an object with any content.
        error: Raised when the file cannot be read or holds something else.
        cure: What the user should do then.
    """
    try:
        content = read_bytes(path)
        return parse_json(content, expected)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}; {cure}") from problem
    except ValueError as problem:
        raise error(f"{path} {problem}; {cure}") from problem


def parse_json(content: bytes | str, expected: Any = dict[str, Any]) -> Any:
    """Parse JSON, UTF-8 or text, and check its types as :func:`read_json` does.

    ValueError says what is wrong, as the end of a sentence that begins with the file.
    """
    try:
        # Text first: from bytes the library would guess at other encodings.
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as problem:
        raise ValueError(f"is not UTF-8 text (at byte {problem.start:,})") from problem
    except ValueError as problem:
        raise ValueError(f"is not JSON ({problem})") from problem
    except RecursionError as problem:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from problem
    if _is_deep(value):
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    return check_types(value, expected)


def check_types(value: object, expected: Any) -> Any:
    """Give a value of plain JSON the types that are expected.

    ValueError names the first places that are wrong, as the end of a sentence.
    """
    try:
        return _adapter(expected).validate_python(value)
    except ValidationError as problem:
        faults = problem.errors(include_url=False, include_context=False)
    told = []
    for each in faults[:_LISTED]:
        place = ".".join(str(step) for step in each["loc"])
        got = _shown(each["input"])
        what = each["msg"][:1].lower() + each["msg"][1:]
        told.append(f"{place}: {what}, got {got}" if place else f"{what}, got {got}")
    more = f" and {len(faults) - _LISTED} more faults" if len(faults) > _LISTED else ""
    raise ValueError(f"holds something unexpected ({'; '.join(told)}{more})")


def read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file: 8 bytes of its length, a JSON object, then the data.

    Gives the object and where the data begins, of a stream that stands at its start. ValueError
    says what is wrong, as the end of a sentence that begins with the file.
    """
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LARGEST_HEADER_BYTES:
        raise ValueError(f"has a header of {length:,} bytes")
    return parse_json(stream.read(length)), 8 + length


def to_json(value: Any) -> bytes:
    """Serialise; floats come back as the same floats, NaN and infinity are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def as_read_back(value: Any) -> Any:
    """What a value will be when it was written and read: tuples are lists, keys are texts."""
    return json.loads(to_json(value))


def read_bytes(path: Path) -> bytes:
    """Read a whole regular file; OSError for a pipe or device, which might never end."""
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Refuse what is no regular file, links followed, by OSError: a pipe waits for its writer."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a named pipe, socket or device"
        raise OSError(f"it is {kind}, and a file is expected")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@functools.lru_cache(maxsize=64)
def _adapter(expected: Any) -> TypeAdapter[Any]:
    return TypeAdapter(expected)


def _is_deep(value: object) -> bool:
    """Whether lists and mappings nest deeper than allowed; without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."
