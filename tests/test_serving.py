"""docs/serving.md: what other programs make of what is written here.

`transformers serve` answers with a merged model in tests/docs/test_afternoon.py.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CTRANSLATE2 = """
import json, sys, numpy
import ctranslate2
generator = ctranslate2.Generator(sys.argv[1], device="cpu", intra_threads=1)
tokens = json.loads(sys.argv[2])
answer = generator.generate_batch(
    [tokens], max_length=4, sampling_topk=1, include_prompt_in_result=False
)[0].sequences_ids[0]
logits = numpy.array(generator.forward_batch([tokens]))[0]
print(json.dumps({"answer": answer, "logits": logits.tolist()}))
"""


@pytest.mark.slow
def test_ctranslate2_computes_the_logits_of_a_merged_model(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Not in CI: the package is too large for the extra of the tests."""
    if importlib.util.find_spec("ctranslate2") is None:
        pytest.skip("ctranslate2 is not installed")
    place = tmp_path / "merged-ct2"
    convert = "from ctranslate2.converters.transformers import main; main()"
    options = ["--model", str(tiny_model_dir), "--output_dir", str(place)]
    subprocess.run([sys.executable, "-c", convert, *options], check=True, cwd=tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("How many?", return_tensors="pt").input_ids
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    tokens = json.dumps(tokenizer.convert_ids_to_tokens(ids[0]))
    done = subprocess.run(
        [sys.executable, "-c", CTRANSLATE2, str(place), tokens],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert float((torch.tensor(found["logits"]) - expected).abs().max()) < 1e-4
    assert found["answer"] == answer.tolist()
