"""A teacher that takes a known time, so that a machine of few cores shows what more replicas are worth."""

import time
from collections.abc import Sequence

from tutorloop.contracts.engines import TeacherCapabilities
from tutorloop.contracts.records import Rollout, ScoreRequest, TeacherScores
from tutorloop.teacher_service.transformers_engine import TransformersTeacher

SECONDS = 0.04  # a rollout


class SlowTeacher(TransformersTeacher):
    capabilities = TeacherCapabilities(signals=frozenset({"hidden"}))

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        time.sleep(SECONDS * len(rollouts))
        return super().score(rollouts, request)
