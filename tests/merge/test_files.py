"""The files beside merged weights: processors, the adapter's tokenizer; and a disk that fills."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.commands import main as cli
from kpsvd_tune.merge.files import add_end_tokens
from kpsvd_tune.models import load_tokenizer, resolve_model
from kpsvd_tune.models.loading import same_tokenizer
from kpsvd_tune.storage.durable import NewFile


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    return folder


@pytest.fixture
def adapter(base: Path, model_factory: Any, tmp_path: Path) -> Path:
    """As PEFT's own save_pretrained writes it: no tokenizer, no manifest."""
    settings = KpsvdConfig(
        target_modules=["q_proj"], rank=2, init_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model_factory(), settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def merged(adapter: Path, tmp_path: Path) -> Path:
    assert cli.run(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    return tmp_path / "merged"


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (
            {"eos_token_id": 2},
            {"eos_token_id": 2, "top_k": 5},
            {"eos_token_id": [2, 9], "top_k": 5},
        ),
        ({"eos_token_id": 2, "bos_token_id": 1}, None, {"eos_token_id": [2, 9], "bos_token_id": 1}),
        ({}, {"eos_token_id": [7, 2]}, {"eos_token_id": [7, 2, 9]}),
        ({"eos_token_id": None}, {"top_k": 5}, {"eos_token_id": [2, 9], "top_k": 5}),
        ({}, {"eos_token_id": [9, 2]}, {"eos_token_id": [9, 2]}),
        ({"eos_token_id": [2, 9]}, None, None),
    ],
)
def test_tokens_that_end_an_answer_join_those_of_the_base(
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: dict[str, Any] | None,
) -> None:
    file = tmp_path / "generation_config.json"
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        file.write_text(json.dumps(generation))
    added = add_end_tokens(tmp_path, (2, 9))
    assert (json.loads(file.read_text()) if file.exists() else None) == expected
    assert bool(added) == (generation != expected)


@pytest.mark.slow
@pytest.mark.parametrize("proof", ["both", "tensors"])
def test_a_merged_model_stops_where_answers_of_chats_end(
    base: Path, adapter: Path, tmp_path: Path, proof: str
) -> None:
    before = AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id
    chats: Any = AutoTokenizer.from_pretrained(base)
    end = chats.pad_token_id  # a special token of the model that it does not stop at
    chats.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<pad>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chats.save_pretrained(adapter)
    arguments = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--proof", proof]
    assert cli.run(arguments) == 0
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert served.generation_config.eos_token_id == [before, end]
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert [note for note in report["notes"] if note.startswith("Answers end with <pad>, at which")]


@pytest.mark.slow
def test_processors_come_along(
    base: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=8000)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"do_resize": false}')
    folder = merged(adapter, tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    (folder / "preprocessor_config.json").unlink()
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.feature_extractor.sampling_rate == 8000
    assert same_tokenizer(processor.tokenizer, tokenizer)


def other_special_tokens(tokenizer: Any) -> None:
    tokenizer.pad_token = "</s>"


def an_added_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<tool>"])


def another_way_to_split(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_special_tokens, an_added_token, another_way_to_split])
def test_a_tokenizer_that_was_changed_beside_the_adapter_wins(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    own: Any = AutoTokenizer.from_pretrained(base)
    change(own)
    own.save_pretrained(adapter)
    assert not same_tokenizer(own, AutoTokenizer.from_pretrained(base))
    assert same_tokenizer(load_tokenizer(resolve_model(str(base)), adapter), own)
    found = AutoTokenizer.from_pretrained(merged(adapter, tmp_path))
    assert same_tokenizer(found, own)
    assert found("A <tool>").input_ids == own("A <tool>").input_ids


@pytest.mark.slow
def test_another_vocabulary_wins_and_is_named(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = AutoTokenizer.from_pretrained(base)
    own.save_pretrained(adapter)
    file = adapter / "tokenizer.json"
    a, b = own.get_vocab()["a"], own.get_vocab()["b"]
    text = file.read_text(encoding="utf-8")
    text = text.replace(f'"a": {a},', f'"a": {b},').replace(f'"b": {b},', f'"b": {a},')
    file.write_text(text, encoding="utf-8")
    found = AutoTokenizer.from_pretrained(merged(adapter, tmp_path))
    assert found("ab").input_ids == [b, a]
    assert "'a', 'b' of the base's vocabulary are other tokens or none" in caplog.text


@pytest.mark.slow
def test_an_equal_tokenizer_leaves_the_bases_files(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own: Any = AutoTokenizer.from_pretrained(base)
    own("a", truncation=True, max_length=3)
    own.chat_template = "{{ 'mine' }}"
    own.save_pretrained(adapter)
    folder = merged(adapter, tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ 'mine' }}"
    assert "vocabulary" not in caplog.text


def test_a_chat_template_in_the_configuration_of_transformers_4_wins(
    base: Path, adapter: Path
) -> None:
    own: Any = AutoTokenizer.from_pretrained(base)
    own.chat_template = "{{ 'mine' }}"
    own.save_pretrained(adapter, save_jinja_files=False)
    assert not (adapter / "chat_template.jinja").exists()
    assert load_tokenizer(resolve_model(str(base)), adapter).chat_template == "{{ 'mine' }}"


def weights(monkeypatch: pytest.MonkeyPatch) -> None:
    write = NewFile.write_at

    def fill(self: NewFile, begin: int, data: Any) -> None:
        write(self, begin, memoryview(data)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(NewFile, "write_at", fill)


def tokenizer_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: Any, **options: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as the library in Rust

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fill)


def the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def fill(path: Path, *args: Any, **options: Any) -> int:
        if path.name == "merge_report.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", fill)


@pytest.mark.slow
@pytest.mark.parametrize("where", [weights, tokenizer_files, the_report])
def test_a_disk_that_fills_while_merging_is_called_full(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: Callable[[pytest.MonkeyPatch], None],
) -> None:
    output = tmp_path / "out" / "merged"
    with monkeypatch.context() as patched:
        where(patched)
        assert cli.run(["merge", str(adapter), "--output", str(output)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"could not write {output}: No space left on device; free some space, or" in said
    assert "another disk" in said
    assert list(output.parent.iterdir()) == []
    assert cli.run(["merge", str(adapter), "--output", str(output)]) == 0


@pytest.mark.slow
def test_a_file_that_the_system_cuts_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    """The same by the real writer, whose file hits a limit of the process."""
    output = tmp_path / "out" / "merged"
    program = (
        "import resource, signal, sys\n"
        "from kpsvd_tune.commands import main as cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))\n"
        f"code = cli.run(['merge', {str(adapter)!r}, '--output', {str(output)!r}])\n"
        # What measures the coverage of this process writes a file at its end.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "sys.exit(code)\n"
    )
    ended = warm.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    said = " ".join(ended.stderr.split())
    assert ended.returncode == 1, said
    assert "File too large; the file is larger than a limit allows" in said
    assert "Traceback" not in said
    assert list(output.parent.iterdir()) == []
