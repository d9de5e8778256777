#!/usr/bin/env bash
# The evaluation of CellRefine (arXiv 2605.07938) over data sets that you have: docs/paper.md says what it does and how to read it.
#
#   scripts/reproduce-paper.sh Pancreas=baron.h5ad MS=ms.h5ad --checkpoint Geneformer-V1-10M --vocab vocab.tsv --label cell_type
#   scripts/reproduce-paper.sh Liver=liver.h5ad LivST1=livst1.h5ad --checkpoint CKPT --vocab vocab.tsv --out-of-domain Liver:LivST1
#
# Needs Python 3.9 and nothing else. Finished parts are kept under --out: the same command continues an interrupted run.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [[ -z "${CELLREFINE:-}" ]]; then
    cargo build --release --quiet --manifest-path "$here/../Cargo.toml"
    CELLREFINE="${CARGO_TARGET_DIR:-$here/../target}/release/cellrefine"
fi
export CELLREFINE
exec python3 "$here/reproduce_paper/protocol.py" "$@"
