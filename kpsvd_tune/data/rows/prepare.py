"""One call from the recipe's dataset section to rows ready to train on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.encoder import Encoder
from kpsvd_tune.data.encode.format import Chat, Pair, RowFormat
from kpsvd_tune.data.encode.templates import with_chat_template
from kpsvd_tune.data.encode.unused import UnusedColumns
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.read.sources import load_rows
from kpsvd_tune.data.rows.cache import TokenCache, store_key
from kpsvd_tune.data.rows.preflight import (
    ModelLimits,
    check_known_tokens,
    check_lengths,
    tokenizer_warnings,
)
from kpsvd_tune.data.rows.split import Places, Selection, divide, mix, source_rows
from kpsvd_tune.data.rows.store import StoredRows, rows_sha256
from kpsvd_tune.data.rows.tokenise import (
    Progress,
    Tokeniser,
    TokenizedSource,
    find_form,
    without_columns,
    without_place,
)
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.report.results import PreflightReport, SourceCount
from kpsvd_tune.storage.json_files import check_types


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
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    template: str = "chat",
    setting: str = "columns",
) -> ReadRows:
    """Read rows into memory and find their form, for evaluation.

    Args:
        path: Local file, hub id, or several.
        name: Configuration of a hub dataset, or several.
        split: Split of a hub dataset.
        columns: Column of each role, where its name differs.
        ignore_columns: Columns that are left out where there are any.
        template: Only tells which roles are needed.
        setting: What a user writes to name columns, for messages.

    Raises:
        DataError: A source or a row cannot be read, or no form fits, or a column that belongs to
            the question has no role.
    """
    loaded = load_rows(path, name=name, split=split)
    rows = loaded.rows
    if ignore_columns:
        rows = tuple(
            replace(row, values=without_columns(row.values, ignore_columns, set())) for row in rows
        )
    form = find_form(rows, "auto", columns or {}, template, setting=setting)
    unused = UnusedColumns(form)
    for row in rows:
        unused.check_question(row)
    notes = without_place(rows, form, template)
    return ReadRows(rows, form, (*loaded.notes, *notes))


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
        lambda own: Tokeniser(dataset, tokenizer, cache, progress, own).tokenise_all(),
        keeps_template=keeps_template,
    )
    train, validation, notes = divide(sources, held_out, dataset, seed)
    if not len(train.usable):
        raise DataError(
            f"{sources[0].label}: nothing can be trained in any of the {len(train.places)} "
            f"training rows: {'; '.join((*notes, *train.warnings()))}; expected at least "
            "one row with a completion that fits into dataset.max_length"
        )
    parts = _mixed(sources, train.by_source(), seed)
    rows = train.stored(np.concatenate(parts))
    others = validation.stored(validation.usable)
    template = sources[0].template
    encoder = Encoder(tokenizer, template, dataset.max_length, learn=dataset.learn)
    known = _note_key(sources, held_out, dataset, seed)
    found = cache.read_note(known)
    if found is None:
        turns = _turns(dataset, source_rows(sources)[train.usable])
        longest = int(rows.lengths.max())
        about = [*choice, *turns, *tokenizer_warnings(tokenizer, longest), *notes]
        report = _report(train, validation, parts, rows, encoder, about)
        found = {"report": report.to_dict(), "sha256": rows_sha256(rows, others)}
        cache.write_note(known, found)
    preflight: PreflightReport = check_types(found["report"], PreflightReport)
    if limits is not None:
        too_long = [
            *_check_limits(rows, train, limits, dataset.max_length),
            *_check_limits(others, validation, limits, dataset.max_length),
        ]
        preflight = replace(preflight, warnings=(*too_long, *preflight.warnings))
    was_cached = all(source.was_cached for source in (*sources, *held_out))
    note = f"tokenised rows: {cache.folder}" + (
        ", found there; nothing was tokenised" if was_cached else ""
    )
    return PreparedData(rows, others, preflight, found["sha256"], encoder, template, note)


def _mixed(sources: Sequence[TokenizedSource], places: Sequence[Places], seed: int) -> list[Places]:
    """The places of each source by the weight of the recipe's source that it belongs to.

    The files of a folder are weighted together: of many small ones each alone would be rounded.
    """
    parts: list[Places] = []
    for _, group in groupby(range(len(sources)), key=lambda index: sources[index].entry):
        own = list(group)
        chosen = mix(
            np.concatenate([places[index] for index in own]),
            sources[own[0]].weight,
            # By the first file, as where each had a weight of its own.
            f"weight {seed} {own[0]}",
        )
        parts += [chosen[np.isin(chosen, places[index])] for index in own]
    return parts


def _report(
    train: Selection,
    validation: Selection,
    parts: Sequence[Places],
    rows: StoredRows,
    encoder: Encoder,
    about: Sequence[str],
) -> PreflightReport:
    """What the preflight found: `rows` are the `parts` of all sources in `train`.

    The warnings in `about` come first.
    """
    sources = train.sources
    ends = np.cumsum([len(part) for part in parts])
    supervised = [int(each.sum()) for each in np.split(rows.num_supervised, ends[:-1])]
    counts = [
        SourceCount(source.label, source.weight, len(part), number, source.form.name)
        for source, part, number in zip(sources, parts, supervised, strict=True)
    ]
    shown = train.whole if len(train.whole) else train.usable
    notes = dict.fromkeys(note for source in sources for note in source.notes)
    others_notes = dict.fromkeys(note for source in validation.sources for note in source.notes)
    return PreflightReport(
        num_rows=len(rows),
        num_validation_rows=len(validation.usable),
        num_tokens=int(rows.lengths.sum()),
        num_supervised_tokens=sum(supervised),
        num_truncated=train.num_cut,
        num_dropped=len(train.places) - len(train.usable),
        max_tokens=int(rows.lengths.max()),
        format=sources[0].form.name,
        format_reason=sources[0].form.reason,
        warnings=(
            *about,
            *train.warnings(),
            *(f"validation: {note}" for note in validation.warnings()),
            *notes,
            *(f"validation: {note}" for note in others_notes if note not in notes),
        ),
        sample=encoder.pieces(train.stored(shown[:1])[0]),
        sources=tuple(counts) if len(counts) > 1 else (),
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
        [
            *(source.store.folder.name, source.label, source.unit, source.weight, source.entry),
            *source.notes,
        ]
        for source in (*sources, *held_out)
    ]
    return store_key(stores, dataset.model_dump(mode="json"), seed)
