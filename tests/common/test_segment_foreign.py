"""A log in whose directory something else has taken a segment's place: it starts, and keeps the rest."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from edgedaq.segment_format import file_name
from edgedaq.segments import SegmentLog

from tests.common.log_model import SEGMENT_BYTES, QuickStorage, frames_in, open_of, raw_of, read_all


def _log(directory: Path, *, resends: bool) -> SegmentLog:
    return SegmentLog(
        directory,
        limit_bytes=1 << 20,
        segment_bytes=SEGMENT_BYTES,
        resends=resends,
        storage=QuickStorage(),
    )


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _rubbish(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _headless(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(4096))


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_bytes(b"x")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("resends", [False, True], ids=["spool", "journal"])
@pytest.mark.parametrize("which", [0, 1, -1], ids=["oldest", "middle", "newest"])
@pytest.mark.parametrize("harm", [_empty, _zeros, _rubbish, _headless, _directory, _pipe, _dangling])
@pytest.mark.parametrize("ends", ["orderly", "killed"])
def test_whatever_is_in_a_segments_place_the_log_starts_and_goes_on_behind_all_positions(
    tmp_path, harm, which, resends, ends
):
    directory = tmp_path / "log"
    with _log(directory, resends=resends) as log:
        log.append([open_of(1)])
        for seq in range(1, 50):
            log.append([raw_of(1, seq, 1000)])
            log.sync()
        firsts = [first for first, _ in log.sizes()]
        assert len(firsts) > 3
        end = log.end
        if ends == "killed":
            shutil.copytree(directory, tmp_path / "copy")
    if ends == "killed":
        directory = tmp_path / "copy"
    harm(directory / file_name(firsts[which]))
    with _log(directory, resends=resends) as log:
        frames = [raw_of(2, seq, 1000) for seq in range(1, 40)]
        where = log.append([open_of(2)])
        assert where > end
        for frame in frames:
            log.append([frame])
        log.sync()
        found = frames_in(read_all(directory, log.begin, log.end))
        assert [frame.seq for frame in found if frame.stream == 2] == list(range(40))
    with _log(directory, resends=resends) as log:
        again = frames_in(read_all(directory, log.begin, log.end))
        assert [bytes(frame.raw) for frame in again] == [bytes(frame.raw) for frame in found]
    assert threading.active_count() == 1
