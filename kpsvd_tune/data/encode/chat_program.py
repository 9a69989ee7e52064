"""Run chat templates, which are untrusted programs, in a sandbox with bounds on time and size.

The environment is the one that `transformers` documents for chat templates: blocks trimmed, loop
controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and the tag
`{% generation %}`. What it adds are bounds, so that a template that never ends, or that computes a
number with a billion digits, is refused instead of hanging the run, and that a rendering with
markers takes time in proportion to its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kpsvd_tune.errors import DataError
from kpsvd_tune.storage.patterns import raise_after

# Seconds that one rendering may take; a chat of thousands of turns takes a fraction of one.
MAX_SECONDS = 20.0
_MAX_BITS = 4096
_MAX_CHARACTERS = 2**26
_MAX_WIDTH = 100_000
_WIDTH = re.compile(r"\d{6,}|%[^a-zA-Z]*\*")
_TOO_WIDE = "it formats with a width of 100,000 or more, or with one that is not written there"
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateError(DataError):
    """A chat cannot be trained because of its chat template, not because of its row."""


class TemplateMismatch(TemplateError):
    """A shipped template that was tried in place of the tokenizer's own writes other text."""


class ChatProgram:
    """One compiled chat template; raises jinja2.TemplateError where it does not compile."""

    def __init__(self, template: str) -> None:
        # It marks what the assistant writes with {% generation %}
        self.has_markers = bool(_MARKER.search(template))
        self._environment = _Environment()
        with _time_limit():
            self._template = self._environment.from_string(template)

    @property
    def reads_date(self) -> bool:
        """Whether a rendering so far asked for today's date."""
        return self._environment.reads_date

    def render(self, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """Run the template; gives the text, and start and end of each stretch that it marks.

        Raises:
            jinja2.TemplateError: The template refuses, or goes beyond a bound.
            TimeoutError: It takes longer than `MAX_SECONDS`.
        """
        environment = self._environment
        environment.length, environment.marked = 0, []
        chunks = []
        with _time_limit():
            for chunk in self._template.generate(**variables):
                environment.length += len(chunk)
                if environment.length > _MAX_CHARACTERS:
                    raise SecurityError(f"it writes more than {_MAX_CHARACTERS:,} characters")
                chunks.append(chunk)
        return "".join(chunks), environment.marked


@lru_cache(maxsize=64)
def compile_template(template: str) -> ChatProgram:
    """The program of a template, compiled once."""
    return ChatProgram(template)


def variables_of(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself, globals left out.

    A name that it sets only where nobody gave it (`is defined`, `default`) counts as read.
    """
    environment = _Environment()
    tree = environment.parse(template)
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    questions = [
        node.node
        for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d")
    ]
    asked_for = {node.name for node in questions if isinstance(node, jinja2.nodes.Name)}
    found = jinja2.meta.find_undeclared_variables(tree)
    return frozenset(found) - (own - asked_for) - set(environment.globals)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; it keeps where the marked stretches of the present rendering lie."""

    # Also keeps the compiler from computing them ahead of time.
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.length = 0
        self.marked: list[tuple[int, int]] = []
        self.reads_date = False
        for name in ("center", "indent"):
            self.filters[name] = _bounded(self.filters[name], f"the filter {name}")
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = self._strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what would compute for hours or fill the memory."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function that the sandbox allows, without huge paddings."""
        # The sandbox puts a function of its own around str.format.
        method = getattr(function, "__wrapped__", function)
        if isinstance(text := getattr(method, "__self__", None), str):
            name = method.__name__
            if name in _PADDING:
                function = _bounded(function, f"the method {name}")
            elif name in ("format", "format_map") and _WIDTH.search(text):
                raise SecurityError(_TOO_WIDE)
        return super().call(context, function, *args, **kwargs)

    def _strftime_now(self, format: str) -> str:
        self.reads_date = True
        return datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}` around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        environment = self.environment
        assert isinstance(environment, _Environment)
        text = caller()
        environment.marked.append((environment.length, environment.length + len(text)))
        return text


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose names do not begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r}, a name with an underscore, on a namespace")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        size = bits * max(right, 0) if operator == "**" else bits + right.bit_length()
        if operator in ("*", "**") and size > _MAX_BITS:
            raise SecurityError(f"it computes a number of more than {_MAX_BITS} bits ({operator})")
        return
    if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
        raise SecurityError(_TOO_WIDE)
    lengths = [len(each) for each in (left, right) if isinstance(each, str | list | tuple)]
    if operator == "+" and sum(lengths) > _MAX_CHARACTERS:
        raise SecurityError(f"it builds a text of more than {_MAX_CHARACTERS:,} characters")
    times = [each for each in (left, right) if isinstance(each, int)]
    if operator == "*" and lengths and times and lengths[0] * times[0] > _MAX_CHARACTERS:
        raise SecurityError(f"it builds a text of more than {_MAX_CHARACTERS:,} characters")


def _bounded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and value > _MAX_WIDTH:
                raise SecurityError(f"it asks {what} for a width of {value:,}")
        return function(*args, **kwargs)

    return checked


def _time_limit() -> AbstractContextManager[None]:
    late = TimeoutError(f"it was not done after {MAX_SECONDS:g} seconds, as if it never ended")
    return raise_after(MAX_SECONDS, late)


def with_reasoning_names(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their reasoning under both names that families of templates read."""
    named = []
    for message in messages:
        found = [message[key] for key in ("reasoning_content", "thinking", "reasoning")
                 if message.get(key) is not None]  # fmt: skip
        own = {key: value for key, value in message.items() if value is not None}
        named.append({"thinking": found[0], **own, "reasoning_content": found[0]} if found else own)
    return named
