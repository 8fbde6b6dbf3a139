from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import pytest
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, Kind
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.commits import read_commits
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.raw import RawFormat

from tests.contract.faulty_storage import EndedHere, KilledStorage
from tests.contract.file_contract import AppendStoreContract
from tests.contract.store_feed import NODE, T0_NS, Feed

PAIR = struct.Struct("<qd")


class TestStoreRaw(AppendStoreContract):
    key = "raw"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(RawFormat(), base / "state", base / "out", storage)

    def read_pairs(self, base, name):
        return list(PAIR.iter_unpack((base / "out" / NODE / name).read_bytes()))

    def read_marks(self, base):
        path = base / "out" / NODE / "_marks.raw.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def put_bad_frame(self, feed: Feed, stream: int) -> int:
        return feed.put(Kind.RAW, stream, b"\xff\xff\xff\xff", rows=10).seq

    def data(self, base: Path, name: str = "data.dat") -> bytes:
        path = base / "out" / NODE / name
        return path.read_bytes() if path.exists() else b""

    def raw_feed(self, **options: Any) -> Feed:
        feed = Feed()
        feed.open(1, self.config(**options), form="raw", schema=None)
        return feed

    def test_messages_lie_back_to_back(self, tmp_path):
        feed = self.raw_feed()
        feed.messages(1, [b"one", b"", b"three"])
        feed.messages(1, [b"x" * 100_000])
        self.feed_all(tmp_path, feed)
        assert self.data(tmp_path) == b"onethree" + b"x" * 100_000

    def test_a_length_before_each_message_tells_where_it_ends(self, tmp_path):
        feed = self.raw_feed(length_prefix=True)
        feed.messages(1, [b"one", b""])
        feed.pieces(1, [b"ab", b"cd", b"e"])
        self.feed_all(tmp_path, feed)
        assert self.data(tmp_path) == b"\3\0\0\0one\0\0\0\0\5\0\0\0abcde"

    def test_a_message_in_pieces_is_stored_whole_between_the_messages_of_another_stream(self, tmp_path):
        feed = self.raw_feed()
        feed.open(2, self.config(), form="raw", schema=None)
        whole = [bytes([65 + index]) * 1000 for index in range(6)]
        for index, piece in enumerate(whole):
            flags = FLAG_PIECE | (FLAG_CONTINUES if index < 5 else 0) | (0 if index else FLAG_FIRST)
            feed.put(Kind.RAW, 1, piece, rows=int(index == 5), flags=flags)
            feed.messages(2, [b"-%d-" % index])
        self.feed_all(tmp_path, feed, per_commit=1)
        stored = self.data(tmp_path)
        assert b"".join(whole) in stored
        assert stored.replace(b"".join(whole), b"") == b"".join(b"-%d-" % index for index in range(6))

    @pytest.mark.parametrize("per_commit", [1, 2, 50])
    def test_the_tail_of_a_message_that_comes_after_a_restart_makes_it_whole(self, tmp_path, per_commit):
        feed = self.raw_feed()
        feed.open(2, self.config("b.dat"), form="raw", schema=None)
        feed.pieces(1, [b"ab", b"cd"], has_last=False)
        feed.messages(2, [b"other"])
        self.feed_all(tmp_path, feed, per_commit=per_commit)
        assert self.data(tmp_path) == b""
        assert self.data(tmp_path, "b.dat") == b"other"
        feed.pieces(1, [b"ef", b"gh"], has_first=False)
        feed.messages(2, [b"more"])
        self.feed_all(tmp_path, feed, per_commit=per_commit)
        assert self.data(tmp_path) == b"abcdefgh"
        assert self.data(tmp_path, "b.dat") == b"othermore"

    @pytest.mark.parametrize("how", ["close", "gap", "skip", "message"])
    def test_a_message_of_which_the_tail_never_comes_is_not_stored(self, tmp_path, how):
        feed = self.raw_feed()
        feed.messages(1, [b"before"])
        feed.pieces(1, [b"ab", b"cd"], has_last=False)
        if how == "gap":
            feed.gap(1, 2, 1, "dropped")
        elif how == "skip":
            feed.skip(1, 2, 1)
        if how == "close":
            feed.close(1, tail_unknown=True)
        else:
            feed.messages(1, [b"after"])
        self.feed_all(tmp_path, feed)
        assert self.data(tmp_path) == (b"before" if how == "close" else b"beforeafter")
        marks = self.read_marks(tmp_path)
        assert "4 bytes was not stored" in marks[0]["reason"]
        assert (marks[0]["first_seq"], marks[0]["last_seq"], marks[0]["rows"]) == ("2", "3", "0")

    def test_a_torn_message_behind_a_gap_is_counted_as_missing(self, tmp_path):
        feed = self.raw_feed()
        feed.messages(1, [b"before"])
        feed.gap(1, 3, 1, "dropped")
        feed.pieces(1, [b"of its", b"tail"], has_first=False)
        feed.pieces(1, [b"who", b"le"])
        self.feed_all(tmp_path, feed)
        assert self.data(tmp_path) == b"beforewhole"
        assert [(mark["kind"], mark["rows"]) for mark in self.read_marks(tmp_path)] == [
            ("gap", "1"),
            ("refused", "1"),
        ]
        state, _ = read_commits(tmp_path / "state", OsStorage())
        account = state.table.streams[1]
        assert (account.rows, account.gap_rows, account.next_row) == (2, 2, 4)

    def test_pieces_survive_an_end_at_any_operation(self, tmp_path):
        feed = self.raw_feed()
        feed.open(2, self.config("b.dat"), form="raw", schema=None)
        for index in range(3):
            feed.pieces(1, [b"%d-ab" % index, b"cd"], has_last=False)
            feed.messages(2, [b"<%d>" % index])
            feed.pieces(1, [b"ef", b"."], has_first=False)
        for at in range(200):
            base = tmp_path / str(at)
            try:
                self.feed_all(base, feed, KilledStorage(at), per_commit=1)
            except EndedHere:
                self.feed_all(base, feed)
            else:
                break
            assert self.data(base) == b"0-abcdef.1-abcdef.2-abcdef."
            assert self.data(base, "b.dat") == b"<0><1><2>"
        assert at > 20

    def test_general_columns_are_stored_as_their_bodies(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        frame = feed.rows(1, [[1, None]], general=True)
        self.feed_all(tmp_path, feed)
        assert self.data(tmp_path) == bytes(frame.body)

    def test_a_message_in_pieces_stays_whole_beside_a_damaged_frame_and_over_midnight(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(length_prefix=True, add_date=True), form="raw", schema=None)
        self.put_bad_frame(feed, 1)
        feed.put(Kind.RAW, 1, b"head ", flags=FLAG_PIECE | FLAG_FIRST | FLAG_CONTINUES, t_first_ns=T0_NS - 1)
        feed.put(Kind.RAW, 1, b"tail", rows=1, flags=FLAG_PIECE, t_first_ns=T0_NS)
        feed.messages(1, [b"next"], t_ns=T0_NS)
        refusals = self.feed_all(tmp_path, feed)
        assert [refusal.frame.seq for refusal in refusals] == [1]
        assert self.data(tmp_path, "2026-04-30_data.dat") == b"\x09\0\0\0head tail"
        assert self.data(tmp_path, "2026-05-01_data.dat") == b"\x04\0\0\0next"

    def test_a_damaged_frame_just_before_a_message_in_pieces_does_not_tear_it(self, tmp_path):
        feed = self.raw_feed(length_prefix=True)
        self.put_bad_frame(feed, 1)
        feed.pieces(1, [b"head ", b"tail"])
        self.feed_all(tmp_path, feed, per_commit=10)
        assert self.data(tmp_path) == b"\x09\0\0\0head tail"
