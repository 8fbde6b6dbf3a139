"""The reference beside which throughput is read: the same bytes written and fdatasynced, nothing else.

Absolute figures belong to the machine of the moment; ratios to this carry over. Once is what a single store
must do; two files is the least that a journal and a store do together.

The host of a virtual disk takes the first gigabytes into its own memory (measured here: 1,400 MB/s for about
3 GB, then 320 MB/s), so what is measured second looks slow. ``settle`` lets the disk come to rest before
anything is timed, for EdgeDAQ and for the bare disk alike.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CHUNK_BYTES = 1 << 20
COMMIT_BYTES = 8 << 20


def write_durably(folder: Path, total_bytes: int, *, files_count: int) -> float:
    """Write ``total_bytes`` to each of some new files, commit each 8 MiB; return one file's bytes per second.

    The files are removed again. The bytes are random, so that nothing compresses them away.
    """
    paths = [folder / f"bare.{number}" for number in range(files_count)]
    chunk = os.urandom(CHUNK_BYTES)
    descriptors = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600) for path in paths]
    try:
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


def settle(pause_s: float) -> None:
    """Write out what the kernel holds, and give the host time to do the same."""
    os.sync()
    time.sleep(pause_s)
