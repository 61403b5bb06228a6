"""An audit of strategies: its figures against slow references, and what it reads of a run."""

import json
import math
import statistics
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from run_rows import fresh_rng
from strategy_runs import SUFFIX, chains, fit_chains, line, lines_of, metric_rows, solved, write_run

from tutorloop.cluster.recording.strategy_audit import STRANGERS, audit
from tutorloop.cluster.recording.strategy_audit import _Strangers as Strangers
from tutorloop.cluster.recording.strategy_checks import checks_of
from tutorloop.cluster.recording.strategy_figures import auc, mean_over_problems, student_t
from tutorloop.cluster.recording.strategy_page import write_audit
from tutorloop.cluster.recording.strategy_rollouts import LONG, MOST_TOKENS, NO_SOLUTION, OTHERS, OUTSIDE, UNREADABLE
from tutorloop.contracts.arrow import encode
from tutorloop.contracts.errors import RunFolderError, StrategyError
from tutorloop.contracts.records import Rollout
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.strategies.alignment import FEWEST_STEPS, align, best_of
from tutorloop.verifier_service.strategies.extractor import Extractor
from tutorloop.verifier_service.strategies.fit import steps_of
from tutorloop.verifier_service.strategies.solutions import Solutions
from tutorloop.verifier_service.strategies.worker import StrategyWorker

TWINS = 40
ALARM = "strategies: 2.0 strategies are in use, of 8.0 at first"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, and that of its strategies."""
    place, rng = tmp_path_factory.mktemp("audited"), fresh_rng()
    problems = chains(int(rng.integers(1000)))
    fit_chains(place / "strategies", problems)
    write_run(place / "run", place / "strategies", lines_of(problems, rng), metric_rows(rng, ALARM))
    return place / "run", place / "strategies"


@pytest.fixture(scope="module")
def found(run):
    return audit(run[0])


def another(run, to, lines, **changes):
    """A run with the same strategies and other rollouts."""
    return write_run(to, run[1], lines, [], **changes)


def rows_of(folder):
    return [json.loads(text) for text in (folder / "rollouts.jsonl").read_text().splitlines()]


# ---- figures -----------------------------------------------------------------------------------------------------


def test_auc_is_the_share_of_pairs():
    rng = fresh_rng()
    for _ in range(50):
        count = int(rng.integers(2, 40))
        scores, passed = rng.integers(0, 8, count) / 8, rng.random(count) < rng.random()
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[passed] for b in scores[~passed]]
        measured = auc(scores, passed, [int(p) for p in rng.integers(0, 6, count)])
        if not pairs:
            assert measured is None
            continue
        assert measured is not None
        np.testing.assert_allclose(measured.value, sum(pairs) / len(pairs), rtol=1e-12)
        if measured.low is not None:
            assert 0 <= measured.low <= measured.value <= measured.high <= 1 and measured.low < measured.high


def slow_interval(scores, passed, problems):
    """By loops over pairs, and a fine grid in place of the halving."""
    right, wrong = [i for i in range(len(scores)) if passed[i]], [i for i in range(len(scores)) if not passed[i]]

    def beats(i, j):
        return (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])

    value = statistics.mean(beats(i, j) for i in right for j in wrong)
    part = {i: (statistics.mean(beats(i, j) for j in wrong) - value) / len(right) for i in right}
    part |= {j: (statistics.mean(beats(i, j) for i in right) - value) / len(wrong) for j in wrong}
    whole = sum(sum(part[i] for i in part if problems[i] == name) ** 2 for name in set(problems))
    effect = max(1, whole / sum(own**2 for own in part.values()))
    m, n = max(1, len(right) / effect), max(1, len(wrong) / effect)
    theta = np.linspace(0, 1, 200_001)
    spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    inside = theta[(value - theta) ** 2 <= 1.959964**2 * theta * (1 - theta) * spread / (m * n)]
    return inside.min(), inside.max()


def test_the_interval_of_an_auc_is_newcombes_with_a_design_effect():
    rng = fresh_rng()
    for _ in range(10):
        problems = np.repeat(np.arange(12), 4)
        scores = rng.normal(size=12)[problems] + rng.normal(size=48)
        passed = scores + 2 * rng.normal(size=48) > 0
        measured = auc(scores, passed, problems.tolist())
        np.testing.assert_allclose((measured.low, measured.high), slow_interval(scores, passed, problems), atol=1e-5)


def test_the_interval_of_an_auc_holds_the_truth():
    """Rollouts of a problem resemble each other in both; the truth is of pairs of any problems."""
    rng = fresh_rng()

    def draw(count):
        problems = np.repeat(np.arange(count), 6)
        hard, alike = rng.normal(size=count)[problems], rng.normal(size=count)[problems]
        passed = rng.normal(size=len(problems)) > hard
        return 0.8 * passed + 0.7 * alike + rng.normal(size=len(problems)), passed, problems.tolist()

    truth = auc(*draw(100_000)).value
    within = [measured.low <= truth <= measured.high for measured in (auc(*draw(60)) for _ in range(400))]
    assert 0.9 <= np.mean(within) <= 0.99
    scores, passed, problems = np.arange(40.0), np.arange(40) >= 20, list(range(40))
    perfect = auc(scores, passed, problems)
    assert perfect.value == perfect.high == 1 and 0.85 < perfect.low < 0.95
    assert auc(scores, passed, [0] * 20 + [1] * 20).low is None


def test_means_are_over_problems():
    for freedom, quantile in ((4, 2.776445), (9, 2.262157), (29, 2.045230), (200, 1.971896)):  # of published tables
        np.testing.assert_allclose(student_t(freedom), quantile, rtol=1e-3)
    rng = fresh_rng()
    values, problems = rng.normal(size=60), rng.integers(0, 7, 60).tolist()
    means = [statistics.mean(v for v, p in zip(values, problems, strict=True) if p == name) for name in set(problems)]
    measured = mean_over_problems(values, problems)
    half = student_t(len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
    expected = [statistics.mean(means), statistics.mean(means) - half, statistics.mean(means) + half]
    np.testing.assert_allclose([measured.value, measured.low, measured.high], expected, rtol=1e-10)
    assert mean_over_problems(values[:4], [1, 2, 3, 4]).low is None and mean_over_problems(values[:0], []) is None


def planted(rng, count=30):
    """Solutions of problems with nothing in common; one with too few steps; and TWINS with the first one's text."""
    sizes = [[int(rng.integers(3, 9)) for _ in range(rng.integers(1, 4))] for _ in range(count)] + [[2]]
    rows = [
        {"prompt_id": f"{number}", "problem": f"text {number}", "solutions": [["step"] * size for size in own]}
        for number, own in enumerate(sizes)
    ]
    twin = {"problem": "text 0", "solutions": [["step"] * 4] * len(sizes[0])}
    rows += [{"prompt_id": f"twin {number}", **twin} for number in range(TWINS)]
    total = sum(map(sum, sizes)) + TWINS * 4 * len(sizes[0])
    vectors = rng.normal(size=(total, 128))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Solutions(rows, vectors.astype(np.float32), np.zeros(total, np.int64)), sizes


def test_strangers_are_other_problems_with_as_many_solutions():
    rng = fresh_rng()
    solutions, sizes = planted(rng)
    strangers = Strangers(solutions)
    for number, own in enumerate(sizes[:-1]):
        drawn = strangers.of(f"{number}")
        assert len(set(drawn)) == len(drawn) == STRANGERS and drawn == strangers.of(f"{number}")
        assert f"{number}" not in drawn and "30" not in drawn  # the one of two steps
        assert number or not any(name.startswith("twin") for name in drawn)
        alike = sum(len(other) == len(own) for at, other in enumerate(sizes[:-1]) if at != number)
        if alike >= STRANGERS:
            assert all(len(solutions.of(name)) == len(own) for name in drawn)


def test_another_problems_solutions_lower_the_alignment_where_they_are_others():
    rng = fresh_rng()
    solutions, sizes = planted(rng)
    strangers = Strangers(solutions)
    drops = []
    for number in range(len(sizes) - 1):
        taught = solutions.of(f"{number}")
        student = taught[0] + 0.05 * rng.normal(size=taught[0].shape).astype(np.float32)
        (own,) = best_of([(student, taught)], "free")
        slow = [align([student], [one])[0].alignment for one in taught]
        assert own.solution == int(np.argmax(slow)) == 0
        np.testing.assert_allclose(own.found.alignment, max(slow), rtol=1e-9)
        others = best_of([(student, solutions.of(name)) for name in strangers.of(f"{number}")], "free")
        drops.append(own.found.alignment - np.mean([other.found.alignment for other in others]))
    assert mean_over_problems(np.array(drops), list(range(len(drops)))).low > 0.3
    assert best_of([(student[:2], taught), (student, [student[:2]]), (student, [])], "free") == [None] * 3


# ---- of a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["free", "ordered"])
def test_it_says_what_the_strategy_service_says(run, tmp_path, order):
    found = audit(another(run, tmp_path / "run", rows_of(run[0]), method_options={"order": order}))
    worker = StrategyWorker(path=str(run[1]), tokenizer="lab:student")
    rows = rows_of(run[0])
    records = []
    for row in rows:
        length = len(row["token_ids"]) - row["prompt_length"]
        records.append(
            Rollout(
                rollout_id=row["rollout_id"],
                prompt_id=row["prompt_id"],
                group_id=row["group_id"],
                sample_index=0,
                token_ids=np.array(row["token_ids"], np.int32),
                prompt_length=row["prompt_length"],
                text=row["response"],
                logprobs=np.zeros(length, np.float32),
                loss_mask=np.ones(length, bool),
            )
        )
    _, receipt = worker.align(encode(Rollout, records), order=order)
    ours = [one.best.found.alignment if one.best else None for one in found.followed]
    assert [value is None for value in ours] == [value is None for value in receipt.alignments]
    known = [pair for pair in zip(ours, receipt.alignments, strict=True) if pair[0] is not None]
    np.testing.assert_allclose(*zip(*known, strict=True), rtol=1e-6)
    assert [one.codes for one in found.followed] == list(receipt.codes)
    assert len(known) > 100 and found.version == receipt.version == found.recorded_version


def test_the_shuffled_control_is_each_rollout_with_other_problems_one_by_one(found):
    strangers, drops = Strangers(found.solutions), {}
    for one in found.followed:
        if not one.best:
            assert one.others is None
            continue
        slow = []
        for name in strangers.of(one.recorded.prompt_id):
            taught = [vectors for vectors in found.solutions.of(name) if len(vectors) >= FEWEST_STEPS]
            slow.append(max(align([one.vectors], [vectors])[0].alignment for vectors in taught))
        np.testing.assert_allclose(one.others, statistics.mean(slow), rtol=1e-6)
        drops.setdefault(one.recorded.prompt_id, []).append(one.best.found.alignment - statistics.mean(slow))
    expected = statistics.mean(map(statistics.mean, drops.values()))
    np.testing.assert_allclose([found.drop.value, found.own.value - found.others.value], expected, atol=1e-6)
    assert (found.drop.problems, found.drop.rollouts) == (len(drops), sum(map(len, drops.values())))


def test_shares_and_pass_rates_of_codes(run, found):
    train = [one for one in found.followed if one.recorded.split == "train"]
    steps = [code for one in train for code in one.codes]
    told = {code["code"]: code for code in json.loads((run[1] / "codes.json").read_text())}
    assert {use.code for use in found.codes} == set(steps) | set(told)
    for use in found.codes:
        having = [one.recorded.passed for one in train if use.code in one.codes]
        assert (use.judged, use.student) == (len(having), steps.count(use.code) / len(steps))
        assert use.pass_rate == (sum(having) / len(having) if having else None)
        early = [code for one in train if one.recorded.step <= 1 + 11 / 3 for code in one.codes]
        late = [code for one in train if one.recorded.step >= 12 - 11 / 3 for code in one.codes]
        assert (use.early, use.late) == (early.count(use.code) / len(early), late.count(use.code) / len(late))
        assert use.teacher == (told[use.code]["share"] if use.code in told else 0)
    assert found.aucs["in_distribution"][0] == "in_distribution" and found.drop.rollouts > 100


def test_what_is_not_read_is_counted(run, tmp_path):
    kept, *more = [row for row in rows_of(run[0]) if row["kind"] == "train"][:8]
    known = json.loads(json.dumps(kept))
    lines = [kept, *more]
    lines += [{**known, "source": "teacher"}, {**known, "context": "hint@1"}, {**known, "token_ids": [1] * 200_000}]
    lines += [{**known, "kind": "eval", "split": "in_distribution", "prompt": "another"}, {"kind": "train"}]
    assert MOST_TOKENS < 199_000
    folder = another(run, tmp_path / "run", lines)
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write("no json\n[3]\n" + json.dumps(known)[:-9])
    chosen = audit(folder).chosen
    assert chosen.left_out == {OTHERS: 2, LONG: 1, NO_SOLUTION: 1, UNREADABLE: 4}
    assert [one.rollout_id for one in chosen.rollouts] == [row["rollout_id"] for row in lines[:8]]
    other = another(run, tmp_path / "other", [{**kept, "prompt": f"Another problem.{SUFFIX}"}])
    assert audit(other).followed[0].best is None  # the same id, and no solution of this problem


def test_of_many_it_reads_some_evenly_and_what_it_shows(run):
    rows = rows_of(run[0])
    train = [row for row in rows if row["kind"] == "train"]
    wanted = next(one.recorded.rollout_id for one in audit(run[0]).followed[5:] if one.best)
    found = audit(run[0], most=10, rollout=wanted)
    read = Counter(one.recorded.split for one in found.followed)
    assert 10 <= read["train"] <= 12 and read["in_distribution"] == 8 and 10 <= read["out_of_distribution"] <= 11
    steps = sorted({one.recorded.step for one in found.followed})
    assert steps[0] == 1 and steps[-1] == 12 and len(steps) >= 8
    assert found.shown.recorded.rollout_id == wanted
    assert found.chosen.found["train"] == len(train) == 144
    aligned = [one for one in audit(run[0]).followed if one.best and one.recorded.passed]
    assert audit(run[0]).shown.recorded == aligned[-1].recorded


def test_what_cannot_be_audited_is_the_users_to_mend(run, tmp_path):
    rows = rows_of(run[0])[:9]
    with pytest.raises(RunFolderError, match="no folder"):
        audit(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        audit(tmp_path)
    with pytest.raises(StrategyError, match="without strategies"):
        audit(another(run, tmp_path / "grpo", rows, method="grpo", strategies=None))
    folder = another(run, tmp_path / "unrecorded", [], record="none")
    with pytest.raises(RunFolderError, match="nothing"):
        audit(folder)
    (folder / "rollouts.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"no rollouts\.jsonl \(record: none\)"):
        audit(folder)
    folder = another(run, tmp_path / "run", rows)
    with pytest.raises(StrategyError, match="id of a recorded rollout"):
        audit(folder, rollout="1-none-0")
    problem = f"What is {rows[0]['prompt'].removesuffix(SUFFIX)}"
    folder = another(run, tmp_path / "short", [line("short", "nowhere", problem, "one step")])
    with pytest.raises(StrategyError, match="no solution of its problem"):
        audit(folder, rollout="short")
    (folder / "identity.json").write_text("{")
    with pytest.raises(RunFolderError, match="as it was written"):
        audit(folder)


def test_solutions_that_the_extractor_was_not_fitted_to_are_compared_with(tmp_path):
    """Under the ids of their own problems; the extractor's folder has moved, and stays as it is."""
    rng = fresh_rng()
    problems = chains(int(rng.integers(1000)))
    inside = {name: one for name, one in problems.items() if name.startswith("chain")}
    fit_chains(tmp_path / "strategies", inside)
    folder = write_run(tmp_path / "run", tmp_path / "strategies", lines_of(problems, rng), [])
    assert audit(folder).aucs[OUTSIDE] == (OUTSIDE, None)
    (tmp_path / "strategies").rename(tmp_path / "moved")
    more = [one for name, one in solved(problems).items() if name not in inside]
    found = audit(folder, strategies=tmp_path / "moved", more=more)
    _, of = found.aucs[OUTSIDE]
    own = [one for one in found.followed if one.recorded.split == OUTSIDE]
    assert of and of.problems == len(more) and all(one.best for one in own if len(one.codes) >= FEWEST_STEPS)
    extractor, tokenizer = Extractor.load(tmp_path / "moved"), load_tokenizer("lab:student")
    for problem in more:
        texts = [steps_of(tokenizer, text, extractor.limits) for text in problem.solutions]
        for slow, fast in zip(extractor.encode(texts), found.solutions.of(problem.prompt_id), strict=True):
            np.testing.assert_allclose(slow.vectors, fast, atol=1e-5)
    assert found.solutions.of("chain-0") and not Solutions.load(tmp_path / "moved").of("long-0")
    known = solved(problems)["chain-0"]
    assert len(audit(folder, strategies=tmp_path / "moved", more=[known]).solutions.of("chain-0")) == len(
        known.solutions
    )
    with pytest.raises(StrategyError, match="an id is one problem's"):
        audit(folder, strategies=tmp_path / "moved", more=[replace(known, text="Another problem.")])


def test_another_extractor_than_the_runs_is_refused_and_said(run, tmp_path):
    folder = another(run, tmp_path / "run", rows_of(run[0])[:9])
    (folder / "identity.json").write_text(json.dumps({"strategies": {"digest": "0123", "place": ""}}))
    with pytest.raises(StrategyError, match="the run had 0123"):
        audit(folder)
    page, _ = write_audit(audit(folder, anyway=True), tmp_path / "new" / "place")
    assert "The extractor is another than the run" in page.read_text() and page.parent == tmp_path / "new" / "place"
    (folder / "identity.json").unlink()
    assert "was not recorded" in write_audit(audit(folder), folder)[0].read_text()


def test_checks_are_alarming_where_they_should_be(run, found):
    checks = {check.name: check for check in checks_of(found)}
    alarming = {name: check.alarming for name, check in checks.items()}
    assert alarming["What strategies are worth"] is True and alarming["Effective strategies"] is False
    assert alarming["The top code's share"] is False and alarming["Neutral rollouts"] is False
    assert alarming["Drop with shuffled strategies"] is (found.drop.value < 0.1)
    rows = json.loads(json.dumps(found.rows))
    for row in rows[-4:]:
        if row["kind"] == "step":
            row["method"] |= {"effective_strategies": 2.2, "top_code_share": 0.61, "neutral_share": 0.51}
    for row, value in zip([row for row in rows if row["kind"] == "eval"], (0.5, 0.6, 0.7, 0.5), strict=True):
        row["stats"]["avg_at_k"]["value"] = value
    changed = replace(found, rows=rows)
    now = {check.name: check.alarming for check in checks_of(changed)}
    for name in ("Effective strategies", "The top code's share", "Neutral rollouts"):
        assert now[name] is True
    assert now["Alignment and accuracy over the last 3 evaluations"] is True
    assert all(row.mutual_information > 0.5 for row in found.spreads)
    small = replace(found.spreads[1], mutual_information=0.1, volume=-5.5)
    told = {check.name: check for check in checks_of(replace(found, spreads=(found.spreads[0], small)))}
    assert told["Mutual information of steps and strategies"].alarming is True
    assert told["Room between a group's answers"].alarming is True
    nothing = {check.name: check for check in checks_of(replace(found, spreads=None))}
    assert nothing["Room between a group's answers"].figure == "not known"


def test_how_spread_out_strategies_are_by_slow_loops(run, found):
    codebook = Extractor.load(run[1]).codebook_KD.numpy().astype(float)
    train = [one for one in found.followed if one.recorded.split == "train" and one.codes]
    first, last = (f(one.recorded.step for one in train) for f in (min, max))
    early = [one for one in train if one.recorded.step <= first + (last - first) / 3]
    shares = []
    for step in (vector for one in early for vector in one.vectors):
        weights = [math.exp(cosine(step, code) / 0.1) for code in codebook]
        shares.append([weight / sum(weights) for weight in weights])
    mean = [statistics.mean(own) for own in zip(*shares, strict=True)]
    entropies = [-sum(p * math.log(p) for p in own if p > 0) for own in (mean, *shares)]
    expected = entropies[0] - statistics.mean(entropies[1:])
    assert found.spreads[0].mutual_information == pytest.approx(expected, abs=1e-6)
    groups = {(one.recorded.step, one.recorded.prompt_id) for one in early}
    volumes = []
    for key in groups:
        means = [one.vectors.mean(0) for one in early if (one.recorded.step, one.recorded.prompt_id) == key]
        matrix = [[cosine(a, b) + 0.001 * (a is b) for a in means] for b in means]
        volumes += [math.log(np.linalg.det(matrix)) / len(means)] if len(means) > 1 else []
    assert found.spreads[0].volume == (pytest.approx(statistics.mean(volumes), abs=1e-4) if volumes else None)


def cosine(one, other):
    return float(one @ other) / math.dist(one, [0] * len(one)) / math.dist(other, [0] * len(other))
