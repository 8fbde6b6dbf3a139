#!/bin/sh
# An agent with its test job in an arm64 Debian, on a machine that is none.
# As root, with debootstrap and qemu-user-static (binfmt_misc mounted): sh tests/service/arm64_agent.sh TREE
# Prints `status` of an agent whose job puts ten rows a second into the spool; TREE is kept.
set -eu
tree=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
. /etc/os-release
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $VERSION_CODENAME" | head -1)

if [ ! -e "$tree/usr/bin/python3" ]; then  # unpacked and not installed: nothing else has to run there
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 "$VERSION_CODENAME" "$tree" "$mirror"
    for package in "$tree"/var/cache/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$tree"
    done
fi
chroot "$tree" /usr/bin/python3 -c 'import platform; print(platform.machine(), platform.python_version())'
version=$(chroot "$tree" /usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

rm -rf "$tree/opt/edgedaq" "$tree/etc/edgedaq-agent"
"${PYTHON:-$here/.venv/bin/python}" -m pip install --quiet --no-deps --ignore-installed --target "$tree/opt/edgedaq" \
    --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --python-version "$version" \
    --implementation cp --only-binary=:all: -c "$here/constraints.txt" \
    pyzmq msgpack msgspec xxhash psutil pyserial smbus2
cp -r "$here/common/edgedaq" "$here/agent/edgedaq_agent" "$tree/opt/edgedaq/"
mkdir -p "$tree/etc/edgedaq-agent" "$tree/run/edgedaq-agent" "$tree/proc"
cp "$here/configs/examples/test.toml" "$tree/etc/edgedaq-agent/"
echo 'supervisor_id = "arm"' > "$tree/etc/edgedaq-agent/agent.toml"

mount --bind /proc "$tree/proc"
trap 'umount "$tree/proc"' EXIT
agent="chroot $tree /usr/bin/env PYTHONPATH=/opt/edgedaq /usr/bin/python3 -m edgedaq_agent.cli"
$agent run --config-dir /etc/edgedaq-agent 2> "$tree/var/log/edgedaq.log" &
supervisor=$!
tries=0
until $agent status --config-dir /etc/edgedaq-agent 2> /dev/null | grep -q '^test *RUNNING .*[1-9]' || [ $tries -ge 60 ]; do
    tries=$((tries + 1))
    sleep 2
done
$agent status --config-dir /etc/edgedaq-agent
kill $supervisor
wait $supervisor
