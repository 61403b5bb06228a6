"""Problems of several strategies: true steps, strategies told apart in either wording, splits as the seed says."""

import random
import re
from collections import Counter
from itertools import combinations

import pytest

from tutorloop.lab import STRATEGY_SPLITS, data_path, rows
from tutorloop.lab.strategies import build, second
from tutorloop.lab.strategies.problems import (
    DESCRIPTIONS,
    LARGEST,
    PHRASES,
    STRATEGIES,
    STUDENT,
    TEACHER,
    Problem,
    carelessly,
    draw,
    guess,
    recognise,
    rounded,
    work,
)

CHAIN = Problem(terms=(47, 38, -19))
CHAINS = ("strategies-train", "strategies-test", "strategies-ood")


def drawn(count: int, seed: int) -> list[Problem]:
    rng = random.Random(seed)
    return [draw(split, rng) for split in ("test", "ood") for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?:(?<= )-)?\d+", text)]


def claims(line: str) -> list[tuple[int, int]]:
    """What a line says is equal, read from its signs or, where it has none, from its words."""
    sides = [re.findall(r"-?\d+|[+-]", side) for side in line.split("=")]
    if len(sides) > 1:
        values = [eval(" ".join(side)) for side in sides]
        return [(values[0], value) for value in values[1:]]
    found = numbers(line)
    if re.match("round |call ", line):
        number, full, over = found
        return [(number, full - over)]
    if re.match("from|between", line):
        low, high, gap = found
        return [(high - low, gap)]
    return []  # a step of `decompose`, which goes on from the one before


def check(text: str, terms: tuple[int, ...]) -> None:
    """Every line is true, the last result is the box's and the chain's value, and every number of the chain is used."""
    *lines, last = text.split("\n")
    assert last == f"\\boxed{{{sum(terms)}}}", text
    assert len(lines) >= 3, text
    for line in lines:
        assert all(left == right for left, right in claims(line)), (line, text)
    assert numbers(lines[-1])[-1] == sum(terms), text
    if recognise(text)[0] == "decompose":
        at, *seen = numbers(lines[0])
        assert (at, seen) == (terms[0], [])
        for term, line in zip(terms[1:], lines[1:-1], strict=True):
            way = -1 if re.match("take|down", line) else 1
            tens, there, ones, then = numbers(line)
            assert (tens % 10, ones < 10, way * (tens + ones)) == (0, True, term), line
            assert (there, then) == (at + way * tens, at + term), line
            at = then
    assert all(-9 <= n <= LARGEST for n in numbers(text)), text


@pytest.mark.parametrize("split", CHAINS)
def test_every_solution_of_a_split_is_true_and_of_another_strategy(split):
    counted = Counter()
    for row in rows(split):
        terms = tuple(map(int, re.findall(r"[+-]?\d+", row["prompt"].replace(" ", ""))))
        assert str(sum(terms)) == row["answer"], row
        assert row["solution"] == row["solutions"][0] and len(set(row["strategies"])) == len(row["solutions"]) >= 3, row
        assert [recognise(text) for text in row["solutions"]] == [(name, TEACHER) for name in row["strategies"]], row
        assert row["strategy"] in DESCRIPTIONS[row["strategies"][0]] and not re.search(r"\d", row["strategy"]), row
        for text in row["solutions"]:
            check(text, terms)
            if split != "strategies-ood":
                assert 3 <= len(text.split("\n")) - 1 <= 8, text
        counted[row["strategies"][0]] += 1
    assert len(rows(split)) == build.SPLIT_SIZES[split]
    assert set(counted) == set(STRATEGIES)


def test_both_wordings_of_every_strategy_are_true_on_fresh_problems():
    for problem in drawn(100, seed=1):
        for strategy in problem.strategies:
            for wording in (TEACHER, STUDENT):
                text = work(problem, strategy, wording)
                assert recognise(text) == (strategy, wording)
                check(text, problem.terms)


def masked(text: str) -> list[str]:
    return [re.sub(r"-?\d+", "#", line) for line in text.split("\n")[:-1]]


def test_strategies_differ_where_numbers_are_masked_and_wordings_share_no_step():
    for problem in drawn(50, seed=2):
        seen = {(s, w): masked(work(problem, s, w)) for s in problem.strategies for w in (TEACHER, STUDENT)}
        for one, other in combinations(seen, 2):
            assert set(seen[one]).isdisjoint(seen[other]), (one, other)
        for strategy in problem.strategies:
            words = [set(re.findall(r"[a-z]+", " ".join(seen[strategy, w]))) for w in (TEACHER, STUDENT)]
            assert len(words[0] & words[1]) <= 1, (strategy, words)
            signs = [[re.sub(r"[a-z: ]+", " ", step).strip() for step in seen[strategy, w]] for w in (TEACHER, STUDENT)]
            assert signs[0] == signs[1], "a wording is other words around the same step"


def test_the_phrases_of_all_steps_are_told_apart_by_words_alone():
    phrases = [p for wordings in PHRASES.values() for both in wordings.values() for p in set(both.values())]
    words = [" ".join(re.findall(r"[a-z]+", phrase)) for phrase in phrases]
    assert len(set(words)) == len(words)


def test_guesses_by_hand():
    assert carelessly(CHAIN) == 64  # 47 + 38 without the carry is 75; 75 - 19 with the smaller digit from the larger
    assert rounded(CHAIN) == (50, 40, -20)
    text = guess(CHAIN, "estimate", 70)
    assert (text, recognise(text)) == ("roughly 50 + 40 - 20 = 70\n\\boxed{70}", ("estimate", ""))
    text = guess(CHAIN, "jump", 66)
    assert (text, recognise(text)) == ("47 + 38 - 19 = 66\n\\boxed{66}", ("jump", ""))
    assert recognise("\\boxed{66}") == recognise("I do not know\nwhat to do\n\\boxed{66}") == ("", "")
    mixed = "tens: 40 + 30 = 70\nsmall parts 7 + 8 = 15\ntogether: 70 + 15 = 85\n\\boxed{85}"
    assert recognise(mixed) == ("columns", "mixed")
    assert recognise(mixed.replace("small parts", "add")) == ("", "")


def test_files_are_what_the_seed_makes_small_and_disjoint():
    made = build.splits(seed=0)
    for split in STRATEGY_SPLITS:
        assert data_path(split).read_text(encoding="utf-8") == build.as_text(made[split]), split
    assert sum(data_path(split).stat().st_size for split in STRATEGY_SPLITS) <= 2_000_000
    chains = [re.sub(r"[^\d+-]", "", row["prompt"]) for split in CHAINS for row in rows(split)]
    assert len(set(chains)) == len(chains)
    questions = [row["prompt"] for split in build.SECOND_SIZES for row in rows(split)]
    assert len(set(questions)) == len(questions) == sum(build.SECOND_SIZES.values())
    ids = [row["id"] for split in STRATEGY_SPLITS for row in rows(split)]
    assert len(set(ids)) == len(ids)


def test_the_second_skill_is_right():
    for row in rows("second-test") + rows("second-train"):
        what, digits = re.fullmatch(r"(Sort|Reverse) the digits of ([1-9]{3,5})\.", row["prompt"]).groups()
        assert list(row["answer"]) == (sorted(digits) if what == "Sort" else list(reversed(digits))), row
        assert row["solution"] == f"\\boxed{{{row['answer']}}}" and row["family"] in second.FAMILIES, row
