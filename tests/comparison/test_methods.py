"""Names of methods, and the settings they carry."""

from __future__ import annotations

import re

import pytest

from kpsvd_tune.comparison.methods import NAMES, is_ours, read_methods
from kpsvd_tune.errors import InputError


def test_names_are_read_in_order() -> None:
    methods = read_methods("kpsvd, lora ,pissa")
    assert [method.name for method in methods] == ["kpsvd", "lora", "pissa"]
    assert [method.kind for method in methods] == ["kpsvd", "lora", "pissa"]
    assert methods[1].settings == {"alpha": "2r"}


def test_settings_of_kpsvd_become_overrides_of_the_recipe() -> None:
    (method,) = read_methods("kpsvd:init=random:factor_shape=8x8:rank.max=3")
    assert method.overrides == [
        "adapter.init=random",
        "adapter.factor_shape={n: 8, p: 8}",
        "adapter.rank.max=3",
    ]


def test_a_short_name_may_be_refined() -> None:
    (method,) = read_methods("kpsvd-thin:rate=relative")
    assert method.overrides == ["adapter.factor_shape=thin", "adapter.rate=relative"]


def test_settings_of_baselines_replace_the_defaults() -> None:
    (method,) = read_methods("lora+:ratio=4:alpha=16")
    assert method.settings == {"alpha": "16", "ratio": "4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--methods is empty; expected some of kpsvd, kpsvd-thin, lora"),
        ("loar", "lokr, randlora, vera, ia3; did you mean lora?"),
        ("lora,lora", "--methods: lora is given twice"),
        ("lora:alpha", "got 'alpha'; expected KEY=VALUE after each colon"),
        (
            "lora:dropout=1",
            "lora has no setting 'dropout'; expected alpha, ratio, rslora, on, rates",
        ),
        (
            "lora:alpha=x",
            "alpha got 'x'; expected a number above 0, or a multiple of the rank such as 2r",
        ),
        ("lora:alpha=0r", "alpha got '0r'; expected a number above 0"),
        ("lora+:ratio=0", "ratio got '0'; expected a number above 0"),
        ("kpsvd:train.seed=3", "train.seed is the same for every method; set it for all of them"),
        ("kpsvd:target_modules=q", "the modules of one method are named by on, as in kpsvd:on=q"),
        ("lora:on=q++v", "on got 'q++v'; expected names of modules with + between them"),
        ("ia3:alpha=2r", "ia3 has no setting 'alpha'; expected on, rates"),
        ("vera:d_initial=0", "d_initial got '0'; expected a number above 0 such as 0.1"),
        ("lora:rates=1e-3+2", "--methods lora:rates=1e-3+2: got '2'; expected a number above 0"),
        ("lora:rates=1e-3,lora:rates=1e-2", "--methods: lora is given twice"),
        ("kpsvd:rank.budget=10", "the budget comes from --budgets"),
        ("lokr:factor=0", "factor got '0'; expected a whole number above 0"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_methods(text)


def test_commas_inside_brackets_belong_to_a_value() -> None:
    methods = read_methods("kpsvd:exclude_modules=[q_proj,v_proj],lora")
    assert [method.name for method in methods] == ["kpsvd:exclude_modules=[q_proj,v_proj]", "lora"]


def test_every_method_may_name_its_modules() -> None:
    lora, ours, everywhere = read_methods(
        "lora:on=gate_proj,kpsvd:on=q_proj+v_proj,ia3:on=all-linear"
    )
    assert (lora.name, lora.modules) == ("lora:on=gate_proj", ("gate_proj",))
    assert lora.overrides == []
    assert ours.overrides == ["adapter.target_modules=[q_proj,v_proj]"]
    assert everywhere.modules == "all-linear"


def test_rates_are_no_part_of_the_name() -> None:
    (method,) = read_methods("vera:rates=1e-2+1e-3:on=q_proj")
    assert method.name == "vera:on=q_proj"
    assert method.rates == (1e-3, 1e-2)


# As docs/compare.md cites them.
AUTHORS = {
    "lora": 2e-4,
    "lora+": 5e-5,
    "rslora": 2e-4,
    "lora-fa": 7e-5,
    "pissa": 2e-5,
    "hira": 1e-3,
    "lokr": 2e-4,
    "randlora": 1e-4,
    "vera": 1e-2,
    "ia3": 3e-3,
}


def test_every_method_has_as_many_rates_and_its_authors_own_among_them() -> None:
    assert {len(known.rates) for known in NAMES.values()} == {5}
    assert all(list(known.rates) == sorted(known.rates) for known in NAMES.values())
    for name, known in NAMES.items():
        if known.kind != "kpsvd":
            assert AUTHORS[name] in known.rates


def test_baselines_of_our_own_are_known_by_name() -> None:
    assert is_ours("lora-fa:on=q_proj")
    assert not any(is_ours(name) for name in ("kpsvd", "lora", "of another version"))
