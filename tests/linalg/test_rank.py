"""The rank rules against brute force, their clipping, budget, overrides and fallbacks."""

from __future__ import annotations

import random

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpsvd_tune.linalg import KroneckerShape, LayerPlan, RankRule, check_rule, choose_ranks

SQUARE = KroneckerShape(4, 4, 4, 4)
small = settings(max_examples=40, deadline=None)


def layer(
    name: str,
    *values: float,
    rest: float = 0.0,
    shape: KroneckerShape = SQUARE,
) -> LayerPlan:
    """A layer with these KP singular values and this much energy below its window."""
    return LayerPlan(name, shape, values=values, squared_norm=sum(v * v for v in values) + rest)


def random_layers(seed: int, layers: int = 3, window: int = 5) -> list[LayerPlan]:
    chance = random.Random(seed)
    shapes = [KroneckerShape(4, 4, 4, 4), KroneckerShape(9, 2, 2, 9), KroneckerShape(7, 1, 1, 30)]
    return [
        layer(
            f"layers.{i}.proj",
            *sorted((chance.uniform(0.1, 3) for _ in range(window)), reverse=True),
            rest=chance.uniform(0.5, 60),
            shape=shapes[i % 3],
        )
        for i in range(layers)
    ]


def ranks(spectra, overrides=None, **rule):
    return [
        choice.rank for choice in choose_ranks(spectra, RankRule(**rule, overrides=overrides or {}))
    ]


def bounds(spectra, overrides=None, **rule):
    return [
        choice.bound_by
        for choice in choose_ranks(spectra, RankRule(**rule, overrides=overrides or {}))
    ]


# Energy


@small
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]))
def test_pooled_energy_is_the_fewest_terms_of_all_layers(seed, energy):
    spectra = random_layers(seed)
    expected = oracle.pooled_ranks([s.shares() for s in spectra], energy)
    assert ranks(spectra, method="energy", energy=energy, min=0) == expected


@small
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]))
def test_energy_of_window_and_of_total_go_layer_by_layer(seed, energy):
    spectra = random_layers(seed, window=12)
    window = [oracle.energy_rank(s.values, energy, sum(v * v for v in s.values)) for s in spectra]
    total = [oracle.energy_rank(s.values, energy, s.squared_norm) for s in spectra]
    assert ranks(spectra, method="energy", energy=energy, energy_of="window", min=0) == window
    assert ranks(spectra, method="energy", energy=energy, energy_of="total", min=0) == total


@pytest.mark.parametrize("energy_of", ["pooled", "window", "total"])
def test_energy_of_a_half_and_of_nine_tenths_give_different_totals(energy_of):
    spectra = [layer(f"{i}", *(3.0 - 0.15 * k for k in range(16)), rest=1.0) for i in range(4)]
    half = ranks(spectra, method="energy", energy=0.5, energy_of=energy_of)
    most = ranks(spectra, method="energy", energy=0.9, energy_of=energy_of)
    assert sum(half) < sum(most)


def test_energy_is_worked_out_by_hand():
    spectra = [layer("strong", 3.0, 1.0, rest=0.0), layer("weak", 1.0, 1.0, rest=98.0)]
    # Shares 0.9, 0.1 and 0.01, 0.01; pooled 1.02, of which the first term holds 88 %.
    assert ranks(spectra, method="energy", energy=0.88, min=0) == [1, 0]
    assert ranks(spectra, method="energy", energy=0.89, min=0) == [2, 0]
    assert ranks(spectra, method="energy", energy=0.985, min=0) == [2, 1]
    assert ranks(spectra, method="energy", energy=1.0, min=0) == [2, 2]


def test_a_total_energy_that_the_window_does_not_hold_is_said():
    (choice,) = choose_ranks(
        [layer("a", 2.0, 1.0, rest=5.0)], RankRule(method="energy", energy_of="total", energy=0.6)
    )
    assert (choice.rank, choice.bound_by) == (2, "window")
    assert choice.note == "the window holds less than energy 0.6"


def test_equal_terms_go_to_the_earlier_layer():
    spectra = [layer("a", 1.0, 1.0), layer("b", 1.0, 1.0)]
    assert ranks(spectra, method="energy", energy=0.75, min=0) == [2, 1]


# Elbow


@small
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=20, unique=True))
def test_elbow_is_the_point_farthest_below_the_chord(values):
    values = sorted(values, reverse=True)
    distances = oracle.elbow_distances(values)
    (choice,) = choose_ranks([layer("a", *values)], RankRule(method="elbow", min=0, max=20))
    if choice.note is None:
        # Not compared by index: distances equal up to rounding may be told apart either way.
        assert distances[choice.rank - 1] == pytest.approx(max(distances), abs=1e-9)
        assert choice.bound_by == "elbow"
    else:
        assert choice.rank == len(values)
        assert max(distances) < 1e-2


def test_elbow_is_worked_out_by_hand():
    spectra = [layer("early", 9.0, 2.0, 1.0, 0.5, 0.1), layer("late", 9.0, 8.5, 8.0, 1.0, 0.5)]
    assert ranks(spectra, method="elbow") == [2, 4]


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ((2.0, 2.0, 2.0, 2.0), "no elbow: the spectrum is flat"),
        ((5.0, 4.0, 3.0, 2.0), "no elbow: the spectrum is nowhere below its chord"),
        ((5.0, 4.9, 4.5, 1.0), "no elbow: the spectrum is nowhere below its chord"),
        ((5.0, 1.0), "no elbow: a window of 2 is too short"),
        ((5.0,), "no elbow: a window of 1 is too short"),
    ],
)
def test_without_an_elbow_the_window_stands_and_the_note_says_why(values, note):
    (choice,) = choose_ranks([layer("a", *values)], RankRule(method="elbow"))
    assert (choice.rank, choice.bound_by, choice.note) == (len(values), "elbow", note)


def test_energy_and_elbow_together_take_the_smaller_and_say_which():
    elbow_first = layer("a", 9.0, 1.0, 0.9, 0.8, 0.7, rest=1.0)
    energy_first = layer("b", 3.0, 2.9, 2.8, 0.1, 0.1, rest=1.0)
    spectra = [elbow_first, energy_first]
    choices = choose_ranks(spectra, RankRule(energy_of="window", energy=0.99))
    assert [c.rank for c in choices] == [min(c.rank_energy, c.rank_elbow) for c in choices]
    assert [c.bound_by for c in choices] == ["elbow", "energy"]
    assert [(c.rank_energy, c.rank_elbow) for c in choices] == [(4, 2), (3, 4)]


def test_equal_energy_and_elbow_are_bound_by_energy():
    (choice,) = choose_ranks(
        [layer("a", 9.0, 1.0, 0.9, 0.8)], RankRule(energy_of="window", energy=0.98)
    )
    assert (choice.rank_energy, choice.rank_elbow, choice.bound_by) == (2, 2, "energy")


def test_without_an_elbow_energy_decides_and_the_note_stays():
    (choice,) = choose_ranks([layer("a", *[2.0] * 8)], RankRule(energy=0.5))
    assert (choice.rank, choice.bound_by) == (4, "energy")
    assert choice.note == "no elbow: the spectrum is flat"


# Noise edge and fixed


@small
@given(st.integers(0, 10_000))
def test_noise_edge_equals_the_definition(seed):
    for spectrum in random_layers(seed, window=8):
        shape = spectrum.shape
        expected = oracle.noise_edge_rank(
            spectrum.values, spectrum.squared_norm, shape.m * shape.n, shape.p * shape.q
        )
        assert ranks([spectrum], method="noise_edge", min=0) == [expected]


def test_noise_edge_keeps_what_stands_above_noise_of_the_residual():
    # 16 x 16 with residual energy 16: s = 1/4, edge = (4 + 4)/4 = 2.
    spectrum = layer("a", 5.0, 2.1, 1.9, rest=16.0)
    (choice,) = choose_ranks([spectrum], RankRule(method="noise_edge"))
    assert (choice.rank, choice.bound_by, choice.note) == (2, "noise_edge", None)


@pytest.mark.parametrize(
    ("spectrum", "rank", "bound", "note"),
    [
        (layer("a", 3.0, 2.0), 2, "noise_edge", "no noise edge: the window leaves nothing"),
        (layer("a", 1.0, 0.9, rest=16.0), 1, "min", "no term stands above the noise edge"),
    ],
)
def test_noise_edge_without_a_decision_falls_back(spectrum, rank, bound, note):
    (choice,) = choose_ranks([spectrum], RankRule(method="noise_edge"))
    assert (choice.rank, choice.bound_by) == (rank, bound)
    assert choice.note is not None
    assert choice.note.startswith(note)


def test_fixed_gives_max_everywhere_and_the_window_bounds_it():
    spectra = [layer("a", 3.0, 2.0, 1.0), layer("b", 3.0, 2.0, 1.0, 0.5, 0.4)]
    assert ranks(spectra, method="fixed", max=4) == [3, 4]
    assert bounds(spectra, method="fixed", max=4) == ["window", "fixed"]


# Clipping and rounding


def test_min_and_max_clip_and_are_named():
    spectra = [layer("a", 9.0, 8.5, 8.4, 1.0), layer("b", 0.2, 0.1, 0.05, 0.01, rest=50.0)]
    assert ranks(spectra, method="energy", energy=0.99, max=2) == [2, 1]
    assert bounds(spectra, method="energy", energy=0.99, max=2) == ["max", "min"]


def test_min_zero_leaves_a_layer_untouched():
    spectra = [layer("a", 9.0), layer("b", 0.1, rest=50.0)]
    assert ranks(spectra, method="energy", energy=0.5, min=0) == [1, 0]


@pytest.mark.parametrize("method", ["energy", "elbow", "energy+elbow", "noise_edge", "fixed"])
def test_a_zero_matrix_gets_no_terms_under_any_rule(method):
    (choice,) = choose_ranks([layer("a", 0.0, 0.0, 0.0)], RankRule(method=method, min=2))
    assert (choice.rank, choice.bound_by) == (0, "window")
    assert choice.note is not None
    assert choice.note.endswith("only 0 terms of the weight are more than rounding")


@pytest.mark.parametrize("method", ["elbow", "fixed", "energy"])
def test_terms_that_are_rounding_are_never_chosen(method):
    spectrum = layer("a", 3.0, 2.0, 1e-7, 9e-8, 0.0)
    (choice,) = choose_ranks([spectrum], RankRule(method=method, energy=1.0, min=4))
    assert (choice.rank, choice.bound_by) == (2, "window")
    (choice,) = choose_ranks([spectrum], RankRule(overrides={"a": 3}))
    assert (choice.rank, choice.bound_by) == (2, "window")
    assert choice.note == "only 2 terms of the weight are more than rounding"


def test_no_layers_give_no_choices():
    assert choose_ranks([], RankRule(budget=0)) == []


# Budget


@small
@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 1500))
def test_budget_is_spent_greedily_and_from_below(seed, least, spare):
    spectra = random_layers(seed, layers=5, window=6)
    costs = [s.shape.num_parameters for s in spectra]
    budget = sum(costs) * least + spare
    got = ranks(spectra, method="fixed", min=least, max=6, budget=budget)
    shares = [s.shares() for s in spectra]
    assert got == oracle.budget_ranks(shares, costs, [least] * 5, [6] * 5, budget)
    left = budget - sum(cost * rank for cost, rank in zip(costs, got, strict=True))
    open_costs = [cost for cost, rank in zip(costs, got, strict=True) if rank < 6]
    assert left >= 0
    assert all(left < cost for cost in open_costs)


def test_budget_prefers_energy_per_parameter():
    cheap, dear = KroneckerShape(4, 4, 4, 4), KroneckerShape(20, 1, 1, 300)
    spectra = [layer("dear", 1.1, 0.9, shape=dear), layer("cheap", 1.0, 1.0, shape=cheap)]
    choices = choose_ranks(spectra, RankRule(method="fixed", min=0, max=2, budget=383))
    assert [c.rank for c in choices] == [0, 2]
    assert [c.bound_by for c in choices] == ["budget", "fixed"]
    assert ranks(spectra, method="fixed", min=0, max=2, budget=384) == [1, 2]


def test_a_budget_above_the_proposals_changes_nothing():
    spectra = random_layers(3)
    free = choose_ranks(spectra, RankRule(energy=0.5))
    cost = sum(c.rank * s.shape.num_parameters for c, s in zip(free, spectra, strict=True))
    assert choose_ranks(spectra, RankRule(energy=0.5, budget=cost)) == free
    assert choose_ranks(spectra, RankRule(energy=0.5, budget=cost - 1)) != free


def test_the_budget_never_adds_to_the_proposal():
    spectra = [layer("a", 9.0, 1.0, 0.9, 0.8, rest=1.0), layer("b", *[1.0] * 9)]
    capped = ranks(spectra, energy_of="window", energy=0.9, budget=32 * 5)
    assert capped[0] == ranks(spectra, energy_of="window", energy=0.9)[0] == 1


def test_a_budget_below_the_minima_is_refused_with_both_numbers():
    spectra = [layer(f"{i}", 2.0, 1.0, 0.5) for i in range(100)]
    message = "a budget of 3,199 parameters is below the 3,200 that the minimum ranks and fixed"
    with pytest.raises(ValueError, match=message):
        ranks(spectra, budget=3199)
    assert ranks(spectra, budget=3200) == [1] * 100


def test_the_budget_leaves_fixed_overrides_whole():
    spectra = [layer("keep", 0.3, 0.2, 0.1, rest=50.0), layer("b", 9.0, 8.0, 7.0)]
    rule = {"method": "fixed", "max": 3, "min": 0, "budget": 4 * 32}
    assert ranks(spectra, {"keep": 3}, **rule) == [3, 1]
    assert bounds(spectra, {"keep": 3}, **rule) == ["override", "budget"]


# Overrides

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.10.q_proj"]


def named() -> list[LayerPlan]:
    return [layer(name, 4.0, 3.0, 2.0, 1.0, 0.5) for name in NAMES]


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("q_proj", [0, 2]),
        ("proj", []),
        (r"layers\.0\..*", [0, 1]),
        ("model.layers.0.mlp.up_proj", [1]),
        ("q_proj|up_proj", [0, 1, 2]),
        (r".*\.10\..*", [2]),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot(pattern, hit):
    if not hit:
        with pytest.raises(ValueError, match="matches none of the 3 layers"):
            ranks(named(), {pattern: 5})
        return
    expected = ["override" if i in hit else "fixed" for i in range(3)]
    assert bounds(named(), {pattern: 5}, method="fixed", max=2) == expected


def test_the_first_matching_pattern_wins_and_a_shadowed_one_is_no_error():
    overrides = {r"layers\.0\..*": 1, "q_proj": 3, "up_proj": 4}
    assert ranks(named(), overrides, method="fixed", max=2) == [1, 1, 3]


def test_an_override_mapping_changes_rule_and_limits():
    overrides = {"up_proj": {"method": "fixed", "max": 4}, r"layers\.10\.q_proj": {"min": 3}}
    assert ranks(named(), overrides, method="energy", energy=0.3) == [1, 4, 3]
    assert ranks(named(), {"up_proj": {"max": 1}}, method="fixed", max=3) == [3, 1, 3]


def test_an_override_energy_takes_its_layer_out_of_the_pool():
    spectra = [layer("a", 5.0, 4.0, 3.0), layer("b", 1.0, 0.9, 0.8, rest=500.0)]
    pooled = ranks(spectra, method="energy", energy=0.9, min=0)
    apart = ranks(spectra, {"b": {"energy": 0.9}}, method="energy", energy=0.9, min=0)
    assert pooled == [3, 0]
    assert apart == [3, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"q_proj": -1}, "rank override 'q_proj': the rank must not be negative, got -1"),
        (
            {"q_proj": {"rank": 2, "window": 3}},
            "rank override 'q_proj': unknown rank, window; expected a rank or some of method, "
            "energy, min, max",
        ),
        (
            {"k_proj": 2},
            "rank override 'k_proj' matches none of the 3 layers, such as "
            "model.layers.0.self_attn.q_proj",
        ),
        ({"q_proj(": 2}, r"rank override 'q_proj\(' is not a regular expression: "),
        (
            {"up_proj": {"min": 20}},
            "rank override for model.layers.0.mlp.up_proj: expected 0 <= min <= max, got min 20 "
            "and max 16",
        ),
    ],
)
def test_a_wrong_override_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        ranks(named(), overrides)


def test_an_override_without_layers_is_refused():
    with pytest.raises(ValueError, match="matches none of the 0 layers, such as none"):
        ranks([], {"q_proj": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "knee"}, "rank method 'knee': expected one of energy, elbow, energy.elbow, "),
        ({"energy_of": "all"}, "energy_of 'all': expected one of pooled, window, total"),
        ({"energy": 0.0}, r"the energy threshold must be in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"the energy threshold must be in \(0, 1\], got 1.5"),
        ({"window": 0}, "the window must be at least 1, got 0"),
        ({"min": -1}, "expected 0 <= min <= max, got min -1 and max 16"),
        ({"min": 5, "max": 4}, "expected 0 <= min <= max, got min 5 and max 4"),
        ({"budget": -1}, "the budget must not be negative, got -1"),
    ],
)
def test_a_rule_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RankRule(**fields)


def test_a_rule_is_checked_by_names_and_shapes_alone():
    shapes = {"a.q": KroneckerShape(4, 1, 1, 6), "a.v": KroneckerShape(2, 2, 2, 2)}
    plans = [LayerPlan(name, shape) for name, shape in shapes.items()]
    check_rule(plans, RankRule(min=3, budget=3 * 10 + 3 * 8))
    check_rule(plans, RankRule(min=3))
    # No layer needs more terms than it has.
    check_rule(plans, RankRule(min=9, budget=4 * 10 + 4 * 8))
    check_rule(plans, RankRule(min=3, budget=24, overrides={"q": 0}))
    with pytest.raises(ValueError, match="a budget of 53 parameters is below the 54 that the min"):
        check_rule(plans, RankRule(min=3, budget=53))
    with pytest.raises(ValueError, match="a budget of 24 parameters is below the 34 that the min"):
        check_rule(plans, RankRule(min=3, budget=24, overrides={"q": {"min": 1}}))
    with pytest.raises(ValueError, match="rank override 'k' matches none of the 2 layers"):
        check_rule(plans, RankRule(overrides={"k": 1}))
    with pytest.raises(ValueError, match="rank override for a.q: expected 0 <= min <= max"):
        check_rule(plans, RankRule(overrides={"q": {"min": 99}}))


def test_only_the_window_of_the_rule_is_looked_at():
    spectra = [layer("a", 4.0, 3.0, 2.0, 1.0, rest=70.0)]
    (choice,) = choose_ranks(spectra, RankRule(method="energy", energy=1.0, window=3))
    assert choice.rank == 3
    assert choice.values == (4.0, 3.0, 2.0)
