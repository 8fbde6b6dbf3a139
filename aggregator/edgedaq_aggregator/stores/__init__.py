"""Stores: one module per backend; the tables tell where each is, without importing it."""

from __future__ import annotations

__all__ = ["READERS", "STORES"]

STORES = {
    "DAQJobStoreCSV": "edgedaq_aggregator.stores.csv:DAQJobStoreCSV",
    "DAQJobStoreHDF5": "edgedaq_aggregator.stores.hdf5:DAQJobStoreHDF5",
    "DAQJobStoreParquet": "edgedaq_aggregator.stores.parquet:DAQJobStoreParquet",
    "DAQJobStoreROOT": "edgedaq_aggregator.stores.root:DAQJobStoreROOT",
    "DAQJobStoreRaw": "edgedaq_aggregator.stores.raw:DAQJobStoreRaw",
    "DAQJobStoreSQLite": "edgedaq_aggregator.stores.sqlite:DAQJobStoreSQLite",
    "DAQJobStoreMySQL": "edgedaq_aggregator.stores.mysql:DAQJobStoreMySQL",
    "DAQJobStoreRedis": "edgedaq_aggregator.stores.redis:DAQJobStoreRedis",
}

READERS = {
    "csv": "edgedaq_aggregator.stores.csv:make_reader",
    "hdf5": "edgedaq_aggregator.stores.hdf5:make_reader",
    "mysql": "edgedaq_aggregator.stores.mysql:make_reader",
    "parquet": "edgedaq_aggregator.stores.parquet:make_reader",
    "raw": "edgedaq_aggregator.stores.raw:make_reader",
    "redis": "edgedaq_aggregator.stores.redis:make_reader",
    "root": "edgedaq_aggregator.stores.root:make_reader",
    "sqlite": "edgedaq_aggregator.stores.sqlite:make_reader",
}
"""Key in ``store_config`` → what makes a ``reader.StoreReader`` of such a store."""
