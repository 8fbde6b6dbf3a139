"""The undo log: what it puts back, and that damage to it puts back nothing wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.commits import FileMark
from edgedaq_aggregator.stores.undo_log import UNDO_NAME, Range, UndoLog

BEFORE = b"0123456789"
MARK = FileMark(len(BEFORE), len(BEFORE), 7)
NEXT = FileMark(30, 30, 8)


def changed(base: Path, name: str = "data.root") -> UndoLog:
    """Return the log of a commit that has changed a file, and is not recorded."""
    (base / "out").mkdir(exist_ok=True)
    path = base / "out" / name
    path.write_bytes(BEFORE)
    undo = UndoLog(base, OsStorage(), {name: MARK})
    undo.add(name, [Range(2, BEFORE[2:4]), Range(8, BEFORE[8:])])
    undo.sync()
    path.write_bytes(b"01XX4567YYand more")
    return undo


def restored(base: Path, marks: dict[str, FileMark], name: str = "data.root") -> bytes:
    UndoLog(base, OsStorage(), marks).restore(base / "out")
    return (base / "out" / name).read_bytes()


def test_a_file_whose_commit_has_no_record_is_put_back_as_often_as_it_takes(tmp_path):
    changed(tmp_path).close()
    assert restored(tmp_path, {"data.root": MARK}) == BEFORE
    assert restored(tmp_path, {"data.root": MARK}) == BEFORE


@pytest.mark.parametrize("marks", [{"data.root": NEXT}, {}])
def test_a_file_that_is_recorded_or_not_ours_is_left_alone(tmp_path, marks):
    changed(tmp_path).close()
    assert restored(tmp_path, marks) == b"01XX4567YYand more"


def test_a_file_that_is_gone_or_a_link_is_left_alone(tmp_path):
    changed(tmp_path).close()
    outside = tmp_path / "outside"
    outside.write_bytes(b"of somebody")
    path = tmp_path / "out" / "data.root"
    path.unlink()
    UndoLog(tmp_path, OsStorage(), {"data.root": MARK}).restore(tmp_path / "out")
    assert not path.exists()
    path.symlink_to(outside)
    UndoLog(tmp_path, OsStorage(), {"data.root": MARK}).restore(tmp_path / "out")
    assert outside.read_bytes() == b"of somebody"


def test_two_changes_of_one_file_in_one_commit_are_undone_the_last_one_first(tmp_path):
    undo = changed(tmp_path)
    path = tmp_path / "out" / "data.root"
    undo.add("data.root", [Range(2, b"XX")])
    undo.sync()
    path.write_bytes(b"01ZZ4567YYand even more")
    undo.close()
    assert restored(tmp_path, {"data.root": MARK}) == BEFORE


def test_entries_of_an_older_longer_commit_are_never_taken_for_new_ones(tmp_path):
    undo = changed(tmp_path)
    undo.add("data.root", [Range(0, b"stale")])
    undo.sync()
    undo.begin_commit()
    undo.committed()
    undo.add("data.root", [Range(2, BEFORE[2:4]), Range(8, BEFORE[8:])])
    undo.sync()
    undo.close()
    assert restored(tmp_path, {"data.root": MARK}) == BEFORE


def test_entries_that_came_after_the_commit_was_begun_are_kept(tmp_path):
    undo = changed(tmp_path)
    undo.begin_commit()
    (tmp_path / "out" / "b.root").write_bytes(BEFORE)
    other = UndoLog(tmp_path / "none", OsStorage(), {})
    other.close()
    undo.add("data.root", [Range(0, BEFORE)])
    undo.sync()
    undo.committed()
    undo.close()
    assert restored(tmp_path, {"data.root": MARK}) == BEFORE


def test_a_cut_at_any_byte_restores_either_everything_or_nothing(tmp_path):
    changed(tmp_path).close()
    path, log = tmp_path / "out" / "data.root", tmp_path / UNDO_NAME
    written, after = log.read_bytes(), path.read_bytes()
    for length in range(len(written)):
        log.write_bytes(written[:length])
        assert restored(tmp_path, {"data.root": MARK}) == after, length


def test_no_flipped_bit_restores_anything(tmp_path):
    changed(tmp_path).close()
    path, log = tmp_path / "out" / "data.root", tmp_path / UNDO_NAME
    written, after = log.read_bytes(), path.read_bytes()
    for bit in range(8 * len(written)):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        log.write_bytes(damaged)
        assert restored(tmp_path, {"data.root": MARK}) == after, bit
