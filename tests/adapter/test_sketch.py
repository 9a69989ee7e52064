"""The base check: the right base passes in every dtype, a wrong one on no road.

Roads are all that put a saved adapter on a model, those that hand over another configuration too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.base import other_base_allowed
from kpsvd_tune.adapter.sketch import (
    NUM_PROJECTIONS,
    TOLERANCE,
    TOLERANCE_QUANTISED,
    Sketch,
    distance,
    sketch,
    sketch_rest,
    unpacked,
)
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import kron_sum

FILE = "adapter_model.safetensors"
Make = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRONG = "this adapter was trained on another base model"


def config(**options: Any) -> KpsvdConfig:
    settings: dict[str, Any] = {
        "target_modules": ["q_proj", "up_proj"],
        "rank": 2,
        "task_type": "CAUSAL_LM",
    }
    return KpsvdConfig(**settings | options)


def saved(base: Any, folder: Path, **options: Any) -> Path:
    get_peft_model(base, config(**options)).save_pretrained(str(folder))
    return folder


def from_folder(base: Any, folder: Path) -> None:
    PeftModel.from_pretrained(base, folder)


def in_low_memory(base: Any, folder: Path) -> None:
    PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def with_own_config(base: Any, folder: Path) -> None:
    PeftModel.from_pretrained(base, folder, config=config())


def by_transformers(base: Any, folder: Path) -> None:
    base.load_adapter(str(folder))


def by_state_dict(base: Any, folder: Path) -> None:
    base.load_adapter(adapter_state_dict=load_file(folder / FILE), peft_config=config())
    base.eval()


def injected(base: Any, folder: Path) -> None:
    model = inject_adapter_in_model(config(), base)
    set_peft_model_state_dict(model, load_file(folder / FILE))


def made_and_set(base: Any, folder: Path) -> None:
    model = get_peft_model(base, config())
    set_peft_model_state_dict(model, load_file(folder / FILE))


ROADS = [
    from_folder,
    in_low_memory,
    with_own_config,
    by_transformers,
    by_state_dict,
    injected,
    made_and_set,
]


@torch.no_grad()
def beside_the_first_term(base: Any, folder: Path) -> None:
    """Noise that the one number of older versions cannot see."""
    factors = load_file(folder / FILE)
    name = "model.layers.0.mlp.up_proj"
    pair = [factors[f"base_model.model.{name}.kpsvd_{side}0"][:1] for side in ("left", "right")]
    term = kron_sum(*pair)
    weight = base.get_submodule(name).weight
    noise = torch.randn_like(weight)
    noise -= (noise * term).sum() / term.square().sum() * term
    weight.add_(1e-3 * noise * weight.norm() / noise.norm())


@torch.no_grad()
def other_random_weights(base: Any, folder: Path) -> None:
    """All that no adapter lies on."""
    for name, parameter in base.named_parameters():
        if not name.endswith(("q_proj.weight", "up_proj.weight")):
            parameter.add_(torch.randn_like(parameter))


@torch.no_grad()
def another_norm(base: Any, folder: Path) -> None:
    base.model.norm.weight[3] *= 1.05


@torch.no_grad()
def another_fine_tuning(base: Any, folder: Path) -> None:
    for parameter in base.parameters():
        parameter.add_(1e-4 * torch.randn_like(parameter) * parameter.std())


CHANGES = [beside_the_first_term, other_random_weights, another_norm, another_fine_tuning]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_a_wrong_base_is_refused_on_every_road(
    model_factory: Make, tmp_path: Path, road: Callable[[Any, Path], None]
) -> None:
    folder = saved(model_factory(), tmp_path)
    road(model_factory(), folder)
    for change in CHANGES:
        other = model_factory()
        change(other, folder)
        with pytest.raises(AdapterError, match=WRONG):
            road(other, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("made_on", "at_hand"), list(itertools.product(DTYPES, DTYPES)))
def test_the_right_base_in_another_dtype_passes_and_a_wrong_one_does_not(
    model_factory: Make, tmp_path: Path, made_on: torch.dtype, at_hand: torch.dtype
) -> None:
    """Both are loads of one float32 checkpoint."""
    folder = saved(model_factory().to(made_on), tmp_path)
    PeftModel.from_pretrained(model_factory().to(at_hand), folder)
    # As merging loads a 16-bit file.
    PeftModel.from_pretrained(model_factory().to(at_hand).float(), folder)
    other = model_factory()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.q_proj.weight.add_(
                0.05 * torch.randn_like(layer.self_attn.q_proj.weight)
            )
    with pytest.raises(AdapterError, match=WRONG):
        PeftModel.from_pretrained(other.to(at_hand), folder)


def rounded_to_four_bits(weight: Tensor) -> Tensor:
    """To 16 values in every group of 32, as quantised checkpoints are."""
    groups = weight.reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def test_a_base_of_four_bits_is_taken_for_its_original_and_not_for_another() -> None:
    weight, other = torch.randn(2, 192, 64).unbind()
    for made_on, at_hand in ((False, True), (True, False)):
        pair = [
            sketch(rounded_to_four_bits(weight) if q else weight, q) for q in (made_on, at_hand)
        ]
        far, tolerance = distance(*pair)
        assert 0.02 < far < tolerance == TOLERANCE_QUANTISED
    far, tolerance = distance(sketch(rounded_to_four_bits(other), True), sketch(weight))
    assert far > tolerance


def test_the_estimate_is_the_distance() -> None:
    """Its square is unbiased, with a relative error of sqrt(2 / projections)."""
    weight = torch.randn(300, 70)
    whole = sketch(weight)
    assert whole.norm == pytest.approx(float(weight.norm()), rel=1e-6)
    squares = []
    for seed in range(200):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        noise *= 0.01 * weight.norm() / noise.norm()
        far, _ = distance(whole, sketch(weight + noise))
        squares.append((far / 0.01) ** 2)
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(1, abs=4 * (2 / NUM_PROJECTIONS / 200) ** 0.5)
    # The power that the documentation states.
    assert sum(square < 0.45**2 for square in squares) <= 8


def test_two_ways_of_rounding_are_told_from_noise_of_one_percent() -> None:
    weight = torch.randn(256, 512)
    noise = torch.randn(256, 512)
    noise *= 0.01 * weight.norm() / noise.norm()
    stored = unpacked(sketch(weight.to(torch.bfloat16)).packed())
    for at_hand in (torch.float16, torch.float32):
        found = sketch(weight.to(torch.float16).to(at_hand))
        far, tolerance = distance(stored, found)
        assert far <= tolerance < 0.005
        far, tolerance = distance(stored, sketch((weight + noise).to(torch.float16).to(at_hand)))
        assert far > tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_entry_is_seen(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 4096).to(dtype)
    other = weight.clone()
    other[5, 77] += 0.25
    far, tolerance = distance(sketch(weight), sketch(other))
    assert tolerance == TOLERANCE < far


def test_constants_beside_float32_weights_hide_no_small_change(
    model_factory: Make, tmp_path: Path
) -> None:
    """Norms of ones are exact in 16 bits, which says nothing of the other weights."""
    base, other = model_factory(), model_factory()
    assert (base.model.norm.weight == 1).all()
    with torch.no_grad():
        base.model.embed_tokens.weight[3, 4], other.model.embed_tokens.weight[3, 4] = 0.3, 0.3002
    rounded = (each.model.embed_tokens.weight.bfloat16() for each in (base, other))
    assert torch.equal(*rounded)
    folder = saved(base, tmp_path)
    with pytest.raises(AdapterError, match=WRONG):
        from_folder(other, folder)


@pytest.mark.parametrize("size", [(1,), (4095,), (4096,), (4097,), (3, 5, 7), ((1 << 20) + 9,)])
def test_sketches_know_sizes_places_and_signs(size: tuple[int, ...]) -> None:
    weight = torch.randn(size)
    stored = unpacked(sketch(weight).packed())
    assert distance(stored, sketch(weight.clone()))[0] < TOLERANCE
    assert distance(stored, sketch(-weight))[0] > 0.1
    if weight.numel() > 1:
        assert distance(stored, sketch(weight.flatten().roll(1)))[0] > 0.1


def test_a_view_has_the_sketch_of_its_copy() -> None:
    weight = torch.randn(130, 60).T
    assert distance(sketch(weight), sketch(weight.contiguous()))[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "positive", "heavy tails", "a large column"])
def test_sums_of_16_bit_weights_in_float32_are_far_within_the_tolerance(
    kind: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(700, 1024)
    if kind == "positive":
        weight = weight.abs()
    elif kind == "heavy tails":
        weight /= torch.randn(weight.shape).abs().clamp(min=1e-3)
    elif kind == "a large column":
        weight[:, 5] *= 300
    stored = unpacked(sketch(weight.to(dtype)).packed())
    found = sketch(weight.to(dtype), known=stored.kind)
    assert distance(stored, found)[0] < 0.4 * TOLERANCE


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "embed_tokens"])
def test_one_huge_entry_beside_small_ones_is_no_other_base(
    model_factory: Make, tmp_path: Path, name: str
) -> None:
    """Sums in float32 are off by more there; before a base is refused, they are made exactly."""

    @torch.no_grad()
    def made(value: float) -> Any:
        base = model_factory().to(torch.bfloat16)
        base.model.get_submodule(name).weight.mul_(1e-3).view(-1)[7] = value
        return base

    folder = saved(made(3008), tmp_path)
    from_folder(made(3008), folder)
    with pytest.raises(AdapterError, match=WRONG):
        from_folder(made(3024), folder)
    # Whose square is infinite in float32.
    with pytest.raises(AdapterError, match=WRONG):
        from_folder(made(2e25), folder)


def test_weights_without_adapters_are_compared_in_float32_where_all_have_one_16_bit_dtype(
    model_factory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(is_mixed: bool = False, seed: int = 0) -> Any:
        base = model_factory(seed=seed).to(torch.bfloat16)
        if is_mixed:
            base.model.embed_tokens.float()
        return base

    known: list[Any] = []

    def noting(*given: Any) -> Any:
        known.append(given[6] if len(given) > 6 else None)
        return sketch_rest(*given)

    folder = saved(made(), tmp_path)
    bfloat16 = sketch(torch.randn(8).to(torch.bfloat16)).kind
    monkeypatch.setattr("kpsvd_tune.adapter.base.sketch_rest", noting)
    # Numbers of bfloat16 that are held in float32 are the same weights.
    for is_mixed in (False, True):
        known.clear()
        from_folder(made(is_mixed), folder)
        assert known == [bfloat16]
        with pytest.raises(AdapterError, match=WRONG):
            from_folder(made(is_mixed, seed=1), folder)
        known.clear()
        other = made(is_mixed)
        with torch.no_grad():
            other.model.embed_tokens.weight[3, 3] += 1
        with pytest.raises(AdapterError, match=f"{WRONG}: the weights without adapters"):
            from_folder(other, folder)
        # Before it is refused, all is summed up in float64.
        assert known == [bfloat16, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stored_sketch_that_is_no_number_is_none_of_the_weight(value: float) -> None:
    weight = torch.randn(8, 8)
    stored = sketch(weight)
    broken = Sketch(stored.kind, torch.full_like(stored.values, value))
    far, tolerance = distance(unpacked(broken.packed()), stored)
    assert far > tolerance


def test_what_the_base_is_known_by_survives_casts_and_saving_again(
    model_factory: Make, tmp_path: Path
) -> None:
    folder = saved(model_factory(), tmp_path / "one")
    again = PeftModel.from_pretrained(model_factory(), folder).to(torch.bfloat16).float()
    again.save_pretrained(str(tmp_path / "two"))
    PeftModel.from_pretrained(model_factory(), tmp_path / "two")
    with pytest.raises(AdapterError, match=WRONG):
        PeftModel.from_pretrained(model_factory(seed=3), tmp_path / "two")


def test_training_merging_and_modes_are_not_taken_for_another_base(
    model_factory: Make, tmp_path: Path
) -> None:
    folder = saved(model_factory(), tmp_path)
    model = PeftModel.from_pretrained(model_factory(), folder)
    model.train()
    model.merge_adapter()
    model.eval()
    model.unmerge_adapter()
    model.train()


def test_heads_that_are_saved_whole_may_differ(model_factory: Make, tmp_path: Path) -> None:
    """Their first values are random, and the adapter's file has what replaces them."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folder = saved(model_factory(), tmp_path, **settings)
    other = model_factory()
    with torch.no_grad():
        other.lm_head.weight.normal_()
    PeftModel.from_pretrained(other, folder)


def without_sketches(folder: Path) -> None:
    """An adapter as older versions wrote it."""
    weights = {
        name: tensor.clone()
        for name, tensor in load_file(folder / FILE).items()
        if not name.endswith("kpsvd_base")
    }
    save_file(weights, folder / FILE)


@pytest.mark.parametrize("road", [from_folder, in_low_memory, by_transformers])
def test_adapters_of_older_versions_load_with_their_one_number(
    model_factory: Make, tmp_path: Path, road: Callable[[Any, Path], None]
) -> None:
    folder = saved(model_factory(), tmp_path)
    without_sketches(folder)
    road(model_factory(), folder)
    with pytest.raises(AdapterError, match="q_proj projects to"):
        road(model_factory(seed=2), folder)


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_a_number_that_says_nothing_is_no_check(
    model_factory: Make, tmp_path: Path, value: float | None
) -> None:
    folder = saved(model_factory(), tmp_path)
    without_sketches(folder)
    settings: Any = KpsvdConfig.from_pretrained(str(folder))
    for layer in settings.layers.values():
        layer["fingerprint"] = value
    with pytest.raises(AdapterError, match="says nothing by which its base model could be known"):
        PeftModel.from_pretrained(model_factory(), folder, config=settings)


def test_another_base_can_be_allowed_and_is_told(model_factory: Make, tmp_path: Path) -> None:
    folder = saved(model_factory(), tmp_path)
    with other_base_allowed() as told:
        PeftModel.from_pretrained(model_factory(), folder)
        assert told == []
        PeftModel.from_pretrained(model_factory(seed=1), folder)
    assert WRONG in told[0]
    with pytest.raises(AdapterError, match=WRONG):
        PeftModel.from_pretrained(model_factory(seed=1), folder)
