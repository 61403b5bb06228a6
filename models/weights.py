"""Parameters as flat byte buckets, and the fingerprint that proves two processes hold the same ones."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..contracts.records import WeightBucket

BUCKET_BYTES = 256 * 2**20
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TORCH = {name: dtype for dtype, name in NAMES.items()}


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as uint8 `[bytes]`, on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


class BucketWriter:
    """Gathers parameters into buckets of about `capacity` bytes, and fingerprints them as they pass."""

    def __init__(self, version: int, capacity: int = BUCKET_BYTES) -> None:
        self.version, self.capacity = version, capacity
        self.buckets = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._entries: list[tuple[str, str, tuple[int, ...], int]] = []
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, name: str, tensor: torch.Tensor) -> Iterator[WeightBucket]:
        """Take one parameter; yields a bucket when one is full."""
        data = to_bytes(tensor)
        self._hash.update(name.encode() + data.tobytes())
        self._entries.append((name, NAMES[tensor.dtype], tuple(tensor.shape), self._size))
        self._parts.append(data)
        self._size += data.size
        if self._size >= self.capacity:
            yield from self.flush()

    def flush(self) -> Iterator[WeightBucket]:
        """The last, partly filled bucket."""
        if self._parts:
            bucket = WeightBucket(version=self.version, entries=tuple(self._entries), data=np.concatenate(self._parts))
            self._entries, self._parts, self._size = [], [], 0
            self.buckets += 1
            yield bucket

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()


def read_bucket(bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors over the bucket's memory (read-only: copy out of them)."""
    for name, dtype_name, shape, offset in bucket.entries:
        dtype = TORCH[dtype_name]
        count = int(np.prod(shape, dtype=np.int64))
        view = np.frombuffer(bucket.data, np.uint8, count * dtype.itemsize, offset)
        view.flags.writeable = False
        yield name, _as_tensor(view, dtype).view(shape)


def _as_tensor(view: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    plain = {4: np.float32, 2: np.int16}[dtype.itemsize]
    aligned = view.view(plain) if view.ctypes.data % dtype.itemsize == 0 else view.copy().view(plain)
    return torch.tensor(aligned).view(dtype)


def fingerprint(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """blake2b over names and bytes, in the given order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in parameters:
        digest.update(name.encode() + to_bytes(tensor).tobytes())
    return digest.hexdigest()
