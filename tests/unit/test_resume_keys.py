"""What a run that goes on may have changed: each key has one rule, and what a rule says happens."""

import json
import random
import secrets
from pathlib import Path

import pytest

from tutorloop.cluster.resume_keys import (
    BITS,
    CHANGES,
    FREE,
    NEVER,
    RESULT,
    TABLE,
    UNKNOWN,
    Change,
    Rule,
    changes,
    check_known,
    check_used,
    content_changes,
    known_keys,
    notes,
    rule_of,
    write_down,
    written,
)
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import ConfigError, RunFolderError
from tutorloop.contracts.recipe import parse_config

TREE = {
    "method": "opd",
    "output_dir": "x",
    "steps": 3,
    "prompts_per_step": 1,
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"path": "d"},
}


def config(**changed) -> Config:
    return parse_config({**TREE, **changed})


def allowing(new: Config, old: Config, *allow: str, **more) -> list[str]:
    return [change.key for change in changes(new, old, allow=allow, **more)]


def test_each_key_has_a_rule_and_each_rule_has_keys() -> None:
    keys = list(known_keys())
    assert {"learner.ranks", "student.lora.rank", "teachers.*.urls", "stages.*.until.every"} <= set(keys)
    assert len(keys) == len(set(keys)) > 150
    assert [key for key in keys if rule_of(key) is UNKNOWN] == [], "give them a rule in cluster/resume_keys.py: TABLE"
    for rule in TABLE:
        for pattern in rule.keys:
            alone = Rule("", "", (pattern,))
            assert any(rule_of(key) is rule and alone.covers(key) for key in keys), (
                f"{pattern} names no key, or none that no rule above it has"
            )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        *(("steps", FREE), ("rollout.num_cpus", FREE), ("teacher.replicas", FREE), ("verifier.num_gpus", FREE)),
        *(("guards.actions.eos", FREE), ("teachers.a.cache_gib", FREE), ("verifier.api_key_env", FREE)),
        *(("learner.ranks", BITS), ("learner.zero_stage", BITS), ("learner.num_gpus", BITS)),
        ("rollout.batch_size", BITS),
        *(("rollout.replicas", BITS), ("teachers.a.num_gpus", BITS), ("teacher.tensor_parallel", BITS)),
        *(("learner.dtype", RESULT), ("verifier.timeout_seconds", RESULT), ("teachers.a.signal", RESULT)),
        *(("method_options.clip", RESULT), ("learner.learning_rate", RESULT), ("stages.1.until.every", RESULT)),
        *(("seed", NEVER), ("prompts_per_step", NEVER), ("data.prompt_suffix", NEVER), ("student.model", NEVER)),
        *(("student.lora.alpha", NEVER), ("teachers.a.follows", NEVER)),
        ("a.new.key", RESULT),
    ],
)
def test_the_kind_of_a_key(key: str, kind: str) -> None:
    assert rule_of(key).kind == kind


def test_what_is_free_is_taken_and_what_alters_the_result_is_named() -> None:
    free = config(steps=9, record="all", eval={"every": 2}, guards={"actions": {"eos": "off"}}, output_dir="y")
    assert allowing(free, config()) == ["eval.every", "guards.actions.eos", "output_dir", "record", "steps"]
    assert not list(notes(changes(free, config())))
    (told,) = notes(changes(config(learner={"ranks": 3}), config()))
    assert told.startswith("learner.ranks: 1 before, 3 now") and "last bits" in told
    other = config(learner={"learning_rate": 1e-3}, rollout={"temperature": 0.5})
    for allow in ([], ["learner"], ["rollout.temperature"], ["learner.learning"]):
        with pytest.raises(RunFolderError) as caught:
            changes(other, config(), allow=allow)
        found = [key for key in ("learner.learning_rate", "rollout.temperature") if key in caught.value.found]
        left = [
            key for key in ("learner.learning_rate", "rollout.temperature") if not {key, key.split(".")[0]} & set(allow)
        ]
        assert found == left and all(f"--allow-change {key}" in caught.value.remedy for key in left)
    keys = ["learner.learning_rate", "rollout.temperature"]
    assert allowing(other, config(), "learner", "rollout.temperature") == keys


def test_what_can_never_change_says_why() -> None:
    for changed, told in (
        ({"seed": 4}, "trained twice or never"),
        ({"student": {"model": "other"}}, "weights and optimizer"),
        ({"student": {"model": "s", "lora": {}}}, "student.lora: None before, 'given' now"),
        ({"teacher": {"model": "t", "follows": "ema"}}, "the average of such a teacher"),
        ({"teacher": None, "teachers": {"a": {"model": "t", "follows": "live"}}}, "teachers.a.follows: None before"),
        ({"skills": {"path": "b"}}, "own copy of the bank"),
    ):
        with pytest.raises(RunFolderError) as caught:
            changes(config(**changed), config(), allow=list(changed))
        assert told in str(caught.value) and "--allow-change" not in str(caught.value)


def test_a_section_that_comes_or_goes_is_told_of_once() -> None:
    several = config(teacher=None, teachers={"a": {"model": "t"}, "b": {"model": "u", "weight": 2}})
    assert allowing(several, config(), "teacher", "teachers") == ["teacher", "teachers.a", "teachers.b"]
    assert allowing(config(), several, "teacher", "teachers") == ["teacher", "teachers.a", "teachers.b"]
    with pytest.raises(RunFolderError, match=r"teachers\.a: None before"):
        changes(several, config(), allow=["teacher", "teachers.b"])
    staged = config(method="", steps=0, stages=[{"method": "opd", "steps": 3}])
    assert allowing(staged, config(), "method", "stages") == ["method", "stages.0", "steps"]


def test_places_and_a_rate_that_decays_over_all_steps() -> None:
    moved = config(student={"model": "s2"}, data={"path": "d2"})
    assert allowing(moved, config(), places={"student.model", "data.path"}) == []
    old, longer = (config(learner={"decay": "cosine"}, steps=steps) for steps in (3, 9))
    with pytest.raises(RunFolderError, match="steps: 3 before, 9 now"):
        changes(longer, old)
    assert [change.kind for change in changes(longer, old, allow=["steps"])] == [RESULT]


def test_random_changes_are_found_one_by_one() -> None:
    """Against a plain comparison of the two trees."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    pool = [
        *("learner.learning_rate=0.25", "learner.max_grad_norm=3.5", "rollout.temperature=0.5", "max_staleness=3"),
        *(
            "verifier.tolerance=0",
            "verifier.pass_score=0.5",
            "off_policy.veto=0.1",
            "teacher.signal=topk",
            "record=all",
        ),
        *("teacher.ema_decay=0.5", "learner.ranks=4", "eval.samples=3", "rollout.batch_size=7", "method_options.x=1"),
    ]
    for _ in range(30):
        chosen = sorted(rng.sample(pool, rng.randint(0, len(pool))))
        new = parse_config(TREE, chosen)
        wanted = {text.partition("=")[0] for text in chosen} - {"verifier.tolerance"}
        assert set(allowing(new, config(), *wanted)) == wanted


@pytest.mark.parametrize(
    "key", ["learner", "learner.betas", "teachers.a", "teachers.a.urls", "stages.1.until", "stages"]
)
@pytest.mark.parametrize("more", ["method_options.a.b", "templates.x@1", "guards.actions.eos", "data"])
def test_known_keys_and_sections(key: str, more: str) -> None:
    check_known([key, more])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learner.learning_rat", "did you mean learner.learning_rate?"),
        ("teachers.a.modle", "did you mean teachers.*.model?"),
        *((key, "") for key in ("learner.ranks.x", "", "learner.", ".learner", "student.lora.rank.0", "no_such=1")),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_known(["learner", key])
    assert repr(key) in caught.value.found and hint in caught.value.remedy


def test_changes_are_written_down_and_a_retry_may_name_them_again(tmp_path: Path) -> None:
    assert written(tmp_path) == []
    write_down(tmp_path, changes(config(steps=9), config()), 4)
    assert not (tmp_path / CHANGES).exists(), "nothing but what is free"
    other = config(learner={"learning_rate": 1e-3, "ranks": 2}, steps=9)
    write_down(tmp_path, changes(other, config(), allow=["learner"]), 4)
    write_down(tmp_path, content_changes({"teacher.model": ("t (1)", "t (2)")}, ["teacher"]), 7)
    assert written(tmp_path) == [
        {"step": 4, "key": "learner.learning_rate", "kind": RESULT, "before": 1e-5, "now": 1e-3},
        {"step": 4, "key": "learner.ranks", "kind": BITS, "before": 1, "now": 2},
        {"step": 7, "key": "teacher.model", "kind": RESULT, "before": "t (1)", "now": "t (2)"},
    ]
    check_used(["learner.learning_rate", "teacher", "eval"], ["eval.every"], tmp_path)
    with pytest.raises(ConfigError, match="rollout is as it was"):
        check_used(["learner", "rollout"], [], tmp_path)
    (tmp_path / CHANGES).write_text(json.dumps({"step": 1}) + "\n{")
    with pytest.raises(RunFolderError, match=r"changes\.jsonl is as it was written"):
        written(tmp_path)


def test_of_what_is_read_only_a_teacher_may_be_another() -> None:
    found = dict.fromkeys(("teacher.model", "student.model", "data", "code of x.py", "skill bank"), ("then", "now"))
    allow = ["teacher", "student", "data", "verifier"]
    assert content_changes(found, allow) == [Change(key="teacher.model", kind=RESULT, before="then", now="now")]
    assert content_changes(found, []) == []
