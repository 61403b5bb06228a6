"""Digests of a checkpoint's files: against damage, at the speed of memory."""

import hashlib
from pathlib import Path

import xxhash

Written = dict[str, tuple[int, str]]  # a file → its size and digest

XXH3 = "xxh3:"


def digest_of(file: Path, like: str = XXH3) -> str:
    """Of a file's bytes. `like`: a digest to compare with, which may be of a release that had others."""
    with file.open("rb") as data:
        if like.startswith(XXH3):
            return XXH3 + hashlib.file_digest(data, xxhash.xxh3_128).hexdigest()
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
