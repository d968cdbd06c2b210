# What README's commands and CI call. Each target installs what it misses on Debian, and says what it installs.
CARGO ?= cargo
export CARGO

.PHONY: help build demo test lint bench bench-peers bench-parts fuzz soak

help:
	@echo "make build   the release binary: target/release/pghydrant"
	@echo "make demo    back up and restore a throw-away cluster (under two minutes, plus the build)"
	@echo "make test    every test, with real PostgreSQL, FUSE mounts and loop devices"
	@echo "make lint    formatting and clippy, warnings are errors; the fuzz workspace too"
	@echo "make bench   everything, against other tools and the device's ceiling (BENCH='--size 3 --only restore')"
	@echo "make bench-peers  installs the other tools that Debian and PyPI have"
	@echo "make bench-parts  the parts alone, by criterion: format, engine, copier"
	@echo "make fuzz    each fuzz target for a minute (FUZZ_SECONDS=60)"
	@echo "make soak    the crash test with 400 kills instead of 20 (SOAK_KILLS=400)"

build:
	@scripts/install-dependencies.sh build
	$(CARGO) build --release --locked --package pghydrant

demo:
	@scripts/install-dependencies.sh demo
	$(CARGO) run --release --locked --package pghydrant -- demo

test:
	@scripts/install-dependencies.sh test
	@scripts/postgresql-builds.sh
	scripts/run-tests.sh

lint:
	@scripts/install-dependencies.sh lint
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --manifest-path fuzz/Cargo.toml --locked -- -D warnings

bench:
	@scripts/install-dependencies.sh bench
	$(CARGO) build --release --locked --package pghydrant --package pghydrant-benches --bin pghydrant --bin bench
	PGHYDRANT_BENCH_PEERS=$(CURDIR)/target/peers/bin $${CARGO_TARGET_DIR:-target}/release/bench $(BENCH)

bench-peers:
	@scripts/install-dependencies.sh peers
	@scripts/bench-peers.sh target/peers

# The parts alone, by criterion.
bench-parts:
	@scripts/install-dependencies.sh build
	$(CARGO) bench --locked --package pghydrant-benches

fuzz:
	@scripts/install-dependencies.sh lint
	scripts/fuzz.sh

soak:
	@scripts/install-dependencies.sh test
	@scripts/postgresql-builds.sh
	PGHYDRANT_KILLS=$${SOAK_KILLS:-400} $(CARGO) test --locked --package pghydrant --test integration -- --nocapture killed_at_random_moments
