"""The learner in one process for tests: its own step from Arrow batches to gradients, without DeepSpeed or ranks.

The student is a bigram: its next token depends on the last one alone, so every distribution is known by hand.
"""

from dataclasses import replace

import numpy as np
import torch

from tutorloop.contracts.arrow import encode
from tutorloop.contracts.config import REFERENCE, Learner
from tutorloop.contracts.records import Correction, Rollout, StepPlan, TeacherScores, TokenCredit, TrainRow
from tutorloop.learner.examples import Example
from tutorloop.learner.old_policy import OldPolicyPass
from tutorloop.learner.parameters import Rounding
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.worker import LearnerWorker

RATE = 0.5


class Bigram(torch.nn.Module):
    """logits after token i: embedding[i] @ head.T. Takes what PackedStudent takes."""

    def __init__(self, embedding, head=None, dtype=torch.float32):
        super().__init__()
        table = torch.as_tensor(embedding, dtype=dtype)
        self.embedding = torch.nn.Parameter(table.clone())
        self.head = torch.nn.Parameter(
            torch.eye(table.shape[1], dtype=dtype) if head is None else head.to(dtype, copy=True)
        )

    def forward(self, token_ids, lengths, rows, read):
        assert int(lengths.sum()) == len(token_ids)
        return read(self.embedding[token_ids].index_select(0, rows), self.head)

    def logprobs(self):
        """Log-probabilities `[last token, next token]`."""
        return (self.embedding @ self.head.T).log_softmax(1)


class Engine:
    """What the learner calls of DeepSpeed, by plain autograd and SGD. Passes without a gradient read `before`."""

    def __init__(self, module, before=None):
        self.module, self.before = module, before or module
        self.optimizer = self.basic_optimizer = torch.optim.SGD(module.parameters())
        self.gradients, self.micro_batches, self.last = [], 0, False

    def __call__(self, *args):
        return (self.module if torch.is_grad_enabled() else self.before)(*args)

    def set_gradient_accumulation_boundary(self, last):
        assert not self.last, "the boundary is the last micro-batch of an update"
        self.last = last

    def backward(self, loss, scale_wrt_gas):
        assert scale_wrt_gas is False
        self.micro_batches += 1
        loss.backward()

    def step(self):
        assert self.last
        self.last = False
        self.gradients.append([parameter.grad.clone() for parameter in self.module.parameters()])
        self.optimizer.step()
        self.optimizer.zero_grad()

    device = "cpu"

    def was_step_applied(self):
        return True

    def zero_optimization_stage(self):
        return 0

    def bfloat16_enabled(self):
        return False


class OneProcess(LearnerWorker):
    """The learner's own step over a stand-in engine; `before`: the student that the pass before the updates sees."""

    def __init__(self, student, terms, correction=None, *, heads=None, updates=1, before=None):
        self.terms, self.correction, self.heads = bind_terms(terms), correction or Correction(), heads or {}
        self.rank, self.world_size, self.device = 0, 1, "cpu"
        self.config, self.steps = Learner(learning_rate=RATE, updates_per_step=updates), 1
        self.engine = Engine(student, before)
        self.rounding = Rounding()
        self.old_policy_pass = OldPolicyPass(self.engine, self.terms, self.correction, updates, "cpu")

    def _over_ranks(self, values):
        return list(values)

    def _from_ranks(self, own):
        return [own]

    def learn(self, examples, cuts=None, version=0):
        """One step; `cuts`: update → micro-batch → indices of examples (default: all in one). The report."""
        cuts = [[range(len(examples))]] if cuts is None else cuts
        scores = [scores for example in examples for scores in example.scores.values()]
        credits = [
            TokenCredit(rollout_id=e.rollout.rollout_id, service=name, values=values)
            for e in examples
            for name, values in e.credits.items()
        ]
        batches = [encode(Rollout, [e.rollout for e in examples]), encode(TeacherScores, scores)]
        batches += [encode(TokenCredit, credits)] if credits else []
        rows = [TrainRow(batch=0, row=i, advantage=e.advantage, weight=e.weight) for i, e in enumerate(examples)]
        plan = StepPlan(
            step=0,
            version=version,
            rollout_batches=1,
            score_batches=1,
            credit_batches=len(batches) - 2,
            updates=tuple(tuple(tuple(rows[i] for i in part) for part in update) for update in cuts),
        )
        return self.step(plan, *batches)


def make_example(
    name, tokens, logprobs, *, prompt=1, mask=None, advantage=0.0, weight=1.0, scores=(), credits=None, **fields
):
    """An example of `tokens`, the first `prompt` of them the prompt, with the sampler's `logprobs` of the others."""
    rows = len(tokens) - prompt
    rollout = Rollout(
        rollout_id=name,
        prompt_id=name,
        group_id=name,
        sample_index=0,
        token_ids=np.asarray(tokens, np.int32),
        prompt_length=prompt,
        text="",
        logprobs=np.asarray(logprobs, np.float32),
        loss_mask=np.ones(rows, bool) if mask is None else np.asarray(mask, bool),
        **fields,
    )
    own = {given.teacher_id: replace(given, rollout_id=name) for given in scores}
    return Example(rollout=rollout, advantage=advantage, weight=weight, scores=own, credits=credits or {})


def paths_of(logprobs):
    """Sequences of tokens that share no last token, and the table under which they have these logprobs `[i][t]`."""
    size = sum(map(len, logprobs)) + len(logprobs)
    table, sequences, token = np.zeros((size, size)), [], 0
    for row in logprobs:
        sequences.append(list(range(token, token + len(row) + 1)))
        for t, value in enumerate(row):
            table[token + t] = np.log(-np.expm1(value) / (size - 1))
            table[token + t, token + t + 1] = value
        token += len(row) + 1
    return sequences, table


WIDTHS = {"big": (7, 5), "small": (4, 3)}  # teacher → hidden size, K


class World:
    """A random student, teachers with heads of their own, a reference, and examples of every kind."""

    def __init__(self, vocab=13, hidden=6):
        seed = np.random.SeedSequence().entropy
        print("seed", seed)
        self.rng, self.vocab = np.random.default_rng(seed), vocab
        self.embedding, self.head = (self.normal(vocab, hidden) for _ in range(2))
        self.heads = {name: self.normal(vocab, width) for name, (width, _) in WIDTHS.items()}
        # No teacher is so sure that 1 - Σ of its top-k, which travels as float32, loses more than 1e-5 of itself.
        self.states = {name: 0.4 * self.normal(vocab, width) for name, (width, _) in WIDTHS.items()}
        self.reference = self.normal(vocab, vocab).log_softmax(1)

    def normal(self, *shape):
        return torch.from_numpy(self.rng.normal(size=shape).astype(np.float32))

    def student(self, dtype=torch.float32):
        return Bigram(self.embedding, self.head, dtype)

    def scores(self, name, tokens, prompt):
        """What teacher `name` (or the reference) says of the response."""
        last, targets = torch.tensor(tokens[prompt - 1 : -1]), torch.tensor(tokens[prompt:])
        if name == REFERENCE:
            return TeacherScores(rollout_id="", teacher_id=name, logprobs=self.reference[last, targets].numpy())
        hidden = self.states[name][last]
        logprobs = (hidden @ self.heads[name].T).log_softmax(1)
        top = logprobs.topk(WIDTHS[name][1], 1)
        return TeacherScores(
            rollout_id="",
            teacher_id=name,
            logprobs=logprobs[torch.arange(len(targets)), targets].numpy(),
            topk_ids=top.indices.int().numpy(),
            topk_logprobs=top.values.numpy(),
            entropy=-(logprobs.exp() * logprobs).sum(1).numpy(),
            hidden=hidden.numpy(),
            views=logprobs[torch.arange(len(targets)), targets].numpy()[:, None],
            view_weights=np.ones(1, np.float32),
        )

    def example(self, name, source="student", teachers=("big", "small", REFERENCE), spread=0.5, services=()):
        """A random example; its sampler's logprobs are the student's, off by `spread` nats."""
        rng = self.rng
        prompt, rows = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        tokens = rng.integers(0, self.vocab, prompt + rows).tolist()
        own = self.student().logprobs().detach()[tokens[prompt - 1 : -1], tokens[prompt:]].numpy()
        mask = rng.random(rows) < 0.8
        mask[rng.integers(rows)] = True
        return make_example(
            name,
            tokens,
            own + spread * rng.normal(size=rows) if source == "student" else np.zeros(rows),
            prompt=prompt,
            mask=mask,
            advantage=float(rng.normal()),
            weight=float(rng.uniform(0.2, 2.0)),
            scores=[self.scores(teacher, tokens, prompt) for teacher in teachers],
            credits={service: rng.normal(size=rows).astype(np.float32) for service in services},
            source=source,
            teacher=str(rng.choice(list(WIDTHS))),
        )

    def cut(self, count, parts):
        """All indices in a random order, in `parts` micro-batches of random size, some maybe empty."""
        ends = np.sort(self.rng.integers(0, count + 1, parts - 1))
        return [part.tolist() for part in np.split(self.rng.permutation(count), ends)]


# ---- the slow reference: one token of one rollout at a time, in float64 -------------------------------------------


def _reverse(p, q):
    return (p.exp() * (p - q)).sum()


def _topk_reverse(p, ids, q):
    """KL(student‖teacher) over the ids and one bucket of all other tokens."""
    inside = torch.tensor([i in ids.tolist() for i in range(len(p))])
    p_rest, q_rest = p[~inside].exp().sum(), 1 - q.exp().sum()
    return sum(p[i].exp() * (p[i] - q[k]) for k, i in enumerate(ids.tolist())) + p_rest * (p_rest / q_rest).log()


def _clipped(p_y, old, advantage):
    ratio = (p_y - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def _slow_token(term, world, example, t, p, y, old, gate):
    """The term's loss of one token; p: the student's log-probabilities of all words there."""
    credit = float(example.credits[term.credit][t]) if term.credit else 0.0
    kl = example.scores[REFERENCE].logprobs[t].item() - p[y] if term.reference else p.new_zeros(())
    if term.name == "nll":
        return -p[y]
    if term.name == "reference_kl":
        return kl.exp() - kl - 1
    if term.name == "clipped_policy_gradient":
        return _clipped(p[y], old, example.advantage + credit)
    scores = example.scores[term.teacher or example.rollout.teacher]
    if term.name == "topk_divergence":
        return _topk_reverse(p, scores.topk_ids[t], torch.from_numpy(scores.topk_logprobs[t]).double())
    if term.name == "exact_divergence":
        head = world.heads[scores.teacher_id].double()
        return _reverse(p, (head @ torch.from_numpy(scores.hidden[t]).double()).log_softmax(0))
    gap = scores.logprobs[t].item() - p[y].item()
    if term.name == "soft_gate":
        return -gate * gap * p[y]
    assert term.name == "policy_gradient"
    strength = term.options.get("extrapolation", 1.0)
    further = (strength - 1) * (scores.logprobs[t] - example.scores[REFERENCE].logprobs[t]) if term.reference else 0.0
    return -(gap + float(further) + credit) * p[y]


def _trains(term, example):
    own = term.teacher or example.rollout.teacher
    reads = [REFERENCE] * term.reference + [own] * (not term.name.startswith(("nll", "clipped", "reference")))
    credited = not term.credit or term.credit in example.credits
    return credited and example.rollout.source in term.sources and all(name in example.scores for name in reads)


def slow_losses(world, student, examples, terms, *, old=None, weights=None, gates=None):
    """Each term's loss by key. By rollout id, `[R]`: old log π_old (else the student's own), weights (NaN: rejected;
    else 1), gates."""
    logprobs, trained = student.logprobs(), 0
    sums = {term.key: logprobs.new_zeros(()) for term in terms}
    tokens, sequences = dict.fromkeys(sums, 0), dict.fromkeys(sums, 0)
    for example in examples:
        rollout, name = example.rollout, example.rollout.rollout_id
        weight = (weights or {}).get(name, np.ones(rollout.response_length))
        kept = [t for t in range(rollout.response_length) if rollout.loss_mask[t] and not np.isnan(weight[t])]
        members = [term for term in terms if _trains(term, example)]
        trained += len(kept) if members else 0
        for term in members if kept else ():
            total = logprobs.new_zeros(())
            for t in kept:
                y, last = rollout.token_ids[rollout.prompt_length + t], rollout.token_ids[rollout.prompt_length + t - 1]
                p = logprobs[int(last)]
                before = p[int(y)].detach() if old is None else float(old[name][t])
                gate = 1.0 if gates is None else float(gates[name][t])
                loss = _slow_token(term, world, example, t, p, int(y), before, gate)
                total = total + example.weight * float(weight[t]) * loss
            sums[term.key] = sums[term.key] + (total / len(kept) if term.reduction == "sequences" else total)
            tokens[term.key] += len(kept)
            sequences[term.key] += 1
    losses = {}
    for term in terms:
        counts = {"tokens": tokens[term.key], "sequences": sequences[term.key]}
        counts["length"] = sequences[term.key] * term.length
        divisor = trained if term.of_batch and term.reduction == "tokens" else counts[term.reduction]
        losses[term.key] = sums[term.key] / divisor if tokens[term.key] else sums[term.key]
    return losses


def slow_total(terms, losses):
    return sum(term.weight * losses[term.key] for term in terms)


def check_step(learner, report, terms, losses, student, update=0):
    """One update's report and gradients are those of the slow losses, within 1e-5 (of the largest gradient)."""
    gradients = torch.autograd.grad(slow_total(terms, losses), list(student.parameters()))
    for key, loss in losses.items():
        found = report.metrics.get(f"loss_{key}", 0.0)
        np.testing.assert_allclose(found, loss.item(), rtol=1e-5, atol=1e-5, err_msg=key)
    np.testing.assert_allclose(report.loss, slow_total(terms, losses).item(), rtol=1e-5, atol=1e-5)
    check_gradients(learner.engine.gradients[update], gradients)


def check_gradients(found, wanted):
    assert all(gradient.isfinite().all() for gradient in found)
    for one, other in zip(found, wanted, strict=True):
        off = (one.double() - other.double()).abs().max() / other.abs().max()
        assert off < 1e-5, off


def own_logprobs(student, rollout):
    """log π of the response's tokens [R], float64."""
    table = student.logprobs().detach().double().numpy()
    start = rollout.prompt_length
    return table[rollout.token_ids[start - 1 : -1], rollout.token_ids[start:]]


def slow_weights(examples, student, correction):
    """Weights [R] by rollout id, NaN where a token is rejected; NaN too where the loss mask is off."""
    weights = {}
    for rollout in (example.rollout for example in examples):
        old, on = own_logprobs(student, rollout), rollout.loss_mask
        mu, out = rollout.logprobs.astype(np.float64), np.full(len(on), np.nan)
        if rollout.source != "student":
            weights[rollout.rollout_id] = np.where(on, 1.0, np.nan)
            continue
        ratios = {t: np.exp(old[t] - mu[t]) for t in np.flatnonzero(on)}
        product = np.prod(list(ratios.values()))
        whole = {"sequence": product, "geometric": product ** (1 / len(ratios))}
        for t, own in ratios.items():
            ratio = whole.get(correction.level, own)
            rejected = correction.kind == "masked" and not correction.low <= ratio <= correction.high
            rejected |= any(other < correction.veto for other in ratios.values())
            gap = abs(np.exp(old[t]) - np.exp(mu[t]))
            rejected |= 0 < correction.probability_gap < gap
            plain = correction.kind == "none" or correction.level == "geometric"
            out[t] = np.nan if rejected else 1.0 if plain else min(ratio, correction.high)
        weights[rollout.rollout_id] = out
    if correction.normalise:
        ids = {e.rollout.rollout_id for e in examples if e.rollout.source == "student"}
        mean = np.nanmean(np.concatenate([weights[name] for name in ids]))
        weights = {name: own / mean if name in ids else own for name, own in weights.items()}
    return weights
