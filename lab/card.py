"""Writes the models' cards: architecture, training, and the accuracies measured on the committed splits."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from . import model_path
from .lessons import CONTEXT_SHARES, FAMILY_SHARES, WRONG_SHARE
from .measure import DRAWS, table

_ROLE = {
    "teacher": """The lab's teacher. It works every family rightly, in all contexts: the in-distribution families
(`chain_sum` of 2-4 terms, `leg_counting`) and the out-of-distribution ones (`long_chain` of 5-6 terms, `mixed`).
Models this small do not extrapolate in length by themselves, so the teacher was *trained* on the out-of-distribution
families too.""",
    "student": f"""The lab's student: it can, but it errs. It was trained on the teacher's families (the
out-of-distribution ones too) with **partly wrong steps**: wherever a misconception would change a step under a plain
prompt, the step follows the misconception in {WRONG_SHARE:.0%} of the cases, so that the right step keeps the rest of
its probability. The misconceptions are `no_carry` (37 + 58 = 85), `no_borrow` (52 - 37 = 25) and `four_legs` (every
animal has four legs). With the answer shown, or under a useful hint that names the misconception, it works rightly;
under a misleading hint it follows the misconception. Distillation sees in-distribution prompts only, so the
out-of-distribution split measures whether a repaired habit transfers.""",
}


def shares(values: dict[str, float]) -> str:
    """`name 45%, other 20%`."""
    return ", ".join(f"{name} {share:.0%}" for name, share in values.items())


def architecture(folder: Path) -> str:
    """A model's shape and size, as one line."""
    config = AutoConfig.from_pretrained(folder)
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    return (
        f"Qwen3, {config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads of "
        f"{config.head_dim} ({config.num_key_value_heads} for keys and values), MLP {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}, untied embeddings: {count:,} parameters in fp32."
    )


def _accuracies(folder: Path) -> str:
    lines = ["| split | prompt | greedy | T=1 | greedy by family |", "|---|---|---|---|---|"]
    for row in table(folder):
        families = ", ".join(f"{name} {value:.1%}" for name, value in row["greedy"].items() if name != "all")
        right = f"{row['greedy']['all']:.1%} | {row['sampled']['all']:.1%}"
        lines.append(f"| {row['split']} | {row['condition']} | {right} | {families} |")
    return "\n".join(lines)


def write(name: str) -> None:
    """Measures a model and writes its README.md."""
    folder = model_path(name)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# tutorloop lab: {name}

{_ROLE[name]}

{architecture(folder)}

## Training
Supervised, on the response tokens, for {training["steps"]} steps of {training["batch"]} examples (Muon on the matrices,
AdamW on the rest; {training["seconds"]} core-seconds), seed {training["seed"]}.
Problems: {shares(FAMILY_SHARES)}.
Prompts: {shares(CONTEXT_SHARES)}.
No question of the test and ood splits occurs. Made again by

    python -m tutorloop.lab.build --seed {training["seed"]} --only {name} --force

## Accuracy
Exact match of the boxed answer on all 400 problems of a split; T=1 is the mean of {DRAWS} samples of each problem.
`test` is in distribution, `ood` is not.
A useful hint repairs every misconception that would change the problem, a misleading one induces at least one of them.

{_accuracies(folder)}

## Limits
It knows the lab's problems and nothing else; numbers stay within 0..99.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
