"""Configurations of axolotl, LLaMA-Factory, trl and PEFT become recipes that validate and train."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from shipped_scripts import script

from kpsvd_tune.commands import main as cli
from kpsvd_tune.recipe import SourceRecipe, load_recipe
from kpsvd_tune.recipe.convert import convert
from kpsvd_tune.recipe.convert.converting import RULES

ROOT = Path(__file__).parents[1]
ROWS = [{"question": f"{a} and {b}?", "answer": f"{a + b}"} for a in range(4) for b in range(4)]
CHATS = [
    {
        "talk": [
            {"role": "user", "content": f"{a} nuts?"},
            {"role": "assistant", "content": f"Yes, {a}."},
        ]
    }
    for a in range(12)
]
AXOLOTL = """\
base_model: {model}
model_type: LlamaForCausalLM
load_in_8bit: true
load_in_4bit: false
adapter: lora
lora_r: 24
lora_alpha: 48
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
lora_model_dir:
datasets:
  - path: rows.jsonl
    ds_type: json
    type:
      field_instruction: question
      field_output: answer
    shards: 3
val_set_size: 0.25
sequence_len: 96
excess_length_strategy: drop
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 3e-4
warmup_steps: 5
evals_per_epoch: 2
eval_steps: 0.5
save_steps: 7
logging_steps: 2
bf16: false
fp16: false
tf32: true
gradient_checkpointing: unsloth
weight_decay: 0.01
early_stopping_patience: 4
deepspeed: zero2.json
wandb_project: nuts
special_tokens: {pad_token: "<pad>"}
output_dir: ./outputs/nuts
my_own_key: 7
"""
LLAMA_FACTORY = """\
model_name_or_path: {model}
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 12
lora_target: all
dataset: nuts
dataset_dir: .
template: default
cutoff_len: 96
max_samples: 10
val_size: 0.2
mask_history: true
output_dir: saves/nuts
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
num_train_epochs: 2.0
max_steps: 9
lr_scheduler_type: linear
warmup_ratio: 0.1
optim: adamw_torch
fp16: false
eval_strategy: steps
eval_steps: 4
report_to: [wandb, swanlab]
quantization_bit: 4
"""
TRL = """\
model_name_or_path: {model}
dtype: float32
dataset_name: rows.jsonl
dataset_train_split: train
max_length: 96
packing: true
use_peft: true
lora_r: 16
lora_alpha: 16
lora_target_modules: all-linear
lora_modules_to_save: [lm_head]
learning_rate: 2.0e-4
per_device_train_batch_size: 2
num_train_epochs: 1
bf16: false
max_grad_norm: 0.5
seed: 11
load_best_model_at_end: false
eos_token: "</s>"
"""
PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "",
    "revision": None,
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "modules_to_save": None,
    "bias": "none",
    "use_dora": True,
    "init_lora_weights": "pissa",
    "layers_to_transform": [0],
    "rank_pattern": {},
    "inference_mode": True,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Path:
    """A folder with rows and a configuration of each tool, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    info = {
        "nuts": {
            "file_name": "rows.jsonl",
            "columns": {"prompt": "question", "response": "answer"},
        },
        "talks": {
            "file_name": "talks.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "role", "content_tag": "content"},
        },
        "far": {"hf_hub_url": "some/rows", "subset": "easy", "split": "train", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name, text in (("axolotl", AXOLOTL), ("factory", LLAMA_FACTORY), ("trl", TRL)):
        (tmp_path / f"{name}.yml").write_text(text.replace("{model}", str(tiny_model_dir)))
    adapter = {**PEFT, "base_model_name_or_path": str(tiny_model_dir)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    return tmp_path


def test_axolotl_keys_become_ours(here: Path) -> None:
    found = convert("axolotl.yml", "nuts")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    dataset, train = recipe.dataset, recipe.train
    assert found.tool == "axolotl"
    assert dataset is not None
    assert (dataset.path, dataset.format, dataset.validation) == ("rows.jsonl", "alpaca", 0.25)
    assert dataset.columns == {"instruction": "question", "output": "answer"}
    assert (dataset.max_length, dataset.too_long) == (96, "drop")
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert (recipe.adapter.dropout, recipe.adapter.rank.max) == (0.1, 4)
    assert (train.batch_size, train.gradient_accumulation, train.epochs) == (2, 2, 3)
    assert (train.optimizer, train.scheduler, train.warmup_steps) == ("adamw", "cosine", 5)
    assert (train.save_every, train.log_every, train.weight_decay) == (7, 2, 0.01)
    assert (train.precision, train.gradient_checkpointing, train.packing) == ("no", True, True)
    assert train.early_stopping is not None
    assert train.early_stopping.patience == 4
    # No rate of LoRA.
    assert (train.learning_rate, recipe.adapter.rate) == (4e-3, "relative")
    assert (recipe.tracking, recipe.output_dir) == (["wandb"], "./outputs/nuts")
    assert set(found.left) == {
        *("model_type", "lora_r", "lora_alpha", "datasets[0].shards", "optimizer"),
        *("learning_rate", "evals_per_epoch", "eval_steps", "tf32", "deepspeed", "special_tokens"),
        *("sample_packing", "my_own_key"),
    }
    assert found.left["my_own_key"][1].startswith("not known here as a key of that tool")
    assert recipe.model.quantization == "int8"
    for key in found.left:
        assert f"#   {key}: " in found.text
    assert re.search(r"batch_size: 2 +# micro_batch_size", found.text)


def test_llama_factory_keys_become_ours(here: Path) -> None:
    found = convert("factory.yml", "nuts")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    dataset, train = recipe.dataset, recipe.train
    assert found.tool == "LLaMA-Factory"
    assert dataset is not None
    assert (dataset.path, dataset.format, dataset.split) == ("rows.jsonl", "alpaca", "train[:10]")
    assert dataset.columns == {"instruction": "question", "output": "answer"}
    assert (dataset.template, dataset.learn, dataset.max_length) == ("chat", "last", 96)
    # Steps count alone, as they do there.
    assert (train.max_steps, train.epochs) == (9, 1.0)
    assert (train.scheduler, train.warmup_ratio, train.eval_every) == ("linear", 0.1, 4)
    assert recipe.model.quantization == "nf4"
    assert (recipe.adapter.target_modules, recipe.tracking) == ("all-linear", ["wandb"])
    assert {"trust_remote_code", "lora_rank", "report_to", "learning_rate"} <= (set(found.left))


def test_data_sets_of_llama_factory_by_its_list(here: Path) -> None:
    text = (here / "factory.yml").read_text()
    text = text.replace("dataset: nuts", "dataset: talks, far, unknown").replace(
        "template: default", "template: qwen3_nothink"
    )
    (here / "factory.yml").write_text(text)
    found = convert("factory.yml", "nuts")
    (here / "mine.yaml").write_text(found.text)
    dataset = load_recipe("mine.yaml").dataset
    assert dataset is not None
    assert isinstance(dataset.path, list)
    talks, far, unknown = dataset.path
    assert isinstance(talks, SourceRecipe)
    assert isinstance(far, SourceRecipe)
    assert isinstance(unknown, SourceRecipe)
    assert (talks.path, talks.format) == ("talks.jsonl", "chat")
    assert talks.columns == {"messages": "talk"}
    assert (far.path, far.name, far.split) == ("some/rows", "easy", "train[:10]")
    assert unknown.path == "unknown"
    assert (dataset.chat_template, dataset.template_arguments) == (
        "qwen3",
        {"enable_thinking": False},
    )
    assert {"dataset talks: images", "dataset far: ranking", "dataset unknown"} <= set(found.left)
    (here / "dataset_info.json").write_text("[]")
    assert "dataset talks" in convert("factory.yml", "nuts").left


def test_trl_and_peft_keys_become_ours(here: Path, tiny_model_dir: Path) -> None:
    found = convert("trl.yml", "nuts")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    assert (found.tool, recipe.output_dir) == ("trl", "runs/nuts")
    assert (recipe.model.dtype, recipe.train.precision, recipe.train.seed) == ("float32", "no", 11)
    assert (recipe.adapter.modules_to_save, recipe.train.max_grad_norm) == (["lm_head"], 0.5)
    assert set(found.left) == {"lora_r", "lora_alpha", "learning_rate", "eos_token", "packing"}
    found = convert("adapter_config.json", "nuts")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    assert (found.tool, recipe.model.path, recipe.dataset) == ("PEFT", str(tiny_model_dir), None)
    assert (recipe.adapter.target_modules, recipe.adapter.dropout) == (["q_proj", "v_proj"], 0.05)
    assert set(found.left) == {
        *("r", "lora_alpha", "use_dora", "init_lora_weights", "layers_to_transform")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("axolotl.yml", ["tracking=[]", "train.warmup_steps=1", "model.quantization=null"]),
        ("factory.yml", ["tracking=[]", "train.precision=no", "model.quantization=null"]),
        ("trl.yml", ["dataset.columns={prompt: question, completion: answer}"]),
        (
            "adapter_config.json",
            ["dataset.path=rows.jsonl", "train.precision=no",
             "dataset.columns={prompt: question, completion: answer}"],
        ),
    ],
)  # fmt: skip
def test_what_was_converted_validates_and_trains_two_steps(
    file: str, keys: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["recipes", "convert", file, "mine.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"] == "mine.yaml"
    assert told["left"]["lora_alpha" if file != "factory.yml" else "lora_rank"]["meaning"]
    assert cli.run(["validate", "mine.yaml"]) == 0
    more = ["train.max_steps=2", "output_dir=run", "model.dtype=float32"]
    assert cli.run(["train", "mine.yaml", *more, *keys]) in (0, 4)
    results = json.loads((here / "run" / "results.json").read_text())
    assert results["steps"] == 2


def test_nothing_is_overwritten_and_the_text_says_what_was_left_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["recipes", "convert", "axolotl.yml"]) == 0
    out = capsys.readouterr().out
    assert (here / "axolotl-kpsvd.yaml").is_file()
    assert "read as a configuration of axolotl" in out
    assert "left out, and what that means for the run:" in out
    assert "next: kpsvd-tune validate axolotl-kpsvd.yaml" in out
    before = (here / "axolotl-kpsvd.yaml").read_text()
    assert cli.run(["recipes", "convert", "axolotl.yml", "."]) == 2
    assert "exists: name another file" in capsys.readouterr().err
    assert (here / "axolotl-kpsvd.yaml").read_text() == before


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yml", "foo: 1\nbar: 2\n", "is of no known form: it holds the keys foo, bar; expected"),
        ("a.yml", "model_name_or_path: m\n", "is of no known form"),
        ("a.yml", "- 1\n", "holds no mapping of keys"),
        ("a.yml", "", "holds no mapping of keys"),
        ("a.yml", "a: [1\n", "a.yml:1: not valid YAML"),
        ("a.yml", "base_model: m\nrl: dpo\n", "rl: dpo trains on preferences"),
        ("a.yml", "model_name_or_path: m\nstage: rm\n", "docs/hosts.md, Preferences"),
        ("a.yml", "model_name_or_path: m\nbeta: 0.1\nuse_peft: true\n", "beta: 0.1 trains on"),
        ("a.yml", "model_name_or_path:\nstage: sft\n", "names no base model"),
        ("adapter_config.json", '{"peft_type": "LOKR"}', "peft_type is 'LOKR'; expected LORA"),
        ("adapter_config.json", '{"peft_type": "KPSVD"}', "name its folder in adapter.from"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_what_was_seen(
    name: str, text: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / name).write_text(text)
    assert cli.run(["recipes", "convert", name, "mine.yaml"]) == 2
    assert expected in capsys.readouterr().err
    assert not (here / "mine.yaml").exists()


def test_a_missing_file_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "convert", "no.yml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no.yml: there is no such file (looked from ")
    assert "; expected the YAML of axolotl" in said


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "conf: is a folder, with no such file in it; expected the YAML of axolotl"),
        (["notes.txt"], "conf: is a folder, with no such file in it; expected the YAML of axolotl"),
        (["a b.yml"], "conf: is a folder; expected one file: kpsvd-tune recipes convert 'conf/a b"),
        (
            ["b.yaml", "a.yaml"],
            "conf: is a folder, which holds a.yaml, b.yaml; expected one file: kpsvd-tune recipes "
            "convert conf/a.yaml\n",
        ),
        (
            ["a.yaml", "adapter_config.json"],
            "conf: is the folder of an adapter; expected one file: kpsvd-tune recipes convert "
            "conf/adapter_config.json\n",
        ),
    ],
)
def test_a_folder_is_refused_with_the_file_to_name(
    files: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf").mkdir()
    for name in files:
        (here / "conf" / name).write_text("{}")
    assert cli.run(["recipes", "convert", "conf"]) == 2
    assert f"error: {expected}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "conf").mkdir()

    def refuse(path: object) -> list[str]:
        # Root, as whom tests may run, reads every folder.
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert cli.run(["recipes", "convert", "conf"]) == 2
    said = capsys.readouterr().err
    assert "error: conf: is a folder that cannot be read: Permission denied; name one file" in said


def test_what_cannot_be_read_as_a_file_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(here / "pipe")
    assert cli.run(["recipes", "convert", "pipe"]) == 2
    assert (
        "error: pipe: is a named pipe, socket or device, and convert reads one file; expected"
        in (capsys.readouterr().err)
    )


def test_a_recipe_of_ours_has_nothing_to_convert(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "ours.yaml").write_text("model: {path: o/m}\noutput_dir: x\n")
    assert cli.run(["recipes", "convert", "ours.yaml"]) == 2
    assert "ours.yaml: is a recipe of kpsvd-tune, so there is nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "section", "key", "expected"),
    [
        ("bf16: auto", "train", "precision", "auto"),
        ("bf16: auto", "model", "dtype", "auto"),
        ("bf16: true", "train", "precision", "bf16"),
        ("fp16: true", "model", "dtype", "float16"),
        ("warmup_ratio: 0.2", "train", "warmup_ratio", 0.2),
        ("max_steps: -1\nnum_epochs: 2", "train", "epochs", 2),
        ("num_epochs: 2\nmax_steps: 5", "train", "max_steps", 5),
        ("cosine_min_lr_ratio: 0.1", "train", "scheduler", "cosine_with_min_lr"),
        ("flash_attention: true", "model", "attn_implementation", "flash_attention_2"),
        ("lora_target_linear: true", "adapter", "target_modules", "all-linear"),
        ("lora_target_modules: q_proj, k_proj", "adapter", "target_modules", ["q_proj", "k_proj"]),
        ("lora_target_modules: .*q_proj", "adapter", "target_modules", ".*q_proj"),
        ("optimizer: sgd", "train", "optimizer", "sgd"),
        ("use_tensorboard: true", "", "tracking", ["tensorboard"]),
        ("datasets: [{path: a/b, type: completion, field: body}]", "dataset", "format", "text"),
        ("datasets: [a/b, {path: c/d, data_files: [x.csv], name: e}]", "dataset", "path", None),
        ("datasets: [{path: a/b, type: chat_template.x}]", "dataset", "format", "chat"),
        ("chat_template: tokenizer_default\ndatasets: [a/b]", "dataset", "template", "chat"),
        ("chat_template: chatml\ndatasets: [a/b]", "dataset", "chat_template", "chatml"),
        ("a_key_without_a_value:", "model", "path", "some/model"),
        ("load_in_4bit: true", "model", "quantization", "nf4"),
    ],
)
def test_single_keys(keys: str, section: str, key: str, expected: object, here: Path) -> None:
    (here / "a.yml").write_text(f"base_model: some/model\nadapter: lora\n{keys}\n")
    (here / "mine.yaml").write_text(convert("a.yml", "a").text)
    recipe = load_recipe("mine.yaml")
    value = getattr(getattr(recipe, section) if section else recipe, key)
    if expected is None:
        assert [getattr(each, "path", each) for each in value] == ["a/b", "x.csv"]
    else:
        assert value == expected


@pytest.mark.parametrize(
    "keys",
    [
        "adapter: ia3",
        "optimizer: lion_pytorch",
        "lr_scheduler: rex",
        "chat_template: alpaca",
        "datasets: [{path: a/b, type: alpaca}]",
        "datasets: [{path: a/b, type: context_qa.load_v2}]",
        "lora_target_modules: [q_proj]\nlearning_rate: 1e-4",
    ],
)
def test_what_has_no_counterpart_is_always_told(keys: str, here: Path) -> None:
    (here / "a.yml").write_text(f"base_model: some/model\n{keys}\n")
    assert len(convert("a.yml", "a").left) == 1


def test_qlora_is_a_quantised_base(here: Path) -> None:
    (here / "a.yml").write_text("base_model: some/model\nadapter: qlora\n")
    found = convert("a.yml", "a")
    assert not found.left
    (here / "mine.yaml").write_text(found.text)
    assert load_recipe("mine.yaml").model.quantization == "nf4"


def test_full_training_of_trl_and_llama_factory_is_told(here: Path) -> None:
    for text in ("use_peft: false\ntorch_dtype: auto", "finetuning_type: full\nstage: pt"):
        (here / "a.yml").write_text(f"model_name_or_path: some/model\n{text}\n")
        assert any("adapter" in said for _, said in convert("a.yml", "a").left.values())


@pytest.mark.parametrize("tool", RULES)
def test_the_page_has_a_table_of_every_key(tool: str) -> None:
    page = (ROOT / "docs" / "moving.md").read_text("utf-8")
    part = page.partition(f"\n## {tool}\n")[2].partition("\n## ")[0]
    shared = page.partition("\n## Keys of transformers' trainer\n")[2].partition("\n## ")[0]
    for key in RULES[tool]:
        assert f"`{key}`" in part + shared, key


def test_the_tables_of_the_page_are_those_of_the_rules() -> None:
    tables = script("moving_tables")
    page = tables.PAGE.read_text("utf-8")
    assert page.endswith(tables.tables()), "stale: python scripts/moving_tables.py"


@pytest.mark.parametrize("value", ["null", "''", "false", "[]"])
@pytest.mark.parametrize("tool", RULES)
def test_a_key_that_asks_for_nothing_changes_nothing(tool: str, value: str, here: Path) -> None:
    least = {
        "axolotl": {"base_model": "some/model"},
        "LLaMA-Factory": {"model_name_or_path": "some/model", "stage": "sft"},
        "trl": {"model_name_or_path": "some/model", "use_peft": "true"},
        "PEFT": {"base_model_name_or_path": "some/model", "peft_type": "LORA"},
    }[tool]
    # Without a limit, and with prompts learnt: null and false ask for something.
    if tool == "trl":
        least |= {"dataset_name": "a/b", "max_length": "9", "max_seq_length": "9"}
        least |= {"assistant_only_loss": "true", "completion_only_loss": "true"}
    quiet = [key for key in RULES[tool] if key not in least and RULES[tool][key].says[0] != "`"]
    lines = [f"{key}: {each}" for key, each in least.items()]
    told = {"adapter", "finetuning_type", "learning_rate", "r", "lora_r", "lora_rank", "lora_alpha"}
    nulls = [f"{key}: null" for key in RULES[tool] if key not in least and key not in quiet]
    empty = [f"{key}: {value}" for key in quiet if key not in told]
    (here / "a.yml").write_text("\n".join([*lines, *nulls, *empty]) + "\n")
    found = convert("a.yml", "a")
    assert not found.left
    (here / "mine.yaml").write_text(found.text)
    assert load_recipe("mine.yaml").model.path == "some/model"


@pytest.mark.parametrize(
    ("keys", "ours", "left"),
    [
        ("dataset_text_field: body", {"dataset.columns"}, set()),
        ("warmup_steps: 0\nwarmup_ratio: 0.0", {"train.warmup_ratio"}, set()),
        ("max_length: null", set(), {"max_length"}),
        ("max_seq_length: 5", {"dataset.max_length"}, set()),
        ("completion_only_loss: false", set(), {"completion_only_loss"}),
        ("assistant_only_loss: false", set(), {"assistant_only_loss"}),
        ("report_to: [wandb, tensorboard]", {"tracking"}, set()),
        ("max_steps: 4\nnum_train_epochs: 3", {"train.max_steps"}, set()),
        ("report_to: [swanlab]", set(), {"report_to"}),
        ("load_best_model_at_end: false\neval_steps: -1\npacking: false", set(), set()),
        ("lora_target_modules: []", set(), set()),
        ("learning_rate: null", set(), set()),
        ("dtype: auto", set(), {"dtype"}),
    ],
)
def test_single_keys_of_trl(keys: str, ours: set[str], left: set[str], here: Path) -> None:
    (here / "a.yml").write_text(f"model_name_or_path: some/model\nuse_peft: true\n{keys}\n")
    found = convert("a.yml", "a")
    given = {key for key, source in found.taken.items() if not source.endswith("by default")}
    assert given == {"model.path", *ours}
    assert set(found.left) == left


def _content(keys: str, here: Path) -> dict[str, Any]:
    """The dataset section and the trackers of what these keys of a tool become."""
    (here / "a.yml").write_text(keys + "\n")
    (here / "mine.yaml").write_text(convert("a.yml", "a").text)
    return load_recipe("mine.yaml").model_dump(exclude_defaults=True)


_AXOLOTL = "base_model: m/n\ndatasets: [a/b]\n"
_FACTORY = "model_name_or_path: m/n\nstage: sft\ndataset: nuts\ndataset_dir: .\n"
_TRL = "model_name_or_path: m/n\nuse_peft: true\ndataset_name: a/b\n"


@pytest.mark.parametrize(
    ("keys", "max_length", "too_long", "batch_size", "epochs"),
    [
        (_AXOLOTL, 512, "drop", 1, 1.0),
        (_FACTORY, 2048, "cut", 8, 3.0),
        (_TRL, 1024, "cut", 8, 3.0),
    ],
)
def test_what_a_tool_does_without_a_key_is_done_here_too(
    keys: str, max_length: int, too_long: str, batch_size: int, epochs: float, here: Path
) -> None:
    (here / "a.yml").write_text(keys)
    found = convert("a.yml", "a")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    assert recipe.dataset is not None
    assert (recipe.dataset.max_length, recipe.dataset.too_long) == (max_length, too_long)
    assert (recipe.train.batch_size, recipe.train.epochs) == (batch_size, epochs)
    assert recipe.dataset.validation == 0  # every row is learnt
    assert "by default" in found.taken["dataset.max_length"]
    assert not found.left


def test_held_out_rows_stay_where_the_tool_looks_at_some(here: Path) -> None:
    (here / "a.yml").write_text(_TRL + "eval_strategy: steps\nmax_steps: 5\n")
    found = convert("a.yml", "a")
    (here / "mine.yaml").write_text(found.text)
    recipe = load_recipe("mine.yaml")
    assert recipe.dataset is not None
    assert recipe.dataset.validation == 0.02
    assert "2 % of the rows" in found.left["held-out rows"][1]
    assert "train.epochs" not in found.taken  # steps count alone


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 0", {"warmup_ratio": 0.1}),
        ("warmup_steps: 0\nwarmup_ratio: 0.1", {"warmup_ratio": 0.1}),
        ("warmup_steps: 7\nwarmup_ratio: 0", {"warmup_steps": 7}),
        ("warmup_steps: 0.2", {"warmup_ratio": 0.2}),
        ("warmup_ratio: 1", {"warmup_ratio": 1.0}),
        ("warmup_ratio: 0", {"warmup_ratio": 0.0}),
    ],
)
def test_a_run_warms_up_as_it_did(keys: str, expected: dict[str, float], here: Path) -> None:
    train = _content(_TRL + keys, here)["train"]
    # The recipe's own share, 0.03, is the default.
    assert {key: train[key] for key in ("warmup_ratio", "warmup_steps") if key in train} == expected


def test_plain_text_of_llama_factory_is_learnt_from_its_column(here: Path) -> None:
    keys = _FACTORY.replace("sft", "pt") + "max_samples: 5"
    dataset = _content(keys, here)["dataset"]
    assert (dataset["format"], dataset["columns"]) == ("text", {"text": "question"})
    assert dataset["split"] == "train[:5]"
    assert "dataset nuts: response" in convert("a.yml", "a").left


def test_forms_of_llama_factory_that_are_not_known_are_told(here: Path) -> None:
    info = {
        "nuts": {"file_name": 5, "formatting": "odd", "columns": ["a"], "split": "test"},
        "talks": {"file_name": "talks.jsonl", "formatting": "openai"},
    }
    (here / "dataset_info.json").write_text(json.dumps(info))
    dataset = _content(_FACTORY + "max_samples: some", here)["dataset"]
    assert (dataset["path"], dataset["split"]) == ("5", "test")
    left = convert("a.yml", "a").left
    assert {"dataset nuts: formatting", "dataset nuts: columns", "max_samples"} == set(left)
    dataset = _content(_FACTORY.replace("nuts", "[talks]") + "max_samples: 3", here)["dataset"]
    assert (dataset["format"], dataset["split"]) == ("chat", "train[:3]")
    (here / "a.yml").write_text(_FACTORY.replace("nuts", "true"))
    assert "dataset True" in convert("a.yml", "a").left


def test_no_key_of_axolotl_takes_the_place_of_another_unseen(here: Path) -> None:
    keys = "use_tensorboard: true\nwandb_project: x\n"
    keys += "lora_target_linear: true\nlora_target_modules: [q_proj]\n"
    keys += "pretraining_dataset: c/d\nbf16: false\nfp16: false"
    content = _content(_AXOLOTL + keys, here)
    assert content["tracking"] == ["tensorboard", "wandb"]
    assert content["adapter"].get("target_modules", "all-linear") == "all-linear"
    assert content["dataset"]["path"] == "a/b"
    assert content["model"]["dtype"] == "float32"
    assert set(convert("a.yml", "a").left) == {"lora_target_modules", "pretraining_dataset"}
    dataset = _content("base_model: m/n\npretraining_dataset: c/d", here)["dataset"]
    assert (dataset["path"], dataset["format"]) == ("c/d", "text")


@pytest.mark.parametrize("tool", RULES)
@pytest.mark.parametrize(
    "value", [True, 0, -1, 2.5, "x", [1], [["a"]], [None], {"a": 1}, [{"path": {"a": 1}}]]
)
def test_no_value_of_any_key_makes_convert_fail(tool: str, value: object, here: Path) -> None:
    all_least: dict[str, dict[str, Any]] = {
        "axolotl": {"base_model": "m/n"},
        "LLaMA-Factory": {"model_name_or_path": "m/n", "cutoff_len": 9},
        "trl": {"model_name_or_path": "m/n", "use_peft": True},
        "PEFT": {"base_model_name_or_path": "m/n", "peft_type": "LORA"},
    }
    least = all_least[tool]
    for key in RULES[tool]:
        if key not in least and key not in ("stage", "peft_type"):
            (here / "a.yml").write_text(json.dumps({**least, key: value}))
            assert convert("a.yml", "a").tool in (tool, "LLaMA-Factory")


def test_an_odd_key_stays_within_its_comment(here: Path) -> None:
    odd = "odd\nmodel: {path: evil}"
    (here / "a.yml").write_text(json.dumps({"base_model": "m/n", odd: 1, "chat_template": [1]}))
    found = convert("a.yml", "a")
    (here / "mine.yaml").write_text(found.text)
    assert load_recipe("mine.yaml", ["dataset.path=a/b"]).model.path == "m/n"
    assert set(found.left) == {repr(odd), "chat_template"}


def test_a_list_of_data_sets_is_looked_for_in_folders_only(here: Path) -> None:
    dataset = _content(_FACTORY.replace("dataset_dir: .", "dataset_dir: [5]"), here)["dataset"]
    assert dataset["path"] == "nuts"
    assert "dataset nuts" in convert("a.yml", "a").left
