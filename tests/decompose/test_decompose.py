"""The stage as a whole: exact factors, an honest report, a cache that never changes a result."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import architectures
import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.decompose import (
    Decomposition,
    Progress,
    collect,
    collect_spectra,
    decompose,
    default_cache_dir,
)
from kpsvd_tune.decompose.spectra import Found, divide, work
from kpsvd_tune.decompose.start import adapt
from kpsvd_tune.errors import AdapterError, ModelError
from kpsvd_tune.linalg import KroneckerShape, LayerPlan, kpsvd, unrearrange
from kpsvd_tune.models import ModelSource, load_model, resolve_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.recipe.adapter import AdapterRecipe, RankRecipe
from kpsvd_tune.report.console import rank_summary
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import RankReport


def recipe(**rank: object) -> AdapterRecipe:
    given = {"window": 6, "max": 6, "min": 0, "energy": 0.5} | rank
    shape = given.pop("factor_shape", "balanced")
    return AdapterRecipe.model_validate({"rank": given, "factor_shape": shape})


def assert_same(one: Decomposition, other: Decomposition) -> None:
    assert one.layers == other.layers
    assert list(one.factors) == list(other.factors)
    for name, (left, right) in one.factors.items():
        assert torch.equal(left, other.factors[name][0]), name
        assert torch.equal(right, other.factors[name][1]), name


@pytest.fixture
def source(tiny_model_dir: Path) -> ModelSource:
    return resolve_model(str(tiny_model_dir))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each matrix that is really decomposed: how many terms were asked for."""
    calls: list[int] = []

    def counting(weight: torch.Tensor, shape: object, num_terms: int, **options: object) -> object:
        calls.append(num_terms)
        return kpsvd(weight, shape, num_terms, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("kpsvd_tune.linalg.plan.kpsvd", counting)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("factor_shape", ["balanced", "thin", "pissa", {"n": 4, "p": 2}])
def test_factors_and_report_agree_with_the_weights(
    source: ModelSource, factor_shape: str | dict[str, int]
) -> None:
    found = decompose(source, recipe(factor_shape=factor_shape, min=1))
    model = load_model(source, "float32")
    assert len(found.report.layers) == 14
    for layer in found.report.layers:
        weight = architectures.weight_of(model, layer.name).double().numpy()
        left, right = (factor.double().numpy() for factor in found.factors[layer.name])
        m, n, p, q = layer.factor_shape
        assert left.shape == (layer.rank, m, n)
        assert right.shape == (layer.rank, p, q)
        approximation = sum(np.kron(a, b) for a, b in zip(left, right, strict=True))
        error = np.linalg.norm(weight - approximation) / np.linalg.norm(weight)
        assert layer.relative_error == pytest.approx(error, abs=1e-5)
        assert layer.energy_total == pytest.approx(1 - error**2, abs=1e-5)
        blocks = weight.reshape(m, p, n, q).transpose(0, 2, 1, 3).reshape(m * n, p * q)
        sigma = np.linalg.svd(blocks, compute_uv=False)
        assert layer.singular_values == pytest.approx(sigma[:6], rel=1e-5)
        assert layer.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)
        kept, window = (sigma[: layer.rank] ** 2).sum(), (sigma[:6] ** 2).sum()
        assert layer.energy_window == pytest.approx(kept / window, rel=1e-5)
        assert layer.parameters == layer.rank * (m * n + p * q)
        entry = found.layers[layer.name]
        assert entry["shape"] == [m, n, p, q]
        assert entry["rank"] == layer.rank
        fingerprint = (weight * np.kron(left[0], right[0])).sum()
        assert entry["fingerprint"] == pytest.approx(fingerprint, rel=1e-5)


def test_totals_pool_the_layers(source: ModelSource) -> None:
    report = decompose(source, recipe()).report
    weights = [
        [value**2 * (layer.energy_total / kept) for value in layer.singular_values]
        for layer in report.layers
        if (kept := sum(value**2 for value in layer.singular_values[: layer.rank])) > 0
    ]
    assert len(weights) == 14
    held = sum(layer.energy_total for layer in report.layers)
    assert report.totals["energy"] == pytest.approx(held / sum(map(math.fsum, weights)))
    assert report.totals["modules"] == 14
    assert report.totals["trainable_parameters"] == sum(x.parameters for x in report.layers)
    model = load_model(source, "float32")
    assert report.totals["base_parameters"] == sum(x.numel() for x in model.parameters())
    assert dict(report.untouched).keys() == {"model.embed_tokens", "lm_head"}
    assert report.rule["window"] == 6


def test_conv1d_weights_are_taken_as_out_by_in(tmp_path: Path) -> None:
    model = architectures.save("gpt2", tmp_path)
    found = decompose(resolve_model(str(tmp_path)), recipe(method="fixed", window=64, max=64))
    layer = next(x for x in found.report.layers if x.name == "transformer.h.0.mlp.c_fc")
    assert (layer.out_features, layer.in_features) == (64, 16)
    left, right = found.factors[layer.name]
    rebuilt = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(rebuilt, architectures.weight_of(model, layer.name))


def test_layers_of_rank_0_are_reported_and_not_adapted(source: ModelSource) -> None:
    found = decompose(source, recipe(budget=400))
    ranks = {layer.name: layer.rank for layer in found.report.layers}
    empty = {name for name, rank in ranks.items() if rank == 0}
    assert empty
    assert set(found.layers) == set(found.factors) == set(ranks) - empty
    assert 0 < found.report.totals["trainable_parameters"] <= 400


def test_overrides_reach_the_rules_in_both_forms(source: ModelSource) -> None:
    adapter = recipe(overrides={"q_proj": {"rank": 4}, "v_proj": 3, "o_proj": {"max": 1}})
    ranks = {layer.name: layer.rank for layer in decompose(source, adapter).report.layers}
    assert {ranks[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)} == {4}
    assert {ranks[f"model.layers.{i}.self_attn.v_proj"] for i in (0, 1)} == {3}
    assert max(ranks[f"model.layers.{i}.self_attn.o_proj"] for i in (0, 1)) == 1


@pytest.mark.slow
def test_a_second_run_and_other_thresholds_decompose_nothing(
    source: ModelSource, computed: list[int]
) -> None:
    first = decompose(source, recipe())
    assert len(computed) == 14
    assert_same(decompose(source, recipe()), first)
    higher = decompose(source, recipe(energy=0.9))
    narrow = decompose(source, recipe(window=3, max=3))
    assert len(computed) == 14
    assert (
        higher.report.totals["trainable_parameters"] > (first.report.totals["trainable_parameters"])
    )
    wide = first.report.layers[5].singular_values
    assert narrow.report.layers[5].singular_values == wide[:3]
    decompose(source, recipe(window=8))
    assert len(computed) == 28


def test_known_weights_are_not_even_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures.save("llama", tmp_path)
    os.utime(tmp_path / "model.safetensors", (1e9, 1e9))
    source = resolve_model(str(tmp_path))
    first = decompose(source, recipe())

    def refuse(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("kpsvd_tune.models.stream.read_tensor", refuse)
    assert_same(decompose(source, recipe()), first)


def test_equal_weights_in_another_folder_share_the_cache(
    tmp_path: Path, computed: list[int]
) -> None:
    for folder in ("one", "two"):
        architectures.save("llama", tmp_path / folder)
        decompose(resolve_model(str(tmp_path / folder)), recipe())
    assert len(computed) == 14


def test_one_set_of_spectra_serves_a_sweep(source: ModelSource) -> None:
    spectra_of = collect_spectra(source, recipe())
    for energy in (0.3, 0.9):
        adapter = recipe(energy=energy)
        report = spectra_of.report(adapter.rank)
        expected = decompose(source, adapter)
        assert report == expected.report
        assert list(spectra_of.factors(report)) == list(expected.factors)
    with pytest.raises(AdapterError, match="window 7: only 6 terms were computed"):
        spectra_of.report(recipe(window=7).rank)


def test_a_damaged_entry_is_computed_again_and_said(
    source: ModelSource, computed: list[int]
) -> None:
    first = decompose(source, recipe())
    assert first.notes == ()
    file = sorted((default_cache_dir() / "spectra").rglob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    again = decompose(source, recipe())
    assert len(computed) == 15
    assert again.notes == ("1 damaged entries of the spectra cache were computed again",)
    assert_same(again, first)


class Stopped(BaseException):
    """Stands for Ctrl-C."""


def stop_after(matrices: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.done == matrices:
            raise Stopped

    return stop


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_the_last_matrix(
    source: ModelSource, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        decompose(source, recipe(), progress=stop_after(5))
    assert len(computed) == 5
    resumed = decompose(source, recipe())
    assert len(computed) == 14
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert_same(resumed, decompose(source, recipe()))
    assert len(computed) == 28


def test_progress_counts_every_matrix(source: ModelSource) -> None:
    seen: list[Progress] = []
    found = decompose(source, recipe(), progress=seen.append)
    assert [progress.done for progress in seen] == list(range(1, 15))
    assert {progress.total for progress in seen} == {14}
    assert seen[-1].seconds_left == 0
    assert all(x.seconds_left is not None and x.seconds_left > 0 for x in seen[:-1])
    windows = [layer.energy_total / layer.energy_window for layer in found.report.layers]
    assert seen[-1].energy == pytest.approx(sum(windows) / 14)
    seen.clear()
    decompose(source, recipe(), progress=seen.append)
    assert {progress.seconds_left for progress in seen} == {None}


def test_the_time_left_does_not_jump_with_the_sizes_of_the_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A layer of SmolLM2-135M in its order, with the seconds that each matrix took with its hash
    # and its place in the cache.
    q, kv, up, down = (576, 576), (192, 576), (1536, 576), (576, 1536)
    layer = [(q, 0.05), (kv, 0.021), (kv, 0.021), (q, 0.05), (up, 0.1), (up, 0.1), (down, 0.1)]
    rows = layer * 4
    plans = [
        replace(LayerPlan.of_weight(str(number), size, "balanced"), seconds=seconds)
        for number, (size, seconds) in enumerate(rows)
    ]
    now = 0.0
    monkeypatch.setattr("kpsvd_tune.decompose.collect.time.perf_counter", lambda: now)
    seen: list[Progress] = []
    collected = collect._Collected(plans, seen.append)
    monkeypatch.setattr(LayerPlan, "energy", lambda *_: 1.0)
    rest = sum(seconds for _, seconds in rows)
    for plan in plans[:-1]:
        now += plan.seconds
        rest -= plan.seconds
        collected.add(Found(plan, "", "computed"))
        assert seen[-1].seconds_left == pytest.approx(rest, rel=0.25), plan
    assert len(seen) == 27


def test_factors_survive_the_file(source: ModelSource, tmp_path: Path) -> None:
    found = decompose(source, recipe())
    assert not Decomposition.is_in(tmp_path / "init")
    found.save(tmp_path / "init")
    assert Decomposition.is_in(tmp_path / "init")
    read = Decomposition.load(tmp_path / "init")
    assert_same(read, Decomposition(found.report, dict(sorted(found.factors.items()))))
    assert read.report.layers == found.report.layers


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj cannot be decomposed: .*non-fin"):
        decompose(resolve_model(str(tmp_path)), recipe())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_every_weight_matrix_is_decomposed_or_listed_with_a_reason(
    architecture: str, tmp_path: Path
) -> None:
    model = architectures.save(architecture, tmp_path)
    report = decompose(resolve_model(str(tmp_path)), recipe(window=2, max=2)).report
    named = {f"{layer.name}.weight" for layer in report.layers}
    reasons = dict(report.untouched)
    assert all(reasons.values())
    left = {name if name in model.state_dict() else f"{name}.weight" for name in reasons}
    matrices = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1
    }
    assert not named & left
    assert named | left == matrices


def spoilt(folder: Path) -> RankReport:
    """A report on a model with a flat, a rank-deficient and a zero weight."""
    architectures.save("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    flat = unrearrange(torch.linalg.qr(torch.randn(16, 16)).Q, KroneckerShape(4, 4, 4, 4))
    tensors["model.layers.0.self_attn.q_proj.weight"] = flat
    poor = torch.kron(torch.randn(4, 4), torch.randn(4, 4))
    tensors["model.layers.0.self_attn.o_proj.weight"] = poor
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rank = {"method": "elbow", "min": 2}
    return decompose(resolve_model(str(folder)), recipe(**rank)).report


@pytest.mark.slow
def test_spectra_that_no_rule_can_cut_fall_back_and_the_report_says_so(tmp_path: Path) -> None:
    report = spoilt(tmp_path)
    layers = {layer.name: layer for layer in report.layers}
    flat = layers["model.layers.0.self_attn.q_proj"]
    assert (flat.rank, flat.note) == (6, "no elbow: the spectrum is flat")
    poor = layers["model.layers.0.self_attn.o_proj"]
    assert (poor.rank, poor.bound_by) == (1, "window")
    assert poor.note == "only 1 terms of the weight are more than rounding"
    empty = layers["model.layers.1.self_attn.o_proj"]
    assert (empty.rank, empty.energy_total) == (0, 0.0)
    assert empty.note is not None
    assert all(layer.rank > 0 for layer in report.layers if layer.note is None)
    write_rank_report(report, tmp_path / "init")
    for kind in ("json", "csv", "html"):
        text = (tmp_path / "init" / f"rank_report.{kind}").read_text()
        assert "no elbow: the spectrum is flat" in text
        assert "only 1 terms of the weight" in text
    assert any("3 layers with a note" in line for line in rank_summary(report))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({"factor_shape": {"n": 5, "p": 2}}, "factor_shape for model.layers.0.self_attn.q_proj: n"),
        ({"budget": 10, "min": 1}, "adapter.rank: a budget of 10 "),
        ({"overrides": {"c_attn": 2}}, "adapter.rank: rank override 'c_attn' matches none"),
        ({"budget": 10}, "every layer got rank 0"),
    ],
)
def test_rules_that_cannot_be_met_are_refused(
    source: ModelSource, rank: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        decompose(source, recipe(**rank))


def test_parts_cost_about_the_same_and_hold_every_layer_once() -> None:
    sizes = [(64, 64), (172, 64), (64, 172)] * 7 + [(512, 256)]
    plans = [
        LayerPlan(str(index), KroneckerShape(out // 4, 4, 4, inner // 4))
        for index, (out, inner) in enumerate(sizes)
    ]
    parts = divide(plans, 3)
    assert sorted(plan.name for part in parts for plan in part) == sorted(x.name for x in plans)
    costs = [sum(map(work, part)) for part in parts]
    assert max(costs) - min(costs) <= max(map(work, plans))
    assert parts == divide(plans, 3)
    assert divide(plans, 1) == [plans]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({"overrides": {"c_attn": 2}}, "rank override 'c_attn' matches none of the 14 layers"),
        ({"budget": 10, "min": 1}, r"a budget of 10 parameters is below the [\d,]+ that the mini"),
        ({"budget": 10, "overrides": {"q_proj": 2}}, "a budget of 10 parameters is below the"),
    ],
)
def test_a_rule_that_cannot_be_met_is_refused_before_the_work(
    source: ModelSource, computed: list[int], rank: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=f"adapter.rank: {message}"):
        decompose(source, recipe(**rank))
    assert computed == []


def test_the_smallest_budget_that_is_let_through_is_enough(source: ModelSource) -> None:
    fixed = recipe(method="fixed", min=1, max=1)
    needed = decompose(source, fixed).report.totals["trainable_parameters"]
    found = decompose(source, recipe(min=1, energy="auto", budget=needed))
    assert found.report.totals["trainable_parameters"] == needed
    with pytest.raises(AdapterError, match=f"below the {needed:,} that"):
        decompose(source, recipe(min=1, budget=needed - 1))


def test_the_tolerance_of_the_recipe_reaches_the_decomposition_and_the_cache(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def noting(weight: torch.Tensor, shape: object, num_terms: int, **options: object) -> object:
        asked.append(options["tolerance"])
        return kpsvd(weight, shape, num_terms, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("kpsvd_tune.linalg.plan.kpsvd", noting)
    decompose(source, recipe())
    decompose(source, recipe(tolerance=0))
    assert asked == [5e-3] * 14 + [0.0] * 14
    with pytest.raises(ValueError, match="less than 1"):
        recipe(tolerance=1)


def test_a_model_of_zeros_is_called_that(tmp_path: Path) -> None:
    architectures.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
    save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="all 14 target weights of .* are zero, so there"):
        decompose(resolve_model(str(tmp_path)), recipe(min=1))


@pytest.mark.parametrize("factor_shape", ["balanced", "thin"])
def test_a_model_in_memory_is_decomposed_as_its_files_are(
    source: ModelSource, factor_shape: str
) -> None:
    rank = {"window": 6, "max": 6, "energy": 0.4, "tolerance": 0.0}
    pattern = {"q_proj": 3, "down_proj": {"max": 1}}
    streamed = decompose(
        source, recipe(**rank, min=1, factor_shape=factor_shape, overrides=pattern)
    )
    config = KpsvdConfig(
        target_modules="all-linear", factor_shape=factor_shape, rank=rank, rank_pattern=pattern
    )
    model = get_peft_model(load_model(source, "float32"), config)
    assert config.layers == streamed.layers
    for name, layer in kpsvd_layers(model):
        assert torch.equal(layer.kpsvd_left0["default"], streamed.factors[name][0])
        assert torch.equal(layer.kpsvd_right0["default"], streamed.factors[name][1])


def test_directions_of_a_seed_need_no_decomposition(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpsvd_tune.decompose.spectra.decompose_layer", None)
    adapter = AdapterRecipe(form="left", factor_size=8, init="random", rank=RankRecipe(max=3))
    found = decompose(resolve_model(str(tiny_model_dir)), adapter)
    assert found.factors == {}
    assert found.report.form == "left"
    weights = load_file(tiny_model_dir / "model.safetensors")
    for layer in found.report.layers:
        norm = float(weights[f"{layer.name}.weight"].norm())
        assert found.layers[layer.name]["norm"] == pytest.approx(norm, rel=1e-6)
    nothing = AdapterRecipe(
        form="left", init="random", rank=RankRecipe(min=0, budget=1, method="fixed")
    )
    with pytest.raises(AdapterError, match="every layer got rank 0"):
        decompose(resolve_model(str(tiny_model_dir)), nothing)


def test_drawn_directions_of_a_damaged_weight_are_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    adapter = AdapterRecipe(form="core", init="random")
    with pytest.raises(ModelError, match="layers.0.mlp.up_proj cannot be adapted: its norm is not"):
        decompose(resolve_model(str(folder)), adapter)


def test_the_seed_of_drawn_directions_stays_with_the_decomposition(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """So that a run which goes on with another train.seed keeps its frozen factors."""
    source = resolve_model(str(tiny_model_dir))
    adapter = AdapterRecipe(form="core", init="random", rank=RankRecipe(max=2))
    decompose(source, adapter, start_seed=3).save(tmp_path)
    found = Decomposition.load(tmp_path, is_of_weight=False)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "adapter": adapter.model_dump(by_alias=True),
            "train": {"seed": 4},
            "output_dir": str(tmp_path / "run"),
        }
    )
    model = adapt(recipe, source, found, None)
    assert model.peft_config["default"].to_dict()["frozen_seed"] == 3
