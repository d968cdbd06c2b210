#!/usr/bin/env bash
# Each fuzz target for FUZZ_SECONDS (60). Built with the stable compiler: libFuzzer needs only LLVM's coverage pass,
# which stable offers; address sanitizing would need a nightly (cargo +nightly fuzz run TARGET does that).
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${FUZZ_SECONDS:-60}
cargo=${CARGO:-cargo}
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions=on -Coverflow-checks=on"
target_dir=${CARGO_TARGET_DIR:-target}/coverage
host=$(rustc -vV | sed -n 's/^host: //p')

# With --target the flags reach the fuzzed code alone, not the build scripts, which have no libFuzzer to link to.
"$cargo" build --release --locked --bins --target "$host" --target-dir "$target_dir"
targets=${*:-$(sed -n '/^\[\[bin\]\]/,/^$/s/^name = "\(.*\)"/\1/p' Cargo.toml)}
for target in $targets; do
    echo "== $target, $seconds seconds"
    mkdir -p "corpus/$target" "artifacts/$target"
    "$target_dir/$host/release/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1 \
        -artifact_prefix="artifacts/$target/" "corpus/$target"
done
