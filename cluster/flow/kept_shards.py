"""Shards in a checkpoint: those in flight, ready or not, so that what was generated and annotated is not made again.

`shards.json` says of each what its requests and receipts are; each batch is an Arrow IPC file beside it, written and
read where the batches lie. What is missing of a shard when a run goes on is asked for then.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...contracts.receipts import Receipt, RolloutReceipt, ScoreReceipt, StrategyReceipt, VerdictReceipt
from ...contracts.records import SampleRequest
from ..pools.replica import Backend
from .shard import Shard

FOLDER, LIST = "shards", "shards.json"
RECEIPTS = {kind.__name__: kind for kind in (Receipt, RolloutReceipt, ScoreReceipt, StrategyReceipt, VerdictReceipt)}
PLAIN = ("step", "attempt", "begun", "followed", "to_learner", "ready", "quarantined")

Kept = tuple[list[dict[str, Any]], list[tuple[str, Any]]]  # of each shard what is known, and its batches by their files


def kept(shards: Mapping[int, list[Shard]]) -> Kept:
    """What a checkpoint is to hold of the shards in flight, as they are now: a batch never changes. What a service of
    one's own says in a receipt of its own is asked for again."""
    known: list[dict[str, Any]] = []
    batches: list[tuple[str, Any]] = []
    for shard in (shard for own in shards.values() for shard in own):
        receipts = {name: own for name, own in shard.receipts.items() if type(own) in RECEIPTS.values()}
        named = [name for name in receipts if shard.batches[name] is not None]
        files = {name: f"{len(known):05d}-{number}.arrow" for number, name in enumerate(named)}
        batches += [(file, shard.batches[name]) for name, file in files.items()]
        known.append(
            {
                **{name: getattr(shard, name) for name in PLAIN},
                "to_learner": {name: kind for name, kind in shard.to_learner.items() if name in receipts},
                "ready": shard.ready and len(receipts) == len(shard.receipts),
                "requests": [asdict(request) for request in shard.requests],
                "receipts": {name: [type(receipt).__name__, asdict(receipt)] for name, receipt in receipts.items()},
                "files": files,
            }
        )
    return known, batches


async def write_shards(folder: Path, own: Kept, backend: Backend) -> None:
    """Into a checkpoint's folder. Raises OSError, and BatchLost for a batch that is gone with its machine."""
    known, batches = own
    if not known:
        return
    (folder / FOLDER).mkdir()
    await asyncio.gather(*(backend.run(_write, str(folder / FOLDER / file), batch) for file, batch in batches))
    (folder / FOLDER / LIST).write_text(json.dumps(known), encoding="utf-8")


def read_shards(folder: Path, backend: Backend) -> dict[int, list[Shard]]:
    """Those that a checkpoint holds, by step; their batches are references again."""
    file = folder / FOLDER / LIST
    found: dict[int, list[Shard]] = {}
    for known in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []:
        files = {name: str(folder / FOLDER / own) for name, own in known["files"].items()}
        shard = shard_of(known, {name: backend.make(_read, own) for name, own in files.items()})
        found.setdefault(shard.step, []).append(shard)
    return found


def shard_of(known: Mapping[str, Any], batches: Mapping[str, Any]) -> Shard:
    """One of which `kept` said what is known."""
    shard = Shard(requests=tuple(SampleRequest(**own) for own in known["requests"]), **{n: known[n] for n in PLAIN})
    shard.receipts = {name: RECEIPTS[kind](**_tuples(values)) for name, (kind, values) in known["receipts"].items()}
    shard.batches = {name: batches.get(name) for name in shard.receipts}
    return shard


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists in their place."""
    return {name: _tuple(value) for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _write(file: str, batch: pa.RecordBatch) -> None:
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _read(file: str) -> pa.RecordBatch:
    with pa.OSFile(file) as source:  # not mapped: the checkpoint may be gone while the batch is still needed
        return pa.ipc.open_file(source).get_batch(0)
