from __future__ import annotations

import struct
from pathlib import Path

import pytest
from edgedaq.delivery import StreamState
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.commits import LOG_NAME, Change, CommitLog, FileMark, read_commits

from tests.contract.faulty_storage import EndedHere, KilledStorage

STORAGE = OsStorage()
OPEN = b"an OPEN frame"


def account(stream: int, next_seq: int, rows: int, *, closed: bool = False) -> StreamState:
    return StreamState(stream, OPEN, next_seq, rows, next_row=rows, closed=closed)


def change(number: int) -> Change:
    return Change(
        number * 100,
        {f"n/f{number % 3}.csv": FileMark(number, number - 1, number)},
        [account(7, number, number)],
    )


def write(directory: Path, count: int) -> list[int]:
    """Commit ``count`` changes; return where in the file each one ends."""
    log = CommitLog(directory, "csv", STORAGE)
    ends = []
    for number in range(1, count + 1):
        log.append(change(number))
        ends.append(log._file.end)
    log.close()
    return ends


def position(directory: Path) -> int | None:
    return read_commits(directory, STORAGE)[0].position


def test_what_was_appended_is_the_state_of_the_next_opening(tmp_path):
    write(tmp_path, 5)
    log = CommitLog(tmp_path, "csv", STORAGE)
    state = log.state
    assert (state.position, state.store, state.clean, log.damage) == (500, "csv", False, "")
    assert state.files == {
        "n/f0.csv": FileMark(3, 2, 3),
        "n/f1.csv": FileMark(4, 3, 4),
        "n/f2.csv": FileMark(5, 4, 5),
    }
    assert state.table.streams == {7: account(7, 5, 5)}
    log.append(Change(600, {"n/f1.csv": None}, [account(7, 6, 6, closed=True)], clean=True))
    log.close()
    state, damage = read_commits(tmp_path, STORAGE)
    assert (state.position, state.clean, damage) == (600, True, "")
    assert set(state.files) == {"n/f0.csv", "n/f2.csv"}
    assert state.table.streams == {}
    assert state.table.tombstones == {7: account(7, 6, 6, closed=True)}


def test_a_log_cut_at_every_byte_is_what_was_whole_before(tmp_path):
    ends = write(tmp_path, 4)
    path = tmp_path / LOG_NAME
    whole = path.read_bytes()
    for cut in range(ends[0], ends[-1] + 8, 5):
        path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
        complete = sum(end <= cut for end in ends)
        # The padding of a record may be cut off without harm.
        assert position(tmp_path) in (complete * 100, min(complete + 1, 4) * 100)
        assert read_commits(tmp_path, STORAGE)[1] == ""


def test_a_flip_anywhere_is_seen_and_what_lies_behind_it_still_counts(tmp_path):
    ends = write(tmp_path, 4)
    path = tmp_path / LOG_NAME
    whole = bytearray(path.read_bytes())
    for at in range(ends[1], ends[2], 3):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        state, damage = read_commits(tmp_path, STORAGE)
        assert state.position == 400
        assert "damaged" in damage or flipped[at] == 0x10  # its padding
    for at in range(24):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        state, damage = read_commits(tmp_path, STORAGE)
        assert state.position is None
        assert damage


def test_a_damaged_log_is_put_aside_and_the_store_starts(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / LOG_NAME
    damaged = bytearray(path.read_bytes())
    damaged[70] ^= 0xFF
    path.write_bytes(damaged)
    log = CommitLog(tmp_path, "csv", STORAGE)
    assert log.damage
    log.append(change(9))
    log.close()
    assert (tmp_path / f"{LOG_NAME}.bad").read_bytes() == damaged
    assert position(tmp_path) == 900


def test_records_of_an_older_file_are_never_read_as_new(tmp_path):
    ends = write(tmp_path, 4)
    path = tmp_path / LOG_NAME
    older = path.read_bytes()
    CommitLog(tmp_path, "csv", STORAGE).close()
    fresh = path.read_bytes()
    head = fresh.rstrip(b"\0")
    start = (len(head) + 7) & ~7
    path.write_bytes(fresh[:start] + older[ends[0] : ends[-1]] + fresh[start + ends[-1] - ends[0] :])
    assert position(tmp_path) == 400
    assert read_commits(tmp_path, STORAGE)[1] == ""


def test_a_record_that_comes_twice_counts_once(tmp_path):
    ends = write(tmp_path, 3)
    path = tmp_path / LOG_NAME
    whole = path.read_bytes()
    record = whole[ends[0] : ends[1]]
    path.write_bytes(whole[: ends[2]] + record + whole[ends[2] + len(record) :])
    state, damage = read_commits(tmp_path, STORAGE)
    assert (state.position, damage) == (300, "")


def test_a_full_log_is_replaced_by_its_state_at_any_moment(tmp_path):
    big = {f"n/{'x' * 200}{number}.csv": FileMark(number) for number in range(400)}
    at = 0
    while True:
        directory = tmp_path / str(at)
        log = (
            CommitLog(directory, "csv", KilledStorage(at)) if at > 4 else CommitLog(directory, "csv", STORAGE)
        )
        done = 0
        try:
            for number in range(1, 15):
                log.append(Change(number, dict(big), [account(number, number, number)]))
                done = number
        except EndedHere:
            log.close()
            state, damage = read_commits(directory, STORAGE)
            assert damage == ""
            assert (state.position or 0) in (done, done + 1)
            assert len(state.table.streams) == (state.position or 0)
            at += 1
            continue
        log.close()
        if at > 4:
            break
        at = 5
    assert at > 10


def test_only_one_process_has_a_log(tmp_path):
    log = CommitLog(tmp_path, "csv", STORAGE)
    with pytest.raises(BlockingIOError):
        CommitLog(tmp_path, "csv", STORAGE)
    log.close()
    CommitLog(tmp_path, "csv", STORAGE).close()


def test_payloads_of_other_types_are_passed_over(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / LOG_NAME
    image = bytearray(path.read_bytes())
    # A map that is valid msgpack, and valid by its checksum, but not what is drawn.
    from edgedaq.frame import pack_map
    from xxhash import xxh3_64_intdigest

    payload = pack_map({"position": "far", "files": [], "streams": 5, "opens": None})
    head = bytes(image[8:16]) + struct.pack("<II", len(payload), 0)
    record = head + struct.pack("<Q", xxh3_64_intdigest(head + payload)) + payload
    image[64:] = record.ljust(len(image) - 64, b"\0")
    path.write_bytes(image)
    assert position(tmp_path) is None
