from __future__ import annotations

import subprocess
import sys

import pytest
from edgedaq.config_dir import load_jobs, missing_stores
from edgedaq.errors import ConfigError
from edgedaq.job import DAQJob
from edgedaq.registry import JOB_TABLE, load_class, load_table, resolve

TABLE = {"DAQJobTest": "edgedaq_agent.jobs.test:DAQJobTest"}
SOURCE = """
from __future__ import annotations
from edgedaq.config import DAQJobConfig, StorableDAQJobConfig
from edgedaq.job import DAQJob

class MyJobConfig(StorableDAQJobConfig):
    my_setting: str = ""

class MyJob(DAQJob):
    config_type = MyJobConfig

class OtherConfig(DAQJobConfig):
    thing: Nowhere = None

class Other(DAQJob):
    config_type = OtherConfig
"""
CSV = '[store_config.csv]\nfile_path = "{}"\n'


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my.py").write_text(SOURCE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load(config_dir, takes_stores=True, **files):
    for name, text in files.items():
        (config_dir / f"{name}.toml").write_text(text)
    stores = {"DAQJobStoreX": f"{config_dir / 'my.py'}:MyJob"}
    return {file.path.stem: file for file in load_jobs(config_dir, TABLE, stores, takes_stores=takes_stores)}


def test_a_registered_name_is_looked_up_without_importing_it(config_dir):
    assert resolve("DAQJobTest", {"DAQJobTest": "no.such.module:X"}, config_dir) == "no.such.module:X"


def test_a_file_is_found_beside_the_configuration_wherever_the_program_runs(config_dir):
    target = resolve("my.py:MyJob", TABLE, config_dir)
    assert target == f"{config_dir / 'my.py'}:MyJob"
    job_class = load_class(target, config_dir)
    assert issubclass(job_class, DAQJob)
    assert load_class(target, config_dir) is job_class
    assert job_class.config_type.__name__ == "MyJobConfig"


def test_a_module_beside_the_configuration_is_found_after_all_that_is_installed(config_dir):
    (config_dir / "beside.py").write_text(SOURCE)
    (config_dir / "json.py").write_text("raise SystemExit")
    assert load_class(resolve("beside:MyJob", TABLE, config_dir), config_dir).__module__ == "beside"
    assert sys.path[-1] == str(config_dir) or str(config_dir) in sys.path[-2:]


def test_two_files_of_one_name_are_two_modules(config_dir):
    other = config_dir / "sub"
    other.mkdir()
    (other / "my.py").write_text(SOURCE.replace("MyJob", "Theirs"))
    assert load_class(f"{config_dir}/my.py:MyJob").__name__ == "MyJob"
    assert load_class(f"{other}/my.py:Theirs").__name__ == "Theirs"
    assert load_class(f"{config_dir}/my.py:MyJob").__name__ == "MyJob"


@pytest.mark.parametrize("name", [":", "a.py:", ":B", "a b:C", "my.py:1", "..:X", "a-b:C", ""])
def test_what_is_no_job_type_is_refused(config_dir, name):
    with pytest.raises(ConfigError, match="daq_job_type"):
        resolve(name, TABLE, config_dir)


def test_a_setting_whose_type_does_not_exist_is_told_by_name(config_dir):
    with pytest.raises(
        ConfigError, match=r"OtherConfig in .*my\.py has a type that cannot be used: .*Nowhere"
    ):
        load_class(f"{config_dir / 'my.py'}:Other", config_dir)


def test_the_table_of_a_package_that_is_not_installed_is_empty():
    assert load_table("no_such_package:JOBS") == {}
    assert load_table("no_such_package.jobs:JOBS") == {}


def test_the_table_of_jobs_is_read_without_importing_any_job():
    code = (
        f"import sys; from edgedaq.registry import load_table; assert load_table({JOB_TABLE!r});"
        "assert not [name for name in sys.modules if name.startswith('edgedaq_agent.jobs.')];"
        "assert 'numpy' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == 0


def test_a_directory_is_loaded_in_order_and_main_files_are_no_jobs(config_dir):
    found = load(
        config_dir,
        agent='supervisor_id = "x"\n',
        aggregator="",
        b='daq_job_type = "my.py:MyJob"\n' + CSV.format("b.csv"),
        a='daq_job_type = "my.py:MyJob"\ndaq_job_unique_id = "renamed"\n' + CSV.format("a.csv"),
        s='daq_job_type = "DAQJobStoreX"\n' + CSV.format("s.csv"),
    )
    assert [file.unique_id for file in found.values()] == ["renamed", "b", "s"]
    assert [file.is_store for file in found.values()] == [False, False, True]
    assert not any(file.problems for file in found.values())


def test_broken_files_get_valid_ids_of_their_own_and_the_rest_is_usable(config_dir):
    found = load(
        config_dir,
        **{
            "a": 'daq_job_type = "my.py:MyJob"\n' + CSV.format("a.csv"),
            "b": 'daq_job_type = "my.py:MyJob"\ndaq_job_unique_id = "a"\n' + CSV.format("b.csv"),
            "größe 1": "x = \n",
            "größe_1": 'daq_job_type = "none.py:X"\n',
        },
    )
    ids = [file.unique_id for file in found.values()]
    assert len(set(ids)) == 4
    assert ids[:2] == ["a", "b"]
    assert found["a"].config is not None
    assert [bool(file.problems) for file in found.values()] == [False, True, True, True]


def test_two_jobs_may_write_one_file_only_if_they_write_it_alike(config_dir):
    mine = 'daq_job_type = "my.py:MyJob"\n' + CSV.format("x.csv")
    found = load(config_dir, a=mine, b=mine, c=mine + "use_zstd = true\n", d=mine + "add_date = true\n")
    assert [bool(file.problems) for file in found.values()] == [False, False, True, False]
    assert "with other options" in found["c"].problems[0]


def test_jobs_share_a_database_with_a_table_for_each(config_dir):
    mine = 'daq_job_type = "my.py:MyJob"\n' + CSV.format("x.sqlite").replace(".csv]", ".sqlite]")
    found = load(config_dir, a=mine, b=mine + 'table_name = "other"\n', c=mine + "add_date = true\n")
    assert [file.problems for file in found.values()] == [[], [], []]


def test_a_store_that_is_named_but_absent_is_a_warning_with_file_and_section(config_dir):
    found = load(config_dir, a='daq_job_type = "my.py:MyJob"\n' + CSV.format("a.csv"))
    (warning,) = missing_stores(found.values())
    assert "a.toml: [store_config.csv] needs a store of type DAQJobStoreCSV" in warning
