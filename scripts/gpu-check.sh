#!/usr/bin/env bash
# Everything that one GPU has to say about this repository, in ten minutes and one call.
#
#   scripts/gpu-check.sh --bundle DIR          here: builds what the GPU's machine needs (no Rust there) into DIR, under 64 MiB
#   DIR/scripts/gpu-check.sh [--out FOLDER]    there: runs it all; writes FOLDER/gpu-YYYYMMDD-COMMIT.json and .md
#   scripts/gpu-check.sh --dry-run             anywhere: the same flow on the emulator with tiny shapes, nothing timed
#
# The GPU's machine needs bash, python3 and an NVIDIA driver for CUDA 13; cuBLASLt, PyTorch, transformers and compute-sanitizer are used
# where they are. A stage that fails or runs out of time is recorded, and the next one runs. Nothing of the card's settings is touched.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The compiled tests of the ops, built where they are not.
ops_binary() {
    cd "$here"
    cargo test --release --locked --quiet --test ops --no-run --message-format=json |
        python3 -c 'import json, sys
rows = (json.loads(line) for line in sys.stdin)
print([r["executable"] for r in rows if r.get("executable") and r["target"]["name"] == "ops"][-1])'
}

bundle() {
    local into=$1
    cd "$here"
    scripts/cuda-toolkit.sh
    cargo build --release --locked
    local ops
    ops=$(ops_binary)
    rm -rf "$into"
    mkdir -p "$into/bin" "$into/scripts"
    strip -o "$into/bin/cellrefine" "${CARGO_TARGET_DIR:-target}/release/cellrefine"
    strip -o "$into/bin/ops" "$ops"
    cp scripts/gpu-check.sh "$into/scripts/"
    cp -r scripts/gpu_check "$into/scripts/"
    rm -rf "$into/scripts/gpu_check/__pycache__"
    cp -r kernels "$into/kernels"
    git rev-parse --short HEAD > "$into/COMMIT"
    if ! git diff --quiet HEAD; then echo "$(cat "$into/COMMIT")-changed" > "$into/COMMIT"; fi
    "$into/bin/cellrefine" doctor --json --quiet | python3 -c 'import json, sys
d = json.load(sys.stdin)
nvcc = d["cuda"]["nvcc"]
sys.exit(f"no GPU code in this build: {nvcc}" if nvcc.startswith("missing") else 0)'
    local kilobytes
    kilobytes=$(du -sk "$into" | cut -f1)
    echo "$into: $((kilobytes / 1024)) MiB, commit $(cat "$into/COMMIT")"
    if ((kilobytes > 64 * 1024)); then
        echo "the bundle is larger than 64 MiB" >&2
        exit 1
    fi
}

case ${1:-} in
--bundle)
    bundle "${2:?a folder to build into}"
    ;;
--ops-binary)
    ops_binary
    ;;
--help | -h)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    ;;
*)
    exec python3 "$here/scripts/gpu_check/flow.py" --root "$here" "$@"
    ;;
esac
