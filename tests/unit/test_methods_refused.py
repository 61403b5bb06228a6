"""What recipes of methods are refused for: one clear error for each fault, before anything starts."""

import pytest
from method_cases import REFERENCE, SELF, TEACHER, config

from tutorloop.cluster.methods import compose_stages
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import parse_config

NO_VERIFIER = {"verifier": {"kind": "none"}}
ONE = {"rollout": {"samples_per_prompt": 1}}
HTTP = {**TEACHER, "engine": "http", "urls": ["http://a:8000/v1"]}
LIVE = {**SELF, "signal": "topk", "follows": "live", "shared": True}
TWO = {"teachers": {"a": {"model": "x"}, "b": {"model": "y"}}}
REFUSED: dict[str, tuple[str, dict | None, dict, dict, str]] = {
    "an unknown method": ("odp", TEACHER, {}, {}, "did you mean opd"),
    "an unknown option": ("opd", TEACHER, {"top_kk": 3}, {}, "opd knows: top_k"),
    "an option of another signal": ("opd", {**TEACHER, "signal": "exact"}, {"top_k": 4}, {}, "uses with"),
    "a direction without divergence": (
        "opd",
        {**TEACHER, "signal": "sampled"},
        {"direction": "forward"},
        {},
        "uses with",
    ),
    "a tempered tail": ("opd", {**TEACHER, "signal": "topk"}, {"temperature": 2.0}, {}, "uses with"),
    "a beta that nothing reads": ("opd", TEACHER, {"beta": 0.3}, {}, "no beta"),
    "beta above one": ("gkd", TEACHER, {"beta": 1.2}, {}, "method_options.beta"),
    "beta below zero": ("opd", TEACHER, {"direction": "jsd", "beta": -0.1}, {}, "method_options.beta"),
    "lambda above one": ("gkd", TEACHER, {"on_policy": 1.01}, {}, "method_options.on_policy"),
    "lambda below zero": ("exopd", TEACHER, {"extrapolation": -1}, {"reference": REFERENCE}, "extrapolation"),
    "an entropy gate below zero": ("eopd", TEACHER, {"entropy_above": -1}, {}, "entropy_above"),
    "a whole share of GRPO": ("sdpo", SELF, {"grpo_weight": 1}, {}, "grpo_weight"),
    "no teacher to ask": ("opd", None, {}, {}, "opd needs a teacher"),
    "no teacher to sample from": ("seqkd", None, {}, {}, "seqkd needs a teacher"),
    "no teacher beside the reward": ("kdrl", None, {}, {}, "kdrl needs a teacher"),
    "a teacher for nothing": ("sft", TEACHER, {}, {}, "sft asks no teacher"),
    "a teacher for a control arm": ("constant_advantage", TEACHER, {}, {}, "constant_advantage asks no teacher"),
    "a teacher for rewards alone": ("grpo", TEACHER, {}, {}, "grpo asks no teacher"),
    "two teachers to sample from": ("seqkd", None, {}, TWO, "samples from its teacher, which is one"),
    "a signal for nothing": ("seqkd", {**TEACHER, "signal": "topk"}, {}, {}, "asks no teacher for scores"),
    "a weight for nothing": ("opd", {**TEACHER, "weight": 2}, {}, {}, "weight counts where several"),
    "a decay for nothing": ("opsd", {**SELF, "ema_decay": 0.9}, {}, {}, "ema_decay is for"),
    "one combined teacher": ("opd", TEACHER, {"teachers": "combined"}, {}, "combined teachers are several"),
    "a teacher pool for nothing": ("opd", TEACHER, {}, {"teacher_rollout": {"replicas": 2}}, "samples no answers"),
    "two signals": ("opd", None, {}, {"teachers": {"a": TEACHER, "b": {**TEACHER, "signal": "topk"}}}, "one signal"),
    "gkd with the sampled signal": ("gkd", {**TEACHER, "signal": "sampled"}, {}, {}, "topk or exact"),
    "exopd with the exact signal": (
        "exopd",
        {**TEACHER, "signal": "exact"},
        {},
        {"reference": REFERENCE},
        "signal=sampled",
    ),
    "no reference": ("exopd", TEACHER, {}, {}, "needs a reference model"),
    "no reference for a gate": ("sg_opd", TEACHER, {"mode": "frozen_ref"}, {}, "needs a reference model"),
    "no reference for a KL": ("grpo", None, {"kl_weight": 0.1}, {}, "needs a reference model"),
    "a reference for nothing": ("opd", TEACHER, {}, {"reference": REFERENCE}, "reads no reference model"),
    "a reference for lambda one": (
        "g_opd",
        TEACHER,
        {"extrapolation": 1},
        {"reference": REFERENCE},
        "reads no reference",
    ),
    "a gate without a verifier": ("sg_opd", TEACHER, {}, NO_VERIFIER, "reads the verifier's verdicts"),
    "a reward without a verifier": ("grpo", None, {}, NO_VERIFIER, "reads the verifier's verdicts"),
    "a filter without a verifier": (
        "seqkd",
        TEACHER,
        {"filter": "valid"},
        NO_VERIFIER,
        "reads the verifier's verdicts",
    ),
    "peers without a verifier": ("sdpo", {**SELF, "signal": "topk"}, {}, NO_VERIFIER, "reads the verifier's verdicts"),
    "a group of one": ("grpo", None, {}, ONE, "at least 2"),
    "a group sign of one": ("sg_opd", TEACHER, {"sign": "group"}, ONE, "at least 2"),
    "a peer of nobody": ("sdpo", {**SELF, "signal": "topk"}, {}, ONE, "at least 2"),
    "another model as oneself": ("opsd", TEACHER, {}, {}, "the student's own model, in another context"),
    "another model that follows": (
        "opd",
        {**TEACHER, "signal": "topk", "follows": "live"},
        {},
        {},
        "is the student's own",
    ),
    "a moving head": ("opsd", {**SELF, "signal": "exact", "follows": "ema"}, {}, {}, "its head changes"),
    "exact scores of a server": ("opd", HTTP, {}, {}, "sampled and the topk signal"),
    "answers of a server": ("seqkd", HTTP, {}, {}, "one behind http only scores"),
    "an entropy of a server": ("eopd", {**HTTP, "signal": "topk"}, {}, {}, "entropy over the whole vocabulary"),
    "a shared teacher of another engine": ("opsd", {**LIVE, "engine": "vllm"}, {}, {}, "has their engine"),
    "two that share": (
        "opsd",
        None,
        {"teachers": "combined"},
        {"teachers": {"a": LIVE, "b": LIVE}},
        "one teacher shares",
    ),
    "an unknown template": ("opsd", SELF, {"template": "answr@1"}, {}, "a known template"),
    "a peer before the verdicts": ("opsd", SELF, {"template": "peer@1"}, {}, "before the verdicts"),
    "guidance without a teacher": ("sgpo_guided", None, {}, {}, "sgpo_guided needs a teacher"),
    "guidance by another model": ("sgpo_guided", {**LIVE, "model": "t"}, {}, {}, "the student's own model"),
    "guidance by the student as it began": ("sgpo_guided", {**SELF, "signal": "topk"}, {}, {}, "follows nothing"),
    "guidance by an average": ("sgpo_guided", {**SELF, "follows": "ema"}, {}, {}, "the student as it stands"),
    "guidance of the sampled signal": ("sgpo_guided", {**LIVE, "signal": "sampled"}, {}, {}, "teacher.signal=topk"),
    "guidance that shows the solution": ("sgpo_guided", LIVE, {"template": "solution@1"}, {}, "shows the strategy"),
    "guidance that nobody is shown": (
        "sgpo_guided",
        LIVE,
        {"template": "told@1"},
        {"templates": {"told@1": "{problem}"}},
        "shows the strategy",
    ),
    "guidance without a verifier": ("sgpo_guided", LIVE, {}, NO_VERIFIER, "reads the verifier's verdicts"),
    "guidance of a group of one": ("sgpo_guided", LIVE, {}, ONE, "at least 2"),
    "guidance of greedy answers": (
        "sgpo_guided",
        LIVE,
        {},
        {"rollout": {"temperature": 0}},
        "samples its answers",
    ),
    "a correction of given answers": ("sft", None, {}, {"off_policy": {"kind": "truncated"}}, "given answers only"),
    "a cold start's option without one": (
        "sg_opd",
        TEACHER,
        {"cold_start": 0, "tries": 2},
        {},
        "asks the teacher for no",
    ),
    "a soft gate's factor": ("sg_opd", TEACHER, {"gate": "soft", "agree": 2}, {}, "sharpness alone"),
    "a sign gate's sharpness": ("sg_opd", TEACHER, {"sharpness": 0.1}, {}, "sharpness is for gate=soft"),
    "a blend that nothing reads": ("sg_opd", TEACHER, {"blend": 0.5}, {}, "blend is for mode=blend"),
    "a conflict that blend replaces": ("sg_opd", TEACHER, {"mode": "blend", "conflict": 0.5}, {}, "uses blend"),
    "top_k of the sampled signal": ("sg_opd", TEACHER, {"top_k": 4}, {}, "top_k is for"),
    "another source of on-policy steps": ("gkd", TEACHER, {"on_policy": 1, "other": "teacher"}, {}, "student alone"),
    "options of a method without any": ("sft", None, {"filter": "none"}, {}, "method_options.filter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_fault_has_one_clear_error(case: str) -> None:
    method, teacher, options, keys, expected = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        compose_stages(config(method, teacher, options, **keys))
    assert expected in str(caught.value), str(caught.value)
    assert caught.value.rule and caught.value.found


def test_what_one_stage_uses_may_be_given_to_all() -> None:
    stages = [{"method": "sft", "steps": 5}, {"method": "opd", "steps": 5}, {"method": "grpo", "steps": 5}]
    tree = {**config("opd", TEACHER).model_dump(exclude={"method", "method_options", "steps"}, exclude_unset=True)}
    run = parse_config({**tree, "stages": stages, "off_policy": {"high": 3.0}})
    assert [c.generators for c in compose_stages(run)] == [("dataset",), ("student",), ("student",)]
    with pytest.raises(ConfigError, match="sft, grpo asks no teacher"):
        compose_stages(parse_config({**tree, "stages": [stages[0], stages[2]]}))
