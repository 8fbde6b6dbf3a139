from __future__ import annotations

import csv
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pyarrow as pa
import pytest
from edgedaq.messages import (
    DAQJobMessageEvent,
    DAQJobMessageStorePyArrow,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
    Source,
)
from edgedaq.tail_text import TailText

from tests.common.live_site import LIMIT_S, LiveSite, live_site
from tests.system.harness import ROOT, environment

SOURCE = Source("n1", "hv", 7, 3, 1_700_000_000_123_000_000)
_MAIN = "import sys; from tests.common.test_tail import main; sys.exit(main(sys.argv[1:]))"


def main(arguments):
    """Be the command line of ``tail`` for a runtime directory."""
    import argparse
    from pathlib import Path

    from edgedaq.command_line import guarded
    from edgedaq.tail import add_tail, run_tail

    parser = argparse.ArgumentParser()
    parser.add_argument("runtime_dir", type=Path)
    add_tail(parser)
    options = parser.parse_args(arguments)
    return guarded(lambda: run_tail(options.runtime_dir, "start it", options))


class Output:
    """Lines that a process writes, as they come."""

    def __init__(self, process):
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(stream, lines))
            for stream, lines in ((process.stdout, self.out), (process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))
        stream.close()

    def wait(self, condition):
        end = time.monotonic() + LIMIT_S
        while not condition(self):
            assert time.monotonic() < end, (self.out[-5:], self.err)
            time.sleep(0.02)

    def join(self):
        for thread in self._threads:
            thread.join()


@contextmanager
def tail(site: LiveSite, *arguments: str):
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, str(site.runtime_dir), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    output = Output(process)
    try:
        yield output
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        output.join()


def test_a_pipe_gets_one_csv_line_per_row_and_ctrl_c_ends_it_with_0(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", topic="store.X")
        site.side.start()
        with tail(site, "store") as got:
            got.wait(lambda got: len(got.out) > 20)
            got.process.send_signal(signal.SIGINT)
            assert got.process.wait(LIMIT_S) == 0
            got.join()
            assert got.err == []
        head, *rows = csv.reader(got.out)
        assert head == ["job", "n", "half"]
        assert all(row[0] == "a" and float(row[2]) == int(row[1]) / 2 for row in rows)
        numbers = [int(row[1]) for row in rows]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_it_begins_before_the_supervisor_and_says_what_it_waits_for(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site, tail(site, "job.a", "--json") as got:
        got.wait(lambda got: got.err)
        assert "nothing runs" in got.err[0]
        assert "start it" in got.err[0]
        site.add("a")
        site.side.start()
        got.wait(lambda got: got.out)
        site.side.kill_all()
        count = len(got.out)
        site.side.start()
        got.wait(lambda got: len(got.out) > count + 5)
        assert all(json.loads(line)["job"] == "a" for line in got.out)


def test_a_topic_that_was_not_seen_gets_the_nearest_known_one(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", topic="store.DAQJobStoreCSV")
        site.side.start()
        site.side.wait(lambda: site.side.jobs()["a"]["topics"], LIMIT_S, "its topics are known")
        assert site.side.jobs()["a"]["topics"] == ["job.a", "store.DAQJobStoreCSV"]
        with tail(site, "store.DAQJobStoreCVS") as got:
            got.wait(lambda got: got.err)
            assert "did you mean 'store.DAQJobStoreCSV'?" in got.err[0]
            assert "job.a" in got.err[0]
        with tail(site, "a") as got:
            got.wait(lambda got: got.err)
            assert "did you mean 'job.a'?" in got.err[0]
            assert got.out == []


def test_it_thins_ends_after_a_count_and_refuses_what_is_no_time_or_topic(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=1000)
        site.side.start()
        begun = time.monotonic()
        with tail(site, "job.a", "--every", "500 ms", "--count", "4") as got:
            assert got.process.wait(LIMIT_S) == 0
            got.join()
            assert time.monotonic() - begun > 1.5
            numbers = [int(line.split(",")[1]) for line in got.out[1:]]
            assert len(numbers) == 4
            assert all(b - a > 300 for a, b in itertools.pairwise(numbers))
            assert got.err == []
        with tail(site, "job.a", "--count", "7") as got:
            assert got.process.wait(LIMIT_S) == 0
            got.join()
            assert len(got.out) == 8
        for wrong, told in ((["--every", "5 parsec"], "--every"), (["job..a"], "topic")):
            with tail(site, *wrong) as got:
                assert got.process.wait(LIMIT_S) == 78
                got.join()
                assert told in got.err[0]


def test_a_reader_that_stops_reading_is_told_what_it_missed_and_a_closed_pipe_ends_it(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=100_000, rows=100)
        site.side.start()
        with tail(site, "job.a") as got:
            got.wait(lambda got: got.out)
            got.process.send_signal(signal.SIGSTOP)
            count = site.side.jobs()["a"]["total"]["out_count"]
            site.side.wait(
                lambda: site.side.jobs()["a"]["total"]["out_count"] > count + 400_000, 60, "it is behind"
            )
            got.process.send_signal(signal.SIGCONT)
            got.wait(lambda got: any("rows were not shown" in line for line in got.err))
            assert site.side.jobs()["a"]["total"]["put_blocked_s"] == 0
        command = [sys.executable, "-c", _MAIN, str(site.runtime_dir), "job.a"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT
        ) as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(LIMIT_S) == 1
            assert process.stderr.read() == b""


def test_a_terminal_gets_aligned_columns_with_names_once(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a")
        site.side.start()
        master, slave = pty.openpty()
        command = [sys.executable, "-c", _MAIN, str(site.runtime_dir), "job.a"]
        process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment(), cwd=ROOT)
        os.close(slave)
        text = b""
        while text.count(b"\n") < 20:
            text += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        os.close(master)
        lines = text.decode().splitlines()
        assert re.fullmatch(r"a +n +half", lines[0])
        assert re.fullmatch(r"a +\d+ +\d+\.\d", lines[1])
        assert sum("half" in line for line in lines) == 1


MESSAGES = [
    DAQJobMessageStoreTabular(
        keys=["x", "name"], data=[[1.5, "a"], [None, 'b,"\x1b[2J']], source=SOURCE, tag="t"
    ),
    DAQJobMessageStoreRaw(data=bytes(range(100)), source=SOURCE),
    DAQJobMessageEvent(metadata={"what": "trip", "channel": 3}, data=b"12345", source=SOURCE),
    DAQJobMessageStorePyArrow(table=pa.table({"k": [1, 2]}), source=SOURCE),
]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "text",
            [
                "hv:t  x    name",
                "hv:t  1.5  a",
                'hv:t       b,"\\x1b[2J',
                "hv  raw 100 bytes  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ...",
                "hv  event  what=trip channel=3 (5 bytes)",
                "hv  k",
                "hv  1",
                "hv  2",
            ],
        ),
        (
            "csv",
            [
                "job,x,name",
                "hv:t,1.5,a",
                'hv:t,,"b,""\\x1b[2J"',
                "hv,raw,100,00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ...",
                "hv,event,what=trip channel=3,5",
                "job,k",
                "hv,1",
                "hv,2",
            ],
        ),
    ],
)
def test_every_kind_of_data_has_its_line_and_no_escape_reaches_a_terminal(form, expected):
    text = TailText(form)
    assert [line.text for message in MESSAGES for line in text.lines(message)] == expected


def test_json_lines_can_be_read_back_and_bear_node_job_and_time():
    text = TailText("json")
    table, raw, event, arrow = MESSAGES
    first, second = [json.loads(line.text) for line in text.lines(table)]
    head = {"node": "n1", "job": "hv", "t": "2023-11-14T22:13:20.123Z"}
    assert first == {**head, "tag": "t", "row": {"x": 1.5, "name": "a"}}
    assert second["row"] == {"x": None, "name": 'b,"\x1b[2J'}
    (line,) = text.lines(raw)
    assert json.loads(line.text) == {**head, "tag": "", "bytes": 100, "hex": bytes(range(100)).hex()}
    (line,) = text.lines(event)
    assert json.loads(line.text)["event"] == {"what": "trip", "channel": 3}
    assert [json.loads(line.text)["row"] for line in text.lines(arrow)] == [{"k": 1}, {"k": 2}]
    odd = DAQJobMessageStoreTabular(
        keys=["v"], data=[[float("nan")], [b"\1"], [[1, float("inf")]]], source=SOURCE
    )
    assert [json.loads(line.text)["row"]["v"] for line in text.lines(odd)] == [None, "01", [1, None]]
