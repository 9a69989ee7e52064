"""Generation: batched = one by one = transformers, stop strings, sampling, resume, failures."""

from __future__ import annotations

import itertools
import json
import re
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import InputError, ModelError, NonFiniteError, ResourceError
from kpsvd_tune.evaluation import generation
from kpsvd_tune.evaluation.generation import (
    GenerationOptions,
    Prompt,
    answer_one,
    cut_at_stop,
    generate_completions,
)

TEXTS = ["a", "Tom has 3 nuts.", "x " * 40, "How many?", "q" * 17, "Zoë"]


@pytest.fixture
def prompts(tokenizer):
    return [Prompt(i, text, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(TEXTS)]


@pytest.fixture
def answer(tiny_model, tokenizer, prompts):
    def run(**options) -> dict[tuple[int | str, int], str]:
        chosen = GenerationOptions(**{"max_new_tokens": 24, **options})
        completions = list(generate_completions(tiny_model, tokenizer, prompts, chosen))
        assert len({each.key for each in completions}) == len(completions)
        return {each.key: each.completion for each in completions}

    return run


@pytest.fixture
def rows_asked(tiny_model) -> list[int]:
    """The rows of each step for which the model is asked; each row gets one token."""
    asked: list[int] = []
    forward = tiny_model.forward

    def counting(*args, **kwargs):
        asked.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    tiny_model.forward = counting
    return asked


def test_an_adapter_in_training_is_asked_as_a_frozen_one(tiny_model, tokenizer, prompts):
    model = get_peft_model(tiny_model, KpsvdConfig(target_modules="all-linear", rank=2)).train()
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    answers = generate_completions(model, tokenizer, prompts, GenerationOptions(max_new_tokens=4))
    next(answers)
    # Frozen factors are stacked once and not for each token.
    assert not any(each.requires_grad for each in model.parameters())
    assert all(layer._ready is not None for _, layer in kpsvd_layers(model))
    list(answers)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == trained
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 4, 6, 64])
def test_batched_equals_one_by_one(answer, batch_size: int):
    assert answer(batch_size=batch_size) == answer(batch_size=1)


@pytest.mark.slow
def test_rows_that_end_early_leave_the_others_as_they_were(answer, tiny_model, tokenizer, prompts):
    # Taking as end token one that some answers contain makes the rows end at different steps.
    alone = answer(batch_size=1)
    tokens = [set(tokenizer(text)["input_ids"]) for text in alone.values()]
    ending = next(t for t in set.union(*tokens) if 0 < sum(t in row for row in tokens) < len(TEXTS))
    batched = answer(batch_size=6, end_token_ids=(ending,))
    assert batched == answer(batch_size=1, end_token_ids=(ending,))
    assert sum(batched[key] != alone[key] for key in alone) in range(1, len(TEXTS))


@pytest.mark.slow
def test_greedy_equals_transformers(answer, tiny_model, tokenizer, prompts):
    completions = answer(batch_size=3)
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        output = tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        expected = tokenizer.decode(output[0], skip_special_tokens=True)
        assert prompt.text + completions[prompt.id, 0] == expected


def test_the_head_gets_last_tokens_without_holes_between_them(tiny_model, tokenizer, prompts):
    """Of a view into the whole prompts torch copies the head's weights once for each row."""
    seen = []
    head = tiny_model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        list(generate_completions(tiny_model, tokenizer, prompts, GenerationOptions(batch_size=3)))
    finally:
        hook.remove()
    assert max(len(each) for each in seen) == 3
    assert all(each.shape[1] == 1 and each.is_contiguous() for each in seen)


def test_a_model_with_another_generation_config_is_still_greedy(answer, tiny_model):
    plain = answer()
    tiny_model.generation_config.repetition_penalty = 5.0
    tiny_model.generation_config.do_sample = True
    assert answer() == plain


@pytest.mark.slow
def test_the_list_of_end_tokens_of_a_model_counts(answer, tiny_model, tokenizer):
    whole = answer(batch_size=1)[1, 0]
    letter = next(each for each in whole if each.isascii() and each.isalpha())
    (ending,) = tokenizer(letter)["input_ids"]
    tiny_model.generation_config.eos_token_id = [tokenizer.eos_token_id, ending]
    assert answer(batch_size=1)[1, 0] == whole.split(letter)[0]


@pytest.mark.slow
def test_answers_that_have_no_room_to_end_are_told_apart(tiny_model, tokenizer, prompts):
    def cut(**options: Any) -> dict[int | str, bool]:
        found = generate_completions(
            tiny_model, tokenizer, prompts[:1], GenerationOptions(**options)
        )
        return {each.id: each.is_cut for each in found}

    (whole,) = generate_completions(
        tiny_model, tokenizer, prompts[:1], GenerationOptions(max_new_tokens=8)
    )
    assert cut(max_new_tokens=8) == {0: True}
    # The last token that there is room for brings the stop string.
    assert cut(max_new_tokens=8, stop=(whole.completion[-1:],)) == {0: False}
    first = tokenizer(whole.completion, add_special_tokens=False)["input_ids"][0]
    assert cut(max_new_tokens=1, end_token_ids=(first,)) == {0: False}
    row = whole.to_json()
    assert json.loads(row)["is_cut"] is True
    assert "is_cut" not in replace(whole, is_cut=False).to_json()


def test_an_answer_ends_before_its_stop_string(answer):
    whole = answer(batch_size=1)
    stop = next(text[5:7] for text in whole.values() if text[5:7].isascii() and len(text[5:7]) == 2)
    stopped = answer(stop=(stop,))
    assert stopped == {key: text.split(stop)[0] for key, text in whole.items()}
    assert stopped != whole


@pytest.mark.slow
def test_generation_stops_at_a_stop_string(tiny_model, tokenizer, prompts, rows_asked):
    first = next(
        iter(generate_completions(tiny_model, tokenizer, prompts[:1], GenerationOptions()))
    )
    rows_asked.clear()
    options = GenerationOptions(stop=(first.completion[3:5],))
    list(generate_completions(tiny_model, tokenizer, prompts[:1], options))
    assert sum(rows_asked) < 30


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", (), "abc"),
        ("abc", ("x",), "abc"),
        ("abcb", ("b",), "a"),
        ("abc", ("c", "b"), "a"),
        ("abc", ("abc",), ""),
        ("", ("a",), ""),
    ],
)
def test_cut_at_stop(text: str, stop: tuple[str, ...], expected: str):
    assert cut_at_stop(text, stop) == expected


@pytest.mark.slow
def test_samples_differ_and_depend_on_neither_batch_nor_order(answer, prompts):
    options = {"temperature": 1.0, "num_samples": 3, "max_new_tokens": 12}
    samples = answer(**options, batch_size=1)
    assert set(samples) == set(itertools.product(range(len(TEXTS)), range(3)))
    assert len(set(samples.values())) > len(TEXTS)
    assert answer(**options, batch_size=7) == samples
    prompts.reverse()
    assert answer(**options, batch_size=4) == samples
    assert answer(**options, seed=1) != samples


@pytest.mark.slow
def test_a_low_temperature_is_nearly_greedy(answer):
    # Those below float32's smallest number leave its range on the way.
    for temperature in (1e-6, 1e-40, 5e-324):
        assert answer(temperature=temperature) == answer()


def test_what_is_done_is_not_generated_again(tiny_model, tokenizer, prompts):
    options = GenerationOptions(max_new_tokens=4)
    done = {(0, 0), (3, 0)}
    completions = list(generate_completions(tiny_model, tokenizer, prompts, options, done=done))
    assert {each.id for each in completions} == {1, 2, 4, 5}


def test_nothing_left_runs_no_model(tokenizer, prompts, tiny_model):
    tiny_model.forward = None
    done = {(prompt.id, 0) for prompt in prompts}
    options = GenerationOptions()
    assert list(generate_completions(tiny_model, tokenizer, prompts, options, done=done)) == []


def test_the_longest_prompts_come_first(tiny_model, tokenizer, prompts):
    options = GenerationOptions(max_new_tokens=2, batch_size=1)
    order = [each.prompt for each in generate_completions(tiny_model, tokenizer, prompts, options)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in order]
    assert lengths == sorted(lengths, reverse=True)


def test_progress_counts_to_the_end(tiny_model, tokenizer, prompts, rows_asked):
    seen: list[tuple[int, int, str]] = []
    options = GenerationOptions(max_new_tokens=3, batch_size=4)

    def told(done: int, total: int, pace: str) -> None:
        seen.append((done, total, pace))

    list(generate_completions(tiny_model, tokenizer, prompts, options, progress=told))
    assert [done for done, _, _ in seen] == [4, 6]
    assert {total for _, total, _ in seen} == {6}
    assert sum(rows_asked) == 18
    assert re.fullmatch(r"[1-9]\d* tokens/s", seen[-1][2])  # and nothing left


def test_progress_tells_the_pace_and_the_time_left(monkeypatch: pytest.MonkeyPatch):
    clock = types.SimpleNamespace(monotonic=iter([0.0, 0.5, 4.0, 8.0]).__next__)
    monkeypatch.setattr(generation, "time", clock)
    seen: list[tuple[int, int, str]] = []
    meter = generation._Meter(4, lambda *told: seen.append(told))
    meter.tick(8, 0)  # too soon after the start
    meter.tick(8, 0)
    meter.tick(8, 2)
    assert seen == [(0, 4, "4 tokens/s"), (2, 4, "3 tokens/s, 8 s left")]


def test_the_training_mode_comes_back(tiny_model, tokenizer, prompts):
    tiny_model.train()
    completions = generate_completions(
        tiny_model, tokenizer, prompts, GenerationOptions(max_new_tokens=2)
    )
    next(completions)
    del completions  # as a caller does that stops early
    assert tiny_model.training


def test_the_context_bounds_an_answer(tiny_model, tokenizer, rows_asked):
    prompt = Prompt(0, "", tuple(tokenizer("y" * 510)["input_ids"]))
    list(generate_completions(tiny_model, tokenizer, [prompt], GenerationOptions()))
    assert sum(rows_asked) <= 512 - len(prompt.input_ids)


def test_a_prompt_beyond_the_context_is_refused(tiny_model, tokenizer):
    prompt = Prompt("long", "", (5,) * 600)
    with pytest.raises(InputError, match="id 'long' is 600 tokens long, but the model's context"):
        next(generate_completions(tiny_model, tokenizer, [prompt], GenerationOptions()))


def test_an_empty_prompt_is_refused(tiny_model, tokenizer):
    with pytest.raises(InputError, match="prompt with id 4 holds no token"):
        next(generate_completions(tiny_model, tokenizer, [Prompt(4, "", ())], GenerationOptions()))


def test_nan_logits_end_the_run(tiny_model, tokenizer, prompts):
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="logits are NaN for the prompt with id 2 after 0"):
        next(generate_completions(tiny_model, tokenizer, prompts, GenerationOptions()))


def test_a_model_without_a_cache_is_refused(tiny_model, tokenizer, prompts):
    forward = tiny_model.forward

    def without_cache(*args, **kwargs):
        return types.SimpleNamespace(logits=forward(*args, **kwargs).logits, past_key_values=None)

    tiny_model.forward = without_cache
    with pytest.raises(ModelError, match="LlamaForCausalLM returned no key/value cache"):
        next(generate_completions(tiny_model, tokenizer, prompts, GenerationOptions()))


def test_memory_that_runs_out_names_the_key_to_lower(tiny_model, tokenizer, prompts):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    tiny_model.forward = full
    with pytest.raises(ResourceError, match=r"out of GPU memory while answering 6 prompts") as told:
        next(generate_completions(tiny_model, tokenizer, prompts, GenerationOptions()))
    assert "a lower batch_size of the evaluation (now 16)" in str(told.value)
    assert "a lower max_new_tokens (now 256)" in str(told.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_samples": -1}, "num_samples must be 1 or more, got -1"),
        ({"temperature": -0.5}, "temperature must be 0 or more, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, got inf"),
        ({"stop": ("",)}, "stop holds an empty text"),
        ({"num_samples": 2}, "num_samples is 2 but temperature is 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        GenerationOptions(**options)


def test_one_answer_continues_a_prompt_or_puts_it_in_the_template(tiny_model, tokenizer):
    options = GenerationOptions(max_new_tokens=8)
    plain = answer_one(tiny_model, tokenizer, "Ann: hello\nBob:", options=options)
    assert plain.completion
    template = "Ann: {prompt}\nBob: {completion}"
    framed = answer_one(tiny_model, tokenizer, "hello", template=template, options=options)
    assert framed.completion == plain.completion
    chat = answer_one(tiny_model, tokenizer, "hello", template="chat", options=options)
    assert chat.completion != plain.completion
