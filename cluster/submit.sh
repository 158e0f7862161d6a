#!/usr/bin/env bash
# Sends a run to a running Ray cluster:  cluster/submit.sh [run|compare|sweep] RUN.yaml [section.key=value ...]
#
# Uploads this folder without .git, environments, runs and caches; paths in the YAML and the overrides are taken from
# here, so data, base and output must be on storage that the cluster's nodes see under the same path.
#   RAY_API_SERVER_ADDRESS  the cluster's job address (default http://127.0.0.1:8265)
#   PROPER_DS_PYTHON        the Python that has proper_ds's packages on the cluster (default: python)
#   DRY_RUN=1               print size and command, send nothing
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
command=run
case $1 in run | compare | sweep) command=$1; shift ;; esac
[ $# -ge 1 ] || { echo "submit: give the YAML after $command" >&2; exit 2; }
yaml=$1; shift
[ -f "$yaml" ] || { echo "submit: $yaml is no file" >&2; exit 2; }
yaml=$(realpath --relative-to="$root" "$yaml")
case $yaml in ../*) echo "submit: $yaml must lie inside $root, which is what gets uploaded" >&2; exit 2 ;; esac

address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
python=${PROPER_DS_PYTHON:-python}
# as in .gitignore, which Ray heeds as well: a leading slash means this folder only
excludes=(/.git /.venv /runs /tests /docs '**/__pycache__' '.*_cache' '.hypothesis' '*.egg-info')
env_vars=(PROPER_DS_ROOT "$PWD")
for name in HF_HUB_OFFLINE HF_HOME HF_TOKEN NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
  [ -n "${!name:-}" ] && env_vars+=("$name" "${!name}")
done
runtime_env=$(python3 - "${excludes[@]}" -- "${env_vars[@]}" <<'PY'
import json, sys
cut = sys.argv.index("--")
names, values = sys.argv[cut + 1 :: 2], sys.argv[cut + 2 :: 2]
print(json.dumps({"excludes": sys.argv[1:cut], "env_vars": dict(zip(names, values))}))
PY
)
size=$(cd "$root" && tar -c --exclude=./.git --exclude=./.venv --exclude=./runs --exclude='__pycache__' \
  --exclude='.*_cache' --exclude=.hypothesis --exclude='*.egg-info' --exclude=./tests --exclude=./docs . | wc -c)
job=(ray job submit --address "$address" --working-dir "$root" --runtime-env-json "$runtime_env" --
  "$python" -m proper_ds "$command" "$yaml" "$@")
echo "upload: about $((size / 1024)) kB from $root"
echo "command:$(printf ' %q' "${job[@]}")"
[ -z "${DRY_RUN:-}" ] || exit 0
command -v ray > /dev/null || { echo "submit: no \`ray\` on PATH; try PATH=$root/.venv/bin:\$PATH" >&2; exit 2; }
exec "${job[@]}"
