r"""The string rules of MATH: boxes, and which spellings are one answer."""

from __future__ import annotations

import pytest

from kpsvd_tune.evaluation.math_answer import boxed_answer, is_equiv, stated_answer

EQUAL = [
    ("5", "5"),
    ("5 ", "5"),
    (" 5", "5"),
    ("5\n", "5"),
    ("x + 1", "x+1"),
    ("(1, 2)", "(1,2)"),
    ("1\\!000", "1000"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\frac1{2}", "\\frac{1}{2}"),
    ("\\frac1{72}", "\\frac{1}{72}"),
    ("\\tfrac{1}{2}", "\\frac{1}{2}"),
    ("\\dfrac{1}{2}", "\\frac{1}{2}"),
    ("\\dfrac12", "\\tfrac12"),
    ("\\frac12x", "\\frac{1}{2}x"),
    ("\\frac12+\\frac34", "\\frac{1}{2}+\\frac{3}{4}"),
    ("1/2", "\\frac{1}{2}"),
    ("-1/2", "\\frac{-1}{2}"),
    ("0.5", "\\frac{1}{2}"),
    (".5", "\\frac{1}{2}"),
    ("0.5", "1/2"),
    (".25", "0.25"),
    ("(.25, 1)", "(.25,1)"),
    ("x + .25", "x + 0.25"),
    ("{.25}", "{0.25}"),
    ("\\left(1, 2\\right)", "(1,2)"),
    ("\\left[0, 1\\right)", "[0,1)"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("\\$5", "5"),
    ("5\\%", "5"),
    ("5\\text{ cm}", "5"),
    ("5\\text{ square meters}", "5"),
    ("5 \\text{ cm}", "5"),
    ("x = 5", "5"),
    ("x=5", "5"),
    ("k = \\frac12", "1/2"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("2\\sqrt3", "2\\sqrt{3}"),
    ("\\sqrt23", "\\sqrt{2}3"),
    ("\\sqrt2+\\sqrt3", "\\sqrt{2}+\\sqrt{3}"),
    ("\\\\frac12", "\\frac{1}{2}"),
    ("", ""),
]

DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("5", "5.0"),
    ("5", ""),
    ("1/2", "2/4"),
    ("0.50", "\\frac{1}{2}"),
    ("0.25", "\\frac{1}{4}"),
    ("1,000", "1000"),
    ("(1,2)", "(2,1)"),
    ("x+1", "1+x"),
    ("X", "x"),
    ("\\pi", "pi"),
    ("\\text{A}", "A"),
    ("5\\text{cm}", "5"),
    ("\\mathrm{cm}", ""),
    ("5%", "5"),
    ("$5", "5"),
    ("area=5", "5"),  # more than two signs before "=" belong to the answer
    ("x=y=5", "5"),
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("\\frac12", "\\frac{12}{}"),
    ("04/2", "\\frac{4}{2}"),
    ("a/b", "\\frac{a}{b}"),
    ("1/2/3", "\\frac{1}{2}/3"),
    ("\\sqrt{3}", "3"),
    ("\\sqrt{12}", "2\\sqrt{3}"),
    ("\\infty", "-\\infty"),
]

# Where the rules do not apply to an answer, its spelling as given decides.
UNREADABLE = [
    ("\\frac", "\\frac", True),
    ("\\frac1", "\\frac1", True),
    ("\\frac1", "\\frac{1}{1}", False),
    ("\\sqrt", "\\sqrt", True),
    ("\\sqrt", "\\sqrt ", False),
    ("1\\text{ m}2\\text{ cm}", "1\\text{ m}2\\text{ cm}", True),
    ("1\\text{ m}2\\text{ cm}", "1", False),
]

BOXED = [
    ("\\boxed{5}", "5"),
    ("so $\\boxed{5}$.", "5"),
    ("\\boxed{5} then \\boxed{6}", "6"),
    ("\\fbox{5}", "5"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\left\\{1\\right\\}}", "\\left\\{1\\right\\}"),
    ("\\boxed{{5}}", "{5}"),
    ("\\boxed{}", ""),
    ("\\boxed{a}}", "a"),
    ("\\boxed{a} }", "a"),
    ("\\boxed 5$ and more", "5"),
    ("\\boxed 5", "5"),
    ("\\boxed{5", None),
    ("\\boxed{1} and \\boxed{2", None),  # the last box counts, and it never ends
    ("boxed{5}", None),
    ("\\boxed5", None),
    ("5", None),
    ("", None),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_spellings_of_one_answer(first: str, second: str):
    assert is_equiv(first, second)
    assert is_equiv(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_spellings_of_two_answers(first: str, second: str):
    assert not is_equiv(first, second)
    assert not is_equiv(second, first)


@pytest.mark.parametrize(("first", "second", "expected"), UNREADABLE)
def test_answers_the_rules_cannot_read(first: str, second: str, expected: bool):
    assert is_equiv(first, second) is expected


def test_there_are_sixty_cases():
    assert len(EQUAL) + len(DIFFERENT) + len(UNREADABLE) >= 60


@pytest.mark.parametrize(("text", "expected"), BOXED)
def test_boxed_answer(text: str, expected: str | None):
    assert boxed_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is: 5", "5"),
        ("The answer is: 5.", "5"),
        ("The answer is: 0.5.\nMore", "0.5"),
        ("The answer is: $x$", "$x$"),
        ("The answer is: 1\nThe answer is: 2", "2"),
        ("The answer is: ", None),
        ("The answer is 5", None),
        ("", None),
        ("The answer is: -3", "-3"),
        ("The answer is: \u22123", "\u22123"),
        ("The answer is: 1,234,567", "1,234,567"),
        ("The answer is: 1,234.", "1,234"),
        ("The answer is: $5$.", "$5$"),
        ("The answer is: $5.50", "$5.50"),
        ("The answer is: 5 cm", "5 cm"),
        ("The answer is: 5%.", "5%"),
        ("The answer is: 1/2", "1/2"),
        ("The answer is: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("The answer is: \\boxed{5}", "\\boxed{5}"),
        ("The answer is: (1, 2)", "(1, 2)"),
        ("The answer is: x = 5", "x = 5"),
        ("The answer is: 5..", "5."),
        ("The answer is: 5...\n", "5."),
        ("The answer is:   5  ", "5"),
        ("The answer is: \n5", "5"),
        ("The answer is: 5\n", "5"),
        ("The answer is: 5\nSo it ends", "5\nSo it ends"),
        ("The answer is: 5.\n\nNext", "5"),
        ("The answer is: 5. Next", "5. Next"),
        ("The answer is: 5.\nThe answer is: 6.\n", "6"),
        ("the answer is: 5", None),
        ("The Answer is: 5", None),
        ("The answer is:5", None),
        ("The answer is : 5", None),
        ("So The answer is: 5", "5"),
        ("####5\nThe answer is: 5", "5"),
        ("The answer is: .", None),
        ("The answer is: .\n5", None),
        ("The answer is: 0", "0"),
        ("The answer is: 0.", "0"),
        ("The answer is: .5", ".5"),
        ("The answer is: -.5.", "-.5"),
        ("The answer is: no answer", "no answer"),
        ("\\boxed{5}", None),
        ("5", None),
        ("The answer is: 1\nThe answer is: ", None),
        ("The answer is: 3 and 4", "3 and 4"),
        ("The answer is: 2^{10}", "2^{10}"),
        ("The answer is: 45^\\circ.", "45^\\circ"),
        ("The answer is: \\text{Tom}", "\\text{Tom}"),
        ("The answer is: [0,1)", "[0,1)"),
        ("The answer is: 1e5", "1e5"),
        ("The answer is: $\\sqrt{2}$", "$\\sqrt{2}$"),
        ("The answer is: \\$5", "\\$5"),
        ("The answer is: 7!", "7!"),
        ("The answer is: \\infty", "\\infty"),
        ("The answer is: 10:30", "10:30"),
        ("The answer is: A.", "A"),
        ("The answer is: (B)", "(B)"),
        ("The answer is: \t8", "8"),
    ],
)
def test_stated_answer(text: str, expected: str | None):
    assert stated_answer(text) == expected
