"""The path from records to gradients inside one rank, without DeepSpeed: joining, packing, the chunked head.

The slow reference reads the records itself and makes dense logits, one sequence at a time, in float64.
"""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tutorloop.contracts.arrow import encode
from tutorloop.contracts.errors import LearnerError, ModelError, RecordError
from tutorloop.contracts.records import Correction, Rollout, StepPlan, TeacherScores, Term, TrainRow
from tutorloop.learner import loss_head
from tutorloop.learner.examples import Example, join
from tutorloop.learner.loss_head import ChunkedLoss, PackedStudent
from tutorloop.learner.micro_batch import Selection, collate
from tutorloop.learner.objective import Objective, Sums
from tutorloop.learner.terms import TERMS, bind_terms
from tutorloop.models import logits as chunks

VOCAB = 50


def tiny(seed, hidden=32, attention="sdpa", **options):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation=attention,
        **options,
    )
    return Qwen3ForCausalLM(config)


TEACHERS = {"big": 48, "small": 16}  # hidden sizes unlike the student's


@torch.no_grad()
def example(rng, teachers, name, k=3):
    """A rollout scored by one of the teachers; in a fifth of the cases by none."""
    prompt, response = int(rng.integers(1, 6)), int(rng.integers(1, 15))
    ids = rng.integers(0, VOCAB, prompt + response).astype(np.int32)
    rollout = Rollout(
        rollout_id=name,
        prompt_id=name,
        group_id=name,
        sample_index=0,
        token_ids=ids,
        prompt_length=prompt,
        text="",
        logprobs=-rng.random(response).astype(np.float32) * 4,
        loss_mask=rng.random(response) < 0.8,
    )
    teacher_id = str(rng.choice(list(TEACHERS)))
    if rng.random() < 0.2:
        return rollout, TeacherScores(rollout_id=name, teacher_id=teacher_id, error_class="too_long")
    teacher = teachers[teacher_id]
    hidden = teacher.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0, prompt - 1 : -1]
    logprobs = teacher.lm_head(hidden).log_softmax(1)
    top = logprobs.topk(k, 1)
    return rollout, TeacherScores(
        rollout_id=name,
        teacher_id=teacher_id,
        logprobs=logprobs.gather(1, torch.from_numpy(ids[prompt:]).long()[:, None])[:, 0].numpy(),
        topk_ids=top.indices.int().numpy(),
        topk_logprobs=top.values.numpy(),
        hidden=hidden.numpy(),
    )


def run_objective(student, pairs, teachers, terms, correction, cut=4):
    """Loss, metric sums and each term's tokens of `pairs`, `cut` rows at a time, by Arrow and the packed student."""
    rows = [TrainRow(batch=0, row=r) for r in range(len(pairs))]
    micro_batches = tuple(tuple(rows[i : i + cut]) for i in range(0, len(rows), cut))
    plan = StepPlan(step=0, version=0, rollout_batches=1, score_batches=1, updates=(micro_batches,))
    batches = [encode(Rollout, [r for r, _ in pairs]), encode(TeacherScores, [s for _, s in reversed(pairs)])]
    bound = bind_terms(terms)
    (update,) = join(plan, batches)
    selections = [Selection.of(examples, bound) for examples in update]
    counts = {term.key: sum(s.tokens_and_sequences(term.key)[0] for s in selections) for term in bound}
    heads = {name: teacher.lm_head.weight.detach() for name, teacher in teachers.items()}
    sums, total = Sums(), 0.0
    for selection in selections:
        batch = collate(selection, bound, "cpu", lambda example: 1.0)
        objective = Objective(bound, batch, counts, heads, correction, sums)
        loss = student(
            batch.token_ids,
            batch.lengths,
            batch.rows,
            lambda hidden, head, objective=objective: ChunkedLoss.apply(hidden, head, objective),
        )
        loss.backward()
        total += loss.item()
    return total, sums, counts


@pytest.mark.parametrize("seed", range(3))
def test_several_teachers_in_small_chunks_match_dense_float64(seed, monkeypatch):
    print("seed", seed)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCAB * 7)  # seven rows a chunk, so that teachers share chunks
    monkeypatch.setattr(loss_head, "BLOCK_BYTES", 4 * VOCAB * 3)  # and blocks of three rows, three and one
    rng = np.random.default_rng(seed)
    teachers = {name: tiny(10 + i, hidden) for i, (name, hidden) in enumerate(TEACHERS.items())}
    pairs = [example(rng, teachers, f"r{i}") for i in range(13)]
    student = PackedStudent(tiny(1, attention="packed"))
    terms = (Term(name="exact_divergence", weight=0.7), Term(name="policy_gradient", weight=0.3))
    correction = Correction(kind="truncated", high=2.0)
    total, sums, counts = run_objective(student, pairs, teachers, terms, correction)

    reference = tiny(1).double()
    tokens = []
    for rollout, scores in pairs:
        if scores.error_class:
            continue
        ids = torch.from_numpy(rollout.token_ids).long()
        logp = reference(ids[None]).logits[0].log_softmax(1)
        q = teachers[scores.teacher_id].lm_head(torch.from_numpy(scores.hidden)).double().log_softmax(1)
        for t in np.flatnonzero(rollout.loss_mask):
            y = ids[rollout.prompt_length + t]
            p = logp[rollout.prompt_length + t - 1]
            weight = (p[y].detach() - float(rollout.logprobs[t])).exp().clamp(max=2.0)
            advantage = float(scores.logprobs[t]) - p[y].detach()
            tokens.append(weight * (0.7 * (p.exp() * (p - q[t])).sum() - 0.3 * advantage * p[y]))
    expected = torch.stack(tokens).mean()
    expected.backward()
    assert counts["exact_divergence"] == counts["policy_gradient"] == len(tokens)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for (name, found), wanted in zip(student.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=2e-6, msg=name)
    entropy = float(sums.totals[("entropy", "trained")]) / len(tokens)
    assert 0 < entropy < np.log(VOCAB)


def shifted(scores):
    """The same scores one token late."""
    fields = ("logprobs", "topk_ids", "topk_logprobs", "hidden")
    rolled = {name: np.roll(getattr(scores, name), 1, 0) for name in fields}
    return TeacherScores(rollout_id=scores.rollout_id, teacher_id=scores.teacher_id, **rolled)


@pytest.mark.parametrize("name", [name for name, loss in TERMS.items() if loss.signal not in ("none", "views")])
def test_a_student_that_is_its_own_teacher_has_no_divergence_unless_shifted_by_a_token(name):
    """The alignment: hidden state t − 1 of the student meets what the teacher said of the same token."""
    rng = np.random.default_rng(8)
    teachers = {"big": tiny(1), "small": tiny(1)}
    pairs = [pair for i in range(9) if not (pair := example(rng, teachers, f"r{i}"))[1].error_class]
    late = [(rollout, shifted(scores)) for rollout, scores in pairs]
    metric = {"sampled": "reverse_kl_k3", "topk": "topk_reverse_kl"}.get(TERMS[name].signal, "reverse_kl")
    found = []
    for case in (pairs, late):
        student = PackedStudent(tiny(1, attention="packed"))
        _, sums, counts = run_objective(student, case, teachers, (Term(name=name),), Correction())
        ((key, count),) = counts.items()
        largest = max(float(p.grad.abs().max()) for p in student.parameters())
        found.append((float(sums.totals[(metric, key)]) / count, largest))
    (right, right_gradient), (wrong, wrong_gradient) = found
    assert abs(right) < 1e-6 and right_gradient < 1e-5
    assert wrong > 0.1 and wrong_gradient > 1e-2


def test_scores_of_another_length_are_refused():
    rollout, _ = example(np.random.default_rng(9), {name: tiny(1) for name in TEACHERS}, "r")
    short = TeacherScores(rollout_id="r", teacher_id="big", logprobs=rollout.logprobs[1:])
    with pytest.raises(RecordError, match="align"):
        Example(rollout=rollout, scores={"big": short})


DISTILLING = ("policy_gradient", "topk_divergence", "exact_divergence")


def test_a_teacher_that_sends_another_signal_is_named():
    rng = np.random.default_rng(9)
    teachers = {name: tiny(10 + i, hidden) for i, (name, hidden) in enumerate(TEACHERS.items())}
    rollout, scores = next(pair for i in range(20) if not (pair := example(rng, teachers, f"r{i}"))[1].error_class)
    bare = TeacherScores(rollout_id=rollout.rollout_id, teacher_id="big", logprobs=scores.logprobs)
    lone = Example(rollout=rollout, scores={"big": bare})
    sampled, topk, exact = bind_terms([Term(name=name) for name in DISTILLING])
    assert lone.has(sampled)
    for term in (topk, exact):
        with pytest.raises(LearnerError, match="big"):
            lone.has(term)


def test_models_that_change_their_logits_are_refused():
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        PackedStudent(tiny(0, final_logit_softcapping=30.0))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most bytes of any tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made():
    """50,000 ids and 700 tokens would be 140 MB a side; nothing above a chunk of 67 MB may exist, there or back."""
    vocab, tokens, dim = 50_000, 700, 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (tokens + 1,), generator=generator).numpy().astype(np.int32)
    rollout = Rollout(
        rollout_id="r",
        prompt_id="p",
        group_id="g",
        sample_index=0,
        token_ids=ids,
        prompt_length=1,
        text="",
        logprobs=np.zeros(tokens, np.float32),
        loss_mask=np.ones(tokens, bool),
    )
    teacher_hidden = torch.randn(tokens, dim, generator=generator)
    scores = TeacherScores(
        rollout_id="r", teacher_id="t", logprobs=np.zeros(tokens, np.float32), hidden=teacher_hidden.numpy()
    )
    bound = bind_terms((Term(name="exact_divergence"),))
    selection = Selection.of([Example(rollout=rollout, scores={"t": scores})], bound)
    batch = collate(selection, bound, "cpu", lambda example: 1.0)
    heads = {"t": torch.randn(vocab, dim, generator=generator)}
    objective = Objective(bound, batch, {"exact_divergence": tokens}, heads, Correction(), Sums())
    hidden = torch.randn(tokens, dim, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=generator, requires_grad=True)
    with LargestTensor() as seen:
        ChunkedLoss.apply(hidden, weight, objective).backward()
    assert 4 * tokens * vocab > 2 * chunks.CHUNK_BYTES
    print(f"largest tensor {seen.bytes / 2**20:.0f} MiB")
    assert chunks.CHUNK_BYTES / 2 < seen.bytes <= chunks.CHUNK_BYTES
    assert hidden.grad.abs().max() > 0 and weight.grad.abs().max() > 0
