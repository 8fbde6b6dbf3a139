from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, Frame, Kind, decode, unpack_map
from edgedaq.job_context import WorkerSpec
from edgedaq.messages import DAQJobMessageStoreRaw
from edgedaq.open_info import OpenInfo, encode_open
from edgedaq_aggregator import journal_feed
from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.journal_feed import JournalFeed

from tests.aggregator.serving import serving
from tests.common.log_model import SEGMENT_BYTES, QuickStorage, close_of, frame_of
from tests.system.harness import Site

LIMIT_S = 10.0


def opened(stream: int, node: str = "n1", topic: str = "store.X") -> Frame:
    info = OpenInfo(
        node=node, job="j", job_type="T", life="0" * 16, boot="b", topics=(topic,), form="raw", t_open_ns=1
    )
    return decode(memoryview(encode_open(stream, info)))


def one(stream: int, seq: int, body: bytes = b"") -> Frame:
    body = body or f"{stream}:{seq}".encode().ljust(300)
    raw = len(body).to_bytes(4, "little") + body
    return frame_of(Kind.RAW, stream, seq, raw, rows=1, row0=seq - 1)


def piece(stream: int, seq: int, body: bytes, flags: int, row0: int, rows: int = 0) -> Frame:
    return frame_of(Kind.RAW, stream, seq, body, flags=FLAG_PIECE | flags, row0=row0, rows=rows)


class Taker:
    """A feed of a job that notes what it is handed."""

    def __init__(self, feed: JournalFeed) -> None:
        self.feed = feed
        self.data: list[bytes] = []
        self.gaps: list[tuple[int, object]] = []

    def take(self, *, is_done: bool = True) -> int:
        portions = self.feed.receive()
        for portion in portions:
            for info, frame in portion.frames:
                if frame.kind is Kind.GAP:
                    self.gaps.append((frame.seq, unpack_map(frame.body)["rows"]))
                for message in self.feed.reader.read(info, frame):
                    assert isinstance(message, DAQJobMessageStoreRaw)
                    self.data.append(bytes(message.data).strip())
            if is_done:
                portion.done()
        return len(portions)

    def until(self, condition) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, (self.data, self.gaps)
            if not self.take():
                self.feed.pollables()[0].poll(10)


@pytest.fixture
def site(tmp_path, runtime_dir):
    """Return what makes a journal, and what makes a feed of it."""
    with zmq.Context() as context:

        def journal(**options) -> Journal:
            options = {"limit_bytes": 1 << 22, "segment_bytes": SEGMENT_BYTES, **options}
            return Journal(
                tmp_path / "journal", runtime_dir, context=context, storage=QuickStorage(), **options
            )

        @contextmanager
        def feed(*topics: str):
            spec = WorkerSpec(
                unique_id="watch",
                job_type="T",
                target="x:Y",
                node="control",
                boot="b",
                runtime_dir=str(runtime_dir),
                state_dir=str(tmp_path),
            )
            held = JournalFeed(spec, topics or ("store",), context)
            try:
                yield Taker(held)
            finally:
                held.close()

        yield journal, feed


def saved(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "jobs" / "watch.json").read_text())


def begin(journal: Journal, feed) -> None:
    """Let the job be registered, as of now."""
    with serving(journal), feed() as taker:
        taker.until(lambda: taker.feed._has_begun)
    assert "watch" in journal.stores


def test_a_job_begins_with_what_comes_goes_on_where_it_was_and_is_registered(site, tmp_path):
    make, feed = site
    with make() as journal:
        journal.append([opened(1), one(1, 1)])
        begin(journal, feed)
        journal.append(
            [one(1, 2), opened(2, topic="storey"), one(2, 1), opened(3, node="control"), one(3, 1)]
        )
        with serving(journal), feed() as taker:
            taker.until(lambda: taker.data)
            assert taker.data == [b"1:2"]
            taker.until(lambda: taker.feed._follower.position == journal.durable and not taker.take())
        journal.append([one(1, 3), close_of(1, 4), opened(4), one(4, 1)])
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 2)
            assert (taker.data, taker.gaps) == ([b"1:3", b"4:1"], [])
        assert saved(tmp_path)["streams"] == {f"{4:016x}": [2, 1]}
        assert saved(tmp_path)["position"] == journal.end
        journal.service(time.monotonic_ns())
        assert journal.stores["watch"] == journal.end


def test_what_was_not_handled_comes_again_and_what_was_does_not(site, tmp_path):
    make, feed = site
    with make() as journal:
        begin(journal, feed)
        journal.append([opened(1), one(1, 1)])
        with serving(journal), feed() as taker:
            taker.until(lambda: taker.data)
        journal.append([one(1, 2)])
        with serving(journal), feed() as taker:
            while not taker.data:
                taker.take(is_done=False)
        journal.append([one(1, 3)])
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 2)
            assert taker.data == [b"1:2", b"1:3"]


def test_a_message_in_pieces_comes_whole_after_a_restart_in_its_middle(site, tmp_path):
    make, feed = site
    whole = os.urandom(3000)
    with make() as journal:
        begin(journal, feed)
        journal.append(
            [
                opened(1),
                opened(2),
                one(1, 1),
                piece(1, 2, whole[:1000], FLAG_FIRST | FLAG_CONTINUES, 1),
                one(2, 1),
                piece(1, 3, whole[1000:2000], FLAG_CONTINUES, 1),
            ]
        )
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 2)
            taker.until(lambda: not taker.take())
        assert saved(tmp_path)["streams"] == {f"{1:016x}": [2, 1], f"{2:016x}": [2, 1]}
        journal.append([piece(1, 4, whole[2000:], 0, 1, 1), one(2, 2)])
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 2)
            assert (taker.data, taker.gaps) == ([whole.strip(), b"2:2"], [])
        assert saved(tmp_path)["position"] == journal.end


def test_the_journal_is_not_trimmed_before_the_job_has_handled_it(site):
    make, feed = site
    with make() as journal:
        begin(journal, feed)
        journal.append([opened(1), *(one(1, seq) for seq in range(1, 200))])
        before = journal.begin
        with serving(journal):
            time.sleep(1.0)
        assert journal.begin == before
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 199)
            end = time.monotonic() + LIMIT_S
            while journal.begin == before:
                taker.take()
                assert time.monotonic() < end
                time.sleep(0.01)


def test_what_was_trimmed_or_dropped_is_told_exactly(site, tmp_path):
    make, feed = site
    with make() as journal:
        begin(journal, feed)
        journal.append([opened(1), one(1, 1), one(1, 2)])
        with serving(journal), feed() as taker:
            taker.until(lambda: len(taker.data) == 2)
        journal.append([one(1, seq) for seq in range(3, 300)])
        with serving(journal):
            end = time.monotonic() + LIMIT_S
            while journal.durable != journal.end:
                assert time.monotonic() < end
        journal.forget("watch")
        with serving(journal):
            time.sleep(0.5)
        assert journal.begin > saved(tmp_path)["position"]
        with serving(journal), feed() as taker:
            taker.until(lambda: taker.data and taker.data[-1] == b"1:299")
        ((first, rows),) = taker.gaps
        assert first == 3
        assert isinstance(rows, int) and rows > 0
        assert taker.data == [f"1:{seq}".encode() for seq in range(3 + rows, 300)]


def test_a_damaged_position_is_told_and_the_journals_own_is_taken(site, tmp_path):
    make, feed = site
    with make() as journal:
        begin(journal, feed)
        journal.append([opened(1), one(1, 1)])
        with serving(journal), feed() as taker:
            taker.until(lambda: taker.data)
            taker.until(lambda: not taker.take())
        for content in (b"", b"{", b'{"position": -1}', b'{"position": 5, "streams": {"x": [1, 1]}}'):
            (tmp_path / "jobs" / "watch.json").write_bytes(content)
            journal.append([one(1, journal.table.expected(1))])
            with serving(journal), feed() as taker:
                taker.until(lambda: taker.data and not taker.take())
                assert taker.gaps == []


WATCH = """
from edgedaq import *

class Watch(DAQJob):
    topics_to_subscribe = ("store.DAQJobStoreCSV",)
    def handle_message(self, message):
        with open(self.config.daq_job_unique_id + ".seen", "a") as file:
            for row in message.data:
                file.write(f"{message.source.node} {message.source.stream} {row[1]}\\n")
    def handle_gap(self, gap):
        with open("gaps", "a") as file:
            file.write(f"{gap}\\n")
"""


def rows_seen(path: Path) -> dict[str, list[int]]:
    """Return the numbers of each stream in the order in which they were first handled."""
    found: dict[str, dict[int, None]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        node, stream, number = line.split()
        assert node == "node-1"
        found.setdefault(stream, {}).setdefault(int(number))
    return {stream: list(numbers) for stream, numbers in found.items()}


def has_grown(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size > size


def test_a_job_of_the_control_room_sees_every_row_of_a_node_through_kills(tmp_path, runtime_dir):
    assert journal_feed.SAVE_EVERY_S < 1
    with Site(tmp_path, runtime_dir) as site:
        (site.aggregator_dir / "watch.py").write_text(WATCH)
        (site.aggregator_dir / "watch.toml").write_text(
            'daq_job_type = "watch.py:Watch"\nrestart_backoff = "50 ms"\n'
        )
        seen = tmp_path / "watch.seen"
        site.aggregator.start()
        registry = site.state_dir / "journal" / "stores.json"
        site.aggregator.wait(lambda: "watch" in registry.read_text(), LIMIT_S, "the job is registered")
        site.add_table_job(rate_hz=2000, batch_count=10)
        site.agent.start()
        for worker in ("watch", "intake", "watch", "uplink", ""):
            site.wait_put("table", 1000)
            count = seen.stat().st_size if seen.exists() else 0
            if worker == "uplink":
                site.agent.wait_replaced(worker, site.agent.kill_worker(worker))
            elif worker:
                site.aggregator.wait_replaced(worker, site.aggregator.kill_worker(worker))
            else:
                site.aggregator.kill_all()
                site.aggregator.start()
            site.aggregator.wait(partial(has_grown, seen, count), 20, "it goes on")
        site.agent.stop()
        total = site.put_count("table")
        site.remove_jobs()
        site.agent.start()
        site.aggregator.wait(
            lambda: sum(map(len, rows_seen(seen).values())) == total, 30, f"all {total} rows are seen"
        )
        for numbers in rows_seen(seen).values():
            assert numbers == list(range(len(numbers)))
        assert not (tmp_path / "gaps").exists()
        site.agent.stop()
        site.aggregator.stop()
