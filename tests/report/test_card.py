"""Model cards: what is published names no folder of the machine, and states the proof."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kpsvd_tune.report.card import Base, Training, front_matter, merged_card, without_folders
from kpsvd_tune.report.results import MergeReport

REPORT = MergeReport(
    adapter="/home/ann/runs/first/adapter",
    output="/home/ann/merged",
    dtype="bfloat16",
    tolerance=0.0231,
    max_logit_difference=0.00267,
    top1_agreement=1.0,
    num_positions=57,
    prompts=("Hi", "Ho"),
    kept_share={"a": 1.0, "b": 0.99},
    relative_update={"a": 0.1, "b": 0.1},
    min_kept_share=0.99,
    passed=True,
)


def metadata(card: str) -> dict[str, object]:
    read: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return read


def test_a_merged_model_tells_base_adapter_dtype_proof_and_licence():
    card = merged_card(REPORT, Base("owner/name", True, "apache-2.0"))
    assert metadata(card) == {
        "base_model": "owner/name",
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["kpsvd", "merged"],
    }
    for text in (
        "# owner/name with a KPSVD adapter merged in",
        "Adapter: first, trained with kpsvd-tune",
        "2 weight matrices and stored the weights in bfloat16",
        "57 token positions of 2 prompts. The comparison passed",
        "| largest logit difference | 0.00267 |",
        "states the licence `apache-2.0`",
    ):
        assert text in card
    assert "/home" not in card


def test_a_proof_that_failed_and_its_warnings_are_in_the_card():
    card = merged_card(replace(REPORT, passed=False, warnings=("lost much",)), Base("b", False))
    assert "The comparison **did not pass**" in card
    assert "Warning: lost much" in card
    assert "The licence of the base model holds for these weights too" in card


def test_only_an_id_of_the_hub_is_given_as_the_base():
    assert not any("base_model" in line for line in front_matter(Base("tiny", False), "peft", "a"))
    assert Base("tiny", False).place == "PATH_OF_THE_BASE_MODEL"
    assert Base("owner/tiny", True).place == "owner/tiny"


def test_code_names_the_commit_and_the_file_of_a_base():
    assert Base("owner/tiny", True, revision="abc").loading == (
        'base = AutoModelForCausalLM.from_pretrained("owner/tiny", revision="abc")'
    )
    assert Base("tiny.gguf", False, gguf_file="tiny.gguf").loading == (
        'base = AutoModelForCausalLM.from_pretrained("FOLDER_OF_THE_BASE_MODEL", '
        'gguf_file="tiny.gguf")'
    )


def test_the_hash_of_several_files_is_what_the_card_says(tmp_path: Path):
    files = {}
    for number in range(3):
        content = f"weights {number}".encode()
        (tmp_path / f"model-0000{number}-of-00003.safetensors").write_bytes(content)
        name = f"model-0000{number}-of-00003.safetensors"
        files[name] = hashlib.sha256(content).hexdigest()
    card = merged_card(REPORT, Base("b", False), [Training("first", base_files=files)])
    found = re.search(r"weights `(.+)` gives (\w{64})\.", card)
    assert found is not None
    done = subprocess.run(["bash", "-c", found[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[0] == found[2]


def test_several_adapters_have_a_table_each_and_no_scores():
    scored = {"scores": {"loss": {"loss": {"value": 1.0, "n": 9, "stderr": 0.1}}}, "steps": 3}
    trainings = [Training("first", settings=(("ranks", "2"),), results=scored), Training("other")]
    report = replace(REPORT, adapters=("/a/first", "/a/other"), weights=(0.5, 2.0))
    card = merged_card(report, Base("b", False), trainings)
    assert "Adapters: 0.5 x first, 2 x other, trained" in card
    assert "### first\n\n| what | value |\n|---|---|\n| ranks | 2 |\n| steps | 3 |" in card
    assert "### other\n\nNothing of it was kept beside the adapter." in card
    assert "## Evaluation" not in card
    assert "## Method" not in card


@pytest.mark.parametrize(
    ("form", "is_random", "words"),
    [
        ("both", False, "Both factors of every product are trained, beginning with the leading"),
        ("left", True, "The left factors are trained; the right ones are random directions that"),
        ("right", False, "The right factors are trained; the left ones are the leading terms of"),
        ("core", False, "A small matrix that mixes the products is trained; their factors are"),
    ],
)
def test_the_method_names_what_the_form_trains(form: str, is_random: bool, words: str):
    training = Training("a", form=form, is_random=is_random)
    assert words in merged_card(REPORT, Base("b", False), [training])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("on /home/ann/data/rows.jsonl, the first 4", "on rows.jsonl, the first 4"),
        ("~/data/rows.jsonl", "rows.jsonl"),
        ("../data/rows.jsonl and ./more/x.csv", "rows.jsonl and x.csv"),
        ("openai/gsm8k (test)", "openai/gsm8k (test)"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("template '{prompt}</s>and/or/not'", "template '{prompt}</s>and/or/not'"),
        ("tokens/s | 1/2", "tokens/s | 1/2"),
    ],
)
def test_of_a_local_path_only_the_last_name_is_left(text: str, shown: str):
    assert without_folders(text) == shown
