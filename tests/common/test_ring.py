from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from edgedaq.claim_files import sweep_rings
from edgedaq.errors import JobError, WireError
from edgedaq.ring import Identity, ProducedRing, is_alive, is_own, map_ring
from edgedaq.ring_layout import HEADER_AREA_BYTES, W_PUBLISHED, plan_layout, read_layout, write_header
from hypothesis import given
from hypothesis import strategies as st

from tests.common.producing import ROOT

IDENTITY = Identity("node", "job", "Type", "00000000000000ab", "boot", {"up": ["store"]})


def made(directory: Path) -> ProducedRing:
    return ProducedRing(directory, IDENTITY, ring_bytes=1 << 16, slot_bytes=4096, slots=3)


def header() -> bytearray:
    layout = plan_layout(IDENTITY, 5, 1 << 16, 4096, 3)
    buffer = bytearray(layout.file_bytes)
    write_header(memoryview(buffer), layout)
    return buffer


@given(ring_bytes=st.integers(1, 1 << 22), slot_bytes=st.integers(1, 1 << 17), slots=st.integers(1, 20))
def test_areas_follow_each_other_and_never_overlap(ring_bytes: int, slot_bytes: int, slots: int) -> None:
    layout = plan_layout(IDENTITY, 5, ring_bytes, slot_bytes, slots)
    assert layout.ring_bytes >= ring_bytes
    assert layout.slot_bytes >= slot_bytes
    assert layout.entry_offset(256) == layout.opens_offset
    assert layout.opens_offset + layout.opens_bytes == layout.slots_offset
    assert layout.slot_offset(slots) <= layout.data_offset
    assert layout.data_offset % 8 == layout.slot_offset(1) % 64 == layout.ring_bytes % 8 == 0
    assert layout.slot_stride >= 64 + 4 * layout.slot_ends + layout.slot_bytes


def test_a_header_is_read_as_it_was_written() -> None:
    assert read_layout(memoryview(header())) == plan_layout(IDENTITY, 5, 1 << 16, 4096, 3)


def test_the_words_lie_where_the_drawing_says(runtime_dir: Path) -> None:
    ring = made(runtime_dir)
    layout = ring.layout
    layout.header_words(ring.buffer)[W_PUBLISHED] = 0x1122334455667788
    words, ends, data = layout.slot_parts(ring.buffer, 1)
    words[3] = 7 << 32 | 9
    ends[0] = 0xAABBCCDD
    data[0] = 0xEE
    raw = ring.path.read_bytes()
    del words, ends, data
    ring.close()
    at = layout.slots_offset + layout.slot_stride
    assert raw[:8] == b"EDQRING\1"
    assert raw[128:136] == 0x1122334455667788.to_bytes(8, "little")
    assert raw[at + 24 : at + 32] == (7 << 32 | 9).to_bytes(8, "little")
    assert raw[at + 64 : at + 68] == 0xAABBCCDD.to_bytes(4, "little")
    assert raw[at + 64 + 4 * layout.slot_ends] == 0xEE
    assert len(raw) == layout.data_offset + layout.ring_bytes


def test_every_flipped_byte_of_a_header_is_seen() -> None:
    whole = header()
    identity_end = 512 + int.from_bytes(whole[88:96], "little")
    for index in [*range(104), *range(512, identity_end)]:
        damaged = bytearray(whole)
        damaged[index] ^= 0x10
        with pytest.raises(WireError):
            read_layout(memoryview(damaged))


def test_a_file_that_is_no_ring_is_refused(runtime_dir: Path) -> None:
    path = runtime_dir / "x.ring"
    for content in (b"", b"EDQRING\1", bytes(HEADER_AREA_BYTES), b"EDQRING\2" + bytes(8192)):
        path.write_bytes(content)
        with pytest.raises(WireError, match=r"x\.ring"):
            map_ring(path)


def test_a_ring_is_allocated_in_full_and_for_its_user_alone(runtime_dir: Path) -> None:
    ring = made(runtime_dir)
    facts = ring.path.stat()
    ring.close(unlink=True)
    assert facts.st_blocks * 512 >= facts.st_size == ring.layout.file_bytes
    assert facts.st_mode & 0o777 == 0o600
    assert list(runtime_dir.iterdir()) == []


def test_a_ring_that_does_not_fit_is_refused_in_words_and_leaves_nothing(runtime_dir: Path) -> None:
    with pytest.raises(JobError, match=r"No space left.*bytes are free"):
        ProducedRing(runtime_dir, IDENTITY, ring_bytes=1 << 46, slot_bytes=4096, slots=3)
    assert list(runtime_dir.iterdir()) == []
    assert not is_own(IDENTITY.life)


def test_an_identity_without_room_is_refused(runtime_dir: Path) -> None:
    claims = {"up": [f"topic{n}" for n in range(1000)]}
    identity = Identity("node", "job", "Type", "00000000000000ab", "boot", claims)
    with pytest.raises(JobError, match="identity"):
        ProducedRing(runtime_dir, identity, ring_bytes=1 << 16, slot_bytes=4096, slots=3)
    assert list(runtime_dir.iterdir()) == []


def test_the_kernel_tells_of_the_death_of_a_producer(runtime_dir: Path) -> None:
    code = (
        "import sys, pathlib; from edgedaq.ring import *\n"
        "identity = Identity('n', 'j', 'T', '00000000000000ab', 'b')\n"
        "ring = ProducedRing(pathlib.Path(sys.argv[1]), identity, ring_bytes=8192, slot_bytes=64, slots=1)\n"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(runtime_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "common")},
    ) as process:
        assert process.stdout
        process.stdout.readline()
        fd, mapped, _ = map_ring(runtime_dir / "00000000000000ab.ring")
        assert is_alive(fd)
        assert is_alive(fd), "asking takes nothing"
        other, other_map, _ = map_ring(runtime_dir / "00000000000000ab.ring")
        os.close(other)
        assert is_alive(fd)
        process.kill()
        process.wait()
        assert not is_alive(fd)
    os.close(fd)
    mapped.close()
    other_map.close()
    sweep_rings(runtime_dir)
    assert list(runtime_dir.iterdir()) == [], "nobody has a claim on it"


def test_what_a_producer_left_that_died_while_it_made_its_ring_is_swept(runtime_dir: Path) -> None:
    abandoned = runtime_dir / ".00000000000000ac.new"
    abandoned.write_bytes(bytes(100))
    sweep_rings(runtime_dir)
    assert not abandoned.exists()
