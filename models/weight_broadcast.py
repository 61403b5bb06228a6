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

from ..contracts.errors import BroadcastBroken
from ..contracts.records import BucketEntries
from .weights import TORCH

MEETING_SECONDS = 60.0  # for all to be there
TIMEOUT = timedelta(minutes=10)  # of one bucket: a member whose machine is gone says nothing


class BroadcastGroup:
    """One of `size` processes that meet at `host`:`port`, where rank 0 listens. Blocks until all are there.

    Where one of them dies, what the others do raises BroadcastBroken, and each then leaves the group: that closes its
    connections, so that those who wait for it hear of it.
    """

    def __init__(self, host: str, port: int, rank: int, size: int, device: str) -> None:
        meeting = timedelta(seconds=MEETING_SECONDS)
        try:
            store = TCPStore(host, port, size, rank == 0, meeting)
            if device == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = TIMEOUT
                self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
            else:
                self._group = dist.ProcessGroupGloo(store, rank, size, meeting)
                self._group._set_default_timeout(TIMEOUT)
        except RuntimeError as error:
            raise broken(f"rank {rank} of {size} did not meet the others at {host}:{port}", error) from error
        self._rank, self._size = rank, size

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's uint8 `[bytes]` into everyone's. Raises BroadcastBroken."""
        if self.broken:
            raise broken(f"rank {self._rank} of {self._size} has left the group")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self._group.broadcast([data], options).wait()
        except RuntimeError as error:
            self.leave()
            raise broken(f"rank {self._rank} of {self._size}", error) from error

    @property
    def broken(self) -> bool:
        return self._group is None

    def leave(self) -> None:
        """Close the connections to the others."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def broken(who: str, error: Exception | None = None) -> BroadcastBroken:
    found = f"{who}: {error}" if error else who
    return BroadcastBroken("every process of a group takes part in its broadcasts", found)


def bucket_size(entries: BucketEntries) -> int:
    """Bytes of a bucket with these entries, one behind the other."""
    return sum(TORCH[dtype].itemsize * torch.Size(shape).numel() for _, dtype, shape, _ in entries)


def views(data: torch.Tensor, entries: BucketEntries) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors over a bucket's bytes, uint8 `[bytes]`."""
    for name, dtype_name, shape, offset in entries:
        dtype = TORCH[dtype_name]
        size = dtype.itemsize * torch.Size(shape).numel()
        yield name, data[offset : offset + size].view(dtype).view(shape)
