"""Off-policy corrections against the golden numbers and against plain loops over fresh random rollouts.

The golden file's V-trace numbers have no test: V-trace needs a critic, and no method has one. Its staleness numbers
belong to the driver.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from term_cases import apply, chunk_of, close, rows_of

from tutorloop.contracts.records import Correction
from tutorloop.learner.corrections import (
    current_share,
    effective_share,
    mismatch,
    needs_rollout,
    token_weights,
    weigh,
)

CASE = json.loads((Path(__file__).parents[1] / "golden" / "offpolicy_corrections.json").read_text())
INPUTS, EXPECTED = CASE["inputs"], CASE["expected"]
PRECISIONS = [(torch.float64, CASE["tol"]), (torch.float32, 1e-5)]
LENGTHS = [sum(map(int, row)) for row in INPUTS["mask"]]


def ragged(name, dtype, source=INPUTS):
    """The rows of a golden matrix, each without the tokens that its loss mask leaves out."""
    rows = zip(source[name], LENGTHS, strict=True)
    return [torch.tensor(row[:length], dtype=dtype) for row, length in rows]


def golden_rollouts(dtype):
    return list(zip(ragged("train_old_logp", dtype), ragged("rollout_logp", dtype), strict=True))


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_truncated_weights_match_golden(dtype, tolerance):
    token = Correction(kind="truncated", high=2.0)
    sequence = Correction(kind="truncated", high=2.0, level="sequence")
    assert not needs_rollout(token) and needs_rollout(sequence)
    for i, (old, mu) in enumerate(golden_rollouts(dtype)):
        expected = ragged("tis_token", dtype, EXPECTED)[i].double()
        for weights in (weigh(old, mu, token)[0], token_weights(old, mu, token)):
            close(weights, expected, tolerance)
        weights, keep = weigh(old, mu, sequence)
        close(weights, EXPECTED["tis_sequence"][i], tolerance)
        assert keep.all()


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("band, key", [("icepop_band", "icepop_mask"), ("mis_band", "mis_mask")])
def test_token_masks_match_golden(dtype, tolerance, band, key):
    low, high = INPUTS[band]
    correction = Correction(kind="masked", low=low, high=high)
    for i, (old, mu) in enumerate(golden_rollouts(dtype)):
        weights, keep = weigh(old, mu, correction)
        expected = ragged(key, dtype, EXPECTED)[i].double()
        assert keep.double().tolist() == expected.tolist()
        close(weights, expected * ragged("rho", dtype, EXPECTED)[i].double(), tolerance)


@pytest.mark.parametrize("level, key", [("sequence", "seq_ratio"), ("geometric", "geometric_ratio")])
def test_masks_of_whole_rollouts_decide_at_the_golden_ratio(level, key):
    for i, (old, mu) in enumerate(golden_rollouts(torch.float64)):
        ratio = EXPECTED[key][i]
        for low, high, kept in (
            (ratio - 1e-9, ratio + 1e-9, True),
            (ratio + 1e-9, ratio + 1, False),
            (0.0, ratio - 1e-9, False),
        ):
            weights, keep = weigh(old, mu, Correction(kind="masked", low=low, high=high, level=level))
            assert keep.tolist() == [kept] * len(old)
            close(weights, (ratio if level == "sequence" else 1.0) if kept else 0.0, 1e-9)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_normalised_weights_and_effective_share_match_golden(dtype, tolerance):
    correction = Correction(kind="truncated", high=2.0, normalise=True)
    assert needs_rollout(correction)
    weights = torch.cat([weigh(old, mu, correction)[0] for old, mu in golden_rollouts(dtype)])
    close(weights / weights.mean(), torch.cat(ragged("batch_normalised_tis", torch.float64, EXPECTED)), tolerance)
    share = effective_share(weights.mean().item(), weights.square().mean().item())
    assert math.isclose(share, EXPECTED["ess_token"], abs_tol=tolerance)
    assert effective_share(0.0, 0.0) == 0.0


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_mismatch_matches_golden(dtype, tolerance):
    k1, k3 = (torch.cat(parts) for parts in zip(*(mismatch(o, m) for o, m in golden_rollouts(dtype)), strict=True))
    close(k1.mean(), EXPECTED["mismatch_kl_rollout_train_k1"], tolerance)
    close(k3.mean(), EXPECTED["mismatch_kl_k3"], tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_the_interpolated_proximal_policy_matches_golden(dtype, tolerance):
    mu, current = (torch.tensor(INPUTS[name], dtype=dtype) for name in ("rollout_logp", "current_logp"))
    share = current_share("interpolate", *INPUTS["versions_behave_prox_current"])
    assert math.isclose(share, EXPECTED["prox_alpha"], abs_tol=CASE["tol"])
    close(torch.lerp(mu, current, share), EXPECTED["prox_logp_loglinear"], tolerance)


def test_the_proximal_policy_stays_between_the_sampler_and_the_current_one():
    assert current_share("recompute", 1, 3, 4) == 1 and current_share("behaviour", 1, 3, 4) == 0
    assert current_share("interpolate", 3, 2, 4) == 0 and current_share("interpolate", 3, 4, 4) == 1
    assert current_share("interpolate", 4, 3, 4) == 1  # as new as the weights


def slow_weigh(old, mu, correction):
    """One token after the other, from the definition."""
    ratios = [math.exp(o - m) for o, m in zip(old, mu, strict=True)]
    product = math.prod(ratios)
    level = {"sequence": product, "geometric": product ** (1 / len(ratios))}
    weights, keep = [], []
    for o, m, ratio in zip(old, mu, ratios, strict=True):
        used = level.get(correction.level, ratio)
        weight, kept = 1.0, True
        if correction.kind == "truncated":
            weight = min(used, correction.high)
        elif correction.kind == "masked":
            kept = correction.low <= used <= correction.high
            weight = used if correction.level != "geometric" else 1.0
        if correction.veto and min(ratios) < correction.veto:
            kept = False
        if correction.probability_gap and abs(math.exp(o) - math.exp(m)) > correction.probability_gap:
            kept = False
        weights.append(weight if kept else 0.0)
        keep.append(kept)
    return weights, keep


@pytest.mark.parametrize(
    "kind, level",
    [
        ("none", "token"),
        ("truncated", "token"),
        ("truncated", "sequence"),
        ("masked", "token"),
        ("masked", "sequence"),
        ("masked", "geometric"),
    ],
)
@pytest.mark.parametrize("veto, gap", [(0.0, 0.0), (0.6, 0.0), (0.0, 0.1), (0.5, 0.2)])
def test_weights_match_a_loop(kind, level, veto, gap):
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    correction = Correction(kind=kind, level=level, veto=veto, probability_gap=gap, low=0.8, high=1.3)
    rejected = 0
    for length in rng.integers(1, 12, 40):
        mu = -rng.exponential(1.0, length)
        old = np.minimum(mu + rng.normal(size=length) * 0.5, 0.0)
        weights, keep = weigh(torch.from_numpy(old), torch.from_numpy(mu), correction)
        expected, expected_keep = slow_weigh(old, mu, correction)
        assert keep.tolist() == expected_keep
        close(weights, expected, 1e-12)
        rejected += (~keep).sum().item()
        if not needs_rollout(correction):
            assert keep.all()
            close(token_weights(torch.from_numpy(old), torch.from_numpy(mu), correction), expected, 1e-12)
    assert (rejected > 0) == (kind == "masked" or veto > 0 or gap > 0)


def test_weights_stay_finite_and_detached_in_long_rollouts():
    mu = torch.full((4000,), -9.0)
    old = torch.full((4000,), -1.0, requires_grad=True)
    for kind in ("truncated", "masked"):
        for level in ("token", "sequence", "geometric"):
            weights, _ = weigh(old, mu, Correction(kind=kind, level=level))
            assert torch.isfinite(weights).all() and not weights.requires_grad
    weights, keep = weigh(torch.zeros(0), torch.zeros(0), Correction(kind="masked", level="geometric", veto=0.1))
    assert weights.shape == keep.shape == (0,)


def clipped(current, old, advantage):
    options = {"clip_low": INPUTS["eps_low"], "clip_high": INPUTS["eps_high"]}
    return apply("clipped_policy_gradient", chunk_of(current), rows_of(current, old=old, advantage=advantage), options)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_corrected_losses_match_golden(dtype, tolerance):
    """Decoupled (π_θ/π_old clipped, weighted by ρ), coupled (π_old := μ), and masked over what is kept or over all."""
    truncated = Correction(kind="truncated", high=INPUTS["C"])
    masked = Correction(kind="masked", low=INPUTS["icepop_band"][0], high=INPUTS["icepop_band"][1])
    current, tokens = ragged("current_logp", dtype), sum(LENGTHS)
    totals = {"decoupled": 0.0, "coupled": 0.0, "masked": 0.0, "kept": 0}
    for i, (old, mu) in enumerate(golden_rollouts(dtype)):
        advantage = INPUTS["advantage"][i][0]
        output = clipped(current[i], old, advantage)
        close(output.metrics["ratio"], ragged("ppo_ratio", torch.float64, EXPECTED)[i], tolerance)
        totals["decoupled"] += (weigh(old, mu, truncated)[0] * output.loss_C).sum()
        totals["coupled"] += clipped(current[i], mu, advantage).loss_C.sum()
        weights, keep = weigh(old, mu, masked)
        totals["masked"] += (weights * output.loss_C).sum()
        totals["kept"] += keep.sum()
    close(totals["decoupled"] / tokens, EXPECTED["decoupled_ppo_tis_loss"], tolerance)
    close(totals["coupled"] / tokens, EXPECTED["coupled_ppo_loss"], tolerance)
    close(totals["masked"] / totals["kept"], EXPECTED["icepop_loss_kept_denominator"], tolerance)
    close(totals["masked"] / tokens, EXPECTED["icepop_loss_all_token_denominator"], tolerance)
