# syntax=docker/dockerfile:1
# Two images: `docker build --target cpu .`, and `docker build .` (target `cuda`, the last one, which is what RunPod builds).
# Both are plain Debian-family images with a shell, curl and CA certificates, run as root: RunPod's test harness needs all of these.

ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG CUDA_BUILD_IMAGE=nvidia/cuda:12.8.1-devel-ubuntu24.04
ARG CUDA_RUN_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04

FROM ${RUST_IMAGE} AS rust

# ---- CPU -------------------------------------------------------------------------------------------------------------------------

FROM rust AS build-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ pkg-config && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# One cache for each processor, used by one build at a time: builds side by side could otherwise install each other's binaries.
ARG TARGETARCH TARGETVARIANT
RUN --mount=type=cache,id=worker-candle-registry-${TARGETARCH}${TARGETVARIANT},sharing=locked,target=/usr/local/cargo/registry \
    --mount=type=cache,id=worker-candle-cpu-${TARGETARCH}${TARGETVARIANT},sharing=locked,target=/src/target \
    cargo build --release --locked && install -D target/release/worker-candle /out/worker-candle

FROM debian:bookworm-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /out/worker-candle /usr/local/bin/worker-candle
COPY handler.py /app/handler.py
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/worker-candle/
# The platform's store of cached models, and where downloads go when a network volume is there. And the port that load balancing looks at: with
# no queue and no other PORT set, the image serves HTTP there.
ENV BASE_PATH=/runpod-volume \
    HF_HOME=/runpod-volume/huggingface-cache \
    HF_HUB_CACHE=/runpod-volume/huggingface-cache/hub \
    PORT=80
WORKDIR /app
# No test_input.json here: with it, the binary would run that one job instead of serving on PORT.
CMD ["worker-candle"]

# ---- NVIDIA GPUs -----------------------------------------------------------------------------------------------------------------

FROM ${CUDA_BUILD_IMAGE} AS build-cuda
# The oldest GPU to support; there is none at build time to ask. Most of candle's kernels are compiled by the driver for the GPU at hand, so they
# run on newer ones too. Those for quantized weights are machine code for this one architecture: 80 serves Ampere and Ada (8.0 to 8.9), and on
# others the worker refuses QUANTIZATION where candle's operations compute. Our own kernels are machine code for 8.0 to 12.0.
ARG CUDA_COMPUTE_CAP=80
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP} \
    RUSTUP_HOME=/usr/local/rustup \
    CARGO_HOME=/usr/local/cargo \
    PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN apt-get update && apt-get install -y --no-install-recommends g++ pkg-config ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=rust /usr/local/rustup /usr/local/rustup
COPY --from=rust /usr/local/cargo /usr/local/cargo
WORKDIR /src
COPY . .
ARG TARGETARCH TARGETVARIANT
RUN --mount=type=cache,id=worker-candle-registry-${TARGETARCH}${TARGETVARIANT},sharing=locked,target=/usr/local/cargo/registry \
    --mount=type=cache,id=worker-candle-cuda-${CUDA_COMPUTE_CAP}-${TARGETARCH}${TARGETVARIANT},sharing=locked,target=/src/target \
    cargo build --release --locked --features cuda && install -D target/release/worker-candle /out/worker-candle

FROM ${CUDA_RUN_IMAGE} AS cuda
# The driver comes from the host; these are the libraries that candle calls.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl libcublas-12-8 libcurand-12-8 cuda-nvrtc-12-8 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /out/worker-candle /usr/local/bin/worker-candle
COPY handler.py /app/handler.py
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/worker-candle/
ENV BASE_PATH=/runpod-volume \
    HF_HOME=/runpod-volume/huggingface-cache \
    HF_HUB_CACHE=/runpod-volume/huggingface-cache/hub \
    PORT=80
WORKDIR /app
CMD ["worker-candle"]
