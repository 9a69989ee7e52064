"""Targets are PEFT's; what cannot be adapted is refused by name or listed with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.utils import prune
from transformers import MambaConfig, MambaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig, KpsvdLayer
from kpsvd_tune.adapter.targets import saved_whole_notes, target_names, untouched
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.models import load_skeleton, resolve_model


def lora_targets(model: nn.Module, **options: Any) -> list[str]:
    adapted = inject_adapter_in_model(LoraConfig(**options), model)
    return [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_all_linear_is_what_peft_takes(architecture: str) -> None:
    names = target_names(architectures.make(architecture), "all-linear")
    assert names == lora_targets(architectures.make(architecture), target_modules="all-linear")


@pytest.mark.parametrize(
    ("target", "exclude"),
    [
        (["q_proj", "v_proj"], None),
        (["model.layers.1.mlp.up_proj", "o_proj"], None),
        (r".*layers\.0\..*_proj", None),
        (["q_proj", "down_proj"], ["layers.0.self_attn.q_proj"]),
        (["q_proj", "down_proj"], r".*\.1\..*"),
        ("all-linear", ["gate_proj"]),
        (["lm_head"], None),
    ],
)
def test_lists_and_expressions_match_as_in_peft(
    target: str | list[str], exclude: str | list[str] | None
) -> None:
    names = target_names(architectures.make("llama"), target, exclude)
    expected = lora_targets(
        architectures.make("llama"), target_modules=target, exclude_modules=exclude
    )
    assert names == expected
    assert names


@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_a_skeleton_has_the_names_of_the_model(architecture: str, tmp_path: Path) -> None:
    model = architectures.save(architecture, tmp_path)
    skeleton = load_skeleton(resolve_model(str(tmp_path)))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    names = target_names(skeleton, "all-linear")
    assert names == target_names(model, "all-linear")
    assert untouched(skeleton, names) == untouched(model, names)


@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_every_matrix_is_either_targeted_or_listed(architecture: str) -> None:
    model = architectures.make(architecture)
    names = target_names(model, "all-linear")
    listed = [name for name, _ in untouched(model, names)]
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2
    }
    assert sorted(names + listed) == sorted(matrices)


def test_modules_to_save_are_not_targeted() -> None:
    names = target_names(architectures.make("llama"), "all-linear", None, ["mlp"])
    assert names
    assert not [name for name in names if "mlp" in name]


def test_reasons_name_heads_embeddings_ties_and_stacked_experts() -> None:
    llama = architectures.make("llama")
    reasons = dict(untouched(llama, target_names(llama, ["q_proj"])))
    assert reasons["model.embed_tokens"] == "embedding"
    assert reasons["lm_head"] == "output head: named explicitly or not at all"
    assert reasons["model.layers.0.self_attn.k_proj"] == "not among the target modules"
    assert "model.layers.0.self_attn.q_proj" not in reasons
    tied = architectures.make("gpt2")
    assert dict(untouched(tied, []))["lm_head"] == (
        "tied: shares its weight with transformer.wte.weight"
    )
    mixtral = architectures.make("mixtral")
    reasons = dict(untouched(mixtral, target_names(mixtral, "all-linear")))
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == (
        "3 stacked matrices in one tensor (MixtralExperts)"
    )
    assert "not a linear layer" in reasons["model.layers.0.mlp.gate"]


def test_a_tied_head_is_refused_by_name() -> None:
    with pytest.raises(
        AdapterError, match=r"lm_head: tied: shares its weight with transformer.wte.weight"
    ):
        target_names(architectures.make("gpt2"), ["c_attn", "lm_head"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["q_proj", "embed_tokens"], r"1 modules .*\n  model.embed_tokens: embedding"),
        (["experts"], r"mlp.experts: gate_up_proj: 3 stacked matrices in one tensor"),
        (["q_proj", "gate_up_proj"], r"experts.gate_up_proj: 3 stacked matrices in one tensor"),
        (
            ["self_attn"],
            r"a MixtralAttention, not a linear layer; the linear layers in it are "
            r"q_proj, k_proj, v_proj, o_proj",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(target: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        target_names(architectures.make("mixtral"), target)


def test_a_packed_quantised_weight_is_refused_or_listed() -> None:
    model = architectures.make("llama")
    packed = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(
        AdapterError, match=r"0.mlp.up_proj: packed quantised weight \(Linear, torch.u"
    ):
        target_names(model, ["up_proj"])
    names = target_names(model, "all-linear")
    assert "model.layers.0.mlp.up_proj" not in names
    assert "packed quantised" in dict(untouched(model, names))["model.layers.0.mlp.up_proj"]


def test_a_misspelt_entry_is_refused_though_others_match() -> None:
    with pytest.raises(
        AdapterError,
        match=r"'q_porj' matches no module; .*are called down_proj, .*; did you mean q_proj\?",
    ):
        target_names(architectures.make("llama"), ["v_proj", "q_porj"])


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        (r".*\.attention\..*", None, r"leaves no layer to adapt; the linear layers .* q_proj"),
        (["q_proj"], ["q_proj"], r"\['q_proj'\] leaves no layer to adapt"),
        (r"[", None, "is not a regular expression"),
    ],
)
def test_matching_nothing_is_an_error(
    target: str | list[str], exclude: list[str] | None, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        target_names(architectures.make("llama"), target, exclude)


class Router(nn.Linear):
    """As routers of some models: a linear layer by class, and more than that by what it does."""

    def forward(self, x: torch.Tensor) -> Any:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Named(nn.Linear):
    """A subclass that changes nothing."""


class Rewritten(nn.Linear):
    """Another way to write the same, as Falcon has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """What a merged weight would not do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Stateful(nn.Linear):
    """Needs more than its weight: a probe of it must change nothing in the module."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(8, 4)
        self.up, self.down = Named(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> Any:
        scores, _ = self.router(x)
        return self.down(self.up(x)) * scores.amax(-1, keepdim=True)


def test_layers_with_a_forward_of_their_own_are_left_alone_and_listed() -> None:
    model = Routed()
    names = target_names(model, "all-linear")
    assert names == ["up", "down"]
    assert untouched(model, names) == [
        ("router", "a Router, which computes more than a linear layer does")
    ]
    with pytest.raises(AdapterError, match="router: a Router, which computes more than"):
        target_names(model, ["router", "up"])
    adapted: Any = get_peft_model(model, KpsvdConfig(target_modules="all-linear", rank=1))
    adapted(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "is_taken"), [(Rewritten, True), (Stateful, True), (Scaled, False)]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_of_its_own_is_judged_by_what_it_does(
    kind: type[nn.Linear], is_taken: bool, device: str
) -> None:
    model = nn.Sequential(kind(8, 12), nn.Linear(12, 8)).to(device)
    layer: Any = model[0]
    weight, state = layer.weight, torch.get_rng_state()
    assert target_names(model, "all-linear") == (["0", "1"] if is_taken else ["1"])
    assert layer.weight is weight
    assert (layer.in_features, layer.out_features) == (8, 12)
    assert getattr(layer, "calls", 0) == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight norm", "spectral norm", "pruning"],
)
def test_a_weight_that_is_computed_is_refused_and_listed(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 12), wrap(nn.Linear(12, 8)))
    assert target_names(model, "all-linear") == ["0"]
    with pytest.raises(AdapterError, match="1: its weight is computed from other tensors"):
        target_names(model, ["0", "1"])


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"nhead": 1}, {"bias": False}])
def test_what_torchs_encoder_reads_in_evaluation_is_left_alone(options: dict[str, Any]) -> None:
    settings = {"nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True} | options
    model = nn.Sequential(nn.TransformerEncoderLayer(8, **settings), nn.Linear(8, 8))
    adapted: Any = get_peft_model(
        model, KpsvdConfig(target_modules="all-linear", rank=1, init_weights=False)
    )
    x = torch.randn(3, 5, 8)
    trained = adapted(x)
    # In evaluation torch multiplies with the weights themselves, where it can.
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(x), trained)
    layers = [name for name, module in adapted.named_modules() if isinstance(module, KpsvdLayer)]
    assert len(layers) == (3 if options else 1)
    if not options:
        with pytest.raises(AdapterError, match=r"linear1: nn\.TransformerEncoderLayer reads its"):
            target_names(model, ["linear1"])


def test_pefts_guard_for_mamba_holds() -> None:
    settings = MambaConfig(vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(settings)
    names = target_names(model, "all-linear")
    assert names
    reasons = dict(untouched(model, names))
    for layer in ("out_proj", "dt_proj"):
        assert not any(layer in name for name in names)
        assert "never call it" in reasons[f"backbone.layers.0.mixer.{layer}"]
        with pytest.raises(AdapterError, match=f"{layer}: Mamba's scan and kernels read its weigh"):
            target_names(model, ["in_proj", layer])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_save": ["lm_haed"]},
            "modules_to_save: 'lm_haed' matches no module; did you mean lm_head?",
        ),
        (
            {"modules_to_save": ["model.embed_token"]},
            "modules_to_save: 'model.embed_token' matches no module; did you mean "
            r"model.embed_tokens\?",
        ),
        (
            {"modules_to_save": ["zzz"]},
            "modules_to_save: 'zzz' matches no module; the model's are called act_fn, down_proj",
        ),
        (
            {"exclude_modules": ["up_porj"]},
            r"exclude_modules: 'up_porj' matches no module; did you mean up_proj\?",
        ),
        (
            {"exclude_modules": ["q_proj", "layers.7.mlp.up_proj"]},
            r"'layers.7.mlp.up_proj' matches no module; did you mean layers.1.mlp.up_proj\?",
        ),
        (
            {"exclude_modules": "up_proj"},
            "exclude_modules 'up_proj' matches no module, so nothing is left out; a regular",
        ),
        (
            {"exclude_modules": ["mlp"]},
            r"exclude_modules 'mlp' leaves out no layer: .*model.layers.0.mlp only holds some. "
            r"Expected the names of layers \(gate_proj, up_proj, down_proj\), or an expression",
        ),
    ],
)
def test_lists_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        target_names(architectures.make("llama"), "all-linear", **options)
    with pytest.raises(AdapterError, match=message):
        get_peft_model(
            architectures.make("llama"), KpsvdConfig(target_modules="all-linear", **options)
        )


def test_the_expression_that_a_message_offers_does_what_it_says() -> None:
    model = architectures.make("llama")
    with pytest.raises(AdapterError, match="leaves out no layer") as caught:
        target_names(model, "all-linear", ["mlp"])
    expression = str(caught.value).rpartition(": ")[2].strip("'")
    names = target_names(model, "all-linear", expression)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_excluding_what_is_no_target_is_fine() -> None:
    model = architectures.make("llama")
    names = target_names(model, "all-linear")
    assert target_names(model, "all-linear", ["lm_head", "embed_tokens"]) == names


def test_an_entry_that_means_several_modules_says_how_many() -> None:
    model = architectures.make("llama")
    assert saved_whole_notes(model, ["model.norm", "lm_head"]) == []
    (note,) = saved_whole_notes(model, ["norm"])
    assert note == (
        "modules_to_save 'norm' means 5 modules, trained whole: model.layers.0.input_layernorm, "
        "model.layers.0.post_attention_layernorm, model.layers.1.input_layernorm, "
        "model.layers.1.post_attention_layernorm, model.norm (PEFT takes any end of a name; "
        "model.layers.0.input_layernorm ends with it)"
    )
    with pytest.warns(UserWarning, match="'norm' means 5 modules"):
        adapted = get_peft_model(
            model, KpsvdConfig(target_modules=["q_proj"], rank=1, modules_to_save=["norm"])
        )
    assert sum(isinstance(m, ModulesToSaveWrapper) for m in adapted.modules()) == 5
