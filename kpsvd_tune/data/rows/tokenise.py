"""From one source to its store of tokenised rows: found in the cache, or read and encoded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.chat_program import TemplateError, TemplateMismatch
from kpsvd_tune.data.encode.encoder import Encoder, Layout, Mark, TokenizedRow
from kpsvd_tune.data.encode.format import RowFormat, find_format
from kpsvd_tune.data.encode.templates import Template, TextTemplate, unread_escape
from kpsvd_tune.data.encode.unused import UnusedColumns
from kpsvd_tune.data.read.columns import column, is_empty
from kpsvd_tune.data.read.files import Row, shortened
from kpsvd_tune.data.read.sources import (
    RowSource,
    SourceSettings,
    check_ignored,
    open_sources,
    training_sources,
    validation_source,
)
from kpsvd_tune.data.rows.cache import TokenCache, store_key, tokenizer_fingerprint
from kpsvd_tune.data.rows.preflight import check_end_tokens
from kpsvd_tune.data.rows.store import StoreWriter, TokenStore
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

# Called with rows tokenised so far and in all; 0 in all: not known, as for a file read once.
Progress = Callable[[int, int], None]
# Rows tokenised in one call: enough for all threads of the tokenizer, few enough for any memory.
_ROWS = 500
# Rows at the head of a source that are asked for a form, where faulty rows are left out.
_MOST_REFUSED = 100
_SHOWN_FAULTS = 3
_LONGEST_FAULT = 240


@dataclass(frozen=True)
class TokenizedSource:
    """A source and the store of its rows."""

    label: str  # file or hub dataset, as messages name it
    unit: str  # what its rows are numbered by
    weight: float  # times each row is seen in an epoch
    template: str  # what its rows were written with: "chat", or text
    store: TokenStore
    form: RowFormat
    notes: tuple[str, ...]  # what a user should know about source, template and tokenizer
    was_cached: bool  # whether nothing had to be tokenised
    content: str  # equal for sources that read the same file, whichever rows of it
    entry: int  # which of the recipe's sources it belongs to: one may be a folder of many files

    def where(self, place: int) -> str:
        """Source and number of a row, as messages print them."""
        return f"{self.label}, {self.unit} {self.store.numbers[place]}"


@dataclass
class Tokeniser:
    """Makes the stores of a recipe's sources, or finds them in the cache."""

    dataset: DatasetRecipe
    tokenizer: PreTrainedTokenizerBase
    cache: TokenCache
    progress: Progress | None
    # The tokenizer's own chat template where another one is tried: both must write prompts alike.
    own_template: Template | None = None
    num_read: int = 0

    @cached_property
    def _fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def tokenise_all(self) -> tuple[list[TokenizedSource], list[TokenizedSource]]:
        """The sources to train on, and those to hold rows out of."""
        dataset = self.dataset
        settings = training_sources(dataset)
        sources = [
            source
            for entry, each in enumerate(settings)
            for source in self._tokenised(each, entry=entry)
        ]
        held_out = sources
        if isinstance(dataset.validation, str):
            own = validation_source(dataset, dataset.validation)
            held_out = self._tokenised(own, is_held_out=True)
        stores = [source.store for source in (*sources, *held_out)]
        check_ignored({name for store in stores for name in store.facts["ignored"]}, settings)
        if self.progress is not None and self.num_read:
            self.progress(self.num_read, self.num_read)
        return sources, held_out

    def _tokenised(
        self, settings: SourceSettings, *, entry: int = 0, is_held_out: bool = False
    ) -> list[TokenizedSource]:
        found = open_sources(
            settings.path,
            name=settings.name,
            split=settings.split,
            streaming=self.dataset.streaming,
            is_held_out=is_held_out,
        )
        return [self._tokenise(source, settings, entry) for source in found]

    def _tokenise(self, source: RowSource, settings: SourceSettings, entry: int) -> TokenizedSource:
        """Give the store of a source, made where the cache does not hold it."""
        fingerprint = source.fingerprint()
        key = store_key(
            *(fingerprint, source.part, self._fingerprint, settings.format, dict(settings.columns)),
            *(sorted(settings.ignore_columns), settings.template, settings.names_template),
            *(self.dataset.max_length, self.dataset.learn, settings.drops_faulty),
            self.own_template,
        )
        store, was_cached = self.cache.find_or_make(
            key, lambda writer: self._make(source, settings, fingerprint, writer)
        )
        notes = [*source.notes]
        if (escape := unread_escape(settings.template, "dataset.template")) is not None:
            notes.append(escape)
        if settings.drops_faulty and store.facts["faults"]["faulty"]:
            most = self.dataset.max_bad_rows
            notes.append(faulty_rows_note(store.facts["faults"], source.label, source.unit, most))
        form = RowFormat(**store.facts["form"])
        return TokenizedSource(
            label=source.label,
            unit=source.unit,
            weight=settings.weight,
            template=_template_for(form, settings)[0],
            store=store,
            form=form,
            notes=(*notes, *store.facts["notes"]),
            was_cached=was_cached,
            content=fingerprint,
            entry=entry,
        )

    def _make(
        self, source: RowSource, settings: SourceSettings, fingerprint: str, writer: StoreWriter
    ) -> dict[str, Any]:
        """Write all rows of a source, and give the facts to keep with them."""
        ignored: set[str] = set()
        rows = source.read()
        if names := settings.ignore_columns:
            rows = (
                replace(row, values=without_columns(row.values, names, ignored)) for row in rows
            )
        faults = Faults() if settings.drops_faulty else None
        head = list(islice(rows, _ROWS))  # the first of them that shows a form decides it
        form, notes = _find_form(head, settings, source.label)
        template, more = _template_for(form, settings)
        encoder = Encoder(
            self.tokenizer,
            template,
            self.dataset.max_length,
            learn=self.dataset.learn,
            compared_with=self.own_template,
        )
        unused = UnusedColumns(form)
        rows = chain(head, rows)
        while chunk := list(islice(rows, _ROWS)):
            for row in _encode(chunk, form, unused, encoder, faults):
                writer.add(row)
            # A later row may be the first with a system prompt.
            notes = list(dict.fromkeys([*notes, *without_place(chunk, form, template)]))
            self.num_read += len(chunk)
            if self.progress is not None:
                self.progress(self.num_read, 0)
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


def find_form(
    rows: Sequence[Row],
    format: str,
    columns: Mapping[str, str],
    template: str,
    setting: str = "dataset.columns",
) -> RowFormat:
    """The form of the rows, checked against the template."""
    text = None if template == "chat" else TextTemplate(template)
    form = find_format(
        rows, format, columns, needs_prompt=text is None or text.has_prompt, setting=setting
    )
    if form.is_pair and text is not None and text.has_system:
        system = form.columns.get("system")
        if system is None or all(column(row, system) is None for row in rows):
            raise DataError(
                "dataset.template has {system} and no column gives it; expected "
                "'dataset.columns={system: COLUMN}', or a template without it"
            )
    return form


def without_place(rows: Sequence[Row], form: RowFormat, template: str) -> list[str]:
    """Notes on prompts and system prompts of rows that the template has no placeholder for."""
    if not form.is_pair or template == "chat":
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


def _template_for(form: RowFormat, settings: SourceSettings) -> tuple[str, list[str]]:
    """The template that fits the form; a note where the recipe names one that does not."""
    if form.is_pair or (form.is_chat and settings.template == "chat"):
        return settings.template, []
    used, kind, takes = "{completion}", "text", "none"
    if form.is_chat:
        used, kind, takes = "chat", "chat", "the tokenizer's own template; set it to chat"
    note = f"dataset.template is not used: {kind} rows take {takes}"
    return used, [note] if settings.names_template else []


def without_columns(
    values: Mapping[str, Any], names: Collection[str], found: set[str]
) -> dict[str, Any]:
    """An object without some keys ("a.b": b of a), of which `found` gets those that it has."""
    found.update(name for name in names if name in values)
    kept = {name: value for name, value in values.items() if name not in names}
    for name in names:
        first, _, rest = name.partition(".")
        if rest and isinstance(kept.get(first), Mapping) and name not in values:
            inside: set[str] = set()
            kept[first] = without_columns(kept[first], [rest], inside)
            if inside:
                found.add(name)
    return kept


def _find_form(
    head: Sequence[Row], settings: SourceSettings, label: str
) -> tuple[RowFormat, list[str]]:
    """The form of the rows; where faulty rows are left out, that which most of them have."""
    if not head:
        raise DataError(f"{label}: holds no rows; expected at least one")
    unreadable = [row.fault for row in head if row.fault is not None]
    if unreadable and (not settings.drops_faulty or len(unreadable) == len(head)):
        raise unreadable[0] if settings.drops_faulty else _unreadable(unreadable[0])
    if not settings.drops_faulty:
        return find_form(head, settings.format, settings.columns, settings.template), []
    refused: list[DataError] = []
    forms: list[tuple[int, RowFormat]] = []  # how many rows have it
    known: set[int] = set()
    for start in range(min(len(head), _MOST_REFUSED)):
        if start in known:
            continue
        try:
            form = find_form(head[start:], settings.format, settings.columns, settings.template)
        except DataError as error:
            refused.append(error)
            continue
        if all(form != other for _, other in forms):
            understood = {place for place, row in enumerate(head) if _is_understood(row, form)}
            forms.append((len(understood), form))
            known |= understood
    if not forms:
        raise refused[0]
    number, form = max(forms, key=lambda each: each[0])  # the first of several
    if len(forms) == 1:
        return form, []
    others = ", ".join(f"{each.name} ({count})" for count, each in forms if each != form)
    note = (
        f"{label}: {number} of the first {len(head)} rows have the form {form.name}, which is "
        f"taken for all, as dataset.on_bad_row says; other forms: {others}"
    )
    return form, [note]


def _unreadable(fault: DataError) -> DataError:
    return DataError(f"{fault}; or have such rows left out with dataset.on_bad_row=drop")


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
    faults: Faults | None,
) -> Iterator[TokenizedRow]:
    """The rows to train on; one row of the source gives several where each turn is one."""
    layouts: list[Layout] = []
    numbers: list[int] = []
    found: list[TokenizedRow | None] = []  # None: take the next row of the encoder
    for row in rows:
        parts: list[Layout] = []
        mark = Mark.EMPTY
        try:
            parts = _lay_out(row, form, unused, encoder)
        except DataError as error:
            if faults is None and error is row.fault:
                raise _unreadable(error) from error
            if faults is None or isinstance(error, TemplateMismatch):
                raise
            faults.add(row, error)
            mark = Mark.FAULTY
        layouts += parts
        numbers += [row.number] * len(parts)
        found += [None] * len(parts) if parts else [TokenizedRow((), (), row.number, mark)]
    if faults is not None:
        faults.num_rows += len(rows)
    encoded = encoder.encode_laid_out(layouts, numbers)
    check_end_tokens(encoded, encoder.last_token_ids)
    laid_out = iter(encoded)
    for each in found:
        yield next(laid_out) if each is None else each


def _lay_out(row: Row, form: RowFormat, unused: UnusedColumns, encoder: Encoder) -> list[Layout]:
    """The rows to train on that a row of the source gives; none where nothing is to be learnt."""
    if row.fault is not None:
        raise row.fault
    unused.check(row)
    example = form.example(row)
    with row.told_in_errors():
        parts = [] if example is None else encoder.parts(example)
        return [encoder.lay_out(part) for part in parts]


class Faults:
    """Counts the faulty rows of one source that are left out, by reason."""

    def __init__(self) -> None:
        self.num_rows = 0  # read so far, faulty ones too
        self._reasons: Counter[str] = Counter()
        self._first: list[tuple[int, str]] = []
        self._of_template = 0

    def add(self, row: Row, error: DataError) -> None:
        """Count a row that is left out."""
        # The source's name may be another when the stored rows are found again.
        text = str(error).removeprefix(f"{row.where}: ")
        self._reasons[_reason(text)] += 1
        self._of_template += isinstance(error, TemplateError)
        if len(self._first) < _SHOWN_FAULTS:
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


def faulty_rows_note(facts: Mapping[str, Any], label: str, unit: str, max_share: float) -> str:
    """Say which rows of a source were left out, from `Faults.facts`.

    Above `max_share` of the rows raises DataError, or TemplateError where only the chat template is
    at fault: with another one they may be fine.
    """
    rows, faulty = int(facts["rows"]), int(facts["faulty"])
    reasons = [f"{number} x {reason}" for reason, number in facts["reasons"][:5]]
    if more := len(facts["reasons"]) - len(reasons):
        reasons.append(f"{more} more reasons")
    first = " | ".join(
        f"{label}, {unit} {number}: {shortened(text, _LONGEST_FAULT)}"
        for number, text in facts["first"]
    )
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
    """The kind of a fault: its message without the parts that differ from row to row."""
    text = re.sub(r"\s*\([^()]*\)", "", text)
    text = re.split(r"[;:] ", text, maxsplit=1)[0]
    return re.sub(r"\d+", "N", text)[:100]
