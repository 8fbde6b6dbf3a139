"""The keys of a Redis store, and what our own hash there tells; drawn in ``redis_server.py``."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from edgedaq.delivery import StreamState
from edgedaq.errors import ConfigError, WireError
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.store_config import DAQJobStoreConfigRedis

from edgedaq_aggregator.stores.watermarks import watermark_state

__all__ = ["accounts_in", "marks_key", "options_of", "own_key", "refuge_of"]

_KEY = "redis"
_MARKS = "_marks"
_KEY_BYTES_MAX = 512


def own_key(store: str) -> str:
    """Return the key of the hash of a store, given its id."""
    return f".edgedaq:{store}"


def marks_key(node: str) -> str:
    """Return the key of the stream of marks of a node."""
    return f"{node}:{_MARKS}"


def options_of(info: OpenInfo) -> DAQJobStoreConfigRedis:
    """Return what a stream asks for.

    Raises:
        ConfigError: It cannot be.
    """
    try:
        options = msgspec.convert(info.store_config.get(_KEY), DAQJobStoreConfigRedis)
    except msgspec.ValidationError as e:
        message = f"store_config.redis: {e}"
        raise ConfigError(message) from e
    if not options.key or len(options.key.encode("utf-8", "surrogatepass")) > _KEY_BYTES_MAX:
        message = f"key must have 1 to {_KEY_BYTES_MAX} bytes, got {options.key!r}"
        raise ConfigError(message)
    if options.key == _MARKS or not _is_text(options.key):
        message = f"key must be valid Unicode and not {_MARKS!r}, got {options.key!r}"
        raise ConfigError(message)
    return options


def refuge_of(stream: int) -> DAQJobStoreConfigRedis:
    """Return where a stream goes whose own key cannot be had."""
    return DAQJobStoreConfigRedis(key=f"_refused:{stream:016x}")


def accounts_in(found: Mapping[str, bytes]) -> list[StreamState]:
    """Return the accounts that our hash has."""
    accounts = []
    for name, data in found.items():
        if name.startswith("w:"):
            try:
                accounts.append(watermark_state(data, found.get(f"o:{name[2:]}", b"")))
            except WireError as e:
                log = get_logger()
                log.error("stream.unreadable", store="redis", stream=name[2:], reason=str(e))  # noqa: TRY400
    return accounts


def _is_text(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)
