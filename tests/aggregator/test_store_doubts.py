"""``check`` asks the servers behind stores; one that is away, or weak, is a warning and no mistake."""

from __future__ import annotations

import pytest
from edgedaq.errors import ConfigError
from edgedaq_aggregator.cli import main
from edgedaq_aggregator.stores.mysql import DAQJobStoreMySQLConfig
from edgedaq_aggregator.stores.server_config import read_password
from edgedaq_aggregator.stores.settling import Settling


def test_check_warns_of_servers_that_are_away_and_finds_no_mistake(tmp_path, capsys):
    away = f'unix_socket = "{tmp_path}/nobody"\n'
    (tmp_path / "m.toml").write_text(f'daq_job_type = "DAQJobStoreMySQL"\ndatabase = "d"\n{away}')
    (tmp_path / "r.toml").write_text(f'daq_job_type = "DAQJobStoreRedis"\n{away}')
    assert main(["check", "--config-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    for name in ("m", "r"):
        assert f"warning: {tmp_path}/{name}.toml: the server at {tmp_path}/nobody does not let us in" in told


def test_check_warns_of_a_password_that_cannot_be_read_and_does_not_tell_it(tmp_path, capsys):
    (tmp_path / "m.toml").write_text(
        'daq_job_type = "DAQJobStoreMySQL"\ndatabase = "d"\npassword_file = "/nowhere/secret"\n'
    )
    assert main(["check", "--config-dir", str(tmp_path)]) == 0
    assert "the password cannot be read from /nowhere/secret: No such file" in capsys.readouterr().err


def test_two_passwords_are_a_mistake(tmp_path, capsys):
    (tmp_path / "m.toml").write_text(
        'daq_job_type = "DAQJobStoreMySQL"\ndatabase = "d"\npassword = "x"\npassword_file = "/y"\n'
    )
    assert main(["check", "--config-dir", str(tmp_path)]) == 78
    assert "only one of password, password_file and password_credential" in capsys.readouterr().err


def config(**options):
    return DAQJobStoreMySQLConfig(daq_job_type="DAQJobStoreMySQL", database="d", **options)


def test_a_password_is_the_first_line_of_its_file_or_of_a_systemd_credential(tmp_path, monkeypatch):
    named = {"password_credential": "word"}
    (tmp_path / "word").write_text("s3cret\r\nmore\n")
    assert read_password(config(password_file=str(tmp_path / "word"))) == "s3cret"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_password(config(**named)) == "s3cret"
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="LoadCredential=word:FILE"):
        read_password(config(**named))


def test_a_position_is_durable_once_its_number_is_reached_and_not_before():
    settling = Settling()
    settling.add(10, 100)
    settling.add(20, 200)
    settling.add(20, None)
    settling.reach(9)
    assert settling.durable_position is None
    settling.reach(19)
    assert settling.durable_position == 100
    settling.reach(20)
    assert settling.durable_position == 200
