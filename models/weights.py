"""Parameters as buckets of bytes, and the fingerprint that proves two processes hold the same ones.

Nothing is copied here: a bucket's arrays are the parameters' own memory until Ray writes them into its object store,
and what is read out of a bucket is the object store's.
"""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash

from ..contracts.records import WeightBucket

BUCKET_BYTES = 256 * 2**20
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TORCH = {name: dtype for dtype, name in NAMES.items()}


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as uint8 `[bytes]`; a copy where it is not on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


class Fingerprint:
    """Over names and bytes, in the order in which they come. It finds what went wrong, not who meant harm: no
    cryptographic hash reads memory as fast as this one."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, name: str, data: np.ndarray) -> None:
        """A parameter's bytes, uint8."""
        self._hash.update(name.encode())
        self._hash.update(data.data)

    def __str__(self) -> str:
        return self._hash.hexdigest()


class BucketWriter:
    """Gathers parameters into buckets of about `capacity` bytes, and fingerprints them as they pass.

    A bucket must be sent, or copied, before a parameter that it holds changes.
    """

    def __init__(self, version: int, capacity: int = BUCKET_BYTES) -> None:
        self.version, self.capacity = version, capacity
        self.buckets = 0
        self._fingerprint = Fingerprint()
        self._entries: list[tuple[str, str, tuple[int, ...], int]] = []
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def add(self, name: str, tensor: torch.Tensor) -> Iterator[WeightBucket]:
        """Take one parameter; yields a bucket when one is full."""
        data = to_bytes(tensor)
        self._fingerprint.add(name, data)
        self._entries.append((name, NAMES[tensor.dtype], tuple(tensor.shape), self._size))
        self._arrays.append(data)
        self._size += data.size
        if self._size >= self.capacity:
            yield from self.flush()

    def flush(self) -> Iterator[WeightBucket]:
        """The last, partly filled bucket."""
        if self._arrays:
            entries, arrays = tuple(self._entries), tuple(self._arrays)
            self._entries, self._arrays, self._size = [], [], 0
            self.buckets += 1
            yield WeightBucket(version=self.version, entries=entries, arrays=arrays)

    @property
    def fingerprint(self) -> str:
        return str(self._fingerprint)


def read_bucket(bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors over the bucket's memory, which may be read-only: copy out of them, never into them."""
    for (name, dtype_name, shape, _), data in zip(bucket.entries, bucket.arrays, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            tensor = torch.from_numpy(data)
        yield name, tensor.view(TORCH[dtype_name]).view(shape)


def fingerprint(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of named tensors, in the given order."""
    found = Fingerprint()
    for name, tensor in parameters:
        found.add(name, to_bytes(tensor))
    return str(found)
