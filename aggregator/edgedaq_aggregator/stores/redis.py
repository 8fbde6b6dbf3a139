"""The Redis store: entries of streams, or samples of time series; see ``redis_server.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedaq.errors import StoreError

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.redis_reader import RedisReader
from edgedaq_aggregator.stores.redis_server import RedisServer
from edgedaq_aggregator.stores.redis_session import DAQJobStoreRedisConfig, Session
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

__all__ = ["DAQJobStoreRedis", "DAQJobStoreRedisConfig"]


class DAQJobStoreRedis(DAQJobStore):
    """Stores streams whose ``store_config`` has ``redis``."""

    key = "redis"
    config: DAQJobStoreRedisConfig
    config_type = DAQJobStoreRedisConfig

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:  # noqa: ARG002 -- no file
        """See ``DAQJobStore``."""
        return ServerBackend(RedisServer(self.config), state_dir, self._suspects)

    @classmethod
    def doubts(cls, config: Any) -> list[str]:
        """See ``DAQJobStore``."""
        try:
            session = Session(config)
        except StoreError as e:
            return [str(e)]
        try:
            found = session.persistence().doubt
        except StoreError as e:
            return [str(e)]
        finally:
            session.close()
        return [found] if found else []

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self._suspects = Suspects()


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a Redis store back."""
    return RedisReader(place)
