"""Score a model on tasks: read rows, generate what is missing, score everything.

The folder of an evaluation holds completions.jsonl, which an interrupted run goes on from, and
evaluation.json, which says what was asked of which model; at the end points.json, which says what
each answer was worth. Completions are only ever continued under the very same settings and weights:
a score is never made of two models' answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.format import REQUIRED_ROLES
from kpsvd_tune.data.encode.templates import unread_escape
from kpsvd_tune.data.read.sources import shared_settings
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import (
    COMPLETIONS_FILE,
    POINTS_FILE,
    SETTINGS_FILE,
    Completion,
    append_completion,
    read_completions,
    renew_golds,
    repair_completions,
)
from kpsvd_tune.evaluation.doubt import doubt
from kpsvd_tune.evaluation.generation import (
    GenerationOptions,
    LanguageModel,
    Prompt,
    generate_completions,
)
from kpsvd_tune.evaluation.lm_harness import check_harness, harness_scores, task_names
from kpsvd_tune.evaluation.loss import check_loss, score_loss
from kpsvd_tune.evaluation.questions import (
    Question,
    answer_tail,
    build_prompts,
    num_shots,
    read_questions,
    read_shots,
    stop_strings,
)
from kpsvd_tune.evaluation.sandbox.run import Sandbox
from kpsvd_tune.evaluation.scoring import (
    check_code_execution,
    check_scorers,
    missing_scorers,
    score_completions,
)
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.events import Events
from kpsvd_tune.models.offload import is_offloaded
from kpsvd_tune.processes import num_processes, on_main_process, rank, wait_for_all
from kpsvd_tune.recipe import LOSS_TASKS, OWN_ROWS_TASKS, DatasetRecipe, EvaluationRecipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import as_mapping, score_text
from kpsvd_tune.runs.find import Loaded, full_precision_note
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import make_folder, rename, replace_file
from kpsvd_tune.storage.json_files import parse_json, read_bytes, to_json
from kpsvd_tune.units import counted

_SAMPLED_WEIGHTS = 64


def labelled(tasks: Sequence[EvaluationRecipe]) -> dict[str, EvaluationRecipe]:
    """Tasks by the name of their scores: the task's, numbered from the second of a kind on."""
    named: dict[str, EvaluationRecipe] = {}
    for task in tasks:
        number = sum(each.task == task.task for each in named.values()) + 1
        named[task.task if number == 1 else f"{task.task}-{number}"] = task
    return named


def check_tasks(tasks: Sequence[EvaluationRecipe], dataset: DatasetRecipe | None) -> list[str]:
    """Find now what would stop the scoring after a training, by reading all rows.

    Returns:
        What looks wrong and stops nothing, a sentence each.

    Raises:
        InputError: Worked examples are wanted, and there are no rows to take them from; or no
            scorer of the task is installed.
        DataError: A task's rows or text cannot be read.
    """
    doubts = []
    for task in tasks:
        recipe = as_trained(task, dataset)
        check_scorers(task.task)
        if recipe.task == "lm_eval":
            check_harness(recipe)
        elif recipe.task in LOSS_TASKS:
            check_loss(recipe)
        else:
            questions = read_questions(recipe)
            doubts.append(doubt_of(recipe, questions))
            read_shots(recipe, questions)
    return [each for each in doubts if each is not None]


def doubt_of(task: EvaluationRecipe, questions: Sequence[Question]) -> str | None:
    """What looks wrong about scoring these rows with the task, as a sentence; None: nothing."""
    found = None
    if task.labels is None:
        found = doubt(task.task, [each.answer for each in questions], is_sample=True)
    if found is None:
        return None
    return (
        f"warning: evaluation of {task.task}: {found.reason} ({rows_source(task)}): are the "
        f"columns right ({task.written('columns')}={{...}})? If so: {found.cure}"
    )


@dataclass(frozen=True)
class Scorer:
    """Scores a model on tasks and reports progress."""

    tokenizer: PreTrainedTokenizerBase  # the model's
    # What the model was trained on: its template and columns hold where a task has none.
    dataset: DatasetRecipe | None
    place: torch.device  # to compute on
    events: Events  # told of progress and scores
    sandbox: Sandbox | None  # for programs, which mbpp runs; None: they may not run

    def score_all(
        self, model: Any, tasks: Mapping[str, EvaluationRecipe], folder: Path
    ) -> dict[str, list[Score]]:
        """Scores by name, told as they are found; completions go to a folder of the task's name.

        Completions there that another model wrote are set aside.
        """
        found = {}
        for name, task in tasks.items():
            found[name] = self.score(model, task, folder / name, set_aside=True)
            for score in found[name]:
                self.events.note(f"{score.scorer}: {score_text(score.scorer, score.to_dict())}")
        return found

    def of_training(
        self,
        tasks: Mapping[str, EvaluationRecipe],
        before: Mapping[str, Sequence[Score]],
        after: Mapping[str, Sequence[Score]],
    ) -> dict[str, Any]:
        """What results.json says of the scores before and after a training; {} without tasks."""
        results: dict[str, Any] = {
            key: {name: as_mapping(scores) for name, scores in found.items()}
            for key, found in (("scores", after), ("base_scores", before))
            if found
        }
        for name, scores in before.items():
            now = after[name][0]
            results[name] = {"before": scores[0].value, "after": now.value, "n": now.n}
        if tasks:
            results["score_files"] = {name: rows_source(task) for name, task in tasks.items()}
            results["score_conditions"] = self.conditions(tasks, after)
        return results

    def conditions(
        self, tasks: Mapping[str, EvaluationRecipe], scores: Mapping[str, Sequence[Score]]
    ) -> dict[str, str]:
        """How each task was asked, in words; the scores say of how many rows."""
        return {
            name: conditions(
                as_trained(task, self.dataset),
                scores[name][0].n if TASKS[task.task].scorers else None,
            )
            for name, task in tasks.items()
        }

    def score(
        self, model: Any, task: EvaluationRecipe, folder: Path, *, set_aside: bool = False
    ) -> list[Score]:
        """Run one task and give a score for each scorer; an interrupted one goes on in `folder`.

        Under torch.distributed every process calls this with the same folder: they share the
        prompts, each tells of its own share, and all get the scores. `set_aside` moves completions
        of another model or with other settings out of the way, instead of refusing to go on.

        Raises:
            InputError: programs would be run and may not be (before any work is done), or the
                folder holds completions of another evaluation.
            DataError: the data cannot be read or do not fit the task.
        """
        task = as_trained(task, self.dataset)
        check_code_execution([task.task], self.sandbox)
        self.events.stage(f"scoring {task.task}: {conditions(task, rows_asked(task))}")
        if self._may_be_chat(task):
            self.events.note(
                "the model has a chat template, and the questions are put as plain text: if it "
                "was trained on chats, as a run of `init` on a chat model is, give template=chat"
            )
        if not is_offloaded(model):
            model.to(self.place)
        template = task.template or TASKS[task.task].template
        if task.task == "lm_eval":
            scores, left_out = on_main_process(lambda: harness_scores(model, self.tokenizer, task))
            if left_out:
                self.events.note(f"not kept, for these are no shares: {'; '.join(left_out)}")
        elif task.task in LOSS_TASKS:
            progress = partial(self.events.advance, "measuring")
            scores = score_loss(model, self.tokenizer, task, template, progress, self.events.note)
        else:
            completions = self._answers(model, task, template, folder, set_aside)
            progress = partial(self.events.advance, "running programs")
            scores = on_main_process(
                lambda: score_completions(
                    task.task, completions, sandbox=self.sandbox, progress=progress
                )
            )
        self.events.end_progress()
        for note in missing_scorers(task.task):
            self.events.note(note)
        on_main_process(lambda: _keep_points(scores, folder))
        return scores

    def _may_be_chat(self, task: EvaluationRecipe) -> bool:
        """Whether nothing says how the model was trained to be asked, and a chat is likely."""
        is_open = self.dataset is None and task.template is None and task.prompt == "template"
        has_questions = bool(TASKS[task.task].scorers)
        return is_open and has_questions and bool(getattr(self.tokenizer, "chat_template", None))

    def _answers(
        self, model: Any, task: EvaluationRecipe, template: str, folder: Path, set_aside: bool
    ) -> list[Completion]:
        """Answer what is not yet answered in the folder; gives all answers that the task wants."""
        questions = read_questions(task)
        shots = read_shots(task, questions)
        is_chat = any(not isinstance(question.prompt, str) for question in questions)
        prompts, end_token_ids = build_prompts(questions, self.tokenizer, template, task, shots)
        stop = stop_strings(task, template, questions)
        self._tell_doubts(task, template, questions, stop, is_chat=is_chat)
        options = GenerationOptions(
            max_new_tokens=task.max_new_tokens,
            batch_size=task.batch_size,
            temperature=task.temperature,
            num_samples=task.samples,
            stop=stop,
            tail="" if is_chat else answer_tail(task, template),
            seed=task.sampling_seed,
            end_token_ids=end_token_ids,
        )
        file = folder / COMPLETIONS_FILE
        settings = _settings(model, task.task, options)

        def make_ready() -> int:
            with explained(f"write into {folder}", "an --output"):
                _open_folder(folder, settings, prompts, set_aside)
                return renew_golds(file, {prompt.id: prompt.gold for prompt in prompts})

        if renewed := on_main_process(make_ready):
            self.events.note(
                f"the rows have another right answer than {counted(renewed, 'answer')} in {file} "
                "stored beside: what the model wrote is kept, and judged by the rows of now"
            )
        done = {each.key for each in read_completions(file)} if file.exists() else set()
        wanted = {(prompt.id, sample) for prompt in prompts for sample in range(task.samples)}
        if found := len(wanted & done):
            self.events.note(f"{found} of {len(wanted)} answers are in {file} already")
        wait_for_all()  # nobody appends before everybody has read
        shares = num_processes()
        mine = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))[rank() :: shares]
        phase = "answering" if shares == 1 else f"answering, one share of {shares},"
        progress = partial(self.events.advance, phase)
        for completion in generate_completions(
            model, self.tokenizer, mine, options, done=done, progress=progress
        ):
            append_completion(file, completion)
        wait_for_all()
        answers = [each for each in read_completions(file) if each.key in wanted]
        if num_cut := sum(each.is_cut for each in answers):
            self.events.note(
                f"{num_cut:,} of {counted(len(answers), 'answer')} had not ended after "
                f"{task.max_new_tokens:,} tokens or at the end of the model's context, and are "
                f"judged as far as they go ({task.written('max_new_tokens')} gives more room)"
            )
        return answers

    def _tell_doubts(
        self,
        task: EvaluationRecipe,
        template: str,
        questions: Sequence[Question],
        stop: Sequence[str],
        *,
        is_chat: bool,
    ) -> None:
        """Tell what a user may not have meant about how the questions are put."""
        notes = [
            f"right answers hold {text!r}, the beginning of the template, so answers are not ended "
            f"at it; {task.written('stop')} names texts that end them"
            for text in stop_strings(task, template)
            if text not in stop
        ]
        for text, key in ((template, "template"), *((each, "stop") for each in task.stop or ())):
            if (escape := unread_escape(text, task.written(key))) is not None:
                notes.append(escape)
        has_system = any(each.system for each in questions)
        if has_system and not (is_chat or _takes_system(task, template)):
            notes.append(
                "the system prompts of the rows are not used: the template has no {system}"
            )
        for note in [*notes, *self._too_long(task, questions), *self._special(questions)]:
            self.events.note(note)

    def _special(self, questions: Sequence[Question]) -> list[str]:
        """A note where right answers hold the text of a special token, which answers never do."""
        tokens = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        found = next(((t, each) for each in questions for t in tokens if t in each.answer), None)
        if found is None:
            return []
        return [
            f"the right answer of the row {found[1].id!r} holds the special token "
            f"{found[0]!r}, and answers are told without special tokens: compared as texts they "
            "count as wrong; take it out of the right answers"
        ]

    def _too_long(self, task: EvaluationRecipe, questions: Sequence[Question]) -> list[str]:
        """A note where right answers have more tokens than answers may have."""
        texts = [each.answer for each in questions]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        longer = [len(each) for each in ids if len(each) > task.max_new_tokens]
        if not longer:
            return []
        return [
            f"{len(longer)} of {len(texts)} right answers have more tokens than "
            f"{task.written('max_new_tokens')} ({task.max_new_tokens}; the longest {max(longer)}): "
            "a model that answers as they do is cut off, and maybe wrong for that alone"
        ]

    def result(self, loaded: Loaded, task: EvaluationRecipe, folder: Path) -> dict[str, Any]:
        """Score one task and say what its scores are of; the completions go to `folder`.

        Returns:
            ``{"scores": {scorer: {"value", "n", "stderr", "unextractable"}}}``, shares with their
            interval, the task, the place of the rows and completions, and how they were asked.
        """
        scores = self.score(loaded.model, task, folder)
        asked = self.conditions({task.task: task}, {task.task: scores})[task.task]
        result = {"task": task.task, "file": rows_source(task), "scores": as_mapping(scores)}
        if (other := loaded.other_base) is not None:
            self.events.note(f"scored {other}")
            # The conditions stand in results.json and in the card of a run.
            asked += "; on another base model than the adapter's"
            result["other_base"] = f"scored {other}"
        if note := full_precision_note(loaded.distances, "scored in"):
            self.events.note(note)
            asked += "; on a plain base, where the adapter was trained on a quantised one"
        if (file := folder / COMPLETIONS_FILE).exists():
            result["completions"] = str(file)
        return {**result, "conditions": asked}


def _keep_points(scores: Sequence[Score], folder: Path) -> None:
    """Write down what each answer was worth, for who looks for the wrong ones."""
    judged = next((each for each in scores if each.points is not None), None)
    if judged is not None:
        content = {"scorer": judged.scorer, "points": judged.points}
        replace_file(folder / POINTS_FILE, to_json(content))


def as_trained(task: EvaluationRecipe, dataset: DatasetRecipe | None) -> EvaluationRecipe:
    """The task with what it leaves open taken from the training."""
    if dataset is None:
        return task
    update: dict[str, Any] = {
        "template": task.template or dataset.template,
        "learn": task.learn or dataset.learn,
    }
    like = shared_settings(dataset)
    if task.task in OWN_ROWS_TASKS and task.columns in ({}, like.columns):
        # They have no columns of their own; those of the training are the likeliest.
        update["columns"] = {**_named_answer(like.format), **like.columns}
    if task.task in OWN_ROWS_TASKS and task.ignore_columns is None:
        # Answers are kept by the ids of their rows, and a column that is named is wanted.
        columns = update.get("columns", task.columns)
        wanted = {"id", *(str(name).split(".")[0] for name in columns.values())}
        update["ignore_columns"] = [name for name in like.ignore_columns if name not in wanted]
    return task.model_copy(update=update)


def _takes_system(task: EvaluationRecipe, template: str) -> bool:
    return task.prompt == "template" and (template == "chat" or "{system}" in template)


def _named_answer(form: str) -> dict[str, str]:
    """The column of the answer by its role in a named form; named, it decides the form of rows."""
    roles = REQUIRED_ROLES.get(form)
    return {} if roles is None else {roles[-1]: roles[-1]}


def rows_source(recipe: EvaluationRecipe) -> str:
    """Where a task's rows are from, in words: files, or a hub set with its split."""
    if recipe.task == "lm_eval":
        within = f" in {recipe.path}" if recipe.path else ""
        return f"{', '.join(task_names(recipe))}{within}"
    source = recipe.path or TASKS[recipe.task].path
    rows = ", ".join(source) if isinstance(source, list) else str(source)
    if recipe.task != "forgetting" and not Path(rows).suffix:
        rows += f" ({recipe.split})"
    return rows


def rows_asked(recipe: EvaluationRecipe) -> int | None:
    """Questions that a limited task asks; None without a limit, and where it asks none.

    Raises:
        DataError: As of :func:`read_questions`.
    """
    if recipe.limit is None or not TASKS[recipe.task].scorers:
        return None
    return len(read_questions(recipe))


def conditions(recipe: EvaluationRecipe, num_rows: int | None = None) -> str:
    """How a task is asked, in words: what one has to know to compare its scores with others.

    ``num_rows`` are the rows that were asked, where that is known: fewer than the limit are all.
    """
    rows = rows_source(recipe)
    if recipe.limit is None:
        parts = [rows]
    elif num_rows is not None and num_rows < recipe.limit:
        parts = [f"{rows}, all {num_rows}"]
    else:
        parts = [f"{rows}, the first {recipe.limit}"]
    if recipe.task == "lm_eval":
        shots = "the task's" if recipe.shots is None else str(recipe.shots)
        is_chat = "the chat template" if recipe.template == "chat" else "no chat template"
        return ", ".join([*parts, f"{shots} worked examples", is_chat])
    if recipe.task in LOSS_TASKS:
        return ", ".join([*parts, f"{recipe.window} tokens at a time"])
    template = recipe.template or TASKS[recipe.task].template
    harness = f"{recipe.prompt} prompt"
    parts.append(f"template {template!r}" if recipe.prompt == "template" else harness)
    parts.append(f"{num_shots(recipe)} worked examples")
    samples = f"{recipe.samples} samples at temperature {recipe.temperature:g}"
    parts.append(f"{samples}, seed {recipe.sampling_seed}" if recipe.temperature else "greedy")
    return ", ".join([*parts, f"at most {recipe.max_new_tokens} new tokens"])


def weights_fingerprint(model: LanguageModel) -> str:
    """A fast hash of up to 64 values a parameter: each step changes it, single edits may not."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_WEIGHTS)
        values = flat[::step].float().cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _settings(model: LanguageModel, task: str, options: GenerationOptions) -> dict[str, Any]:
    """What must be equal for completions to be continued; batch size and limit may change."""
    return {
        "task": task,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed if options.temperature else None,
        "stop": list(options.stop),
        # Folders of earlier versions, which left it at the answers, have no such key.
        **({"tail": options.tail} if options.tail else {}),
        "weights": weights_fingerprint(model),
    }


def _open_folder(
    folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt], set_aside: bool
) -> None:
    """Make the folder ready to be filled or to go on with."""
    make_folder(folder)
    repair_completions(folder / COMPLETIONS_FILE)
    try:
        _check_folder(folder, settings, prompts)
    except InputError:
        if not set_aside:
            raise
        number = 1
        while (aside := folder / f"previous-{number}").exists():
            number += 1
        make_folder(aside)
        for name in (COMPLETIONS_FILE, SETTINGS_FILE, POINTS_FILE):
            if (folder / name).exists():
                rename(folder / name, aside / name)
    if not (folder / COMPLETIONS_FILE).exists():
        (folder / POINTS_FILE).unlink(missing_ok=True)  # of answers that somebody has removed
        replace_file(folder / SETTINGS_FILE, to_json(settings))


def _check_folder(folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    """Refuse to go on with completions of another model, other settings or other prompts."""
    file, path = folder / COMPLETIONS_FILE, folder / SETTINGS_FILE
    if not file.exists():
        return
    cure = f"choose another folder (--output), or delete {COMPLETIONS_FILE} there to start again."
    if not path.exists():
        raise InputError(
            f"{folder} holds {COMPLETIONS_FILE} but no {SETTINGS_FILE}, so nobody knows how it was "
            f"made: {cure}"
        )
    try:
        stored = parse_json(read_bytes(path))
    except (OSError, ValueError):
        stored = {}
    for key, value in settings.items():
        if stored.get(key) != value:
            raise InputError(
                f"{folder} holds completions made with {key} {stored.get(key)!r}, but now it "
                f"is {value!r}. Expected the same evaluation to go on with; {cure}"
            )
    texts = {prompt.id: prompt.text for prompt in prompts}
    for completion in read_completions(file):
        if texts.get(completion.id, completion.prompt) != completion.prompt:
            raise DataError(
                f"{file} answers another prompt under the id {completion.id!r}: "
                f"{completion.prompt[:80]!r} instead of {texts[completion.id][:80]!r}. Expected "
                f"the same data and template; {cure}"
            )
