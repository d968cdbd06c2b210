#!/usr/bin/env bash
# Whole restores against `cp -a` of the same directory, and both against the device's own ceiling, in one run.
#
# Rounds are interleaved, so that a noisy minute hits all contestants alike; each starts with cold caches and ends with
# `sync`. Prints medians, and ratios to `cp -a`: below 1 is faster. One JSON object goes to the file that
# PGHYDRANT_BENCH_JSON names. Needs root (cold caches, a server that does not run as root) and about five times
# PGHYDRANT_BENCH_GIB of free disk; everything is removed at the end, unless PGHYDRANT_BENCH_KEEP is set, with which
# the next run finds its cluster ready.
set -euo pipefail
cd "$(dirname "$0")/.."

gib=${PGHYDRANT_BENCH_GIB:-3}
rounds=${PGHYDRANT_BENCH_ROUNDS:-3}
compressions=${PGHYDRANT_BENCH_COMPRESSIONS-none lz4 zstd}
sources=${PGHYDRANT_BENCH_SOURCES:-mount blocks}
place=${PGHYDRANT_BENCH_DIR:-/var/tmp/pghydrant-bench}
user=${PGHYDRANT_BENCH_USER:-postgres}
built=${CARGO_TARGET_DIR:-target}/release/pghydrant

fail() { echo "error: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "cold caches need root"
[ -x "$built" ] || fail "$built is missing: make build"
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
[ -x "$bin/postgres" ] || fail "no PostgreSQL server in /usr/lib/postgresql"
mkdir -p "$place"
free_gib=$(($(stat -f -c '%a * %S / 1073741824' "$place")))
[ -d "$place/cluster" ] || [ "$free_gib" -ge $((gib * 5)) ] || fail "$place has $free_gib GiB free, $((gib * 5)) are needed"

program=$place/pghydrant
export PGHYDRANT_STATE=$place/state
as_server() { runuser -u "$user" -- "$@"; }

clean() {
    [ ! -e "$place/cluster/postmaster.pid" ] || as_server "$bin/pg_ctl" -D "$place/cluster" -m immediate stop >/dev/null || true
    rm -rf "$place/target" "$place/fio" "$place/repository-"* "$place/state" "$place/program"
    [ -n "${PGHYDRANT_BENCH_KEEP:-}" ] || rm -rf "$place"
}
trap clean EXIT

# --- the cluster -----------------------------------------------------------------------------------------------------
install -m 0755 "$built" "$program"
chown "$user" "$place"
start_server() {
    as_server "$bin/pg_ctl" -D "$place/cluster" -w -l "$place/cluster.log" start >/dev/null
}
connection="host=$place port=29876 user=postgres dbname=postgres"
if [ ! -e "$place/cluster.ready" ]; then
    echo "making a cluster of $gib GiB ..." >&2
    rm -rf "$place/cluster"
    as_server "$bin/initdb" -k -A trust -U postgres --no-sync --locale=C -E UTF8 -D "$place/cluster" >/dev/null
    cat >>"$place/cluster/postgresql.conf" <<CONF
port = 29876
unix_socket_directories = '$place'
listen_addresses = ''
fsync = off
max_wal_size = 64MB
min_wal_size = 32MB
wal_level = minimal
max_wal_senders = 0
autovacuum = off
CONF
    start_server
    as_server "$bin/psql" -Xq -v ON_ERROR_STOP=1 -v rows=$((gib * 1000000)) -d "$connection" -f benches/realistic.sql >/dev/null
    as_server "$bin/pg_ctl" -D "$place/cluster" -w stop >/dev/null
    sed -i -e '/^wal_level = minimal/d' -e '/^max_wal_senders = 0/d' "$place/cluster/postgresql.conf"
    touch "$place/cluster.ready"
fi

# --- the repositories ------------------------------------------------------------------------------------------------
start_server
declare -A repository_bytes backup_seconds
for compression in $compressions; do
    repository=$place/repository-$compression
    as_server "$program" init --repo "$repository" --compression "$compression" >/dev/null
    began=$(date +%s.%N)
    as_server "$program" backup --repo "$repository" --cluster bench --dbname "$connection" >/dev/null 2>&1 ||
        fail "the backup into $repository failed"
    backup_seconds[$compression]=$(echo "$(date +%s.%N) $began" | awk '{ printf "%.2f", $1 - $2 }')
    repository_bytes[$compression]=$(du -sb "$repository" | cut -f 1)
done
as_server "$bin/pg_ctl" -D "$place/cluster" -w stop >/dev/null
cluster_bytes=$(du -sb "$place/cluster" | cut -f 1)

# --- the contest -----------------------------------------------------------------------------------------------------
declare -A times
cold() {
    rm -rf "$place/target"
    sync
    echo 3 >/proc/sys/vm/drop_caches
}
# timed NAME COMMAND...: cold caches before, durable at the end.
timed() {
    local name=$1 began ended
    shift
    cold
    began=$(date +%s.%N)
    "$@" >"$place/last.log" 2>&1 || { cat "$place/last.log" >&2; fail "$name failed"; }
    sync
    ended=$(date +%s.%N)
    times[$name]+="$(echo "$ended $began" | awk '{ printf "%.3f", $1 - $2 }') "
    echo "  $name: $(echo "${times[$name]}" | awk '{ print $NF }') s" >&2
}
restore() {
    "$program" restore --repo "$place/repository-$1" --cluster bench --to "$place/target" --os-user "$user" \
        --pg-bin "$bin" --source "$2" --target-immediate --no-start
}
# What the device alone can do while as many bytes are read from one file and written to another.
ceiling() {
    local half=$((cluster_bytes / 1048576))M
    mkdir -p "$place/fio"
    [ -e "$place/fio/source" ] ||
        fio --name=lay --filename="$place/fio/source" --size="$half" --rw=write --bs=1M --direct=1 --ioengine=io_uring \
            --iodepth=32 --end_fsync=1 >/dev/null
    cold
    rm -f "$place/fio/target"
    fio --ioengine=io_uring --direct=1 --bs=1M --iodepth=32 --size="$half" --output-format=json \
        --name=read --filename="$place/fio/source" --rw=read \
        --name=write --filename="$place/fio/target" --rw=write --fallocate=posix --end_fsync=1 >"$place/fio/result.json"
    times[ceiling]+="$(jq -r '[.jobs[] | ([.read.runtime, .write.runtime] | max)] | max / 1000' "$place/fio/result.json") "
    rm -f "$place/fio/target"
    echo "  ceiling: $(echo "${times[ceiling]}" | awk '{ print $NF }') s" >&2
}

contestants=(ceiling cp)
for source in $sources; do
    for compression in $compressions; do contestants+=("$source/$compression"); done
done
for round in $(seq "$rounds"); do
    echo "round $round" >&2
    for name in "${contestants[@]}"; do
        case $name in
        ceiling) ceiling ;;
        cp) timed cp cp -a "$place/cluster" "$place/target" ;;
        *) timed "$name" restore "${name#*/}" "${name%/*}"
            # Once per contestant: what it wrote is what it should be. Not counted.
            [ "$round" -gt 1 ] || as_server "$bin/pg_verifybackup" --no-parse-wal "$place/target" >/dev/null ||
                fail "pg_verifybackup refuses what $name restored" ;;
        esac
    done
done

# --- the result ------------------------------------------------------------------------------------------------------
median() { tr ' ' '\n' | grep . | sort -g | awk '{ value[NR] = $1 } END { print (value[int((NR + 1) / 2)] + value[int((NR + 2) / 2)]) / 2 }'; }
filesystem=$(findmnt -n -o FSTYPE -T "$place")
model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
echo
echo "$model, $(nproc) cores, $(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo), Linux $(uname -r), $filesystem"
echo "cluster of $((cluster_bytes / 1048576)) MiB, cold caches, final sync counted, median of $rounds rounds"
for compression in $compressions; do
    echo "repository $compression: $((repository_bytes[$compression] / 1048576)) MiB, backed up in ${backup_seconds[$compression]} s"
done
cp_median=$(echo "${times[cp]}" | median)
printf '\n%-16s %10s %10s %10s\n' "" seconds MB/s "to cp -a"
rows=()
for name in "${contestants[@]}"; do
    seconds=$(echo "${times[$name]}" | median)
    awk -v name="$name" -v seconds="$seconds" -v bytes="$cluster_bytes" -v cp="$cp_median" \
        'BEGIN { printf "%-16s %10.2f %10.0f %10.2f\n", name, seconds, bytes / 1e6 / seconds, seconds / cp }'
    rows+=("$(jq -n --arg name "$name" --argjson seconds "$seconds" --arg all "${times[$name]}" --argjson cp "$cp_median" \
        '{name: $name, seconds: $seconds, ratio_to_cp: ($seconds / $cp), rounds: ($all | split(" ") | map(select(. != "") | tonumber))}')")
done
if [ -n "${PGHYDRANT_BENCH_JSON:-}" ]; then
    printf '%s\n' "${rows[@]}" | jq -s --arg machine "$model" --arg kernel "$(uname -r)" --arg filesystem "$filesystem" \
        --argjson cores "$(nproc)" --argjson cluster_bytes "$cluster_bytes" \
        '{machine: $machine, cores: $cores, kernel: $kernel, filesystem: $filesystem, cluster_bytes: $cluster_bytes, results: .}' \
        >"$PGHYDRANT_BENCH_JSON"
fi
