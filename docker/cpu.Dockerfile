# The CPU image: the demo, data preparation, the server and, with EXTRAS=serve,test, the tests.   make image
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
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install -c constraints.txt torch numpy pip setuptools wheel
ARG EXTRAS=serve
COPY pyproject.toml docker/requirements.py ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python requirements.py pyproject.toml "$EXTRAS" > requirements.txt \
    && pip install -c constraints.txt --no-build-isolation -r requirements.txt
WORKDIR /opt/megat2i
COPY . .
# Editable: a checkout that is mounted over /opt/megat2i is what runs.
RUN pip install --no-deps --no-build-isolation -e .

FROM ${BASE} AS runtime
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 1777 /workspace
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/megat2i /opt/megat2i
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megat2i, CPU" \
      org.opencontainers.image.description="Megatron-style training of auto-regressive text-to-image models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# HOME: any user id may run the image, and caches need a folder that this user can write.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 MEGAT2I_REVISION=${REVISION}
USER 1000:1000
WORKDIR /workspace
RUN python -m megat2i.kernels
CMD ["python", "-m", "megat2i.kernels"]
