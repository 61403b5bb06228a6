"""Who trains which rows of a step: shares of equal weight, cut into micro-batches of bounded size.

The driver plans from lengths alone, so this file imports no torch. Ranks must run equally many micro-batches (each is a
collective); a rank with less to do gets empty ones.
"""

from collections.abc import Sequence

Row = tuple[int, int]  # (rollout batch, row)
MicroBatches = tuple[tuple[Row, ...], ...]


def plan_micro_batches(lengths: Sequence[Sequence[int]], ranks: int, tokens_per_batch: int) -> list[MicroBatches]:
    """Each rank's micro-batches. `lengths[b][r]`: tokens of row r of rollout batch b; 0 leaves the row out.

    Rows go longest first to the lightest rank (LPT: at most 4/3 − 1/(3·ranks) of the best balance). A micro-batch
    exceeds `tokens_per_batch` only where a single row does. Deterministic.
    """
    rows = [(length, (b, r)) for b, batch in enumerate(lengths) for r, length in enumerate(batch) if length > 0]
    rows.sort(key=lambda item: (-item[0], item[1]))
    shares: list[list[tuple[int, Row]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for length, row in rows:
        rank = loads.index(min(loads))
        shares[rank].append((length, row))
        loads[rank] += length
    plans = [_cut(share, tokens_per_batch) for share in shares]
    most = max(len(plan) for plan in plans)
    return [tuple(plan + [()] * (most - len(plan))) for plan in plans]


def _cut(share: Sequence[tuple[int, Row]], tokens_per_batch: int) -> list[tuple[Row, ...]]:
    """Neighbours in length share a micro-batch, which is what packed attention likes."""
    batches: list[list[Row]] = []
    room = 0
    for length, row in share:
        if not batches or length > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(row)
        room -= length
    return [tuple(batch) for batch in batches]
