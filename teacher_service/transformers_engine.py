"""A teacher on transformers: one prefill of packed rollouts, then the head on response positions only, in chunks.

Nothing is generated and nothing is re-tokenised. Of a rollout's L tokens the first L-1 are read; the hidden state of
position i predicts token i+1, so that response token t is scored from the position before it. `[tokens, vocab]` is
never in memory as a whole: models/logits gives it a chunk at a time.

Shapes: T packed tokens of a batch, R response tokens, K ids of the support, D hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..contracts.config import Lora
from ..contracts.errors import ModelError
from ..contracts.records import EMPTY_F, Rollout, ScoreRequest, TeacherScores, WeightBucket, WeightManifest
from ..models.loading import context_length, load_causal_lm, use_threads
from ..models.logits import logit_chunks
from ..models.lora import ReplicaWeights
from ..models.packing import Packing, attention_packed, packed_hidden_states
from ..models.weight_proof import check_canary, copy_buckets
from .requests import batches_of, check_request, refusal


class TransformersTeacher:
    """A `contracts.protocols.TeacherEngine` on one device. `threads`: models.loading.use_threads.

    With `lora` the weights that it takes, if any, are adapters alone, and it runs them merged. `shared` is a rollout
    engine on transformers, whose model it scores with.
    """

    def __init__(
        self,
        model: str,
        *,
        teacher_id: str,
        dtype: str,
        device: str = "cpu",
        threads: int = 1,
        tokens_per_batch: int = 8192,
        lora: Lora | None = None,
        shared: Any = None,
    ) -> None:
        self.teacher_id, self.device, self.tokens_per_batch = teacher_id, device, tokens_per_batch
        self.model = shared.model if shared else load_causal_lm(model, dtype, attention="packed", device=device)
        use_threads(self.model, threads)
        self.weights = shared.weights if shared else ReplicaWeights(self.model, lora)
        self.head = _head(self.model, model)
        self.context = context_length(self.model.config)
        self.vocab = self.largest_k = self.model.config.vocab_size

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        """Scores in the order of `rollouts`, at temperature 1; a refused one has an error class and no arrays."""
        check_request(request, self.vocab)
        errors = [refusal(r, request, context=self.context, vocab=self.vocab) for r in rollouts]
        scores = [
            TeacherScores(rollout_id=r.rollout_id, teacher_id=self.teacher_id, context=request.context, error_class=e)
            for r, e in zip(rollouts, errors, strict=True)
        ]
        sound = [i for i, error in enumerate(errors) if not error]
        for batch in batches_of([len(rollouts[i].token_ids) for i in sound], self.tokens_per_batch):
            rows = [sound[i] for i in batch]
            for i, score in zip(rows, self._score_batch([rollouts[i] for i in rows], request), strict=True):
                scores[i] = score
        return scores

    @torch.inference_mode()
    def _score_batch(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        hidden = self._response_states(rollouts)
        targets = self._tensor(np.concatenate([r.token_ids[r.prompt_length :] for r in rollouts]))
        given = None
        if request.signal == "given":
            given = self._tensor(np.concatenate([r.topk_ids for r in rollouts]))
        top_k = request.top_k if request.signal == "topk" else 0
        logprobs, ids, id_logprobs, entropy = read_logprobs(hidden, self.head, targets, given, top_k)
        returned = to_numpy(hidden) if request.signal == "hidden" else np.zeros((len(hidden), 0), np.float32)
        columns = (
            logprobs.cpu().numpy(),
            ids.int().cpu().numpy(),
            id_logprobs.cpu().numpy(),
            entropy.cpu().numpy(),
            returned,
        )
        ends = np.cumsum([rollout.response_length for rollout in rollouts])[:-1]
        return [
            TeacherScores(
                rollout_id=rollout.rollout_id,
                teacher_id=self.teacher_id,
                context=request.context,
                logprobs=own,
                topk_ids=own_ids,
                topk_logprobs=own_id_logprobs,
                entropy=own_entropy if own_ids.size else EMPTY_F,
                hidden=own_hidden,
            )
            for rollout, own, own_ids, own_id_logprobs, own_entropy, own_hidden in zip(
                rollouts, *(np.split(column, ends) for column in columns), strict=True
            )
        ]

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version of the student in and prove it by fingerprint and canary. Raises WeightsMismatch."""
        copy_buckets(self.weights.parameters, buckets, manifest)
        self.weights.apply()
        ids = manifest.canary_ids
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
        )
        check_canary(self.score([canary], ScoreRequest())[0].logprobs, manifest)

    def _response_states(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Hidden states `[R, D]` of the positions that predict the rollouts' response tokens, in their order."""
        lengths = np.array([len(r.token_ids) - 1 for r in rollouts])
        tokens = self._tensor(np.concatenate([r.token_ids[:-1] for r in rollouts]))
        hidden = packed_hidden_states(self.model, tokens, self._tensor(lengths))
        starts = np.cumsum(lengths) - lengths
        rows = [
            np.arange(start + rollout.prompt_length - 1, start + length)
            for start, length, rollout in zip(starts, lengths, rollouts, strict=True)
        ]
        return hidden.index_select(0, self._tensor(np.concatenate(rows)))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


@torch.inference_mode()
def _head(model: Any, name: str) -> torch.Tensor:
    """The head `[V, D]`; a model whose logits are not `hidden @ head` is refused, for they would be silently wrong."""
    head = model.get_output_embeddings().weight
    ids = torch.arange(min(8, len(head)), device=head.device)
    lengths = torch.tensor([len(ids)], device=head.device)
    packing = Packing.of(lengths)
    with attention_packed(model):
        out = model(input_ids=ids[None], position_ids=packing.positions[None], use_cache=False, packing=packing)
    ours = packed_hidden_states(model, ids, lengths) @ head.T
    gap = float((out.logits[0] - ours).abs().max())
    if not gap <= 1e-3 * float(ours.abs().max()):
        raise ModelError(
            "a teacher's logits are its last hidden states times its head",
            f"{name}: they differ by {gap:.3g}",
            "a model with a bias, a scale or a soft cap after the head is not supported",
        )
    return head


def read_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, given: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs `[R]` of `targets`, ids with their logprobs `[R, K]` (those `given`, else the `top_k` likeliest), and
    the entropy `[R]` in nats, left 0 where there are no ids.

    All are of the whole vocabulary. hidden `[R, D]`, head `[V, D]`, targets int64 `[R]`. The likeliest id is left out
    of the sum: float32 then keeps the logprob of one that is all but certain, and with it the mass of all others.
    """
    logprobs, ids, id_logprobs, entropy = [], [], [], []
    for rows, logits in logit_chunks(hidden, head):
        largest, likeliest = logits.max(1, keepdim=True)
        others = logits.sub_(largest).exp().scatter_(1, likeliest, 0.0)
        total = others.sum(1, keepdim=True).log1p()
        logprobs.append((logits.gather(1, targets[rows, None]) - total).squeeze(1))
        ids.append(logits.topk(top_k, 1).indices if given is None else given[rows])
        id_logprobs.append(logits.gather(1, ids[-1]) - total)
        entropy.append(_entropy(logits, total) if ids[-1].shape[1] else torch.zeros_like(logprobs[-1]))
    return torch.cat(logprobs), torch.cat(ids), torch.cat(id_logprobs), torch.cat(entropy)


def _entropy(logits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """-Σ p log p `[C]` of logits `[C, V]` whose logsumexp is `total` `[C, 1]`; `logits` are overwritten."""
    logprobs = logits.sub_(total)
    return torch.special.entr(logprobs.exp()).sum(1)


def to_numpy(hidden: torch.Tensor) -> np.ndarray:
    """float32, or the bits of bfloat16 as uint16."""
    return (hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden).cpu().numpy()
