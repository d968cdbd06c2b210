#!/usr/bin/env bash
# Installs what this machine lacks for: build | lint | demo | test | bench | peers. Fast when nothing is missing.
#
# Debian and its kin only: elsewhere it prints the list. An existing PostgreSQL cluster is never touched, and a
# freshly installed PostgreSQL package is kept from creating and starting one.
set -euo pipefail

purpose=${1:-build}
missing=()

# need COMMAND PACKAGE: PACKAGE is wanted unless COMMAND can be run.
need() {
    command -v "$1" >/dev/null 2>&1 || PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}

# A server with pg_amcheck and pgbench beside it, of any major version: the binaries are outside of PATH in Debian.
have_postgresql() {
    local bin
    for bin in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/local/pgsql/bin; do
        [ -x "$bin/postgres" ] && [ -x "$bin/pgbench" ] && [ -x "$bin/pg_verifybackup" ] && return 0
    done
    return 1
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "error: cargo is missing: install Rust 1.90 or later first (https://rustup.rs)" >&2
    exit 1
fi

# cargo needs a linker; zstd, lz4 and BLAKE3 are compiled from their C and assembler sources. gcc alone brings no libc
# to link with.
if ! printf '#include <stdlib.h>\nint main(void) { return 0; }\n' | cc -x c -o /dev/null - >/dev/null 2>&1; then
    missing+=(gcc libc6-dev)
fi
# libFuzzer comes as C++ source with the fuzz targets, which lint checks too.
[ "$purpose" != lint ] || need c++ g++
if [ "$purpose" != build ] && [ "$purpose" != lint ]; then
    have_postgresql || missing+=(postgresql)
    need fusermount3 fuse3
fi
if [ "$purpose" = test ] || [ "$purpose" = bench ]; then
    need mkfs.ext4 e2fsprogs
    need losetup mount
    need runuser util-linux
    need fio fio
    # Hosts of a mount server: network namespaces with an sshd each.
    need ip iproute2
    need ssh openssh-client
    need sshd openssh-server
fi
if [ "$purpose" = test ] || [ "$purpose" = bench ]; then
    need mkfs.xfs xfsprogs
    need mkfs.btrfs btrfs-progs
fi
if [ "$purpose" = test ]; then
    need ps procps
    need python3 python3
    # scripts/postgresql-builds.sh fetches other major versions with it.
    need npm npm
    need tc iproute2
    need curl curl
    # Looks at the mount server's page.
    need chromium-headless-shell chromium-headless-shell
fi
if [ "$purpose" = peers ]; then
    need pgbackrest pgbackrest
    need rsync rsync
    need lz4 lz4
    # Barman comes from PyPI, into an environment of its own.
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
fi

# In a small VM, a container or a chroot nobody has made the link that fusermount3 unmounts by, and without udev nobody
# applies fuse3's own rule, MODE="0666".
prepare_fuse() {
    case $purpose in build | lint) return 0 ;; esac
    if [ "$(id -u)" = 0 ] && [ ! -e /etc/mtab ]; then
        echo "making /etc/mtab, a link to /proc/self/mounts, which fusermount3 needs"
        ln -s ../proc/self/mounts /etc/mtab || echo "warning: ordinary users cannot unmount" >&2
    fi
    [ "$(id -u)" = 0 ] && [ -c /dev/fuse ] || return 0
    [ "$(stat -c %a /dev/fuse)" != 666 ] && [ ! -d /run/udev/data ] || return 0
    echo "giving /dev/fuse the mode that fuse3 gives it through udev: 0666"
    chmod 0666 /dev/fuse || echo "warning: /dev/fuse stays closed to ordinary users" >&2
}

if [ ${#missing[@]} = 0 ]; then
    prepare_fuse
    exit 0
fi

echo "missing here: ${missing[*]}"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: this script installs on Debian only; please install what provides these Debian packages: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=()
elif command -v sudo >/dev/null 2>&1; then
    as_root=(sudo)
else
    echo "error: installing needs root, and there is no sudo; as root: apt-get install ${missing[*]}" >&2
    exit 1
fi

install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

"${as_root[@]}" apt-get update -q
no_cluster=/etc/postgresql-common/createcluster.d/pghydrant-no-main-cluster.conf
case " ${missing[*]} " in
*" postgresql "*)
    # Debian's server package creates a cluster "main" and starts it, unless told not to before it is installed.
    install postgresql-common
    "${as_root[@]}" mkdir -p "${no_cluster%/*}"
    echo "create_main_cluster = false" | "${as_root[@]}" tee "$no_cluster" >/dev/null
    trap '"${as_root[@]}" rm -f "$no_cluster"' EXIT
    ;;
esac
install "${missing[@]}"
prepare_fuse
