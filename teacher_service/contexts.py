"""What a teacher is shown: each rollout after the prompt of the request's context, with the group's verdicts for peers.

A rollout's peer is a passed rollout of its group other than itself (SDPO, 2601.20802: its own success is not its own
demonstration). Which one is ours: the next passed one by sample index, cyclically, so that the peers spread. So is the
wording of the feedback, for a verifier says only passed or not, and which answer it read.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode, rows_named
from ..contracts.errors import TeacherError
from ..contracts.records import Prompt, Rollout, Verdict
from ..models.contexts import Prompter, fields_of

OF_VERDICTS = frozenset({"peer", "peer_answer", "feedback"})


class _Passed(NamedTuple):
    """A rollout that passed, in the order in which peers are taken."""

    sample_index: int
    rollout_id: str
    text: str
    answer: str


def in_context(
    context: str,
    mine: Sequence[Rollout],
    prompter: Prompter,
    rollouts: pa.RecordBatch,
    prompts: pa.RecordBatch | None,
    verdicts: pa.RecordBatch | None,
) -> list[Rollout | None]:
    """`mine` (rows of the batch `rollouts`) with the prompt of `context`; None where a field that it needs is empty.

    Only the prompt's part of the token ids changes: the response, and what aligns with it, stays. Raises TeacherError
    where the batches that the template needs were not given, ConfigError for an unknown context.
    """
    needs_verdicts = bool(fields_of(context, prompter.templates) & OF_VERDICTS)
    if prompts is None or (needs_verdicts and verdicts is None):
        found = f"{context} without {'prompts' if prompts is None else 'verdicts'}"
        raise TeacherError(
            "a context comes with the prompts, and with verdicts where it shows peers or feedback", found
        )
    judged = decode(Verdict, verdicts) if needs_verdicts and verdicts is not None else []
    verdict_of = {verdict.rollout_id: verdict for verdict in judged}
    passed = _passed_by_group(rollouts, verdict_of)
    shown: list[Rollout | None] = []
    for rollout, prompt in zip(mine, prompts_of(mine, prompts), strict=True):
        peer = _peer(rollout, passed[rollout.group_id])
        ids = prompt and prompter.ids(
            context,
            prompt,
            peer_text=peer.text if peer else "",
            peer_answer=peer.answer if peer else "",
            feedback=feedback(rollout, verdict_of.get(rollout.rollout_id)),
        )
        shown.append(None if ids is None else after(rollout, ids, context))
    return shown


def after(rollout: Rollout, prompt_ids: np.ndarray, context: str) -> Rollout:
    """The rollout's response after another prompt; what aligns with the response stays."""
    token_ids = np.concatenate([prompt_ids, rollout.token_ids[rollout.prompt_length :]])
    return replace(rollout, token_ids=token_ids, prompt_length=len(prompt_ids), context=context)


def prompts_of(mine: Sequence[Rollout], prompts: pa.RecordBatch) -> list[Prompt | None]:
    """Each rollout's prompt; None where the batch lacks it."""
    own = rows_named(prompts, "prompt_id", pa.array([rollout.prompt_id for rollout in mine], pa.string()))
    found = {prompt.prompt_id: prompt for prompt in decode(Prompt, own)}
    return [found.get(rollout.prompt_id) for rollout in mine]


def _passed_by_group(rollouts: pa.RecordBatch, verdict_of: dict[str, Verdict]) -> defaultdict[str, list[_Passed]]:
    """The passed rollouts of each group with a response to show, by sample index."""
    groups: defaultdict[str, list[_Passed]] = defaultdict(list)
    if verdict_of:
        columns = ("group_id", "sample_index", "rollout_id", "text")
        for group, index, name, text in zip(*(rollouts.column(c).to_pylist() for c in columns), strict=True):
            verdict = verdict_of.get(name)
            if verdict and verdict.passed:
                groups[group].append(_Passed(index, name, text, verdict.answer))
    for group in groups.values():
        group.sort()
    return groups


def _peer(rollout: Rollout, passed: Sequence[_Passed]) -> _Passed | None:
    """The next passed rollout after this one, from the group's start again at its end; None where there is no other."""
    others = [one for one in passed if one.rollout_id != rollout.rollout_id]
    place = (rollout.sample_index, rollout.rollout_id)
    return next((one for one in others if one[:2] > place), others[0] if others else None)


def feedback(rollout: Rollout, verdict: Verdict | None) -> str:
    """What the verifier found, in one sentence; "" where the rollout passed or nobody judged it."""
    if verdict is None or verdict.passed or verdict.abstained:
        return ""
    if verdict.answer:
        return f"The answer {verdict.answer} is wrong."
    if rollout.finish_reason == "length":
        return "The response ended before an answer."
    return "No answer was found."
