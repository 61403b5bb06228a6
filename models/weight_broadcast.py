"""Weights straight from the learner's rank 0 into every process of the replicas, by a collective: NCCL between GPUs.

The group is apart from those that the learner's ranks and a split model use among themselves. Rank 0 is the learner's;
a bucket's layout (names, dtypes, shapes) is known beforehand, so only its bytes are sent.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ..contracts.records import BucketEntries
from .weights import TORCH

TIMEOUT = timedelta(minutes=10)  # a replica that is gone ends the run, and does not hold it


class BroadcastGroup:
    """One of `size` processes that meet at `host`:`port`, where rank 0 listens. Blocks until all are there."""

    def __init__(self, host: str, port: int, rank: int, size: int, device: str) -> None:
        store = TCPStore(host, port, size, rank == 0, TIMEOUT)
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's uint8 `[bytes]` into everyone's."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([data], options).wait()


def bucket_size(entries: BucketEntries) -> int:
    """Bytes of a bucket with these entries, one behind the other."""
    return sum(TORCH[dtype].itemsize * torch.Size(shape).numel() for _, dtype, shape, _ in entries)


def views(data: torch.Tensor, entries: BucketEntries) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors over a bucket's bytes, uint8 `[bytes]`."""
    for name, dtype_name, shape, offset in entries:
        dtype = TORCH[dtype_name]
        size = dtype.itemsize * torch.Size(shape).numel()
        yield name, data[offset : offset + size].view(dtype).view(shape)
