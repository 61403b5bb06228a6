"""Every method's recipe for a few steps in one process, with the lab's models; stages, resume, own methods.

That a run on Ray gives the same, bit for bit, is shown by tests/ray/test_train.py.
"""

import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from tutorloop.cluster import run
from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import load_config, parse_config
from tutorloop.contracts.skills import BankEntry
from tutorloop.verifier_service.skills.store import SkillBank

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
# Run by test_command.py, test_train.py, test_sgpo_run.py and tests/real, or of larger models.
OTHERS = ("quickstart", "gsm8k_qwen3", "sgsd_qwen3", "smollm2_opd", "sgpo_lab", "sgpo_guided_lab", "sgpo_qwen3")
# Each goes a way of its own: follow-ups, a teacher that answers, rounds, gates, self-teachers, two terms. `make test`
# runs these, and `make test-all` all.
WAYS = ("dapo", "gkd", "kd", "kdrl", "opsd", "reinforce_pp", "rft", "sdpo", "sg_opd", "star")
SMALL = ["eval.path=", "eval.ood_path=", "eval.every=0", "checkpoint.every=0", "learner.warmup_steps=0"]
ROUNDS = {"rest", "star"}


def recipe(name: str, folder: Path, *overrides: str) -> Config:
    """A recipe cut to what a test can wait for: 48 answers a step, which are six groups of eight."""
    config = load_config(ROOT / "recipes" / f"{name}.yaml", [f"output_dir={folder}", *SMALL, *overrides])
    prompts = 48 // config.rollout.samples_per_prompt
    return config.model_copy(update={"prompts_per_step": prompts})


def train(config: Config, resume: bool = False) -> list[dict[str, Any]]:
    """The steps' rows, without what a clock said."""
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100), local=True)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    clocked = ("seconds", "wall_seconds", "pools", "score_cache")
    return [{k: v for k, v in row.items() if k not in clocked} for row in rows if row["kind"] == "step"]


def weights_of(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "final" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def recipes() -> Iterator[Any]:
    for name in RECIPES:
        if name not in OTHERS:
            yield pytest.param(name, marks=[] if name in WAYS else [pytest.mark.sweep])


@pytest.mark.parametrize("name", recipes())
def test_the_recipe_of_each_method_trains(name: str, tmp_path: Path) -> None:
    rounds = ["method_options.round_steps=2"] if name in ROUNDS else []
    rows = train(recipe(name, tmp_path / "run", "steps=2", *rounds))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert any(row["learner"].get("grad_norm", 0) > 0 for row in rows)  # some groups have nothing to compare
    assert any(row["tokens"]["trained"] > 0 for row in rows)
    taken, trained = (sum(row["rollouts"][key] for row in rows) for key in ("taken", "trained"))
    assert taken == trained + sum(rows[-1]["dropped"].values())  # nothing is lost


STAGES = [
    {
        "method": "raft",
        "steps": 6,
        "until": {"trigger": "entropy_collapse", "every": 1, "warmup": 1, "patience": 2, "floor": 9.0, "slope": 1e3},
    },
    {"method": "grpo", "steps": 3, "learning_rate": 1e-4},
]


def staged(folder: Path) -> Config:
    return parse_config(
        {
            "stages": STAGES,
            "output_dir": str(folder),
            "prompts_per_step": 4,
            "student": {"model": "lab:student"},
            "data": {"path": "lab:train"},
            "rollout": {"samples_per_prompt": 4, "max_new_tokens": 48},
            "learner": {"learning_rate": 1e-3},
            "checkpoint": {"every": 1, "keep": 9},
        }
    )


def test_a_collapsed_entropy_ends_a_stage_and_each_checkpoint_resumes_in_its_own(tmp_path: Path) -> None:
    """The trigger's floor is above any entropy here, so that it fires as soon as it may: after its second low check."""
    whole = tmp_path / "whole"
    rows = train(staged(whole))
    methods = ["loss_nll" in row["learner"] for row in rows]
    assert methods == [True, True, False, False, False]
    assert [round(row["learner"]["learning_rate"], 9) for row in rows] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-4]
    assert [row["staleness_max"] for row in rows] == [0] * 5
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for kept in (1, 4):  # in the first stage, and in the second
        cut = tmp_path / f"cut-{kept}"
        shutil.copytree(whole, cut)
        for folder in (cut / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > kept:
                shutil.rmtree(folder)
        shutil.rmtree(cut / "final")
        if kept == 1:
            shutil.rmtree(cut / "stages")
        assert train(staged(cut), resume=True) == rows
        assert weights_of(cut) == weights_of(whole)


def test_an_averaged_self_teacher_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = ["steps=3", "max_staleness=0", "checkpoint.every=1", "checkpoint.keep=9", "learner.learning_rate=1e-3"]
    rows = train(recipe("sdpo", tmp_path / "whole", *settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:06d}")
    assert train(recipe("sdpo", tmp_path / "cut", *settings), resume=True) == rows
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")


def bank_of(folder: Path) -> list[BankEntry]:
    return SkillBank.open(str(folder / "bank")).entries()


GROWING = ["skills.update_every=2", "skills.update_below=1.0", "skills.most_new=2"]


@pytest.mark.parametrize(
    "teacher",
    [[], ["teacher={model: 'lab:student', signal: sampled, follows: live, shared: true}"]],
    ids=["ema", "live"],
)
def test_the_skill_bank_counts_grows_and_resumes_bit_for_bit(teacher: list[str], tmp_path: Path) -> None:
    """Both runs are synchronous; the second ends after step 3, one step past the update of its bank, and goes on."""
    settings = ["steps=6", "max_staleness=0", "checkpoint.every=3", "checkpoint.keep=2", *GROWING, *teacher]
    rows = train(recipe("sgsd_lab", tmp_path / "whole", *settings))
    grown = bank_of(tmp_path / "whole")
    assert any(entry.entry_id.startswith("dyn_") and entry.rollout_ids for entry in grown)
    answers = sum(row["rollouts"]["trained"] for row in rows)
    for kind in ("skill", "mistake"):
        used = [entry for entry in grown if entry.kind == kind]
        assert sum(entry.uses for entry in used) == 4 * answers  # each with four pairs
        assert all(entry.uses == entry.helpful + entry.harmful + entry.neutral for entry in used)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(max((tmp_path / "cut" / "checkpoints").iterdir()))
    assert train(recipe("sgsd_lab", tmp_path / "cut", *settings), resume=True) == rows
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert bank_of(tmp_path / "cut") == grown


def test_several_updates_a_step_and_a_masked_correction(tmp_path: Path) -> None:
    """Two updates on each step's rollouts: in the second the student has moved away from the one that is recomputed."""
    masked = ["off_policy.kind=masked", "off_policy.high=5", "off_policy.veto=1e-4", "learner.learning_rate=1e-3"]
    rows = train(recipe("grpo", tmp_path / "run", "steps=3", "learner.updates_per_step=2", *masked))
    assert all(0 <= row["learner"]["rejected_tokens"] < 1 for row in rows)
    assert any(row["learner"]["ratio"] != 1 for row in rows)
    assert sum(rows[-1]["dropped"].values()) + sum(row["rollouts"]["trained"] for row in rows) == sum(
        row["rollouts"]["taken"] for row in rows
    )


def test_several_teachers_score_one_rollout(tmp_path: Path) -> None:
    teachers = {
        "strong": {"model": "lab:teacher", "signal": "topk", "weight": 3},
        "weak": {"model": "lab:student", "signal": "topk"},
    }
    config = recipe("opd", tmp_path / "run", "steps=2")
    tree = {**config.model_dump(exclude_unset=True), "teacher": None, "teachers": teachers}
    rows = train(parse_config({**tree, "method_options": {"teachers": "combined", "top_k": 4}}))
    learner = rows[0]["learner"]
    assert learner["topk_reverse_kl.strong"] > 10 * abs(
        learner["topk_reverse_kl.weak"]
    )  # the weak one is the student itself
    losses = 0.75 * learner["loss_topk_divergence.strong"] + 0.25 * learner["loss_topk_divergence.weak"]
    assert rows[0]["loss"] == pytest.approx(losses, rel=1e-6)


OWN = """
from dataclasses import dataclass

from tutorloop.cluster.methods.parts.composition import Composition, sampling_of, student_group
from tutorloop.contracts.records import ScoreRequest, Term
from tutorloop.learner.terms.base import LossTerm, TermOutput


@dataclass(frozen=True)
class Squared(LossTerm):
    signal = "sampled"

    scale: float = 1.0

    def loss(self, student, rows):
        gap = student.sampled_C - rows.teacher_C
        return TermOutput(loss_C=self.scale * gap**2, metrics={"gap": gap.detach()})


def compose(config):
    term = Term(name="squared", loss=Squared, options={"scale": 0.5})
    samples = student_group(config)
    sampling, scoring = sampling_of(config), ScoreRequest(signal="sampled")
    return Composition(terms=(term,), samples=samples, sampling=sampling, scoring=scoring)
"""


def test_a_method_from_outside_the_package_trains(tmp_path: Path) -> None:
    """Its term reaches the learner's process by value: no actor could import the file."""
    (tmp_path / "mine.py").write_text(OWN)
    settings = [f"method={tmp_path / 'mine.py'}", "method_options=", "steps=2"]
    rows = train(recipe("opd", tmp_path / "run", *settings))
    assert all(row["learner"]["loss_squared"] > 0 and "gap" in row["learner"] for row in rows)


REWARDS = """
def short(prompts, completions, answer, **columns):
    assert columns["family"] and len(prompts) == len(completions) == len(answer) == 1
    return [1.0 if len(completion) < 60 else 0.5 for completion in completions]


def boxed(completions):
    return [float("boxed" in completion) for completion in completions]
"""


def test_reward_functions_of_ones_own_judge_and_add_up(tmp_path: Path) -> None:
    """They reach the verifier's processes by value, with the dataset's columns; each part is in the metrics."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    parts = [{"kind": "format", "weight": 0.1}, {"kind": f"{tmp_path}/rewards.py:boxed", "weight": 0.2}]
    config = recipe("grpo", tmp_path / "run", "steps=2")
    verifier = {"kind": f"{tmp_path}/rewards.py:short", "pass_score": 0.9, "rewards": parts}
    rows = train(parse_config({**config.model_dump(exclude_unset=True), "verifier": verifier}))
    for row in rows:
        assert row["abstained"] == 0 and row["reward_parts"].keys() == {"format", "boxed"}
        own = row["pass_rate"] + 0.5 * (1 - row["pass_rate"])
        added = 0.1 * row["reward_parts"]["format"] + 0.2 * row["reward_parts"]["boxed"]
        assert row["reward"] == pytest.approx(own + added)
