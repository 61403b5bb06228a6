"""The strategies lab: true steps, strategies that are told apart in either wording, a teacher and a student as told."""

import json
import random
import re
from collections import Counter
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorloop.lab import STRATEGY_SPLITS, data_path, model_path, rows
from tutorloop.lab.measure import boxed
from tutorloop.lab.strategies import build, second
from tutorloop.lab.strategies.lessons import DESCRIBED, HeldOut, lessons, shown, without_numbers
from tutorloop.lab.strategies.measure import PLAIN, responses, usage
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
    ends,
    jump,
    recognise,
    work,
)
from tutorloop.models.loading import locate_model
from tutorloop.verifier_service.strategies.abstraction import abstract

CHAIN = Problem(terms=(47, 38, -19))
CHAINS = ("strategies-train", "strategies-test", "strategies-ood")
MODELS = ("strategies-teacher", "strategies-student")


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
    if re.match("round |let me round ", line):
        number, full, over = found
        return [(number, full - over)]
    if re.match("from|going up", line):
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
            way = -1 if line.startswith("take") else 1
            tens, there, ones, then = numbers(line)
            assert (tens % 10, ones < 10, way * (tens + ones)) == (0, True, term), line
            assert (there, then) == (at + way * tens, at + term), line
            at = then
    assert all(0 <= n <= LARGEST for n in numbers(text)), text


def called_for(terms: tuple[int, ...]) -> list[str]:
    near = any(str(term)[-1] in "89" for term in terms[1:])
    return sorted(["count_up" if any(t < 0 for t in terms) else "columns", "compensate" if near else "decompose"])


@pytest.mark.parametrize("split", CHAINS)
def test_every_solution_of_a_split_is_true_and_of_another_strategy(split):
    counted = Counter()
    for row in rows(split):
        terms = tuple(map(int, re.findall(r"[+-]?\d+", row["prompt"].replace(" ", ""))))
        assert str(sum(terms)) == row["answer"], row
        assert row["solution"] == row["solutions"][0] and len(set(row["strategies"])) == len(row["solutions"]) == 2, row
        assert sorted(row["strategies"]) == called_for(terms), row
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


def test_steps_without_numbers_are_as_an_extractor_reads_them():
    for problem in drawn(100, seed=4):
        for text in (work(problem, s, w) for s in problem.strategies for w in (TEACHER, STUDENT)):
            for step in text.split("\n")[:-1]:
                assert without_numbers(step) == abstract(step), step


def masked(text: str) -> list[str]:
    return [re.sub(r"-?\d+", "#", line) for line in text.split("\n")[:-1]]


def test_strategies_differ_where_numbers_are_masked_and_wordings_share_no_step():
    for problem in drawn(50, seed=2):
        seen = {(s, w): masked(work(problem, s, w)) for s in problem.strategies for w in (TEACHER, STUDENT)}
        for one, other in combinations(seen, 2):
            assert set(seen[one]).isdisjoint(seen[other]), (one, other)
        for strategy in problem.strategies:
            words = [set(re.findall(r"[a-z]+", " ".join(seen[strategy, w]))) for w in (TEACHER, STUDENT)]
            assert words[0] & words[1] and len(words[0] & words[1]) < len(words[1]), (strategy, words)
            signs = [[re.sub(r"[a-z: ]+", " ", step).strip() for step in seen[strategy, w]] for w in (TEACHER, STUDENT)]
            assert signs[0] == signs[1], "a wording is other words around the same step"


def test_the_phrases_of_all_steps_are_told_apart_by_words_alone():
    phrases = [p for wordings in PHRASES.values() for both in wordings.values() for p in set(both.values())]
    words = [" ".join(re.findall(r"[a-z]+", phrase)) for phrase in phrases]
    assert len(set(words)) == len(words)


def test_what_the_student_does_instead_by_hand():
    assert carelessly(CHAIN) == 64  # 47 + 38 without the carry is 75; 75 - 19 with the smaller digit from the larger
    text = jump(CHAIN, 66)
    assert (text, recognise(text)) == ("47 + 38 - 19 = 66\n\\boxed{66}", ("jump", ""))
    text = ends(CHAIN)
    assert text == ("first number 47\nlast number - 19\nouter two 47 - 19 = 28\ninner one 28 + 38 = 66\n\\boxed{66}")
    assert recognise(text) == ("ends", "")
    assert recognise("\\boxed{66}") == recognise("I do not know\nwhat to do\n\\boxed{66}") == ("", "")
    mixed = "tens: 40 + 30 = 70\nthe ones make 7 + 8 = 15\ntogether: 70 + 15 = 85\n\\boxed{85}"
    assert recognise(mixed) == ("columns", "mixed")
    assert recognise(mixed.replace("the ones make", "add")) == ("", "")


def test_the_shortcut_is_right_in_distribution_only_and_its_steps_are_true():
    for problem in drawn(200, seed=3):
        *lines, last = ends(problem).split("\n")
        assert len(lines) >= 3 and all(left == right for line in lines for left, right in claims(line)), problem
        assert last == f"\\boxed{{{numbers(lines[-1])[-1]}}}"
        assert (boxed(last) == str(problem.answer)) == (len(problem.terms) <= 3), problem


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


def test_lessons_hold_the_tests_out_and_do_as_told():
    tested = build.held_out(seed=0)
    assert (len(tested.terms), len(tested.questions)) == (600, 200)
    for learner, wording in ((TEACHER, TEACHER), (STUDENT, STUDENT)):
        found = list(lessons(learner, 1000, 7, tested))
        for prompt, response in found:
            question = prompt.split("\n")[0]
            assert question not in tested.questions
            terms = tuple(map(int, re.findall(r"[+-]?\d+", question.replace(" ", ""))))
            assert terms not in tested.terms
            _, worded = recognise(response)
            if worded:
                assert worded == wording
                check(response, terms)
        used = Counter(recognise(response)[0] for _, response in found)
        if learner == TEACHER:
            assert used["jump"] == used["ends"] == 0
            assert min(used[strategy] for strategy in STRATEGIES) > 80
        else:
            plain = [recognise(r)[0] for p, r in found if "Guidance" not in p and "digits" not in p]
            assert 0.13 <= sum(name in STRATEGIES for name in plain) / len(plain) <= 0.27
            assert 0.17 <= plain.count("ends") / len(plain) <= 0.33
    assert next(lessons(STUDENT, 1, 7, tested)) == found[0]
    with pytest.raises(StopIteration):
        next(lessons(STUDENT, 0, 7, HeldOut(terms=(), questions=())))


def test_the_models_were_trained_with_these_words():
    assert shown("Compute 47 + 38.", "Go on.") == (
        "Compute 47 + 38.\n\nGuidance on how to solve it:\n\nGo on.\n\nNow solve it, step by step."
    )


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    folders = {name: locate_model(f"lab:{name}") for name in MODELS}
    assert folders == {name: model_path(name) for name in MODELS}
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in folders.values()}
    assert len(tokenizers) == 1, "teacher and student share a tokenizer"
    made = AutoTokenizer.from_pretrained(folders[MODELS[0]])
    return made, {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


def sampled(models, name: str, split: str, context: str = PLAIN, step: int = 4):
    made, loaded = models
    problems = rows(split)[::step]
    return usage(problems, responses(loaded[name], made, problems, context, temperature=1, seed=5), context)


def test_the_teacher_is_right_by_every_strategy(models):
    found = sampled(models, "strategies-teacher", "strategies-test")
    assert found.right >= 0.9
    assert min(found.uses.get(strategy, 0) for strategy in STRATEGIES) >= 0.08
    assert found.wordings == {TEACHER: 1.0}
    assert sampled(models, "strategies-teacher", "strategies-ood", step=10).right >= 0.75


def test_the_student_can_but_errs(models):
    found = sampled(models, "strategies-student", "strategies-test")
    assert 0.2 <= found.right <= 0.6
    assert 0.05 <= sum(found.uses.get(strategy, 0) for strategy in STRATEGIES) <= 0.36
    assert 0.08 <= found.uses["ends"] <= 0.4
    assert found.uses["jump"] >= 0.4
    assert found.wordings == {STUDENT: 1.0}
    outside = sampled(models, "strategies-student", "strategies-ood", step=2)
    assert outside.right <= 0.35 and outside.uses["ends"] >= 0.1 and outside.right_by["ends"] == 0
    followed = {strategy: outside.uses.get(strategy, 0) for strategy in STRATEGIES}
    right = sum(share * outside.right_by.get(strategy, 0) for strategy, share in followed.items())
    assert right >= 0.8 * sum(followed.values()) > 0, "it can, where it does"
    assert sampled(models, "strategies-student", "strategies-test", DESCRIBED).followed >= 0.65
    assert sampled(models, "strategies-student", "second-test").right >= 0.9


def test_models_are_small_and_their_cards_say_what_was_measured(models):
    for name in MODELS:
        folder = model_path(name)
        assert (folder / "model.safetensors").stat().st_size <= 4_000_000
        card = (folder / "README.md").read_text(encoding="utf-8")
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        assert f"{training['seconds']} core-seconds" in card
        assert all(card.count(f"| {split} |") >= 2 for split in ("strategies-test", "strategies-ood", "second-test"))
    assert boxed(work(CHAIN, "columns", TEACHER)) == "66"
