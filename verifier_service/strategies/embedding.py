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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...contracts.errors import ModelError, StrategyError
from ...contracts.sections import HIDDEN
from ...models.loading import context_length, load_causal_lm, load_tokenizer, use_threads
from ...models.packing import Packing, attention_packed

DEPTH = 2 / 3  # of a model's layers
BATCH_TOKENS = 4096  # tokens that a model reads at once
TOLD = 500  # texts, after which a fit says how far it is
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
        self.layer = _layer(self.model.base_model, config.num_hidden_layers)
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
        with attention_packed(self.model), _read_before(self.layer) as states, suppress(_ReadEnoughError):
            positions = packing.positions[None]
            self.model.base_model(input_ids=tokens[None], position_ids=positions, use_cache=False, packing=packing)
        states_TE = states[0][0] * (packing.positions > 0)[:, None]
        rows = packing.slots // packing.width
        sums = torch.zeros(len(ids), self.size, device=states_TE.device).index_add_(0, rows, states_TE)
        return (sums / (lengths - 1).clamp(min=1)[:, None]).cpu().numpy()


class _ReadEnoughError(Exception):
    """The layers after this one are not needed."""


def _layer(model: torch.nn.Module, count: int) -> torch.nn.Module:
    """The first layer after DEPTH of the `count` that a model has. Raises ModelError."""
    lists = (own for own in model.modules() if isinstance(own, torch.nn.ModuleList) and len(own) == count)
    if (layers := next(lists, None)) is None:
        raise ModelError("hidden states are read between layers", f"{type(model).__name__} has no list", "name another")
    return layers[min(round(count * DEPTH), count - 1)]


@contextmanager
def _read_before(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The hidden states [1, T, E] that come to a layer, where the model stops."""
    states: list[torch.Tensor] = []

    def stop(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append(given[0] if given else named["hidden_states"])
        raise _ReadEnoughError

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield states
    finally:
        handle.remove()


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


class ReadOnce:
    """An embedder that reads a text but once, and says how far it is."""

    def __init__(self, embedder: Embedder, note: Callable[[str], object]) -> None:
        self.name, self._embedder, self._note = embedder.name, embedder, note
        self._known: dict[str, np.ndarray] = {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for at in range(0, len(new), TOLD):
            some = new[at : at + TOLD]
            self._known |= zip(some, self._embedder.embed(some), strict=True)
            if len(new) > TOLD:
                self._note(f"embedded {at + len(some):,} of {len(new):,} texts")
        return np.stack([self._known[text] for text in texts]) if texts else self._embedder.embed([])


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
