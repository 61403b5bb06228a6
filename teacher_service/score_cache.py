"""Teacher scores kept on disk by their content: a retry, a resume or a later epoch does not pay for them again.

An entry is what the engine reads at once: a forward pass of packed rollouts; a whole call, of an engine of one's own;
one rollout, where servers answer. It is no finer, because a model rounds otherwise in another batch. So a hit is what
the engine would answer, bit for bit, and a run's weights do not depend on what was kept. A rollout that stands alone in
its forward pass is an entry of its own, whatever it is asked with.

Its name is a digest of the teacher, the weights that it holds, the request and the token ids. It is written aside,
renamed, and sealed with a checksum, so that readers and writers need no lock, on a file system of several machines too.
Its payload is an Arrow stream. What was refused is not kept.
"""

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import xxhash

from ..contracts.arrow import decode, encode
from ..contracts.errors import RecordError, TeacherError
from ..contracts.protocols import TeacherEngine
from ..contracts.records import EMPTY_II, Rollout, ScoreRequest, TeacherScores
from .requests import batches_of, only_numbers, refusal

SCORES, CHECKPOINTS = "scores", "checkpoints"  # folders of a run
FROZEN = "frozen"  # the weights of a teacher that takes none
LASTING, PASSING = ".given", ".sampled"  # entries by what they are of
# How often an entry is expected to be asked for: writing may take that share of the seconds that the engine took. Given
# answers come again every epoch. Sampled ones do only where work is lost and done again: one in fifty, a guess.
EXPECTED = {LASTING: 1.0, PASSING: 0.02}
SEAL_BYTES = 16
LOOKED_AT = 64  # times that the folder is looked over while as much is written as it may hold
FILLED = 7 / 8  # of the bound, after that
LARGEST = 1 / 8  # of the bound, of one entry
ABANDONED_SECONDS = 3600.0  # after which a file that nobody renamed is one of a writer that was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlace:
    """Where a teacher's scores are kept. `scorer`: a digest of all that decides them but the weights that it takes."""

    run: str  # the run's folder
    teacher_id: str
    most_bytes: int
    scorer: str

    @property
    def folder(self) -> Path:
        return Path(self.run, SCORES, quote(self.teacher_id, safe="").replace(".", "%2E"))


@dataclass(slots=True)
class CacheUse:
    """What came of one call. `hits`: indices of the rollouts that the engine was not asked for."""

    hits: set[int] = field(default_factory=set)
    bytes_read: int = 0
    bytes_written: int = 0
    note: str = ""  # what a person should know, said once


class ScoreCache:
    """Between a worker and its engine. It is off, which is said once, where the disk takes nothing."""

    def __init__(self, place: CachePlace, engine: TeacherEngine) -> None:
        self.place, self.engine, self.folder = place, engine, place.folder
        self._earned = self._spent = 0.0  # seconds that writing may take, and has taken
        self._unseen = float("inf")  # bytes written since the folder was looked over
        self._begun = self._off = False
        self._note = ""

    def score(
        self, rollouts: Sequence[Rollout], request: ScoreRequest, weights: str
    ) -> tuple[list[TeacherScores], CacheUse]:
        """What the engine says of `rollouts` with `weights` (their fingerprint, or FROZEN), in their order."""
        use, scores = CacheUse(), dict[int, TeacherScores]()
        same: defaultdict[Path, list[list[int]]] = defaultdict(list)  # equal ones are asked for once
        for unit in self._units(rollouts, request):
            same[self._entry([rollouts[i] for i in unit], request, weights)].append(unit)
        missed: dict[Path, list[int]] = {}
        for entry, (first, *others) in same.items():
            found = self._read(entry, [rollouts[i] for i in first], use)
            if found is None:
                missed[entry] = first
                use.hits.update(i for unit in others for i in unit)
            else:
                use.hits.update(i for unit in (first, *others) for i in unit)
                scores.update(zip(first, found, strict=True))
        asked = [i for i in range(len(rollouts)) if i not in use.hits]
        answers, seconds, failure = self._ask([rollouts[i] for i in asked], request) if asked else ({}, 0.0, None)
        scores.update((asked[i], only_numbers(answer)) for i, answer in answers.items())
        tokens = sum(len(rollouts[i].token_ids) for i in asked)
        for entry, unit in missed.items():
            share = sum(len(rollouts[i].token_ids) for i in unit) / tokens
            if all(i in scores for i in unit):
                use.bytes_written += self._keep(entry, [scores[i] for i in unit], share * seconds)
        if failure:
            raise failure
        for first, *others in same.values():
            for unit in others:
                scores.update(zip(unit, [scores[i] for i in first], strict=True))
        for i in use.hits:
            own = {"rollout_id": rollouts[i].rollout_id, "context": request.context}
            scores[i] = replace(scores[i], teacher_id=self.place.teacher_id, **own)
        use.note, self._note = self._note, ""
        return [scores[i] for i in range(len(rollouts))], use

    def _ask(
        self, rollouts: Sequence[Rollout], request: ScoreRequest
    ) -> tuple[Mapping[int, TeacherScores], float, TeacherError | None]:
        """The engine's answers by index, and its seconds. Of servers that failed in the middle, what they answered, for
        the call that is made again; and the failure."""
        start = time.perf_counter()
        try:
            return dict(enumerate(self.engine.score(rollouts, request))), time.perf_counter() - start, None
        except TeacherError as error:
            return getattr(self.engine, "answered", {}), time.perf_counter() - start, error

    def _units(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[list[int]]:
        """Indices of the rollouts that the engine reads together, as `batches_of` packs them. Those that it refuses are
        in none. Where some units are left out, the engine packs the others as before: lengths only grow."""
        engine: Any = self.engine
        most, vocab = getattr(engine, "tokens_per_batch", 0), getattr(engine, "vocab", 0)
        if not (most and vocab):
            return [list(range(len(rollouts)))] if rollouts else []
        sound = [i for i, r in enumerate(rollouts) if not refusal(r, request, context=engine.context, vocab=vocab)]
        return [[sound[i] for i in batch] for batch in batches_of([len(rollouts[i].token_ids) for i in sound], most)]

    def _entry(self, rollouts: Sequence[Rollout], request: ScoreRequest, weights: str) -> Path:
        """The file of what is asked: whoever asks for the same, asks for that file."""
        asked = blake2b(repr((self.place.scorer, weights, request.signal, request.top_k)).encode(), digest_size=20)
        for rollout in rollouts:
            support = rollout.topk_ids if request.signal == "given" else EMPTY_II
            asked.update(repr((len(rollout.token_ids), rollout.prompt_length, support.shape)).encode())
            asked.update(np.ascontiguousarray(rollout.token_ids, np.int32).data)
            asked.update(np.ascontiguousarray(support, np.int32).tobytes())
        lasting = weights == FROZEN and len(rollouts) == 1 and rollouts[0].source != "student"
        return self.folder / f"{asked.hexdigest()}{LASTING if lasting else PASSING}"

    def _read(self, entry: Path, rollouts: Sequence[Rollout], use: CacheUse) -> list[TeacherScores] | None:
        """None where there is no such entry, or none that is whole."""
        try:
            data = entry.read_bytes()
        except OSError:
            return None
        found = unsealed(data, entry.stem)
        if found is None or [len(s.logprobs) for s in found] != [r.response_length for r in rollouts]:
            with suppress(OSError):  # the disk may take nothing
                entry.unlink()
            return None
        with suppress(OSError):  # another replica may have let it go
            os.utime(entry)
        use.bytes_read += len(data)
        return found

    # ---- writing ----

    def _keep(self, entry: Path, scores: Sequence[TeacherScores], seconds: float) -> int:
        """Write an entry that took the engine `seconds`, where that is worth it; its bytes, 0 where it was not."""
        self._earned += EXPECTED[entry.suffix] * seconds
        refused = any(score.error_class for score in scores)
        if self._off or refused or self._spent > self._earned or _size_of(scores) > LARGEST * self.place.most_bytes:
            return 0
        start = time.perf_counter()
        try:
            if self._unseen >= self.place.most_bytes / LOOKED_AT:
                self._look_over()
            written = self._write(entry, scores)
        except FileNotFoundError:  # somebody has tidied up meanwhile
            self._unseen = float("inf")
            return 0
        except OSError as error:
            self._off = True
            why = error.strerror or error
            self._note = f"no more scores of {self.place.teacher_id} are kept: {why} ({self.folder})"
            return 0
        finally:  # the first one pays for what a process does once, as its imports
            self._spent += time.perf_counter() - start if self._begun else 0.0
            self._begun = True
        self._unseen += written
        return written

    def _write(self, entry: Path, scores: Sequence[TeacherScores]) -> int:
        handle, aside = tempfile.mkstemp(prefix=".", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                written = seal(scores, entry.stem, file)
            os.replace(aside, entry)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
        return written

    def _look_over(self) -> None:
        """Make the folder, and let go what nobody can ask for any more and, beyond the bound, what was used least
        lately. Never more than half of the disk's free room is taken. Raises OSError."""
        if not Path(self.place.run).is_dir():  # of another machine: it is not made here
            raise NotADirectoryError(0, "the run's folder is not on this machine")
        self.folder.mkdir(parents=True, exist_ok=True)
        oldest = min(map(_modified, Path(self.place.run, CHECKPOINTS).glob("step-*")), default=0.0)
        kept: list[tuple[float, int, Path]] = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another replica looks it over too
                found = file.stat()
                limits = {PASSING: oldest, LASTING: 0.0}
                if found.st_mtime < limits.get(file.suffix, time.time() - ABANDONED_SECONDS):
                    file.unlink()
                else:
                    kept.append((found.st_mtime, found.st_size, file))
        total = sum(size for _, size, _ in kept)
        room = min(self.place.most_bytes, (shutil.disk_usage(self.folder).free + total) // 2)
        for _, size, file in sorted(kept):
            if total <= FILLED * room:
                break
            file.unlink(missing_ok=True)
            total -= size
        self._unseen = 0


def forget_sampled(run: Path) -> None:
    """Let go what only the run's own continuation could ask for."""
    for entry in Path(run, SCORES).glob(f"*/*{PASSING}"):
        entry.unlink(missing_ok=True)


# ---- an entry --------------------------------------------------------------------------------------------------------


class _Sealing:
    """A file that knows the checksum of what was written to it."""

    closed = False

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.sum, self.written = file, xxhash.xxh3_128(name.encode()), 0

    def write(self, data: Any) -> None:
        self.sum.update(data)
        self.file.write(data)
        self.written += len(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Whoever opened the file closes it."""


def seal(scores: Sequence[TeacherScores], name: str, file: IO[bytes]) -> int:
    """Write `scores` as an Arrow stream, and behind it the checksum of `name` and stream; how many bytes."""
    batch, sealing = encode(TeacherScores, scores), _Sealing(file, name)
    with pa.ipc.new_stream(pa.PythonFile(sealing, "w"), batch.schema) as stream:
        stream.write_batch(batch)
    file.write(sealing.sum.digest())
    return sealing.written + SEAL_BYTES


def unsealed(data: bytes, name: str) -> list[TeacherScores] | None:
    """What was sealed under that name; None where a byte is missing or another."""
    stream = memoryview(data)[:-SEAL_BYTES]
    sum_of = xxhash.xxh3_128(name.encode())
    sum_of.update(stream)
    if sum_of.digest() != data[-SEAL_BYTES:]:
        return None
    try:
        return decode(TeacherScores, pa.ipc.open_stream(pa.py_buffer(stream)).read_next_batch())
    except (pa.ArrowInvalid, StopIteration, RecordError):  # of another release
        return None


def _size_of(scores: Iterable[TeacherScores]) -> int:
    arrays = ("logprobs", "topk_ids", "topk_logprobs", "entropy", "hidden")
    return sum(getattr(score, name).nbytes for score in scores for name in arrays)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
