"""The teacher worker: what a Ray actor of a teacher pool runs. Rollouts in, scores and a receipt out."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from .self_teacher import EmaWeights, LiveWeights, student_weights_of
from .views import Viewed


class TeacherWorker:
    """One replica of the teacher `teacher_id`: an engine, by its name or the class of one's own, with its model.

    `follows` ("live", "ema") makes it a self-teacher that takes the student's published weights, as they are or as an
    average with `ema_decay`. `templates` are the recipe's own (models/contexts.py), `suffix` its words after every
    problem, `template_kwargs` the chat template's, `thinking` the marks of a model's reasoning; `tokenizer` is the
    model whose tokenizer is used, none: its own. `options` are the engine's: of a student with `lora`, the weights that
    a self-teacher takes are adapters of `model`. With `shared` the teacher is the model that this rollout engine runs.
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
        **options: Any,
    ) -> None:
        self.teacher_id, self.tokenizer = teacher_id, tokenizer or model
        self.templates, self.template_kwargs, self.suffix, self.thinking = templates, template_kwargs, suffix, thinking
        own = {"shared": shared} if shared else {}
        self.engine, self.shared = make_engine(engine, model, teacher_id=teacher_id, **own, **options), shared
        self.student_weights = student_weights_of(self.engine, follows, ema_decay) if follows else None
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
        really scored, as they were scored.
        """
        start = time.perf_counter()
        if self.student_weights:
            self.student_weights.check()
        asked = rollouts.column("teacher").to_pylist()
        rows = [i for i, name in enumerate(asked) if request.everyone or name in ("", self.teacher_id)]
        mine: Sequence[Rollout] = decode(Rollout, rollouts, rows)
        if request.views:
            served, scores, refused = self._views(mine, request, prompts, skills)
        else:
            shown: Sequence[Rollout | None] = mine
            if request.context != PLAIN:
                with self._prompting:
                    shown = in_context(request.context, mine, self.prompter, rollouts, prompts, verdicts)
            scores, refused = self._scores(mine, shown, request), Counter[str]()
            pairs = zip(shown, scores, strict=True)
            served = [rollout for rollout, score in pairs if rollout and not score.error_class]
        version = self.version
        scores = [replace(score, teacher_version=version) for score in scores] if version else scores
        receipt = ScoreReceipt(
            rows=len(mine),
            tokens=sum(len(rollout.token_ids) for rollout in served),
            seconds=time.perf_counter() - start,
            lengths=tuple(len(rollout.token_ids) for rollout in served),
            response_lengths=tuple(rollout.response_length for rollout in served),
            errors=dict(refused + Counter(score.error_class for score in scores if score.error_class)),
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
    ) -> tuple[list[Rollout], list[TeacherScores], Counter[str]]:
        """What was really scored, the views of each rollout side by side, and the refused views by error class."""
        with self._prompting:
            viewed = Viewed.of(mine, request, self.prompter, prompts, skills)
        found = self._ask(viewed.shown, replace(request, views=0))
        served = [rollout for rollout, score in zip(viewed.shown, found, strict=True) if not score.error_class]
        return served, *viewed.fold(mine, found, request, self.teacher_id)

    def _scores(
        self, mine: Sequence[Rollout], shown: Sequence[Rollout | None], request: ScoreRequest
    ) -> list[TeacherScores]:
        """Scores in the order of `mine`, each of the rollout as it is shown, or refused for want of a context."""
        found = iter(self._ask([rollout for rollout in shown if rollout], request))
        return [
            next(found)
            if seen
            else TeacherScores(
                rollout_id=rollout.rollout_id,
                teacher_id=self.teacher_id,
                context=request.context,
                error_class="no_context",
            )
            for rollout, seen in zip(mine, shown, strict=True)
        ]

    def _ask(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        return [only_numbers(score) for score in self.engine.score(rollouts, request)]

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
