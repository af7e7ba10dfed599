#!/bin/sh
# Builds an image with docker, podman or buildah, whichever works here:   sh docker/build.sh cpu|gpu [OPTION...]
# Options (--build-arg BASE=...) go to that builder. Environment: BUILDER names one of the three, IMAGE the image; PIP_CONF
# is a pip.conf and PIP_CA a certificate that it calls /run/secrets/ca: pip alone sees them, no layer holds them.
set -eu

usable() {
    case $1 in
        docker) docker info ;; # the client alone builds nothing
        *) "$1" --version ;;
    esac >/dev/null 2>&1
}

device=${1:?"name the image: cpu or gpu"}
shift
cd "$(dirname "$0")/.."
image=${IMAGE:-megat2i:$device}
if [ -z "${BUILDER:-}" ]; then
    for BUILDER in docker podman buildah none; do
        if usable "$BUILDER"; then break; fi
    done
fi
case $BUILDER in
    docker | podman) build=build ;;
    buildah) build=bud ;;
    none) echo "No image can be built here: install podman or buildah, or start Docker." >&2 && exit 1 ;;
    *) echo "BUILDER=$BUILDER is not one of docker, podman, buildah." >&2 && exit 1 ;;
esac

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then revision=$revision+changes; fi
if [ -n "${PIP_CONF:-}" ]; then set -- --secret "id=pip,src=$PIP_CONF" "$@"; fi
if [ -n "${PIP_CA:-}" ]; then set -- --secret "id=ca,src=$PIP_CA" "$@"; fi

DOCKER_BUILDKIT=1 "$BUILDER" "$build" --file "docker/$device.Dockerfile" --tag "$image" \
    --build-arg "REVISION=$revision" "$@" .
echo "$image, revision $revision: $("$BUILDER" images --format '{{.Size}}' "$image")"
