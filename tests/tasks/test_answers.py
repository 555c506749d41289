"""Answers read out of text: GSM8K's numbers and MATH's boxes, case by case."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_flower.tasks import final_number, last_boxed, normal_math, same_math, same_number

# text, value, whether it stood after the mark
NUMBERS = {
    "the data set's form": ("He has 5 + 4 = <<5+4=9>>9 left.\n#### 9", "9", True),
    "thousands": ("#### 2,125", "2125", True),
    "millions": ("#### 1,234,567", "1234567", True),
    "dollars": ("#### $18", "18", True),
    "dollars after the sign": ("#### -$7.50", "-7.5", True),
    "sign after the dollar": ("#### $-7.50", "-7.5", True),
    "full stop": ("#### 42.", "42", True),
    "negative": ("#### -3", "-3", True),
    "unicode minus": ("#### \u22123", "-3", True),
    "decimals": ("#### 3.1400", "3.14", True),
    "no leading zero": ("#### .5", "0.5", True),
    "unit behind": ("#### 12 apples", "12", True),
    "words before": ("#### The answer is 12 apples and 3 pears", "12", True),
    "no space": ("####7", "7", True),
    "on the next line": ("####\n7", "7", True),
    "goes on with another question": ("#### 9\n\nQuestion: 3 + 4?\nAnswer: 7\n#### 7", "9", True),
    "per cent": ("#### 25%", "25", True),
    "fallback": ("First 3, then 4, so 7 in all.", "7", False),
    "fallback, difference": ("5-3 leaves 10-8", "8", False),
    "fallback, negative": ("the change is -8 degrees.", "-8", False),
    "fallback, in brackets": ("it falls (-8)", "-8", False),
    "fallback, dollars": ("So she pays $1,050.25.", "1050.25", False),
    "mark without a number": ("It is 5.\n#### unknown", "5", False),
    "equals": ("x=12", "12", False),
    "list": ("they are 1, 2, 3", "3", False),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_gsm8k_numbers(case):
    text, value, marked = NUMBERS[case]
    found = final_number(text)
    assert found is not None
    assert (found.value, found.marked) == (Decimal(value), marked)


def test_gsm8k_without_a_number_is_wrong():
    assert final_number("") is None
    assert final_number("no idea ####") is None
    assert not same_number(None, final_number("#### 3"))
    assert not same_number(None, None)
    assert same_number(final_number("#### 18.00"), final_number("#### 18"))


@given(value=st.decimals(min_value=-(10**9), max_value=10**9, places=2))
def test_any_number_is_read_however_it_is_written(value):
    for written in (f"{value}", f"{value:,}", f"{value}.", f"so it is {value:,} in all"):
        assert final_number(f"steps 1 2 3\n#### {written}").value == value


BOXES = {
    "plain": (r"so $x = \boxed{5}$.", "5"),
    "nested": (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    "last of two": (r"\boxed{1} or rather \boxed{2}", "2"),
    "fbox": (r"\fbox{7}", "7"),
    "bare": (r"$\boxed 7$", "7"),
    "bare with a full stop": (r"It is \boxed 12.", "12"),
    "space before the brace": (r"\boxed {9}", "9"),
    "set": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "unfinished": (r"first \boxed{1}, then \boxed{\frac{1}{2}", None),
    "none": ("it is 5", None),
    "another command": (r"\boxedtext{5}", None),
    "nothing follows": (r"\boxed", None),
    "empty": (r"\boxed{}", ""),
    "matrix": (
        r"\boxed{\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}}",
        r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}",
    ),
}


@pytest.mark.parametrize("case", BOXES)
def test_math_boxes(case):
    text, expected = BOXES[case]
    assert last_boxed(text) == expected


SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\tfrac12"),
    ("1/2", r"\frac{1}{2}"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.5"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\frac\pi2", r"\frac{\pi}{2}"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$5", "5"),
    (r"25\%", "25"),
    (r"10\text{ cm}", "10"),
    (r"10\mbox{ cm}^2", "10"),
    (r"5 \text{ dollars}", "5"),
    (r"\text{Evelyn}", "Evelyn"),
    ("x = 5", "5"),
    ("k=-3", "-3"),
    (r"2 + 3i", "2+3i"),
    ("10,080", "10080"),
    (r"10{,}080", "10080"),
    (r"10\,080", "10080"),
    ("2.0", "2"),
    ("1.50", "1.5"),
    ("12.", "12"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt2}2"),
    (r"\frac{\frac{1}{2}}{3}", r"\frac{\frac12}{3}"),
    (r"3\!\sqrt{2}", r"3\sqrt{2}"),
]
DIFFERENT = [
    ("1", "2"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("(1,2)", "(2,1)"),
    ("1,234,5", "12345"),
    ("-5", "5"),
    ("10", "1"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("x+1", "x-1"),
    (r"\text{A}", r"\text{B}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_math_answers_that_agree(one, other):
    assert normal_math(one) == normal_math(other)
    assert same_math(one, other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_math_answers_that_differ(one, other):
    assert not same_math(one, other)


def test_math_without_a_box_is_wrong():
    assert not same_math(None, "5")
    assert not same_math(last_boxed("5"), last_boxed("5"))


PIECES = [r"\frac", "12", "{3}", r"\sqrt", "x", "=", " ", ".", ",", r"\left(", r"\right)", "-", "/", r"\text{ cm}", "0"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_a_normal_form_is_its_own(text):
    once = normal_math(text)
    assert normal_math(once) == once
