"""One call from the recipe's dataset section to rows ready to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.encoder import Encoder
from kpsvd_tune.data.encode.format import Chat, Pair, RowFormat
from kpsvd_tune.data.encode.templates import Template, with_chat_template
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.read.sources import (
    SourceSettings,
    check_ignored,
    load_rows,
    open_sources,
    training_sources,
    validation_source,
)
from kpsvd_tune.data.rows.cache import TokenCache, store_key
from kpsvd_tune.data.rows.preflight import (
    ModelLimits,
    check_known_tokens,
    check_lengths,
    tokenizer_warnings,
)
from kpsvd_tune.data.rows.split import Places, Selection, Split, divide, mix, source_rows
from kpsvd_tune.data.rows.store import StoredRows, rows_sha256
from kpsvd_tune.data.rows.tokenise import Tokeniser, TokenizedSource, find_form
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.report.results import PreflightReport, SourceCount

# Called with rows tokenised so far and in all; 0 in all: not known, as for a file read once.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for the sampler."""

    train: StoredRows  # never empty; rows of a weighted source repeat
    validation: StoredRows  # held out; may be empty
    report: PreflightReport
    # Hash of every id and label in order: whatever the settings, equal hashes train the same.
    sha256: str
    encoder: Encoder  # as for the rows of the first source
    template: str  # "chat", or text; of the first source
    cache_note: str  # where the tokenised rows lie, and if they were found there


@dataclass(frozen=True)
class ReadRows:
    """Rows of one data set with the form they were found to have."""

    rows: tuple[Row, ...]
    format: RowFormat
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[Row, Pair | Chat | None]]:
        """Each row with its example; None where the row is empty."""
        return ((row, self.format.example(row)) for row in self.rows)


def read_examples(
    path: str | Sequence[str],
    *,
    name: str | Sequence[str] | None = None,
    split: str = "train",
    format: str = "auto",  # the recipe's key
    columns: Mapping[str, str] | None = None,
    template: str = "chat",
) -> ReadRows:
    """Read rows into memory and find their form, for evaluation.

    Args:
        path: Local file, hub id, or several.
        name: Configuration of a hub dataset, or several.
        split: Split of a hub dataset.
        format: The form, or "auto" to detect it.
        columns: Column of each role, where its name differs.
        template: Only tells which roles are needed.

    Raises:
        DataError: A source or a row cannot be read, or no form fits.
    """
    loaded = load_rows(path, name=name, split=split)
    form, notes = find_form(loaded.rows, format, columns or {}, template, setting="columns")
    return ReadRows(loaded.rows, form, (*loaded.notes, *notes))


def prepare(
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    progress: Progress | None = None,
    keeps_template: bool = False,
    limits: ModelLimits | None = None,
) -> PreparedData:
    """Read, encode, split, mix and check the rows of a recipe.

    Rows are encoded one source after the other into stores on disk, or found there, so memory
    holds none of them.

    Args:
        dataset: The recipe's section.
        tokenizer: The base model's tokenizer. Its chat template becomes the one that is used.
        seed: Decides which rows are held out, and which a fractional weight takes.
        progress: Called while rows are tokenised.
        keeps_template: Refuse rows that the tokenizer's chat template cannot train, rather than
            look for another, as for rows that are compared with those of a training.
        limits: What the model takes; None: rows are not compared with it.

    Raises:
        DataError: Anything between the file and the labels is not as it must be.
        ResourceError: The cache cannot be written.
    """
    cache = TokenCache()
    (sources, held_out), choice = with_chat_template(
        tokenizer,
        dataset,
        lambda own: _tokenise_all(dataset, tokenizer, own, cache, progress),
        keeps_template=keeps_template,
    )
    split = divide(sources, held_out, dataset, seed)
    train, validation = split.train, split.validation
    if not len(train.usable):
        raise DataError(
            f"{sources[0].label}: nothing can be trained in any of the {len(train.places)} "
            f"training rows: {'; '.join((*split.notes, *train.warnings()))}; expected at least "
            "one row with a completion that fits into dataset.max_length"
        )
    parts = [
        mix(places, source.weight, f"weight {seed} {index}")
        for index, (source, places) in enumerate(zip(sources, train.by_source(), strict=True))
    ]
    rows = StoredRows([source.store for source in sources], np.concatenate(parts))
    others = StoredRows([source.store for source in held_out], validation.usable)
    template = sources[0].template
    encoder = Encoder(tokenizer, template, dataset.max_length, learn=dataset.learn)
    known = _note_key(sources, held_out, dataset, seed)
    found = cache.read_note(known)
    if found is None:
        turns = _turns(dataset, source_rows(sources)[train.usable])
        about = [*choice, *turns, *tokenizer_warnings(tokenizer, int(rows.lengths.max()))]
        report = _report(split, parts, rows, others, encoder, about)
        found = {"report": report.to_dict(), "sha256": rows_sha256(rows, others)}
        cache.write_note(known, found)
    preflight = PreflightReport.from_dict(found["report"])
    if limits is not None:
        notes = [
            *_check_limits(rows, train, limits, dataset.max_length),
            *_check_limits(others, validation, limits, dataset.max_length),
        ]
        preflight = replace(preflight, warnings=(*notes, *preflight.warnings))
    was_cached = all(source.was_cached for source in (*sources, *held_out))
    note = f"tokenised rows: {cache.folder}" + (
        ", found there; nothing was tokenised" if was_cached else ""
    )
    return PreparedData(rows, others, preflight, found["sha256"], encoder, template, note)


def _tokenise_all(
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    own_template: Template | None,
    cache: TokenCache,
    progress: Progress | None,
) -> tuple[list[TokenizedSource], list[TokenizedSource]]:
    """The sources to train on, and those to hold rows out of."""
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, 0)

    tokeniser = Tokeniser(dataset, tokenizer, cache, advance, own_template)

    def tokenised(settings: SourceSettings, *, is_held_out: bool = False) -> list[TokenizedSource]:
        opened = open_sources(
            settings.path,
            name=settings.name,
            split=settings.split,
            streaming=dataset.streaming,
            is_held_out=is_held_out,
        )
        return [tokeniser.tokenise(each, settings) for each in opened]

    settings = training_sources(dataset)
    sources = [source for each in settings for source in tokenised(each)]
    held_out = sources
    if isinstance(dataset.validation, str):
        held_out = tokenised(validation_source(dataset, dataset.validation), is_held_out=True)
    check_ignored({name for each in (*sources, *held_out) for name in each.ignored}, settings)
    if progress is not None and done:
        progress(done, done)
    return sources, held_out


def _report(
    split: Split,
    parts: Sequence[Places],
    rows: StoredRows,
    others: StoredRows,
    encoder: Encoder,
    about: Sequence[str],
) -> PreflightReport:
    """What the preflight found; `about` are the warnings that come first."""
    train, validation = split.train, split.validation
    sources = train.sources
    whole = train.whole
    shown = StoredRows(rows.stores, whole[:1] if len(whole) else train.usable[:1])
    notes = dict.fromkeys(note for source in sources for note in source.notes)
    others_notes = dict.fromkeys(note for source in validation.sources for note in source.notes)
    return PreflightReport(
        num_rows=len(rows),
        num_validation_rows=len(others),
        num_tokens=int(rows.lengths.sum()),
        num_supervised_tokens=int(rows.num_supervised.sum()),
        num_truncated=train.num_cut,
        num_dropped=len(train.places) - len(train.usable),
        max_tokens=int(rows.lengths.max()),
        format=sources[0].form.name,
        format_reason=sources[0].form.reason,
        warnings=(
            *about,
            *split.notes,
            *train.warnings(),
            *(f"validation: {note}" for note in validation.warnings()),
            *notes,
            *(f"validation: {note}" for note in others_notes if note not in notes),
        ),
        sample=encoder.pieces(shown[0]),
        sources=_counts(sources, parts) if len(sources) > 1 else (),
    )


def _turns(dataset: DatasetRecipe, groups: NDArray[np.int64]) -> list[str]:
    """With `learn: each`, from how many rows of the data the trained turns come; else nothing."""
    if dataset.learn != "each":
        return []
    return [
        f"{len(groups):,} rows from {len(np.unique(groups)):,} rows of the data: each assistant "
        "turn is a row of its own (dataset.learn: each), held out with the others of its chat"
    ]


def _check_limits(
    rows: StoredRows, selection: Selection, limits: ModelLimits, max_length: int
) -> list[str]:
    """Compare rows with what the model takes; gives what a user should know."""

    def where(place: int) -> str:
        return selection.where(rows.order[place])

    check_known_tokens(rows, limits.vocabulary, where)
    return check_lengths(rows.lengths, limits, max_length, where)


def _note_key(
    sources: Sequence[TokenizedSource],
    held_out: Sequence[TokenizedSource],
    dataset: DatasetRecipe,
    seed: int,
) -> str:
    """The key of report and hash: all that they depend on, the names of the sources included."""
    stores = [
        [source.store.folder.name, source.label, source.unit, source.weight, *source.notes]
        for source in (*sources, *held_out)
    ]
    return store_key(stores, dataset.model_dump(mode="json"), seed)


def _counts(sources: Sequence[TokenizedSource], parts: Sequence[Places]) -> tuple[SourceCount, ...]:
    counts = []
    start = 0
    for source, part in zip(sources, parts, strict=True):
        supervised = int(source.store.num_supervised[part - start].sum())
        counts.append(
            SourceCount(source.label, source.weight, len(part), supervised, source.form.name)
        )
        start += len(source.store)
    return tuple(counts)
