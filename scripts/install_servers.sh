#!/bin/sh
# Installs what the tests start for themselves: MariaDB, Redis, and machines with systemd. Quick when it is there.
set -eu
PATH="$PATH:/usr/sbin:/usr/local/sbin"
missing=""
need() { # PACKAGE PROGRAM...
    package=$1
    shift
    for program in "$@"; do
        if command -v "$program" >/dev/null; then return; fi
    done
    missing="$missing $package"
}
need mariadb-server mariadbd mysqld
need redis-server redis-server valkey-server
need systemd systemd-analyze
need systemd-container systemd-nspawn
need debootstrap debootstrap
need iproute2 ip
[ -n "$missing" ] || exit 0
install="apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests of$missing are skipped (in CI they fail); as root, on Debian: $install" >&2
    exit 0
fi
# The packages start their servers where they can; the tests need only the programs.
sh -c "$install" >&2
