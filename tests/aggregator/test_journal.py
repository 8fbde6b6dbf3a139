from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq
from edgedaq.errors import StoreError
from edgedaq.frame import Kind
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_reader import SegmentReader
from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.journal_client import JournalFollower
from edgedaq_aggregator.journal_messages import Forget, Position, Register, Tail, encode, socket_address

from tests.aggregator.serving import serving
from tests.common.log_model import SEGMENT_BYTES, QuickStorage, frames_in, open_of, raw_of


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def make(tmp_path, runtime_dir, context) -> Callable[..., Journal]:
    def journal(**options) -> Journal:
        usual = {"limit_bytes": 1 << 22, "segment_bytes": SEGMENT_BYTES, "stores": ["csv"]}
        options = {**usual, "storage": QuickStorage(), **options}
        return Journal(tmp_path / "journal", runtime_dir, context=context, **options)

    return journal


@pytest.fixture
def follow(tmp_path, runtime_dir, context) -> Callable[..., JournalFollower]:
    def follower(store: str = "csv", start: int | None = None, **options) -> JournalFollower:
        return JournalFollower(tmp_path / "journal", runtime_dir, store, start, context=context, **options)

    return follower


def _until(claim: Callable[[], object], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not claim():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def _read(follower: JournalFollower, count: int, limit_s: float = 10.0) -> list[Any]:
    end = time.monotonic() + limit_s
    found: list[Any] = []
    while len(found) < count:
        assert time.monotonic() < end, f"got {len(found)} of {count}"
        found += follower.read(100)
    return found


def _is_durable(journal: Journal, end: int) -> bool:
    return journal.durable >= end


def _frames(count: int, stream: int = 1, body_bytes: int = 500) -> list[Any]:
    return [open_of(stream), *(raw_of(stream, seq, body_bytes) for seq in range(1, count))]


def test_a_follower_gets_what_is_durable_in_order_and_its_position_is_kept(make, follow, tmp_path):
    with make() as journal, follow() as follower:
        journal.append(_frames(60))
        with serving(journal):
            found = _read(follower, 60)
            assert [frame.seq for frame in frames_in(found)] == list(range(60))
            assert follower.position == follower.tail == journal.durable
            assert follower.is_connected
            follower.report(found[29].end)
            _until(lambda: not follower.read(10) and journal.stores == {"csv": found[29].end})
    assert json.loads((tmp_path / "journal" / "stores.json").read_text()) == {
        "stores": {"csv": found[29].end}
    }
    with make() as journal, follow(start=None) as follower, serving(journal):
        assert [frame.seq for frame in frames_in(_read(follower, 30))] == list(range(30, 60))


def test_nothing_is_told_before_it_is_durable(make, follow):
    class Slow(QuickStorage):
        gate = threading.Event()

        def fdatasync(self, fd: int) -> None:  # noqa: ARG002
            assert self.gate.wait(10)

    Slow.gate.set()
    with make(storage=Slow()) as journal, follow() as follower:
        journal.append(_frames(2))
        with serving(journal):
            _read(follower, 2)
        Slow.gate.clear()
        journal.append([raw_of(1, 2)])
        with serving(journal):
            assert follower.read(100) == []
            Slow.gate.set()
            assert [frame.seq for frame in frames_in(_read(follower, 1))] == [2]


def test_a_new_store_begins_with_what_is_retained_or_with_what_comes(make, follow):
    with make() as journal:
        journal.append(_frames(5))
        with serving(journal), follow("early") as early:
            assert len(_read(early, 5)) == 5
            with follow("late", from_begin=False) as late:
                _until(lambda: late.read(10) == [] and late.position is not None)
                assert late.position == journal.durable
                assert set(late.table_at_start().streams) == {1}


def test_segments_wait_for_every_registered_store_and_go_when_it_is_forgotten(make, follow):
    with make(stores=["csv", "slow"]) as journal:
        journal.append(_frames(200))
        begin = journal.begin
        with serving(journal), follow("csv") as follower:
            found = _read(follower, 200)
            follower.report(found[-1].end)
            _until(lambda: not follower.read(10) and journal.stores["csv"] == found[-1].end)
            time.sleep(1.2)
            assert journal.begin == begin
        journal.forget("slow")
        with serving(journal):
            _until(lambda: journal.begin > begin)


def test_thirty_kills_with_little_data_between_them_cost_little_and_what_is_kept_stays_kept(
    tmp_path, runtime_dir
):
    script = """
import os, sys
from pathlib import Path
import zmq
from edgedaq.clock import mono_ns
from edgedaq_aggregator.journal import Journal
from tests.aggregator.serving import serving
from tests.common.log_model import open_of, raw_of
stream = int(sys.argv[2])
journal = Journal(Path(sys.argv[1]), Path(sys.argv[3]), limit_bytes=16 << 20,
    segment_bytes=4 << 20, keep_bytes=8 << 20, stores=[], context=zmq.Context())
assert journal.would_fit(2000)
end = journal.append([open_of(stream), raw_of(stream, 1, 1000)])
while journal.durable < end:
    journal.service(mono_ns() + 10**10)
print(journal.used_bytes, journal.disk_bytes, flush=True)
os.kill(os.getpid(), 9)
"""
    for stream in range(1, 31):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "journal"), str(stream), str(runtime_dir)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        used_bytes, disk_bytes = map(int, done.stdout.splitlines()[-1].split())
        assert used_bytes < stream * 20_000
        assert disk_bytes < used_bytes + (8 << 20) + 4096
    with SegmentReader(tmp_path / "journal", 0) as reader:
        found: list[Record | Hole] = []
        while entries := reader.read(1 << 63):
            found += entries
    assert {frame.stream for frame in frames_in(found) if frame.seq == 1} == set(range(1, 31))


def test_what_is_kept_for_later_stores_gives_way_when_the_journal_is_full(make):
    with make(stores=[], keep_bytes=1 << 30, limit_bytes=6 * SEGMENT_BYTES) as journal:
        journal.append([open_of(1)])
        for seq in range(1, 300):
            assert journal.would_fit(600)
            end = journal.append([raw_of(1, seq, 500)])
            _until(partial(_is_durable, journal, end))
        assert journal.disk_bytes <= 6 * SEGMENT_BYTES
        assert journal.begin > 0


def test_a_full_journal_takes_no_more_than_its_stores_let_go(make):
    with make(stores=["csv"], limit_bytes=4 * SEGMENT_BYTES) as journal:
        assert journal.would_fit(500)
        with pytest.raises(StoreError, match="limit"):
            journal.append(_frames(300))
        assert not journal.would_fit(SEGMENT_BYTES)


def test_at_its_limit_a_store_that_is_behind_another_gets_a_hole_and_the_others_go_on(make, follow):
    with make(stores=["csv", "dead"], limit_bytes=4 * SEGMENT_BYTES) as journal:
        journal.append([open_of(1)])
        with follow("csv") as follower:
            for seq in range(1, 400):
                assert journal.would_fit(600), seq
                end = journal.append([raw_of(1, seq, 500)])
                _until(partial(_is_durable, journal, end))
                with serving(journal) if seq == 1 else nullcontext():
                    if seq == 1:
                        _until(lambda: follower.read(10) or follower.position is not None)
                follower.report(end)
                journal.service(time.monotonic_ns())
        assert journal.left_behind["dead"] > 0
        assert "csv" not in journal.left_behind
        with serving(journal), follow("dead") as late:
            found = _read(late, 2)
        assert isinstance(found[0], Hole)
        assert found[0].reason == "trimmed"
        assert isinstance(found[1], Record)
        assert found[0].table is not None
        assert found[0].table.streams[1].next_seq == found[1].frame.seq


def test_while_more_must_only_become_durable_no_store_gives_anything_up(make, follow):
    with make(stores=["csv", "dead"], limit_bytes=64 * SEGMENT_BYTES) as journal, follow("csv") as follower:
        journal.append([open_of(1)])
        with serving(journal):
            _until(lambda: follower.read(10) or follower.position is not None)
        for seq in range(1, 200):
            end = journal.append([raw_of(1, seq, 500)])
            _until(partial(_is_durable, journal, end))
        follower.report(end)
        with serving(journal):
            _until(lambda: journal.stores["csv"] == end)
        begin = journal.begin
        assert not journal.would_fit(65 << 20)
        assert (journal.begin, journal.left_behind) == (begin, {})


def test_a_store_further_behind_than_its_own_limit_is_left_behind(make):
    with make(stores=["csv"], limit_bytes=64 * SEGMENT_BYTES, store_bytes=3 * SEGMENT_BYTES) as journal:
        journal.append([open_of(1)])
        for seq in range(1, 400):
            end = journal.append([raw_of(1, seq, 500)])
            _until(partial(_is_durable, journal, end))
            journal.service(time.monotonic_ns() + seq * 10**9)
        assert journal.left_behind["csv"] > 0
        assert journal.durable - journal.begin <= 5 * SEGMENT_BYTES


def test_a_store_is_forgotten_by_a_word_on_the_socket(make, context, runtime_dir):
    with make(stores=["csv", "gone"]) as journal, context.socket(zmq.DEALER) as person:
        person.connect(socket_address(runtime_dir))
        with serving(journal):
            person.send(encode(Forget("gone")))
            assert person.poll(5000)
        assert set(journal.stores) == {"csv"}


def test_a_follower_outlives_the_journal_s_process(make, follow):
    with follow() as follower:
        with make() as journal:
            journal.append(_frames(3))
            with serving(journal):
                found = _read(follower, 3)
                follower.report(found[1].end)
                follower.read(20)
        with make() as journal:
            journal.append([raw_of(1, seq) for seq in range(3, 6)])
            with serving(journal):
                assert [frame.seq for frame in frames_in(_read(follower, 3))] == [3, 4, 5]
                follower.report(follower.position)
                _until(lambda: not follower.read(10) and journal.stores["csv"] == journal.durable)


def test_a_follower_of_a_journal_that_was_replaced_begins_anew_and_is_told(make, follow, tmp_path):
    with make() as journal:
        journal.append(_frames(50))
        with serving(journal), follow() as follower:
            found = _read(follower, 50)
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    with make() as journal, follow(start=found[-1].end) as follower:
        journal.append(_frames(3, stream=2))
        with serving(journal):
            entries = _read(follower, 4)
        assert isinstance(entries[0], Hole)
        assert entries[0].reason == "trimmed"
        assert [frame.stream for frame in frames_in(entries)] == [2, 2, 2]


def test_streams_that_a_store_does_not_want_are_passed_over_but_for_their_open(make, follow):
    with make() as journal, follow(wants=lambda stream: stream == 2) as follower:
        journal.append([*_frames(100, stream=1, body_bytes=50), *_frames(3, stream=2)])
        with serving(journal):
            found = frames_in(_read(follower, 4))
            _until(lambda: follower.read(10) == [] and follower.position == journal.durable)
    assert [(frame.stream, frame.kind) for frame in found] == [
        (1, Kind.OPEN),
        (2, Kind.OPEN),
        (2, Kind.RAW),
        (2, Kind.RAW),
    ]


def test_what_is_no_message_of_a_follower_is_refused_and_harms_nobody(make, follow, context, runtime_dir):
    with make() as journal, context.socket(zmq.DEALER) as hostile, follow() as follower:
        hostile.setsockopt(zmq.LINGER, 0)
        hostile.connect(socket_address(runtime_dir))
        for parts in (
            [b""],
            [b"\xff" * 50],
            [encode(Tail(1, 2))],
            [encode(Register("../x"))],
            [encode(Register("ok", -1))],
            [encode(Position("ok", -5))],
            [b"a", b"b"],
        ):
            hostile.send_multipart(parts)
        journal.append(_frames(2))
        with serving(journal):
            assert len(_read(follower, 2)) == 2
        assert set(journal.stores) == {"csv"}


def test_a_position_beyond_what_is_durable_is_not_believed(make, context, runtime_dir):
    with make(stores=["csv"]) as journal, context.socket(zmq.DEALER) as liar:
        liar.setsockopt(zmq.LINGER, 0)
        liar.connect(socket_address(runtime_dir))
        journal.append(_frames(100))
        _until(lambda: journal.durable == journal.end)
        with serving(journal):
            liar.send(encode(Register("csv", journal.end + 1000)))
            assert liar.poll(5000)
            liar.send(encode(Position("csv", journal.end + 1000)))
            _until(lambda: liar.poll(0))
        assert journal.stores["csv"] == journal.begin


def test_a_damaged_list_of_stores_holds_the_journal_back_for_a_while(make, tmp_path):
    with make(stores=["csv"]) as journal:
        journal.append(_frames(100))
    (tmp_path / "journal" / "stores.json").write_text('{"stores": {"csv": ')
    with make(stores=[]) as journal:
        begin = journal.begin
        journal.service(time.monotonic_ns())
        journal.service(time.monotonic_ns() + 2_000_000_000)
        assert journal.begin == begin
        journal.service(time.monotonic_ns() + 700_000_000_000)
        assert journal.begin > begin
    assert (tmp_path / "journal" / "stores.json.bad").exists()


def test_a_second_intake_is_refused_in_words(make):
    with make(), pytest.raises(StoreError, match="another process"):
        make()


_INTAKE = """
import sys, time
from pathlib import Path
import zmq
from edgedaq_aggregator.journal import Journal
from tests.aggregator.serving import serving
from tests.common.log_model import SEGMENT_BYTES, open_of, raw_of
journal = Journal(Path(sys.argv[1]), Path(sys.argv[2]), limit_bytes=1 << 24, segment_bytes=SEGMENT_BYTES,
    stores=["csv"])
poller = zmq.Poller()
for one in journal.pollables():
    poller.register(one, zmq.POLLIN)
seq = journal.table.expected(1)
told = 0
while True:
    journal.append([open_of(1)] if seq == 0 else [raw_of(1, seq, 700)])
    seq += 1
    poller.poll(1)
    journal.service(time.monotonic_ns())
"""


def test_a_follower_gets_each_frame_once_while_the_intake_is_killed_again_and_again(
    tmp_path, runtime_dir, follow
):
    root = Path(__file__).parents[2]
    path = ":".join(str(root / part) for part in ("common", "aggregator", "."))
    command = [sys.executable, "-c", _INTAKE, str(tmp_path / "journal"), str(runtime_dir)]
    seqs: list[int] = []
    with follow() as follower:
        for life in range(1, 5):
            with subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
            ) as intake:
                end = time.monotonic() + 20
                while len(seqs) < 60 * life:
                    assert time.monotonic() < end, f"{len(seqs)} frames in life {life}"
                    found = follower.read(100)
                    assert not [entry for entry in found if isinstance(entry, Hole)]
                    seqs += [frame.seq for frame in frames_in(found)]
                    if found:
                        follower.report(found[-1].end)
                intake.send_signal(signal.SIGKILL)
    assert seqs == list(range(len(seqs)))
