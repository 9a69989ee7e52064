"""What a key of another tool can become, and the recipe that grows while its keys are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kpsvd_tune.recipe.dataset import CHAT_TEMPLATES
from kpsvd_tune.recipe.loading import value_to_yaml
from kpsvd_tune.recipe.values import show

# What stands for a setting that is the usual one in the other tool, or asks for nothing.
NOTHING: tuple[Any, ...] = (None, "", False, [], {}, "none", "no")


@dataclass
class Target:
    """The recipe so far, and what is said about the keys."""

    content: dict[str, Any] = field(default_factory=dict)
    # Our dotted key -> the key it came from.
    taken: dict[str, str] = field(default_factory=dict)
    # Their key -> its value in words, and what leaving it out means for the run.
    left: dict[str, tuple[str, str]] = field(default_factory=dict)

    def set(self, key: str, value: Any, source: str) -> None:
        """Set a key of the recipe, by its dotted name."""
        section = self.content
        *above, last = key.split(".")
        for step in above:
            section = section.setdefault(step, {})
        section[last] = value
        self.taken[key] = source

    def has(self, key: str) -> bool:
        """Whether a key of the recipe is set, by its dotted name."""
        section: Any = self.content
        for step in key.split("."):
            if not isinstance(section, dict) or step not in section:
                return False
            section = section[step]
        return True

    def leave(self, key: str, value: Any, meaning: str) -> None:
        """Say that a key has no counterpart, or not quite."""
        # It stands in a comment, which a line break would end.
        self.left[key if key.isprintable() else repr(key)] = (show(value), meaning)


@dataclass(frozen=True)
class Rule:
    """What becomes of a key: in words for the tables of docs/moving.md, and in deed."""

    says: str
    act: Callable[[Target, str, Any], None]

    def __call__(self, target: Target, source: str, value: Any) -> None:
        """Read a key of theirs into the recipe."""
        self.act(target, source, value)


Rules = Mapping[str, Rule]


def says(text: str) -> Callable[[Callable[[Target, str, Any], None]], Rule]:
    """Make a function a rule."""
    return lambda act: Rule(text, act)


def to(key: str) -> Rule:
    """The value as it is, under our key; null is left out."""

    def rule(target: Target, source: str, value: Any) -> None:
        if value is not None:
            target.set(key, value, source)

    return Rule(f"`{key}`", rule)


def mapped(key: str, values: Mapping[Any, Any], otherwise: str) -> Rule:
    """One of some values, each with its counterpart; others are left out with a meaning."""

    def rule(target: Target, source: str, value: Any) -> None:
        if value is None:
            return
        known = str(value).lower()
        if known in values:
            target.set(key, values[known], source)
        else:
            target.leave(source, value, otherwise)

    return Rule(f"`{key}`", rule)


def no(meaning: str) -> Rule:
    """No counterpart; told where the setting asks for something."""

    def rule(target: Target, source: str, value: Any) -> None:
        if value not in NOTHING:
            target.leave(source, value, meaning)

    return Rule(f"none: {meaning}", rule)


def always_told(meaning: str) -> Rule:
    """No counterpart, and told whatever its value, but null, is."""

    def rule(target: Target, source: str, value: Any) -> None:
        if value is not None:
            target.leave(source, value, meaning)

    return Rule(f"none: {meaning}", rule)


def when_true(key: str, value: Any) -> Rule:
    """A switch that gives one of our keys a value."""

    def rule(target: Target, source: str, given: Any) -> None:
        if given not in NOTHING:
            target.set(key, value, source)

    return Rule(f"`{key}: {value_to_yaml(value)}`", rule)


def positive_steps(key: str) -> Rule:
    """A whole number of steps; shares of the run, which ours has not, are told."""

    def rule(target: Target, source: str, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            target.set(key, value, source)
        elif value not in (*NOTHING, 0, -1):
            target.leave(source, value, f"not a number of steps: set {key}; its default holds")

    return Rule(f"`{key}`, a number of steps", rule)


def list_of(key: str) -> Rule:
    """A list, which may stand as one text with commas."""

    def rule(target: Target, source: str, value: Any) -> None:
        if value in NOTHING:
            return
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list):
            names = [each.strip() if isinstance(each, str) else each for each in names]
        target.set(key, names, source)

    return Rule(f"`{key}`", rule)


@says("`adapter.target_modules`")
def modules(target: Target, source: str, value: Any) -> None:
    """Target modules: all linear layers, a list, a text with commas, or a regular expression."""
    if value in NOTHING:
        return
    if value in ("all", "all-linear"):
        value = "all-linear"
    elif (
        isinstance(value, str)
        and value.replace(",", "").replace("_", "").replace(" ", "").isalnum()
    ):
        value = [each.strip() for each in value.split(",")]
    if target.content.get("adapter", {}).get("target_modules") == "all-linear":
        target.leave(source, value, "all linear layers are adapted, which another key asks for")
        return
    target.set("adapter.target_modules", value, source)


@says("`train.packing: true`")
def packing(target: Target, source: str, value: Any) -> None:
    """Packing, which changes what a batch counts."""
    if value not in NOTHING:
        target.set("train.packing", True, source)
        target.leave(
            source,
            value,
            "train.batch_size counts rows here, and packed sequences there: a step there learns "
            "more rows; raise train.gradient_accumulation for as many",
        )


# Names of chat templates that others use for those that come with this package.
_TEMPLATES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in CHAT_TEMPLATES},
    "qwen": ("chatml", {}),
    "qwen2": ("chatml", {}),
    "qwen_25": ("chatml", {}),
    "qwen3_nothink": ("qwen3", {"enable_thinking": False}),
    "phi": ("phi3", {}),
    "phi_3": ("phi3", {}),
    "phi_35": ("phi3", {}),
    "phi_4": ("phi4", {}),
    "phi4_mini": ("phi4-mini", {}),
    "mistral_v1": ("mistral", {}),
    "gemma2": ("gemma", {}),
    "deepseek3": ("deepseek", {}),
    "deepseekr1": ("deepseek-r1", {}),
}


@says("`dataset.template: chat`, `dataset.chat_template`, `dataset.template_arguments`")
def chat_template(target: Target, source: str, value: Any) -> None:
    """The name of a chat template; rows are then written with it."""
    if value in NOTHING:
        return
    target.set("dataset.template", "chat", source)
    if value in ("tokenizer_default", "default", "jinja"):
        return
    if isinstance(value, str) and value in _TEMPLATES:
        name, arguments = _TEMPLATES[value]
        target.set("dataset.chat_template", name, source)
        if arguments:
            target.set("dataset.template_arguments", dict(arguments), source)
        return
    target.leave(
        source,
        value,
        "no template of that name comes with kpsvd-tune: the tokenizer's own is used; for another "
        "set dataset.chat_template to a jinja file",
    )


RATE = (
    "a rate of LoRA is none of KPSVD: the recipe takes 4e-3 relative to the weights, the best on "
    "SmolLM2-135M (docs/study.md); `compare` tries others"
)
RANK = (
    "a Kronecker term is no rank of LoRA: the recipe takes four terms a layer; for a number of "
    "trained parameters set adapter.rank.budget"
)
SCALE = "the update has no scale of its own; its size is the learning rate's"
QUANTISED = "bases are quantised by bitsandbytes alone: model.quantization is nf4 or int8"
VARIANT = "a variant of LoRA; KPSVD is trained without it"
CLUSTER = "how processes share the work is given to `train`: --gpus N, or train.parallel: fsdp"
PROMPTS = "prompts are never learnt here, only answers"
SPEED = "changes speed or memory alone; what is learnt stays the same"
