"""Where each teacher keeps its scores, and the digest of what decides them (teacher_service/score_cache.py)."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from .. import __version__
from ..contracts.config import REFERENCE, Config, Reference, Teacher
from ..models.loading import locate_model
from ..teacher_service.score_cache import CachePlace, forget_sampled
from .identity import Identity, digest_of_code, digest_of_model
from .recording.run_folder import RunFolder

__all__ = ["cache_places", "forget_sampled"]
GIB = 2**30


def cache_places(config: Config, folder: RunFolder) -> dict[str, CachePlace]:
    """By teacher, the reference model among them. `config`: of the stage.

    None for a teacher that keeps no scores, nor for one that shares replicas whose weights change while they score.
    """
    teachers: dict[str, Teacher | Reference] = dict(config.named_teachers)
    if config.reference:
        teachers[REFERENCE] = config.reference
    moving = config.rollout.capabilities.weights_while_generating
    return {
        name: CachePlace(
            run=str(folder.path),
            teacher_id=name,
            most_bytes=int(teacher.cache_gib * GIB),
            scorer=_digest(_scorer(config, teacher, folder.identity or {})),
        )
        for name, teacher in teachers.items()
        if teacher.cache_gib and not (isinstance(teacher, Teacher) and teacher.shared and moving)
    }


def _digest(said: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def _scorer(config: Config, teacher: Teacher | Reference, identity: Identity) -> Mapping[str, Any]:
    """All that decides its scores, but for the weights that it takes from the student."""
    if isinstance(teacher, Reference):
        return _local("transformers", teacher, teacher.model, identity)
    if teacher.remote:
        return {"engine": _engine(teacher.engine), "model": teacher.model, "urls": sorted(teacher.urls)}
    if not teacher.follows:
        return _local(teacher.engine, teacher, teacher.model, identity)
    lora = config.student.lora.model_dump(mode="json") if config.student.lora else None
    engine = config.rollout.engine if teacher.shared else teacher.engine
    return {**_local(engine, teacher, config.student.model, identity), "lora": lora}


def _local(engine: str, teacher: Teacher | Reference, model: str, identity: Identity) -> dict[str, Any]:
    place = locate_model(model).resolve()
    known = {one["place"]: one["digest"] for one in identity.values()}
    return {
        "engine": _engine(engine),
        "model": known.get(str(place)) or digest_of_model(place),
        "dtype": teacher.dtype,
        "device": "cuda" if teacher.num_gpus else "cpu",
        "parts": getattr(teacher, "tensor_parallel", 1),
    }


def _engine(engine: str) -> str:
    """One of ours with this release, one's own with its code."""
    place, own, _ = engine.rpartition(":")
    return f"{engine} {digest_of_code(place) if own else __version__}"
