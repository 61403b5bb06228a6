"""A self-teacher's weights: it takes the student's published versions as they are (`live`) or their average (`ema`).

The average is decay · average + (1 - decay) · new, once a version, and starts as the first version taken. Source: SDPO
(2601.20802) with decay 0.95, OPSD (2601.18734) with 0.999. That it is kept in float32 whatever the model's dtype, and
only its rounding runs, is ours: in bfloat16 a change of 1 - decay is below the rounding and would be lost.

Of a student with adapters (models/lora.py) the average is that of the factors A and B, and not of their product; that
is ours too. It stays as small as the adapters, and the products of the factors' averages have the adapters' rank.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..contracts.config import Lora
from ..contracts.errors import CheckpointError, TeacherError, WeightsMismatch
from ..contracts.records import EMPTY_II, Rollout, ScoreRequest, WeightBucket, WeightManifest
from ..models.lora import ReplicaWeights
from ..models.weight_proof import check_canary, copy_buckets
from .transformers_engine import TransformersTeacher

FOLLOWS = ("live", "ema")


class Follower:
    """Keeps `engine`'s weights at the versions that it is given. `version` is the one held, 0 before the first.

    With `lora` the versions are adapters alone, and the engine runs them merged.
    """

    def __init__(self, engine: object, follows: str, decay: float, lora: Lora | None = None) -> None:
        if follows not in FOLLOWS:
            raise TeacherError("a teacher follows its student live or as an ema", follows, f"known: {FOLLOWS}")
        if not isinstance(engine, TransformersTeacher):
            raise TeacherError("a teacher that follows its student has weights", type(engine).__name__)
        self.engine, self.follows, self.decay = engine, follows, decay
        self.weights = ReplicaWeights(engine.model, lora)
        self.parameters = self.weights.parameters
        self.average: dict[str, torch.Tensor] = {}  # float32; of `ema`, from the first version on
        self._taken, self._proven = -1, True

    @property
    def version(self) -> int:
        return max(self._taken, 0)

    def check(self) -> None:
        """Raises WeightsMismatch where the last version could not be proven: such a teacher must not score."""
        if not self._proven:
            raise WeightsMismatch("a teacher scores with proven weights only", "its last load failed")

    def take(self, buckets: Sequence[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version in, prove it by fingerprint and canary, then average; one that is not newer is ignored.

        Raises WeightsMismatch; the average is then what it was, and the next good version heals the model.
        """
        if manifest.version <= self._taken:
            return
        self._proven = False
        copy_buckets(self.parameters, buckets, manifest)
        self.weights.apply()
        check_canary(self._canary(manifest.canary_ids), manifest)
        if self.follows == "ema":
            self._mix()
        self._taken, self._proven = manifest.version, True

    @torch.no_grad()
    def _mix(self) -> None:
        """The model holds the new version; afterwards it holds the average."""
        if not self.average:
            self.average = {name: own.to(torch.float32, copy=True) for name, own in self.parameters.items()}
            return
        for name, own in self.parameters.items():
            self.average[name].mul_(self.decay).add_(own.float(), alpha=1 - self.decay)
            own.copy_(self.average[name])
        self.weights.apply()

    def _canary(self, ids: np.ndarray) -> np.ndarray:
        """Logprobs `[C-1]` of each next token, the way that rollouts are scored."""
        rows = len(ids) - 1
        canary = Rollout(
            rollout_id="canary",
            prompt_id="canary",
            group_id="canary",
            sample_index=0,
            token_ids=ids,
            prompt_length=1,
            text="",
            logprobs=np.zeros(rows, np.float32),
            loss_mask=np.ones(rows, bool),
            topk_ids=EMPTY_II,
        )
        return self.engine.score([canary], ScoreRequest())[0].logprobs

    def save(self, path: str | Path) -> None:
        """Write the average and its version as safetensors. Raises TeacherError where there is none."""
        if not self.average:
            raise TeacherError("an average is saved by a teacher that keeps one", f"follows={self.follows!r}, none yet")
        save_file(self.average, path, {"version": str(self._taken)})

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Go on from a saved average. Raises CheckpointError, and TeacherError where this teacher keeps none."""
        if self.follows != "ema":
            raise TeacherError("an average is loaded by a teacher that keeps one", f"follows={self.follows!r}")
        average: dict[str, torch.Tensor] = {}
        try:
            with safe_open(path, "pt", device=self.engine.device) as tensors:
                version = int((tensors.metadata() or {})["version"])
                average = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            found = f"{path}: {type(error).__name__}: {error}"
            raise CheckpointError("a teacher's average is a readable safetensors file with a version", found) from error
        shapes = {name: own.shape for name, own in self.parameters.items()}
        if shapes != {name: own.shape for name, own in average.items()}:
            raise CheckpointError("a teacher's average is of its model's parameters", str(path), "resume the same run")
        self.average, self._taken, self._proven = average, version, True
        for name, own in self.parameters.items():
            own.copy_(average[name])
        self.weights.apply()
