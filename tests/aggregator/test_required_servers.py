"""A server that is not installed: a user is told, and the build server does not pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.servers import require

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_servers.sh"


def test_where_a_server_is_missing_a_test_is_skipped_and_the_reason_says_what_to_type(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-server is not installed; 'make servers'"):
        require("no-such-server")


def test_where_a_server_is_missing_the_build_fails(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-server is not installed"):
        require("no-such-server")


def test_what_is_missing_and_cannot_be_installed_is_said_with_the_command(tmp_path):
    for name in ("sh", "id"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    script = SCRIPT.read_text().replace(":/usr/sbin:/usr/local/sbin", "")  # as on a machine without apt
    told = subprocess.run(
        ["/usr/bin/sh", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stderr
    assert (
        "tests of mariadb-server redis-server systemd systemd-container debootstrap iproute2 are skipped"
        in told
    )
    assert "apt-get install" in told
    assert "apt-get install -y --no-install-recommends mariadb-server redis-server" in told
