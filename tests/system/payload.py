"""What the witness jobs put and the oracle expects: every value follows from (life, sequence).

A raw message is drawn so that a file of them, back to back, can be read again::

    offset  size  field
         0     4  magic      b"WITN"
         4     4  length     of the whole message
         8     8  life       random, below 2**63
        16     8  sequence   0, 1, 2, ... in the life
        24     8  check      ``check_of(life, sequence)``
        32        the check's 8 bytes, repeated up to the length
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

MAGIC = b"WITN"
HEADER = struct.Struct("<4sIQQQ")
COLUMNS = ("life", "sequence", "check", "value")

_PAIR = struct.Struct("<QQ")


def check_of(life: int, sequence: int) -> int:
    """Return 63 bits that only this pair has."""
    return xxh3_64_intdigest(_PAIR.pack(life, sequence)) >> 1


def row_of(life: int, sequence: int) -> list[object]:
    """Return one row of a table; ``value`` exercises the way of a float through text and back."""
    check = check_of(life, sequence)
    return [life, sequence, check, check / 7]


def message_of(life: int, sequence: int, length: int) -> bytes:
    """Return one raw message of ``length`` bytes, at least 32."""
    check = check_of(life, sequence)
    filler = check.to_bytes(8, "little")
    body = filler * ((length - HEADER.size) // 8 + 1)
    return HEADER.pack(MAGIC, length, life, sequence, check) + body[: length - HEADER.size]
