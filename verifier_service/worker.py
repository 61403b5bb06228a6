"""The verifier worker: what a Ray actor of the verifier pool runs. Rollouts in, verdicts and a receipt out."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from ..contracts.arrow import encode, rows_named
from ..contracts.protocols import Response
from ..contracts.receipts import VerdictReceipt
from ..contracts.records import Verdict
from ..contracts.sections import THINKING
from ..contracts.verifier_config import Verifier
from .paths import reasoning_path
from .pool import VerifierPool
from .processes import Outcome
from .verifiers import make_verifier

ANSWER_CHARACTERS = 256  # of an answer, kept: it goes into the receipt, which the driver reads
ASKED = ("text", "row", "other_answers")  # of the rollout's prompt
COLUMNS = ("prompt_id", "text", "answer", "finish_reason")


class VerifierWorker:
    """One replica with its own killable processes. `judge` may be called from several threads at once.

    `functions`: the reward functions of one's own that the section names, pickled; `api_key`: of http verifiers;
    `thinking`: the marks of a response's reasoning. Raises ConfigError.
    """

    def __init__(
        self,
        *,
        config: Verifier,
        functions: Mapping[str, bytes] | None = None,
        api_key: str = "",
        thinking: tuple[str, str] = THINKING,
    ) -> None:
        self.lenient = config.response_fault == "abstain"
        self.pool = VerifierPool(
            make_verifier(config, functions, api_key, thinking),
            timeout_seconds=config.timeout_seconds,
            memory_gib=config.memory_gib,
            processes=max(2, int(config.num_cpus)),
        )

    def judge(
        self, rollouts: pa.RecordBatch, prompts: pa.RecordBatch | None = None
    ) -> tuple[pa.RecordBatch, VerdictReceipt]:
        """A verdict for every rollout, in order: its score and whether it passed, or abstained and why.

        `prompts`, where the verifier reads more than the gold answer: the batch that holds the rollouts' prompts.
        Raises VerifierError.
        """
        start = time.perf_counter()
        responses = _responses(rollouts, prompts)
        outcomes = self.pool.judge(responses)
        ids = rollouts.column("rollout_id").to_pylist()
        verdicts = [
            _verdict(rollout_id, response.text, outcome, self.lenient)
            for rollout_id, response, outcome in zip(ids, responses, outcomes, strict=True)
        ]
        receipt = VerdictReceipt(
            rows=len(verdicts),
            seconds=time.perf_counter() - start,
            rewards=tuple(verdict.score for verdict in verdicts),
            answers=tuple(verdict.answer for verdict in verdicts),
            paths=tuple(verdict.path for verdict in verdicts),
            abstained=tuple(verdict.abstained for verdict in verdicts),
            passed=tuple(verdict.passed for verdict in verdicts),
            parts=_parts(outcomes),
            errors=dict(Counter(verdict.error_class for verdict in verdicts if verdict.abstained)),
            faults=dict(Counter(one.error_class for one in verdicts if one.error_class and not one.abstained)),
        )
        return encode(Verdict, verdicts), receipt

    def close(self) -> None:
        """End the verifier's processes."""
        self.pool.close()


def _responses(rollouts: pa.RecordBatch, prompts: pa.RecordBatch | None) -> list[Response]:
    """What the verifier is given of each rollout."""
    asked = {}
    if prompts is not None:
        own = rows_named(prompts, "prompt_id", rollouts.column("prompt_id"))
        columns = [own.column(name).to_pylist() for name in ASKED]
        asked = dict(zip(own.column("prompt_id").to_pylist(), zip(*columns, strict=True), strict=True))
    prompt_ids, texts, golds, reasons = (rollouts.column(name).to_pylist() for name in COLUMNS)
    lengths = rollouts.column("loss_mask").value_lengths().to_pylist()
    responses = []
    for prompt_id, text, gold, reason, length in zip(prompt_ids, texts, golds, reasons, lengths, strict=True):
        prompt, row, others = asked.get(prompt_id, ("", "", ()))
        truncated = reason == "length"
        responses.append(Response(text, gold, prompt, row, length, truncated, tuple(others)))
    return responses


def _verdict(rollout_id: str, text: str, outcome: Outcome, lenient: bool) -> Verdict:
    judgement = outcome.judgement
    abstained = bool(judgement.error_class) and (lenient or not judgement.fault)
    return Verdict(
        rollout_id=rollout_id,
        score=0.0 if abstained else judgement.score,
        passed=judgement.passed and not judgement.error_class,
        answer=judgement.answer[:ANSWER_CHARACTERS],
        path=reasoning_path(text),
        abstained=abstained,
        error_class=judgement.error_class,
        seconds=outcome.seconds,
    )


def _parts(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Each part's Σ of scores, over the outcomes that have it."""
    sums: Counter[str] = Counter()
    for outcome in outcomes:
        sums.update(dict(outcome.judgement.parts))
    return dict(sums)
