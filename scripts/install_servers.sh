#!/bin/sh
# Installs the servers that the tests start for themselves: MariaDB and Redis. Quick when they are there.
set -eu
PATH="$PATH:/usr/sbin:/usr/local/sbin"
missing=""
command -v mariadbd >/dev/null || command -v mysqld >/dev/null || missing="$missing mariadb-server"
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing="$missing redis-server"
[ -n "$missing" ] || exit 0
install="apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests of$missing are skipped (in CI they fail); as root, on Debian: $install" >&2
    exit 0
fi
# The packages start their servers where they can; the tests need only the programs.
sh -c "$install" >&2
