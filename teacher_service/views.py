"""Several views of one rollout: the same response after the prompt with each of its skill-mistake pairs.

All views of all rollouts go to the engine in one call, which packs them as it does any rollouts; two that show the same
ids are scored once. What comes back is one record a rollout, its views side by side.

Shapes: R response tokens, W views, K top-k ids of a view.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode
from ..contracts.errors import TeacherError
from ..contracts.records import Rollout, ScoreRequest, TeacherScores
from ..contracts.skills import SkillPairs
from ..models.contexts import Prompter
from .contexts import after, prompts_of


@dataclass(frozen=True, slots=True)
class View:
    """One view of a rollout: where it stands among what is scored (None: it cannot be built), and its weight."""

    at: int | None
    weight: float


@dataclass(frozen=True, slots=True)
class Viewed:
    """The views of some rollouts: what is scored, each once, and which of it are whose."""

    shown: list[Rollout]
    views: list[list[View]]

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        request: ScoreRequest,
        prompter: Prompter,
        prompts: pa.RecordBatch | None,
        skills: pa.RecordBatch | None,
    ) -> "Viewed":
        """Raises TeacherError where the batches were not given, ConfigError for an unknown context."""
        if prompts is None or skills is None:
            raise TeacherError("views come with the prompts and their skills", f"{request.context} without them")
        pairs_of = {pairs.prompt_id: pairs for pairs in decode(SkillPairs, skills)}
        shown: list[Rollout] = []
        places: dict[tuple[int, bytes], int] = {}
        views: list[list[View]] = []
        for rollout, prompt in zip(rollouts, prompts_of(rollouts, prompts), strict=True):
            pairs = pairs_of.get(rollout.prompt_id)
            own: list[View] = []
            for texts, weight in _texts(pairs, request.views) if pairs else ():
                ids = prompt and prompter.ids(request.context, prompt, **texts)
                if ids is None:
                    own.append(View(None, weight))
                    continue
                seen = after(rollout, ids, request.context)
                at = places.setdefault((len(ids), seen.token_ids.tobytes()), len(shown))
                if at == len(shown):
                    shown.append(seen)
                own.append(View(at, weight))
            views.append(own)
        return cls(shown, views)

    def fold(
        self, rollouts: Sequence[Rollout], scores: Sequence[TeacherScores], request: ScoreRequest, teacher_id: str
    ) -> tuple[list[TeacherScores], Counter[str]]:
        """One record a rollout, and how many views were refused, by error class.

        A refused view is left out, and the others' weights then sum to 1; without any the rollout is refused.
        """
        refused = Counter[str]()
        folded = []
        for rollout, views in zip(rollouts, self.views, strict=True):
            found = [(scores[view.at] if view.at is not None else None, view.weight) for view in views]
            refused.update(
                f"view_{score.error_class if score else 'no_context'}" for score, _ in found if not _good(score)
            )
            folded.append(_side_by_side(rollout, found, request, teacher_id))
        return folded, refused


def _texts(pairs: SkillPairs, most: int) -> list[tuple[dict[str, str], float]]:
    """What each view's template is filled with, and its weight."""
    titles = pairs.titles or ("",) * len(pairs.skills)
    texts = zip(pairs.skills, pairs.mistakes, titles, strict=True)
    shown = [{"skill": skill, "mistake": mistake, "title": title} for skill, mistake, title in texts]
    return list(zip(shown, map(float, pairs.weights), strict=True))[:most]


def _good(score: TeacherScores | None) -> bool:
    return score is not None and not score.error_class


def _side_by_side(
    rollout: Rollout, found: Sequence[tuple[TeacherScores | None, float]], request: ScoreRequest, teacher_id: str
) -> TeacherScores:
    """The views in their places, of as many as were asked for; one that is missing repeats a good one with weight 0."""
    base = TeacherScores(rollout_id=rollout.rollout_id, teacher_id=teacher_id, context=request.context)
    good = next((score for score, _ in found if score and _good(score)), None)
    if good is None:
        first = next((score.error_class for score, _ in found if score), "no_context")
        return replace(base, error_class=first)
    missing = request.views - len(found)
    full = [score if score and _good(score) else good for score, _ in found] + [good] * missing
    weights = np.array([weight if _good(score) else 0.0 for score, weight in found] + [0.0] * missing, np.float32)
    views = np.stack([score.logprobs for score in full], 1)
    own = {"logprobs": views @ (weights / weights.sum()), "views": views, "view_weights": weights / weights.sum()}
    if request.top_k:
        own |= {name: np.concatenate([getattr(s, name) for s in full], 1) for name in ("topk_ids", "topk_logprobs")}
    return replace(base, **own)
