"""What the learner's loss curve is compared with: a plain PyTorch loop, and the rollouts that it trains on.

It shares nothing with the learner but transformers and torch: one process, float64, dense logits, one sequence at a
time, torch's AdamW, its own clipping, schedule and formulas. Rollouts vary in length, have masked tokens, some come
back without scores, and some are rows of the dataset.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tutorloop.contracts.records import Correction, Rollout, TeacherScores, Term

VOCAB, STEPS, SHORT, SEED = 64, 20, 6, 20261120
TERMS = (
    Term(name="exact_divergence", weight=0.5),
    Term(name="topk_divergence", weight=0.3, options={"direction": "forward"}),
    Term(name="policy_gradient", weight=0.2),
    Term(name="clipped_policy_gradient", weight=0.4, reduction="sequences"),
    Term(name="nll", weight=0.6, sources=("dataset",), of_batch=True),
)
WEIGHTS = np.array([term.weight for term in TERMS])
TRUNCATED = Correction(kind="truncated", high=1.5)
MASKED = Correction(kind="masked", low=0.3, high=3.0, veto=0.02)
OPTIONS = {
    "learning_rate": 3e-3,
    "warmup_steps": 4,
    "decay": "cosine",
    "min_learning_rate": 3e-4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
    "tokens_per_batch": 48,
}


class Item(NamedTuple):
    rollout: Rollout
    scores: TeacherScores | None
    advantage: float
    weight: float


BROKEN = {  # an item of the step → what is wrong with it, and what the message says
    "teacher": lambda item: item._replace(scores=replace(item.scores, hidden=item.scores.hidden * np.nan)),
    "sampler": lambda item: item._replace(rollout=replace(item.rollout, logprobs=item.rollout.logprobs * np.inf)),
    "advantage": lambda item: item._replace(advantage=1e30),
}
SAYS = {
    "teacher": "step 2, update 1 of 1: loss_exact_divergence is not finite, of rollouts {name}\n",
    "sampler": "step 2: the sampler's logprobs, or an advantage, credit or weight, are not finite, of rollouts "
    "{name}\n",
    "advantage": "step 2, update 1 of 1: the gradients' norm is not finite, though every loss is\n",
}


@torch.no_grad()
def make_item(rng, teacher, name, source):
    rollout, scores = make_pair(rng, teacher, name, source)
    return Item(rollout, scores, float(rng.normal()), float(rng.uniform(0.5, 1.5)))


def make_pair(rng, teacher, name, source):
    prompt, response = int(rng.integers(1, 7)), int(rng.integers(1, 25))
    ids = rng.integers(0, VOCAB, prompt + response).astype(np.int32)
    rollout = Rollout(
        rollout_id=name,
        prompt_id=name,
        group_id=name,
        sample_index=0,
        token_ids=ids,
        prompt_length=prompt,
        text="",
        logprobs=(rng.normal(size=response) - math.log(VOCAB)).astype(np.float32),
        loss_mask=rng.random(response) < 0.85,
        source=source,
    )
    if rng.random() < 0.15:
        error = "too_long" if rng.random() < 0.5 else ""
        return rollout, TeacherScores(rollout_id=name, teacher_id="teacher", error_class=error) if error else None
    hidden = teacher.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0, prompt - 1 : -1]
    logprobs = (hidden @ teacher.lm_head.weight.T).log_softmax(1)
    top = logprobs.topk(5, 1)
    targets = torch.from_numpy(ids[prompt:]).long()
    scores = TeacherScores(
        rollout_id=name,
        teacher_id="teacher",
        logprobs=logprobs.gather(1, targets[:, None])[:, 0].numpy(),
        topk_ids=top.indices.int().numpy(),
        topk_logprobs=top.values.numpy(),
        hidden=hidden.numpy(),
    )
    return rollout, scores


def plain(name, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def token_losses(logp, head, item, t, y, old):
    """The term losses of one token, None where it has no part in a term; logp [V]: the student's, `old` log π_old."""
    if item.rollout.source == "dataset":
        return [None, None, None, None, -logp[y]]
    ratio = (logp[y] - old).exp()
    clipped = -torch.minimum(ratio * item.advantage, ratio.clamp(0.8, 1.2) * item.advantage)
    scores = item.scores
    if scores is None or scores.error_class:
        return [None, None, None, clipped, None]
    teacher = (torch.from_numpy(scores.hidden[t]).to(head.dtype) @ head.T).log_softmax(0)
    exact = (logp.exp() * (logp - teacher)).sum()
    kept = torch.from_numpy(scores.topk_ids[t]).long()
    q_top = torch.from_numpy(scores.topk_logprobs[t]).to(head.dtype).exp()
    q_rest, p_rest = 1 - q_top.sum(), 1 - logp[kept].exp().sum()
    topk = (q_top * (q_top.log() - logp[kept])).sum() + q_rest * (q_rest.log() - p_rest.log())
    return [exact, topk, -(float(scores.logprobs[t]) - logp[y].item()) * logp[y], clipped, None]


def logprobs_of(model, rollout):
    """log π `[R, V]` of the response's positions, and the response."""
    ids = torch.from_numpy(rollout.token_ids).long()
    return model(ids[None]).logits[0, rollout.prompt_length - 1 : -1].log_softmax(1), ids[rollout.prompt_length :]


@torch.no_grad()
def decide(model, item, correction):
    """log π_old and weights of an item's tokens [R]; a weight of None: the token is rejected, or was masked anyway."""
    rollout = item.rollout
    logp, ids = logprobs_of(model, rollout)
    old = [float(logp[t, y]) for t, y in enumerate(ids)]
    on = [t for t in range(len(ids)) if rollout.loss_mask[t]]
    weights = [1.0 if t in on else None for t in range(len(ids))]
    if rollout.source == "student":
        ratios = {t: math.exp(old[t] - float(rollout.logprobs[t])) for t in on}
        limits = (correction.low, correction.high, correction.veto)
        assert all(abs(ratio / limit - 1) > 1e-4 for ratio in ratios.values() for limit in limits if limit), "too close"
        vetoed = any(ratio < correction.veto for ratio in ratios.values())
        for t, ratio in ratios.items():
            outside = correction.kind == "masked" and not correction.low <= ratio <= correction.high
            weights[t] = None if vetoed or outside else min(ratio, correction.high)
    return old, weights


def reference_losses(model, head, decided):
    """Of one update, by term: sums of weighted token losses (with graph), of their magnitudes, divisors; and tokens."""
    sums, sizes, counts = (
        [torch.zeros((), dtype=torch.float64)] * len(TERMS),
        np.zeros(len(TERMS)),
        np.zeros(len(TERMS)),
    )
    trained = 0
    for item, old, weights in decided:
        kept = [t for t, weight in enumerate(weights) if weight is not None]
        logp, ids = logprobs_of(model, item.rollout)
        for t in kept:
            losses = token_losses(logp[t], head, item, t, int(ids[t]), old[t])
            for i, loss in enumerate(losses):
                if loss is not None:
                    share = 1 / len(kept) if TERMS[i].reduction == "sequences" else 1.0
                    scaled = loss * (share * weights[t] * item.weight)
                    sums[i], counts[i] = sums[i] + scaled, counts[i] + share
                    sizes[i] += abs(scaled.item())
        trained += len(kept)
    counts[[i for i, term in enumerate(TERMS) if term.of_batch]] = trained
    return sums, sizes, counts, trained


def reference_run(models, data, correction, updates):
    """In float64: by step the term losses, the means of their magnitudes, tokens and gradient norms; final weights."""
    torch.set_num_threads(1)
    model = plain(models["student"], torch.float64)
    head = plain(models["teacher"], torch.float64).lm_head.weight.detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    curve, scales, counts, norms = [], [], [], []
    for step, items in enumerate(data):
        decided = [(item, *decide(model, item, correction)) for item in items]
        cosine = 3e-4 + (3e-3 - 3e-4) * 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))
        optimizer.param_groups[0]["lr"] = 3e-3 * (step + 1) / 4 if step < 4 else cosine
        totals, norm = np.zeros((3, len(TERMS))), []
        counts.append(0)
        for update in range(updates):
            sums, sizes, divisors, trained = reference_losses(model, head, decided[update::updates])
            optimizer.zero_grad()
            sum(w * s / d for w, s, d in zip(WEIGHTS, sums, divisors, strict=True) if d).backward()
            norm.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            totals += [[float(s.detach()) for s in sums], sizes, divisors]
            counts[-1] += trained
        norms.append(np.mean(norm))
        curve.append(totals[0] / totals[2])
        scales.append(totals[1] / totals[2])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return np.array(curve), np.array(scales), counts, norms, weights
