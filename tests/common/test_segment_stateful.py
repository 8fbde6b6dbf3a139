from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from edgedaq.delivery import Verdict
from edgedaq.frame import Kind
from edgedaq.segment_format import Hole
from edgedaq.segment_reader import SegmentReader
from edgedaq.segments import LogFull, SegmentLog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.common.log_model import (
    SEGMENT_BYTES,
    RecordingStorage,
    frames_in,
    open_of,
    power_cut,
    raw_of,
    read_all,
    records_in,
)


class Journals(RuleBasedStateMachine):
    """A log whose sender offers again what is not durable, against a list; with power cuts and kills."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="edq-log-"))
        self.life = 0
        self.storage = RecordingStorage()
        self.directory = self.root / "0"
        self.log = self._open()
        self.sent: list[bytes] = []
        self.durable_count = 0
        self.trimmed = 0
        self.ends: list[int] = []

    def _open(self) -> SegmentLog:
        return SegmentLog(
            self.directory,
            limit_bytes=10 * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            resends=True,
            storage=self.storage,
        )

    @rule(
        stream=st.integers(1, 3),
        sizes=st.lists(st.sampled_from([0, 40, 500, 3000, 9000]), min_size=1, max_size=4),
    )
    def append(self, stream, sizes):
        frames = []
        seq = self.log.table.expected(stream)
        for size in sizes:
            frames.append(raw_of(stream, seq, size) if seq else open_of(stream))
            assert len(frames) > 1 or self.log.table.judge(frames[0]) is Verdict.ACCEPT
            seq += 1
        before = self.log.end
        try:
            self.log.append(frames)
            kept = len(frames)
        except LogFull as e:
            kept = e.kept
        self.sent += [bytes(frame.raw) for frame in frames[:kept]]
        self.ends += [record.end for record in records_in(read_all(self.directory, before, self.log.end))]
        assert len(self.ends) == len(self.sent)

    @rule()
    def sync(self):
        assert self.log.sync() == self.log.end
        self.durable_count = len(self.sent)

    @rule(share=st.floats(0, 1))
    def trim(self, share):
        self.trimmed = max(self.trimmed, int(self.log.begin + share * (self.log.end - self.log.begin)))
        assert self.log.trim(self.trimmed) <= max(self.trimmed, self.log.begin)

    @rule(number=st.integers(0, 1000))
    def save_cursor(self, number):
        self.log.save_cursor({"number": number})

    @rule()
    def restart(self):
        cursor = self.log.cursor
        self.log.close()
        self.durable_count = len(self.sent)
        self.log = self._open()
        assert self.log.cursor == cursor
        assert self.log.recovery.cut_bytes == 0

    @rule(seed=st.integers(0, 1 << 32), kept=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    def crash(self, seed, kept):
        events = list(self.storage.events)
        self.log.close()
        self.life += 1
        left = self.root / str(self.life)
        power_cut(events, left, random.Random(seed), kept)
        self.storage = RecordingStorage()
        self.storage.adopt(left)
        self.directory = left
        self.log = self._open()
        found = self._found()
        at_least = self.sent[: self.durable_count] if kept < 1 else self.sent
        assert found == [] or found[-1] in self.sent
        missing = set(at_least) - set(found)
        assert all(
            end <= self.trimmed for raw, end in zip(self.sent, self.ends, strict=True) if raw in missing
        )
        count = max((self.sent.index(raw) + 1 for raw in found), default=self.durable_count)
        self.sent, self.ends = self.sent[:count], self.ends[:count]
        self.durable_count = len(self.sent)

    @precondition(lambda self: self.sent)
    @invariant()
    def what_is_read_is_the_end_of_what_was_sent(self):
        found = self._found()
        assert found == self.sent[len(self.sent) - len(found) :]

    def _found(self) -> list[bytes]:
        entries = read_all(self.directory, self.log.begin, self.log.end)
        assert not [entry for entry in entries if isinstance(entry, Hole)]
        with SegmentReader(self.directory, self.log.begin) as reader:
            table = reader.table_at_start()
        for frame in frames_in(entries):
            assert frame.kind is not Kind.GAP
            assert table.judge(frame) is Verdict.ACCEPT
            table.apply(frame)
        assert table.snapshot() == self.log.table.snapshot()
        return [bytes(frame.raw) for frame in frames_in(entries)]

    def teardown(self):
        self.log.close()
        shutil.rmtree(self.root)


Journals.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_a_log_with_crashes_holds_exactly_what_was_sent = Journals.TestCase
