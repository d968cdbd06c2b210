#!/usr/bin/env bash
# Installs what PyPI has of the tools that `make bench` compares with, into DIRECTORY: an environment of its own, never
# the user's. Fast when it is there. What Debian has comes from install-dependencies.sh; WAL-G and rustic come as their
# projects release them, and are found in PATH.
set -euo pipefail

directory=${1:?usage: bench-peers.sh DIRECTORY}

if [ ! -x "$directory/bin/barman" ]; then
    echo "installing Barman into $directory"
    python3 -m venv "$directory"
    "$directory/bin/pip" install --quiet --disable-pip-version-check barman psycopg2-binary
fi

for peer in pgbackrest rsync lz4 barman wal-g rustic; do
    found=$(PATH=$directory/bin:$PATH command -v "$peer" || true)
    echo "$peer: ${found:-not here}"
done
