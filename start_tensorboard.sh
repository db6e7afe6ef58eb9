#!/usr/bin/env bash
# Starts TensorBoard for runs/, for this machine alone: ./start_tensorboard.sh [--port N] [--logdir DIR]
# --bind_all opens it to the network, --host ADDRESS to those who reach that address of this machine.
# Works from any folder; further options go to TensorBoard.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
declare -A value=([port]=6006 [logdir]=$root/runs [host]=localhost [path_prefix]=)
reach=()
others=()
while (($#)); do
    case $1 in
        --port | --logdir | --host | --path_prefix)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            set -- "$1=$2" "${@:3}" ;;
        --port=* | --logdir=* | --host=* | --path_prefix=*)
            name=${1%%=*}
            value[${name#--}]=${1#*=}
            [[ $name != --host ]] || reach+=("$1")
            shift ;;
        --bind_all) reach+=("$1"); shift ;;
        -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) others+=("$1"); shift ;;
    esac
done
if ((${#reach[@]} > 1)); then
    echo "error: use one of ${reach[*]}" >&2
    exit 2
fi

tensorboard=$root/.venv/bin/tensorboard
[[ -x $tensorboard ]] || tensorboard=$(command -v tensorboard || true)
if [[ -z $tensorboard ]]; then
    echo "error: TensorBoard is not installed; run: make install" >&2
    exit 2
fi

port=${value[port]}
host=${value[host]}
[[ $host != *:* ]] || host="[$host]"
url="http://$host:$port${value[path_prefix]}"
[[ ${reach[*]} != --bind_all ]] || url+=", and every address of this machine"
[[ $port == [1-9]* ]] || url="its address follows" # TensorBoard chooses the port
if (: <"/dev/tcp/localhost/$port") 2>/dev/null; then
    echo "error: port $port is in use; choose another with --port N" >&2
    exit 2
fi
echo "TensorBoard for ${value[logdir]}: $url (Ctrl+C ends it)"
exec "$tensorboard" --logdir "${value[logdir]}" --port "$port" --path_prefix "${value[path_prefix]}" \
    "${reach[@]}" "${others[@]}"
