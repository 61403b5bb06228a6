r"""Mathematical verdicts: equal is accepted however it is written, and what math-verify cannot tell apart is not."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sympy

from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.verifier_service.latex import read_formula, search
from tutorloop.verifier_service.math import MathVerifier
from tutorloop.verifier_service.math_guard import too_large


def boxed(box, gold):
    return MathVerifier()(Response(f"so \\boxed{{{box}}}.", gold))


VERDICTS = [
    ("\\boxed{18}", "18", True, "18"),
    ("\\boxed{1,080}", "1080", True, "1080"),
    ("\\boxed{0.50}", "1/2", True, "1/2"),
    ("\\boxed{18.0000001}", "18", False, "180000001/10000000"),
    ("18", "18", False, ""),
    ("\\boxed{18} but \\boxed{19", "18", False, ""),
    ("\\boxed{\\frac{3}{4}}", "0.75", True, "3/4"),
    ("\\boxed{\\frac{6}{8}}", "\\frac{3}{4}", True, "3/4"),
    ("\\boxed{x^2+2x+2}", "(x+1)^2", False, None),
    ("\\boxed{(2, 1)}", "(1,2)", False, "(2, 1)"),
    ("\\boxed{12} \\text{ or } \\boxed{5}", "5", True, "5"),
    ("\\boxed{2}, \\boxed{5}", "\\{5, 2\\}", True, "\\{5,2\\}"),
    ("\\boxed{5}", "\\boxed{}", False, ""),
]


@pytest.mark.parametrize(("text", "gold", "passed", "answer"), VERDICTS)
def test_verdicts_and_canonical_answers(text, gold, passed, answer):
    judgement = MathVerifier()(Response(text, gold))
    assert judgement.passed is passed
    assert answer is None or judgement.answer == answer


EQUAL = [
    ("x^2+2x+1", "(x+1)^2"),
    ("(1, 2)", "(1,2)"),
    ("\\{2, 1\\}", "1, 2"),
    ("$\\sqrt{12}$", "2\\sqrt3"),
    ("4\\sqrt(2)", "4\\sqrt{2}"),
    ("1-\\frac{1}{\\mathrm{e}}", "1-\\frac{1}{e}"),
    ("1-e^{-1}", "1-\\frac{1}{\\text{e}}"),
    ("\\text{evelyn}", "Evelyn"),
    ("\\text{no solution}", "\\text{No solution.}"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("y=\\frac{4-x}{2}", "x+2y=4"),
    ("f(t)=t^2+1", "f(x)=1+x^2"),
    ("x \\in [2,\\infty)", "x \\geq 2"),
    ("-x < -2", "x > 2"),
    ("x \\ne 3", "3-x \\neq 0"),
    ("-2 < a < 10", "-2<a<10"),
    ("\\begin{pmatrix} 0.5 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}"),
    ("\\pm 3", "-3, 3"),
    ("25", "25\\%"),
    ("90", "90^\\circ"),
    ("3{,}000 \\text{ cm}", "3000"),
    ("\\frac{n(n-1)}{2}", "\\sum_{k=0}^{n-1} k"),
    ("\\sin^2 x + \\cos^2 x", "1"),
    ("0.333333", "\\frac{1}{3}"),
    ("4.1231056", "\\sqrt{17}"),
    ("5 \\text{ million}", "5000000"),
    ("2^{10}", "1024"),
    ("204_5", "204_{5}"),
    ("1, 2, \\ldots, n", "1,2,\\ldots,n"),
]
UNEQUAL = [
    ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"),
    ("\\frac{1}{2006!}", "\\frac{1}{2005!}"),
    ("\\frac{\\sqrt{2}}{2^{98}}", "\\frac{\\sqrt{2}}{2^{99}}"),
    ("2x \\cdot 10^{-20}", "x \\cdot 10^{-20}"),
    ("e^{-999}", "e^{-1000}"),
    ("e^{-100}", "0"),
    ("10^{20}", "\\sqrt{10^{40}+1}"),
    ("0.0000002", "0.0000001"),
    ("0.000067", "\\frac{672}{10000001}"),
    ("3.14", "\\pi"),
    ("\\frac{22}{7}", "\\pi"),
    ("0.3333", "\\frac{1}{3}"),
    ("1+\\frac{1}{\\mathrm{e}}", "1-\\frac{1}{\\mathrm{e}}"),
    ("4\\sqrt(2)", "4"),
    ("4\\sqrt 2", "4"),
    ("2021", "\\pm 2021"),
    ("1:00", "12:00"),
    ("1:4:9:\\ldots", "1:2:3:\\ldots"),
    ("1, 3, 5, \\ldots, 2n-1", "1, 2, \\ldots, n"),
    ("\\{1,2\\}", "\\{1,2,\\dots\\}"),
    ("n=1, 2, 3", "n=2, 3, 4"),
    ("D = (0, 1.5)", "D = (0, 1)"),
    ("3x+4y+14=0", "3x-y+13=0"),
    ("x^2+1=0", "x^2+2=0"),
    ("a_n = \\sum_{k=0}^{n-2} a_k", "a_n = \\sum_{k=0}^{n-1} a_k"),
    ("x^2+y^2=25, x+y=7", "\\{(3,4),(4,3)\\}"),
    ("x^2<4", "(-2,2)"),
    ("x \\neq 4", "x \\neq 3"),
    ("x \\geq 3", "x>3"),
    ("[1,2]", "(1,2)"),
    ("|x|", "x"),
    ("\\text{tea}", "\\text{eat}"),
    ("40_8", "40_9"),
    ("5", "5 \\text{ million}"),
    ("\\frac{2}{0}", "\\frac{1}{0}"),
    ("-\\infty", "\\infty"),
    ("1, 2", "1"),
    ("7; import os", "7"),
    ("7 + __import__('os').getpid()", "7"),
    ("{x.__class__}", "7"),
]


@pytest.mark.parametrize(("box", "gold"), EQUAL)
def test_equal_answers_pass_with_the_golds_answer(box, gold):
    judgement = boxed(box, gold)
    assert judgement == Judgement(True, boxed(gold, gold).answer)


@pytest.mark.parametrize(("box", "gold"), UNEQUAL)
def test_unequal_answers_do_not_pass(box, gold):
    judgement = boxed(box, gold)
    assert not judgement.passed and not judgement.error_class and judgement.answer


def test_one_number_has_one_canonical_answer():
    """maj@k counts answers: all spellings of one value must be one answer, however each was decided."""
    for gold in ("1/2", "\\frac{1}{2}", "x"):
        assert {boxed(box, gold).answer for box in ("1/2", "0.5", "\\frac12", "\\frac{2}{4}", "2^{-1}")} == {"1/2"}, (
            gold
        )


def test_polynomials_against_their_expansions_and_neighbours():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    x, y = sympy.symbols("x y")
    for _ in range(8):
        a, b, c, d = (int(n) for n in random.integers(1, 50, 4))
        product = f"({a}x+{b}y)({c}x-{d}y)"
        expanded = sympy.expand((a * x + b * y) * (c * x - d * y))
        assert boxed(sympy.latex(expanded), product).passed, (product, expanded)
        assert not boxed(sympy.latex(expanded + 1), product).passed, product
        assert not boxed(sympy.latex(expanded + x), product).passed, product


HOSTILE = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "\\frac{5^{\\left(7^{\\left(5^{6}\\right)}\\right)} - 5}{16}",
    "10.0^{10.0^{10.0}}",
    "2^{40^{5}}",
    "4^{\\frac{99999999999999999999}{7}}",
    "((10!)!)!",
    "3!!!!",
    "100000!",
    "\\exp(\\exp(\\exp(9)))",
    "\\Gamma(1000000)",
    "\\binom{100000}{50000}",
    "((2^{100})^{100})^{100}",
    "(x+1)^{900}",
    "(a+b+c+d)^{60}",
    "\\frac{x^{900}-1}{x-1}",
    "\\prod_{k=1}^{100000} (1+k)",
    "\\int_0^1 e^{x^x} dx",
    "a^{b^{c^{d^{f}}}}",
    "(" * 300 + "1" + ")" * 300,
    "{" * 30 + "1" + "}" * 30,
    "\\sqrt" * 200 + "2",
    "\\frac" * 200 + "12",
    "7" * 5000,
    "1+" * 2000 + "1",
]
HARMLESS = [
    "\\frac{1}{2006!}",
    "2^{2006}",
    "10^{100}",
    "x^{2023}",
    "(x+1)^{12}",
    "\\binom{2023}{1000}",
    "2^{2^n}",
    "e^{-x^2}",
    "\\sum_{k=1}^{100} k^2",
    "\\sqrt{2+\\sqrt{2+\\sqrt{2+\\sqrt{2}}}}",
    "\\left(-\\infty, \\frac{3-\\sqrt{5}}{2}\\right) \\cup \\left(\\frac{3+\\sqrt{5}}{2}, \\infty\\right)",
    "\\begin{pmatrix} 1 & 2 & 3 \\\\ 4 & 5 & 6 \\\\ 7 & 8 & 9 \\end{pmatrix}",
    "123456789012345678901234567890",
    "\\frac{\\frac{1}{2}+\\frac{1}{3}}{\\frac{1}{4}}",
]


@pytest.mark.parametrize("box", HOSTILE)
def test_what_would_explode_is_the_fault_of_whose_it_is_before_sympy_sees_it(box):
    for judgement in (MathVerifier().prepare(Response(f"\\boxed{{{box}}}", "x+1")), boxed(box, "x+1")):
        assert isinstance(judgement, Judgement)
        assert not judgement.passed and judgement.error_class == "too_large" and judgement.fault
    of_gold = MathVerifier().prepare(Response("\\boxed{x+1}", box))
    assert of_gold.error_class == "gold_too_large" and not of_gold.fault
    assert boxed(box, box).passed  # the same text needs no evaluation


@pytest.mark.parametrize("box", HARMLESS)
def test_what_is_large_in_looks_only_is_evaluated(box):
    assert not too_large(box)


def test_what_is_prepared_is_the_answer_alone_and_is_judged_the_same():
    for verifier in (MathVerifier(), MathVerifier("any"), MathVerifier(marker="A:")):
        long, short = (
            Response(f"{words} A: \\boxed{{x+x}}", "so $2x$ is $\\boxed{2x}$") for words in ("many words," * 99, "")
        )
        prepared = verifier.prepare(long)
        assert prepared == verifier.prepare(short) == verifier.prepare(prepared)
        assert len(prepared.text) < 20 and prepared.gold == "2x"
        assert verifier(long) == verifier(prepared) == Judgement(True, "2x")
        assert pickle.loads(pickle.dumps(verifier))(long).passed


ANYWHERE = [
    ("3", "3", True),
    ("\\sqrt{17}", "\\sqrt{17}", True),
    ("The answer is $\\frac{8}{2}$.", "4", True),
    ("We get 7, then 9. The final answer is 12.", "12", True),
    ("We get 7, then 9. The final answer is 12.", "9", False),
    ("It costs 1,000.50€", "1000.5", True),
    ("so it is 1000,50", "1000.5", True),
    ("the model XB7Z", "7", False),
    ("$5$ and $1:2:\\ldots$", "5", False),
    ("<answer>\\frac{1}{2}</answer>", "0.5", True),
    ("3x + 4y + 14=0", "3x-y+13=0", False),
    ("The answer is \\boxed{", "3", False),
    ("nothing here", "3", False),
    ("Answer $ \n 3 \n $", "3", False),
    ("Answer $$ \n 3 \n $$", "3", True),
    ("so the last digits are $2003^{2002^{2001}}$", "9", None),
]


@pytest.mark.parametrize(("text", "gold", "passed"), ANYWHERE)
def test_answers_anywhere(text, gold, passed):
    judgement = MathVerifier("any")(Response(text, gold))
    assert judgement.error_class == "too_large" if passed is None else judgement.passed is passed
    assert not MathVerifier()(Response(text, gold)).passed


def test_formulas_are_read_to_their_end_or_not_at_all():
    assert read_formula("2x+1") is not None and read_formula("1/0") is None
    for cut in ("2x+1 \\foo{", "4 \\sqrt{", "1:4:9:", "-[0,1)", "\\{1, 2, \\ldots\\}", "2\\pi + __import__('os')"):
        assert read_formula(cut) is None, cut
    assert search("no formula") == "" and search("a $x$ and $y+1$.") == "x, y+1"


@pytest.mark.parametrize(
    "place",
    [
        *("{}", "2\\pi + {}", "x_{{{}}}", "\\text{{{}}}", "\\frac{{{}}}{{2}}", "\\sqrt[{}]{{2}}", "f({})", "1{}"),
        *("\\operatorname{{{}}}", "\\begin{{pmatrix}} {} & 1 \\end{{pmatrix}}", "{{{{{}}}}}", "${{{}}}", "%({})s"),
        *("lambda: {}", "\\log_{{{}}} 8"),
    ],
)
def test_code_in_an_answer_is_never_evaluated(place, tmp_path):
    mark = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path('{mark}').mkdir()"
    for answers, text in (("box", f"\\boxed{{{place.format(code)}}}"), ("any", f"answer: ${place.format(code)}$")):
        assert not MathVerifier(answers)(Response(text, "7")).passed
        MathVerifier(answers)(Response(text, f"7 + {place.format(code)}"))
    assert not mark.exists()


def test_the_calling_process_needs_no_sympy():
    code = (
        "import sys; from tutorloop.verifier_service import math, numeric, exact; "
        "from tutorloop.contracts.protocols import Response; "
        "math.MathVerifier().prepare(Response('\\\\boxed{x+x}', '2x')); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
