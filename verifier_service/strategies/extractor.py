"""The strategy extractor: a solution's step texts in, a unit vector and a code for each step out.

A step's abstracted view (its numbers, variables and names taken out) is embedded by a frozen model and whitened; a
small transformer over the steps then sees each in its solution, after what came before it. It is causal, so that a
step's vector is the same however the solution goes on. The code is the nearest entry of a codebook.

An extractor is a folder: `extractor.json` says what it is and has the digest of every other file, so that its own
digest is the version of all. fit.py writes it.

Shapes: B solutions, N steps of the longest, T steps of all, E embedding size, C components, D = 128.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ...contracts.errors import StrategyError
from ...models.digests import digest_of
from .abstraction import abstract
from .embedding import Embedder, Whitening, make_embedder
from .losses import nearest_codes
from .segments import StepLimits

SIZE = 128  # of a step's vector
LAYERS, HEADS = 2, 4
BATCH_STEPS = 4096  # steps that the transformer reads at once
MANIFEST, WEIGHTS, FORMAT = "extractor.json", "extractor.safetensors", 1
CANARY = "Add the two numbers, then halve the sum, since both parts are equal."
CANARY_TOLERANCE = 1e-2  # of its embedding's length
RULE = "a folder of strategies is what `tutorloop strategies fit` wrote, whole"
AGAIN = "copy it again, or fit it again"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One solution's steps: unit vectors, float32 [n, 128], and their codes, int64 [n]."""

    vectors: np.ndarray
    codes: np.ndarray


class StepEncoder(torch.nn.Module):
    """Whitened embeddings of each solution's steps `[B, N, C]` to unit vectors `[B, N, D]`."""

    def __init__(self, components: int, width: int) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(components, width)
        layer = torch.nn.TransformerEncoderLayer(
            width, HEADS, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, LAYERS, torch.nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = torch.nn.Linear(width, SIZE)

    def forward(self, inputs_BNC: torch.Tensor) -> torch.Tensor:
        """What lies right of a solution's last step changes nothing of it."""
        x_BNW = self.enter(inputs_BNC)
        x_BNW = x_BNW + _sinusoids(x_BNW.shape[1], x_BNW.shape[2]).to(x_BNW)
        mask_NN = torch.nn.Transformer.generate_square_subsequent_mask(x_BNW.shape[1], device=x_BNW.device)
        return F.normalize(self.leave(self.layers(x_BNW, mask=mask_NN, is_causal=True)), dim=-1)


class FrozenEncoder(torch.nn.Module):
    """The ablation: the whitened embeddings' first D components themselves, as unit vectors."""

    def forward(self, inputs_BNC: torch.Tensor) -> torch.Tensor:
        first_BND = inputs_BNC[..., :SIZE]
        return F.normalize(F.pad(first_BND, (0, SIZE - first_BND.shape[-1])), dim=-1)


def _sinusoids(steps: int, width: int) -> torch.Tensor:
    """Positions as Vaswani et al. (1706.03762) have them: sines and cosines of geometric periods `[N, W]`."""
    periods = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(steps)[:, None] * periods
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Extractor:
    """Step texts to vectors and codes."""

    def __init__(
        self,
        embedder: Embedder,
        whitening: Whitening,
        encoder: StepEncoder | FrozenEncoder,
        codebook_KD: torch.Tensor,
        limits: StepLimits,
        version: str = "",
    ) -> None:
        self.embedder, self.whitening, self.encoder = embedder, whitening, encoder.eval()
        self.codebook_KD, self.limits, self.version = codebook_KD, limits, version

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", threads: int = 1) -> "Extractor":
        """The extractor in a folder; its `version` is a digest of the folder's files. Raises StrategyError where they
        are not as they were written, or where the embedder's model is another than the one it was fitted with."""
        manifest = read_manifest(folder)
        tensors = load_file(Path(folder) / WEIGHTS, device=device)
        whitening = Whitening(tensors.pop("mean").cpu().numpy(), tensors.pop("whitening").cpu().numpy())
        codebook_KD, canary = tensors.pop("codebook"), tensors.pop("canary").cpu().numpy()
        encoder = (
            FrozenEncoder() if manifest["frozen"] else StepEncoder(whitening.matrix_EC.shape[1], manifest["width"])
        )
        encoder.load_state_dict(tensors)
        embedder = make_embedder(manifest["embedder"], device, threads)
        _check_embedder(embedder, canary, folder)
        limits = StepLimits(**manifest["limits"])
        return cls(embedder, whitening, encoder.to(device), codebook_KD, limits, version_of(folder))

    def encode(self, solutions: Sequence[Sequence[str]]) -> list[Encoded]:
        """Each solution's, whatever the others are. Its steps as `segments` has them, as they were written."""
        views = [[view_of(step) for step in steps] for steps in solutions]
        vectors = encode_steps(self.encoder, inputs_of(views, self.embedder, self.whitening))
        device = self.codebook_KD.device
        codes = [nearest_codes(torch.from_numpy(own).to(device), self.codebook_KD).cpu().numpy() for own in vectors]
        return [Encoded(*own) for own in zip(vectors, codes, strict=True)]

    def save(self, folder: Path, others: Sequence[str] = ()) -> None:
        """Write it into `folder`, beside files that belong to it by their names there; the folder's `version_of` is
        the extractor's from then on."""
        from safetensors.torch import save_file

        tensors = {
            "mean": torch.from_numpy(self.whitening.mean_E),
            "whitening": torch.from_numpy(self.whitening.matrix_EC),
            "codebook": self.codebook_KD,
            "canary": torch.from_numpy(self.embedder.embed([CANARY])[0]),
            **self.encoder.state_dict(),
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors are written for their owner alone
        trained = isinstance(self.encoder, StepEncoder)
        manifest = {
            "format": FORMAT,
            "embedder": self.embedder.name,
            "frozen": not trained,
            "width": self.encoder.enter.out_features if isinstance(self.encoder, StepEncoder) else 0,
            "limits": asdict(self.limits),
            "files": {name: digest_of(folder / name) for name in sorted((WEIGHTS, *others))},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        self.version = version_of(folder)


def view_of(step: str) -> str:
    """A step without what is its problem's alone, and without the space around it."""
    return abstract(step).strip()


def inputs_of(solutions: Sequence[Sequence[str]], embedder: Embedder, whitening: Whitening) -> list[np.ndarray]:
    """Whitened embeddings of each solution's views, float32 [n, C]; a text that comes again is embedded once."""
    rows: dict[str, int] = {}
    for steps in solutions:
        for step in steps:
            rows.setdefault(step, len(rows))
    if not rows:
        return [np.zeros((0, whitening.matrix_EC.shape[1]), np.float32) for _ in solutions]
    whitened = whitening(embedder.embed(list(rows)))
    return [whitened[[rows[step] for step in steps]] for steps in solutions]


@torch.inference_mode()
def encode_steps(encoder: torch.nn.Module, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Unit vectors, float32 [n, D], of each solution's whitened embeddings [n, C]."""
    vectors = [np.zeros((0, SIZE), np.float32) for _ in inputs]
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    rows = sorted((row for row, own in enumerate(inputs) if len(own)), key=lambda row: len(inputs[row]))
    while rows:
        count = max(1, BATCH_STEPS // len(inputs[rows[-1]]))
        batch, rows = rows[-count:], rows[:-count]
        found_BND = encoder(padded([inputs[row] for row in batch]).to(device)).cpu().numpy()
        for row, own in zip(batch, found_BND, strict=True):
            vectors[row] = own[: len(inputs[row])].copy()
    return vectors


def padded(inputs: Sequence[np.ndarray]) -> torch.Tensor:
    """`[B, N, C]`, zeros to the right of each solution."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(own) for own in inputs], batch_first=True)


# ---- the folder --------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `extractor.json` says, once every file is as it was written. Raises StrategyError."""
    place = Path(folder)
    if not (place / MANIFEST).is_file():
        found = f"{folder}: {'no ' + MANIFEST if place.is_dir() else 'no such folder'}"
        raise StrategyError(RULE, found, "make one: tutorloop strategies fit SOLUTIONS.jsonl --to FOLDER")
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, str] = dict(manifest["files"])
        kind, limits = manifest["format"], StepLimits(**manifest["limits"])
        assert isinstance(limits.most, int)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise StrategyError(RULE, f"{folder}/{MANIFEST}: {error}", AGAIN) from error
    if kind != FORMAT:
        raise StrategyError(f"a folder of strategies has format {FORMAT}", f"{folder}: {kind!r}", "fit it again")
    for name, digest in files.items():
        if not (place / name).is_file():
            raise StrategyError(RULE, f"{folder}: {name} is not there", AGAIN)
        if digest_of(place / name) != digest:
            raise StrategyError(RULE, f"{folder}: {name} is not as it was written", AGAIN)
    return manifest


def version_of(folder: str | Path) -> str:
    """A digest of all that is in the folder."""
    return hashlib.blake2b((Path(folder) / MANIFEST).read_bytes(), digest_size=8).hexdigest()


def _check_embedder(embedder: Embedder, canary_E: np.ndarray, folder: str | Path) -> None:
    found_E = embedder.embed([CANARY])[0]
    same = found_E.shape == canary_E.shape
    if not same or np.linalg.norm(found_E - canary_E) > CANARY_TOLERANCE * np.linalg.norm(canary_E):
        rule = "an extractor reads the embeddings of the model that it was fitted with"
        raise StrategyError(rule, f"{folder}: {embedder.name} gives others now", "fit it again, or restore the model")
