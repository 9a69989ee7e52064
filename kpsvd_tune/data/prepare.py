"""One call from the recipe's dataset section to rows ready to train on."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode import Encoder, TokenizedRow
from kpsvd_tune.data.files import Row
from kpsvd_tune.data.format import Chat, Pair, RowFormat, find_format
from kpsvd_tune.data.preflight import check_supervision, tokenizer_warnings
from kpsvd_tune.data.rows import load_rows
from kpsvd_tune.data.split import split_rows
from kpsvd_tune.data.template import TextTemplate
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.report.results import PreflightReport

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for the sampler.

    Attributes:
        train: Rows to train on, never empty.
        validation: Held-out rows, may be empty.
        report: What the preflight found.
        sha256: Hash of every id and label in order: equal hashes train the same. Content,
            template, tokenizer, lengths and split all act through them, the files' place not.
        encoder: Encodes prompts for generation as these rows were.
    """

    train: Sequence[TokenizedRow]
    validation: Sequence[TokenizedRow]
    report: PreflightReport
    sha256: str
    encoder: Encoder


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
    offline: bool = False,
) -> ReadRows:
    """Read rows and find their form, for training, validation or evaluation.

    Args:
        path: Local file, hub id, or several.
        name: Configuration of a hub dataset, or several.
        split: Split of a hub dataset.
        format: The form, or "auto" to detect it.
        columns: Column of each role, where its name differs.
        template: Only tells which roles are needed.
        offline: Use only what the local hub cache holds.

    Raises:
        DataError: A source or a row cannot be read, or no form fits.
    """
    loaded = load_rows(path, name=name, split=split, offline=offline)
    text = None if template == "chat" else TextTemplate(template)
    form = find_format(
        loaded.rows, format, columns or {}, needs_prompt=text is None or text.has_prompt
    )
    notes = list(loaded.notes)
    if form.is_chat or text is None:
        return ReadRows(loaded.rows, form, tuple(notes))
    if text.has_system and "system" not in form.columns:
        raise DataError(
            "dataset.template has {system} and no column gives it; expected "
            "dataset.columns={system: COLUMN}, or a template without it"
        )
    if "system" in form.columns and not text.has_system:
        notes.append(
            f"the column {form.columns['system']!r} is not used: dataset.template has no {{system}}"
        )
    return ReadRows(loaded.rows, form, tuple(notes))


def prepare(
    dataset: DatasetRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    offline: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, split, encode and check the rows of a recipe.

    Args:
        dataset: The recipe's section.
        tokenizer: The base model's tokenizer.
        seed: Decides which rows are held out.
        offline: Use only what the local hub cache holds.
        progress: Called with rows encoded so far and in all.

    Raises:
        DataError: Anything between the file and the labels is not as it must be.
    """
    source = _read(dataset, dataset.path, offline)
    if isinstance(dataset.validation, str):
        train_rows, held_out = list(source.rows), _read(dataset, dataset.validation, offline)
        validation_rows, validation_form = list(held_out.rows), held_out.format
    else:
        kept, held = split_rows(len(source.rows), dataset.validation, seed)
        train_rows = [source.rows[index] for index in kept]
        validation_rows, validation_form = [source.rows[index] for index in held], source.format

    warnings = [*source.notes, *tokenizer_warnings(tokenizer, dataset.max_length)]
    template = dataset.template
    if source.format.is_chat and template != "chat":
        template = "chat"
        if "template" in dataset.model_fields_set:
            warnings.append(
                "dataset.template is not used: chat rows take the tokenizer's own template; "
                "set it to chat"
            )
    encoder = Encoder(tokenizer, template, dataset.max_length)
    total = len(train_rows) + len(validation_rows)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    train = _encode_all(train_rows, source.format, encoder, advance)
    validation = _encode_all(validation_rows, validation_form, encoder, advance)
    if not train.rows:
        raise DataError(
            f"{source.rows[0].source}: nothing can be trained in any of the {len(train_rows)} "
            f"training rows: {'; '.join(train.warnings(dataset.max_length))}; expected at least "
            "one row with a completion that fits into dataset.max_length"
        )
    check_supervision(train.rows, train.truncated, encoder.end_token_ids)
    warnings += train.warnings(dataset.max_length)
    warnings += [f"validation: {note}" for note in validation.warnings(dataset.max_length)]
    warnings += encoder.notes
    whole = [row for row, is_cut in zip(train.rows, train.truncated, strict=True) if not is_cut]
    report = PreflightReport(
        num_rows=len(train.rows),
        num_validation_rows=len(validation.rows),
        num_tokens=sum(len(row.input_ids) for row in train.rows),
        num_supervised_tokens=sum(row.num_supervised for row in train.rows),
        num_truncated=sum(train.truncated),
        num_dropped=train.num_dropped,
        max_tokens=max(len(row.input_ids) for row in train.rows),
        format=source.format.name,
        format_reason=source.format.reason,
        warnings=tuple(warnings),
        sample=encoder.pieces((whole or train.rows)[0]),
    )
    digest = _sha256(train.rows, validation.rows)
    return PreparedData(tuple(train.rows), tuple(validation.rows), report, digest, encoder)


@dataclass
class _EncodedRows:
    """The rows that can be used, with the places of those that are out of the ordinary."""

    rows: list[TokenizedRow] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        return len(self.empty) + len(self.too_long)

    def warnings(self, max_length: int) -> list[str]:
        num_cut = sum(self.truncated)
        kinds = (
            (self.empty, "dropped: empty, or without a completion"),
            (
                self.too_long,
                f"dropped: the prompt alone fills dataset.max_length ({max_length} tokens)",
            ),
            (
                self.special,
                "with the text of a special token in them, which is read as that token: remove "
                "it unless it is meant",
            ),
            (self.inexact, "whose text this tokenizer does not give back exactly"),
        )
        notes = [
            f"{len(places)} row{'s' if len(places) > 1 else ''} {what} (first: {places[0]})"
            for places, what in kinds
            if places
        ]
        if num_cut:
            notes.append(
                f"{num_cut} row{'s' if num_cut > 1 else ''} cut to dataset.max_length "
                f"({max_length} tokens), which takes the end token away: raise it to learn whole "
                "completions"
            )
        return notes


def _encode_all(
    rows: Sequence[Row], form: RowFormat, encoder: Encoder, advance: Callable[[], None]
) -> _EncodedRows:
    result = _EncodedRows()
    for row in rows:
        example = form.example(row)
        advance()
        if example is None:
            result.empty.append(row.where)
            continue
        try:
            encoded = encoder.encode(example, row.number)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if encoded.holds_special_tokens:
            result.special.append(row.where)
        if not encoded.is_exact:
            result.inexact.append(row.where)
        if encoded.row is None:
            result.too_long.append(row.where)
            continue
        result.rows.append(encoded.row)
        result.truncated.append(encoded.is_truncated)
    return result


def _read(dataset: DatasetRecipe, path: str | Sequence[str], offline: bool) -> ReadRows:
    # A validation file belongs to no configuration or split of the training data.
    is_training = path == dataset.path
    return read_examples(
        path,
        name=dataset.name if is_training else None,
        split=dataset.split if is_training else "train",
        format=dataset.format,
        columns=cast(Mapping[str, str], dataset.columns),
        template=dataset.template,
        offline=offline,
    )


def _sha256(*parts: Sequence[TokenizedRow]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "little"))
        for row in rows:
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            numbers = array("q", row.input_ids + row.labels)
            if sys.byteorder == "big":
                numbers.byteswap()
            digest.update(numbers.tobytes())
    return digest.hexdigest()
