#!/usr/bin/env bash
# Generates flyd/v1 from proto/ into the directory given (default: the repository) and lints the definitions.
# google/api comes from the googleapis-common-protos wheel: buf cannot fetch its registry offline.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/proto" "$work/google/api" "$out/flyd/v1"
cp -r proto/flyd "$work/proto/"
cp "$site"/google/api/{annotations,http}.proto "$work/google/api/"
printf 'version: v2\nmodules:\n  - path: proto\n  - path: .\n    includes: [google]\n    lint: {ignore: [google]}\nlint: {use: [STANDARD]}\n' >"$work/buf.yaml"
(cd "$work" && "$OLDPWD/.venv/bin/buf" lint proto)
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m grpc_tools.protoc -I proto -I "$work" \
  --python_out="$out" --mypy_out="quiet:$out" --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" proto/flyd/v1/*.proto
touch "$out/flyd/v1/__init__.py"
