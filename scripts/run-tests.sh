#!/usr/bin/env bash
# Every test of the workspace. Ends with one line that counts them; a test that lacks something of the machine has
# said so by name (tests/support/left_out.rs) and is counted as skipped, never as passed. With CI=true or
# PGHYDRANT_REQUIRE_ALL=1 it has failed instead.
set -uo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
report=$(mktemp -d)
trap 'rm -rf "$report"' EXIT
export PGHYDRANT_TESTS_LEFT_OUT=$report/left-out
: >"$PGHYDRANT_TESTS_LEFT_OUT"

# Integration tests wait for servers more than they compute: a few more of them than there are cores.
threads=${PGHYDRANT_TEST_THREADS:-$(($(nproc) + 2))}
"$cargo" test --workspace --locked --no-fail-fast -- --test-threads "$threads" 2>&1 | tee "$report/log"
status=${PIPESTATUS[0]}

skipped=$(wc -l <"$PGHYDRANT_TESTS_LEFT_OUT")
if [ "$skipped" -gt 0 ]; then
    echo
    echo "left out on this machine:"
    sed 's/^/    /' "$PGHYDRANT_TESTS_LEFT_OUT"
fi
echo
awk -v skipped="$skipped" '
    /^test result: / { passed += $4; failed += $6 }
    END { printf "%d passed, %d failed, %d skipped\n", passed - skipped, failed, skipped }' "$report/log"
exit "$status"
