"""What the rows of trials say of each method at each budget, and of two of them side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from kpsvd_tune.comparison.methods import is_ours
from kpsvd_tune.comparison.statistics import estimate, mean_curve, steps_to, variation
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import (
    Difference,
    Estimate,
    MethodSummary,
    ScoreDifference,
    TrialRow,
    TrialScore,
)

# A method at a budget.
Key = tuple[str, int]


class Findings:
    """The trials by method and budget, each at its best learning rate.

    ``best`` holds the rows of the best rate of each method at each budget, by seed. ``base_loss``
    is the base model's validation loss, None where it is not known. ``reference`` is the method
    that the others are compared with: plain LoRA if it is there, else a variant of it, else any
    baseline. An InputError says that no trial ended with a loss.
    """

    def __init__(
        self,
        rows: Sequence[TrialRow],
        *,
        base: Mapping[str, float | None],
        steps: int,
        num_warmup: int,
        max_grad_norm: float | None,
        price_per_hour: float | None,
        base_score: TrialScore | None = None,
    ) -> None:
        self.rows, self.steps, self.num_warmup = rows, steps, num_warmup
        self.base_score = None if base_score is None else base_score.value
        # How the questions were asked: scores of other ways are left out.
        self.asked = None if base_score is None else (base_score.task, base_score.asked)
        self.base_loss = base.get("validation_loss")
        self._max_grad_norm, self._price_per_hour = max_grad_norm, price_per_hour
        self._groups: dict[Key, list[TrialRow]] = {}
        for row in rows:
            self._groups.setdefault((row.method, row.budget), []).append(row)
        found = {key: best_rows(group) for key, group in self._groups.items()}
        self.best = {key: chosen for key, chosen in found.items() if chosen}
        if not self.best:
            raise InputError("no trial has ended with a loss yet: nothing can be compared")
        self.reference = min(
            self.methods, key=lambda name: (name != "lora", name[:4] != "lora", is_kpsvd(name))
        )

    @property
    def methods(self) -> list[str]:
        """The names, in the order of the trials."""
        return list(dict.fromkeys(method for method, _ in self.best))

    @cached_property
    def summaries(self) -> tuple[MethodSummary, ...]:
        """Every method at every budget, smallest budget first."""
        return tuple(self._summary(key) for key in sorted(self.best, key=lambda key: key[::-1]))

    def num_rates(self, key: Key) -> int:
        """How many learning rates a method has trials with at a budget."""
        return len({row.learning_rate for row in self._groups[key]})

    def budgets(self, method: str) -> list[int]:
        """The budgets that a method has trials at, ascending."""
        return sorted(budget for name, budget in self.best if name == method)

    def rates(self, key: Key) -> list[float]:
        """The learning rates that a method was tried at with a budget, ascending."""
        return sorted({row.learning_rate for row in self._groups[key]})

    def pairs(self, one: Key, other: Key) -> list[tuple[TrialRow, TrialRow]]:
        """The rows of both by seed, which fixes the order of the training rows."""
        by_seed = {row.seed: row for row in self.best[other]}
        return [(row, by_seed[row.seed]) for row in self.best[one] if row.seed in by_seed]

    def difference(self, one: Key, other: Key) -> Difference | None:
        """Validation loss of one minus that of the other; None without a seed in common."""
        changes = [_loss(own) - _loss(theirs) for own, theirs in self.pairs(one, other)]
        return Difference(*one, *other, estimate(changes)) if changes else None

    def differences(self) -> Iterable[Difference]:
        """Of each method minus each baseline and the reference, at the same or a larger budget."""
        others = [name for name in self.methods if not is_kpsvd(name) or name == self.reference]
        for summary in self.summaries:
            own = key_of(summary)
            for other in ((name, budget) for name in others for budget in self.budgets(name)):
                if other[1] >= summary.budget and other != own:
                    found = self.difference(own, other)
                    if found is not None:
                        yield found

    def score_difference(self, one: Key, other: Key) -> ScoreDifference | None:
        """The score of one minus that of the other; None without a scored seed in common.

        None with a single question as well, which has no spread to tell chance by.

        Questions are the sample: a question's share of right answers is its mean over the seeds in
        common, and the standard error is that of the mean of the questions' differences.
        """
        pairs = [
            (own, theirs)
            for first, second in self.pairs(one, other)
            if (own := self.score_of(first)) and (theirs := self.score_of(second))
        ]
        if not pairs or any(len(own.shares) != len(theirs.shares) for own, theirs in pairs):
            return None
        changes = [
            statistics.fmean(own.shares[place] - theirs.shares[place] for own, theirs in pairs)
            for place in range(len(pairs[0][0].shares))
        ]
        if len(changes) < 2:
            return None
        spread = statistics.stdev(changes)
        return ScoreDifference(
            *one,
            *other,
            change=statistics.fmean(changes),
            stderr=spread / math.sqrt(len(changes)),
            num_questions=len(changes),
            num_seeds=len(pairs),
        )

    def score_of(self, row: TrialRow) -> TrialScore | None:
        """The score of a trial, where the questions were asked as the base model was."""
        score = row.score
        return score if score is not None and (score.task, score.asked) == self.asked else None

    def lowest_mean(self, key: Key) -> float:
        """The lowest point of the mean validation curve over seeds."""
        return min(
            loss for _, loss in mean_curve([row.validation_losses for row in self.best[key]])
        )

    def _summary(self, key: Key) -> MethodSummary:
        chosen, group = self.best[key], self._groups[key]
        first = chosen[0]
        rates = self.rates(key)
        seconds = statistics.median(row.seconds_per_step for row in chosen)
        init = statistics.median(row.init_seconds for row in chosen)
        steps: list[float] = []
        if (self.reference, key[1]) in self.best:
            goal = self.lowest_mean((self.reference, key[1]))
            reached = [steps_to(row.validation_losses, goal) for row in chosen]
            steps = [each for each in reached if each is not None]
        norms = [norm for row in chosen for norm in row.grad_norms]
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        hours, price = (init + seconds * len(first.losses)) / 3600, self._price_per_hour
        return MethodSummary(
            method=first.method,
            budget=first.budget,
            trainable_parameters=first.trainable_parameters,
            stored_parameters=first.stored_parameters,
            rank=first.rank,
            learning_rate=first.learning_rate,
            is_edge=len(rates) > 1 and first.learning_rate in (rates[0], rates[-1]),
            num_trials=len(group),
            validation_loss=estimate([_loss(row) for row in chosen]),
            test_loss=_known([row.test_loss for row in chosen]),
            steps_to_reference=estimate(steps) if steps else None,
            seconds_to_reference=statistics.fmean(steps) * seconds if steps else None,
            gradient_variation=estimate(
                [variation(row.grad_norms, self.num_warmup) for row in chosen]
            ),
            clipped_share=sum(norm > limit for norm in norms) / max(1, len(norms)),
            forgetting=_known([row.forgetting for row in chosen]),
            seconds_per_step=seconds,
            init_seconds=init,
            peak_memory_bytes=max(row.peak_memory_bytes for row in chosen),
            cost=None if price is None else hours * price,
            is_ours=is_ours(first.method),
            score=_known(
                [None if (own := self.score_of(row)) is None else own.value for row in chosen]
            ),
        )


def is_kpsvd(method: str) -> bool:
    """Whether a method's name is one of ours."""
    return method.startswith("kpsvd")


def key_of(summary: MethodSummary) -> Key:
    """Its method and budget."""
    return summary.method, summary.budget


def lowest(summaries: Iterable[MethodSummary]) -> MethodSummary | None:
    """The one with the lowest mean loss among those with the most seeds: few may look lucky."""
    found = list(summaries)
    most = max((each.validation_loss.n for each in found), default=0)
    found = [each for each in found if each.validation_loss.n == most]
    return min(found, key=lambda each: each.validation_loss.mean, default=None)


def best_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows of the best learning rate, by seed; empty where every rate failed somewhere.

    The best is the one with the lowest mean validation loss among the rates that were run with the
    most seeds and failed on none.
    """
    by_rate: dict[float, list[TrialRow]] = {}
    for row in rows:
        by_rate.setdefault(row.learning_rate, []).append(row)
    whole = [
        each for each in by_rate.values() if all(row.validation_loss is not None for row in each)
    ]
    most = max(map(len, whole), default=0)
    chosen = min(
        (each for each in whole if len(each) == most),
        key=lambda each: (statistics.fmean(map(_loss, each)), each[0].learning_rate),
        default=[],
    )
    return sorted(chosen, key=lambda row: row.seed)


def _loss(row: TrialRow) -> float:
    assert row.validation_loss is not None
    return row.validation_loss


def _known(values: Sequence[float | None]) -> Estimate | None:
    """Their mean, where all are known."""
    known = [each for each in values if each is not None]
    return estimate(known) if known and len(known) == len(values) else None
