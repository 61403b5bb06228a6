"""Files of tensors that are written past the page cache, as the library of their format and a digest read them."""

import errno
import fcntl
import os

import pytest
import torch
from run_rows import fresh_rng
from safetensors import safe_open

from tutorloop.learner import tensor_file
from tutorloop.learner.tensor_file import BLOCK, DIRECT, PART, write_tensors
from tutorloop.models.digests import digest_of


def drawn(rng):
    """Of sizes around those of a part and of a block, empty ones too."""
    sizes = [0, 1, *rng.integers(1, 3 * BLOCK, 3), PART // 4, PART // 4 + int(rng.integers(-40, 40)), PART]
    return {f"weight.{i}": torch.from_numpy(rng.normal(size=int(n)).astype("f4")) for i, n in enumerate(sizes)}


def check(file, tensors, written):
    metadata = {"fragments": '{"a": [1, "é"]}'}
    assert written == (file.stat().st_size, digest_of(file))
    with safe_open(file, "pt") as found:
        assert found.metadata() == metadata and sorted(found.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found.get_tensor(name), tensor)


def write(file, tensors):
    return write_tensors(file, tensors, {"fragments": '{"a": [1, "é"]}'})


@pytest.mark.parametrize("trial", range(3))
def test_a_file_is_as_its_format_has_it(trial, tmp_path):
    tensors = drawn(fresh_rng())
    check(tmp_path / "a", tensors, write(tmp_path / "a", tensors))
    check(tmp_path / "none", {}, write(tmp_path / "none", {}))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_system_that_cannot(tmp_path, monkeypatch):
    """It refuses when a file is opened, or when it is written, also after half a part."""
    tensors, opened, wrote, refused = drawn(fresh_rng()), os.open, os.write, []

    def refuse_open(file, flags, mode):
        if flags & DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "")
        return opened(file, flags, mode)

    def half_writes(handle, data):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & DIRECT:
            if refused[-1] == "half":
                refused.append("write")
                raise OSError(errno.EINVAL, "")
            refused.append("half")
            return wrote(handle, data[: len(data) // 2 // BLOCK * BLOCK])
        return wrote(handle, data)

    for name, own in (("open", refuse_open), ("write", half_writes)):
        with monkeypatch.context() as patch:
            patch.setattr(tensor_file.os, name, own)
            written = write(tmp_path / name, tensors)
        check(tmp_path / name, tensors, written)
    assert refused == (["open", "half", "write"] if DIRECT else [])


def test_what_fails_says_so(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a", {})
    monkeypatch.setattr(tensor_file.os, "write", full)
    with pytest.raises(OSError, match="No space left") as found:
        write(tmp_path / "a", drawn(fresh_rng()))
    assert found.value.errno == errno.ENOSPC
