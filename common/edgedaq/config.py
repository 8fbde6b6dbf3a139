"""What a job's TOML may say: the typed configurations that every job's own configuration derives from.

A user's job adds its settings by deriving; required ones have no default::

    class MyJobConfig(DAQJobConfig):
        my_setting: str
        interval_seconds: float = 1.0

How files are read and how problems are told is in ``typed_toml``; ``config_dir`` loads a directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edgedaq.errors import ConfigError
from edgedaq.frame import MAX_FRAME_BYTES
from edgedaq.names import check_name, check_topic
from edgedaq.ring_control import InputPolicy
from edgedaq.store_config import DAQJobStoreConfig
from edgedaq.typed_toml import build
from edgedaq.units import Bytes, Seconds, format_bytes

__all__ = [
    "EXIT_CONFIG",
    "Bytes",
    "DAQJobConfig",
    "InputOptions",
    "RingOptions",
    "Seconds",
    "StorableDAQJobConfig",
    "Verbosity",
    "build_job_config",
]

EXIT_CONFIG = 78
"""Exit status for a configuration that must be edited (``EX_CONFIG``); anything else that fails is 1."""

Verbosity = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

Positive = Annotated[Seconds, msgspec.Meta(gt=0)]
J = TypeVar("J", bound="DAQJobConfig")

_RING_MIN = 256 << 10
_RING_MAX = 4 << 30
_LIMIT_MIN = 64 << 10


class RingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shared memory of one job: ``[ring]`` in its TOML.

    Args:
        ring_bytes: Data area. What is put waits there while the uplink or a consumer is away.
        slot_bytes: Size at which an open frame is published.
        slots: Open frames at a time; a job with more streams than this at once seals them early.
        linger_s: Longest time that a row waits in an open frame.
    """

    ring_bytes: Annotated[Bytes, msgspec.Meta(ge=_RING_MIN, le=_RING_MAX)] = 16 << 20
    slot_bytes: Annotated[Bytes, msgspec.Meta(ge=4096, le=MAX_FRAME_BYTES // 4)] = 64 << 10
    slots: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    linger_s: Annotated[Seconds, msgspec.Meta(ge=0.001, le=10)] = 0.05

    def __post_init__(self) -> None:
        if self.slot_bytes * 4 > self.ring_bytes:
            message = (
                f"slot_bytes must be at most a quarter of ring_bytes ({format_bytes(self.ring_bytes)}), "
                f"got {format_bytes(self.slot_bytes)}"
            )
            raise ConfigError(message)


class InputOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job is handed of the other jobs on its host: ``[input]`` in its TOML.

    Args:
        topics: In place of those that its class asks for.
        policy: What happens when it is too slow. ``wait``: it misses nothing, and who puts waits for it.
            Otherwise nobody waits, and it misses what waited longest, or what comes while its limit is
            reached; it is told exactly how much.
        limit: How far it may be behind each producer before it misses something.
    """

    topics: tuple[str, ...] | None = None
    policy: InputPolicy = "wait"
    limit: Annotated[Bytes, msgspec.Meta(ge=_LIMIT_MIN, le=_RING_MAX)] = 8 << 20

    def __post_init__(self) -> None:
        for topic in self.topics or ():
            if topic:
                check_topic(topic)


class DAQJobConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every job's TOML may say.

    Args:
        daq_job_type: Registered name, ``file.py:ClassName`` or ``package.module:ClassName``.
        daq_job_unique_id: Name of this job on its node; the file's name without ``.toml`` if not given.
        verbosity: Least severe log level that is written.
        restart: When an ended job is started again. ``on_failure``: a ``start()`` that returns has finished.
        restart_backoff: First wait before a restart; doubles with each one in a row, with jitter.
        restart_backoff_max: Longest wait.
        restart_healthy_after: A job that ran this long begins again with the first wait.
        restart_limit: Restarts in a row after which the job is FAILED; unlimited if not given.
        stop_limit: How long the job may take to stop before it is killed.
        hang_limit: A job that neither puts, takes nor sleeps for this long is killed and restarted; no limit
            if not given. A job that is blocked because its ring is full does not hang.
        startup_error_behavior: What becomes of a job that fails before it has put, taken or slept for the
            first time, e.g. because its device is absent. ``restart``: as after any failure; ``retry``: again
            and again, whatever ``restart`` and ``restart_limit`` say; ``fail``; ``ignore``: it is left out.
        reset_command: Resets the device: run when the job hangs, and before it is restarted after a failure.
        memory_limit: What the job and its children may have in memory of their own; beyond it is restarted.
        cpu_limit: Percent of one core that they may use for 10 s; beyond it is restarted.
        start_order: Jobs with a lower number have begun before those with a higher one are started.
        ring: Shared memory of the job.
        input: What it takes from other jobs, and whether they wait for it.
    """

    daq_job_type: str
    daq_job_unique_id: str = ""
    verbosity: Verbosity = "INFO"
    restart: Literal["always", "on_failure", "never"] = "on_failure"
    restart_backoff: Positive = 0.5
    restart_backoff_max: Positive = 60.0
    restart_healthy_after: Positive = 30.0
    restart_limit: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stop_limit: Annotated[Seconds, msgspec.Meta(gt=0, le=600)] = 3.0
    hang_limit: Positive | None = None
    startup_error_behavior: Literal["restart", "retry", "fail", "ignore"] = "restart"
    reset_command: tuple[str, ...] = ()
    memory_limit: Annotated[Bytes, msgspec.Meta(gt=0)] | None = None
    cpu_limit: Annotated[float, msgspec.Meta(gt=0)] | None = None
    start_order: int = 0
    ring: RingOptions = msgspec.field(default_factory=RingOptions)
    input: InputOptions = msgspec.field(default_factory=InputOptions)


class StorableDAQJobConfig(DAQJobConfig, kw_only=True, forbid_unknown_fields=True):
    """Configuration of a job whose data is stored where its TOML says: ``[store_config.csv]``, ..."""

    store_config: DAQJobStoreConfig


def build_job_config(config_type: type[J], raw: Mapping[str, Any], *, file: str, stem: str) -> J:
    """Return a job's typed configuration.

    Args:
        raw: Content of its TOML.
        file: What to name in messages, e.g. ``configs/hv.toml``.
        stem: The job's unique id where the file gives none.

    Raises:
        ConfigError: One line for each problem.
    """
    config = build(config_type, raw, file)
    unique_id = config.daq_job_unique_id or stem
    try:
        msgspec.structs.force_setattr(config, "daq_job_unique_id", check_name("daq_job_unique_id", unique_id))
    except ConfigError as e:
        message = f"{file}: {e}"
        raise ConfigError(message) from e
    return config
