"""The shipped parts: valid together, planned as their table says, trained on tiny models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from shipped_scripts import script
from transformers import AutoConfig, AutoModelForCausalLM

from kpsvd_tune.commands import main as cli
from kpsvd_tune.data.encode.templates import FAMILIES, shipped_template
from kpsvd_tune.recipe import load_recipe
from kpsvd_tune.recipe.files import shipped_parts
from kpsvd_tune.recipe.heads import candidates, combinations, head_of
from kpsvd_tune.recipe.reference import schema_text

ROOT = Path(__file__).parents[1]
plan_recipes = script("plan_recipes")
CONFIGURATIONS = ROOT / "tests" / "fixtures" / "configurations"
# The documented form of each family's chats, as this package writes it.
TEMPLATES = {
    "smollm2-135m": "chatml",
    "llama-3.2-1b": "llama3",
    "llama-3.1-8b": "llama3",
    "llama-2-7b": "llama2",
    "qwen2.5-7b": "chatml",
    "qwen3-0.6b": "qwen3",
    "mistral-7b": "mistral",
    "gemma-3-1b": "gemma",
    "phi-3-mini": "phi3",
}
PARTS = shipped_parts()
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def of(folder: str) -> list[str]:
    return [name for name in PARTS if name.startswith(f"{folder}/")]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_says_what_it_is_for_and_is_taken_by_editors(name: str) -> None:
    head = head_of(PARTS[name])
    assert head["Purpose"].endswith(".")
    assert head["Needs"].endswith(".")
    if name.startswith("machines/"):
        assert head["Device"] in ("cpu", "cuda")
        assert head["Memory"].endswith(" GB")
    content = yaml.safe_load(PARTS[name].read_text("utf-8"))
    schema = json.loads(schema_text())
    del schema["anyOf"]  # a part is no recipe
    Draft202012Validator(schema).validate(content)


def test_every_family_task_and_machine_is_among_the_combinations() -> None:
    found = [each.parts for each in combinations()]
    for place, folder in enumerate(("models", "tasks", "machines")):
        names = {name.partition("/")[2] for name in of(folder)}
        assert {parts[place] for parts in found} == names
    assert set(TEMPLATES) == {name.partition("/")[2] for name in of("models")}
    # What does not fit is not offered.
    assert ("llama-3.1-8b", "chat", "laptop-cpu") not in found
    assert ("gemma-3-1b", "tools", "gpu-24gb") not in found


@pytest.mark.slow
def test_every_combination_is_valid_and_its_figures_are_of_these_parts() -> None:
    """A changed part, or a new one, makes the table stale."""
    table = json.loads((ROOT / "recipes" / "combinations.json").read_text("utf-8"))
    for name in candidates():
        recipe = load_recipe(name)
        assert recipe.dataset is not None
        if name in table:
            stale = "stale: python scripts/plan_recipes.py"
            assert table[name]["key"] == plan_recipes.key_of(name, recipe), f"{name}: {stale}"
    assert set(table) <= set(candidates())


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["laptop-cpu", "gpu-24gb"])
def test_the_figures_are_those_of_plan(machine: str) -> None:
    name = f"models/smollm2-135m+tasks/classification+machines/{machine}"
    table = {each.name: each for each in combinations()}
    sizes = plan_recipes.sizes_of(plan_recipes.planned(name))
    known = table[name]
    assert (known.parameters, known.trained) == (sizes["parameters"], sizes["trained"])
    assert known.memory_bytes == pytest.approx(sizes["memory_bytes"], rel=0.02)
    assert plan_recipes.fits(name, sizes)


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_configuration_has_the_parameters_that_the_model_is_known_for(model: str) -> None:
    known = json.loads((CONFIGURATIONS / "parameters.json").read_text("utf-8"))
    config = AutoConfig.for_model(**json.loads((CONFIGURATIONS / f"{model}.json").read_text()))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in skeleton.parameters()) == known[model]


QUESTIONS = [
    {"prompt": f"How many nuts are {a} and {b}?", "completion": f"{a + b} nuts"}
    for a in range(4)
    for b in range(4)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"I have {a} nuts."},
            {"role": "assistant", "content": "Good."},
            {"role": "user", "content": "And one more?"},
            {"role": "assistant", "content": f"Then {a + 1}."},
        ]
    }
    for a in range(12)
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}
CALLS = [
    {
        "messages": [
            {"role": "user", "content": f"What are {a} and 2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": 2}}}
                ],
            },
            {"role": "tool", "content": str(a + 2)},
            {"role": "assistant", "content": f"They are {a + 2}."},
        ],
        "tools": [TOOL],
    }
    for a in range(12)
]
LABELS = [{"prompt": f"{a} nuts", "completion": "odd" if a % 2 else "even"} for a in range(16)]
MATHS = [
    {"question": f"{a} and {a} nuts?", "answer": f"{a} + {a} = {2 * a}\n#### {2 * a}"}
    for a in range(12)
]
CODE = [
    {
        "text": f"Write a function that adds {a}.",
        "test_list": [f"assert f(1) == {1 + a}"],
        "code": f"def f(x):\n    return x + {a}",
    }
    for a in range(12)
]
TEXTS = [{"text": f"There were {a} nuts on the table, and nobody ate them."} for a in range(12)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "instructions": QUESTIONS,
    "chat": CHATS,
    "tools": CALLS,
    "maths": MATHS,
    "code": CODE,
    "classification": LABELS,
    "pretraining": TEXTS,
    "forget-less": QUESTIONS,
}


@pytest.fixture
def make_tiny(tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny random model of a family's architecture, with a tokenizer of its form of chats."""

    def make(model: str) -> Path:
        own = copy.deepcopy(tokenizer)
        own.model_max_length = 4096
        template = TEMPLATES[model]
        own.add_special_tokens({"additional_special_tokens": list(FAMILIES[template].tokens)})
        own.chat_template = shipped_template(template)
        settings = json.loads((CONFIGURATIONS / f"{model}.json").read_text("utf-8"))
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings |= TINY | {"vocab_size": len(own)} | {key: getattr(own, key) for key in tokens}
        settings.pop("torch_dtype")
        torch.manual_seed(0)
        tiny = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        folder = tmp_path / "tiny"
        tiny.save_pretrained(folder)
        own.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def train(
    make_tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Train a combination for three steps on a tiny model, and give its results."""

    def run(model: str, task: str, *keys: str) -> dict[str, Any]:
        folder = make_tiny(model)
        monkeypatch.chdir(tmp_path)
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[task])
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "kept.txt").write_text("Old words are kept, whatever is new. " * 60)
        code = cli.run(
            ["train", f"models/{model}+tasks/{task}+machines/laptop-cpu", f"model.path={folder}",
             "dataset.path=rows.jsonl", "dataset.name=null", "dataset.validation=2",
             "train.gradient_accumulation=2", "train.max_steps=3", "output_dir=run", *keys]
        )  # fmt: skip
        # A random model may well end above itself, of which 4 tells.
        assert code in (0, 4)
        results: dict[str, Any] = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["steps"] == 3
        return results

    return run


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in TEMPLATES if name != "llama-3.1-8b"])
def test_each_family_trains_on_a_tiny_model_of_its_architecture(
    model: str, train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = train(model, "chat")
    assert results["trainable_parameters"] > 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe_parts"] == [
        "adapters/equal-ranks",
        f"models/{model}",
        "tasks/chat",
        "machines/laptop-cpu",
    ]
    assert run["identity"]["recipe"]["adapter"]["rank"]["max"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name in ROWS if name != "chat"])
def test_each_task_trains(task: str, train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    scored = () if task in ("classification", "forget-less") else ("evaluation=[]",)
    few = ("evaluation.0.limit=2",) if task == "classification" else ()
    # A byte is a token here, and a description of a tool is long.
    longer = ("dataset.max_length=2000",) if task == "tools" else ()
    results = train("qwen2.5-7b", task, *scored, *few, *longer)
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert kept
    if task == "classification":
        assert "label" in results["scores"]
    if task == "forget-less":
        assert "forgetting" in results["scores"]


def test_a_model_is_offered_with_the_tasks_that_it_can_do(tmp_path: Path) -> None:
    names = set(candidates())
    assert "models/qwen3-0.6b+tasks/chat+machines/gpu-24gb" in names
    for model, file in shipped_parts().items():
        for task in head_of(file).get("Tasks", "").removeprefix("all but ").split(", "):
            assert not any(f"{model}+tasks/{task}+" in name for name in names), (model, task)
    comment = tmp_path / "comment.yaml"
    comment.write_text("# Purpose: nothing\n#   but words.\n")
    assert head_of(comment) == {"Purpose": "nothing but words."}
