"""The chat templates that come with the package: what is learnt, and that they ask as originals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data.encode.chat import ChatRenderer
from kpsvd_tune.data.encode.chat_program import TemplateError
from kpsvd_tune.data.encode.encoder import Encoder, Learn, Mark
from kpsvd_tune.data.encode.format import Chat
from kpsvd_tune.data.encode.templates import (
    FAMILIES,
    family_of,
    shipped_name,
    shipped_template,
    use_recipe_template,
    with_arguments,
)
from kpsvd_tune.data.read.columns import is_blank
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.recipe.dataset import CHAT_TEMPLATES

# How each family writes an answer: the text before it that is learnt, what it does to the text,
# and the token that ends it.
ANSWERS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "chatml": ("", str, "<|im_end|>"),
    "command-r": ("", str.strip, "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("", str, "<｜end▁of▁sentence｜>"),
    "deepseek-r1": ("\n</think>\n\n", str, "<｜end▁of▁sentence｜>"),
    "gemma": ("", str.strip, "<end_of_turn>"),
    "llama2": (" ", str.strip, " </s>"),
    "llama3": ("", str.strip, "<|eot_id|>"),
    "mistral": (" ", str.lstrip, "</s>"),
    "phi3": ("", str, "<|end|>"),
    "phi4": ("", str, "<|im_end|>"),
    "phi4-mini": ("", str, "<|end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", lambda text: text.lstrip("\n"), "<|im_end|>"),
    "zephyr": ("", str, "</s>"),
}
# They drop reasoning from earlier turns, so only one turn of a rendering is as it was written.
REASONING = ("deepseek-r1", "qwen3")
SPECIAL = sorted({token for family in FAMILIES.values() for token in family.tokens})
PLACES = st.sampled_from(["<b>", "a ", " b", "{{ x }}", "{% raw %}", "[INST]", "</s", "\n", "ü🕷"])
TEXTS = st.builds(
    lambda parts: "".join(parts), st.lists(PLACES | st.text(max_size=6), min_size=1, max_size=5)
).filter(lambda text: not is_blank(text) and "think>" not in text)


def tokenizer_for(
    tokenizer: PreTrainedTokenizerFast, name: str | None, template: str | None = None
) -> Any:
    changed = copy.deepcopy(tokenizer)
    tokens = FAMILIES[name].tokens if name else SPECIAL
    changed.add_special_tokens({"additional_special_tokens": [*tokens, "<|user|>", "<|system|>"]})
    changed.chat_template = template or (shipped_template(name) if name else None)
    return changed


def talk(texts: Sequence[str], system: str | None = None) -> Chat:
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Chat(tuple(messages))


def learnt(encoder: Encoder, chat: Chat) -> list[str]:
    found = []
    for part in encoder.parts(chat):
        row = encoder.encode(part, 1)
        assert Mark.INEXACT not in row.marks
        found += [text for text, is_trained in encoder.pieces(row) if is_trained]
    return found


def expected(name: str, answers: Sequence[str]) -> list[str]:
    before, change, end = ANSWERS[name]
    return [before + change(answer) + end for answer in answers]


def test_every_template_has_its_name_and_its_family() -> None:
    assert sorted(FAMILIES) == sorted(CHAT_TEMPLATES) == sorted(ANSWERS)
    for name in FAMILIES:
        template = shipped_template(name)
        assert shipped_name(with_arguments(template, {"a": 1})) == name  # type: ignore[arg-type]
    assert shipped_name("{{ messages }}") is None


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["all", "last", "each"])
@pytest.mark.parametrize("name", ANSWERS)
def test_decoded_labels_are_the_answers_and_their_ends(
    tokenizer: PreTrainedTokenizerFast, name: str, learn: Learn
) -> None:
    encoder = Encoder(tokenizer_for(tokenizer, name), "chat", 100_000, learn=learn)
    most = 1 if name in REASONING and learn == "all" else 3

    @settings(max_examples=25, deadline=None)
    @given(
        rounds=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=most),
        system=st.none() | TEXTS,
    )
    def check(rounds: list[tuple[str, str]], system: str | None) -> None:
        chat = talk([text for each in rounds for text in each], system)
        answers = [answer for _, answer in rounds]
        assert learnt(encoder, chat) == expected(name, answers[-1:] if learn == "last" else answers)

    check()
    assert not any("generation prompt is not" in note for note in encoder.notes)


@pytest.mark.parametrize("name", ANSWERS)
def test_two_rounds_are_learnt_turn_by_turn(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    chat = talk(["q1", "a1", "q2", "a2"], "s")
    each = Encoder(tokenizer_for(tokenizer, name), "chat", 9999, learn="each")
    assert learnt(each, chat) == expected(name, ["a1", "a2"])
    together = Encoder(tokenizer_for(tokenizer, name), "chat", 9999)
    if name in REASONING:
        with pytest.raises(TemplateError, match=r"dataset\.learn: each"):
            learnt(together, chat)
    else:
        assert learnt(together, chat) == expected(name, ["a1", "a2"])


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("is_inline", [False, True])
def test_reasoning_is_learnt_with_its_answer_and_dropped_from_earlier_turns(
    tokenizer: PreTrainedTokenizerFast, name: str, is_inline: bool
) -> None:
    messages: list[dict[str, str]] = []
    for number in ("1", "2"):
        messages.append({"role": "user", "content": f"q{number}"})
        if is_inline:
            text = f"<think>\nwhy{number}\n</think>\n\na{number}"
            messages.append({"role": "assistant", "content": text})
        else:
            messages.append(
                {
                    "role": "assistant",
                    "content": f"a{number}",
                    "reasoning_content": f"why{number}",
                }
            )
    encoder = Encoder(tokenizer_for(tokenizer, name), "chat", 9999, learn="each")
    parts = [encoder.encode(part, 1) for part in encoder.parts(Chat(tuple(messages)))]
    pieces = [encoder.pieces(row) for row in parts]
    opening = "<think>\n" if name == "qwen3" else ""
    end = ANSWERS[name][2]
    assert [each[-1] for each in pieces] == [
        (f"{opening}why{number}\n</think>\n\na{number}{end}", True) for number in ("1", "2")
    ]
    assert "why1" not in pieces[1][0][0]
    assert "a1" in pieces[1][0][0]


def test_inline_reasoning_that_a_template_drops_is_refused_with_cures(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    chat = talk(["q", "<think>why</think>a"])
    with pytest.raises(
        TemplateError,
        match=r"drops or changes the assistant's reasoning.*dataset\.chat_template.* qwen3",
    ):
        Encoder(changed, "chat", 999, learn="last").encode(chat, 1)
    # A template that leaves it where it is, has it learnt as it is.
    assert learnt(Encoder(tokenizer, "chat", 999), chat) == ["<think>why</think>a</s>"]


def test_calls_of_tools_are_written_as_qwen_and_hermes_do(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    messages = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "r1"},
        {"role": "tool", "content": "r2"},
        {"role": "assistant", "content": "a"},
    )
    tools = ({"type": "function", "function": {"name": "f"}},)
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call>'
    for name in ("chatml", "qwen3"):
        encoder = Encoder(tokenizer_for(tokenizer, name), "chat", 9999, learn="each")
        found = learnt(encoder, Chat(messages, tools))
        assert found[0].endswith(f"{written}\n{written}<|im_end|>")
        assert found[1].endswith("a<|im_end|>")
    text = ChatRenderer(tokenizer_for(tokenizer, "chatml"), ()).prompt(messages[:-1], tools)
    assert "<tools>\n" + '{"type": "function", "function": {"name": "f"}}' + "\n</tools>" in text
    assert (
        "<|im_start|>user\n<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n" in text
    )


@pytest.mark.parametrize("name", [n for n in ANSWERS if n not in ("chatml", "qwen3")])
def test_templates_without_tools_refuse_them(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    renderer = ChatRenderer(tokenizer_for(tokenizer, name), ())
    messages = talk(["q"]).messages
    with pytest.raises(TemplateError, match=f"the template {name} writes no tools"):
        renderer.prompt(messages, [{"name": "f"}])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(TemplateError, match=f"the template {name}"):
        renderer.prompt([*messages, call])


def originals() -> dict[str, str]:
    """The chat templates that trl ships, where it is installed and does."""
    from importlib.resources import files

    folder = files("trl").joinpath("chat_templates")
    if not folder.is_dir():
        return {}
    return {
        each.name.removesuffix(".jinja"): each.read_text(encoding="utf-8")
        for each in folder.iterdir()
        if each.name.endswith(".jinja")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("original", "name", "arguments"),
    [
        ("qwen3", "qwen3", {}),
        ("qwen3", "qwen3", {"enable_thinking": False}),
        ("qwen2_5", "chatml", {"default_system": "?"}),
        ("deepseek_r1_distill", "deepseek-r1", {}),
        ("deepseekv3", "deepseek-r1", {}),
        ("gemma", "gemma", {}),
        ("llama3", "llama3", {}),
        ("phi3", "phi3", {}),
        ("phi3_5", "phi3", {}),
        ("cohere", "command-r", {}),
    ],
)
def test_ours_ask_as_the_originals_do(
    tokenizer: PreTrainedTokenizerFast, original: str, name: str, arguments: dict[str, Any]
) -> None:
    found = originals()
    if original not in found:
        pytest.skip(f"trl ships no {original}")
    own = found[original]
    assert family_of(own) == name
    is_qwen2 = original == "qwen2_5"
    ours = with_arguments(shipped_template(name), arguments)
    assert isinstance(ours, str)
    asks = ChatRenderer(tokenizer_for(tokenizer, name, ours), ())
    theirs = with_arguments(own, {} if is_qwen2 else arguments)
    assert isinstance(theirs, str)
    asked = ChatRenderer(tokenizer_for(tokenizer, name, theirs), ())
    # Qwen 2.5 begins chats without a system message with one of its own.
    for system in ["s"] if is_qwen2 else [None] if name == "gemma" else [None, "s"]:
        for texts in (["q"], ["q", "a", "r"], ["q", "<think>\nb\n</think>\n\na", "r", "c", "t"]):
            messages = talk(texts, system).messages
            assert asks.prompt(messages) == asked.prompt(messages)
    if name in ("chatml", "qwen3"):
        tools = [{"type": "function", "function": {"name": "f", "description": "d"}}]
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        messages = (
            *talk(["q"], "s").messages,
            {"role": "assistant", "content": "b", "tool_calls": [call]},
            {"role": "tool", "content": "r"},
        )
        assert asks.prompt(messages, tools) == asked.prompt(messages, tools)


def test_names_files_and_arguments_of_the_recipe(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    changed = tokenizer_for(tokenizer, None)
    recipe = DatasetRecipe(
        path="x", chat_template="qwen3", template_arguments={"enable_thinking": False}
    )
    use_recipe_template(changed, recipe)
    once = changed.chat_template
    use_recipe_template(changed, recipe)
    assert changed.chat_template == once
    assert (
        ChatRenderer(changed, ())
        .prompt(talk(["q"]).messages)
        .endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    )
    # They are defaults in the text, so that other tools render alike, and may say otherwise.
    asked = {"tokenize": False, "add_generation_prompt": True}
    messages = list(talk(["q"]).messages)
    assert changed.apply_chat_template(messages, **asked).endswith("</think>\n\n")
    assert changed.apply_chat_template(messages, enable_thinking=True, **asked).endswith(
        "assistant\n"
    )
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ note }}{{ numbers | join('-') }}{{ flag.a }}")
    arguments = {"note": 'ü "🕷" \\ \n{% x %}', "numbers": (1, 2.5), "flag": {"a": None}}
    use_recipe_template(
        changed, DatasetRecipe(path="x", chat_template=str(file), template_arguments=arguments)
    )
    text = ChatRenderer(changed, ()).prompt(talk(["q"]).messages)
    assert text == 'qü "🕷" \\ \n{% x %}1-2.5None'


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "qwen"}, r"no chat template of that name; did you mean qwen3\?"),
        ({"chat_template": "none.jinja"}, "there is no such file and no chat template"),
        ({"chat_template": "llama3"}, "writes the special token '<|start_header_id|>', which"),
        (
            {"template_arguments": {"enable_thinkin": True}},
            r"does not read 'enable_thinkin'.* it reads no arguments",
        ),
        (
            {"chat_template": "zephyr", "template_arguments": {"a": True}},
            "does not read 'a', so it would change nothing; it reads no arguments: remove them",
        ),
    ],
)
def test_what_does_not_exist_is_refused(
    tokenizer: PreTrainedTokenizerFast, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message.replace("<|start_header_id|>", ".*")):
        use_recipe_template(copy.deepcopy(tokenizer), DatasetRecipe(path="x", **keys))


def test_an_argument_is_suggested_from_those_that_are_read(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    recipe = DatasetRecipe(
        path="x", chat_template="qwen3", template_arguments={"enable_thinkin": True}
    )
    advice = r"it reads enable_thinking.*; did you mean enable_thinking\?"
    with pytest.raises(DataError, match=advice):
        use_recipe_template(tokenizer_for(tokenizer, "qwen3"), recipe)


def test_files_that_are_no_chat_templates_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    file = tmp_path / "a.jinja"
    for text, message in (
        ("hello", "reads no messages"),
        ("{% if messages %}", "the chat template does not compile"),
    ):
        file.write_text(text)
        recipe = DatasetRecipe(path="x", chat_template=str(file), template_arguments={"a": 1})
        with pytest.raises(DataError, match=message):
            use_recipe_template(copy.deepcopy(tokenizer), recipe)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        use_recipe_template(
            copy.deepcopy(tokenizer), DatasetRecipe(path="x", chat_template=str(file))
        )
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template to read them"):
        use_recipe_template(without, DatasetRecipe(path="x", template_arguments={"a": 1}))


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize(
    "text", ["`</think>` ends reasoning, `<think>` starts it.", "Reasoning ends with `</think>`."]
)
def test_an_answer_about_the_markers_of_reasoning_is_not_cut_in_two(
    tokenizer: PreTrainedTokenizerFast, name: str, text: str
) -> None:
    encoder = Encoder(tokenizer_for(tokenizer, name), "chat", 999)
    with pytest.raises(TemplateError, match="does not write the assistant's text as it is"):
        encoder.encode(talk(["q", text]), 1)


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_without_an_opening_marker_is_still_set_apart(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    encoder = Encoder(tokenizer_for(tokenizer, name), "chat", 999)
    (found,) = learnt(encoder, talk(["q", "why\n</think>\n\na"]))
    assert "why\n</think>\n\na" in found
