"""Entries of a skill bank, for tests."""

from tutorloop.contracts.skills import BankEntry


def entry(entry_id, title, *, kind="skill", principle="", evidence=(), counts=(0, 0, 0, 0), group=""):
    uses, helpful, harmful, neutral = counts
    return BankEntry(
        entry_id=entry_id,
        kind=kind,
        group=group,
        texts=(title, principle, f"when {entry_id}"),
        rollout_ids=tuple(rollout for rollout, _ in evidence),
        outcomes=tuple(passed for _, passed in evidence),
        uses=uses,
        helpful=helpful,
        harmful=harmful,
        neutral=neutral,
    )
