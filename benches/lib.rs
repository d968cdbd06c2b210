//! Benchmarks of the parts; whole restores are timed by `restore.sh` beside this file.
