#!/usr/bin/env bash
# Starts TensorBoard for runs/ on all interfaces: ./start_tensorboard.sh [--port N] [--logdir DIR]
# Works from any folder; further options go to TensorBoard.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=6006
logdir=$root/runs
others=()
while (($#)); do
    case $1 in
        --port | --logdir)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            if [[ $1 == --port ]]; then port=$2; else logdir=$2; fi
            shift 2 ;;
        --port=*) port=${1#*=}; shift ;;
        --logdir=*) logdir=${1#*=}; shift ;;
        -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) others+=("$1"); shift ;;
    esac
done

tensorboard=$root/.venv/bin/tensorboard
[[ -x $tensorboard ]] || tensorboard=$(command -v tensorboard || true)
if [[ -z $tensorboard ]]; then
    echo "error: TensorBoard is not installed; run: make install" >&2
    exit 2
fi

echo "TensorBoard for $logdir: http://localhost:$port (Ctrl+C ends it)"
exec "$tensorboard" --logdir "$logdir" --port "$port" --bind_all "${others[@]}"
