"""Names of methods, and the settings they carry."""

from __future__ import annotations

import re

import pytest

from kpsvd_tune.comparison.methods import read_methods
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
        ("loar", "kpsvd-thin, lora, lora+, rslora, pissa, lokr; did you mean lora?"),
        ("lora,lora", "--methods: lora is given twice"),
        ("lora:alpha", "got 'alpha'; expected KEY=VALUE after each colon"),
        ("lora:dropout=1", "lora has no setting 'dropout'; expected alpha, ratio, rslora"),
        (
            "lora:alpha=x",
            "alpha got 'x'; expected a number above 0, or a multiple of the rank such as 2r",
        ),
        ("lora:alpha=0r", "alpha got '0r'; expected a number above 0"),
        ("lora+:ratio=0", "ratio got '0'; expected a number above 0"),
        ("kpsvd:train.seed=3", "train.seed is the same for every method; set it for all of them"),
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
