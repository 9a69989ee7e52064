"""Score a model on a task: read rows, generate what is missing, score everything.

The folder of an evaluation holds completions.jsonl, which an interrupted run goes on from, and
evaluation.json, which says what was asked of which model. Completions are only ever continued
under the very same settings and weights: a score is never made of two models' answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import (
    Completion,
    append_completion,
    read_completions,
    repair_completions,
)
from kpsvd_tune.evaluation.decode import LanguageModel
from kpsvd_tune.evaluation.generate import (
    GenerationOptions,
    ProgressCallback,
    Prompt,
    generate_completions,
)
from kpsvd_tune.evaluation.prompts import Prompting, build_prompts, read_shots, stop_strings
from kpsvd_tune.evaluation.sandbox import Sandbox
from kpsvd_tune.evaluation.scoring import check_code_execution, score_completions
from kpsvd_tune.evaluation.tasks import SOURCES, read_questions
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.results import Score

COMPLETIONS_FILE = "completions.jsonl"
SETTINGS_FILE = "evaluation.json"
_SAMPLED_WEIGHTS = 64

Result = TypeVar("Result")


def evaluate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    output_folder: Path,
    *,
    template: str | None = None,
    prompting: Prompting | None = None,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    allow_code_execution: bool = False,
    sandbox: Sandbox = "bwrap",
    offline: bool = False,
    progress: ProgressCallback | None = None,
    score_progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Run one task on a model and score it; an interrupted run goes on where it stopped.

    Under torch.distributed every process calls this: they share the prompts and all get the
    scores; `output_folder` must be the same folder for all.

    Args:
        model: a causal language model, adapter included, on its device.
        tokenizer: the model's tokenizer.
        recipe: the task, its data and the sizes.
        output_folder: where completions.jsonl and evaluation.json lie.
        template: the training template, used where the recipe's section has none.
        prompting: style of the prompt, worked examples, stop strings.
        temperature: 0 is greedy.
        num_samples: answers to each prompt; pass@k needs several.
        seed: of the sampling.
        allow_code_execution: must be true for a task that runs generated programs.
        sandbox: "bwrap", or "none" to run them without protection.
        offline: use only what the local hub cache holds.
        progress: called as completions are finished, with tokens per second and time left.
        score_progress: called with (done, total) programs run.

    Returns:
        One score a scorer of the task.

    Raises:
        InputError: code execution is not allowed or has no sandbox (before any work is done), or
            the folder holds completions of another evaluation.
        DataError: the data cannot be read or do not fit the task.
    """
    check_code_execution(recipe.task, allow_code_execution=allow_code_execution, sandbox=sandbox)
    prompting = prompting or Prompting()
    template = recipe.template or template or SOURCES[recipe.task].template
    questions = read_questions(recipe, offline=offline)
    shots = read_shots(recipe, prompting, offline=offline)
    prompts, end_token_ids = build_prompts(
        questions, tokenizer, template, recipe.task, prompting, shots
    )
    options = GenerationOptions(
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.batch_size,
        temperature=temperature,
        num_samples=num_samples,
        stop=stop_strings(prompting, template, recipe.task),
        seed=seed,
        end_token_ids=end_token_ids,
    )
    file = output_folder / COMPLETIONS_FILE
    settings = _settings(model, recipe.task, options)
    _on_first_process(lambda: _open_folder(output_folder, settings))
    done = _finished(file, prompts)
    _wait_for_all()  # nobody appends before everybody has read
    mine = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))[_rank() :: _num_processes()]
    for completion in generate_completions(
        model, tokenizer, mine, options, done=done, progress=progress
    ):
        append_completion(file, completion)
    _wait_for_all()
    wanted = {(prompt.id, sample) for prompt in prompts for sample in range(num_samples)}
    completions = [each for each in read_completions(file) if each.key in wanted]
    return _on_first_process(
        lambda: score_completions(
            recipe.task,
            completions,
            allow_code_execution=allow_code_execution,
            sandbox=sandbox,
            progress=score_progress,
        )
    )


def weights_fingerprint(model: LanguageModel) -> str:
    """A hash of up to 64 evenly spaced values of every parameter: fast, and other after any step.

    It tells a trained model from its base and from itself a step later. It is no proof of
    equality: an edit of single weights may escape it.
    """
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
        "weights": weights_fingerprint(model),
    }


def _open_folder(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    repair_completions(folder / COMPLETIONS_FILE)
    _check_settings(folder, settings)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    has_completions = (folder / COMPLETIONS_FILE).exists()
    if path.exists() and has_completions:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        for key, value in settings.items():
            if stored.get(key) != value:
                raise InputError(
                    f"{folder} holds completions made with {key} {stored.get(key)!r}, but now it "
                    f"is {value!r}. Expected the same evaluation to go on with; choose another "
                    f"folder, or delete {COMPLETIONS_FILE} there to start again."
                )
    elif has_completions:
        raise InputError(
            f"{folder} holds {COMPLETIONS_FILE} but no {SETTINGS_FILE}, so nobody knows how it was "
            "made. Choose another folder, or delete that file to start again."
        )
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _finished(file: Path, prompts: Sequence[Prompt]) -> set[tuple[int | str, int]]:
    """What need not be generated again, once each of them is an answer to the same prompt."""
    if not file.exists():
        return set()
    texts = {prompt.id: prompt.text for prompt in prompts}
    completions: list[Completion] = read_completions(file)
    for completion in completions:
        if texts.get(completion.id, completion.prompt) != completion.prompt:
            raise DataError(
                f"{file} answers another prompt under the id {completion.id!r}: "
                f"{completion.prompt[:80]!r} instead of {texts[completion.id][:80]!r}. Expected "
                "the same data and template; choose another folder, or delete that file."
            )
    return {completion.key for completion in completions}


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _num_processes() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1


def _wait_for_all() -> None:
    if _is_distributed():
        torch.distributed.barrier()


def _on_first_process(work: Callable[[], Result]) -> Result:
    """The result of work done once, on every process; an error is raised on all of them."""
    if not _is_distributed():
        return work()
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result
