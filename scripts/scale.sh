#!/bin/sh
# Opens, draws from, resumes and reads a corpus of 100 million cells whose tokens are holes of sparse files: about 1.8 GB of
# disk, some minutes. docs/scaling.md holds its output. Usage: scripts/scale.sh [CELLS [FOLDER]]
set -eu
cd "$(dirname "$0")/.."
export CELLREFINE_SCALE_CELLS="${1:-100000000}" CELLREFINE_SCALE_DIR="${2:-${TMPDIR:-/tmp}}"
exec cargo test --release --test scale -- --ignored --nocapture --test-threads 1
