"""Everything that crosses a process: frozen dataclasses, and the Arrow schemas they travel in.

Payload (rollouts, teacher scores, verdicts, prompts) is an Arrow `RecordBatch` in Ray's object store; the driver holds
references and small receipts, never token data. `encode` turns records into a batch, `decode` reads them back as
zero-copy views. Lengths are checked where a record is made: a shift by one token is the classic silent bug here.

Shapes: L tokens of prompt and response, R = L - prompt_length response tokens, K top-k ids, D hidden size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from .errors import RecordError

EMPTY_F = np.zeros(0, np.float32)
EMPTY_FF = np.zeros((0, 0), np.float32)
EMPTY_II = np.zeros((0, 0), np.int32)

INTS, FLOATS, BOOLS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())


def _aligned(record: object, name: str, array: np.ndarray, rows: int) -> None:
    if len(array) != rows:
        kind = type(record).__name__
        raise RecordError(f"{kind}.{name} must align with the response", f"{len(array)} entries for {rows} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset. Example: `Prompt(prompt_id="train-7", text="3 + 4 =", token_ids=…, answer="7")`."""

    prompt_id: str
    text: str  # the user's turn, before the chat template
    token_ids: np.ndarray  # int32 [P], chat template and generation prompt applied
    answer: str  # gold answer for the verifier; "" where the dataset has none
    tags: str = ""  # free label of the row: the family, the source
    teacher: str = ""  # name of the teacher to ask; "" is the only one

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "prompt_id": pa.string(),
            "text": pa.string(),
            "token_ids": INTS,
            "answer": pa.string(),
            "tags": pa.string(),
            "teacher": pa.string(),
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
    context: str = "plain"  # the prompt template that the generator was shown
    token_ids: np.ndarray  # int32 [L], prompt then response
    prompt_length: int
    text: str  # the decoded response, special tokens left out
    logprobs: np.ndarray  # float32 [R], of the sampler as it sampled
    loss_mask: np.ndarray  # bool [R]
    topk_ids: np.ndarray = field(default_factory=lambda: EMPTY_II)  # int32 [R,K], the sampler's own support, if asked
    weight_version_min: int = 0
    weight_version_max: int = 0
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
            "weight_version_min": pa.int64(),
            "weight_version_max": pa.int64(),
            "finish_reason": pa.string(),
            "answer": pa.string(),
            "teacher": pa.string(),
        }
    )

    def __post_init__(self) -> None:
        rows = self.response_length
        if self.prompt_length < 1 or rows < 0:
            raise RecordError(
                "a rollout has a prompt of at least one token",
                f"prompt_length {self.prompt_length} of {len(self.token_ids)} tokens in {self.rollout_id}",
            )
        _aligned(self, "logprobs", self.logprobs, rows)
        _aligned(self, "loss_mask", self.loss_mask, rows)
        if self.topk_ids.size:
            _aligned(self, "topk_ids", self.topk_ids, rows)

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


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
    hidden: np.ndarray = field(default_factory=lambda: EMPTY_FF)  # [R,D] last hidden states, the head's input
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
            "hidden": pa.large_binary(),
            "error_class": pa.string(),
        }
    )

    def __post_init__(self) -> None:
        rows = len(self.logprobs)
        for name in ("topk_ids", "topk_logprobs", "hidden"):
            if getattr(self, name).size:
                _aligned(self, name, getattr(self, name), rows)
        if self.topk_ids.shape != self.topk_logprobs.shape:
            raise RecordError(
                "top-k ids and logprobs have one shape", f"{self.topk_ids.shape} and {self.topk_logprobs.shape}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the verifier decided on one rollout: correct, incorrect, or abstained (why)."""

    rollout_id: str
    score: float  # reward; 0 where abstained
    passed: bool
    answer: str = ""  # the parsed answer, canonical; "" where none was found
    abstained: bool = False
    error_class: str = ""  # timeout | no_gold | memory | crash | an exception's name
    seconds: float = 0.0

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "rollout_id": pa.string(),
            "score": pa.float64(),
            "passed": pa.bool_(),
            "answer": pa.string(),
            "abstained": pa.bool_(),
            "error_class": pa.string(),
            "seconds": pa.float64(),
        }
    )


Record = TypeVar("Record", Prompt, Rollout, TeacherScores, Verdict)

MATRIX_COLUMNS = ("topk_ids", "topk_logprobs")  # [R,K], stored flat; R is the length of the row's `logprobs`
HIDDEN_DTYPE = b"hidden_dtype"


def encode(kind: type[Record], records: Sequence[Record]) -> pa.RecordBatch:
    """Records of one kind as one RecordBatch with that kind's schema."""
    schema: pa.Schema = kind.SCHEMA
    columns = []
    for column in schema:
        values = [getattr(record, column.name) for record in records]
        if pa.types.is_list(column.type):
            columns.append(_ragged(values, column.type))
        elif pa.types.is_large_binary(column.type):
            columns.append(_binary(values))
            dtypes = {str(v.dtype) for v in values if v.size} or {"float32"}
            if len(dtypes) > 1:
                raise RecordError("hidden states of one batch share a dtype", str(sorted(dtypes)))
            schema = schema.with_metadata({HIDDEN_DTYPE: dtypes.pop().encode()})
        else:
            columns.append(pa.array(values, column.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _ragged(values: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([v.size for v in values], out=offsets[1:])
    flat = np.concatenate([v.reshape(-1) for v in values]) if values else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(kind.value_type.to_pandas_dtype(), copy=False))
    )


def _binary(values: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([v.nbytes for v in values], out=offsets[1:])
    flat = [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in values if v.size]
    data = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def decode(kind: type[Record], batch: pa.RecordBatch, rows: Sequence[int] | None = None) -> list[Record]:
    """The records of `batch` (those at `rows`, if given). Arrays are read-only views of the batch's buffers."""
    if not batch.schema.equals(kind.SCHEMA):
        raise RecordError(f"a batch of {kind.__name__} has its schema", str(batch.schema.names))
    wanted = range(batch.num_rows) if rows is None else rows
    columns = {f.name: _column(batch, f.name, wanted) for f in fields(kind)}
    records = []
    for i in range(len(wanted)):
        row = {name: values[i] for name, values in columns.items()}
        for name in MATRIX_COLUMNS:
            if name in row:
                row[name] = row[name].reshape(len(row["logprobs"]), -1) if row[name].size else row[name].reshape(0, 0)
        if "hidden" in row:
            row["hidden"] = row["hidden"].reshape(len(row["logprobs"]), -1) if row["hidden"].size else EMPTY_FF
        records.append(kind(**row))
    return records


def _column(batch: pa.RecordBatch, name: str, rows: Sequence[int]) -> list[Any]:
    column = batch.column(name)
    if pa.types.is_list(column.type):
        offsets = column.offsets.to_numpy()
        flat = column.values.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type.value_type))
        return [flat[offsets[i] : offsets[i + 1]] for i in rows]
    if pa.types.is_large_binary(column.type):
        dtype = np.dtype(batch.schema.metadata[HIDDEN_DTYPE].decode())
        return [np.frombuffer(column[i].as_buffer(), dtype) for i in rows]
    if isinstance(rows, range) and len(rows) == len(column):
        return column.to_pylist()
    return [column[i].as_py() for i in rows]


# ---- requests and receipts: small, and the driver reads them -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Ask for one rollout of one prompt. `seed` alone decides its random numbers, whatever the batch it runs in."""

    rollout_id: str
    group_id: str
    sample_index: int
    row: int  # of the prompt batch
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `topk_support` > 0 also returns the sampler's own top-k ids."""

    max_new_tokens: int
    temperature: float = 1.0
    topk_support: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What a teacher returns: `sampled` logprobs; `topk` of its own; `given` ids (the rollout's); `hidden` states."""

    signal: str = "sampled"
    top_k: int = 0
    context: str = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One named loss term with its weight and options; the learner sums these and knows no method's name."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One rank's share of one learner step, over the batches beside it: rollouts, then scores, then verdicts."""

    step: int  # from 0; decides the learning rate
    rollout_batches: int
    score_batches: int
    micro_batches: tuple[tuple[tuple[int, int], ...], ...]  # (rollout batch, row); every rank has equally many


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one learner step did, over all ranks. A metric is a mean over trained tokens, or its name says what else."""

    loss: float
    tokens: int  # response tokens trained
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a service says about one batch: counts and seconds for the driver's metrics, never tokens."""

    rows: int
    tokens: int  # generated, scored (prompt included) or, for the verifier, 0
    seconds: float  # spent working on the batch
    lengths: tuple[int, ...] = ()  # tokens of each rollout, prompt included
    response_lengths: tuple[int, ...] = ()
    rollout_ids: tuple[str, ...] = ()  # of the rows that were served; a teacher's leaves out what it refused
    weight_version: int = 0  # the oldest in the batch
    truncated: int = 0
    rewards: tuple[float, ...] = ()  # the verifier's, a row each
    answers: tuple[str, ...] = ()  # the verifier's parsed answers, a row each
    passed: tuple[bool, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)  # error class → count


# ---- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some parameters as one flat byte array. `entries`: name, dtype, shape, offset in bytes."""

    version: int
    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]
    data: np.ndarray  # uint8 [bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Sent after a version's buckets. A replica that does not match it must not generate."""

    version: int
    buckets: int
    fingerprint: str  # blake2b over the parameters' names and bytes, in order
    canary_ids: np.ndarray  # int32 [C], a fixed prompt
    canary_logprobs: np.ndarray  # float32 [C-1], by the learner, of each next token
    tolerance: float  # largest absolute difference allowed, nats


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that names a draw, e.g. `seed_of(run_seed, prompt_id, epoch, sample)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
