"""From one source to its store of tokenised rows: found in the cache, or read and encoded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, reduce
from itertools import chain, islice
from operator import or_
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.chat_program import TemplateError, TemplateMismatch
from kpsvd_tune.data.encode.encoder import Encoder, Layout, Learn
from kpsvd_tune.data.encode.format import RowFormat, find_format
from kpsvd_tune.data.encode.templates import Template, TextTemplate
from kpsvd_tune.data.encode.unused import UnusedColumns
from kpsvd_tune.data.read.columns import column, is_empty
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.read.sources import RowSource, SourceSettings
from kpsvd_tune.data.rows.cache import TokenCache, store_key, tokenizer_fingerprint
from kpsvd_tune.data.rows.preflight import check_supervision
from kpsvd_tune.data.rows.store import Mark, StoreWriter, TokenStore
from kpsvd_tune.errors import DataError

# Rows tokenised in one call: enough for all threads of the tokenizer, few enough for any memory.
_ROWS = 500
# Rows at the head of a source that are asked for a form, where faulty rows are left out.
_MOST_REFUSED = 100


@dataclass(frozen=True)
class TokenizedSource:
    """A source and its store.

    Attributes:
        label: File or hub dataset, as messages name it.
        unit: What its rows are numbered by.
        weight: Times each row is seen in an epoch.
        store: Its rows.
        form: The form they were found to have.
        notes: What a user should know about source, template and tokenizer.
        was_cached: Whether nothing had to be tokenised.
        content: Equal for sources that read the same file, whichever rows of it.
        ignored: Columns that its rows have and the recipe leaves out.
    """

    label: str
    unit: str
    weight: float
    store: TokenStore
    form: RowFormat
    notes: tuple[str, ...]
    was_cached: bool
    content: str
    ignored: frozenset[str]

    def where(self, place: int) -> str:
        """Source and number of a row, as messages print them."""
        return f"{self.label}, {self.unit} {self.store.numbers[place]}"


def find_form(
    rows: Sequence[Row],
    format: str,
    columns: Mapping[str, str],
    template: str,
    setting: str = "dataset.columns",
) -> tuple[RowFormat, list[str]]:
    """The form of the rows, checked against the template, with what a user should know.

    Raises:
        DataError: No form fits, or the template has a place that nothing fills.
    """
    text = None if template == "chat" else TextTemplate(template)
    form = find_format(
        rows, format, columns, needs_prompt=text is None or text.has_prompt, setting=setting
    )
    if form.is_chat or form.name == "text" or text is None:
        return form, []
    system = form.columns.get("system")
    gives_system = system is not None and any(column(row, system) is not None for row in rows)
    if text.has_system and not gives_system:
        raise DataError(
            "dataset.template has {system} and no column gives it; expected "
            "dataset.columns={system: COLUMN}, or a template without it"
        )
    return form, _without_place(rows, form, template)


def _without_place(rows: Sequence[Row], form: RowFormat, template: str) -> list[str]:
    """Notes where rows have a prompt or a system prompt and the template no place for it."""
    if form.is_chat or form.name == "text" or template == "chat":
        return []
    text = TextTemplate(template)
    missing = ["system"] if not text.has_system else []
    if not text.has_prompt:
        missing += ["prompt", "instruction", "input"]
    return [
        f"the column {name!r} is not used: dataset.template has no "
        f"{{{'system' if role == 'system' else 'prompt'}}}"
        for role, name in form.columns.items()
        if role in missing and any(not is_empty(column(row, name)) for row in rows)
    ]


def tokenise(
    source: RowSource,
    settings: SourceSettings,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    learn: Learn,
    cache: TokenCache,
    advance: Callable[[int], None],
    max_bad_rows: float = 0.0,
    own_template: Template | None = None,
    tokenizer_key: str | None = None,
) -> TokenizedSource:
    """Give the store of a source.

    Args:
        source: The rows.
        settings: How they are read.
        tokenizer: The base model's tokenizer.
        max_length: Tokens a row is cut to.
        learn: Assistant turns of a chat to learn.
        cache: Where stores lie.
        advance: Called with the number of rows read just now.
        max_bad_rows: Largest share of the rows that may be left out as faulty.
        own_template: The chat template in whose place another is tried, and which must ask alike.
        tokenizer_key: The tokenizer's fingerprint, where it is known: reading it takes a while.

    Raises:
        DataError: A row, its form or the template is not as it must be.
    """

    def make(writer: StoreWriter) -> dict[str, Any]:
        rows = _without_columns(source.read(), settings.ignore_columns, ignored)
        faults = Faults() if settings.drops_faulty else None
        head = list(islice(rows, _ROWS))  # which decides the form
        form, notes = _find_form(head, settings, source.label)
        template, more = _template_for(form, settings)
        encoder = Encoder(tokenizer, template, max_length, learn=learn, compared_with=own_template)
        unused = UnusedColumns(form)
        for chunk in _chunks(chain(head, rows)):
            _encode(chunk, form, unused, encoder, writer, faults)
            # A later row may be the first with a system prompt.
            notes = list(dict.fromkeys([*notes, *_without_place(chunk, form, template)]))
            advance(len(chunk))
        if source.fingerprint() != fingerprint:
            raise DataError(
                f"{source.label}: changed while it was read; expected a file that nothing writes "
                "to: run again when it is whole"
            )
        facts = {
            "form": asdict(form),
            "notes": [*notes, *more, *unused.notes(), *encoder.notes],
            "ignored": sorted(ignored),
        }
        return facts if faults is None else {**facts, "faults": faults.facts()}

    ignored: set[str] = set()
    fingerprint = source.fingerprint()
    key = store_key(
        fingerprint,
        source.part,
        tokenizer_key or tokenizer_fingerprint(tokenizer),
        settings.format,
        dict(settings.columns),
        sorted(settings.ignore_columns),
        settings.template,
        settings.names_template,
        max_length,
        learn,
        settings.drops_faulty,
        own_template,
    )
    store, was_cached = cache.find_or_make(key, make)
    left_out = None
    if settings.drops_faulty:
        facts = store.facts["faults"]
        left_out = faulty_rows_note(facts, source.label, source.unit, max_bad_rows)
    return TokenizedSource(
        source.label,
        source.unit,
        settings.weight,
        store,
        RowFormat(**store.facts["form"]),
        (*source.notes, *([left_out] if left_out else []), *store.facts["notes"]),
        was_cached,
        fingerprint,
        frozenset(store.facts["ignored"]),
    )


def template_of(source: TokenizedSource, settings: SourceSettings) -> str:
    """The template that the rows of a source were written with."""
    return _template_for(source.form, settings)[0]


def _template_for(form: RowFormat, settings: SourceSettings) -> tuple[str, list[str]]:
    """The template that fits the form, with what a user should know about another one named."""
    takes = {"chat": "the tokenizer's own template; set it to chat", "text": "none"}
    kind = "chat" if form.is_chat else form.name
    if kind not in takes or settings.template == "chat" == kind:
        return settings.template, []
    used = "chat" if kind == "chat" else "{completion}"
    if not settings.names_template:
        return used, []
    return used, [f"dataset.template is not used: {kind} rows take {takes[kind]}"]


def _without_columns(rows: Iterable[Row], names: Sequence[str], found: set[str]) -> Iterator[Row]:
    """The rows without some columns; `found` gets those that they have."""
    for row in rows:
        if names:
            row = replace(row, values=_without(row.values, names, found))
        yield row


def _without(values: Mapping[str, Any], names: Sequence[str], found: set[str]) -> dict[str, Any]:
    """An object without some keys; "a.b" leaves the key b out of the object a."""
    found.update(name for name in names if name in values)
    kept = {name: value for name, value in values.items() if name not in names}
    for name in names:
        first, _, rest = name.partition(".")
        if rest and isinstance(kept.get(first), Mapping) and name not in values:
            inside: set[str] = set()
            kept[first] = _without(kept[first], [rest], inside)
            if inside:
                found.add(name)
    return kept


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _ROWS)):
        yield chunk


def _find_form(
    head: Sequence[Row], settings: SourceSettings, label: str
) -> tuple[RowFormat, list[str]]:
    """The form of the rows; where faulty rows are left out, that which most of them have.

    Raises:
        DataError: There are no rows, one cannot be read, or no form fits.
    """
    if not head:
        raise DataError(f"{label}: holds no rows; expected at least one")
    unreadable = [row.fault for row in head if row.fault is not None]
    if unreadable and (not settings.drops_faulty or len(unreadable) == len(head)):
        raise unreadable[0]
    if not settings.drops_faulty:
        return find_form(head, settings.format, settings.columns, settings.template)
    refused: list[DataError] = []
    forms: list[tuple[int, RowFormat, list[str]]] = []
    known: set[int] = set()
    for start in range(min(len(head), _MOST_REFUSED)):
        if start in known:
            continue
        try:
            form, notes = find_form(
                head[start:], settings.format, settings.columns, settings.template
            )
        except DataError as error:
            refused.append(error)
            continue
        if all(form != other for _, other, _ in forms):
            understood = {place for place, row in enumerate(head) if _is_understood(row, form)}
            forms.append((len(understood), form, notes))
            known |= understood
    if not forms:
        raise refused[0]
    number, form, notes = max(forms, key=lambda each: each[0])  # the first of several
    if len(forms) > 1:
        others = ", ".join(f"{each.name} ({count})" for count, each, _ in forms if each != form)
        notes = [
            f"{label}: {number} of the first {len(head)} rows have the form {form.name}, which is "
            f"taken for all, as dataset.on_bad_row says; other forms: {others}",
            *notes,
        ]
    return form, notes


def _is_understood(row: Row, form: RowFormat) -> bool:
    """Whether a row can be read in a form and gives something to learn."""
    try:
        UnusedColumns(form).check(row)
        return row.fault is None and form.example(row) is not None
    except DataError:
        return False


def _encode(
    rows: Sequence[Row],
    form: RowFormat,
    unused: UnusedColumns,
    encoder: Encoder,
    writer: StoreWriter,
    faults: Faults | None,
) -> None:
    # One row of the source may be several to train on: one for each turn of a chat.
    found: list[tuple[int, list[Layout]]] = []
    faulty: set[int] = set()
    for place, row in enumerate(rows):
        try:
            layouts = _lay_out(row, form, unused, encoder)
        except DataError as error:
            if faults is None or isinstance(error, TemplateMismatch):
                raise
            faults.add(row, error)
            faulty.add(place)
            layouts = []
        found.append((row.number, layouts))
    if faults is not None:
        faults.num_rows += len(rows)
    encoded = iter(
        encoder.encode_laid_out(
            [layout for _, layouts in found for layout in layouts],
            [number for number, layouts in found for _ in layouts],
        )
    )
    taken = [(number, [next(encoded) for _ in layouts]) for number, layouts in found]
    usable = [each for _, several in taken for each in several if each.row is not None]
    if usable:
        check_supervision(
            [each.row for each in usable if each.row is not None],
            [each.is_truncated for each in usable],
            encoder.last_token_ids,
        )
    for place, (number, several) in enumerate(taken):
        if not several:
            writer.add(number, None, Mark.FAULTY if place in faulty else Mark.EMPTY)
        for each in several:
            marks = _marks(
                each.holds_special_tokens, not each.is_exact, each.is_truncated, each.row is None
            )
            writer.add(number, each.row, marks)


def _lay_out(row: Row, form: RowFormat, unused: UnusedColumns, encoder: Encoder) -> list[Layout]:
    """The rows to train on that a row of the source gives; none where nothing is to be learnt.

    Raises:
        DataError: The row is not as it must be; the message begins with its place.
    """
    if row.fault is not None:
        raise row.fault
    unused.check(row)
    example = form.example(row)
    try:
        parts = [] if example is None else encoder.parts(example)
        return [encoder.lay_out(part) for part in parts]
    except DataError as error:
        raise type(error)(f"{row.where}: {error}") from error


@cache  # of 16 sets at most: joining flags takes longer than all else about them
def _marks(special: bool, inexact: bool, cut: bool, full_prompt: bool) -> Mark:
    flags = {
        Mark.SPECIAL: special,
        Mark.INEXACT: inexact,
        Mark.CUT: cut,
        Mark.FULL_PROMPT: full_prompt,
    }
    return reduce(or_, (mark for mark, is_set in flags.items() if is_set), Mark(0))


_SHOWN = 3
_LONGEST = 240


class Faults:
    """Collects the faults of one source.

    Attributes:
        num_rows: Rows read so far, faulty ones among them.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._reasons: Counter[str] = Counter()
        self._first: list[tuple[int, str]] = []
        self._of_template = 0

    def add(self, row: Row, error: DataError) -> None:
        """Count a row that is left out."""
        # The source's name may be another when the stored rows are found again.
        text = str(error).removeprefix(f"{row.where}: ")
        self._reasons[_reason(text)] += 1
        self._of_template += isinstance(error, TemplateError)
        if len(self._first) < _SHOWN:
            self._first.append((row.number, text))

    def facts(self) -> dict[str, Any]:
        """What to keep with the stored rows, as JSON values."""
        return {
            "rows": self.num_rows,
            "faulty": self._reasons.total(),
            "reasons": self._reasons.most_common(),
            "first": self._first,
            "of_template": self._of_template,
        }


def faulty_rows_note(
    facts: Mapping[str, Any], label: str, unit: str, max_share: float
) -> str | None:
    """Say which rows of a source were left out; None where none were.

    Args:
        facts: From :meth:`Faults.facts`.
        label: The source.
        unit: What its rows are numbered by.
        max_share: The recipe's max_bad_rows.

    Raises:
        TemplateError: They are a larger share of the rows, by the chat template's fault alone:
            another template may do.
        DataError: They are a larger share of the rows.
    """
    rows, faulty = int(facts["rows"]), int(facts["faulty"])
    if not faulty:
        return None
    reasons = [f"{number} x {reason}" for reason, number in facts["reasons"][:5]]
    if more := len(facts["reasons"]) - len(reasons):
        reasons.append(f"{more} more reasons")
    first = " | ".join(f"{label}, {unit} {number}: {_cut(text)}" for number, text in facts["first"])
    found = (
        f"{faulty} of {rows} rows of {label} {'are' if faulty > 1 else 'is'} faulty: "
        f"{'; '.join(reasons)}. First: {first}"
    )
    if faulty > max_share * rows:
        is_template = int(facts["of_template"]) > max_share * rows
        raise (TemplateError if is_template else DataError)(
            f"{found}. That is {100 * faulty / rows:.3g} % of them and dataset.max_bad_rows is "
            f"{max_share:g} ({100 * max_share:g} %); mend the rows, or raise it if so many may be "
            "left out"
        )
    return f"LEFT OUT, as dataset.on_bad_row says: {found}"


def _reason(text: str) -> str:
    """The kind of a fault: its message without what differs from row to row."""
    text = re.sub(r"\s*\([^()]*\)", "", text)
    text = re.split(r"[;:] ", text, maxsplit=1)[0]
    return re.sub(r"\d+", "N", text)[:100]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
