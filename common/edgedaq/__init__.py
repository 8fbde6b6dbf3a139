"""What both sides share; the jobs of users import from here."""

from edgedaq.config import DAQJobConfig, RingOptions, StorableDAQJobConfig
from edgedaq.job import DAQJob, JobStopped
from edgedaq.messages import (
    DAQJobMessage,
    DAQJobMessageEvent,
    DAQJobMessageStorePyArrow,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
)
from edgedaq.schema import Column, Schema
from edgedaq.store_config import (
    DAQJobStoreConfig,
    DAQJobStoreConfigCSV,
    DAQJobStoreConfigHDF5,
    DAQJobStoreConfigMySQL,
    DAQJobStoreConfigRaw,
    DAQJobStoreConfigRedis,
    DAQJobStoreConfigROOT,
)

__all__ = [
    "Column",
    "DAQJob",
    "DAQJobConfig",
    "DAQJobMessage",
    "DAQJobMessageEvent",
    "DAQJobMessageStorePyArrow",
    "DAQJobMessageStoreRaw",
    "DAQJobMessageStoreTabular",
    "DAQJobStoreConfig",
    "DAQJobStoreConfigCSV",
    "DAQJobStoreConfigHDF5",
    "DAQJobStoreConfigMySQL",
    "DAQJobStoreConfigROOT",
    "DAQJobStoreConfigRaw",
    "DAQJobStoreConfigRedis",
    "JobStopped",
    "RingOptions",
    "Schema",
    "StorableDAQJobConfig",
]
