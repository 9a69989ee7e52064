"""Chat templates as programs: equal to transformers' rendering, and bounded in time and size."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data.encode import chat_program
from kpsvd_tune.data.encode.chat import ChatRenderer
from kpsvd_tune.data.encode.chat_program import ChatProgram, variables_of
from kpsvd_tune.data.encode.format import Chat
from kpsvd_tune.errors import DataError

MESSAGES = [
    {"role": "user", "content": "a <b> & 'c' ü"},
    {"role": "assistant", "content": "d", "reasoning_content": "why"},
]
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        MARKED,
        "{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
        "{% for m in messages %}\n  {% if loop.last %}\n  {% break %}\n  {% endif %}\n"
        "  {{ m.content }}\n{% endfor %}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 %}"
        "{% endfor %}{{ ns.n * 2 }} {{ 'x' * 3 }} {{ '%s-%d' % ('a', 3) }}",
        "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}{{ bos_token }}",
        "{{ dict(a=1) }}{{ 'a'.ljust(9) }}{{ 'b' | center(9) }}{{ '{:>4}'.format(1) }}",
    ],
)
def test_templates_are_rendered_as_transformers_does(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    changed: Any = copy.deepcopy(tokenizer)
    changed.chat_template = template
    tools = [{"type": "function", "function": {"name": "f"}}]
    ours = ChatRenderer(changed, ("</s>",)).prompt(MESSAGES, tools)
    assert ours == changed.apply_chat_template(
        MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_marked_stretches_are_those_between_the_tags() -> None:
    text, marked = ChatProgram(MARKED).render(messages=MESSAGES, eos_token="</s>")
    assert [text[start:end] for start, end in marked] == ["d</s>"]


HUGE = [
    ("{{ 10 ** (10 ** 9) }}", r"a number of more than 4096 bits \(\*\*\)"),
    ("{% set x = 7 ** 999 %}{{ x * x }}", r"a number of more than 4096 bits \(\*\)"),
    ("{{ 'a' * 10 ** 9 }}", "a text of more than"),
    ("{{ 10 ** 9 * 'a' }}", "a text of more than"),
    ("{{ 'a' | center(1000000000) }}", "the filter center for a width of 1,000,000,000"),
    ("{{ 'a' | indent(1000000000) }}", "the filter indent for a width"),
    ("{{ 'a'.ljust(1000000000) }}", "the method ljust for a width"),
    ("{{ '{:>1000000000}'.format(1) }}", "it formats with a width"),
    ("{{ '%1000000000d' % 1 }}", "it formats with a width"),
    ("{{ '%*d' % (1000000000, 1) }}", "it formats with a width"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "it writes more than 67,108,864"),
    (
        "{% set ns = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "a text of more than",
    ),
    ("{% set ns = namespace(_x=1) %}{% set ns._y = 2 %}", "a name with an underscore"),
]


@pytest.mark.parametrize(("template", "message"), HUGE)
def test_templates_that_compute_something_huge_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    changed: Any = copy.deepcopy(tokenizer)
    changed.chat_template = template
    with pytest.raises(DataError, match=f"refuses these messages: .*{message}"):
        ChatRenderer(changed, ("</s>",)).prompt(MESSAGES)


def test_a_template_that_does_not_end_is_interrupted(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_program, "MAX_SECONDS", 0.2)
    changed: Any = copy.deepcopy(tokenizer)
    loop = "{% for i in range(99999) %}"
    changed.chat_template = loop * 3 + "{% set x = 1 %}" + "{% endfor %}" * 3
    start = time.monotonic()
    with pytest.raises(DataError, match=r"not done after 0\.2 seconds, as if it never ended"):
        ChatRenderer(changed, ("</s>",)).prompt(MESSAGES)
    assert time.monotonic() - start < 5


def test_another_thread_renders_too() -> None:
    found: list[str] = []
    program = ChatProgram("{{ messages | length }}")
    thread = threading.Thread(target=lambda: found.append(program.render(messages=MESSAGES)[0]))
    thread.start()
    thread.join()
    assert found == ["2"]


def test_the_names_that_a_template_reads() -> None:
    template = "{% if date is not defined %}{% set date = 1 %}{% endif %}{{ date }}"
    assert variables_of(template) == {"date"}
    template = "{% for m in messages %}{% if m %}{% set x = 1 %}{% endif %}{{ x }}{% endfor %}"
    assert variables_of(template) == {"messages"}
    template = "{% set a = b %}{{ a }}{{ messages }}{% if c is defined %}{{ range(2) }}{% endif %}"
    assert variables_of(template) == {"b", "c", "messages"}
    with pytest.raises(jinja2.TemplateError):
        variables_of("{% if %}")


LONG = {
    "plain": MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "marked": MARKED,
    # What stands before an answer depends on how many came before it.
    "counting": MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    .replace("'<|' + m.role", "loop.index | string + '<|' + m.role")
    .replace("{{ '<|assistant|>' }}", "{{ (messages | length + 1) | string + '<|assistant|>' }}"),
}  # fmt: skip


def long_chat(number: int, *, tools: bool = False) -> Chat:
    messages = [{"role": "user", "content": "start <|assistant|>text 1</s>"}]
    for index in range(1, number):
        roles = ("tool", "assistant") if tools else ("user", "assistant")
        messages.append({"role": roles[index % 2], "content": f"text {index}"})
    return Chat(tuple(messages))


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_long_chats_are_cut_as_short_ones(
    tokenizer: PreTrainedTokenizerFast, name: str, with_tools: bool
) -> None:
    changed: Any = copy.deepcopy(tokenizer)
    changed.chat_template = LONG[name]
    segments = ChatRenderer(changed, ("</s>",)).segments(long_chat(140, tools=with_tools))
    learnt = [segment.text for segment in segments if segment.is_trained]
    assert learnt == [f"text {index}</s>" for index in range(1, 140, 2)]


def test_a_long_chat_that_the_template_rewrites_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    changed: Any = copy.deepcopy(tokenizer)
    for name in ("plain", "marked"):
        changed.chat_template = LONG[name].replace(
            "m.content + eos_token",
            "(m.content if loop.index != 62 or loop.length < 70 else 'text') + eos_token",
        )
        with pytest.raises(DataError, match=r"changes earlier turns .*dataset\.learn: each"):
            ChatRenderer(changed, ("</s>",)).segments(long_chat(140))


@pytest.mark.slow
def test_the_time_of_a_long_chat_grows_with_its_length(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    render = ChatProgram.render

    def counting(self: ChatProgram, **variables: Any) -> Any:
        rendered.append(len(variables["messages"]))
        return render(self, **variables)

    monkeypatch.setattr(ChatProgram, "render", counting)
    work = []
    for number in (400, 1600):
        rendered.clear()
        ChatRenderer(tokenizer, ("</s>",)).segments(long_chat(number))
        work.append(sum(rendered))
    # Rendering everything before each answer would be 16 times the work.
    assert work[1] < 6 * work[0]
