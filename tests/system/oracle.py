"""Judges stored files against what the witness jobs put: nothing missing, nothing twice, nothing changed.

It reads the files alone and shares no code with the product.
"""

from __future__ import annotations

import csv
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.payload import COLUMNS, HEADER, MAGIC, message_of, row_of


@dataclass
class Verdict:
    """What is wrong, per life: all empty when the promise was kept.

    ``missing`` are sequences that put had returned for and that no file holds; ``beyond`` are stored ones
    that are more than one batch past the last put that returned.
    """

    stored_count: int = 0
    lives_count: int = 0
    missing: dict[int, list[int]] = field(default_factory=dict)
    twice: dict[int, list[int]] = field(default_factory=dict)
    disordered: dict[int, list[int]] = field(default_factory=dict)
    beyond: dict[int, list[int]] = field(default_factory=dict)
    corrupt: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Tell whether nothing is wrong."""
        return not (self.missing or self.twice or self.disordered or self.beyond or self.corrupt)

    @property
    def missing_count(self) -> int:
        """Return how many rows are missing in all lives."""
        return sum(len(sequences) for sequences in self.missing.values())

    def __str__(self) -> str:
        parts = [f"{self.stored_count} stored of {self.lives_count} lives"]
        for name in ("missing", "twice", "disordered", "beyond"):
            for life, sequences in getattr(self, name).items():
                parts.append(f"{name} in life {life:016x}: {len(sequences)} ({_ranges(sequences)})")
        parts += self.corrupt[:5]
        return "\n".join(parts)


def witnessed(witness_dir: Path, job: str) -> dict[int, int]:
    """Return per life of a job how many rows put had returned for."""
    found = {}
    for path in witness_dir.glob(f"{job}.*.witness"):
        life = int(path.name.split(".")[-2], 16)
        content = path.read_bytes()
        found[life] = struct.unpack("<Q", content)[0] if len(content) == 8 else 0
    return found


def judge(pairs: Iterable[tuple[int, int]], put: dict[int, int], batch_count: int) -> Verdict:
    """Judge the (life, sequence) pairs of one job, in the order of the file, against what was put."""
    verdict = Verdict(lives_count=len(put))
    seen: dict[int, set[int]] = {life: set() for life in put}
    newest: dict[int, int] = {}
    for life, sequence in pairs:
        verdict.stored_count += 1
        if life not in seen:
            verdict.beyond.setdefault(life, []).append(sequence)
            continue
        if sequence in seen[life]:
            verdict.twice.setdefault(life, []).append(sequence)
        elif sequence < newest.get(life, -1):
            verdict.disordered.setdefault(life, []).append(sequence)
        seen[life].add(sequence)
        newest[life] = max(sequence, newest.get(life, -1))
    for life, count in put.items():
        if missing := sorted(set(range(count)) - seen[life]):
            verdict.missing[life] = missing
        if beyond := sorted(sequence for sequence in seen[life] if sequence >= count + batch_count):
            verdict.beyond[life] = beyond
    return verdict


def judge_csv(paths: Iterable[Path], put: dict[int, int], batch_count: int = 1) -> Verdict:
    """Judge CSV files that hold the rows of one table job."""
    corrupt: list[str] = []
    verdict = judge(_csv_pairs(paths, corrupt), put, batch_count)
    verdict.corrupt = corrupt
    return verdict


def judge_raw(path: Path, put: dict[int, int], batch_count: int = 1) -> Verdict:
    """Judge a file that holds the messages of one raw job back to back."""
    corrupt: list[str] = []
    verdict = judge(_raw_pairs(path, corrupt), put, batch_count)
    verdict.corrupt = corrupt
    return verdict


def _csv_pairs(paths: Iterable[Path], corrupt: list[str]) -> Iterator[tuple[int, int]]:
    for path in sorted(paths):
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            if header != list(COLUMNS):
                corrupt.append(f"{path.name}: header {header}")
            for number, cells in enumerate(rows, start=2):
                try:
                    life, sequence, check, value = (
                        int(cells[0]),
                        int(cells[1]),
                        int(cells[2]),
                        float(cells[3]),
                    )
                except (ValueError, IndexError):
                    corrupt.append(f"{path.name}:{number}: {cells}")
                    continue
                if [life, sequence, check, value] != row_of(life, sequence) or len(cells) != len(COLUMNS):
                    corrupt.append(f"{path.name}:{number}: {cells}")
                yield life, sequence


def _raw_pairs(path: Path, corrupt: list[str]) -> Iterator[tuple[int, int]]:
    content = path.read_bytes() if path.exists() else b""
    position = 0
    while position < len(content):
        if len(content) - position < HEADER.size:
            corrupt.append(f"{path.name}: {len(content) - position} bytes of a message at {position}")
            return
        magic, length, life, sequence, _ = HEADER.unpack_from(content, position)
        if magic != MAGIC or length < HEADER.size:
            corrupt.append(f"{path.name}: no message at {position}")
            position = content.find(MAGIC, position + 1)
            if position < 0:
                return
            continue
        if content[position : position + length] != message_of(life, sequence, length):
            corrupt.append(f"{path.name}: message at {position} was changed")
        yield life, sequence
        position += length


def _ranges(numbers: list[int]) -> str:
    """Return e.g. ``3-7 9`` for the first few runs of sorted or unsorted numbers."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = " ".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs[:6])
    return text + (" ..." if len(runs) > 6 else "")
