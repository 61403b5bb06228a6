"""What a person should be told once: a run that goes on and cannot learn, and what it throws away.

Each alarm is raised once a run, in the log, the step's row, the summary and the report.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from ...contracts.config import Config
from ...contracts.reliability import GuardName
from ...contracts.verifier_config import Verifier
from ..flow.shard import Shard
from .metrics import EvalRow, StepRow

FEW = 16  # judged rollouts without any answer
STILL_STEPS = 3  # in a row that moved no weight
OTHER = "other"  # kind
OF_GUARDS = re.compile(rf"({'|'.join(get_args(GuardName))}) guard: |(rollback) ")


@dataclass(slots=True)
class Alarms:
    """`said`: kind → text, in order. The rest is what has been seen so far; all of it stands in checkpoints."""

    said: dict[str, str] = field(default_factory=dict)
    judged: int = 0  # rollouts, before the first that held an answer
    answered: bool = False
    still: int = 0  # steps in a row that moved no weight

    def step(
        self, config: Config, row: StepRow, shards: Sequence[Shard], dropped: Mapping[str, int], of_method: str = ""
    ) -> list[str]:
        """The alarms that this step raises for the first time. `dropped`: the step's drops by reason; `of_method`: what
        the method itself warns of."""
        return self._new(
            {
                "no_answer": self._no_answer(config.verifier, shards),
                "truncated": self._truncated(config, row, shards),
                "no_gradient": self._no_gradient(config, row, dropped),
                "no_scores": _no_scores(row, dropped),
                "stale": _stale(config, row, dropped),
                "abstained": _abstained(row, shards),
                "response_faults": _at_fault(row, shards),
                "method": of_method,
            }
        )

    def eval(self, config: Config, row: EvalRow) -> list[str]:
        """The alarms that an evaluation raises for the first time."""
        who = f"the evaluation of the {row.model} at step {row.step}"
        longest = config.eval.max_new_tokens or config.rollout.max_new_tokens
        return self._new(
            {
                "no_answer": _unread(config.verifier, f"in {who} no response holds an answer")
                if row.answered_share == 0
                else "",
                "truncated": _unended(f"in {who} every response", f"eval.max_new_tokens={longest}")
                if row.truncated_share == 1
                else "",
            }
        )

    def kind_of(self, text: str) -> str:
        """Of an alarm that has been said; a guard's by its name, of its rollback that, and of any other text OTHER."""
        by_text = {said: kind for kind, said in self.said.items()}
        begins = OF_GUARDS.match(text)
        return by_text.get(text) or (begins.group(begins.lastindex or 0) if begins else OTHER)

    def _new(self, found: Mapping[str, str]) -> list[str]:
        new = {kind: text for kind, text in found.items() if text and kind not in self.said}
        self.said |= new
        return list(new.values())

    def _no_answer(self, verifier: Verifier, shards: Sequence[Shard]) -> str:
        receipts = [shard.judged for shard in shards if shard.judged]
        self.answered |= any(any(receipt.passed) or any(receipt.answers) for receipt in receipts)
        if self.answered or not verifier.needs_gold:  # others need not say which answer they read
            return ""
        self.judged += sum(not abstained for receipt in receipts for abstained in receipt.abstained)
        text = f"none of the first {self.judged} judged responses holds an answer"
        return _unread(verifier, text) if self.judged >= FEW else ""

    def _truncated(self, config: Config, row: StepRow, shards: Sequence[Shard]) -> str:
        sampled = [shard.generated for shard in shards if shard.source == "student" and shard.generated]
        if not sampled or any(receipt.truncated < receipt.rows for receipt in sampled):
            return ""
        limit = f"rollout.max_new_tokens={config.rollout.max_new_tokens}"
        return _unended(f"in step {row.step} every response", limit)

    def _no_gradient(self, config: Config, row: StepRow, dropped: Mapping[str, int]) -> str:
        self.still = self.still + 1 if dropped.get("no_gradient") or not row.rollouts["trained"] else 0
        if self.still < min(STILL_STEPS, config.total_steps):
            return ""
        text = f"the last {self.still} steps moved no weight: no rollout had a loss with a gradient"
        groups = row.groups
        if groups.get("mixed") == 0:
            text += (
                f". In every prompt group all answers are right ({_share(groups['all_right'])}) or all wrong "
                f"({_share(groups['all_wrong'])}), so none is better than another: easier or harder problems, or a "
                "larger rollout.samples_per_prompt"
            )
        return text


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _unread(verifier: Verifier, text: str) -> str:
    where = f"what follows {verifier.marker!r}" if verifier.marker else "the last \\boxed{…}"
    if verifier.answers == "any" and not verifier.marker:
        where = "a box, or an answer wherever one stands"
    return (
        f"{text}, so nothing can pass. The verifier reads {where}: if the problems do not ask for it, say so with "
        "data.prompt_suffix, or set verifier.answers=any or verifier.marker"
    )


def _unended(text: str, limit: str) -> str:
    return (
        f"{text} was cut off by {limit}: the model never ended its turn. Raise the limit, or see that the token which "
        "ends its turn is an eos_token_id of its generation_config.json"
    )


def _no_scores(row: StepRow, dropped: Mapping[str, int]) -> str:
    refused, missing = dropped.get("teacher_refused", 0), row.learner.get("missing_scores", 0)
    asked = row.rollouts["trained"] + refused + dropped.get("no_gradient", 0) + dropped.get("off_policy", 0)
    if not asked or max(refused, missing) < asked:
        return ""
    errors = [name for name in row.failed if name.partition(":")[0].partition(".")[0] in ("teacher", "reference")]
    why = f" ({', '.join(errors)})" if errors else ""
    return f"in step {row.step} no rollout got a score from its teacher{why}, so no teacher taught it"


def _stale(config: Config, row: StepRow, dropped: Mapping[str, int]) -> str:
    if not dropped.get("stale"):
        return ""
    return (
        f"step {row.step} dropped {dropped['stale']} rollouts that were more than max_staleness={config.max_staleness} "
        "weight versions old: more rollout replicas, or a larger bound"
    )


def _abstained(row: StepRow, shards: Sequence[Shard]) -> str:
    receipts = [shard.judged for shard in shards if shard.judged]
    rows = sum(receipt.rows for receipt in receipts)
    if not row.abstained or 2 * row.abstained <= rows:
        return ""
    errors: Counter[str] = Counter()
    for receipt in receipts:
        errors.update(receipt.errors)
    return f"in step {row.step} the verifier abstained on {row.abstained} of {rows} rollouts: {_named(errors)}"


def _at_fault(row: StepRow, shards: Sequence[Shard]) -> str:
    rows = sum(shard.judged.rows for shard in shards if shard.judged)
    faults = sum(row.response_faults.values())
    if 2 * faults <= rows:
        return ""
    return (
        f"in step {row.step} {faults} of {rows} responses could not be judged by their own fault, which is incorrect: "
        f"{_named(Counter(row.response_faults))}. If they look right, raise verifier.timeout_seconds or "
        "verifier.memory_gib, or leave such responses out with verifier.response_fault=abstain"
    )


def _named(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(3))
