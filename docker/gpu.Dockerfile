# The GPU image, for one machine and for clusters (Docker, podman, enroot with pyxis, Apptainer).   make image-gpu
# PyTorch's wheels bring CUDA 13.0, so the base has none; the driver must be 580 or newer. EXTENSIONS, some of
# "flash-attn apex", are compiled in stages of their own, by the compiler that NVIDIA publishes as wheels.
# BASE is any Debian or Ubuntu with Python 3.11 or newer. What pip needs to reach an index (an address, a certificate)
# comes in as the secrets `pip` (a pip.conf) and `ca`, which only pip sees: no layer holds them.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /requirements
# What changes seldom is a layer of its own: first torch, then all other requirements, last the sources.
COPY constraints.txt docker/constraints-gpu.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install -c constraints.txt -c constraints-gpu.txt torch numpy pip setuptools wheel
ARG EXTRAS=gpu,serve
COPY pyproject.toml docker/requirements.py ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python requirements.py pyproject.toml "$EXTRAS" > requirements.txt \
    && pip install -c constraints.txt -c constraints-gpu.txt --no-build-isolation -r requirements.txt

# nvcc and what it needs, in the version of torch's CUDA; nothing where nothing is to be compiled.
FROM build AS compiler
ARG DEBIAN_FRONTEND=noninteractive
ARG EXTENSIONS
ENV CUDA_HOME=/opt/cuda
# hadolint ignore=DL3008
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    mkdir /wheels && if [ -n "$EXTENSIONS" ]; then \
        apt-get update && apt-get install -y --no-install-recommends g++ git python3-dev \
        && rm -rf /var/lib/apt/lists/* \
        && pip install -c constraints.txt -c constraints-gpu.txt "cuda-toolkit[nvcc,cccl,crt,nvvm,cudart]" \
        && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13" "$CUDA_HOME" \
        && ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so" \
        && "$CUDA_HOME/bin/nvcc" --version; \
    fi

# flash-attn publishes no wheels for this torch. One compiler takes up to 5 GB: MAX_JOBS = memory / 5 GB.
FROM compiler AS flash-attn
ARG EXTENSIONS
ARG FLASH_ATTN_ARCHITECTURES=80;90
ARG MAX_JOBS=4
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    case " $EXTENSIONS " in *" flash-attn "*) \
        FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="$FLASH_ATTN_ARCHITECTURES" NVCC_THREADS=2 \
        MAX_JOBS="$MAX_JOBS" pip wheel -c constraints-gpu.txt --no-deps --no-build-isolation \
            --no-binary flash-attn --wheel-dir /wheels flash-attn \
    ;; esac

# NVIDIA's apex is published as source only; the package of that name on the index is another project.
FROM compiler AS apex
ARG EXTENSIONS
ARG APEX_REPOSITORY=https://github.com/NVIDIA/apex
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG APEX_ARCHITECTURES=8.0;9.0
ARG MAX_JOBS=4
RUN case " $EXTENSIONS " in *" apex "*) \
        git init -q /apex && git -C /apex fetch -q --depth 1 "$APEX_REPOSITORY" "$APEX_COMMIT" \
        && git -C /apex checkout -q FETCH_HEAD && test "$(git -C /apex rev-parse HEAD)" = "$APEX_COMMIT" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$MAX_JOBS" TORCH_CUDA_ARCH_LIST="$APEX_ARCHITECTURES" \
            pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /apex \
    ;; esac

FROM build AS install
COPY --from=flash-attn /wheels /wheels
COPY --from=apex /wheels /wheels
RUN find /wheels -name '*.whl' -exec pip install --no-deps {} +
WORKDIR /opt/megat2i
COPY . .
# Editable: a checkout that is mounted over /opt/megat2i is what runs.
RUN pip install --no-deps --no-build-isolation -e .

FROM ${BASE} AS runtime
ARG DEBIAN_FRONTEND=noninteractive
# gcc and Python's headers: Triton compiles a kernel's launcher when the kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 1777 /workspace
COPY --from=install /opt/venv /opt/venv
COPY --from=install /opt/megat2i /opt/megat2i
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megat2i, GPU" \
      org.opencontainers.image.description="Megatron-style training of auto-regressive text-to-image models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# HOME: any user id may run the image, and Triton's cache needs a folder that this user can write.
# NVIDIA_*: which devices and libraries of the driver the container runtime mounts.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 MEGAT2I_REVISION=${REVISION} \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /workspace
ARG EXTENSIONS
# The import check: without a GPU the ops are PyTorch's, but every library must be there and import.
RUN python -m megat2i.kernels triton ${EXTENSIONS}
CMD ["python", "-m", "megat2i.kernels"]
