"""The teacher worker: what a Ray actor of a teacher pool runs. Rollouts in, scores and a receipt out."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode, encode
from ..contracts.errors import TeacherError
from ..contracts.protocols import RolloutEngine
from ..contracts.receipts import ScoreReceipt
from ..contracts.records import Rollout, ScoreRequest, TeacherScores, WeightBucket, WeightManifest
from ..contracts.sections import THINKING
from ..models.contexts import PLAIN, Prompter
from ..models.loading import load_tokenizer
from .contexts import in_context
from .engines import make_engine
from .requests import only_numbers
from .score_cache import FROZEN, CachePlace, CacheUse, ScoreCache
from .self_teacher import EmaWeights, LiveWeights, student_weights_of
from .views import Viewed


class TeacherWorker:
    """One replica of the teacher `teacher_id`: an engine, by its name or the class of one's own, with its model.

    `follows` ("live", "ema") makes it a self-teacher that takes the student's published weights, as they are or as an
    average with `ema_decay`. `templates` are the recipe's own (models/contexts.py), `suffix` its words after every
    problem, `template_kwargs` the chat template's, `thinking` the marks of a model's reasoning; `tokenizer` is the
    model whose tokenizer is used, none: its own. `options` are the engine's: of a student with `lora`, the weights that
    a self-teacher takes are adapters of `model`. With `shared` the teacher is the model that this rollout engine runs,
    and `shared_weights` is the fingerprint of what that holds. `cache`: where scores are kept, None: nowhere.
    """

    def __init__(
        self,
        *,
        teacher_id: str,
        engine: str | type,
        model: str,
        follows: str = "",
        ema_decay: float = 0.95,
        templates: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        suffix: str = "",
        thinking: tuple[str, str] = THINKING,
        tokenizer: str = "",
        shared: RolloutEngine | None = None,
        cache: CachePlace | None = None,
        **options: Any,
    ) -> None:
        self.teacher_id, self.tokenizer = teacher_id, tokenizer or model
        self.templates, self.template_kwargs, self.suffix, self.thinking = templates, template_kwargs, suffix, thinking
        own = {"shared": shared} if shared else {}
        self.engine, self.shared = make_engine(engine, model, teacher_id=teacher_id, **own, **options), shared
        self.student_weights = student_weights_of(self.engine, follows, ema_decay) if follows else None
        self.shared_weights = ""
        self.cache = ScoreCache(cache, self.engine) if cache else None
        self._prompting = Lock()  # a tokenizer serves one thread at a time

    @cached_property
    def prompter(self) -> Prompter:
        """Builds the prompts of contexts; its tokenizer is loaded at the first one. Raises ConfigError, ModelError."""
        tokenizer = load_tokenizer(self.tokenizer)
        return Prompter(tokenizer, self.template_kwargs, self.templates, self.suffix, self.thinking)

    def score(
        self,
        rollouts: pa.RecordBatch,
        request: ScoreRequest,
        prompts: pa.RecordBatch | None = None,
        verdicts: pa.RecordBatch | None = None,
        skills: pa.RecordBatch | None = None,
    ) -> tuple[pa.RecordBatch, ScoreReceipt]:
        """Scores of the rows that ask for this teacher or for none by name, in their order; a refused one is a row too.

        With `request.everyone` of all rows. In a context other than "plain" each response is scored after the prompt
        that the context builds from its row of `prompts` and, for peers and feedback, from the same batch's `verdicts`;
        a row for which it cannot be built is refused as "no_context". With `request.views` each row's record holds the
        views of its prompt's pairs in `skills` side by side. The receipt's lengths and tokens are those of the rows
        really scored, as they were scored; it has the mean logprob of each response whose sampled tokens have one.
        """
        start = time.perf_counter()
        if self.student_weights:
            self.student_weights.check()
        asked = rollouts.column("teacher").to_pylist()
        rows = [i for i, name in enumerate(asked) if request.everyone or name in ("", self.teacher_id)]
        mine: Sequence[Rollout] = decode(Rollout, rollouts, rows)
        refused: Counter[str] = Counter()
        if request.views:
            scores, refused, done = self._views(mine, request, prompts, skills)
        else:
            shown: Sequence[Rollout | None] = mine
            if request.context != PLAIN:
                with self._prompting:
                    shown = in_context(request.context, mine, self.prompter, rollouts, prompts, verdicts)
            scores, done = self._scores(mine, shown, request)
        version = self.version
        scores = [replace(score, teacher_version=version) for score in scores] if version else scores
        refused.update(score.error_class for score in scores if score.error_class)
        receipt = ScoreReceipt(
            rows=len(mine),
            seconds=time.perf_counter() - start,
            errors=dict(refused),
            mean_logprobs={s.rollout_id: float(s.logprobs.mean(dtype=np.float64)) for s in scores if s.logprobs.size},
            **done.figures(),
        )
        return encode(TeacherScores, scores), receipt

    def close(self) -> None:
        """End what the engine runs in other processes, if it runs any."""
        close = getattr(self.engine, "close", None)
        if close:
            close()

    def _views(
        self,
        mine: Sequence[Rollout],
        request: ScoreRequest,
        prompts: pa.RecordBatch | None,
        skills: pa.RecordBatch | None,
    ) -> tuple[list[TeacherScores], Counter[str], "Done"]:
        """The views of each rollout side by side, and the refused views by error class."""
        with self._prompting:
            viewed = Viewed.of(mine, request, self.prompter, prompts, skills)
        found, done = self._ask(viewed.shown, replace(request, views=0))
        return *viewed.fold(mine, found, request, self.teacher_id), done

    def _scores(
        self, mine: Sequence[Rollout], shown: Sequence[Rollout | None], request: ScoreRequest
    ) -> tuple[list[TeacherScores], "Done"]:
        """Scores in the order of `mine`, each of the rollout as it is shown, or refused for want of a context."""
        found, done = self._ask([rollout for rollout in shown if rollout], request)
        left = iter(found)
        scores = [
            next(left)
            if seen
            else TeacherScores(
                rollout_id=rollout.rollout_id,
                teacher_id=self.teacher_id,
                context=request.context,
                error_class="no_context",
            )
            for rollout, seen in zip(mine, shown, strict=True)
        ]
        return scores, done

    def _ask(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> tuple[list[TeacherScores], "Done"]:
        """The engine, but for what it has been asked before."""
        weights = self._weights
        if self.cache and weights:
            scores, use = self.cache.score(rollouts, request, weights)
        else:
            scores, use = [only_numbers(score) for score in self.engine.score(rollouts, request)], None
        good = [i for i, score in enumerate(scores) if not score.error_class]
        hits = use.hits if use else set()
        served = [rollouts[i] for i in good if i not in hits]
        return scores, Done(served, [rollouts[i] for i in good if i in hits], use)

    @property
    def _weights(self) -> str:
        """What the model holds: a fingerprint, "" where it is not known."""
        if self.shared:
            return self.shared_weights
        return self.student_weights.fingerprint if self.student_weights else FROZEN

    @property
    def version(self) -> int:
        """Of the student's weights that a self-teacher holds; 0 of a frozen teacher."""
        return self.student_weights.version if self.student_weights else getattr(self.shared, "weight_version", 0)

    def load_weights(self, manifest: WeightManifest, *buckets: WeightBucket) -> float:
        """Take a published version of the student; the seconds it took. Raises WeightsMismatch, TeacherError."""
        start = time.perf_counter()
        self._following.take(buckets, manifest)
        return time.perf_counter() - start

    def save_average(self, path: str) -> None:
        """Write an ema teacher's average, for a checkpoint. Raises TeacherError."""
        self._average.save(path)

    def load_average(self, path: str) -> int:
        """Go on from a checkpoint's average; its version. Raises CheckpointError, TeacherError."""
        self._average.load(path)
        return self.version

    def share_average(self) -> Iterator[Any]:
        """An ema teacher's average, then its version. Raises TeacherError."""
        yield from self._average.share()

    def adopt_average(self, version: int, average: Mapping[str, np.ndarray]) -> int:
        """Go on from another replica's average; its version. Raises TeacherError."""
        self._average.adopt(average, version)
        return version

    @property
    def _following(self) -> LiveWeights:
        if self.student_weights is None:
            raise TeacherError("a frozen teacher takes no weights", self.teacher_id, "set its `follows` to live or ema")
        return self.student_weights

    @property
    def _average(self) -> EmaWeights:
        if not isinstance(self.student_weights, EmaWeights):
            raise TeacherError("an average is kept by a teacher that follows as an ema", self.teacher_id)
        return self.student_weights


@dataclass(frozen=True, slots=True)
class Done:
    """What came of one call: the rollouts that were scored, and those that had been; `use` of the cache, if any."""

    scored: list[Rollout]
    known: list[Rollout]
    use: CacheUse | None

    def figures(self) -> dict[str, Any]:
        """Of the receipt. What had been scored costs no tokens."""
        figures: dict[str, Any] = {
            "tokens": sum(len(rollout.token_ids) for rollout in self.scored),
            "lengths": tuple(len(rollout.token_ids) for rollout in self.scored),
            "response_lengths": tuple(rollout.response_length for rollout in self.scored),
        }
        if self.use:
            figures |= {
                "spared": sum(len(rollout.token_ids) for rollout in self.known),
                "hits": len(self.known),
                "misses": len(self.scored),
                "bytes_read": self.use.bytes_read,
                "bytes_written": self.use.bytes_written,
                "note": self.use.note,
            }
        return figures
