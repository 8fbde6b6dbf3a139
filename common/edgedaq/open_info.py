"""What OPEN tells about a stream: who puts it, its topics, its columns, and where it is to be stored.

The body is a msgpack map of the fields of ``OpenInfo``; a reader ignores keys that it does not know, so a
newer minor version may add some.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from edgedaq.columns import Schema
from edgedaq.errors import ConfigError, JobError, WireError
from edgedaq.frame import Frame, Kind, encode, pack_map, unpack_map
from edgedaq.names import check_name, check_topic

__all__ = ["TAG_BYTES_MAX", "TOPICS_MAX", "OpenInfo", "decode_open", "encode_open"]

TOPICS_MAX = 16
TAG_BYTES_MAX = 256
_TEXT_BYTES_MAX = 256
_LIFE = re.compile(r"[0-9a-f]{16}\Z")


class OpenInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one stream.

    ``schema`` is None for raw and event streams, and for tables of which ``arrow_schema`` (Arrow IPC schema
    message) tells the columns. ``life`` is 16 hex digits; ``boot`` names the boot that the monotonic times of
    its frames belong to; ``store_config`` has one entry per store that takes the stream, unchecked.
    """

    node: str
    job: str
    job_type: str
    life: str
    boot: str
    topics: tuple[str, ...]
    form: Literal["table", "raw", "event"]
    tag: str = ""
    schema: Schema | None = None
    store_config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    t_open_ns: int = 0
    arrow_schema: bytes = b""


def encode_open(stream: int, info: OpenInfo) -> bytes:
    """Return the OPEN frame of a stream."""
    body = pack_map(msgspec.to_builtins(info, builtin_types=(bytes,)))
    return encode(Kind.OPEN, stream, 0, body, t_first_ns=info.t_open_ns)


def decode_open(frame: Frame) -> OpenInfo:
    """Return what an OPEN frame tells, checked: names, topics, schema, sizes.

    Raises:
        WireError: Something in it is not valid.
    """
    if frame.kind is not Kind.OPEN:
        message = f"expected an OPEN frame, got {frame.kind.name}"
        raise WireError(message)
    try:
        info = msgspec.convert(unpack_map(frame.body), OpenInfo)
        check_name("node", info.node)
        check_name("job", info.job)
        for topic in info.topics:
            check_topic(topic)
    except (msgspec.ValidationError, ConfigError, JobError) as e:
        message = f"OPEN of stream {frame.stream:016x}: {e}"
        raise WireError(message) from e
    wrong = _wrong(info)
    if wrong:
        message = f"OPEN of stream {frame.stream:016x}: {wrong}"
        raise WireError(message)
    return info


def _wrong(info: OpenInfo) -> str:
    if len(info.topics) > TOPICS_MAX:
        return f"at most {TOPICS_MAX} topics, got {len(info.topics)}"
    if not _LIFE.match(info.life):
        return f"life must be 16 hex digits, got {info.life!r}"
    for what, text, limit in (
        ("tag", info.tag, TAG_BYTES_MAX),
        ("boot", info.boot, _TEXT_BYTES_MAX),
        ("job_type", info.job_type, _TEXT_BYTES_MAX),
    ):
        if len(text.encode()) > limit or not (text.isprintable()):
            return f"{what} must be printable text of at most {limit} bytes, got {text!r}"
    if not -(2**63) <= info.t_open_ns < 2**63:
        return f"t_open_ns must be an int64, got {info.t_open_ns}"
    if (info.form == "table") != (info.schema is not None or bool(info.arrow_schema)):
        return f"a table needs a schema and nothing else has one, got form {info.form!r}"
    return ""
