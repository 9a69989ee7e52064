"""Model cards: what is published names no folder of the machine, and states the proof."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from kpsvd_tune.report.card import Base, front_matter, merged_card, without_folders
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
