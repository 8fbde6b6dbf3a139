"""The MySQL store: rows of tables; see ``mysql_server.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedaq.errors import StoreError

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.mysql_reader import MySQLReader
from edgedaq_aggregator.stores.mysql_server import MySQLServer, weakness_text
from edgedaq_aggregator.stores.mysql_session import DAQJobStoreMySQLConfig, Session
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

__all__ = ["DAQJobStoreMySQL", "DAQJobStoreMySQLConfig"]


class DAQJobStoreMySQL(DAQJobStore):
    """Stores streams whose ``store_config`` has ``mysql``."""

    key = "mysql"
    config: DAQJobStoreMySQLConfig
    config_type = DAQJobStoreMySQLConfig

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:  # noqa: ARG002 -- no file
        """See ``DAQJobStore``."""
        return ServerBackend(MySQLServer(self.config), state_dir, self._suspects)

    @classmethod
    def doubts(cls, config: Any) -> list[str]:
        """See ``DAQJobStore``."""
        try:
            session = Session(config)
        except StoreError as e:
            return [str(e)]
        try:
            traits = session.traits()
        except StoreError as e:
            return [str(e)]
        finally:
            session.close()
        found = [weakness_text(traits)] if traits.weakness else []
        if not traits.has_load_data:
            found.append("local_infile is OFF: rows are inserted, at a third of the speed")
        return found

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self._suspects = Suspects()


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a MySQL store back."""
    return MySQLReader(place)
