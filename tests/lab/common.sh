# Sourced by the lab's scripts: where things are cached and how the lab is reached.
# shellcheck shell=bash
set -euo pipefail
LAB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$LAB_DIR/../.." && pwd)
HUTCH_CACHE=${HUTCH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hutch}
LAB_RUN=${LAB_RUN:-$ROOT/target/lab}
LAB_PORT=${LAB_PORT:-17777}
mkdir -p "$HUTCH_CACHE" "$LAB_RUN"

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { printf 'lab: %s\n' "$*" >&2; exit 1; }


# lab_is_up: whether someone started the lab before; whoever did ends it.
lab_is_up() { [ -f "$LAB_RUN/pid" ] && kill -0 "$(cat "$LAB_RUN/pid")" 2>/dev/null; }
