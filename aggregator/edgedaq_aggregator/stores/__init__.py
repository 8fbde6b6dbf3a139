"""Stores: one module per backend; the table tells where each is, without importing it."""

from __future__ import annotations

__all__ = ["STORES"]

STORES = {
    "DAQJobStoreCSV": "edgedaq_aggregator.stores.csv:DAQJobStoreCSV",
    "DAQJobStoreRaw": "edgedaq_aggregator.stores.raw:DAQJobStoreRaw",
}
