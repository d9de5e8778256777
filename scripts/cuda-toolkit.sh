#!/usr/bin/env bash
# Installs nvcc 13.0 and what it needs from the PyPI wheels into .cuda/ (about 105 MB to download, 271 MB on disk), where build.rs
# finds it. Needs Python 3 with pip; no root, no GPU, no driver. Does nothing when the same versions are there already.
#
#   scripts/cuda-toolkit.sh            nvcc
#   scripts/cuda-toolkit.sh --sass     nvcc, and cuobjdump with nvdisasm in .sass/ for scripts/sass-report.sh (5 MB more)
#
# The wheels are NVIDIA's, under its licence: a build tool, not to be committed or shipped.
set -euo pipefail
cd "$(dirname "$0")/.."

# One release, named in full: the nvcc wheel does not pin its parts, and a newer nvcc writes PTX that a 13.0 driver refuses.
nvcc=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
# The 13.0 wheels hold no disassembler; these read its output. A folder of their own: pip --target replaces nvidia/ as a whole.
sass=(nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86)

. scripts/wheels.sh
before=$(cat .cuda/installed 2>/dev/null || true)
install .cuda nvidia/cu13/bin/nvcc files "${nvcc[@]}"
if [[ $(<.cuda/installed) != "$before" ]]; then
  touch build.rs # which looks for the compiler, and is run again
fi
.cuda/nvidia/cu13/bin/nvcc --version | tail -2
if [[ ${1:-} == --sass ]]; then
  install .sass nvidia/cu13/bin/cuobjdump files "${sass[@]}"
fi
