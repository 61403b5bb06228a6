"""The skill worker: what a Ray actor of the skill pool runs, on a run's own bank.

Prompts in, their skill-mistake pairs out; what came of the entries is written down, and the bank grows from the run's
rollouts. A write names the version that it goes on from, so that it can be made again where its answer was lost.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ...contracts.arrow import decode, encode, rows_named
from ...contracts.receipts import Receipt
from ...contracts.records import Polarities, Prompt, Rollout, Verdict
from ...contracts.skills import SkillPairs
from .build import online_update
from .chat import ChatModel
from .extract import Extractor, LabExtractor, LlmExtractor, Memory
from .merge import LlmMerger
from .published import load_metadata, load_published
from .retrieval import Retriever
from .store import SkillBank, bank_exists, copy_bank, create_bank

PLACE = {1: 1, -1: 2, 0: 3}  # of a polarity among (uses, helpful, harmful, neutral)
LAB = "lab"


class SkillWorker:
    """One replica on the bank at `path`, which starts as a copy of `source`, a bank or a published file, if it is not
    there. It retrieves from one version until it is told of another. Raises SkillError."""

    def __init__(
        self,
        *,
        path: str,
        embedder: str,
        source: str = "",
        extractor: str = LAB,
        extractor_model: str = "",
        api_key: str = "",
    ) -> None:
        self.bank, self.embedder = own_bank(path, source), embedder
        model = None if extractor == LAB else ChatModel(extractor, extractor_model, api_key)
        self.extractor: Extractor = LlmExtractor(model) if model else LabExtractor()
        self.merger = LlmMerger(model) if model else None
        self.refresh(self.bank.version)

    def refresh(self, version: int) -> int:
        """Retrieve from this version from now on; its number. Raises SkillError."""
        self.retriever = Retriever(self.bank.at(version).entries(), self.embedder)
        self.version, self._found = version, {}
        return version

    def retrieve(self, prompts: pa.RecordBatch, rows: Sequence[int], k: int) -> tuple[pa.RecordBatch, Receipt]:
        """At most `k` pairs for each distinct prompt of `rows`, a row of SkillPairs each, in order of first mention."""
        start = time.perf_counter()
        wanted = {prompt.prompt_id: prompt.text for prompt in decode(Prompt, prompts, rows)}
        self._find({key: text for key, text in wanted.items() if (key, k) not in self._found}, k)
        found = [self._found[key, k] for key in wanted]
        receipt = Receipt(rows=len(found), seconds=time.perf_counter() - start)
        return encode(SkillPairs, found), receipt

    def _find(self, problems: dict[str, str], k: int) -> None:
        pairs = self.retriever.pairs(list(problems.values()), k)
        for prompt_id, found in zip(problems, pairs, strict=True):
            self._found[prompt_id, k] = SkillPairs(
                prompt_id=prompt_id,
                skill_ids=tuple(entry.entry_id for entry in found.skills),
                mistake_ids=tuple(entry.entry_id for entry in found.mistakes),
                skills=tuple(entry.text for entry in found.skills),
                mistakes=tuple(entry.text for entry in found.mistakes),
                titles=tuple(entry.texts[0] for entry in found.skills),
                weights=found.weights,
                bank_version=self.version,
            )

    def save(self, since: int, polarities: Sequence[Sequence[tuple[str, Polarities]]], *shown: pa.RecordBatch) -> int:
        """Write down what came of the pairs that were `shown`, on top of version `since` (0: the latest), in one
        commit; the bank's version. `polarities` of a batch name its prompts, with a value for each pair in their order;
        a view beyond them counts nothing."""
        self._go_back_to(since)
        counts: Counter[tuple[str, int]] = Counter()
        for pairs, of_prompts in zip(shown, polarities, strict=True):
            shown_to = {row.prompt_id: row for row in decode(SkillPairs, pairs)}
            for prompt_id, values in of_prompts:
                own = shown_to[prompt_id]
                for skill, mistake, value in zip(own.skill_ids, own.mistake_ids, values, strict=False):
                    if value is not None:
                        counts.update((entry, place) for entry in (skill, mistake) for place in (0, PLACE[value]))
        if entries := sorted({entry for entry, _ in counts}):
            self.bank.record({e: (counts[e, 0], counts[e, 1], counts[e, 2], counts[e, 3]) for e in entries})
        return self.bank.version

    def restore(self, version: int) -> int:
        """Go on from an older version: the bank's content becomes that; its new version."""
        self._go_back_to(version)
        return self.bank.version

    def _go_back_to(self, version: int) -> None:
        if version not in (0, self.bank.version):
            self.bank.restore(version)

    def grow(
        self, since: int, most_new: int, capacity: int, prompts: pa.RecordBatch, *batches: pa.RecordBatch
    ) -> tuple[int, str]:
        """Update version `since` of the bank from rollouts and their verdicts, batch by batch in turn; the version that
        came of it, and what was done, in words."""
        self._go_back_to(since)
        memories = [m for at in range(0, len(batches), 2) for m in memories_of(prompts, batches[at], batches[at + 1])]
        limits = {"most_new": most_new, "capacity": capacity}
        update = online_update(self.bank, memories, self.extractor, merger=self.merger, **limits)
        errors = "".join(f", {count} {name}" for name, count in sorted(update.errors.items()))
        counts = f"{len(update.added)} added, {len(update.merged)} merged, {len(update.dropped)} dropped{errors}"
        version = self.bank.version
        return version, f"version {version} from {len(memories)} rollouts: {counts}"


def own_bank(path: str, source: str) -> SkillBank:
    """The bank at `path`, made from `source` where it is not there yet. Raises SkillError."""
    if bank_exists(path) or not source:
        return SkillBank.open(path)
    if Path(source).is_file():
        note = f"import of {source}"
        return create_bank(path, load_published(source), note, load_metadata(source), exist_ok=True)
    return copy_bank(source, path, exist_ok=True)


def memories_of(prompts: pa.RecordBatch, rollouts: pa.RecordBatch, verdicts: pa.RecordBatch) -> list[Memory]:
    """The judged rollouts as memories, in their order."""
    own = rows_named(prompts, "prompt_id", rollouts.column("prompt_id"))
    text_of = dict(zip(own.column("prompt_id").to_pylist(), own.column("text").to_pylist(), strict=True))
    verdict_of = {verdict.rollout_id: verdict for verdict in decode(Verdict, verdicts)}
    memories = []
    for rollout in decode(Rollout, rollouts):
        verdict = verdict_of.get(rollout.rollout_id)
        if verdict and not verdict.abstained:
            memories.append(
                Memory(
                    problem=text_of[rollout.prompt_id],
                    response=rollout.text,
                    answer=verdict.answer,
                    passed=verdict.passed,
                    rollout_id=rollout.rollout_id,
                    gold=rollout.answer,
                )
            )
    return memories
