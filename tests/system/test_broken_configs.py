"""Every broken configuration is one clear line and exit status 78, from ``check`` and from ``run``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import edgedaq_agent.cli
import edgedaq_aggregator.cli
import pytest

ROOT = Path(__file__).resolve().parents[2]
AGENT = 'supervisor_id = "n1"\nstate_dir = "state"\n'
JOB = 'daq_job_type = "DAQJobTest"\nrand_min = 1\nrand_max = 9\n[store_config.csv]\nfile_path = "a.csv"\n'
USER_JOB = """
from edgedaq import DAQJob
class Good(DAQJob):
    def start(self): pass
class NoJob: pass
class BadType(DAQJob):
    config_type = int
"""


@dataclass(frozen=True)
class Case:
    """A directory that is broken in one way; ``line`` is a pattern of the only line that may be told."""

    name: str
    files: dict[str, str]
    line: str
    side: str = "agent"
    arguments: list[str] = field(default_factory=list)


def agent(name, line, **files):
    return Case(
        name,
        {"agent.toml": AGENT, "a.toml": JOB, **{k.replace("_toml", ".toml"): v for k, v in files.items()}},
        line,
    )


def aggregator(name, line, main="", **files):
    named = {k.replace("_toml", ".toml"): v for k, v in files.items()}
    return Case(
        name,
        {"aggregator.toml": main, "c.toml": 'daq_job_type = "DAQJobStoreCSV"\n', **named},
        line,
        "aggregator",
    )


CASES = [
    agent(
        "misspelt key",
        r"a\.toml: unknown key 'rand_mni', did you mean 'rand_min'\?",
        a_toml=JOB.replace("rand_max = 9", "rand_max = 9\nrand_mni = 3"),
    ),
    agent(
        "misspelt section",
        r"a\.toml: unknown section \[store_config\.cvs\], did you mean 'csv'\?",
        a_toml=JOB + "[store_config.cvs]\nfile_path = 'x'\n",
    ),
    agent(
        "wrong type",
        r"a\.toml: rand_max must be a whole number, got 'nine'",
        a_toml=JOB.replace("= 9", "= 'nine'"),
    ),
    agent(
        "missing required key",
        r"a\.toml: rand_max is missing; it must be a whole number",
        a_toml=JOB.replace("rand_max = 9\n", ""),
    ),
    agent(
        "missing section",
        r"a\.toml: store_config is missing; it must be a section",
        a_toml=JOB.partition("[")[0],
    ),
    agent(
        "bad unit",
        r"a\.toml: interval_seconds must be a time such as \"50 ms\", got unit 'msec', did you mean 'ms'\?",
        a_toml='interval_seconds = "5 msec"\n' + JOB,
    ),
    agent(
        "out of range",
        r"a\.toml: stop_limit must be greater than 0 and at most 600, got 0\.0",
        a_toml="stop_limit = 0\n" + JOB,
    ),
    agent(
        "rule of the job",
        r"a\.toml: rand_max must be at least rand_min, which is 1, got 0",
        a_toml=JOB.replace("= 9", "= 0"),
    ),
    agent(
        "store option of the wrong type",
        r"a\.toml: store_config\.csv\.add_date must be true or false, got 'yes'",
        a_toml=JOB + "add_date = 'yes'\n",
    ),
    agent(
        "path that leaves the output directory",
        r"a\.toml: store_config\.csv: file_path must be relative and without '\.\.', got '\.\./a\.csv'",
        a_toml=JOB.replace("a.csv", "../a.csv"),
    ),
    agent(
        "unknown job",
        r"a\.toml: daq_job_type must be a registered name.*got 'DAQJobTset', did you mean 'DAQJobTest'\?",
        a_toml=JOB.replace("DAQJobTest", "DAQJobTset"),
    ),
    agent("no job type", r"a\.toml: daq_job_type is missing; it must be a registered name", a_toml="x = 1\n"),
    agent(
        "two files for one job",
        r"b\.toml: daq_job_unique_id must differ .* got 'a', which .*a\.toml has",
        b_toml='daq_job_unique_id = "a"\n' + JOB,
    ),
    agent(
        "two jobs that write one file",
        r"b\.toml: store_config\.csv\.file_path must not be 'a\.csv', which .*a\.toml writes",
        b_toml='daq_job_type = "DAQJobPCMetrics"\n[store_config.csv]\nfile_path = "a.csv"\n',
    ),
    agent(
        "reserved job id",
        r"uplink\.toml: daq_job_unique_id must not be 'uplink'",
        uplink_toml=JOB.replace("a.csv", "b"),
    ),
    agent("bad TOML syntax", r"a\.toml: is not valid TOML: .*line 2", a_toml="x = 1\ny = \n"),
    agent(
        "file of a class that does not exist",
        r"a\.toml: daq_job_type names a file that does not exist: .*none\.py",
        a_toml='daq_job_type = "none.py:Job"\n',
    ),
    Case(
        "class that does not exist",
        {"agent.toml": AGENT, "my.py": USER_JOB, "a.toml": 'daq_job_type = "my.py:Goud"\n'},
        r"a\.toml: daq_job_type names a class that .*my\.py does not have: 'Goud', did you mean 'Good'\?",
    ),
    Case(
        "class that is no job",
        {"agent.toml": AGENT, "my.py": USER_JOB, "a.toml": 'daq_job_type = "my.py:NoJob"\n'},
        r"a\.toml: daq_job_type must name a class derived from DAQJob, 'NoJob' in .*my\.py is not",
    ),
    Case(
        "config_type that is none",
        {"agent.toml": AGENT, "my.py": USER_JOB, "a.toml": 'daq_job_type = "my.py:BadType"\n'},
        r"a\.toml: BadType\.config_type in .*my\.py must be derived from DAQJobConfig, got <class 'int'>",
    ),
    Case(
        "file that cannot be imported",
        {"agent.toml": AGENT, "my.py": "import nothing_at_all\n", "a.toml": 'daq_job_type = "my.py:J"\n'},
        r"a\.toml: daq_job_type names a file that cannot be imported: ModuleNotFoundError: .*\(.*my\.py:1\)",
    ),
    Case(
        "file that ends the process",
        {"agent.toml": AGENT, "my.py": "import sys; sys.exit(0)\n", "a.toml": 'daq_job_type = "my.py:J"\n'},
        r"a\.toml: daq_job_type names a file that cannot be imported: SystemExit: 0",
    ),
    agent(
        "store on an agent",
        r"s\.toml: daq_job_type 'DAQJobStoreCSV' is a store; stores run in the aggregator",
        s_toml='daq_job_type = "DAQJobStoreCSV"\n',
    ),
    agent(
        "bad node name",
        r"agent\.toml: supervisor_id must be 1 to 63 letters, digits, .* got 'hall b/3'",
        agent_toml='supervisor_id = "hall b/3"\n',
    ),
    agent(
        "reserved node name",
        r"agent\.toml: supervisor_id must not be 'ALL'",
        agent_toml='supervisor_id = "ALL"\n',
    ),
    agent(
        "missing supervisor_id",
        r"agent\.toml: supervisor_id is missing; it must be a text",
        agent_toml="state_dir = 'x'\n",
    ),
    Case("no agent.toml", {"a.toml": JOB}, r"agent\.toml: is missing; it must say at least supervisor_id"),
    agent(
        "port out of range",
        r"agent\.toml: aggregator.*port.*70000",
        agent_toml=AGENT + 'aggregator = "tcp://127.0.0.1:70000"\n',
    ),
    agent(
        "address that is none",
        r"agent\.toml: aggregator must be tcp://HOST:PORT.*got 'somewhere'",
        agent_toml=AGENT + 'aggregator = "somewhere"\n',
    ),
    agent(
        "directory that cannot be made",
        r"agent\.toml: state_dir must be a directory, '.*blocked' is not one, got",
        agent_toml='supervisor_id = "n1"\nstate_dir = "blocked/state"\n',
        blocked="a file\n",
    ),
    agent(
        "limit beyond the disk",
        r"agent\.toml: lanes\.data\.limit and lanes\.data\.reserve must fit on the disk",
        agent_toml=AGENT + '[lanes.data]\nlimit = "900 TiB"\n',
    ),
    agent(
        "more shared memory than allowed",
        r"agent\.toml: ring_bytes must be at least .* which the rings of 1 jobs take, got 1 MiB",
        agent_toml='ring_bytes = "1 MiB"\n' + AGENT,
    ),
    agent(
        "runtime directory with too long a name",
        r"agent\.toml: runtime_dir must be at most 79 bytes long",
        agent_toml=AGENT + f'runtime_dir = "/tmp/{"x" * 100}"\n',
    ),
    aggregator(
        "misspelt key of the aggregator",
        r"aggregator\.toml: unknown key 'lisen', did you mean 'listen'\?",
        main='lisen = "tcp://127.0.0.1:1"\n',
    ),
    aggregator(
        "journal without room",
        r"aggregator\.toml: journal: limit must be at least four segments",
        main='[journal]\nlimit = "64 MiB"\n',
    ),
    aggregator(
        "option of a store",
        r"c\.toml: unknown key 'file_path'",
        c_toml='daq_job_type = "DAQJobStoreCSV"\nfile_path = "a.csv"\n',
    ),
    aggregator(
        "two stores in one file name",
        r"d\.toml: daq_job_unique_id must differ",
        d_toml='daq_job_type = "DAQJobStoreCSV"\ndaq_job_unique_id = "c"\n',
    ),
]


def start(side, command, config_dir, **environment):
    places = [ROOT / "common", ROOT / "agent", ROOT / "aggregator"]
    held = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "INVOCATION_ID")}
    return subprocess.Popen(
        [sys.executable, "-m", f"edgedaq_{side}.cli", command, "--config-dir", str(config_dir)],
        env={**held, "PYTHONPATH": os.pathsep.join(map(str, places)), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write(config_dir, files):
    config_dir.mkdir()
    for name, text in files.items():
        (config_dir / name).write_text(text)


def judge_process(process, case):
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    judge(process.returncode, out, err, case)


def judge(status, out, err, case):
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert status == 78, (status, out, err)
    assert len(lines) == 1, err
    assert re.search(case.line, lines[0]), lines[0]
    assert out == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_broken_configuration_is_one_line_and_status_78(case, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    config_dir = tmp_path / "configs"
    write(config_dir, case.files)
    before = sorted(path.name for path in config_dir.iterdir())
    process = start(case.side, "run", config_dir)
    try:
        main = {"agent": edgedaq_agent.cli.main, "aggregator": edgedaq_aggregator.cli.main}[case.side]
        status = main(["check", "--config-dir", str(config_dir)])
        told = capfd.readouterr()
        judge(status, told.out, told.err, case)
        judge_process(process, case)
    finally:
        process.kill()
        process.communicate()
    after = sorted(path.name for path in config_dir.iterdir() if path.name != "__pycache__")
    assert after == before, "something was made although nothing may run"


def test_a_directory_that_does_not_exist_is_one_line_and_status_78(tmp_path):
    case = Case("", {}, r"none: does not exist; --config-dir must name a directory")
    for side in ("agent", "aggregator"):
        for command in ("check", "run", "status"):
            judge_process(start(side, command, tmp_path / "none"), case)


@pytest.fixture
def closed_dir(tmp_path):
    """Give a directory that cannot be written in, not even by root: a read-only mount."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid():
        yield closed
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", str(closed)], check=True)
    try:
        yield closed
    finally:
        subprocess.run(["umount", str(closed)], check=True)


def test_an_unwritable_directory_is_one_line_and_status_78(tmp_path, closed_dir):
    config_dir = tmp_path / "configs"
    write(
        config_dir, {"agent.toml": f'supervisor_id = "n1"\nstate_dir = "{closed_dir}/state"\n', "a.toml": JOB}
    )
    case = Case("", {}, r"agent\.toml: state_dir must be writable, .* is not")
    for command in ("check", "run"):
        judge_process(start("agent", command, config_dir), case)


def test_every_problem_of_every_file_is_told_at_once(tmp_path):
    config_dir = tmp_path / "configs"
    write(config_dir, {"agent.toml": "x = 1\n", "a.toml": "y = \n", "b.toml": 'daq_job_type = "none.py:X"\n'})
    _, err = (process := start("agent", "check", config_dir)).communicate(timeout=30)
    assert process.returncode == 78
    lines = err.splitlines()
    assert [Path(line.partition(": ")[0]).name for line in lines] == [
        "agent.toml",
        "agent.toml",
        "a.toml",
        "b.toml",
    ]
