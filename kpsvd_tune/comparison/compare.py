"""The command `compare`: the same training for every method, trial by trial, and the verdict."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.comparison.account import Account, recorded_seconds
from kpsvd_tune.comparison.advice import lines_to_use
from kpsvd_tune.comparison.baselines import Sizes
from kpsvd_tune.comparison.findings import best_rows
from kpsvd_tune.comparison.methods import Method, unfit_names
from kpsvd_tune.comparison.money import Forecast, Price, Purse
from kpsvd_tune.comparison.plan import Grid, next_trials, num_left, planned
from kpsvd_tune.comparison.score import Questions, Scoring, make_questions, scored_task
from kpsvd_tune.comparison.setup import KEYS_OF_TRIALS, Setups
from kpsvd_tune.comparison.taking import POLL_SECONDS, Taking
from kpsvd_tune.comparison.trial import Material
from kpsvd_tune.comparison.trial_log import (
    COMPARISON,
    RESULTS,
    append_row,
    check_schedule,
    open_results,
    read_results,
)
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.comparison.workers import Workers
from kpsvd_tune.data import TokenizedRow, prepare
from kpsvd_tune.data.read.sources import shared_settings
from kpsvd_tune.data.rows.preflight import ModelLimits, model_limits, pad_token_id
from kpsvd_tune.data.rows.store import num_shared
from kpsvd_tune.errors import (
    AdapterError,
    DataError,
    InputError,
    KpsvdTuneError,
    RecipeError,
    StoppedBySignal,
    some_of,
)
from kpsvd_tune.estimate.plan import make_plan
from kpsvd_tune.estimate.verbs import comparison_work
from kpsvd_tune.events import Events, Silence
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    base_fingerprint,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.phase import data_cures, watched
from kpsvd_tune.processes import device
from kpsvd_tune.recipe import AdapterRecipe, Recipe
from kpsvd_tune.report.comparison import Comparison, Trial, TrialRow, TrialScore
from kpsvd_tune.report.comparison_page import comparison_page
from kpsvd_tune.report.pages import write_page
from kpsvd_tune.report.plan import span
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.find import trained_as
from kpsvd_tune.runs.ownership import refuse_foreign, refuse_inside_run
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_bytes, read_json, to_json
from kpsvd_tune.training.precision import Settled, asks_for_auto, settle_precision
from kpsvd_tune.training.schedule import RunLength, num_warmup_steps, run_length
from kpsvd_tune.training.stages import read_rows
from kpsvd_tune.units import counted, duration
from kpsvd_tune.watch.before import row_warnings


class Watcher(Protocol):
    """What a comparison tells whoever started it, besides events."""

    def begin(self, rows: Sequence[TrialRow], num_left: int, jobs: int) -> None:
        """Show the trials that are done already, and how many are to come, ``jobs`` at a time."""

    def started(self, trial: Trial, number: int, total: int) -> None:
        """Report a trial that begins, or goes on: ``number`` of ``total``, counted from 1."""

    def stepped(self, trial: Trial, step: int, total: int, loss: float) -> None:
        """Report one step of a trial that runs."""

    def finished(self, row: TrialRow, num_left: int) -> None:
        """Report a trial that is done, and how many are to come."""

    def answered(self, done: int, total: int) -> None:
        """Report how many answers the models that are scored have given, of all they are to."""

    def note(self, text: str) -> None:
        """Say something between trials."""


def compare(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    methods: Sequence[Method],
    grid: Grid,
    events: Events,
    watcher: Watcher,
    *,
    jobs: int = 1,
    money: float | None = None,
    score: str | None = None,
    is_shared: bool = False,
    num_trials: int | None = None,
) -> Comparison:
    """Run every trial that is not done yet, and draw the verdict.

    Args:
        recipe: What all methods share.
        recipes: The recipe of each method by its name, which differs in its adapter section.
        methods: The methods of the grid.
        grid: Each method's budgets and rates, and the seeds.
        events: Told of stages and progress.
        watcher: Told of trials.
        jobs: Trials at a time; on GPUs each takes its own.
        money: What all calls together may spend, at the recipe's price of device time; None: as
            much as it takes.
        score: Task that the trained models are judged by beside their loss; None: none.
        is_shared: Work beside other calls on the same folder, which have it set too, on any
            machines: take trials that none of them has, one at a time.
        num_trials: At most so many trials in this call, of a shared folder; None: all there are.

    Returns:
        The verdict, also written to comparison.json and comparison.html in the recipe's
        output_dir, beside results.jsonl with a row a trial.

    Raises:
        StoppedBySignal: SIGINT or SIGTERM; running trials were saved.
        KpsvdTuneError: See :mod:`kpsvd_tune.errors`.
    """
    check_comparable(recipe, methods)
    task = None if score is None else scored_task(recipe, score)
    budgets = sorted({budget for each in grid.entries for budget in each.budgets})
    run = RunDirectory(recipe.output_dir)
    taking = Taking(run.path, num_trials) if is_shared else None
    if taking is None:
        _check_folder(run.path)
    with watched() as phase, ExitStack() as stack:
        stack.enter_context(run.lock() if taking is None else taking.joined())
        began = time.monotonic()
        phase.enter("preparing the comparison", data_cures(recipe), "finished trials are kept")
        preparing = ExitStack()
        stack.enter_context(preparing)
        if taking is not None:
            preparing.enter_context(taking.alone(events))
            _check_folder(run.path)
        settled = _settle_precision(recipe, has_workers=is_shared)
        recipe = settled.recipe
        if grid.plan != "done":
            Workers.warm_up()
            stack.push(_cool_down)
        source = resolve_model(recipe.model.path, recipe.model.revision)
        skeleton = load_skeleton(source)
        material, shared, warnings = _material(recipe, source, skeleton, events)
        length = _length(recipe, grid, material, events)
        sizes = {method.name: _sizes(method, recipe, source, skeleton) for method in methods}
        kind = skeleton.config.model_type
        plan = Setups(recipe, recipes, methods, sizes, kind, run.path, shared)
        plan.prepare(source, budgets, events)
        notes = [*plan.notes, *filter(None, [settled.note])]
        for note in notes:
            events.note(note)
        if recipe.restrain is not None:
            events.note("restrain is for `train`: the updates of the trials stay as trained")
        if grid.plan != "done":
            grid = grid.with_budgets(plan.budgets)
        rows = open_results(run.path, shared, plan.adapters(), has_workers=is_shared)
        if rows and next_trials(grid, rows) and num_warmup_steps(recipe.train, length.num_steps):
            check_schedule(run.path)
        account = Account(run.path, rows, num_devices(), began)
        preparing.close()
        session = _Session(recipe, grid, events, watcher, plan, account, rows, jobs, taking)
        session.num_steps = length.num_steps
        # Of what all trials share; they stand in the page as well.
        session.notes = [*notes, *(each.text for each in (*warnings, *length.warnings))]
        if task is not None:
            session.questions = make_questions(task, material.dataset, material.chat_template)
        try:
            phase.enter("running trials", kept="finished trials are kept")
            with Workers(material, recipe, jobs, watcher.stepped) as workers:
                workers.tick = account.tick
                session.run(workers, money)
        except StoppedBySignal:
            for trial in workers.unsaved:
                events.note(
                    f"{trial} had not saved in time: it goes on from its last checkpoint, and "
                    "begins anew where it has none"
                )
            # The verdict so far, for whoever wants to look at it now.
            if taking is None:  # of several workers the others do
                with suppress(InputError):
                    session.conclude()
            raise
        finally:
            # Also of a call that an error ends.
            account.tick()
            account.write()
        return session.conclude()


def _cool_down(error: type[BaseException] | None, *_: object) -> None:
    if error is not None:
        Workers.cool_down()


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a comparison."""
    if not (folder / COMPARISON).exists():
        # The record of a comparison is the first file of its folder.
        refuse_inside_run(folder, "output_dir")
        refuse_foreign(folder, ("claims",))


def _settle_precision(recipe: Recipe, *, has_workers: bool) -> Settled:
    """The recipe without `auto` in precision and dtype; finished trials decide it, or workers."""
    file, record = Path(recipe.output_dir) / COMPARISON, None
    is_bound = has_workers or read_results(Path(recipe.output_dir))
    if asks_for_auto(recipe) and file.exists() and is_bound:
        record = {"identity": read_json(file).get("shared", {})}
    return settle_precision(recipe, device(), record)


@dataclass
class _Session:
    """One call of the command, from the first trial to the verdict."""

    recipe: Recipe
    grid: Grid
    events: Events
    watcher: Watcher
    plan: Setups
    account: Account
    rows: list[TrialRow]  # those that are done
    jobs: int
    taking: Taking | None = None  # where other calls work on the folder too
    notes: Sequence[str] = ()  # what a reader of the verdict must know of the plan
    questions: Questions | None = None  # what models are scored by
    base: Mapping[str, float | None] = field(default_factory=dict)  # losses of the base model
    base_score: TrialScore | None = None
    measuring_seconds: float = 0.0
    num_steps: int = 0  # of a trial that nothing ends early
    purse: Purse | None = None  # None without a budget of money

    @property
    def folder(self) -> Path:
        """Where the comparison lies."""
        return Path(self.recipe.output_dir)

    def run(self, workers: Workers, money: float | None) -> None:
        """Run the trials that are to come and that the money buys, and score the best ones."""
        began = time.monotonic()
        with self._alone():
            self.base = workers.base(self.folder / "base.json", self.events)
            # A trial loads and measures a model too.
            self.measuring_seconds = time.monotonic() - began
            self._score_base(workers)
        if money is not None:
            self._open_purse(workers, money)
        elif self.taking is None and not self.rows:
            self._tell_estimate()
        # A stage of its own: the last one has ended, and gives no more signs of life.
        coming = self._num_coming()
        self.events.stage("running trials" if coming else "no trial is left to run")
        self.watcher.begin(self.rows, coming, self.jobs)
        if self.taking is not None:
            self._take_trials(workers, self.taking)
            return
        while pending := next_trials(self.grid, self.rows):
            self._run_trials(workers, pending)
            if self.purse is not None and self.purse.refused is not None:
                break
        self._score_best(workers, self._unscored())

    def _tell_estimate(self) -> None:
        """Say how many trials come and how long they take, before one has shown it."""
        if not (number := self._num_coming()):
            return
        self.events.stage(f"estimating how long {counted(number, 'trial')} will take")
        budget = max(max(each.budgets) for each in self.grid.entries if each.budgets)
        work = None
        # The trials need no estimate, and tell their own reasons where they cannot run.
        with suppress(KpsvdTuneError, MemoryError, torch.OutOfMemoryError):
            work = comparison_work(self.recipe, budget, number, self.jobs)
        if work is not None and work.seconds is not None:
            self.events.note(
                f"a trial: {dict(work.steps)['a trial']}; in all: {span(work.seconds, duration)}, "
                f"{self.jobs} at a time; the trials' own steps tell better"
            )

    def _run_trials(self, workers: Workers, trials: Sequence[Trial]) -> None:
        running: set[Trial] = set()

        def begun(trial: Trial) -> None:
            running.add(trial)
            done = len(self.rows)
            number = done + len(running)
            self.watcher.started(trial, number, max(number, done + self._num_coming()))

        workers.begun = begun
        for row in workers.rows([self.plan.setup(trial, self.base) for trial in trials]):
            append_row(self.folder, row)
            self.rows.append(row)
            running.discard(row.trial)
            if self.purse is not None:
                self._tell_measured(self.purse, row)
            self.watcher.finished(row, self._num_coming())
            for code, text in row.warnings.items():
                self.watcher.note(f"{row.trial}: {code}: {text}")

    def _alone(self) -> AbstractContextManager[None]:
        """Where other calls work on the folder, keep them from what is done once for all."""
        return nullcontext() if self.taking is None else self.taking.alone(self.events)

    def _take_trials(self, workers: Workers, taking: Taking) -> None:
        """Run trials that no other worker has, as many as this one may, then score models."""
        if not taking.has_more:
            return
        told = ""
        while taking.has_more:
            self._read_again()
            pending = next_trials(self.grid, self.rows)
            names = [trial.folder_name for trial in pending]
            with taking.take(names, partial(self._is_bought, pending)) as taken:
                if taken.number is not None:
                    # Another may have ended it since the rows were read.
                    self._read_again()
                    trial = pending[taken.number]
                    if all(row.trial != trial for row in self.rows):
                        self._run_trials(workers, [trial])
                        taking.count()
                    continue
            if not taken.others:
                break
            if taking.is_bounded and num_left(self.grid, self.rows) == len(pending):
                self.watcher.note("other workers run every trial that is left")
                return
            if told != (
                told := f"waiting for {counted(len(taken.others), 'trial')} of other workers"
            ):
                self.watcher.note(told)
            self._wait()
        self._read_again()
        is_refused = self.purse is not None and self.purse.refused is not None
        if is_refused or not next_trials(self.grid, self.rows):
            self._take_scorings(workers, taking)

    def _is_bought(
        self, pending: Sequence[Trial], number: int, others: Mapping[int, float]
    ) -> bool:
        """Whether the money holds a trial besides those that all workers run."""
        if self.purse is None:
            return True
        self.account.tick()
        self.account.write()
        now, clock = time.monotonic(), time.time()
        self.purse.run_elsewhere({pending[each]: now - (clock - others[each]) for each in others})
        return self.purse.may_start(pending[number])

    def _take_scorings(self, workers: Workers, taking: Taking) -> None:
        while left := self._unscored():
            names = [f"score-{row.trial.folder_name}" for row in left]
            with taking.take(names) as taken:
                if taken.number is not None:
                    self._read_again()
                    wanted = left[taken.number].trial
                    rows = [row for row in self._unscored() if row.trial == wanted]
                    if rows and not self._score_best(workers, rows):
                        return
                    continue
            if taking.is_bounded:
                return
            self._wait()
            self._read_again()

    def _wait(self) -> None:
        self.account.tick()
        time.sleep(POLL_SECONDS)

    def _read_again(self) -> None:
        """Take in the rows of other workers."""
        self.rows[:] = read_results(self.folder)

    def conclude(self) -> Comparison:
        """Write the account, and the verdict on the trials so far."""
        with self._alone():
            if self.taking is not None:
                self._read_again()
            self.account.tick()
            self.account.write()
            return _conclude(self)

    def trials_to_come(self) -> tuple[int, str]:
        """How many trials of the plan are not done, and what to do about them."""
        number = len(next_trials(self.grid, self.rows))
        if self.purse is None or not number:
            return number, ""
        coming = planned(self.grid, self.rows)
        needed = self.purse.price.words(self.purse.needed(coming))
        return number, (
            f"trials: {len(coming)} are left out for want of money; --money of about {needed} in "
            "all would run them"
        )

    def _num_coming(self) -> int:
        if self.purse is None:
            return num_left(self.grid, self.rows)
        return len(self.purse.split(planned(self.grid, self.rows))[0])

    def _open_purse(self, workers: Workers, money: float) -> None:
        """Say what the money buys; InputError where it buys nothing at all."""
        scoring = 0.0 if self.base_score is None else self.base_score.seconds
        self.account.tick()
        self.purse = make_purse(
            self.recipe,
            self.rows,
            money,
            self.jobs,
            lambda: self.account.device_seconds,
            scoring=scoring,
            measuring=self.measuring_seconds,
            unscored=lambda: len(self._unscored()),
        )
        self.purse.check(self.grid, self.rows)
        for line in self.purse.plan_lines(self.grid, self.rows):
            self.events.note(line)
        workers.may_start = self.purse.may_start

    def _tell_measured(self, purse: Purse, row: TrialRow) -> None:
        """Take a finished trial out of those that run; the first one replaces the estimate."""
        purse.ended(row.trial)
        if len(self.rows) == 1:
            for line in purse.plan_lines(self.grid, self.rows):
                self.watcher.note(line)

    def _score_base(self, workers: Workers) -> None:
        if self.questions is None:
            return
        file = self.folder / "base_score.json"
        if file.exists():
            cure = "remove it, and the base model is scored again"
            known = read_json(file, TrialScore, cure=cure)
            if (known.task, known.asked) == (self.questions.task.task, self.questions.asked):
                self.base_score = known
                return
        self.events.stage(f"scoring the base model on {self.questions.task.task}")
        folder = self.folder / "base_score"
        workers.answered = lambda _, *counts: self.events.advance("answering", *counts)
        ((_, found),) = workers.scores(
            [Scoring(self.questions, None, folder, "the base model's score")]
        )
        self.events.end_progress()
        replace_file(file, to_json(found.to_dict()))
        self.base_score = found

    def _unscored(self) -> list[TrialRow]:
        """Every seed of each method at each budget at its best rate that has no score yet."""
        if self.questions is None:
            return []
        groups: dict[tuple[str, int], list[TrialRow]] = {}
        for row in self.rows:
            if self.grid.holds(row):
                groups.setdefault((row.method, row.budget), []).append(row)
        wanted = (self.questions.task.task, self.questions.asked)
        return [
            row
            for group in groups.values()
            for row in best_rows(group)
            if row.score is None or (row.score.task, row.score.asked) != wanted
        ]

    def _score_best(self, workers: Workers, rows: Sequence[TrialRow]) -> bool:
        """Have the models of some rows answer; False where the money does not reach for all."""
        if self.questions is None:
            return True
        left = {row.trial: row for row in rows}
        setups = [self.plan.setup(trial, self.base) for trial in left]
        scorings = [
            Scoring(self.questions, each, each.folder / "score", f"the score of {each.trial}")
            for each in setups
        ]
        if self.purse is not None:
            workers.may_score = self.purse.may_score
        answers: dict[str, int] = {}

        def answered(scoring: Scoring, done: int, total: int) -> None:
            answers[scoring.name] = done
            self.watcher.answered(sum(answers.values()), total * len(scorings))

        workers.answered = answered
        number = 0
        for number, (scoring, found) in enumerate(workers.scores(scorings), start=1):
            if self.purse is not None:
                self.purse.scored()
            assert scoring.setup is not None
            row = left[scoring.setup.trial]
            scored = replace(row, score=found)
            append_row(self.folder, scored)
            self.rows[self.rows.index(row)] = scored
            self.watcher.note(
                f"scored {number} of {len(left)}: {row.trial}: {100 * found.value:.1f} % of "
                f"{len(found.shares)} in {duration(found.seconds)}"
            )
        if number < len(left):
            self.watcher.note(
                f"{counted(len(left) - number, 'model')} not scored: the money is spent"
            )
        return number == len(left)


def make_purse(
    recipe: Recipe,
    rows: Sequence[TrialRow],
    money: float,
    jobs: int,
    spent: Callable[[], float],
    *,
    scoring: float = 0.0,
    measuring: float = 0.0,
    unscored: Callable[[], int] = lambda: 0,
) -> Purse:
    """Money at the recipe's price, which it must have.

    ``spent`` gives device seconds so far; ``scoring`` are the seconds to score a model, and
    ``measuring`` those to load and measure one, which an estimate of a training leaves out.
    """
    price = recipe.compare.price_per_hour
    assert price is not None  # checked where the money was typed

    @cache
    def estimate() -> tuple[float, float]:
        found = make_plan(recipe, Silence()).time
        low, high = found.training_seconds or (0.0, 0.0)
        others = found.decomposition_seconds + measuring
        return low + others, high + others

    share = min(jobs, num_devices()) / jobs
    return Purse(
        Price(money, price, recipe.compare.currency, share),
        Forecast(rows, estimate, scoring),
        spent,
    )


def money_summary(recipe: Recipe, grid: Grid, money: float, jobs: int) -> dict[str, Any]:
    """What money would buy, as JSON values; nothing is run or written but cached rows."""
    folder = Path(recipe.output_dir)
    rows = read_results(folder)
    spent = recorded_seconds(folder, rows)
    purse = make_purse(recipe, rows, money, jobs, lambda: spent)
    coming = planned(grid, rows)
    bought, rest = purse.split(coming)
    return {
        "money": money,
        "trials_bought": len(bought),
        "trials_left_out": len(rest),
        "plan_of_the_money": purse.plan_lines(grid, rows),
    }


def num_devices() -> int:
    """Devices that this machine has for trials: its GPUs, or the CPU."""
    return max(1, torch.cuda.device_count()) if device().type == "cuda" else 1


def _material(
    recipe: Recipe, source: ModelSource, skeleton: Any, events: Events
) -> tuple[Material, dict[str, Any], list[Event]]:
    """What all trials share, what must be equal for more of them, and what looks wrong of it."""
    assert recipe.dataset is not None
    tokenizer, limits = load_tokenizer(source), model_limits(skeleton)
    data = read_rows(recipe, recipe.dataset, tokenizer, skeleton, events)
    if not data.validation:
        raise DataError(
            "compare judges by held-out rows and dataset.validation is 0; set it to a share, "
            "a number of rows or a file"
        )
    test, test_sha256 = _test_rows(recipe, tokenizer, limits)
    if known := num_shared(test, data.train):
        events.note(
            f"KNOWN ROWS: {known} of the {len(test)} rows of compare.test are trained on, so "
            "the test loss is partly one of known rows: take them out of one of the two"
        )
    forgetting, text_sha256 = _forgetting_text(recipe)
    shared = {
        "recipe": _fixed_part(recipe),
        "base": base_fingerprint(source),
        "dataset": data.sha256,
        "test": test_sha256,
        "forgetting": text_sha256,
    }
    material = Material(
        source=source,
        train=data.train,
        validation=data.validation,
        test=test,
        forgetting=forgetting,
        pad_token_id=pad_token_id(tokenizer),
        dataset=trained_as(recipe.dataset, data.template),
        chat_template=tokenizer.chat_template,
    )
    return material, shared, list(row_warnings(data.report))


def _length(recipe: Recipe, grid: Grid, material: Material, events: Events) -> RunLength:
    """The length of a trial, where the recipe's steps and validations fit together."""
    train = recipe.train.model_copy(update=KEYS_OF_TRIALS)
    length = run_length(train, len(material.train), len(material.validation))
    if length.faults and grid.plan != "done":
        raise RecipeError("\n".join(length.faults))
    for note in length.notes:
        events.note(note)
    for warning in length.warnings:
        events.tell(warning)
    return length


def _sizes(method: Method, recipe: Recipe, source: ModelSource, skeleton: Any) -> Sizes:
    """(out_features, in_features) of each module that a method goes on."""
    adapter, own = recipe.adapter, method.modules
    targets = adapter.target_modules if own is None else own
    try:
        names = target_names(skeleton, targets, adapter.exclude_modules, adapter.modules_to_save)
    except AdapterError as error:
        if own is None:
            raise
        raise InputError(f"--methods {method.name}: {error}") from error
    reader = WeightReader(source, names, skeleton)
    sizes = {name: reader.size(name) for name in names}
    reader.close()
    return sizes


def _conclude(session: _Session) -> Comparison:
    """Write the verdict on the trials of the grid, also where more of them are to come."""
    recipe, plan, base = session.recipe, session.plan, session.base
    folder, train = session.folder, recipe.train
    chosen = [row for row in session.rows if session.grid.holds(row)]
    steps = max((len(row.losses) for row in chosen), default=0)
    num_missing, to_come = session.trials_to_come()

    def lines(row: TrialRow) -> tuple[str, ...]:
        return lines_to_use(plan.setup(row.trial, base)) if plan.knows(row.trial) else ()

    verdict = compare_rows(
        chosen,
        model=recipe.model.path,
        steps=steps,
        base=base,
        # Early stopping shortens a run, and not its warm-up.
        num_warmup=num_warmup_steps(train, max(steps, session.num_steps)),
        max_grad_norm=train.max_grad_norm,
        price_per_hour=recipe.compare.price_per_hour,
        currency=recipe.compare.currency,
        num_missing=num_missing,
        to_come=to_come,
        jobs=session.jobs,
        notes=session.notes,
        base_score=session.base_score,
        device_seconds=session.account.device_seconds,
        money=None if session.purse is None else session.purse.price.amount,
        lines=lines,
    )
    replace_file(folder / "comparison.json", to_json(verdict.to_dict()))
    page = folder / "comparison.html"
    fault = write_page(page, lambda: comparison_page(verdict, chosen))
    session.events.note(fault or f"written: {page}, comparison.json and {RESULTS}")
    return verdict


def check_comparable(recipe: Recipe, methods: Sequence[Method]) -> None:
    """Refuse what methods cannot be compared by; RecipeError says which key."""
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `compare` needs")
    if recipe.adapter.modules_to_save:
        raise RecipeError(
            "adapter.modules_to_save: modules trained whole would count against no budget; set it "
            "to [] to compare adapters"
        )
    if recipe.adapter.from_ is not None:
        raise RecipeError(
            "adapter.from: methods are compared from their own starts, not from a trained adapter; "
            "set it to null"
        )
    if recipe.model.device_map is not None:
        raise RecipeError(
            "model.device_map: auto: `compare` keeps one base on the card for all its trials; "
            "expected model.device_map: null, with model.quantization for a base that is too large"
        )
    kind = recipe.model.quantization
    if unfit := unfit_names(methods, kind):
        raise RecipeError(
            f"model.quantization: {kind}: PEFT cannot train {some_of(unfit)} on such weights; "
            "expected model.quantization: null, or --methods without them"
        )


def _test_rows(
    recipe: Recipe, tokenizer: Any, limits: ModelLimits
) -> tuple[Sequence[TokenizedRow], str | None]:
    """Rows that no choice looks at, and their hash."""
    if recipe.compare.test is None:
        return (), None
    assert recipe.dataset is not None
    dataset = shared_settings(recipe.dataset).model_copy(
        update={"path": recipe.compare.test, "name": None, "split": "train", "validation": 0}
    )
    found = prepare(dataset, tokenizer, seed=0, limits=limits, keeps_template=True)
    return found.train, found.sha256


def _forgetting_text(recipe: Recipe) -> tuple[Path | None, str | None]:
    """The text of another kind, and its hash."""
    if recipe.compare.forgetting is None:
        return None, None
    file = Path(recipe.compare.forgetting)
    try:
        content = read_bytes(file)
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"compare.forgetting: {file} cannot be read as UTF-8 text ({error}); name a text file, "
            "or set it to null"
        ) from error
    return file, hashlib.sha256(content).hexdigest()


def _fixed_part(recipe: Recipe) -> dict[str, Any]:
    """What must be equal in all trials; methods, budgets, rates and seeds may be added later."""
    kept = {"target_modules", "exclude_modules", "modules_to_save", "dropout"}
    return recipe.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(("output_dir", "tracking", "evaluation"), True),
            "adapter": AdapterRecipe.model_fields.keys() - kept,
            "train": {"learning_rate", "seed"},
            "compare": {"price_per_hour", "currency"},
        },
    )
