r"""The forms that models write: what is one value in them, and that no two values become one.

tests/golden/answer_forms.jsonl: 150 rows that release 0.4.0 judged wrong. answer_forms_ours.jsonl: more of each kind.
"""

import json
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tutorloop.contracts.protocols import Response
from tutorloop.verifier_service.characters import characters
from tutorloop.verifier_service.forms import LONGEST, ambiguous, spelled
from tutorloop.verifier_service.math import MathVerifier
from tutorloop.verifier_service.numeric import NumericVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.quantities import SIZES, TAKES_BACK, part_unit, read_quantity

GOLDEN = Path(__file__).parents[1] / "golden"
PATIENT = 60.0


def rows_of(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def passes(answer, gold, verifier=None):
    return (verifier or MathVerifier())(Response(f"so \\boxed{{{answer}}}", gold)).passed


def test_forms_that_were_judged_wrong():
    """Through the processes that can be killed; none abstains."""
    rows = rows_of("answer_forms.jsonl")
    pool = VerifierPool(MathVerifier("any"), timeout_seconds=PATIENT)
    outcomes = pool.judge([Response(row["prediction"], row["gold"]) for row in rows])
    pool.close()
    pairs = list(zip(rows, (outcome.judgement for outcome in outcomes), strict=True))
    assert not [row["id"] for row, judged in pairs if judged.passed != row["expected"]]


def test_more_forms_of_each_kind():
    wrong = []
    for row in rows_of("answer_forms_ours.jsonl"):
        if passes(row["answer"], row["gold"]) != row["expected"]:
            wrong.append(row)
    assert not wrong


# ---- one value, many writings ---------------------------------------------------------------------------------------

DRESSES: list[Callable[[str], str]] = [
    *(lambda text, style=style: rf"\{style}{{{text}}}" for style in ("mathbf", "mathrm", "boldsymbol", "underline")),
    lambda text: rf"\textcolor{{red}}{{{text}}}",
    lambda text: rf"\color{{blue}} {text}",
    lambda text: rf"\large {text}",
    lambda text: rf"{{\bf {text}}}",
    lambda text: f"**{text}**",
    lambda text: f"`{text}`",
    lambda text: f"<b>{text}</b>",
    lambda text: f"${text}$",
    lambda text: rf"\({text}\)",
    lambda text: rf"\text{{The answer is }} {text}",
    lambda text: rf"\displaystyle {text}\hspace{{1cm}}",
    lambda text: f"\u200b{text}\ufeff",
    lambda text: f"{text}.",
]
OTHER_DIGITS = [str.maketrans("0123456789", digits) for digits in ("０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९")]


def of_integer(n: int) -> list[str]:
    grouped = f"{n:,}"
    return [
        *(str(n), grouped, grouped.replace(",", "{,}"), grouped.replace(",", "\\,"), grouped.replace(",", "\\ ")),
        *(grouped.replace(",", "\u202f"), grouped.replace(",", "'"), f"{n}.0", f"{n}.00", f"+{n}"[n < 0 :]),
        *(f"{n}e0", f"{n}0e-1", rf"{n}\times 10^{{0}}", rf"\frac{{{2 * n}}}{{2}}", f"x = {n}", rf"\text{{{n}}}"),
        *(f"{n}".translate(table) for table in OTHER_DIGITS),
        *(str(n).replace("-", "−"), rf"{n}\text{{ apples}}", f"{n} people", f'{{"answer": {n}}}'),
    ]


def of_fraction(value: Fraction) -> list[str]:
    over, under, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    whole, rest = divmod(over, under)
    written = [
        *(f"{sign}{over}/{under}", rf"{sign}\frac{{{over}}}{{{under}}}", rf"{sign}\dfrac{{{3 * over}}}{{{3 * under}}}"),
        rf"{sign}{over}\div {under}",
    ]
    if whole and rest:
        written += [rf"{sign}{whole}\frac{{{rest}}}{{{under}}}", f"{sign}{whole} {rest}/{under}"]
    if under in (3, 7, 9, 11, 13, 27, 37):
        length = next(size for size in range(1, 7) if (10**size - 1) % under == 0)
        block = f"{rest * (10**length - 1) // under:0{length}d}"
        written += [f"{sign}{whole}.\\overline{{{block}}}", f"{sign}{whole}.({block})", f"{sign}{whole}.{block * 3}..."]
        written += [f"{sign}{whole}.{block * 3}\\ldots", f"{sign}{whole}.\\bar{{{block}}}"]
    return written


def of_decimal(units: int, cents: str) -> list[str]:
    grouped, whole = f"{units:,}", units * 100 + int(cents)
    return [
        *(f"{units}.{cents}", f"{grouped}.{cents}", f"{units},{cents}", f"{units}.{cents}0", f"{whole}e-2"),
        *(grouped.replace(",", ".") + f",{cents}", grouped.replace(",", " ") + f",{cents}", f"\\${units}.{cents}"),
        *(rf"{whole}\times 10^{{-2}}", f"{whole} × 10⁻²", rf"\frac{{{whole}}}{{100}}"),
    ]


def of_interval(a: int, b: int) -> list[str]:
    return [
        *(f"({a},{b})", rf"\left({a}, {b}\right)", f"{a}<x<{b}", f"{b}>x>{a}", rf"x\in({a},{b})", f"x ∈ ({a}, {b})"),
        *(rf"\{{x : {a}<x<{b}\}}", rf"\{{x \mid {a} < x < {b}\}}", rf"x>{a} \text{{ and }} x<{b}", f"{a}&lt;x&lt;{b}"),
    ]


def of_set(members: list[int]) -> list[str]:
    turned = members[::-1]
    joined, back = ", ".join(map(str, members)), ", ".join(map(str, turned))
    named = [f"x={n}" for n in members]
    return [
        *(rf"\{{{joined}\}}", rf"\{{{back}\}}", rf"\left\{{{back}\right\}}", rf"\lbrace {joined} \rbrace", joined),
        *(back, rf"{', '.join(map(str, members[:-1]))} \text{{ and }} {members[-1]}", " or ".join(named)),
    ]


def of_length(metres: int) -> list[str]:
    return [
        *(rf"{metres}\text{{ m}}", f"{metres} m", f"{metres} meters", f"{metres}m"),
        *(f"{metres * 100} cm", rf"{metres * 100}\text{{ centimeters}}", f"{metres * 1000}\\,\\mathrm{{mm}}"),
        rf"\frac{{{metres}}}{{1000}}\text{{ km}}",
    ]


def draws(random):
    """Writings of a value, its gold, and a gold of another value."""
    n = int(random.integers(1000, 10**7)) * (-1 if random.integers(0, 2) else 1)
    yield of_integer(n), str(n), str(n + int(random.integers(1, 9)))
    under = int(random.choice([3, 7, 9, 11, 27, 8, 20]))
    value = Fraction(int(random.integers(1, 40)) * under + int(random.integers(1, 3)), under)
    yield (
        of_fraction(value),
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
        rf"\frac{{{value.numerator + 1}}}{{{under}}}",
    )
    units, cents = int(random.integers(1000, 10**6)), f"{random.integers(1, 99):02d}"
    yield of_decimal(units, cents), f"{units}.{cents}", f"{units}.{int(cents) + 1:02d}"
    a, b = sorted(int(x) for x in random.choice(np.arange(-50, 50), 2, replace=False))
    yield of_interval(a, b), f"({a},{b})", f"({a},{b + 1})"
    members = [int(x) for x in random.choice(np.arange(1, 99), int(random.integers(2, 5)), replace=False)]
    yield of_set(members), rf"\{{{','.join(map(str, members))}\}}", rf"\{{{','.join(map(str, [*members[:-1], 100]))}\}}"
    metres = int(random.integers(2, 900))
    yield of_length(metres), rf"{metres}\text{{ m}}", rf"{metres + 1}\text{{ m}}"


def test_an_answer_equals_itself_in_every_writing_and_no_other():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(3):
        for written, gold, other in draws(random):
            dress = DRESSES[int(random.integers(len(DRESSES)))]
            plain = [text for text in written if "answer" not in text]
            for text in [*written, *(dress(text) for text in plain[:2])]:
                assert passes(text, gold), (text, gold)
                assert not passes(text, other), (text, other)


def test_every_dress_leaves_a_value_as_it_is():
    for dress in DRESSES:
        for gold, other in (("7", "8"), ("x+1", "x+2"), ("\\frac{3}{4}", "\\frac{3}{5}")):
            assert passes(dress(gold), gold), dress(gold)
            assert not passes(dress(gold), other), dress(gold)
            assert "$" in dress("") or "\\(" in dress("") or spelled(dress(gold)) == spelled(gold), dress(gold)


def test_the_numeric_kind_reads_the_same_writings():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for written, gold, other in list(draws(random))[:3]:
        for text in written:
            assert passes(text, gold, NumericVerifier()), (text, gold)
            assert not passes(text, other, NumericVerifier()), (text, other)


@pytest.mark.parametrize("name", sorted({name for name in SIZES if name.isalpha() and len(name) > 1}))
def test_a_unit_is_itself_and_one_with_none(name):
    own = rf"12\text{{ {name}}}"
    assert passes(own, own) and passes(own, "12") and passes("12", own) and not passes(own, "13")
    others = [
        other for other in ("kg", "km", "hours", "dollars") if SIZES.get(other.rstrip("s"), ("",))[0] != SIZES[name][0]
    ]
    assert not any(passes(own, rf"12\text{{ {other}}}") for other in others)


def test_words_that_take_back_are_no_unit():
    for word in sorted(TAKES_BACK):
        assert read_quantity(rf"4\text{{ {word}}}") is None and read_quantity(f"4 {word} five") is None, word
        assert not passes(rf"4 \text{{ {word} five}}", "4"), word


# ---- what reads two ways --------------------------------------------------------------------------------------------


def test_numbers_side_by_side_are_never_put_together():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(100):
        a, b = int(random.integers(0, 99)), int(random.integers(0, 99))
        space = str(random.choice([" ", "\\ ", "\\,", "\\;", "~", "\u00a0", "\\quad "]))
        text = f"{a}{space}{b}"
        assert ambiguous(spelled(text)), text
        for gold in {a + b, a * b, a, b, int(f"{a}{b}")}:
            assert not passes(text, str(gold)), (text, gold)
        assert passes(text, text)


def test_what_is_written_below_or_above_a_number_is_not_dropped():
    for text in ("4_{1}", "4_2", "1_000", "12_{3}", "4_{x}"):
        assert not passes(text, text.partition("_")[0]), text
        assert passes(text, text)
    for text in ("4^2", "4²", "4'", "4!", "\\sqrt{4}", "-4", "4i", "4x", "\\overline{4}5"):
        assert not passes(text, "4"), text


def test_spelling_is_idempotent_and_leaves_what_is_long():
    rows = [row["gold"] for row in rows_of("answer_forms_ours.jsonl")]
    rows += [row["answer"] for row in rows_of("answer_forms_ours.jsonl")]
    changed = [text for text in rows if spelled(spelled(text)) != spelled(text)]
    assert not changed
    assert spelled("½" * LONGEST + "½") == "½" * LONGEST + "½" and characters("x²") == "x^{2}"
    assert part_unit("25\\pi \\text{ cm}^2")[0] == "25\\pi" and part_unit("a + b")[1] is None


REPEATED = (
    *("\\text{a", "\\text{ or }", "{", "(2)", "2(3)", "1 000 ", "123 ", "1,000,", "0.\\overline{3", "0.1...", "cm "),
    *("1 cm/", "\\begin{pmatrix}1&", "\\frac12", "**", "`", "<b>", '<b a="', "&lt;", "\\textcolor{red}{", "\\mathbf{"),
    *("½", "²", "√(", "x'", "answer: ", "=", "1_{", "^\\circ", "3:30 p.m.", "(A) ", "|", "\\{x:", "2!^", "17 \\bmod"),
    *("\\gcd(1,", "1e5", "\\left(", "per ", '{"answer": ', "<x<", "x<1 or "),
)


def test_everything_is_spelled_in_linear_time():
    start = time.perf_counter()
    for part in REPEATED:
        for text in (part * (2000 // len(part)), part * (20_000 // len(part))):
            for response in (Response(f"\\boxed{{{text}}}", "x+1"), Response("\\boxed{x+1}", text)):
                MathVerifier().prepare(response)
                NumericVerifier().prepare(response)
    assert time.perf_counter() - start < 60  # seconds; about 5, and quadratic time would be minutes


# ---- nothing that a response holds changes the verdict of another ---------------------------------------------------

STRANGE = [
    ("4e0", "4"),
    ("\\log_{1.0000001}(10^{300})", "5"),
    ("\\lfloor 10^{100}\\pi\\rfloor", "3"),
    ("0=0", "x=5"),
    ("²", "5"),
    ("\\frac{x^2-1}{x-1}", "x+1"),
    ("e^{i\\pi}+1", "0"),
]


@pytest.mark.parametrize("processes", [1, 3])
def test_verdicts_do_not_hang_on_what_was_judged_before(processes):
    rows = [(row["answer"], row["gold"]) for row in rows_of("answer_forms_ours.jsonl")]
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    some = [*STRANGE, *(rows[i] for i in random.choice(len(rows), 60, replace=False))]
    verdicts = []
    pool = VerifierPool(MathVerifier(), timeout_seconds=PATIENT, processes=processes)
    for _ in range(2):
        order = random.permutation(len(some))
        outcomes = pool.judge([Response(f"\\boxed{{{some[i][0]}}}", some[i][1]) for i in order])
        judged = {int(i): outcome.judgement for i, outcome in zip(order, outcomes, strict=True)}
        verdicts.append([judged[i] for i in range(len(some))])
    pool.close()
    assert all(a == b for a, b in pairwise(verdicts)), [
        (some[i], a, b) for i, (a, b) in enumerate(zip(*verdicts, strict=True)) if a != b
    ]
