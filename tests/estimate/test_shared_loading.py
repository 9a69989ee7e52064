"""Processes that share out the weights are predicted to hold their part while they load."""

from __future__ import annotations

from architectures import save

from kpsvd_tune.estimate.memory import base_bytes, loading_bytes, shared_loading_bytes
from kpsvd_tune.models import load_skeleton, resolve_model


def test_a_process_holds_its_part_and_a_tensor(tmp_path):
    save("llama", tmp_path)
    source = resolve_model(str(tmp_path), None)
    skeleton = load_skeleton(source)
    found = shared_loading_bytes(source, skeleton, "float32", 4)
    largest = max(each.numel() for each in skeleton.parameters())
    assert found == base_bytes(skeleton, "float32") // 4 + 8 * largest
    assert found < loading_bytes(source, skeleton, "float32") / 2


def test_bases_that_are_loaded_whole_are_predicted_so(tmp_path):
    save("llama", tmp_path)
    source = resolve_model(str(tmp_path), None)
    skeleton = load_skeleton(source)
    skeleton.config.quantization_config = {"quant_method": "fp8"}
    assert shared_loading_bytes(source, skeleton, "float32", 4) is None
