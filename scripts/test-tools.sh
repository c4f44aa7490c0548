#!/usr/bin/env bash
# What the tests need and no wheel has, from Debian. Only as root; without it the tests concerned are skipped and say so.
set -euo pipefail

declare -A package_of=(
  [btrfs]=btrfs-progs [mkfs.btrfs]=btrfs-progs
  [debootstrap]=debootstrap
  [ip]=iproute2 [iptables]=iptables [nft]=nftables [wg]=wireguard-tools [wireguard-go]=wireguard-go
  [curl]=curl
)
missing=()
for program in "${!package_of[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "test-tools: some tests will be skipped; sudo apt-get install ${missing[*]}" >&2
  exit 0
fi
echo "test-tools: installing ${missing[*]}" >&2
apt-get update -qq || echo "test-tools: some package lists could not be fetched; trying with the others" >&2
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
