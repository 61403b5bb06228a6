"""Writes a safetensors file of float32 arrays past the system's page cache, and digests it on the way.

A checkpoint is large, and nobody reads it unless the run dies. In the page cache it would drive out what is read, and
filling that takes processor time: 4 s for 1.5 GiB beside a run on a virtual machine where fresh pages are dear, and
0.4 s past it.
"""

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash
from torch import Tensor

from ..models.digests import XXH3

PART = 2**22  # bytes at once
BLOCK = 2**12  # past the page cache, parts of a file begin and end at multiples of it
DIRECT = getattr(os, "O_DIRECT", 0)  # where the system knows it


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """A new file, on the disk; its size and digest. `tensors`: float32 [n], in host memory. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    handle = _opened(file)
    try:
        part = memoryview(mmap.mmap(-1, PART))  # begins with a page, as the system asks
        for filled in _filled(part, tensors, metadata):
            digest.update(part[:filled])
            _write(handle, part[: -(-filled // BLOCK) * BLOCK])
            size += filled
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)
    return size, XXH3 + digest.hexdigest()


def _filled(part: memoryview, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[int]:
    """Fills `part` with the next bytes of the file and says how many: as many as fit, and at last the rest."""
    filled = 0
    for data in (_header(tensors, metadata), *(tensor.numpy().view("u1").data for tensor in tensors.values())):
        left = memoryview(data)
        while left:
            taken = left[: PART - filled]
            part[filled : filled + len(taken)] = taken
            filled, left = filled + len(taken), left[len(taken) :]
            if filled == PART:
                yield filled
                filled = 0
    if filled:
        yield filled


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """As the format has it: its length, and JSON that is filled up to a multiple of eight."""
    known: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        known[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(known).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _opened(file: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(file, flags | DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(file, flags, 0o644)  # a file system without it


def _write(handle: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.write(handle, data[done:])
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~DIRECT)  # one of larger blocks, or after half a write
