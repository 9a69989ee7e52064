"""What a run would do and take, before it does: the result of `plan`, and its lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from kpsvd_tune.errors import some_of
from kpsvd_tune.report.layout import Column, output, print_line, print_pairs, print_table
from kpsvd_tune.report.results import Result
from kpsvd_tune.units import counted, duration, money, size

# Untouched matrices that are named one by one.
_LISTED = 3


@dataclass(frozen=True)
class ModuleKind(Result):
    """Target modules that differ in their number alone, as those of one kind in all layers."""

    name: str  # with * for the number
    count: int
    out_features: int
    in_features: int
    factor_shape: tuple[int, int, int, int]  # (m, n, p, q): left factors m x n, right p x q
    ranks: tuple[int, int]  # least and most Kronecker rank


@dataclass(frozen=True)
class AdapterPlan(Result):
    """What is adapted."""

    form: str
    kinds: tuple[ModuleKind, ...]
    untouched: tuple[tuple[str, str], ...]  # (name, reason) of matrices without an adapter
    trainable_parameters: tuple[int, int]  # least and most, with modules trained whole
    file_bytes: tuple[int, int]  # of the adapter on disk, least and most
    basis: str  # what the ranks rest on
    # Parameters of each module that is trained whole.
    trained_whole: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataPlan(Result):
    """What is learnt from, and in how many steps."""

    steps: int | None  # None where nobody knows without the rows
    passes: float | None  # over the training rows
    rows_per_step: int
    training_rows: int | None
    validation_rows: int | None
    tokens: int | None  # of the whole run, without padding
    # Rows, tokens of each and supervised tokens of the largest forward pass.
    largest_batch: tuple[int, int, int]
    basis: str


@dataclass(frozen=True)
class MemoryPlan(Result):
    """The most memory at once, of the host or of one device."""

    parts: Mapping[str, int]  # bytes; their sum is the peak of training
    peak_bytes: int  # of the whole command
    free_bytes: int | None  # that the command can get here; None where not known
    bound_by: str  # the stage with the peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is free here; None where nobody knows."""
        return None if self.free_bytes is None else self.peak_bytes <= self.free_bytes


@dataclass(frozen=True)
class TimePlan(Result):
    """How long it takes, in seconds."""

    decomposition_seconds: float
    to_decompose: int  # matrices that are not in the cache
    training_seconds: tuple[float, float] | None  # least and most; None without a number of steps
    basis: tuple[str, ...]
    decomposition_range: tuple[float, float] = (0.0, 0.0)  # least and most
    # Of the evaluation, before and after the training; None where none of it can be told.
    scoring_seconds: tuple[float, float] | None = None
    # Of the base model, in a training also of what its matrices are read from.
    loading_seconds: tuple[float, float] | None = None

    @property
    def whole_seconds(self) -> tuple[float, float] | None:
        """Least and most of all that is told; None without a number of steps."""
        if self.training_seconds is None:
            return None
        parts = [self.decomposition_range, self.training_seconds]
        parts += [each for each in (self.loading_seconds, self.scoring_seconds) if each is not None]
        low, high = (sum(each) for each in zip(*parts, strict=True))
        return low, high


@dataclass(frozen=True)
class Plan(Result):
    """What a run would do and take."""

    model: str
    base_parameters: int
    base_model_bytes: int  # as it is loaded
    target_matrices: int
    rank_rule: str
    device: str  # cpu, or what kind of accelerator the run would use
    processes: int
    adapter: AdapterPlan
    data: DataPlan
    host: MemoryPlan
    on_device: MemoryPlan | None  # of each device; None on a CPU
    memory_basis: tuple[str, ...]
    cure: str | None  # the cheapest change that makes it fit, where it does not
    time: TimePlan
    cost: tuple[float, float] | None  # least and most, in `currency`
    currency: str
    output_dir: str
    output_dir_exists: bool
    cure_keys: tuple[str, ...] = ()  # the same change as KEY=VALUE, one for each key

    @property
    def fits(self) -> bool | None:
        """Whether host and device have the memory; None where nobody knows."""
        known = [each.fits for each in (self.host, self.on_device) if each is not None]
        return False if False in known else None if None in known else True

    def to_dict(self) -> dict[str, Any]:
        """Give the content of `--json`."""
        return super().to_dict() | {"fits": self.fits}


def show_plan(plan: Plan) -> None:
    """The plan as tables and lines on the standard output."""
    out = output()
    print_pairs(_what(plan))
    columns = [
        Column("target modules", is_text=True),
        *(Column(name, goes=goes) for name, goes in (("count", 0), ("out × in", 3))),
        *(Column(name, goes=goes) for name, goes in (("A", 2), ("B", 1), ("rank", 0))),
    ]
    rows = []
    for kind in plan.adapter.kinds:
        m, n, p, q = kind.factor_shape
        sizes = (f"{kind.out_features} × {kind.in_features}", f"{m} × {n}", f"{p} × {q}")
        rows.append([kind.name, str(kind.count), *sizes, span(kind.ranks)])
    out.print()
    print_table(out, columns, rows, where="--json")
    print_line(out, plan.adapter.basis)
    if left := plan.adapter.untouched:
        named = ", ".join(f"{name} ({reason})" for name, reason in left[:_LISTED])
        more = ", ..." if len(left) > _LISTED else ""
        count = counted(len(left), "weight matrix", "weight matrices")
        print_line(out, f"{count} left alone: {named}{more}")
    for place, memory in (("memory", plan.host), (f"{plan.device} memory", plan.on_device)):
        if memory is not None:
            out.print()
            print_pairs(memory_lines(place, memory))
    for line in plan.memory_basis:
        print_line(out, Text(line, style="dim"))
    out.print()
    print_pairs(_time(plan))
    for line in plan.time.basis:
        print_line(out, Text(line, style="dim"))
    out.print()
    print_line(out, _verdict(plan))


def _what(plan: Plan) -> list[tuple[str, str]]:
    data, adapter = plan.data, plan.adapter
    rows, tokens, supervised = data.largest_batch
    whole = adapter.trained_whole
    parts = f"form {adapter.form}"
    if whole:
        parts += f", and {sum(whole.values()):,} of {some_of([*whole])}, trained whole"
    found = [
        ("model", plan.model),
        ("base parameters", f"{plan.base_parameters:,}"),
        ("base model", size(plan.base_model_bytes)),
        ("device", plan.device + (f", {plan.processes} processes" * (plan.processes > 1))),
        ("target matrices", f"{plan.target_matrices:,}"),
        ("rank rule", plan.rank_rule),
        ("trainable parameters", f"{span(adapter.trainable_parameters)} ({parts})"),
        ("adapter on disk", span(adapter.file_bytes, size)),
        ("steps", "by the number of rows" if data.steps is None else f"{data.steps:,}"),
        ("rows per step", f"{data.rows_per_step:,}"),
    ]
    if data.training_rows is not None and data.passes is not None:
        found.append(("training rows", f"{data.training_rows:,}, {data.passes:.3g} passes"))
        found.append(("validation rows", f"{data.validation_rows:,}"))
    if data.tokens is not None:
        found.append(("tokens of the run", f"{data.tokens:,}"))
    batch = f"{rows} x {tokens} tokens, {supervised:,} of them learnt"
    found.append(("largest forward pass", batch))
    found.append(("rows rest on", data.basis))
    note = "; a run lies there already" if plan.output_dir_exists else ""
    return [*found, ("output dir", plan.output_dir + note)]


def memory_lines(place: str, memory: MemoryPlan) -> list[tuple[str, str]]:
    """The parts of a peak and what is free, as names and values; `place` is in front of each."""
    found = [(f"{place}: {name}", size(part)) for name, part in memory.parts.items()]
    found.append((f"{place}: peak", f"{size(memory.peak_bytes)} ({memory.bound_by})"))
    free = "not known" if memory.free_bytes is None else size(memory.free_bytes)
    return [*found, (f"{place}: free here", free)]


def _time(plan: Plan) -> list[tuple[str, str]]:
    time = plan.time
    cached = "" if time.to_decompose else ", all in the cache"
    if 0 < time.to_decompose < plan.target_matrices:
        cached = f", {time.to_decompose} of {plan.target_matrices} matrices"
    found = []
    if time.loading_seconds is not None:
        found.append(("loading", span(time.loading_seconds, duration)))
    found.append(("decomposition", f"{span(time.decomposition_range, duration)}{cached}"))
    if time.training_seconds is not None:
        found.append(("training", span(time.training_seconds, duration)))
    if time.scoring_seconds is not None:
        found.append(("scoring", span(time.scoring_seconds, duration)))
    if plan.cost is not None:
        low, high = plan.cost
        found.append(("cost", f"{span((low, high), money)} {plan.currency}"))
    return found


def _verdict(plan: Plan) -> Text:
    if plan.fits is None:
        return Text("whether it fits is not known: free memory cannot be read here", style="yellow")
    if plan.fits:
        return Text("it fits this machine by the memory that is free now", style="bold green")
    cure = plan.cure or (
        "no smaller batch, checkpointing, dtype or row length tried makes it fit: take a smaller "
        "base model or a machine with more memory"
    )
    return Text(f"it does NOT fit this machine; what helps: {cure}", style="bold red")


def span(ends: tuple[Any, Any], show: Any = lambda value: f"{value:,}") -> str:
    """A range from least to most, or the one value where both are shown alike."""
    low, high = show(ends[0]), show(ends[1])
    return low if low == high else f"{low} to {high}"
