from __future__ import annotations

from typing import Any

import pytest
from edgedaq.feeds import Portion, hand_over
from edgedaq.frame import Kind, pack_map
from edgedaq.job import DAQJob
from edgedaq.job_context import JobContext, WorkerSpec
from edgedaq.messages import MessageReader
from edgedaq.open_info import OpenInfo

from tests.common.log_model import frame_of

INFO = OpenInfo(node="n", job="j", job_type="T", life="0" * 16, boot="b", topics=("x",), form="raw")


class Notes(DAQJob):
    """Notes what it is handed, in order."""

    def __init__(self, config: Any, context: JobContext) -> None:
        super().__init__(config, context)
        self.seen: list[Any] = []

    def handle_message(self, message: Any) -> None:
        self.seen.append(message.data)

    def handle_gap(self, gap: Any) -> None:
        self.seen.append((gap.source.seq, gap.last, gap.rows, gap.reason))


@pytest.fixture
def job(tmp_path):
    context = JobContext(
        WorkerSpec(unique_id="j", job_type="T", target="", node="n", boot="b", runtime_dir=str(tmp_path))
    )
    yield Notes(None, context)
    context.close()


def raw(seq: int, message: bytes) -> Any:
    return frame_of(Kind.RAW, 1, seq, len(message).to_bytes(4, "little") + message, rows=1, row0=seq - 1)


def test_what_cannot_be_read_and_what_is_missing_is_told_in_its_place_and_holds_nothing_up(job):
    frames = [
        raw(1, b"a"),
        frame_of(Kind.RAW, 1, 2, b"\xff\xff\xff\xff", rows=1, row0=1),
        frame_of(Kind.GAP, 1, 3, pack_map({"last": 5, "rows": 3, "reason": "overrun"}), row0=2),
        frame_of(Kind.GAP, 1, 6, b"\xc1", row0=5),
        raw(7, b"b"),
        frame_of(Kind.CLOSE, 1, 8, pack_map({"rows": 5, "tail_unknown": True, "bound_s": 0.4}), row0=7),
    ]
    done = []
    hand_over(
        Portion(iter([(INFO, frame) for frame in frames]), lambda: done.append(True)), MessageReader(), job
    )
    assert done
    assert [entry if isinstance(entry, bytes) else entry[:3] for entry in job.seen] == [
        b"a",
        (2, 2, 1),
        (3, 5, 3),
        (6, 6, 0),
        b"b",
        (8, 8, None),
    ]
    assert job.seen[1][3].startswith("refused: ")
    assert job.seen[2][3] == "overrun"
    assert "0.4 s" in job.seen[5][3]
    assert job.context.in_count == 3
