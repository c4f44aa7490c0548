#!/usr/bin/env bash
# Makes the image flyd-base:bookworm (a minimal Debian 12) that tests and the local cluster build on.
# Where a registry answers it is pulled; where none does it is made here by debootstrap, from the mirror
# that apt uses. Does nothing if the image is there already. About 40 s, once.
set -euo pipefail

image=${1:-flyd-base:bookworm}
public=debian:bookworm-slim

say() { printf 'base-image: %s\n' "$*" >&2; }

exec 9>/tmp/flyd-base-image.lock
flock 9  # two test runs at once make it once
if docker image inspect "$image" >/dev/null 2>&1; then
  say "$image is here already"
  exit 0
fi
if ! docker version >/dev/null 2>&1; then
  say "no Docker engine answers. Is it running, and may this user speak to it (group docker)?"
  exit 1
fi

say "asking a registry for $public"
if timeout 60 docker pull --quiet "$public" >/dev/null 2>&1; then
  docker tag "$public" "$image"
  say "$image is $public"
  exit 0
fi
say "no registry answers, so the image is made here"

if [ "$(id -u)" != 0 ]; then
  say "debootstrap needs root: run 'sudo $0' once"
  exit 1
fi
if ! command -v debootstrap >/dev/null; then
  say "installing debootstrap"
  apt-get update -qq || say "some package lists could not be fetched; trying with the others"
  apt-get install -y -qq debootstrap >/dev/null
fi

# The first mirror of apt's own: one-line and deb822 files alike.
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null || true; } |
  sed -nE 's/^URIs:[[:space:]]*([^[:space:]]+).*/\1/p; s/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+).*/\2/p' |
  grep -E '/debian/?$' | head -n 1 || true)
mirror=${mirror:-http://deb.debian.org/debian}

root=$(mktemp -d /var/tmp/flyd-base.XXXXXX)
trap 'rm -rf --one-file-system "$root"' EXIT
say "fetching Debian bookworm from $mirror (about 40 s)"
if ! debootstrap --variant=minbase --include=ca-certificates bookworm "$root/tree" "$mirror" >"$root/log" 2>&1; then
  say "debootstrap failed; its last lines:"
  tail -n 5 "$root/log" >&2
  exit 1
fi
rm -rf "$root"/tree/var/cache/apt/archives/*.deb "$root"/tree/var/lib/apt/lists/*
# The authorities this machine trusts, so that what is built on the image gets through the same proxies.
cp /etc/ssl/certs/ca-certificates.crt "$root/tree/etc/ssl/certs/ca-certificates.crt"
say "importing it"
tar -C "$root/tree" --numeric-owner --one-file-system -c . |
  docker import --change 'CMD ["bash"]' --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$image" >/dev/null
say "$image is ready"
