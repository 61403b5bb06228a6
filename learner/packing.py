"""Who trains which rows of a step: parts for each update, shares of equal weight, micro-batches of bounded size.

The driver plans from lengths alone, so this file imports no torch. Ranks must run equally many micro-batches (each is a
collective); a rank with less to do gets empty ones.
"""

from collections.abc import Sequence

from ..contracts.records import TrainRow

MicroBatches = tuple[tuple[TrainRow, ...], ...]
Lengths = Sequence[tuple[int, TrainRow]]  # tokens of each row to train


def plan_updates(rows: Lengths, ranks: int, tokens_per_batch: int, updates: int = 1) -> list[tuple[MicroBatches, ...]]:
    """Each rank's micro-batches of each update. An update takes each `updates`-th row, so a prompt group is spread."""
    shared = [plan_micro_batches(rows[u::updates], ranks, tokens_per_batch) for u in range(updates)]
    return [tuple(share[rank] for share in shared) for rank in range(ranks)]


def plan_micro_batches(rows: Lengths, ranks: int, tokens_per_batch: int) -> list[MicroBatches]:
    """Each rank's micro-batches.

    Rows go longest first to the lightest rank (LPT: at most 4/3 − 1/(3·ranks) of the best balance). A micro-batch
    exceeds `tokens_per_batch` only where a single row does. Deterministic.
    """
    ordered = sorted(rows, key=lambda item: (-item[0], item[1].batch, item[1].row))
    shares: list[list[tuple[int, TrainRow]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for length, row in ordered:
        rank = loads.index(min(loads))
        shares[rank].append((length, row))
        loads[rank] += length
    plans = [_cut(share, tokens_per_batch) for share in shares]
    most = max(len(plan) for plan in plans)
    return [tuple(plan + [()] * (most - len(plan))) for plan in plans]


def _cut(share: Lengths, tokens_per_batch: int) -> list[tuple[TrainRow, ...]]:
    """Neighbours in length share a micro-batch, which is what packed attention likes."""
    batches: list[list[TrainRow]] = []
    room = 0
    for length, row in share:
        if not batches or length > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(row)
        room -= length
    return [tuple(batch) for batch in batches]
