"""The oracle must be able to see each kind of failure, or the tests that trust it prove nothing."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import pytest

from tests.system.oracle import judge, judge_csv, judge_raw, witnessed
from tests.system.payload import COLUMNS, message_of, row_of

LIFE = 0x1234


def _pairs(*sequences: int) -> list[tuple[int, int]]:
    return [(LIFE, sequence) for sequence in sequences]


def test_a_complete_life_is_clean_with_or_without_the_put_that_had_not_returned():
    assert judge(_pairs(0, 1, 2), {LIFE: 3}, 1).is_clean
    assert judge(_pairs(0, 1, 2, 3), {LIFE: 3}, 1).is_clean


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        ((0, 2), "missing"),
        ((0, 1), "missing"),
        ((0, 1, 1, 2), "twice"),
        ((0, 2, 1), "disordered"),
        ((0, 1, 2, 4), "beyond"),
    ],
)
def test_each_fault_is_named(stored, fault):
    verdict = judge(_pairs(*stored), {LIFE: 3}, 1)
    assert not verdict.is_clean
    assert getattr(verdict, fault)
    assert fault in str(verdict)


def test_a_changed_cell_and_a_torn_line_are_corrupt(tmp_path: Path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row_of(LIFE, sequence) for sequence in range(3))
    assert judge_csv([path], {LIFE: 3}).is_clean
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\r\n")
    assert judge_csv([path], {LIFE: 3}).corrupt
    path.write_bytes(whole.replace(b"," + str(row_of(LIFE, 1)[2]).encode(), b",77", 1))
    assert judge_csv([path], {LIFE: 3}).corrupt


def test_a_changed_byte_in_a_raw_file_is_corrupt_and_what_follows_is_still_read(tmp_path: Path):
    path = tmp_path / "messages.bin"
    content = bytearray(b"".join(message_of(LIFE, sequence, 100) for sequence in range(3)))
    path.write_bytes(content)
    assert judge_raw(path, {LIFE: 3}).is_clean
    content[150] ^= 1
    path.write_bytes(content)
    verdict = judge_raw(path, {LIFE: 3})
    assert verdict.corrupt
    assert not verdict.missing


def test_witnesses_are_read_per_job_and_life(tmp_path: Path):
    (tmp_path / f"a.{LIFE:016x}.witness").write_bytes(struct.pack("<Q", 7))
    (tmp_path / f"ab.{LIFE:016x}.witness").write_bytes(struct.pack("<Q", 9))
    assert witnessed(tmp_path, "a") == {LIFE: 7}
