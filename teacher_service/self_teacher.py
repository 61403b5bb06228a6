"""A self-teacher's weights: it takes the student's published versions as they are (`live`) or their average (`ema`).

The average is decay · average + (1 - decay) · new, once a version, and starts as the first version taken. Source: SDPO
(2601.20802) with decay 0.95, OPSD (2601.18734) with 0.999. That it is kept in float32 whatever the model's dtype, and
only its rounding runs, is ours: in bfloat16 a change of 1 - decay is below the rounding and would be lost.

Of a student with adapters (models/lora.py) the average is that of the factors A and B, and not of their product; that
is ours too. It stays as small as the adapters, and the products of the factors' averages have the adapters' rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..contracts.errors import CheckpointError, TeacherError, WeightsMismatch
from ..contracts.records import WeightBucket, WeightManifest
from ..models.lora import ReplicaWeights
from ..models.weights import fingerprint


@runtime_checkable
class TakesWeights(Protocol):
    """A teacher engine that can follow the student."""

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version in, then prove it, as a rollout engine does. Raises WeightsMismatch."""
        ...


@runtime_checkable
class HoldsWeights(TakesWeights, Protocol):
    """One whose weights are tensors of this process."""

    weights: ReplicaWeights
    device: str


class LiveWeights:
    """Keeps `engine`'s weights at the versions that it is given. `version` is the one held, 0 before the first."""

    def __init__(self, engine: TakesWeights) -> None:
        self.engine = engine
        self._taken, self._proven, self._fingerprint = -1, True, ""

    @property
    def version(self) -> int:
        return max(self._taken, 0)

    @property
    def fingerprint(self) -> str:
        """Of the weights that are held; "" where they are those that the engine began with."""
        return self._fingerprint

    def check(self) -> None:
        """Raises WeightsMismatch where the last version could not be proven: such a teacher must not score."""
        if not self._proven:
            raise WeightsMismatch("a teacher scores with proven weights only", "its last load failed")

    def take(self, buckets: Sequence[WeightBucket], manifest: WeightManifest) -> None:
        """Have the engine take a version in and prove it; the one that it holds is ignored. An older one comes after a
        death of the learner, which goes on from there.

        Raises WeightsMismatch; the next good version heals the model.
        """
        if manifest.version == self._taken:
            return
        self._proven = False
        self.engine.load_weights(buckets, manifest)
        self._taken, self._proven, self._fingerprint = manifest.version, True, manifest.fingerprint


class EmaWeights(LiveWeights):
    """Runs the average of the versions. A version that could not be proven leaves it as it was."""

    def __init__(self, engine: HoldsWeights, decay: float) -> None:
        super().__init__(engine)
        self.decay, self.weights, self.device = decay, engine.weights, engine.device
        self.average: dict[str, torch.Tensor] = {}  # float32, from the first version on

    @property
    def fingerprint(self) -> str:
        """Of the average as it runs, read when it is first asked for."""
        if self.average and not self._fingerprint:
            self._fingerprint = fingerprint(self.weights.parameters.items())
        return self._fingerprint

    @torch.no_grad()
    def take(self, buckets: Sequence[WeightBucket], manifest: WeightManifest) -> None:
        """And average: the model holds the new version for a moment, and then the average again. One that is not newer
        is in the average."""
        if manifest.version <= self._taken:
            return
        super().take(buckets, manifest)
        parameters = self.weights.parameters
        if not self.average:
            self.average = {name: own.to(torch.float32, copy=True) for name, own in parameters.items()}
            return
        for name, own in parameters.items():
            self.average[name].mul_(self.decay).add_(own.float(), alpha=1 - self.decay)
            own.copy_(self.average[name])
        self.weights.apply()
        self._fingerprint = ""

    def save(self, path: str | Path) -> None:
        """Write the average and its version as safetensors. Raises TeacherError where there is none yet."""
        if not self.average:
            raise TeacherError("an average is saved once a version has been taken", "none yet")
        save_file(self.average, path, {"version": str(self._taken)})

    def share(self) -> tuple[dict[str, np.ndarray], int]:
        """The average and its version, for a replica that comes later. Raises TeacherError where there is none yet."""
        if not self.average:
            raise TeacherError("an average is shared once a version has been taken", "none yet")
        return {name: own.cpu().numpy() for name, own in self.average.items()}, self._taken

    def adopt(self, average: Mapping[str, np.ndarray], version: int) -> None:
        """Go on from what another replica shared."""
        self._hold({name: torch.from_numpy(own.copy()).to(self.device) for name, own in average.items()}, version)

    def load(self, path: str | Path) -> None:
        """Go on from a saved average. Raises CheckpointError."""
        average: dict[str, torch.Tensor] = {}
        try:
            with safe_open(path, "pt", device=self.device) as tensors:
                version = int((tensors.metadata() or {})["version"])
                average = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            found = f"{path}: {type(error).__name__}: {error}"
            raise CheckpointError("a teacher's average is a readable safetensors file with a version", found) from error
        shapes = {name: own.shape for name, own in self.weights.parameters.items()}
        if shapes != {name: own.shape for name, own in average.items()}:
            raise CheckpointError("a teacher's average is of its model's parameters", str(path), "resume the same run")
        self._hold(average, version)

    @torch.no_grad()
    def _hold(self, average: dict[str, torch.Tensor], version: int) -> None:
        self.average, self._taken, self._proven, self._fingerprint = average, version, True, ""
        for name, own in self.weights.parameters.items():
            own.copy_(average[name])
        self.weights.apply()


def student_weights_of(engine: object, follows: str, decay: float) -> LiveWeights:
    """What keeps `engine` as `follows` says: "live", or "ema" with `decay`. Raises TeacherError."""
    if follows == "live" and isinstance(engine, TakesWeights):
        return LiveWeights(engine)
    if follows == "ema" and isinstance(engine, HoldsWeights):
        return EmaWeights(engine, decay)
    raise TeacherError(
        "a teacher follows its student live, or as an ema of weights in this process",
        f"{follows!r} with {type(engine).__name__}",
        "known: live, ema; contracts/engines.py says which engines take and average weights",
    )
