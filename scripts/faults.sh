#!/usr/bin/env bash
# Everything that can happen to a run and its files, tried in full; writes the table of docs/reliability.md.
# About 15 minutes on 2 cores after the build; `cargo test` tries a selection of the same cases in two.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report"' EXIT
tests=(--test faults_disk --test faults_inputs --test faults_runs)
cargo test --release --no-run "${tests[@]}" || exit
start=$SECONDS
commit=$(git rev-parse --short HEAD)
FAULTS=all FAULTS_REPORT=$report cargo test --release --no-fail-fast "${tests[@]}"
status=$?
python3 scripts/faults_table.py "$report" --seconds $((SECONDS - start)) --commit "$commit" \
    --write docs/reliability.md || exit
exit $status
