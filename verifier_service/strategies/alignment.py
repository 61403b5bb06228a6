"""How one solution follows another: a student's steps against the strategy vectors of a teacher's steps.

"free" is in any order: entropic optimal transport with uniform marginals (Cuturi 2013). "ordered" is in the teacher's:
soft-DTW with its expected alignment (Cuturi & Blondel 2017). Both give the alignment exp(−distance/τ) and the credit of
each step. What else a step is worth is what it newly covers, as potential shaping (Ng et al. 1999). Composed by us.

B pairs of solutions, N steps of the student's and M of the teacher's, D numbers a vector, R tokens of the response.
Pairs of different sizes are padded: `rows_B` and `columns_B` say how many of a pair's steps are real.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ...contracts.errors import RecordError

BLOCK = 64  # pairs at a time: what is computed of them stays in the processor's cache
MARGINAL_ERROR = 1e-12  # of a plan's columns, in sum; its rows are exact
MOST_ITERATIONS = 500
TRUSTED = 1.0  # the farthest that a potential moves in one iteration, in units of ε
RIDGE = 1e-14  # mass; where less goes between two sets of columns they count as apart
TINY = 1e-150
FAR = 1e30  # cost of a cell outside
FEWEST_STEPS = 3  # of either side: a solution of fewer is aligned with anything, and is neutral

Order = Literal["free", "ordered"]


class PairAlignment(NamedTuple):
    """Of one pair: `plan` [N, M] is what is transported (sum 1) or, ordered, the expected alignment (a row's sum ≥ 1);
    `credit` [N] is 1 − the mean cost of what each step is aligned with."""

    alignment: float  # exp(−distance/τ)
    distance: float  # cost of what is transported; ordered, of the hard path, divided by max(N, M)
    plan: np.ndarray
    credit: np.ndarray


def align(
    students: Sequence[np.ndarray],
    teachers: Sequence[np.ndarray],
    *,
    order: Order = "free",
    eta: float = 0.1,
    epsilon: float = 0.05,
    gamma: float = 0.1,
    tau: float = 0.25,
) -> list[PairAlignment]:
    """Of each pair students[b] [N, D] and teachers[b] [M, D]. `eta` and `epsilon` are of "free", `gamma` of "ordered".

    Raises RecordError where a solution has no step.
    """
    if not all(map(len, [*students, *teachers])):
        raise RecordError("every solution has a step", "one without", "leave it out: it follows nothing")
    found: dict[int, PairAlignment] = {}
    for block in _blocks(students, teachers):
        rows_B, columns_B = (np.array([len(own[i]) for i in block]) for own in (students, teachers))
        student_BND, teacher_BMD = (unit(_padded([own[i] for i in block])) for own in (students, teachers))
        cost_BNM = _apart(student_BND @ teacher_BMD.transpose(0, 2, 1))
        if order == "free":
            cost_BNM += eta * np.abs(_positions(rows_B)[:, :, None] - _positions(columns_B)[:, None])
            plan_BNM = sinkhorn(cost_BNM, rows_B, columns_B, epsilon)
            distance_B = np.einsum("bnm,bnm->b", plan_BNM, cost_BNM)
        else:
            _, plan_BNM, hard_B = soft_dtw(cost_BNM, rows_B, columns_B, gamma)
            distance_B = hard_B / np.maximum(rows_B, columns_B)
        credit_BN = 1 - np.einsum("bnm,bnm->bn", plan_BNM, cost_BNM) / np.maximum(plan_BNM.sum(2), TINY)
        aligned = np.exp(-distance_B / tau).tolist(), distance_B.tolist(), rows_B.tolist(), columns_B.tolist()
        for b, (i, alignment, distance, n, m) in enumerate(zip(block, *aligned, strict=True)):
            found[i] = PairAlignment(alignment, distance, plan_BNM[b, :n, :m].copy(), credit_BN[b, :n].copy())
    return [found[i] for i in range(len(students))]


class Best(NamedTuple):
    """The solution that a rollout follows best: its number among its problem's, and the alignment with it."""

    solution: int
    found: PairAlignment


def best_of(cases: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], order: Order) -> list[Best | None]:
    """Of each rollout's vectors [N, D] and its problem's solutions [M, D] the best alignment, the first of equals; None
    where it is neutral: no solution, or fewer than FEWEST_STEPS steps on either side."""
    pairs = [
        (row, number, own, taught)
        for row, (own, solutions) in enumerate(cases)
        for number, taught in enumerate(solutions)
        if min(len(own), len(taught)) >= FEWEST_STEPS
    ]
    aligned = align([own for _, _, own, _ in pairs], [taught for *_, taught in pairs], order=order)
    best: list[Best | None] = [None] * len(cases)
    for (row, number, _, _), found in zip(pairs, aligned, strict=True):
        known = best[row]
        if known is None or found.alignment > known.found.alignment:
            best[row] = Best(number, found)
    return best


def step_cost(student_ND: np.ndarray, teacher_MD: np.ndarray, eta: float = 0.1) -> np.ndarray:
    """[N, M]: (1 − cos)/2 + η·|how far into their solutions the two steps' middles are|; vectors of 0 have cosine 0."""
    positions = (_positions(np.array([len(own)]))[0] for own in (student_ND, teacher_MD))
    return _apart(unit(student_ND) @ unit(teacher_MD).T) + eta * np.abs(np.subtract.outer(*positions))


def _blocks(students: Sequence[np.ndarray], teachers: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Pairs of similar sizes."""
    sizes = [(len(student), len(teacher)) for student, teacher in zip(students, teachers, strict=True)]
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    return (by_size[at : at + BLOCK] for at in range(0, len(by_size), BLOCK))


def _positions(sizes_B: np.ndarray) -> np.ndarray:
    return (np.arange(sizes_B.max()) + 0.5) / sizes_B[:, None]


def unit(vectors: np.ndarray) -> np.ndarray:
    """[…, D] of float64: each vector divided by its length, or 0 where it has none."""
    vectors = vectors.astype(np.float64)
    length = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    return vectors * np.divide(1, length, out=np.zeros_like(length), where=length > TINY)


def _padded(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """[B, N, D] with 0 behind each solution's steps."""
    padded_BND = np.zeros((len(vectors), max(map(len, vectors)), vectors[0].shape[1]))
    for b, own in enumerate(vectors):
        padded_BND[b, : len(own)] = own
    return padded_BND


def _apart(cosine: np.ndarray) -> np.ndarray:
    return np.maximum(1 - cosine, 0) / 2  # rounding may leave a cosine above 1


# ---- in any order ------------------------------------------------------------------------------------------------


def sinkhorn(cost_BNM: np.ndarray, rows_B: np.ndarray, columns_B: np.ndarray, epsilon: float) -> np.ndarray:
    """Plans [B, N, M] of least ⟨P, C⟩ − ε·entropy(P) whose rows have sum 1/N and whose columns 1/M.

    In the log domain. Rows are scaled as ever. Columns take Newton steps, as far as these can be trusted (Brauer,
    Clason, Lorenz & Wirth 2017, 1710.06635; Cohen, Madry, Tsipras & Vladu 2017, 1704.02310): scaled as well, a student
    that follows closely takes thousands of iterations. A pair whose error is below MARGINAL_ERROR is left alone.
    """
    B, N, M = cost_BNM.shape
    plan_BNM = np.zeros_like(cost_BNM)
    real_BM = np.arange(M) < columns_B[:, None]
    share_BN = (np.arange(N) < rows_B[:, None]) / rows_B[:, None]
    target_BM = real_BM / columns_B[:, None]
    scaled_BNM = np.where(real_BM[:, None], cost_BNM / epsilon, np.inf)
    row_BN, column_BM = scaled_BNM.min(2), np.zeros((B, M))  # potentials, in units of ε
    left_B = np.arange(B)
    for iteration in range(1, MOST_ITERATIONS + 1):
        kernel_BNM = np.exp(row_BN[:, :, None] + column_BM[:, None] - scaled_BNM)
        sum_BN = kernel_BNM.sum(2)
        row_BN = row_BN - np.log(sum_BN)
        kernel_BNM /= sum_BN[:, :, None]
        own_BNM = kernel_BNM * share_BN[:, :, None]
        filled_BM = own_BNM.sum(1)
        on_B = (np.abs(target_BM - filled_BM).sum(1) > MARGINAL_ERROR) & (iteration < MOST_ITERATIONS)
        if not on_B.all():
            plan_BNM[left_B[~on_B]] = own_BNM[~on_B]
            if not on_B.any():
                break
            left_B = left_B[on_B]
            state = (kernel_BNM, own_BNM, filled_BM, scaled_BNM, share_BN, target_BM, row_BN, column_BM)
            kernel_BNM, own_BNM, filled_BM, scaled_BNM, share_BN, target_BM, row_BN, column_BM = (
                values[on_B] for values in state
            )
        column_BM = column_BM + _newton_step(kernel_BNM, own_BNM, target_BM - filled_BM)
    return plan_BNM


def _newton_step(kernel_BNM: np.ndarray, own_BNM: np.ndarray, short_BM: np.ndarray) -> np.ndarray:
    """What the columns' potentials are to change [B, M], where `short_BM` is missing in their sums.

    The Hessian is the Laplacian of a graph of the columns, so its diagonal is added up and not subtracted, which keeps
    small links exact; the first column, whose potential is free, is left out of it.
    """
    laplacian_BMM = -(own_BNM.transpose(0, 2, 1) @ kernel_BNM)
    diagonal = np.arange(short_BM.shape[1])
    laplacian_BMM[:, diagonal, diagonal] = 0
    laplacian_BMM[:, diagonal, diagonal] = RIDGE - laplacian_BMM.sum(2)
    change_BM = np.zeros_like(short_BM)
    change_BM[:, 1:] = np.linalg.solve(laplacian_BMM[:, 1:, 1:], short_BM[:, 1:, None])[:, :, 0]
    change_BM -= (change_BM.max(1, keepdims=True) + change_BM.min(1, keepdims=True)) / 2
    return change_BM * np.minimum(1, TRUSTED / np.maximum(np.abs(change_BM).max(1, keepdims=True), TINY))


# ---- in the teacher's order --------------------------------------------------------------------------------------


def soft_dtw(
    cost_BNM: np.ndarray, rows_B: np.ndarray, columns_B: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Soft-DTW's value [B], its expected alignment [B, N, M] (the value's gradient), and the cost of the hard path [B].

    Cells of one diagonal are computed at once, for all pairs: cell (i, j) is on diagonal k = i + j, and its three
    predecessors are (i−1, j), (i, j−1) on the one before and (i−1, j−1) on the one before that. Arrays have two
    diagonals and one row outside in front, or behind in the backward recursion.
    """
    B, N, M = cost_BNM.shape
    K = N + M - 1
    i_KN, j_KN = np.broadcast_arrays(np.arange(N), np.arange(K)[:, None] - np.arange(N))
    inside_KN = (j_KN >= 0) & (j_KN < M)
    skewed_KNB = np.full((K, N, B), FAR)
    skewed_KNB[inside_KN] = cost_BNM.transpose(1, 2, 0)[i_KN[inside_KN], j_KN[inside_KN]]
    soft, hard = (np.full((K + 2, N + 1, B), FAR) for _ in range(2))
    soft[0, 0] = hard[0, 0] = 0
    chance = np.zeros((K + 2, 3, N + 1, B))  # of each predecessor, on a path through the cell
    for k in range(K):
        before = np.stack([soft[k + 1, :-1], soft[k + 1, 1:], soft[k, :-1]])
        least = before.min(0)
        weight = np.exp((least - before) / gamma)
        total = weight.sum(0)
        chance[k, :, :-1] = weight / total
        soft[k + 2, 1:] = skewed_KNB[k] + (least - gamma * np.log(total))
        hard[k + 2, 1:] = skewed_KNB[k] + np.minimum(np.minimum(hard[k + 1, :-1], hard[k + 1, 1:]), hard[k, :-1])
    pair, last = np.arange(B), rows_B + columns_B
    expected = np.zeros((K + 2, N + 1, B))
    expected[last - 2, rows_B - 1, pair] = 1
    for k in range(K - 1, -1, -1):
        down, right = expected[k + 1, 1:] * chance[k + 1, 0, 1:], expected[k + 1, :-1] * chance[k + 1, 1, :-1]
        expected[k, :-1] += down + right + expected[k + 2, 1:] * chance[k + 2, 2, 1:]
    i_NM, j_NM = np.indices((N, M))
    return soft[last, rows_B, pair], expected[i_NM + j_NM, i_NM].transpose(2, 0, 1), hard[last, rows_B, pair]


# ---- what a step is worth besides --------------------------------------------------------------------------------


def coverage(student_ND: np.ndarray, teacher_MD: np.ndarray, kappa: float = 0.3) -> np.ndarray:
    """Potentials Φ [N + 1]: how much of the strategy the first i steps cover, from 0 to 1.

    Φ_i is the mean over the teacher's steps of the best max(0, cos − κ) / (1 − κ) so far. Φ_0 = 0.
    """
    cosine_NM = unit(student_ND) @ unit(teacher_MD).T
    reached_NM = np.maximum.accumulate(np.maximum(cosine_NM - kappa, 0), axis=0)
    return np.concatenate([[0.0], reached_NM.mean(1) / (1 - kappa)])


def shaping(potentials: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """F_i = γ·Φ_i − Φ_{i−1} [N] (Ng et al. 1999), where the last potential counts as 0.

    At γ = 1 they sum to −Φ_0 = 0, so that shaping moves credit between steps and adds none.
    """
    ahead = np.concatenate([potentials[1:-1], [0.0]])
    return gamma * ahead - potentials[:-1]


def diversity(means_GD: np.ndarray) -> np.ndarray:
    """[G]: 1 − the mean cosine of each answer's vector to the others'; 0 of a single one."""
    unit_GD = unit(means_GD)
    cosine_GG = unit_GD @ unit_GD.T
    np.fill_diagonal(cosine_GG, 0)
    return 1 - cosine_GG.sum(1) / (len(means_GD) - 1) if len(means_GD) > 1 else np.zeros(1)


def token_credit(
    spans: Sequence[tuple[int, int]],
    tokens: int,
    credit_N: np.ndarray,
    shaping_N: np.ndarray,
    *,
    beta: float = 0.2,
    shaping_weight: float = 1.0,
) -> np.ndarray:
    """float32 [R]: β·(c_i − mean c) on each token of step i, and F_i spread evenly over them; 0 outside all spans."""
    begins_N, ends_N = np.asarray(spans, np.int64).reshape(-1, 2).T
    lengths_N = ends_N - begins_N
    value_N = beta * (credit_N - credit_N.mean()) + shaping_weight * shaping_N / lengths_N
    credit_R = np.zeros(tokens, np.float32)
    for begin, end, value in zip(begins_N.tolist(), ends_N.tolist(), value_N.tolist(), strict=True):
        credit_R[begin:end] = value
    return credit_R
