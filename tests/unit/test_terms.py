"""The loss terms, as training binds them, against the golden numbers."""

import numpy as np
import pytest
import torch
from term_cases import PRECISIONS, apply, chunk_of, close, golden, rows_of, toy

from tutorloop.contracts.records import Correction
from tutorloop.learner.corrections import mismatch, token_weights
from tutorloop.learner.terms.sign_gate import SoftGate
from tutorloop.learner.terms.topk_divergence import coarsened, with_tail

precisions = pytest.mark.parametrize("dtype, tolerance", PRECISIONS)


def tensor(values, dtype):
    return torch.tensor(values, dtype=dtype)


@precisions
def test_nll(dtype, tolerance):
    inputs, expected = golden("sft_nll")
    case = toy(inputs, dtype)
    loss = case.run("nll").loss_C
    close(loss, expected["per_token_nll"], tolerance)
    mask = tensor(inputs["loss_mask"], dtype)
    mean = (loss * mask).sum() / mask.sum()
    close(mean, expected["loss_token_mean"], tolerance)
    close(case.gradient(mean), expected["grad_student_logits"], tolerance)
    inputs, expected = golden("sg_opd_gate")
    cold = toy(inputs["shared_toy"], dtype).run("nll").loss_C.mean()
    close(cold, expected["cold_start_teacher_nll_shared_toy"], tolerance)


@precisions
@pytest.mark.parametrize(
    "direction, name, key", [("reverse", "reverse_kl", "per_token_rkl"), ("forward", "forward_kl", "per_token_fkl")]
)
def test_exact_divergence_with_its_gradient(dtype, tolerance, direction, name, key):
    inputs, expected = golden(name)
    case = toy(inputs, dtype)
    output = case.run("exact_divergence", direction=direction)
    close(output.loss_C, expected[key], tolerance)
    close(output.loss_C.mean(), expected["mean"], tolerance)
    close(output.metrics["reverse_kl"], golden("reverse_kl")[1]["per_token_rkl"], tolerance)
    close(case.gradient(output.loss_C), expected["grad_sum_wrt_student_logits"], tolerance)


@precisions
def test_the_temperature_divides_both_models_logits(dtype, tolerance):
    inputs, expected = golden("forward_kl")
    case, options = toy(inputs, dtype), {"direction": "forward", "temperature": expected["temperature"]}
    close(case.run("exact_divergence", **options).loss_C, expected["per_token_fkl_at_temperature"], tolerance)
    output = case.run("exact_divergence", hinton=True, **options)
    close(output.loss_C, expected["hinton_scaled_tau2"], tolerance)
    close(output.metrics["teacher_entropy"], expected["teacher_entropy"], tolerance)
    plain = case.run("exact_divergence", direction="forward")
    close(plain.loss_C + plain.metrics["teacher_entropy"], expected["cross_entropy_teacher_student"], tolerance)


@precisions
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon(dtype, tolerance, beta):
    inputs, expected = golden("gkd_jsd")
    case, options = toy(inputs, dtype), {"direction": "jsd", "beta": beta}
    output = case.run("exact_divergence", **options)
    close(output.loss_C, expected[f"beta_{beta}"], tolerance)
    cooled = case.run("exact_divergence", temperature=0.9, **options)
    close(cooled.loss_C, expected[f"beta_{beta}_temp0.9"], tolerance)
    if beta == 0.5:
        close(case.gradient(output.loss_C), expected["grad_beta0_5_sum_wrt_student_logits"], tolerance)
    if beta in (0.0, 1.0):
        special = case.run("exact_divergence", direction="reverse" if beta else "forward")
        assert output.loss_C.equal(special.loss_C)


@precisions
def test_on_policy_distillation(dtype, tolerance):
    """The form that recomputes d, weighed by the corrections; and the blog's, with an importance-sampled advantage."""
    inputs, expected = golden("opd_thinking_machines")
    case, behaviour = toy(inputs, dtype), tensor(inputs["sampling_logprobs"], dtype)
    current = case.chunk().sampled_C.detach()
    output = case.run("policy_gradient")
    advantage = expected["advantages_recomputed_current_policy"]
    close(-output.metrics["reverse_kl"], advantage, tolerance)
    close(output.metrics["advantage_abs"], np.abs(advantage), tolerance)
    weights = token_weights(current, behaviour, Correction(kind="truncated", high=2.0))
    close(weights, expected["tis2_weight"], tolerance)
    close((weights * output.loss_C).mean(), expected["recomputed_tis2_loss_token_mean"], tolerance)
    close(mismatch(current, behaviour)[0], expected["stale_bias_term"], tolerance)
    given = rows_of(current, old=behaviour, advantage=expected["advantages_gamma0"])
    published = apply("clipped_policy_gradient", case.chunk(), given, {"clip": False})
    close(published.loss_C.sum(), expected["importance_sampling_loss_sum"], tolerance)
    close(published.metrics["ratio"], expected["ratio"], tolerance)
    close(case.gradient(published.loss_C), expected["grad_wrt_student_logits"], tolerance)


@precisions
def test_estimators_of_the_reverse_kl(dtype, tolerance):
    inputs, expected = golden("reverse_kl")
    case = toy(inputs, dtype)
    metrics = case.run("policy_gradient").metrics
    close(metrics["reverse_kl"], expected["k1"], tolerance)
    close(-metrics["reverse_kl"], expected["advantage_neg_k1"], tolerance)
    close(metrics["reverse_kl_k3"], expected["k3"], tolerance)
    close(-case.run("nll").loss_C, expected["student_logp_sampled"], tolerance)


@precisions
@pytest.mark.parametrize("owner", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_topk_divergence(dtype, tolerance, owner, k):
    inputs, expected = golden("topk_reverse_kl")
    case = toy(inputs, dtype, support=expected[f"{owner}_top{k}_idx"])
    for direction, short in (("reverse", "rkl"), ("forward", "fkl")):
        output = case.run("topk_divergence", direction=direction)
        close(output.loss_C, expected[f"{owner}_top{k}_tail_{short}"], tolerance)
        close(output.metrics["topk_reverse_kl"], expected[f"{owner}_top{k}_tail_rkl"], tolerance)
        if k == 4:
            close(output.loss_C, expected[f"full_{short}"], tolerance)
    renormalised = case.run("topk_divergence", rest="renormalise")
    close(renormalised.loss_C, expected[f"{owner}_top{k}_renorm_rkl"], tolerance)
    close(renormalised.metrics["topk_reverse_kl"], expected[f"{owner}_top{k}_tail_rkl"], tolerance)
    for who in ("student", "teacher"):
        close(renormalised.metrics[f"{who}_mass"], expected[f"{owner}_top{k}_{who}_mass"], tolerance)


@precisions
def test_eopd_is_a_reverse_term_and_a_gated_forward_one(dtype, tolerance):
    inputs, expected = golden("eopd")
    case = toy(inputs, dtype)
    reverse = case.run("exact_divergence")
    forward = case.run("exact_divergence", direction="forward", teacher_entropy_above=inputs["tau"])
    close(reverse.loss_C + inputs["coef"] * forward.loss_C, expected["per_token_loss_fullvocab"], tolerance)
    close(forward.metrics["gate_share"], expected["gate"], 0)
    close(forward.metrics["teacher_entropy"], expected["teacher_entropy"], tolerance)
    whole = toy(inputs, dtype, support=[[0, 1, 2]] * 3)  # K = V − 1: with its tail, the whole vocabulary
    topk = whole.run("topk_divergence", direction="forward", teacher_entropy_above=inputs["tau"])
    close(reverse.loss_C + topk.loss_C, expected["per_token_loss_fullvocab"], tolerance)
    close(topk.metrics["gate_share"], expected["gate"], 0)


@precisions
@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 1.0, 1.25, 1.8])
def test_extrapolated_distillation(dtype, tolerance, extrapolation):
    inputs, expected = golden("gopd_exopd")
    case = toy(inputs, dtype)
    output = case.run("policy_gradient", extrapolation=extrapolation)
    advantage = expected[f"advantage_lambda_{extrapolation}"]
    close(output.metrics["advantage_abs"], np.abs(advantage), tolerance)
    close(-output.loss_C / case.chunk().sampled_C, advantage, tolerance)


GATES = {"paper_1.8_1.0": (1.8, 1.0), "damped_1.8_0.5": (1.8, 0.5), "opdvr_1.0_0.0": (1.0, 0.0)}


def gated(dtype, mode, **options):
    """Golden d and Δref as rows; returns A [2, 4] and the metrics."""
    inputs, _ = golden("sg_opd_gate")
    d, delta = (tensor(inputs[name], dtype) for name in ("d", "delta_ref"))
    sign = tensor(inputs["verifier_sign"], dtype).expand_as(d)
    current = torch.full_like(d, -2.0).flatten()  # a power of two: the loss over it is A, exactly
    teacher = current + d.flatten()
    rows = rows_of(current, teacher=teacher, reference=teacher - delta.flatten(), advantage=sign.flatten())
    output = apply("sign_gate", chunk_of(current), rows, {"mode": mode, **options})
    return (-output.loss_C / current).reshape(d.shape), output.metrics


@precisions
@pytest.mark.parametrize("mode", ["live_ref", "frozen_ref"])
@pytest.mark.parametrize("name", GATES)
def test_sign_gate(dtype, tolerance, mode, name):
    agree, conflict = GATES[name]
    _, expected = golden("sg_opd_gate")
    advantage, metrics = gated(dtype, mode, agree=agree, conflict=conflict, guard=False)
    close(advantage, expected[f"{name}_{mode}_advantage"], tolerance)
    assert metrics["gate_agree"].mean().item() == expected["gate_agree_rate"]
    assert metrics["gate_conflict"].mean().item() == expected["gate_conflict_rate"]
    assert metrics["gate_neutral"].mean().item() == 1 - expected["gate_agree_rate"] - expected["gate_conflict_rate"]
    assert not metrics["gate_guard"].any()


@precisions
def test_soft_gate(dtype, tolerance):
    inputs, expected = golden("sg_opd_gate")
    for d, sign, advantage in zip(inputs["d"], inputs["verifier_sign"], expected["r2opd_beta1_advantage"], strict=True):
        gap, current = tensor(d, dtype), torch.full((len(d),), -2.0, dtype=dtype)
        gate = SoftGate(sharpness=1.0).gate(gap.numpy(), sign[0]).factors
        rows = rows_of(current, teacher=current + gap, gate=torch.from_numpy(gate))
        output = apply("soft_gate", chunk_of(current), rows, {"sharpness": 1.0})
        close(-output.loss_C / current, advantage, tolerance)


@precisions
def test_self_distillation_with_a_solution(dtype, tolerance):
    inputs, expected = golden("opsd")
    case = toy(inputs, dtype)  # the support is the teacher's best two
    jsd = {"direction": "jsd", "beta": 0.5}
    close(case.run("exact_divergence", **jsd).loss_C, expected["jsd_beta0_5_full"], tolerance)
    close(case.run("exact_divergence", temperature=1.1, **jsd).loss_C, expected["temp1_1_jsd"], tolerance)
    top = case.run("topk_divergence", rest="renormalise", **jsd)
    close(top.loss_C, expected["jsd_beta0_5_teacher_top2"], tolerance)
    clipped = case.run("exact_divergence", direction="forward", entry_clip=0.05)
    close(clipped.loss_C, expected["fkl_clipped_per_token"], tolerance)
    entries = torch.tensor(expected["fkl_pointwise"], dtype=torch.float64)
    close(entries.clamp(max=0.05).sum(1), clipped.loss_C, tolerance)


@precisions
def test_self_distillation_from_a_peer(dtype, tolerance):
    inputs, expected = golden("sdpo")
    case = toy(inputs, dtype, support=expected["topk_idx"])
    chunk = case.chunk()
    close(coarsened(chunk.logprobs_CV, case.rows.topk_ids_CK), expected["student_with_tail"], tolerance)
    close(with_tail(case.rows.topk_logprobs_CK), expected["teacher_with_tail"], tolerance)
    loss = case.run("topk_divergence", direction="jsd", beta=inputs["alpha"]).loss_C
    close(loss, expected["per_token_jsd"], tolerance)
    correction = Correction(kind="truncated", high=inputs["is_clip"])
    weights = token_weights(chunk.sampled_C, tensor(inputs["old_logp"], dtype), correction)
    close(weights, expected["is_weight"], tolerance)
    close(weights * loss, expected["per_token_loss"], tolerance)
    for alpha, key in ((1.0, "rkl_alpha1"), (0.0, "fkl_alpha0")):
        close(case.run("topk_divergence", direction="jsd", beta=alpha).loss_C, expected[key], tolerance)


@precisions
def test_clipped_policy_gradient(dtype, tolerance):
    inputs, expected = golden("grpo")
    options = {"clip_low": inputs["eps_low"], "clip_high": inputs["eps_high"], "dual_clip": inputs["dual_clip_c"]}
    losses = []
    for i, advantage in enumerate(inputs["advantages_for_clip"]):
        new, old = (tensor(inputs[name][i], dtype) for name in ("new_logp", "old_logp"))
        output = apply("clipped_policy_gradient", chunk_of(new), rows_of(new, old=old, advantage=advantage), options)
        close(output.loss_C, expected["token_loss"][i], tolerance)
        close(output.metrics["ratio"], expected["ratios"][i], tolerance)
        losses.append(output.loss_C)
    close(torch.cat(losses).mean(), expected["loss_token_mean"], tolerance)
    close(torch.stack([x.mean() for x in losses]).mean(), expected["loss_seq_mean_token_mean"], tolerance)
    close(torch.stack([x.sum() for x in losses]).mean(), expected["loss_seq_mean_token_sum"], tolerance)
    close(torch.cat(losses).sum() / (4 * len(losses)), expected["loss_dr_grpo_const_norm_Lmax4"], tolerance)


@precisions
def test_the_leash_to_the_reference(dtype, tolerance):
    _, expected = golden("grpo")
    current = tensor([-1.0], dtype)
    output = apply("reference_kl", chunk_of(current), rows_of(current, reference=-0.7))
    close(output.loss_C, expected["kl_k3_to_ref"], tolerance)
    close(output.metrics["reference_kl"], -0.3, tolerance)


@precisions
def test_diagnostics(dtype, tolerance):
    inputs, expected = golden("diagnostics")
    case = toy(inputs, dtype)
    metrics = case.run("exact_divergence", direction="forward").metrics
    close(metrics["top1_agreement"].mean(), expected["top1_agreement"], tolerance)
    close(1 - metrics["total_variation"], expected["accept_prob_min_pt_ps"], tolerance)
    close(metrics["reverse_kl"], expected["rkl"], tolerance)
    for name in ("teacher_entropy", "entropy_gap", "teacher_prob_of_student_argmax", "total_variation"):
        close(metrics[name], expected[name], tolerance)
    for options, key in (({"direction": "forward"}, "fkl"), ({"direction": "jsd"}, "jsd")):
        close(case.run("exact_divergence", **options).loss_C, expected[key], tolerance)
    shares = {"gate_agree": 0.0, "gate_conflict": 0.0, "gate_neutral": 0.0}
    count = 0
    for d, sign, mask in zip(inputs["d"], inputs["verifier_sign"], inputs["mask"], strict=True):
        current = torch.zeros(sum(map(int, mask)), dtype=dtype)
        rows = rows_of(current, teacher=d[: len(current)], advantage=sign[0])
        output = apply("sign_gate", chunk_of(current), rows)
        shares = {name: share + output.metrics[name].sum() for name, share in shares.items()}
        count += len(current)
    keys = {"agree": "sign_consistent_rate", "conflict": "sign_conflict_rate", "neutral": "neutral_rate"}
    for name, key in keys.items():
        close(shares[f"gate_{name}"] / count, expected[key], tolerance)
