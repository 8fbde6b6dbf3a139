"""The reference beside which throughput is read: the same bytes written and fdatasynced, nothing else.

Absolute figures belong to the machine of the moment; ratios to this carry over. Once is what a single store
must do; two files is the least that a journal and a store do together.

A virtual disk may be thin: a block that was never written costs the host an allocation (measured here: 320
MB/s, where blocks that a deleted file had used take 1,300). That is the host's work and nobody's design, so
``touch_blocks`` does it before anything is timed, for EdgeDAQ and for the bare disk alike.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CHUNK_BYTES = 1 << 20
COMMIT_BYTES = 8 << 20


def write_durably(folder: Path, total_bytes: int, *, files_count: int, is_preallocated: bool) -> float:
    """Write ``total_bytes`` to each of some files, commit each 8 MiB; return bytes of one file per second.

    The files are removed again. The bytes are random, so that nothing compresses them away.
    """
    paths = [folder / f"bare.{number}" for number in range(files_count)]
    chunk = os.urandom(CHUNK_BYTES)
    descriptors = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600) for path in paths]
    try:
        if is_preallocated:
            for descriptor in descriptors:
                _fill(descriptor, total_bytes)
        begun_s = time.perf_counter()
        written = waiting = 0
        while written < total_bytes:
            piece = memoryview(chunk)[: min(CHUNK_BYTES, total_bytes - written)]
            for descriptor in descriptors:
                os.write(descriptor, piece)
            written += len(piece)
            waiting += len(piece)
            if waiting >= COMMIT_BYTES or written == total_bytes:
                for descriptor in descriptors:
                    os.fdatasync(descriptor)
                waiting = 0
        return total_bytes / (time.perf_counter() - begun_s)
    finally:
        for descriptor, path in zip(descriptors, paths, strict=True):
            os.close(descriptor)
            path.unlink()


def touch_blocks(folder: Path, total_bytes: int) -> None:
    """Write and remove so many bytes: what is written in this folder next finds blocks that the host has."""
    path = folder / "touched"
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    try:
        _fill(descriptor, total_bytes)
    finally:
        os.close(descriptor)
        path.unlink()


def _fill(descriptor: int, total_bytes: int) -> None:
    """Write the file once, as a recycled segment has been: its blocks are then allocated and initialised."""
    chunk = os.urandom(CHUNK_BYTES)
    for _ in range(-(-total_bytes // CHUNK_BYTES)):
        os.write(descriptor, chunk)
    os.fsync(descriptor)
    os.lseek(descriptor, 0, os.SEEK_SET)
