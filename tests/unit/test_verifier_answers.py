r"""Answers are read by one policy, in linear time, and read the same twice; plain numbers are exact."""

import time
from fractions import Fraction

import numpy as np
import pytest

from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.contracts.verifier_config import Verifier
from tutorloop.verifier_service.answers import gold_answer, last_box, read_answer, values, without_dollars
from tutorloop.verifier_service.exact import ExactVerifier
from tutorloop.verifier_service.forms import spelled
from tutorloop.verifier_service.numeric import NumericVerifier, last_number, only_number
from tutorloop.verifier_service.quantities import read_quantity
from tutorloop.verifier_service.verifiers import make_verifier


def plain_number(text):
    """The value of a gold that is a number and nothing else."""
    read = read_quantity(spelled(without_dollars(text)), gold=True)
    return None if read is None or read.percent else read.value


def number_in(text):
    read = only_number(text)
    assert read is not None, text
    return read[1].value


BOXES = [
    ("\\boxed{5}", "5"),
    ("a \\boxed{1} b \\fbox{ 2 } c", "2"),
    ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
    ("\\boxed{a \\\\ b}", "a \\\\ b"),
    ("\\\\boxed{5}", "5"),
    ("\\boxed{5 and \\boxed{6}", "6"),
    ("} \\boxed{7}", "7"),
    ("\\boxed{5} and \\boxed{", None),
    ("\\boxed{5} and \\boxed", None),
    ("\\boxed{5} and \\boxed{6", None),
    ("\\boxed{5} and \\boxed{ }", None),
    ("\\boxed{5} and \\boxed{{6}", None),
    ("\\boxed{5\\}", None),
    ("no box 5", None),
    ("\\boxed 5", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_the_last_box_counts_and_only_that(text, content):
    assert last_box(text) == content


READINGS = [  # text, answers, marker; text of the answer, and whether it is sure
    ("1 \\boxed{2}", "box", "", ("2", True)),
    ("<think>\\boxed{1}</think> so \\boxed{2}", "box", "", ("2", True)),
    ("<think>\\boxed{1}</think> so 2", "box", "", None),
    ("<think>\\boxed{1}</think> so 2", "any", "", ("so 2", False)),
    ("<think> surely \\boxed{1}", "box", "", None),  # never closed
    ("<think> surely 1", "any", "", None),
    ("\\boxed{2} <think> or \\boxed{1}", "box", "", ("2", True)),
    ("<think>a</think>\\boxed{2}<think>\\boxed{1}", "box", "", ("2", True)),
    ("\\boxed{1}", "box", "", ("1", True)),  # cut off where the prompt had opened it: nobody can tell
    ("<think>A: 1</think> so 2", "any", "A:", None),
    ("<think>A: 1</think> A: 2", "any", "A:", ("2", True)),
    ("[THINK]\\boxed{1}[/THINK]", "box", "", ("1", True)),  # not this recipe's marks
    ("<answer>3</answer>", "box", "", None),
    ("<answer>1</answer> <answer> 3 </answer> <answer>4", "any", "", ("3", True)),
    ("<answer>3</answer> <answer></answer> 7", "any", "", None),
    ("<answer>3</answer> \\boxed{4}", "any", "", ("4", True)),
    ("7 \\boxed{", "any", "", None),
    (" \n", "any", "", None),
    ("A: 1\nA: 42 \nbye", "box", "A:", ("42", True)),
    ("so \\boxed 5.", "box", "", ("5", True)),
    ("\\boxed 5 or \\boxed{6}", "box", "", ("6", True)),
    ("\\boxed", "box", "", None),
    ("\\boxed{1}", "any", "A:", None),
    ("A: 1 A:\n2", "box", "A:", None),
]


@pytest.mark.parametrize(("text", "answers", "marker", "expected"), READINGS)
def test_where_an_answer_is_read(text, answers, marker, expected):
    found = read_answer(text, answers, marker)
    assert (found and (found.text, found.sure)) == expected


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("\\boxed{1}, \\boxed{2}\\text{ or }\\boxed{3}", "1, 2, 3"),
        ("\\boxed{9} is wrong, and so \\boxed{2}", "2"),
        ("\\boxed{9} ++++ \\boxed{2}", "2"),
        ("\\boxed{9}, \\boxed{1, 2}", "1, 2"),
        ("\\boxed{1}, \\boxed{2}, \\boxed{", None),
    ],
)
def test_boxes_are_one_list_only_where_the_gold_is_one(text, joined):
    found = read_answer(text, "box", "", several=True)
    assert (found and found.text) == joined
    assert (alone := read_answer(text, "box", "")) is None or alone.text == last_box(text)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("$5$", "5"),
        ("$$ 5 $$", "5"),
        ("\\(5\\)", "5"),
        ("\\[ \\boxed{$5$} \\]", "5"),
        ("$21,16$ or $11$", "21,16  or  11"),
        ("a whole solution with $x=1$, so $\\boxed{1}$.", "1"),
        ("\\boxed{1} papers and \\boxed{2} bins", "1, 2"),
        ("\\boxed{7}. Again: \\boxed{7}", "7"),
        ("so \\boxed{5 \\text{ cut off", "5 \\text{ cut off"),
        ("\\$5", "\\$5"),
        ("it costs $5 and not $6", "it costs $5 and not $6"),
        ("\\boxed{}", ""),
    ],
)
def test_golds(gold, answer):
    assert gold_answer(gold) == answer == gold_answer(answer)


def test_values_of_lists():
    lists = {"5": 1, "1,2": 2, "(1,2)": 1, "(1,2),(3,4)": 2, "\\{1,2,3\\}": 3, "{1,2}": 2, "1 \\text{ or } 2": 2}
    assert {text: values(text) for text in lists} == lists


def test_everything_is_read_in_linear_time():
    hostile = [
        *("\\boxed{" * 20_000, "\\boxed{1}" * 20_000, "\\boxed{" + "{" * 40_000, "\\boxed{" + "\\" * 40_001),
        *("\\boxed   " * 10_000, "<answer>" * 20_000, "<answer>1</answer>" * 10_000, "</think>" * 20_000),
        *("1," * 40_000, "9" * 10**6, "1 3" * 20_000, "\\frac{" * 20_000, "$" * 10_000, "\\text{a" * 10_000),
        *("1 000 " * 10_000, "-" * 10_000, "1/" * 20_000, "x" * 400 + "^" * 20_000, "}" * 10_000, "[(" * 20_000),
    ]
    start = time.perf_counter()
    for text in hostile:
        for read in (last_box, gold_answer, values, plain_number, only_number, last_number):
            read(text)
        read_answer(text, "any", "", several=True)
        read_answer(text, "any", "1")
    assert time.perf_counter() - start < 60  # seconds; about 1, and quadratic time would be hours


def test_plain_numbers_are_exact():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(300):
        units, cents = int(random.integers(-(10**9), 10**9)), f"{random.integers(0, 10**6):06d}"
        down = int(random.integers(1, 10**6))
        value = Fraction(units)
        decimal = value + (Fraction(int(cents), 10**6) if units >= 0 else -Fraction(int(cents), 10**6))
        sign = "-" if units < 0 else ""
        assert plain_number(str(units)) == plain_number(f"{units:,}") == plain_number(f" ${units:,}$ ") == value
        assert plain_number(f"{units:,}".replace(",", "{,}")) == value
        assert plain_number(f"{units}/{down}") == value / down == plain_number(f"\\frac{{{units}}}{{{down}}}")
        assert plain_number(f"{sign}3\\frac{{{down}}}{{{down + 1}}}") == (-1 if sign else 1) * (
            3 + Fraction(down, down + 1)
        )
        assert units == 0 or plain_number(f"{units}.{cents}") == decimal
        for text in (f"{units:,}", f"{units:,}".replace(",", " "), f"{units:,} kg", f"€{units:,}"[:99], f"{units}e0"):
            assert (units < 0 and "€" in text) or number_in(text) == value, text
        if abs(units) >= 1000:
            european = f"{units:,}".replace(",", ".") + f",{cents[:2]}"
            assert number_in(european) == plain_number(f"{units}.{cents[:2]}"), european


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (".5", "1/2"),
            ("5.", "5"),
            ("+3", "3"),
            ("- 3", "-3"),
            ("\\$1,000.50", "2001/2"),
            ("6 / 4", "3/2"),
            ("007", "7"),
        ),
        *(("\\frac12", "1/2"), ("\\dfrac{-6}{4}", "-3/2"), ("1\\frac{3}{4}", "7/4"), ("\\frac 34", "3/4")),
        *(("12\\text{ cm}^2", "12"), ("5.5 \\mbox{ square units}", "11/2")),
    ],
)
def test_spellings_of_numbers(text, value):
    assert plain_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "-", "x", "1 2", "1,00", "1,0000", "1/0", "1.5/2", "5%", "--1", "2s", "1_000", "4_{1}"),
        *("\\frac{1}{0}", "\\frac{1}{x}", "1\\frac{5}{4}", "5 \\text{ is wrong}", "\\pm 3"),
        *("5 \\text{ or } 6", "\\frac{1}{2}3"),
    ],
)
def test_what_is_no_plain_number(text):
    assert plain_number(text) is None


def test_exact_verdicts():
    judge = ExactVerifier()
    assert judge(Response("so \\boxed{blue }", " blue")).passed
    assert judge(Response("\\boxed{Blue}", "blue")) == Judgement(False, "Blue")
    assert judge(Response("blue", "blue")) == Judgement(False, "")
    assert ExactVerifier("any")(Response(" blue\n", "blue")) == Judgement(True, "blue")
    assert ExactVerifier("any")(Response("blue \\boxed{", "blue \\boxed{")) == Judgement(False, "")
    assert ExactVerifier(marker="A:")(Response("hm\nA: red \nbye", "red")) == Judgement(True, "red")


NUMERIC = [
    ("1,000.99", "1000.99", True),
    ("1.000,99", "1000.99", True),
    ("1 000,99", "1000.99", True),
    ("1{,}000", "1000", True),
    ("11,\\! 111", "11111", True),
    ("0,125", "1/8", True),
    ("1.5e3", "1500", True),
    ("1.5 \\times 10^{-3}", "0.0015", True),
    ("2 \\text{ million}", "2000000", True),
    ("2 \\text{ million}", "2", False),
    ("\\$18.90", "18.9", True),
    ("1 3/4", "1.75", True),
    ("x = 5 \\text{ cm}^2", "5", True),
    ("45^\\circ", "45", True),
    ("50\\%", "50", True),
    ("50\\%", "0.5", True),
    ("50\\%", "50%", True),
    ("0.5\\%", "50%", False),
    ("\\sqrt{2}", "2", False),
    ("\\frac{\\pi}{2}", "2", False),
    ("2^3", "2", False),
    ("2^3", "3", False),
    ("3, 4", "4", False),
    ("1e999999", "1", False),
    ("-5", "5", False),
    ("5.0000001", "5", False),
    ("five", "5", False),
    ("y=5", "x=5", False),
    ("x=5", "x=5", True),
    ("5", "x=5", True),
    ("y=5", "5", True),
    ("3", "\\pm 3", None),
    ("\\pm 3", "3", False),
    ("4 \\text{ dozen}", "4", False),
    ("4 dozen", "48", True),
    ("5 cm", "5 m", False),
    ("7 8", "15", False),
    ("5 000", "0", False),
    ("not 4", "4", False),
    ("4 or 5", "4", False),
    ("1_000", "1000", False),
]


@pytest.mark.parametrize(("box", "gold", "passed"), NUMERIC)
def test_numeric_verdicts(box, gold, passed):
    judgement = NumericVerifier()(Response(f"so \\boxed{{{box}}}", gold))
    assert judgement.passed == bool(passed) and judgement.error_class == ("gold_not_numeric" if passed is None else "")


def test_numeric_verdicts_with_tolerance_in_texts_and_without_a_number():
    near = NumericVerifier(tolerance=0.01)
    assert near(Response("\\boxed{101}", "100")) == Judgement(True, "101")
    assert not near(Response("\\boxed{101.1}", "100")).passed and not near(Response("\\boxed{0.001}", "0")).passed
    anywhere = NumericVerifier("any")
    assert anywhere(Response("It costs 7 or, no, $1,250.50.", "1250.5")) == Judgement(True, "2501/2")
    assert anywhere(Response("the side is \\sqrt{2}", "2")) == Judgement(False)
    assert anywhere(Response("5", "blue")) == Judgement(False, error_class="gold_not_numeric")
    assert NumericVerifier(marker="A:")(Response("A: 60%", "60")).passed


def test_the_recipe_s_own_marks_end_the_reasoning():
    marks = ("[THINK]", "[/THINK]")
    for text, answer in (
        ("[THINK]\\boxed{1}[/THINK] so \\boxed{2}", "2"),
        ("\\boxed{1}[/THINK] so \\boxed{2}", "2"),
        ("[THINK]\\boxed{1}", None),
        ("\\boxed{1}</think>", "1"),
    ):
        found = read_answer(text, "box", "", thinking=marks)
        assert (found and found.text) == answer, text
        for kind in ("math", "exact", "numeric"):
            verifier = make_verifier(Verifier(kind=kind), thinking=marks)
            judged = verifier.prepare(Response(text, "2"))
            assert isinstance(judged, Judgement) and judged.passed == (answer == "2"), (kind, text)
