"""docs/serving.md: what other programs make of what is written here."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

SERVE = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def ask(port: int, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if content is None else json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.slow
def test_transformers_serve_answers_with_a_merged_model(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A merged folder is a folder of a plain model, as this one is (tests/merge)."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers[serving] is not installed")
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(tiny_model_dir), *options],
            stdout=log,
            stderr=log,
            env=warm.unmeasured(),
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        question = {
            "model": str(tiny_model_dir),
            "messages": [{"role": "user", "content": "How many?"}],
            "max_tokens": 4,
        }
        answer = ask(port, "/v1/chat/completions", question)
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant"
        assert isinstance(choice["message"]["content"], str)
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait(30)


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
