"""What both sides share; the jobs of users import from here."""

from edgedaq.config import DAQJobConfig, InputOptions, RingOptions, StorableDAQJobConfig
from edgedaq.job import DAQJob, JobStopped
from edgedaq.messages import (
    DAQJobMessage,
    DAQJobMessageEvent,
    DAQJobMessageGap,
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
    DAQJobStoreConfigParquet,
    DAQJobStoreConfigRaw,
    DAQJobStoreConfigRedis,
    DAQJobStoreConfigROOT,
    DAQJobStoreConfigSQLite,
)

__all__ = [
    "Column",
    "DAQJob",
    "DAQJobConfig",
    "DAQJobMessage",
    "DAQJobMessageEvent",
    "DAQJobMessageGap",
    "DAQJobMessageStorePyArrow",
    "DAQJobMessageStoreRaw",
    "DAQJobMessageStoreTabular",
    "DAQJobStoreConfig",
    "DAQJobStoreConfigCSV",
    "DAQJobStoreConfigHDF5",
    "DAQJobStoreConfigMySQL",
    "DAQJobStoreConfigParquet",
    "DAQJobStoreConfigROOT",
    "DAQJobStoreConfigRaw",
    "DAQJobStoreConfigRedis",
    "DAQJobStoreConfigSQLite",
    "InputOptions",
    "JobStopped",
    "RingOptions",
    "Schema",
    "StorableDAQJobConfig",
]
