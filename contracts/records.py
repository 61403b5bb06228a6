"""Everything that crosses a process: frozen dataclasses, and the Arrow schemas they travel in.

Payload (rollouts, scores, credits, verdicts, prompts) is an Arrow `RecordBatch` in Ray's object store, made and read by
arrow.py; the driver holds references and small receipts, never token data. Lengths are checked where a record is made:
a shift by one token is the classic silent bug here.

Shapes: L tokens of prompt and response, R = L - prompt_length response tokens, K top-k ids, D hidden size.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from .errors import RecordError

EMPTY_I = np.zeros(0, np.int32)
EMPTY_F = np.zeros(0, np.float32)
EMPTY_FF = np.zeros((0, 0), np.float32)
EMPTY_II = np.zeros((0, 0), np.int32)

Polarities = tuple[int | None, ...]  # what came of each view: 1 helpful, -1 harmful, 0 neutral, None: not shown
INTS, FLOATS, BOOLS, STRINGS = map(pa.list_, (pa.int32(), pa.float32(), pa.bool_(), pa.string()))


def _aligned(record: object, name: str, array: np.ndarray, rows: int) -> None:
    if len(array) != rows:
        kind = type(record).__name__
        raise RecordError(f"{kind}.{name} must align with the response", f"{len(array)} entries for {rows} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset. Example: `Prompt(prompt_id="train-7", text="3 + 4 =", token_ids=…, answer="7")`."""

    prompt_id: str
    text: str  # the last user turn, before the chat template
    turns: str = ""  # JSON of the turns before it, [{"role": …, "content": …}, …]; "" where it is the only one
    token_ids: np.ndarray  # int32 [P], chat template and generation prompt applied
    answer: str  # gold answer for the verifier; "" where the dataset has none
    other_answers: tuple[str, ...] = ()  # golds that are as right as `answer`
    solution: str = ""  # a worked solution in words; "" where the dataset has none
    solution_ids: np.ndarray = field(default_factory=lambda: EMPTY_I)  # int32 [R], the solution as a response, with EOS
    strategy: str = ""  # how to solve it, in words and without its answer; "" where the dataset has none
    tags: str = ""  # free label of the row: the family, the source
    teacher: str = ""  # name of the teacher to ask; "" asks none
    row: str = ""  # the dataset's whole row as JSON, where the verifier reads it

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "prompt_id": pa.string(),
            "text": pa.string(),
            "turns": pa.string(),
            "token_ids": INTS,
            "answer": pa.string(),
            "other_answers": STRINGS,
            "solution": pa.string(),
            "solution_ids": INTS,
            "strategy": pa.string(),
            "tags": pa.string(),
            "teacher": pa.string(),
            "row": pa.string(),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled (or given) response. Its id names the prompt, the pass over the data and the sample."""

    rollout_id: str
    prompt_id: str
    group_id: str  # all samples of one prompt in one pass over the data
    sample_index: int
    source: str = "student"  # student | teacher | dataset
    context: str = "plain"  # the template of the prompt that the generator was shown; `token_ids` hold the plain one
    token_ids: np.ndarray  # int32 [L], prompt then response
    prompt_length: int
    text: str  # the decoded response, special tokens left out but for the marks of its reasoning
    logprobs: np.ndarray  # float32 [R], of the sampler as it sampled; 0 where the response was given
    loss_mask: np.ndarray  # bool [R]
    topk_ids: np.ndarray = field(default_factory=lambda: EMPTY_II)  # int32 [R,K], the sampler's own support, if asked
    # int32 [R], of the weights that sampled each token; empty where none were
    weight_versions: np.ndarray = field(default_factory=lambda: EMPTY_I)
    finish_reason: str = "stop"  # stop | length | error
    answer: str = ""  # the prompt's gold answer travels with the rollout to the verifier
    teacher: str = ""  # and so does the name of the teacher to ask

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "rollout_id": pa.string(),
            "prompt_id": pa.string(),
            "group_id": pa.string(),
            "sample_index": pa.int32(),
            "source": pa.string(),
            "context": pa.string(),
            "token_ids": INTS,
            "prompt_length": pa.int32(),
            "text": pa.string(),
            "logprobs": FLOATS,
            "loss_mask": BOOLS,
            "topk_ids": INTS,
            "weight_versions": INTS,
            "finish_reason": pa.string(),
            "answer": pa.string(),
            "teacher": pa.string(),
        }
    )

    def __post_init__(self) -> None:
        rows = self.response_length
        if self.prompt_length < 1 or rows < 0:
            found = f"prompt_length {self.prompt_length} of {len(self.token_ids)} tokens in {self.rollout_id}"
            raise RecordError("a rollout has a prompt of at least one token", found)
        _aligned(self, "logprobs", self.logprobs, rows)
        _aligned(self, "loss_mask", self.loss_mask, rows)
        for name in ("topk_ids", "weight_versions"):
            if getattr(self, name).size:
                _aligned(self, name, getattr(self, name), rows)

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled its tokens; 0 where none were."""
        return int(self.weight_versions.min()) if self.weight_versions.size else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """One teacher's view of one rollout's response tokens, at temperature 1. Refused: `error_class` and no arrays."""

    rollout_id: str
    teacher_id: str
    teacher_version: int = 0  # of a teacher that follows the student's weights; 0 for a frozen one
    context: str = "plain"
    logprobs: np.ndarray = field(default_factory=lambda: EMPTY_F)  # float32 [R], of the sampled tokens
    topk_ids: np.ndarray = field(default_factory=lambda: EMPTY_II)  # int32 [R,K]
    topk_logprobs: np.ndarray = field(default_factory=lambda: EMPTY_FF)  # float32 [R,K]; tail = log(1 - Σ exp)
    entropy: np.ndarray = field(default_factory=lambda: EMPTY_F)  # float32 [R], nats, over the whole vocabulary
    hidden: np.ndarray = field(default_factory=lambda: EMPTY_FF)  # [R,D] last hidden states, the head's input
    # float32 [R,V], logprobs of the sampled tokens under each of V contexts; top-k arrays are then [R,V·K]
    views: np.ndarray = field(default_factory=lambda: EMPTY_FF)
    view_weights: np.ndarray = field(default_factory=lambda: EMPTY_F)  # float32 [V], sums to 1
    error_class: str = ""

    # Hidden states travel as raw bytes: float32, or bfloat16 bits, which neither Arrow nor numpy has.
    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "rollout_id": pa.string(),
            "teacher_id": pa.string(),
            "teacher_version": pa.int64(),
            "context": pa.string(),
            "logprobs": FLOATS,
            "topk_ids": INTS,
            "topk_logprobs": FLOATS,
            "entropy": FLOATS,
            "hidden": pa.large_binary(),
            "views": FLOATS,
            "view_weights": FLOATS,
            "error_class": pa.string(),
        }
    )

    def __post_init__(self) -> None:
        rows = len(self.logprobs)
        for name in ("topk_ids", "topk_logprobs", "entropy", "hidden", "views"):
            if getattr(self, name).size:
                _aligned(self, name, getattr(self, name), rows)
        if self.views.size and self.views.shape[1] != len(self.view_weights):
            raise RecordError("every view has a weight", f"{self.views.shape[1]} views, {len(self.view_weights)}")
        if self.topk_ids.shape != self.topk_logprobs.shape:
            shapes = f"{self.topk_ids.shape} and {self.topk_logprobs.shape}"
            raise RecordError("top-k ids and logprobs have one shape", shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCredit:
    """One service's credit for each response token of one rollout. Refused: `error_class` and no values."""

    rollout_id: str
    service: str
    values: np.ndarray = field(default_factory=lambda: EMPTY_F)  # float32 [R]
    error_class: str = ""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {"rollout_id": pa.string(), "service": pa.string(), "values": FLOATS, "error_class": pa.string()}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the verifier decided on one rollout: correct, incorrect (why, if the response could not be judged by its own
    fault), or abstained (why)."""

    rollout_id: str
    score: float  # reward; 0 where abstained
    passed: bool
    answer: str = ""  # the parsed answer, canonical; "" where none was found
    path: str = ""  # a digest of the reasoning path: equal for two responses that take the same steps
    abstained: bool = False
    error_class: str = ""  # timeout | memory | crash | too_large | gold_… | no_gold | an exception's name | …
    seconds: float = 0.0

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "rollout_id": pa.string(),
            "score": pa.float64(),
            "passed": pa.bool_(),
            "answer": pa.string(),
            "path": pa.string(),
            "abstained": pa.bool_(),
            "error_class": pa.string(),
            "seconds": pa.float64(),
        }
    )


# ---- requests (what services answer beside their batches: receipts.py) ----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Ask for one rollout of one prompt. `seed` alone decides its random numbers, whatever the batch it runs in."""

    rollout_id: str
    group_id: str
    sample_index: int
    row: int  # of the prompt batch
    seed: int
    source: str = "student"  # who answers: student | teacher | dataset or replay (the row's own solution)
    context: str = "plain"  # the template of the prompt to show


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `topk_support` > 0 also returns the sampler's own top-k ids."""

    max_new_tokens: int
    temperature: float = 1.0
    topk_support: int = 0
    mask_special: bool = False  # no loss on special tokens, marks of thinking and runs of newlines


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What a teacher returns: `sampled` logprobs; `topk` of its own; `given` ids (the rollout's); `hidden` states.

    `context` names the template of its prompt (models/contexts.py). `everyone`: each teacher scores every rollout, and
    not only those that name it. `views`: the context is filled in with this many of the prompt's skill-mistake pairs,
    one at a time, and each rollout is scored after every one of them.
    """

    signal: str = "sampled"
    top_k: int = 0
    context: str = "plain"
    everyone: bool = False
    views: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One named loss term; the learner sums weight · Σ loss / count of these and knows no method's name.

    `reduction` says what is counted: "tokens" (their mean), "sequences" (the mean of each sequence's mean), or
    "length" (Σ / (`length` · sequences), Dr. GRPO's constant).
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""  # whose scores it reads; "" the teacher that the rollout names
    reference: bool = False  # it also reads the reference model's
    credit: str = ""  # the service whose credit of each token it adds to the advantage; "" none
    sources: tuple[str, ...] = ("student",)  # the rollouts that it trains on
    contexts: tuple[str, ...] = ()  # and the templates that they were sampled under; (): whichever
    reduction: str = "tokens"
    length: int = 0
    of_batch: bool = False  # count the tokens that any term but a replay's trains, and not its own alone
    label: str = ""  # its name in the metrics, where one term is summed twice
    loss: Any = None  # a class derived from `learner.terms.base.LossTerm`, in place of the one called `name`

    @property
    def key(self) -> str:
        return self.label or (f"{self.name}.{self.teacher}" if self.teacher else self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How the learner corrects for rollouts of another policy μ; ρ = π_old/μ. Rejected tokens leave the denominators.

    kind: "none"; "truncated", weight min(ρ, high); "masked", weight ρ where low ≤ ρ ≤ high and rejected elsewhere.
    level: "token"; "sequence", the product over the response; "geometric", its geometric mean (masks only).
    proximal: π_old is "recompute"d before the step's first update, is the "behaviour" policy μ, or is "interpolate"d.
    """

    kind: str = "none"
    low: float = 0.5
    high: float = 2.0
    level: str = "token"
    veto: float = 0.0  # a sequence with any ρ below this is rejected
    probability_gap: float = 0.0  # tokens with |π_old − μ| above this are rejected; 0 rejects none
    normalise: bool = False  # divide the weights by their mean over the batch
    proximal: str = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """A row to train: where it is, and what the verdicts on its group made of it."""

    batch: int
    row: int
    advantage: float = 0.0
    weight: float = 1.0  # multiplies its token losses, not the denominators


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One rank's share of one learner step, over the batches beside it: rollouts, then scores, then credits."""

    step: int  # from 0 in its stage; decides the learning rate
    version: int  # of the weights that it starts from
    rollout_batches: int
    score_batches: int
    credit_batches: int = 0
    rate: float = 1.0  # times the learning rate of the step
    updates: tuple[tuple[tuple[TrainRow, ...], ...], ...]  # updates → micro-batches → rows, as many on any rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one learner step did, over all ranks. A metric is a mean over trained tokens, or its name says what else."""

    loss: float
    tokens: int  # response tokens trained
    rollouts: int  # that trained in a term
    seconds: float
    metrics: dict[str, float]
    dropped: dict[str, int] = field(default_factory=dict)  # reason → rollouts that trained in no term
    polarities: dict[str, Polarities] = field(default_factory=dict)  # by rollout, of its teacher's views
    untrained: dict[str, str] = field(default_factory=dict)  # reasons of the rollouts that trained in no term


# ---- weights --------------------------------------------------------------------------------------------------------

BucketEntries = tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, offset in bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some parameters. Until it is sent, its arrays are the learner's own memory."""

    version: int
    entries: BucketEntries
    arrays: tuple[np.ndarray, ...]  # uint8 [bytes], one an entry


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Sent after a version's buckets. A replica that does not match it must not generate."""

    version: int
    buckets: int
    fingerprint: str  # xxh3 over the parameters' names and bytes, in order; "" where no bytes pass by
    canary_ids: np.ndarray  # int32 [C], a fixed prompt
    canary_logprobs: np.ndarray  # float32 [C-1], by the learner, of each next token
    tolerance: float  # largest difference allowed, nats (models/weight_proof.py)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that names a draw, e.g. `seed_of(run_seed, prompt_id, epoch, sample)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
