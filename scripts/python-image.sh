#!/usr/bin/env bash
# Makes the image flyd-python:bookworm (Python and pip) that the examples' Dockerfiles build on in the demo
# and in tests. Where a registry answers it is python:3.12-slim; where none does it is made on flyd-base.
set -euo pipefail
cd "$(dirname "$0")"

image=flyd-python:bookworm
public=python:3.12-slim

docker image inspect "$image" >/dev/null 2>&1 && exit 0
if timeout 120 docker pull --quiet "$public" >/dev/null 2>&1; then
  docker tag "$public" "$image"
  exit 0
fi
./base-image.sh
printf 'python-image: installing Python on flyd-base (about 20 s, once)\n' >&2
docker build --quiet --network host --tag "$image" - >/dev/null 2>&1 <<'DOCKERFILE'
FROM flyd-base:bookworm
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 python3-pip \
 && rm -rf /var/lib/apt/lists/* /usr/lib/python3*/EXTERNALLY-MANAGED \
 && ln -s python3 /usr/bin/python
DOCKERFILE
