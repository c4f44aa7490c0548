#!/usr/bin/env bash
# Makes the environment that bench/failover.py compares with, and prints the path of its `patroni`.
# Not below /root or the checkout: Patroni runs as Postgres' user, who must be able to read all of it,
# its interpreter too. Another folder: PATRONI_ENV=/somewhere.
set -euo pipefail

folder=${PATRONI_ENV:-/var/tmp/flyd-patroni}
python=${PYTHON:-/usr/bin/python3}
packages=('patroni[etcd3]==4.1.5' 'psycopg[binary]>=3.2,<4')

if [ ! -f "$folder/.ready" ]; then
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "patroni-env: $python has no venv; apt-get install python3-venv, or set PYTHON" >&2
    exit 1
  fi
  rm -rf "$folder"
  "$python" -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}" >&2
  chmod -R a+rX "$folder"
  touch "$folder/.ready"
fi
echo "$folder/bin/patroni"
