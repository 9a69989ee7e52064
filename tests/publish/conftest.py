"""An adapter, a merged model and an exported LoRA as the commands leave them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.runs.adapter_folder import save_adapter
from kpsvd_tune.storage.commit import seal
from kpsvd_tune.storage.hashes import file_hash, file_hashes

CARD = """---
library_name: peft
license: mit
---

# A model

```python
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
```

`kpsvd-tune merge PATH_OF_THIS_FOLDER`
"""


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    config = KpsvdConfig(target_modules=["q_proj"], rank=1)
    peft: Any = get_peft_model(tiny_model, config)
    peft.peft_config["default"].base_model_name_or_path = "/home/ann/models/tiny"
    save_adapter(peft, {}, tokenizer, tmp_path / "mine", CARD)
    return tmp_path / "mine"


@pytest.fixture
def merged(tmp_path: Path, tiny_model_dir: Path) -> Path:
    folder = tmp_path / "merged"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "README.md").write_text(CARD)
    report = {
        "passed": True,
        "output": "/home/ann/merged",
        "warnings": ["see /home/ann/x/y"],
        "weight_files": file_hashes([folder / "model.safetensors"]),
    }
    (folder / "merge_report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF and so on")
    (folder / "README.md").write_text(CARD)
    digest = file_hash(folder / "model.gguf")
    report = {
        "file": "model.gguf",
        "num_bytes": 14,
        "output": "/home/ann/gguf",
        "sha256": digest,
    }
    (folder / "export_report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def lora(tmp_path: Path, model_factory: Any) -> Path:
    folder = tmp_path / "lora"
    peft: Any = get_peft_model(model_factory(), LoraConfig(target_modules=["q_proj"], r=2))
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(CARD)
    (folder / "export_report.json").write_text('{"output": "/home/ann/lora"}')
    seal(folder, "lora", but="README.md")
    return folder
