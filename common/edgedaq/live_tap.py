"""What a job shows of its data while somebody looks: frames of its ring, copied after the fact.

It stands beside the outlet and costs a put nothing: while nobody has subscribed to anything, a frame that is
published meets one comparison. While somebody has, its place in the ring is noted, and the service thread
copies the frames of the last ``GATHER_NS`` out and sends them to the broker, which never blocks. Nothing is
held in the ring for it: what was written over meanwhile is left out. At most ``BYTES_PER_S`` are shown,
whole messages; so a listener costs a fast job a bounded part of a core, and nobody waits for a listener.

``note`` is called with the gate's lock held, by whoever publishes; everything else by the service thread.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import zmq

from edgedaq.broker import Subscriptions
from edgedaq.clock import mono_ns
from edgedaq.frame import FLAG_FIRST, FLAG_PIECE, FLAGS_AT
from edgedaq.gate import Gate
from edgedaq.live_messages import LIVE_QUEUE, covering_topics, live_topics_of, publishing_address
from edgedaq.open_info import encode_open
from edgedaq.sealing import Account, Sealer

__all__ = ["LiveTap"]

GATHER_NS = 25_000_000
GATHER_BYTES = 256 << 10
BYTES_PER_S = 32 << 20
BURST_BYTES = 4 << 20
_SUBSCRIPTION_BYTES_MAX = 4096
_LINGER_MS = 100


class LiveTap:
    """The live plane's end in one job."""

    def __init__(self, runtime_dir: Path, sealer: Sealer, gate: Gate, context: zmq.Context[Any]) -> None:
        self._sealer = sealer
        self._gate = gate
        self._wanted: dict[int, list[bytes]] = {}
        self._noted: dict[int, tuple[Account, list[list[int]]]] = {}
        self._noted_bytes = 0
        self._due_ns = 0
        self._budget = BURST_BYTES
        self._budget_ns = mono_ns()
        self._left_out: set[int] = set()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        self.socket.linger = 0
        self.socket.sndhwm = LIVE_QUEUE
        self.socket.maxmsgsize = _SUBSCRIPTION_BYTES_MAX
        self.socket.reconnect_ivl = 100
        self.socket.reconnect_ivl_max = 2000
        self.socket.connect(publishing_address(runtime_dir))
        self._subscriptions = Subscriptions(self.socket)

    @property
    def is_wanted(self) -> bool:
        """Somebody has subscribed to something, of this job or of another one."""
        return bool(self._subscriptions.held)

    def note(self, account: Account, position: int, length: int) -> None:
        """Remember a frame that was published, if it is wanted and within the budget."""
        stream = account.stream
        wanted = self._wanted.get(stream)
        if wanted is None:
            wanted = self._wanted[stream] = covering_topics(
                live_topics_of(account.info), self._subscriptions.held
            )
        if not wanted or not self._affords(account, position, length):
            return
        spans = self._noted.setdefault(stream, (account, []))[1]
        adjoins = spans and sum(spans[-1]) == position and position % self._sealer.ring.layout.ring_bytes
        if adjoins and spans[-1][1] + length <= GATHER_BYTES:
            spans[-1][1] += length
        else:
            spans.append([position, length])
        self._noted_bytes += length

    def service(self, now_ns: int) -> int | None:
        """Take what the broker says is wanted, send what is due; return when to be called at the latest."""
        self._listen()
        if not self._noted:
            self._due_ns = 0
            return None
        if not self._due_ns:
            self._due_ns = now_ns + GATHER_NS
        if now_ns >= self._due_ns or self._noted_bytes >= GATHER_BYTES:
            self._send()
            return None
        return self._due_ns

    def close(self) -> None:
        """Send what is left, as far as that takes no time, and end."""
        if self._noted:
            self._send()
            self.socket.linger = _LINGER_MS
        self.socket.close()

    def _listen(self) -> None:
        if self._subscriptions.take():
            with self._gate.condition:
                self._wanted.clear()

    def _affords(self, account: Account, position: int, length: int) -> bool:
        """Tell whether the budget allows a frame; the pieces of one message are shown all or none."""
        layout = self._sealer.ring.layout
        flags = self._sealer.ring.buffer[layout.data_offset + position % layout.ring_bytes + FLAGS_AT]
        if flags & FLAG_PIECE and not flags & FLAG_FIRST:
            is_shown = account.stream not in self._left_out
        else:
            now = mono_ns()
            earned = BYTES_PER_S * (now - self._budget_ns) // 1_000_000_000
            if self._budget <= 0 and earned:
                self._budget, self._budget_ns = min(self._budget + earned, BURST_BYTES), now
            is_shown = self._budget > 0
            (self._left_out.discard if is_shown else self._left_out.add)(account.stream)
        if is_shown:
            self._budget -= length
        return is_shown

    def _send(self) -> None:
        with self._gate.condition:
            noted = [
                (account, spans, self._wanted.get(key, [])) for key, (account, spans) in self._noted.items()
            ]
            self._noted.clear()
            self._noted_bytes = 0
        self._due_ns = 0
        for account, spans, topics in noted:
            opened = encode_open(account.stream, account.info)
            for position, length in spans:
                frames = self._copy(position, length)
                if frames is None:
                    continue
                for topic in topics:
                    with contextlib.suppress(zmq.Again):
                        self.socket.send_multipart([topic, opened, frames], zmq.NOBLOCK)

    def _copy(self, position: int, length: int) -> bytes | None:
        """Return the bytes of a span, None if it was written over."""
        layout = self._sealer.ring.layout
        at = layout.data_offset + position % layout.ring_bytes
        with self._gate.condition:
            if position < self._sealer.head - layout.ring_bytes:
                return None
            return bytes(self._sealer.ring.buffer[at : at + length])
