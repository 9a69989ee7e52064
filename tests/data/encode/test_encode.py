"""Encoding text templates: labels, boundaries, end tokens and tokenizer pitfalls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from kpsvd_tune.data.encode.encoder import IGNORED, Encoder, Learn, Mark, TokenizedRow
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.encode.templates import TextTemplate
from kpsvd_tune.errors import DataError

TEMPLATE = "Question: {prompt}\nAnswer: {completion}"


def trained(encoder: Encoder, row: TokenizedRow) -> list[str]:
    return [text for text, is_trained in encoder.pieces(row) if is_trained]


def encode(encoder: Encoder, example: Pair | Chat) -> TokenizedRow:
    row = encoder.encode(example, 1)
    assert row.num_supervised
    return row


def with_start_token(tokenizer: PreTrainedTokenizerFast, end: bool = False) -> Any:
    """A tokenizer that writes <s> first, as Llama's do, and </s> last, as T5's do."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        special_tokens=[("<s>", changed.bos_token_id), ("</s>", changed.eos_token_id)],
    )
    return changed


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with SentencePiece's space mark before each, the first included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "\n", "▁", *"abc", "▁a", "▁b", "▁c"]
    backend = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("▁", letter) for letter in "abc"],
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_ids_and_labels_are_those_of_a_hand_made_row(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(Encoder(tokenizer, TEMPLATE, 512), Pair("1+1?", "2"))
    prompt = tokenizer("Question: 1+1?\nAnswer:")["input_ids"]
    answer = [*tokenizer(" 2")["input_ids"], tokenizer.eos_token_id]
    assert list(row.input_ids) == prompt + answer
    assert list(row.labels) == [IGNORED] * len(prompt) + answer
    assert row.num_supervised == 3


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_trained_tokens_decode_to_the_completion_and_the_end_token(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    encoder = Encoder(tokenizer, "{prompt}\n{completion}", 10_000)
    found = encoder.encode(Pair(prompt, completion), 1)
    assert Mark.INEXACT not in found.marks
    assert "".join(trained(encoder, found)) == completion + "</s>"
    assert list(found.input_ids[: -found.num_supervised]) == encoder.encode_prompt(prompt)


def test_generation_prompt_is_the_start_of_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (TEMPLATE, "chat", "{system}|{prompt}|{completion}"):
        encoder = Encoder(tokenizer, template, 512)
        row = encode(encoder, Pair("1+1?", "2", "be brief"))
        prompt = encoder.encode_prompt("1+1?", system="be brief")
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert set(row.labels[: len(prompt)]) == {IGNORED}
        assert IGNORED not in row.labels[len(prompt) :]


def test_text_behind_the_completion_is_trained_and_an_end_token_is_not_doubled(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for template in ("{prompt}={completion};</s>", "{prompt}={completion};"):
        encoder = Encoder(tokenizer, template, 512)
        assert trained(encoder, encode(encoder, Pair("1+1", "2"))) == ["2;</s>"]


def test_template_without_prompt_trains_all_but_the_first_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = encode(Encoder(tokenizer, "{completion}", 512), Pair("", "abc"))
    assert row.labels[0] == IGNORED
    assert row.labels[1:].tolist() == row.input_ids[1:].tolist()


def test_start_token_is_written_once(tokenizer: PreTrainedTokenizerFast) -> None:
    llama = with_start_token(tokenizer)
    row = encode(Encoder(llama, TEMPLATE, 512), Pair("a", "b"))
    assert row.input_ids.tolist().count(llama.bos_token_id) == 1
    assert row.input_ids[0] == llama.bos_token_id
    doubled = Encoder(llama, "<s>" + TEMPLATE, 512)
    assert encode(doubled, Pair("a", "b")) == row
    assert doubled.encode_prompt("a") == list(row.input_ids[: -row.num_supervised])
    assert "starts with '<s>', which the tokenizer adds by itself" in doubled.notes[0]
    # The chat template writes its own special tokens; nothing is added to them.
    chat = encode(Encoder(llama, "chat", 512), Pair("a", "b"))
    assert llama.bos_token_id not in chat.input_ids


def test_end_token_that_the_tokenizer_adds_does_not_stand_behind_the_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = encode(Encoder(with_start_token(tokenizer, end=True), TEMPLATE, 512), Pair("a", "b"))
    assert row.input_ids.tolist().count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("learn", ["all", "last", "each"])
@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("takes_spaces", [False, True])
def test_a_chat_has_the_ids_of_its_text_as_a_whole(
    learn: Learn, scheme: Any, takes_spaces: bool
) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer: Any = word_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    end = AddedToken("<end>", special=True, normalized=False, rstrip=takes_spaces)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    # As Zephyr and Phi 3 write them: a line break behind the end of a turn, and before an answer.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('a' if m.role == 'assistant' else 'b') + '\\n' }}"
        "{{ m.content + '<end>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a\\n' }}{% endif %}"
    )
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": letter}
        for place, letter in enumerate("cabc")
    ]
    encoder = Encoder(tokenizer, "chat", 64, learn=learn)
    row = encode(encoder, encoder.parts(Chat(tuple(turns)))[-1])
    whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    assert row.input_ids.tolist() == tokenizer(whole)["input_ids"]
    asked = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert encoder.encode_prompt(turns[:3]) == tokenizer(asked)["input_ids"]


def test_no_space_is_put_in_where_a_segment_starts() -> None:
    tokenizer = word_tokenizer()
    encoder = Encoder(tokenizer, "{prompt}\n{completion}", 64)
    row = encode(encoder, Pair("a", "b"))
    assert tokenizer.convert_ids_to_tokens(list(row.input_ids)) == ["▁a", "\n", "b", "</s>"]
    spaced = encode(Encoder(tokenizer, "{prompt} {completion}", 64), Pair("a", "b"))
    assert tokenizer.convert_ids_to_tokens(list(spaced.input_ids)) == ["▁a", "▁b", "</s>"]


def test_text_that_the_tokenizer_loses_is_told() -> None:
    found = Encoder(word_tokenizer(), "{prompt}\n{completion}", 64).encode(Pair("a", "xyz"), 1)
    assert Mark.INEXACT in found.marks


def test_inexact_rows_are_told_apart_in_a_chunk() -> None:
    encoder = Encoder(word_tokenizer(), "{prompt}\n{completion}", 64)
    layouts = [encoder.lay_out(Pair("a", text)) for text in ("b", "x", "c", "bz")]
    found = encoder.encode_laid_out(layouts, [1, 2, 3, 4])
    assert [Mark.INEXACT in each.marks for each in found] == [False, True, False, True]


@pytest.mark.parametrize("name", ["decode", "_decode"])
def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    def shout(self: PreTrainedTokenizerFast, token_ids: Any, **keys: Any) -> str:
        text: str = getattr(PreTrainedTokenizerFast, name)(self, token_ids, **keys)
        return text.upper()

    own: Any = copy.deepcopy(tokenizer)
    own.__class__ = type("Own", (PreTrainedTokenizerFast,), {name: shout})
    encoder = Encoder(own, TEMPLATE, 64)
    assert Mark.INEXACT not in encoder.encode(Pair("a", "B"), 1).marks
    assert Mark.INEXACT in encoder.encode(Pair("a", "b"), 1).marks


def test_long_rows_are_cut_and_rows_of_prompt_alone_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(tokenizer, "{prompt}={completion}", 5)
    cut = encoder.encode(Pair("12", "3456"), 1)
    assert cut.marks == Mark.CUT
    assert trained(encoder, cut) == ["34"]
    gone = encoder.encode(Pair("12345", "6"), 1)
    assert gone == TokenizedRow((), (), 1, Mark.CUT | Mark.FULL_PROMPT)
    whole = encoder.encode(Pair("1", "23"), 1)
    assert whole.marks == Mark(0)
    assert trained(encoder, whole) == ["23</s>"]


def test_special_tokens_in_a_row_are_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, TEMPLATE, 512)
    assert encoder.encode(Pair("a </s> b", "c"), 1).marks == Mark.SPECIAL
    assert encoder.encode(Pair("a </p> b", "c"), 1).marks == Mark(0)
    encoder = Encoder(tokenizer, "chat", 512)
    assert encoder.encode(Pair("a", "b<pad>c"), 1).marks == Mark.SPECIAL
    assert encoder.encode(Pair("a", "b"), 1).marks == Mark(0)


def test_missing_end_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match=r"no end token \(eos_token\), .* tokenizer_config\.json"):
        Encoder(endless, TEMPLATE, 512)


def test_chat_rows_need_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(DataError, match=r"set dataset\.template to chat"):
        Encoder(tokenizer, TEMPLATE, 512).encode(Chat(messages), 1)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        Encoder(bare, "chat", 512)


def test_braces_in_templates_and_rows_stay() -> None:
    prompt, completion = TextTemplate(r"\boxed{} {prompt}: {completion}").render(
        Pair("{completion} {prompt}", "{prompt}")
    )
    assert prompt == r"\boxed{} {completion} {prompt}:"
    assert completion == " {prompt}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {{prompt}} A: {{completion}}", "writes its placeholders in double braces"),
        ("{question} {completion}", r"has the placeholder \{question\}; to use a column of that"),
        ("{prompt}", r"has \{completion\} 0 times; expected once"),
        ("{completion}{completion}", r"has \{completion\} 2 times"),
        ("{completion} {prompt}", r"has \{prompt\} behind \{completion\}; expected it before"),
    ],
)
def test_templates_that_cannot_work_are_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=r"^dataset\.template " + message):
        TextTemplate(template)
