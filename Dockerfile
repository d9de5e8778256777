# cellrefine for a machine with an NVIDIA GPU.
#
#   docker build -t cellrefine .
#   docker run --rm --gpus all -v "$PWD:/data" -u "$(id -u):$(id -g)" cellrefine doctor --device cuda
#   docker run --rm --gpus all -v "$PWD:/data" -u "$(id -u):$(id -g)" cellrefine \
#       embed --device cuda --corpus cells.cells --checkpoint runs/refined --out cells.parquet
#
# The host needs NVIDIA's container toolkit and a driver for CUDA 13 (580 or later). Without a GPU the same image runs on the CPU
# (leave --gpus away). Other architectures than 8.0 and 9.0a: --build-arg CELLREFINE_CUDA_ARCHS="sm_90a sm_100 compute_80".

ARG CUDA=13.0.1
ARG OS=ubuntu24.04

FROM nvidia/cuda:${CUDA}-devel-${OS} AS build
ARG RUST=1.95.0
ARG CELLREFINE_CUDA_ARCHS
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl g++ && rm -rf /var/lib/apt/lists/*
RUN curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain ${RUST}
ENV PATH=/root/.cargo/bin:/usr/local/cuda/bin:$PATH
WORKDIR /src
COPY . .
# An empty variable would name no architecture at all.
RUN if [ -z "$CELLREFINE_CUDA_ARCHS" ]; then unset CELLREFINE_CUDA_ARCHS; fi; cargo install --locked --path . --root /opt/cellrefine
# The kernels must be inside: a build without nvcc would succeed as well, and run on the CPU alone.
RUN ! /opt/cellrefine/bin/cellrefine doctor --json | grep -q '"nvcc":"missing' \
    && /opt/cellrefine/bin/cellrefine man --out /opt/cellrefine/share/man/man1 \
    && mkdir -p /opt/cellrefine/share/bash-completion/completions \
    && /opt/cellrefine/bin/cellrefine completions bash > /opt/cellrefine/share/bash-completion/completions/cellrefine

# The driver comes from the host; of CUDA's own libraries only cuBLASLt is loaded.
FROM nvidia/cuda:${CUDA}-runtime-${OS}
COPY --from=build /opt/cellrefine /usr/local
WORKDIR /data
ENTRYPOINT ["cellrefine"]
CMD ["doctor"]
