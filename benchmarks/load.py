"""Many sessions from one process: what an intake sees of hundreds of nodes, without hundreds of agents.

Each node has a real session, one stream of packed rows, and resends what a broken session left. Prints one
line of JSON when it ends::

    {"rows": ..., "acked_rows": ..., "welcome_s": [...], "ack_delay_s": [...], "acked_by_node": {...}}

``ack_delay_s`` has, per node, the longest time from sending a part to its acknowledgement. Run by
``scaling.py``; by hand: ``python -m benchmarks.load --address tcp://127.0.0.1:7770 --nodes 75 --rate 1e5``.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import zmq
from edgedaq.clock import boot_id, mono_ns, utc_ns
from edgedaq.frame import Kind, encode, pack_map
from edgedaq.open_info import OpenInfo
from edgedaq.schema import encode_open, pack_rows
from edgedaq.session_messages import PROTOCOL_VERSION, Ack, Hello
from edgedaq.transport import pack_data_header
from edgedaq_agent.jobs.benchmark import SCHEMA, rows_of
from edgedaq_agent.session import Session

_IN_FLIGHT_BYTES = 4 << 20


@dataclass
class LoadNode:
    """One node: its session, and what of its stream is not acknowledged."""

    name: str
    session: Session
    rows_per_frame: int
    stream: int = field(default_factory=lambda: secrets.randbits(63) + 1)
    unacked: deque[tuple[int, int, int, bytes]] = field(default_factory=deque)
    """Position behind it, when it was sent, rows, and the frame."""
    unsent: deque[tuple[int, bytes]] = field(default_factory=deque)
    position: int = 0
    credit: int = 0
    seq: int = 0
    rows: int = 0
    acked_rows: int = 0
    session_number: int = 0
    welcome_ns: int = 0
    longest_ns: int = 0
    due_ns: int = 0

    def step(self, now_ns: int, begun_ns: int) -> None:
        """Take what arrived, and send what is due."""
        for message in self.session.service(now_ns):
            if not isinstance(message, Ack):
                sys.exit(f"{self.name}: the intake said {message}")
            self.credit = max(self.credit, message.credit)
            while self.unacked and self.unacked[0][0] <= message.durable:
                _, sent_ns, rows, _ = self.unacked.popleft()
                self.acked_rows += rows
                self.longest_ns = max(self.longest_ns, now_ns - sent_ns)
        if not self.session.is_up:
            return
        if self.session.number != self.session_number:
            self.session_number = self.session.number
            self.welcome_ns = self.welcome_ns or now_ns - begun_ns
            self.unsent.extendleft((rows, frame) for _, _, rows, frame in reversed(self.unacked))
            self.unacked.clear()
            self.position, self.credit = 0, self.session.credit
        while self.unsent and self._send(*self.unsent[0], now_ns):
            self.unsent.popleft()
        self.session.sent = [self.position]

    def put(self, now_ns: int) -> None:
        """Make the next frame, and the OPEN before the first."""
        if not self.seq:
            self.unsent.append((0, self._opened()))
            self.seq = 1
        count = self.rows_per_frame
        body = pack_rows(SCHEMA, rows_of(self.seq, count))
        frame = encode(
            Kind.PACKED,
            self.stream,
            self.seq,
            body,
            rows=count,
            row0=self.rows,
            t_first_ns=utc_ns(),
            t_put_ns=now_ns,
        )
        self.seq += 1
        self.rows += count
        self.unsent.append((count, frame))

    def close(self) -> None:
        """Put the end of the stream."""
        if self.seq:
            body = pack_map({"rows": self.rows, "tail_unknown": False, "bound_s": 0.0})
            self.unsent.append((0, encode(Kind.CLOSE, self.stream, self.seq, body, row0=self.rows)))

    def _send(self, rows: int, frame: bytes, now_ns: int) -> bool:
        size = len(frame)
        first = self.unacked[0][0] if self.unacked else self.position
        if self.position + size > self.credit or self.position - first > _IN_FLIGHT_BYTES:
            return False
        header = pack_data_header(0, 0, self.position, 1, size)
        if not self.session.send_data(header, frame):
            return False
        self.position += size
        self.unacked.append((self.position, now_ns, rows, frame))
        return True

    def _opened(self) -> bytes:
        info = OpenInfo(
            node=self.name,
            job="load",
            job_type="Load",
            life=f"{self.stream:016x}",
            boot=boot_id(),
            topics=("store.DAQJobStoreCSV",),
            form="table",
            schema=SCHEMA,
            store_config={"csv": {"file_path": "load.csv"}},
            t_open_ns=utc_ns(),
        )
        return encode_open(self.stream, info)


def main() -> int:
    """Run the nodes for a while, wait for the acknowledgements, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rate", type=float, default=100_000.0, help="rows per second of all together")
    parser.add_argument("--rows-per-frame", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4096)
    begun_ns = mono_ns()
    interval_ns = int(1e9 * arguments.rows_per_frame * arguments.nodes / arguments.rate)
    nodes = [
        LoadNode(
            f"load-{arguments.first + at}",
            Session(arguments.address, _hello(f"load-{arguments.first + at}"), context),
            arguments.rows_per_frame,
            due_ns=begun_ns + interval_ns * at // arguments.nodes,
        )
        for at in range(arguments.nodes)
    ]
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
    end_ns = begun_ns + int(arguments.seconds * 1e9)
    give_up_ns = end_ns + 30_000_000_000
    is_closed = False
    while not ends and mono_ns() < give_up_ns:
        now_ns = mono_ns()
        if now_ns >= end_ns and not is_closed:
            is_closed = True
            for node in nodes:
                node.close()
        for node in nodes:
            while node.due_ns <= now_ns and not is_closed:
                node.put(now_ns)
                node.due_ns += interval_ns
            node.step(now_ns, begun_ns)
        if is_closed and not any(node.unsent or node.unacked for node in nodes):
            break
        _wait(nodes, min(node.due_ns for node in nodes))
    for node in nodes:
        node.session.say_goodbye()
    context.destroy(linger=200)
    found = {
        "rows": sum(node.rows for node in nodes),
        "acked_rows": sum(node.acked_rows for node in nodes),
        "welcome_s": [node.welcome_ns / 1e9 for node in nodes],
        "ack_delay_s": [node.longest_ns / 1e9 for node in nodes],
        "acked_by_node": {node.name: node.acked_rows for node in nodes},
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _hello(name: str) -> Hello:
    return Hello(
        protocol_min=PROTOCOL_VERSION,
        protocol_max=PROTOCOL_VERSION,
        version="load",
        node=name,
        boot=boot_id(),
        instance=os.urandom(8).hex(),
        lanes=["data"],
    )


def _wait(nodes: list[LoadNode], due_ns: int) -> None:
    poller = zmq.Poller()
    for node in nodes:
        for socket in node.session.pollables():
            poller.register(socket, zmq.POLLIN)
        due_ns = min(due_ns, node.session.due_ns)
    poller.poll(min(max(due_ns - mono_ns(), 0) // 1_000_000, 20))


if __name__ == "__main__":
    sys.exit(main())
