"""The number rules, one table of edge cases each; the cases are ours, written from the rules."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kpsvd_tune.evaluation.numeric_answer import (
    flexible_answer,
    gsm8k_gold,
    last_number,
    metamath_answer,
    plain_text,
    strict_answer,
)

STRICT = [
    ("#### 7", "7"),
    ("so it is\n#### 7", "7"),
    ("#### 7\n", "7"),
    ("#### 7 apples", "7"),
    ("#### 7.", "7"),
    ("#### 7..", "7"),
    ("#### 7,", "7"),
    ("#### 1,200", "1200"),
    ("#### 1,200,300", "1200300"),
    ("#### 1,200.50", "1200.50"),
    ("#### 1.200,50", "1.20050"),  # a comma is always dropped, whatever it meant
    ("#### 12,34", "1234"),
    ("#### ,5", "5"),
    ("#### .5", ".5"),
    ("#### 0.5", "0.5"),
    ("#### 0", "0"),
    ("#### 00", "00"),
    ("#### 007", "007"),
    ("#### -3", "-3"),
    ("#### -3.25", "-3.25"),
    ("#### -1,000", "-1000"),
    ("#### - 3", None),  # the sign must touch its number
    ("#### --3", None),
    ("#### +3", None),
    ("#### \u22123", None),  # the Unicode minus is no minus for this rule
    ("#### $5", None),  # nor may a currency stand before the number
    ("#### €5", None),
    ("#### 5$", "5"),
    ("#### 5%", "5"),
    ("#### 5kg", "5"),
    ("#### 5 kg", "5"),
    ("#### 3/4", "3"),
    ("#### 1/2 cup", "1"),
    ("#### 2:30", "2"),
    ("#### 1e3", "1"),
    ("#### 5-3", "5"),
    ("#### 5 or 6", "5"),
    ("#### x = 5", None),
    ("#### five", None),
    ("####5", None),  # the blank belongs to the mark
    ("####  5", None),
    ("####\t5", None),
    ("####\n5", None),
    ("### 5", None),
    ("##### 5", "5"),
    ("# # # # 5", None),
    ("#### 1\n#### 2", "1"),  # the first mark counts
    ("#### none\n#### 2", "2"),  # but only one with a number behind it
    ("2 and #### 3 and 4", "3"),
    ("**#### 6**", "6"),
    ("#### **6**", None),
    ("#### (6)", None),
    ("#### .", None),
    ("#### ,,,", None),
    ("#### -", None),
    ("####", None),
    ("#### ", None),
    ("", None),
    ("42", None),
    ("The answer is: 42", None),
    ("#### \uff15", None),  # a full-width digit
    ("#### ٣", None),  # an Arabic-Indic digit
    ("#### 5\u00a0000", "5"),  # a no-break space ends the number
    ("#### 5_000", "5"),
]

FLEXIBLE = [
    ("7", "7"),
    ("It is 7.", "7"),
    ("It is 7...", "7"),
    ("It is 7!", "7"),
    ("It is 7 ...", "7"),  # dots alone are no number
    ("7 , right?", "7"),
    ("first 3, then 4", "4"),
    ("3 + 4 = 7 apples", "7"),
    ("#### 7", "7"),
    ("7 left of 12", "12"),
    ("1,200", "1200"),
    ("1,200,300 people", "1200300"),
    ("1, 200", "200"),
    ("1,2,3", "123"),  # commas join, as in the source
    ("$5", "5"),
    ("$5.", "5"),
    ("$1,200.50", "1200.50"),
    ("5$", "5"),
    ("USD 5", "5"),
    ("€5", "5"),
    ("-5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("- 5", "5"),
    ("+5", "5"),
    ("\u22125", "5"),  # the Unicode minus is no minus for this rule
    ("--5", "-5"),
    ("10-5", "-5"),  # a hyphen before digits is a sign
    ("10 - 5", "5"),
    ("2024-05-01", "-01"),
    ("0.5", "0.5"),
    (".5", ".5"),
    ("-.5", "-.5"),
    ("5.0", "5.0"),
    ("5.00 dollars", "5.00"),
    ("00", "00"),
    ("0", "0"),
    ("3/4", "4"),
    ("1/2 of 8", "8"),
    ("50%", "50"),
    ("12kg", "12"),
    ("12 kg (26 lb)", "26"),
    ("x=5", "5"),
    ("x2", "2"),
    ("2x", "2"),
    ("1e3", "3"),
    ("3:45", "45"),
    ("1.2.3", "1.2.3"),
    ("5,", "5"),
    ("(5)", "5"),
    ("**5**", "5"),
    ("\\boxed{5}", "5"),
    ("The answer is: 5", "5"),
    ("5\n\n", "5"),
    ("5\nQuestion: how many are 6", "6"),
    ("seven", None),
    ("...", None),
    ("$$", None),
    ("-", None),
    ("", None),
    ("   \n", None),
    ("\uff15", None),
    ("٣", None),
    ("H2O and CO2", "2"),
]

METAMATH = [
    ("The answer is: 7", 7),
    ("The answer is: 7.", 7),
    ("The answer is: 7 apples", 7),
    ("The answer is: -7", -7),
    ("The answer is: +7", 7),
    ("The answer is: - 7", 7),  # the sign must touch its number
    ("The answer is: \u22127", 7),
    ("The answer is: $7", 7),
    ("The answer is: $-7", -7),
    ("The answer is: -$7", 7),
    ("The answer is: 007", 7),
    ("The answer is: 0", 0),
    ("The answer is: 1,200", 1200),
    ("The answer is: 1,234,567", 1234),  # one comma at most: the published quirk
    ("The answer is: 12,34", 1234),
    ("The answer is: 1, 200", 1),
    ("The answer is: ,5", 5),
    ("The answer is: 1.4", 1),
    ("The answer is: 1.6", 2),
    ("The answer is: 0.5", 0),  # halves go to the even neighbour
    ("The answer is: 1.5", 2),
    ("The answer is: 2.5", 2),
    ("The answer is: -0.5", 0),
    ("The answer is: .75", 1),
    ("The answer is: -.75", -1),
    ("The answer is: 1,200.50", 1200),
    ("The answer is: 3/4", 1),
    ("The answer is: 1/4", 0),
    ("The answer is: 10/4", 2),
    ("The answer is: 7/2", 4),
    ("The answer is: -7/2", -4),
    ("The answer is: 7/0", 7),  # a zero denominator is dropped
    ("The answer is: /5", None),
    ("The answer is: 1 / 4", 1),
    ("The answer is: 1/2/4", 0),
    ("The answer is: 5%", 5),
    ("The answer is: 1e3", 1),
    ("The answer is: x = 5", 5),
    ("The answer is: x2", 2),
    ("The answer is: 5 or 6", 5),  # the first number behind the mark
    ("The answer is: \\boxed{5}", 5),
    ("The answer is: **5**", 5),
    ("The answer is: 5\n6", 5),
    ("The answer is: \n5", 5),
    ("The answer is: 1\nThe answer is: 2", 2),  # the last mark counts
    ("The answer is: 1\nThe answer is: none", None),
    ("2 and The answer is: 3 and 4", 3),
    ("The answer is:5", None),  # the blank belongs to the mark
    ("The answer is 5", None),
    ("the answer is: 5", None),
    ("The Answer Is: 5", None),
    ("The answer is: five", None),
    ("The answer is: ", None),
    ("The answer is: .", None),
    ("The answer is: -", None),
    ("The answer is: ,", None),
    ("#### 5", None),
    ("5", None),
    ("", None),
    ("The answer is: " + "9" * 400, None),  # no finite number
    ("The answer is: 1/" + "9" * 400, 0),
    ("The answer is: 5.", 5),
]

LAST_NUMBER = [
    ("7", 7),
    ("It is 7.", 7),
    ("It is 7...", 7),
    ("It is 7 ...", 7),
    ("first 3, then 4", 4),
    ("3 + 4 = 7 apples", 7),
    ("7 left of 12", 12),
    ("#### 7", 7),
    ("\\boxed{7}", 7),
    ("The answer is: 7", 7),
    ("1,200", 1200),
    ("1,200,300 people", 1200300),
    ("1,200.50", Fraction(2401, 2)),
    ("1, 200", 200),
    ("1,2,3", 3),
    ("1,2345", 2345),
    ("12,345", 12345),
    ("1234,567", 567),
    ("$5", 5),
    ("$5.00", 5),
    ("$1,200", 1200),
    ("5$", 5),
    ("€5", 5),
    ("-5", -5),
    ("-$5", -5),
    ("$-5", -5),
    ("- 5", 5),
    ("+5", 5),
    ("\u22125", -5),
    ("\u2212$5", -5),
    ("is -5", -5),
    ("=-5", -5),
    ("(-5)", -5),
    ("10-5", 5),
    ("10 - 5", 5),
    ("x-5", 5),
    ("(2)-5", 5),
    ("2024-05-01", 1),
    ("0.5", Fraction(1, 2)),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("5.0", 5),
    ("0", 0),
    ("-0", 0),
    ("007", 7),
    ("3/4", Fraction(3, 4)),
    ("6/8", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("10/2", 5),
    ("1 / 2", 2),
    ("5/0", 0),
    ("1/2/2024", 2024),
    ("50%", 50),
    ("12kg", 12),
    ("12 kg (26 lb)", 26),
    ("x=5", 5),
    ("1e3", 1000),
    ("1.5e2", 150),
    ("2E-1", Fraction(1, 5)),
    ("2e", 2),
    ("1e999999999", 999999999),  # no exponent of that size is ever computed
    ("3:45", 45),
    ("**5**", 5),
    ("5\n\n", 5),
    ("seven", None),
    ("...", None),
    ("$", None),
    ("-", None),
    ("", None),
    ("\uff15", None),
    ("9" * 301, None),
    ("9" * 5000, None),
]


@pytest.mark.parametrize(("text", "expected"), STRICT)
def test_strict_answer(text: str, expected: str | None):
    assert strict_answer(text) == expected


@pytest.mark.parametrize(("text", "expected"), FLEXIBLE)
def test_flexible_answer(text: str, expected: str | None):
    assert flexible_answer(text) == expected


@pytest.mark.parametrize(("text", "expected"), METAMATH)
def test_metamath_answer(text: str, expected: int | None):
    assert metamath_answer(text) == expected


@pytest.mark.parametrize(("text", "expected"), LAST_NUMBER)
def test_last_number(text: str, expected: Fraction | int | None):
    assert last_number(text) == expected


@pytest.mark.parametrize("table", [STRICT, FLEXIBLE, METAMATH, LAST_NUMBER])
def test_each_rule_has_sixty_cases(table: list[tuple[str, object]]):
    assert len({text for text, _ in table}) >= 60


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("#### $5.", "5"),
        ("####7", "7"),
        ("#### 1\n#### 2", "2"),
        ("18", "18"),
        ("-2", "-2"),
        ("she has 18", "18"),
        ("#### none", None),
        ("", None),
    ],
)
def test_gsm8k_gold_is_behind_the_mark_or_the_last_number(gold: str, expected: str | None):
    assert gsm8k_gold(gold) == expected


def test_plain_text_ignores_case_space_and_the_last_dot():
    assert plain_text("  The  Blue\nHouse. ") == plain_text("the blue house") == "the blue house"
