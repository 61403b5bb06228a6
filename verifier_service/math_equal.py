"""Whether two formulas have the same value: computed where they can be, else math-verify's word, checked.

math-verify compares with rounding and by solving, and says yes to what it cannot tell apart: to tiny numbers, to
equations without a solution. Here numbers are compared to 60 digits, letters stand for random numbers, equations must
be multiples of one another or have the same solutions, and the members of lists are compared one by one. What that
leaves open, such as the order of a list or words, math-verify decides. It is faster, too: most answers are told from
the gold at the first random point, where math-verify simplifies their difference.
"""

import random
from collections.abc import Sequence
from typing import Any

from latex2sympy2_extended.logic import And
from math_verify import verify
from math_verify.grader import (
    get_pct_val,
    is_assignment_relation,
    is_equation,
    take_first_relation,
    take_last_relation,
    unwrap_fcs,
)
from sympy import (
    Abs,
    Basic,
    Eq,
    Expr,
    FiniteSet,
    Float,
    I,
    Interval,
    Limit,
    MatrixBase,
    Ne,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    Tuple,
    simplify,
    solve,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from .latex import UNSOLVED

SAME = 1e-60  # share of the larger number; sympy computes a difference to up to 100 digits until some are sure
NOTHING = 1e-60  # so small that it may be what is left of 0
DIGITS = 30
PROPORTIONAL = 1e-25  # share of a ratio
SAME_DECIMAL = 5e-6  # of decimals: what math-verify's six places leave of a third
BOUNDED = (Sum, Product, Limit)
POSITIVE, SIGNED = 2, 2  # random points; at those of any sign, a root's or a logarithm's branch may differ

Formula = Any  # a sympy Basic or matrix: their types say too little of their methods


def equal(gold: Formula, answer: Formula) -> bool:
    """Whether a response's formula has the gold's value. May hang; raises what math-verify raises."""
    gold, answer = _imaginary(gold), _imaginary(answer)
    answer = _renamed(gold, answer)
    verdict = _verdict(gold, answer)
    return verify(gold, answer, timeout_seconds=None, raise_on_error=True) if verdict is None else verdict


def exact_number(value: object) -> Rational | None:
    """The exact rational that an expression is, if it is one: decimals are not, they compare with rounding."""
    if not isinstance(value, Basic) or value.has(Float) or not _is_rational(value):
        return None
    value = value.doit()
    return value if isinstance(value, Rational) else None


def _is_rational(value: Basic) -> bool:
    """Whether sympy knows it; what raises where it is asked first is not known, then or later."""
    try:
        return bool(value.is_number and value.is_rational)
    except (ArithmeticError, ValueError):
        return False


def _imaginary(value: Formula) -> Formula:
    """With `i` as the imaginary unit, where it is no index."""
    named = [letter for letter in value.free_symbols if letter.name == "i"] if hasattr(value, "free_symbols") else []
    return (
        value.xreplace(dict.fromkeys(named, I))
        if named and isinstance(value, (Expr, Set, Tuple, MatrixBase))
        else value
    )


def _renamed(gold: Formula, answer: Formula) -> Formula:
    """The answer's f(t) as the gold's f(x)."""
    left, right = ({f for f in formula.atoms(AppliedUndef) if len(f.args) == 1} for formula in (gold, answer))
    (wanted, *others), (found, *more) = ({f.args[0] for f in functions} or {None} for functions in (left, right))
    if others or more or not isinstance(wanted, Symbol) or not isinstance(found, Symbol):
        return answer
    return answer if wanted in answer.free_symbols else answer.xreplace({found: wanted})


def _verdict(gold: Formula, answer: Formula) -> bool | None:
    """Yes or no where that is sure, else None."""
    if gold == answer:
        return True
    gold, answer = _sides(*_solutions(gold, answer))
    if gold == answer:
        return True
    if isinstance(gold, And) and isinstance(answer, And):
        return _in_order(_relations(gold), _relations(answer))
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and _in_order(gold.flat(), answer.flat())
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return _in_order(gold.args, answer.args)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        same = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return same and _in_order((gold.start, gold.end), (answer.start, answer.end))
    if isinstance(gold, (Set, Tuple)) or isinstance(answer, (Set, Tuple)):
        return _same_members(gold, answer)
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return _same_value(gold, answer)
    return None


def _solutions(gold: Formula, answer: Formula) -> tuple[Formula, Formula]:
    """Both as the sets of numbers that they speak of, where one is such a set or both are inequalities in one letter.

    An inequality must be a solution, the letter alone against numbers: `x^2<4` is an exercise, and not yet `(-2,2)`.
    """
    if isinstance(answer, Ne) and isinstance(gold, (Relational, And)):
        return gold, answer
    left, right = _spoken_of(gold), _spoken_of(answer)
    if left is None or right is None or isinstance(left, FiniteSet) or isinstance(right, FiniteSet):
        return gold, answer
    kinds = [isinstance(value, (Relational, And)) and not isinstance(value, Eq) for value in (gold, answer)]
    if all(kinds) and len(gold.free_symbols | answer.free_symbols) > 1:
        return gold, answer
    return left, right


def _spoken_of(value: Formula) -> Set | None:
    """A set, the S of `x in S`, or the solutions that an inequality spells out; None of anything else."""
    if isinstance(value, Set):
        return value
    if isinstance(value, Eq):
        return value.rhs if isinstance(value.rhs, Set) and isinstance(value.lhs, Symbol) else None
    if not isinstance(value, (Relational, And)) or len(value.free_symbols) != 1:
        return None
    relations = value.args if isinstance(value, And) else (value,)
    if not all(isinstance(one, Relational) and not isinstance(one, Eq) and _is_solved(one) for one in relations):
        return None
    exact = {decimal: Rational(str(decimal)) for decimal in value.atoms(Float)}
    try:
        return _numbers(value.xreplace(exact))
    except UNSOLVED:  # sympy cannot
        return None


def _is_solved(relation: Relational) -> bool:
    """The letter, or the absolute value of something linear in it, against a number."""
    sides = [side for side in relation.args if side.free_symbols]
    if len(sides) != 1:
        return False
    inner: Any = sides[0].args[0] if isinstance(sides[0], Abs) else sides[0]
    (letter,) = inner.free_symbols
    return inner == letter or (
        isinstance(sides[0], Abs) and bool(inner.is_polynomial(letter)) and inner.diff(letter).is_number
    )


def _sides(gold: Formula, answer: Formula) -> tuple[Formula, Formula]:
    """What math-verify compares: `x = 5` with 5 by its right side, of `x = 2 + 3 = 5` the ends, of x < 5 the set."""
    gold, answer = _ends(gold), _ends(answer)
    if isinstance(gold, (Relational, And)) and isinstance(answer, Set):
        return (gold, answer) if is_equation(gold) else (_numbers(gold), answer)
    if is_equation(answer) and not is_equation(gold):
        return gold, take_last_relation(answer).rhs
    if is_assignment_relation(gold) and not is_equation(answer):
        return take_last_relation(gold).rhs, answer
    return gold, answer


def _numbers(relation: Formula) -> Formula:
    """The numbers for which it holds."""
    plain: Any = unwrap_fcs(relation)
    return plain.as_set()


def _ends(value: Formula) -> Formula:
    if isinstance(value, And) and is_assignment_relation(value):
        return Eq(take_first_relation(value).lhs, take_last_relation(value).rhs, evaluate=False)
    return value


def _relations(chain: Formula) -> Sequence[Formula]:
    """The parts of `1 < x < 2`, in their order."""
    return chain._unsorted_args


def _in_order(left: Sequence[Formula], right: Sequence[Formula]) -> bool | None:
    if len(left) != len(right):
        return False
    verdicts = {_verdict(a, b) for a, b in zip(left, right, strict=True)}
    return False if False in verdicts else None if None in verdicts else True


def _same_members(gold: Formula, answer: Formula) -> bool | None:
    """Of finite sets, one to one in any order; of a set and a tuple or a number only that they cannot be the same."""
    left, right = _members(gold), _members(answer)
    if left is None or right is None:
        return None
    if len(left) != len(right):
        return False
    sure, rest = isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet), list(right)
    for member in left:
        verdicts = [_verdict(member, other) for other in rest]
        likely = max(range(len(rest)), key=lambda i: {True: 2, None: 1, False: 0}[verdicts[i]])
        if verdicts[likely] is False:
            return False
        sure &= verdicts[likely] is True
        del rest[likely]
    return sure or None


def _members(value: Formula) -> Sequence[Formula] | None:
    """The members of a finite set, the parts of a tuple, the ends of an open interval; None of other sets."""
    if isinstance(value, (FiniteSet, Tuple)):
        return value.args
    if isinstance(value, Interval) and value.is_open:
        return (value.start, value.end)
    return None if isinstance(value, Set) else (value,)


def _same_relation(gold: Relational, answer: Relational) -> bool | None:
    """Multiples of one another, or in one letter and with the same solutions, which are some."""
    if not all(isinstance(side, Expr) for side in (*gold.args, *answer.args)):
        return gold.lhs == answer.lhs and _verdict(gold.rhs, answer.rhs)
    left, right = _difference(*gold.args), _difference(*answer.args)
    values = [_at(point, left, right) for point in _points(left, right)]
    if any(None in pair for pair in values):
        return type(gold) is type(answer) and bool(simplify(_difference(left, right)) == 0)
    empty = [all(abs(pair[side]) <= NOTHING for pair in values) for side in (0, 1)]
    if any(empty):  # 0 = 0 says nothing
        return all(empty) and type(gold) is type(answer)
    ratios = [a / b for a, b in values if b]
    if len(ratios) == len(values) and all(abs(r - ratios[0]) <= PROPORTIONAL * abs(r) for r in ratios):
        same_sign = type(gold) is type(answer)
        if isinstance(gold, (Eq, Ne)):
            return same_sign
        return same_sign == (ratios[0] > 0) and (same_sign or gold.reversed.func is answer.func)
    letters = left.free_symbols | right.free_symbols
    if len(letters) != 1 or Ne in (type(gold), type(answer)) or left.atoms(AppliedUndef) | right.atoms(AppliedUndef):
        return False
    try:
        if isinstance(gold, Eq):
            return None if solve(gold, *letters) and solve(answer, *letters) else False
        return _numbers(gold) == _numbers(answer)
    except NotImplementedError:  # sympy cannot
        return False


def _same_value(gold: Expr, answer: Expr) -> bool | None:
    """Told apart at a random point, or equal at several; words, decimals and percent are left open."""
    if any(isinstance(value, Symbol) and len(value.name) > 1 for value in (gold, answer)):
        return None
    left, right = exact_number(gold), exact_number(answer)
    if left is not None and right is not None:
        return left == right
    if get_pct_val(gold, gold) == get_pct_val(answer, answer):
        return None  # math-verify: 9% is 9 where they are whole
    decimal = gold.has(Float) or answer.has(Float)
    for i, point in enumerate(_points(gold, answer)):
        difference, a, b = _at(point, _difference(gold, answer), gold, answer)
        if difference is None or a is None or b is None or max(abs(a), abs(b)) <= NOTHING:
            return bool(simplify(_difference(gold, answer)) == 0)
        if abs(difference) > (SAME_DECIMAL if decimal else SAME) * max(abs(a), abs(b)):
            return False if i < POSITIVE else None
    return None if decimal else True


def _difference(a: Any, b: Any) -> Expr:
    return a - b


def _points(*formulas: Expr) -> list[dict[Basic, Basic]]:
    """Random values for the letters and the functions without a name of their own; one point where there are none."""
    letters = {letter for formula in formulas for letter in formula.free_symbols | formula.atoms(AppliedUndef)}
    ordered, draw = sorted(letters, key=str), random.Random(0)
    if not ordered:
        return [{}]
    return [
        {letter: Rational(draw.randrange(10**5, 3 * 10**6) * draw.choice(signs), 10**6) for letter in ordered}
        for signs in [(1,)] * POSITIVE + [(1, -1)] * SIGNED
    ]


def _at(point: dict[Basic, Basic], *formulas: Formula) -> list[Any]:
    """The formulas' values at a point to DIGITS digits; None of those that have none, or whose bounds have letters."""
    if point and any(formula.has(*BOUNDED) for formula in formulas):
        return [None] * len(formulas)
    values = [formula.xreplace(point).doit().evalf(DIGITS) for formula in formulas]
    return [value if value.is_number and value.is_finite else None for value in values]
