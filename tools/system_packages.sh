#!/usr/bin/env bash
# Debian packages that some tests use. Each such test skips, with its reason, where its package is absent, so a machine
# without apt or without root still runs the rest.
set -euo pipefail

packages=(clang libclang-rt-14-dev libsimde-dev libdeflate-dev zlib1g-dev libpng-dev)

command -v apt-get >/dev/null || { echo "no apt-get: tests that need ${packages[*]} skip"; exit 0; }
missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "not root: tests that need ${missing[*]} skip"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
