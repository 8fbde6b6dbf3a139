"""The superblock of an HDF5 file: marked as nobody's, so that everybody can open the file at any time.

A library that writes marks the file as being written; one that was killed leaves it so, and readers are told
to repair it. Our files are complete after each commit, so the mark is taken out of what is written. Drawn in
"HDF5 File Format Specification Version 3.0", II.A, version 3::

    offset  size
         0     8  signature   89 48 44 46 0d 0a 1a 0a
         8     1  version     3
         9     2  sizes of offsets and lengths, 8 and 8
        11     1  flags       bit 0: open for writing, bit 2: so by SWMR
        12    32  base, extension, end of file, root
        44     4  checksum    Bob Jenkins' lookup3 ("hashlittle") of bytes 0 .. 44
"""

from __future__ import annotations

__all__ = ["SUPERBLOCK_BYTES", "unmarked"]

SUPERBLOCK_BYTES = 48
_SIGNATURE = b"\x89HDF\r\n\x1a\n\x03\x08\x08"
_FLAGS_AT = 11
_CHECK_AT = 44
_MASK = 0xFFFFFFFF


def unmarked(superblock: bytes) -> bytes:
    """Return a superblock without its marks.

    Raises:
        ValueError: It is not one of version 3, or its checksum is wrong.
    """
    if superblock[:_FLAGS_AT] != _SIGNATURE or len(superblock) != SUPERBLOCK_BYTES:
        message = f"an HDF5 superblock of version 3 must begin with {_SIGNATURE!r}, got {superblock[:11]!r}"
        raise ValueError(message)
    if lookup3(superblock[:_CHECK_AT]) != int.from_bytes(superblock[_CHECK_AT:], "little"):
        message = "the checksum of an HDF5 superblock is wrong"
        raise ValueError(message)
    clear = superblock[:_FLAGS_AT] + b"\0" + superblock[_FLAGS_AT + 1 : _CHECK_AT]
    return clear + lookup3(clear).to_bytes(4, "little")


def lookup3(data: bytes) -> int:
    """Return lookup3 of some bytes, at least one; http://burtleburtle.net/bob/c/lookup3.c (public domain)."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    words += [0] * (-len(words) % 3)
    for at in range(0, len(words) - 3, 3):
        a, b, c = _mixed(a + words[at], b + words[at + 1], c + words[at + 2])
    a, b, c = (value & _MASK for value in (a + words[-3], b + words[-2], c + words[-1]))
    c = ((c ^ b) - _turned(b, 14)) & _MASK
    a = ((a ^ c) - _turned(c, 11)) & _MASK
    b = ((b ^ a) - _turned(a, 25)) & _MASK
    c = ((c ^ b) - _turned(b, 16)) & _MASK
    a = ((a ^ c) - _turned(c, 4)) & _MASK
    b = ((b ^ a) - _turned(a, 14)) & _MASK
    return ((c ^ b) - _turned(b, 24)) & _MASK


def _mixed(a: int, b: int, c: int) -> tuple[int, int, int]:
    for first, second in ((4, 6), (8, 16), (19, 4)):
        a = ((a - c) & _MASK) ^ _turned(c & _MASK, first)
        c = (c + b) & _MASK
        b = ((b - a) & _MASK) ^ _turned(a, second)
        a = (a + c) & _MASK
        c, a, b = b, c, a
    return a, b, c


def _turned(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _MASK
