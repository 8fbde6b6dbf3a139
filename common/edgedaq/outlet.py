"""The producer's side of hop 1: what a job puts becomes frames in its ring, and consumers are told of them.

Two threads: the one that made the outlet puts (the job's main thread), another calls ``service``. To put is
to append to an open frame without a lock; see ``writers``. Open frames are sealed when they are full, at once
while everything published was released (so that a lone row travels at once, and rows gather while others are
on their way), and at the latest ``linger_s`` after their first row.

Threads that are not the one that made the outlet may put too: they share streams and slots of their own,
under a lock, so their rows are in order among each other but not against those of the main thread.

A full ring makes ``put`` wait, before it takes the row or message; it wakes when a consumer releases. What
``put`` has returned for is in shared memory and survives the process. ``close`` waits for nobody: what has no
room in the ring any more stays in the slots, from where ``salvage`` takes it.

Sockets belong to the thread that calls ``service``, and after its end to the one that calls ``close``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from edgedaq.claims import Claims
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import JobError, WireError
from edgedaq.inlet import claim_path
from edgedaq.logsetup import get_logger
from edgedaq.ring import W_COMMIT, W_T_FIRST, W_T_PUT, Identity, ProducedRing
from edgedaq.ring_control import RingBegin, Runs, Subscribe, decode_from_consumer, encode_control
from edgedaq.salvage import walk
from edgedaq.schema import OpenInfo, Schema
from edgedaq.sealing import Account, Sealer, Slot
from edgedaq.writers import EventWriter, PutTimeout, RawWriter, TableWriter, Writer

__all__ = ["EventWriter", "Outlet", "PutTimeout", "RawWriter", "TableWriter"]

RUNS_MAX = 1000
_SIDE_SLOTS = 4
_WAIT_S = 0.05
_CLAIMS_EVERY_NS = 1_000_000_000
