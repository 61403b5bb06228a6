"""Frozen embeddings of step texts, and the whitening that makes them comparable.

`hidden:MODEL` is the mean over a text's tokens of a causal language model's hidden states at two thirds of its depth,
where states say most of what a text is about and least of which token comes next; it needs no download where the model
is there already. Any other name is a sentence-transformers model.

A language model's embeddings share a large mean and vary mostly along few directions (anisotropy: Ethayarajh 2019), so
that every cosine is near 1: they are centred and whitened with the statistics of a fit (Su et al. 2021, 2103.15316).
Softly: directions of less than the mean variance stay small, since a wording that the fit has not seen differs in them
by chance.

Shapes: N texts, T tokens, E embedding size, C components.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...contracts.errors import ModelError, StrategyError
from ...models.loading import context_length, load_causal_lm, load_tokenizer, use_threads
from ...models.packing import Packing, attention_packed

HIDDEN = "hidden:"
DEPTH = 2 / 3  # of a model's layers
BATCH_TOKENS = 4096  # tokens that a model reads at once
FLOOR = 1e-4  # of the largest variance: directions with less are left out
SHRINKAGE = 1.0  # of the mean variance, added to each


class Embedder(Protocol):
    """Texts to vectors; each text's is the same whatever the others are."""

    name: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E]."""
        ...


def make_embedder(name: str, device: str = "cpu", threads: int = 1) -> Embedder:
    """`hidden:MODEL`, or a sentence-transformers model. `threads` may be used of the CPU. Raises StrategyError where
    sentence-transformers is not installed, ModelError where the model does not load."""
    if name.startswith(HIDDEN):
        return HiddenStates(name.removeprefix(HIDDEN), device, threads)
    return SentenceModel(name, device)


class HiddenStates:
    """Means of a causal language model's hidden states, in float32."""

    def __init__(self, model: str, device: str = "cpu", threads: int = 1) -> None:
        self.name = HIDDEN + model
        self.model = load_causal_lm(model, "fp32", attention="packed", device=device)
        use_threads(self.model, threads)
        self.tokenizer = load_tokenizer(model)
        config = self.model.config
        self.layer = round(config.num_hidden_layers * DEPTH)
        self.size, self.most = int(config.hidden_size), context_length(config)
        # What comes first draws attention whatever it is (2309.17453): a token before the text takes that part, so
        # that no state in the mean does.
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        self.first = next(token for token in ids if token is not None)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E]; zeros for a text without tokens."""
        vectors_NE = np.zeros((len(texts), self.size), np.float32)
        if texts:
            read = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            ids = [[self.first, *own[: self.most - 1]] for own in read]
            for rows in _batches([len(own) for own in ids]):
                vectors_NE[rows] = self._means([ids[row] for row in rows])
        return vectors_NE

    def _means(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        lengths = torch.tensor([len(own) for own in ids], device=self.model.device)
        tokens = torch.tensor([token for own in ids for token in own], device=self.model.device)
        packing = Packing.of(lengths)
        with attention_packed(self.model):
            out = self.model.base_model(
                input_ids=tokens[None],
                position_ids=packing.positions[None],
                use_cache=False,
                packing=packing,
                output_hidden_states=True,
            )
        states_TE = out.hidden_states[self.layer][0] * (packing.positions > 0)[:, None]
        rows = packing.slots // packing.width
        sums = torch.zeros(len(ids), self.size, device=states_TE.device).index_add_(0, rows, states_TE)
        return (sums / (lengths - 1).clamp(min=1)[:, None]).cpu().numpy()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of similar lengths, at most BATCH_TOKENS tokens at once when padded."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if rows and (len(rows) + 1) * lengths[row] > BATCH_TOKENS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


class SentenceModel:
    """A sentence-transformers model."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
        except ImportError:
            remedy = "pip install 'tutorloop[embeddings]', or name a causal language model: hidden:MODEL"
            raise StrategyError("such embeddings need sentence-transformers", f"embedder {name!r}", remedy) from None
        try:
            self.model: Any = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            rule = "an embedder is hidden:MODEL or a sentence-transformers model"
            raise ModelError(rule, f"{name!r}: {error}", "check the name; offline, give the model's folder") from error
        self.name = name

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E]."""
        return np.asarray(self.model.encode(list(texts), show_progress_bar=False), np.float32)


@dataclass(frozen=True, slots=True)
class Whitening:
    """x ↦ (x − mean) · matrix: along each principal component, the largest first, a variance of λ / (λ + mean λ)."""

    mean_E: np.ndarray
    matrix_EC: np.ndarray

    @classmethod
    def of(cls, embeddings_NE: np.ndarray, most: int) -> "Whitening":
        """At most `most` components, without those of next to no variance."""
        values_NE = np.asarray(embeddings_NE, np.float64)
        mean_E = values_NE.mean(0)
        centred_NE = values_NE - mean_E
        variances, directions_EE = np.linalg.eigh(centred_NE.T @ centred_NE / len(values_NE))
        kept = np.argsort(-variances, kind="stable")[:most]
        kept = kept[variances[kept] > max(FLOOR * variances.max(), np.finfo(np.float32).tiny)]
        scales_C = np.sqrt(variances[kept] + SHRINKAGE * variances[kept].mean())
        matrix_EC = directions_EE[:, kept] / scales_C
        return cls(mean_E.astype(np.float32), np.ascontiguousarray(matrix_EC, np.float32))

    def __call__(self, embeddings_NE: np.ndarray) -> np.ndarray:
        """float32 [N, C]."""
        return (embeddings_NE - self.mean_E) @ self.matrix_EC
