"""How many strategies are in use: soft assignments of steps to codes, and how unlike the answers of a group are."""

from typing import NamedTuple

import numpy as np

from .alignment import unit

TINY = 1e-300


class Usage(NamedTuple):
    """Of the assignments q [S, K] of a batch's steps; nats. Mutual information is high where each step has one strategy
    and the steps have many together."""

    code_usage_entropy: float  # H(mean q)
    conditional_entropy: float  # mean H(q)
    mutual_information: float  # the first less the second
    effective_strategies: float  # e^H(mean q)
    top_code_share: float  # of mean q


def code_assignment(vectors_SD: np.ndarray, codes_KD: np.ndarray, temperature: float = 0.1) -> np.ndarray:
    """p(k | z) [S, K]: the softmax of cos(z, code) / temperature over the codes. A vector of 0 has all alike."""
    logits_SK = unit(vectors_SD) @ unit(codes_KD).T / temperature
    weight_SK = np.exp(logits_SK - logits_SK.max(1, keepdims=True))
    return weight_SK / weight_SK.sum(1, keepdims=True)


def usage(assignment_SK: np.ndarray) -> Usage:
    """Of one step at least."""
    mean_K = assignment_SK.mean(0)
    whole, conditional = float(_entropy(mean_K)), float(_entropy(assignment_SK).mean())
    return Usage(whole, conditional, whole - conditional, float(np.exp(whole)), float(mean_K.max()))


def dpp_logdet(vectors_GD: np.ndarray, ridge: float = 1e-3) -> float:
    """log det(K + ridge·I) of the cosines K [G, G]: low where answers are alike (determinantal point processes)."""
    unit_GD = unit(vectors_GD)
    return float(np.linalg.slogdet(unit_GD @ unit_GD.T + ridge * np.eye(len(unit_GD)))[1])


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, TINY))).sum(-1)
