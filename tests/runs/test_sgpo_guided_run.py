"""The published SGPO in one process on the lab's student: what trains in which term, against plain transformers."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorloop.cluster import run
from tutorloop.contracts.recipe import parse_config
from tutorloop.models.loading import locate_model

ROOT = Path(__file__).parents[2]
TOLD = "told@1"  # the lab's student was trained to read an answer below its problem: here that is all the strategy
DELTA, TOP_K, ALPHA0, GAMMA, ALPHA_MAX = 0.05, 12, 0.4, 0.2, 0.7
PLAIN, GUIDED, PROMPTS = 5, 6, 10
HALF = """
from zlib import crc32


def half(prompts, completions):
    # half of all texts pass, so that different answers to a problem do
    return [float(crc32(completion.encode()) % 2) for completion in completions]
"""


def train(folder: Path, shared: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """The steps' rows, the rollouts, and the strategies by problem."""
    lines = (ROOT / "lab" / "data" / "train.jsonl").open(encoding="utf-8")
    rows = [row for row in map(json.loads, lines) if row["family"] != "chain_sum"][: 2 * PROMPTS]
    (folder / "half.py").write_text(HALF)
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps({**row, "plan": row["answer"]}) + "\n" for row in rows))
    options = {"template": TOLD, "guided": GUIDED, "top_k": TOP_K, "delta": DELTA}
    options |= {"alpha0": ALPHA0, "gamma": GAMMA, "alpha_max": ALPHA_MAX}
    config = parse_config(
        {
            "method": "sgpo_guided",
            "method_options": options,
            "output_dir": str(folder / "run"),
            "steps": 2,
            "prompts_per_step": PROMPTS,
            "templates": {TOLD: "{problem}\nAnswer: {strategy}"},
            "student": {"model": "lab:student"},
            "teacher": {"model": "lab:student", "signal": "topk", "follows": "live", "shared": shared},
            "data": {"path": str(data), "strategy_field": "plan"},
            "verifier": {"kind": f"{folder / 'half.py'}:half"},
            "rollout": {"samples_per_prompt": PLAIN, "max_new_tokens": 48},
            "learner": {"learning_rate": 1e-3, "tokens_per_batch": 1024},
            "checkpoint": {"every": 0},
            "record": "all",
        }
    )
    assert run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True)
    steps, rollouts = (
        [json.loads(line) for line in (folder / "run" / name).open(encoding="utf-8")]
        for name in ("metrics.jsonl", "rollouts.jsonl")
    )
    return [step for step in steps if step["kind"] == "step"], rollouts, {row["prompt"]: row["answer"] for row in rows}


class Reference:
    """The student as it began, one answer at a time."""

    def __init__(self) -> None:
        folder = str(locate_model("lab:student"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logprobs(self, text: str, response: list[int]) -> torch.Tensor:
        """`[R, V]` of the response after a prompt."""
        turns = [{"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        logits = self.model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(1)

    def mean(self, text: str, response: list[int]) -> float:
        return float(self.logprobs(text, response)[torch.arange(len(response)), response].mean())


def response_of(rollout: dict[str, Any]) -> list[int]:
    return rollout["token_ids"][rollout["prompt_length"] :]


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher‖student) `[R]` over the teacher's best ids and one bucket of all others."""
    found = []
    for q, p in zip(teacher.exp(), student.exp(), strict=True):
        ids = q.argsort(descending=True)[:TOP_K]
        inside = (q[ids] * (q[ids] / p[ids]).log()).sum()
        found.append(inside + (1 - q[ids].sum()) * ((1 - q[ids].sum()) / (1 - p[ids].sum())).log())
    return torch.stack(found)


def check_first_step(step: dict[str, Any], rollouts: list[dict[str, Any]], strategies: dict[str, str]) -> None:
    """Pass rates, weights, targets and the loss of the guided term, from the recorded answers alone."""
    reference, losses, clipped, others = Reference(), [], [], 0
    for group in {rollout["group_id"] for rollout in rollouts}:
        own = [rollout for rollout in rollouts if rollout["group_id"] == group]
        plain, guided = ([r for r in own if r["context"] == context] for context in ("plain", TOLD))
        assert (len(plain), len(guided)) == (PLAIN, GUIDED)
        p_plain, p_guided = (sum(r["passed"] for r in part) / len(part) for part in (plain, guided))
        alpha = min(ALPHA_MAX, ALPHA0 * max(0.0, p_guided - p_plain) / (GAMMA + p_plain))
        passed, targets = ([r for r in guided if r[key]] for key in ("passed", "trained"))
        reasons = Counter(r["dropped"] for r in guided if not r["trained"])
        wanted = {"not_chosen": len(passed) - 1} if alpha else {"no_guidance_needed": len(passed)}
        assert reasons == Counter({"incorrect": GUIDED - len(passed), **wanted})
        assert len(targets) == (alpha > 0)
        for target in targets:
            told = f"{target['prompt']}\nAnswer: {strategies[target['prompt']]}"
            likely, likely_told = (
                {r["response"]: reference.mean(text, response_of(r)) for r in passed}
                for text in (target["prompt"], told)
            )
            assert target["response"] == max(likely, key=lambda text: likely[text])
            others += target["response"] != max(likely_told, key=lambda text: likely_told[text])
            assert target["weight"] == pytest.approx(alpha, rel=1e-12)
            response = response_of(target)
            token_losses = divergence(
                reference.logprobs(told, response), reference.logprobs(target["prompt"], response)
            )
            losses.append(alpha * token_losses.clamp(max=DELTA).mean())
            clipped += (token_losses > DELTA).tolist()
    assert len(losses) > 2 and others and 0 < sum(clipped) < len(clipped), "other problems would show more"
    assert step["learner"]["loss_topk_divergence"] == pytest.approx(float(torch.stack(losses).mean()), rel=0, abs=1e-7)
    assert step["learner"]["divergence_clipped"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_plain_answers_train_by_grpo_and_guided_targets_by_the_clipped_kl(tmp_path: Path, shared: bool) -> None:
    steps, rollouts, strategies = train(tmp_path, shared)
    assert len(steps) == 2
    reasons: Counter[str] = Counter()
    for step in steps:
        own = [rollout for rollout in rollouts if rollout["step"] == step["step"]]
        plain, guided = ([r for r in own if r["context"] == context] for context in ("plain", TOLD))
        assert (len(plain), len(guided)) == (PROMPTS * PLAIN, PROMPTS * GUIDED)
        assert all(r["trained"] and r["weight"] == 1 for r in plain)
        targets = [r for r in guided if r["trained"]]
        assert all(r["advantage"] == 0 and r["passed"] for r in targets)
        assert max(Counter(r["group_id"] for r in targets).values()) == 1
        reasons.update(r["dropped"] for r in guided if not r["trained"])
        assert step["dropped"] == reasons and set(reasons) <= {"incorrect", "not_chosen", "no_guidance_needed"}
        assert step["rollouts"] == {"taken": len(own), "trained": len(plain) + len(targets)}
        assert step["tokens"]["trained"] == sum(len(response_of(r)) for r in [*plain, *targets])
        assert step["tokens"]["scored"] > 0

        # The policy that sampled is the one that learns: every ratio is 1. A target would count with advantage 0.
        lengths, learner = [len(response_of(r)) for r in plain], step["learner"]
        advantage = sum(n * r["advantage"] for n, r in zip(lengths, plain, strict=True)) / sum(lengths)
        mean = sum(r["advantage"] for r in plain) / len(plain)
        assert learner["advantage"] == pytest.approx(advantage, abs=1e-6)
        assert learner["loss_clipped_policy_gradient"] == pytest.approx(-mean, abs=1e-4)
        assert learner["importance_weight"] == 1 and abs(learner["mismatch"]) < 1e-4, "of plain answers alone"
        total = learner["loss_clipped_policy_gradient"] + learner["loss_topk_divergence"]
        assert step["loss"] == pytest.approx(total, rel=1e-9) and learner["grad_norm"] > 0
    check_first_step(steps[0], [rollout for rollout in rollouts if rollout["step"] == 1], strategies)
