#!/usr/bin/env bash
# Trains several named experiments side by side, one at a time on each GPU, and waits for all:
#
#   ./run_parallel_experiments.sh [OPTIONS] 'NAME [FLAGS …]' … [-- FLAGS OF ALL …]
#   ./run_parallel_experiments.sh 'lr1e3 --learning_rate 1e-3' 'lr3e4 --learning_rate 3e-4' \
#       -- --preset demo --resume latest
#
#   --gpus 0,2,3   the GPUs to take; default: CUDA_VISIBLE_DEVICES, else all of this machine
#   --slots N      train on the CPU, N experiments at a time, each on its share of the cores;
#                  default where there is no GPU: 2
#
# What an experiment prints goes to logs/NAME_gpu_ID/console_DATE_TIME.log. Ctrl+C or SIGTERM lets
# all save and end, a second one kills them. Exit code: 0 all finished, 1 one failed, 2 wrong usage,
# 130 / 143 stopped. Started again, an experiment waits for the GPU that it had before.
set -euo pipefail

usage() { sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
refuse() { echo "error: $1" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=() slots='' specs=() common=()
while (($#)); do
    case $1 in
        --gpus | --slots)
            (($# > 1)) || refuse "$1 needs a value"
            if [[ $1 == --gpus ]]; then IFS=, read -ra gpus <<<"$2"; else slots=$2; fi
            shift 2 ;;
        --gpus=*) IFS=, read -ra gpus <<<"${1#*=}"; shift ;;
        --slots=*) slots=${1#*=}; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; common=("$@"); break ;;
        -*) refuse "unknown option $1; flags of all experiments come after --" ;;
        *) specs+=("$1"); shift ;;
    esac
done
((${#specs[@]})) || { usage >&2; exit 2; }
[[ -z $slots || $slots =~ ^[1-9][0-9]*$ ]] || refuse "--slots $slots is no number of experiments"
[[ -z $slots || ${#gpus[@]} == 0 ]] || refuse "--gpus and --slots contradict each other"

names=()
declare -A flags_of=()
for spec in "${specs[@]}"; do
    read -r name flags <<<"$spec"
    [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
        refuse "'$spec' must begin with a name of letters, digits, . _ and -"
    [[ -z ${flags_of[$name]+set} ]] || refuse "two experiments have the name $name"
    xargs -n 1 <<<"$flags" >/dev/null 2>&1 || refuse "'$spec' has a quote that does not end"
    flags_of[$name]=$flags
    names+=("$name")
done

python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3 || true)
[[ -n $python ]] || refuse "Python is not installed"

# A slot is a GPU, or a share of the CPU.
threads=()
if [[ -z $slots ]] && ((${#gpus[@]} == 0)); then
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader | grep -x '[0-9]*')
    fi
fi
if ((${#gpus[@]} == 0)); then
    slots=${slots:-2}
    share=$(($(env -u OMP_NUM_THREADS nproc) / slots))
    threads=("OMP_NUM_THREADS=$((share > 0 ? share : 1))")
    for ((slot = 0; slot < slots; slot++)); do gpus+=(''); done
fi

logs=logs
for ((i = 0; i < ${#common[@]}; i++)); do # where the experiments keep theirs
    case ${common[i]//-/_} in
        __out_dir) logs=${common[i + 1]:-}/logs ;;
        __out_dir=*) logs=${common[i]#*=}/logs ;;
    esac
done

declare -A slot_of=() log_of=() name_of=() begun=()
waiting=("${names[@]}") free=("${!gpus[@]}") finished=() failed=() signal=''

# What files of experiments on this GPU are named after, as the training does.
id_of() { local id=${1:-cpu}; echo "${id//[^A-Za-z0-9.-]/-}"; }

# Whether an experiment may begin in this slot: not if it had another of these GPUs before.
suits() {
    local name=$1 slot=$2 other
    [[ -d $logs/${name}_gpu_$(id_of "${gpus[slot]}") ]] && return 0
    for other in "${gpus[@]}"; do
        [[ -d $logs/${name}_gpu_$(id_of "$other") ]] && return 1
    done
    return 0
}

start() {
    local name=$1 slot=$2 gpu=${gpus[$2]} words=() id folder log
    id=$(id_of "$gpu")
    folder=$logs/${name}_gpu_$id
    mkdir -p "$folder"
    log=$folder/console_$(date +%Y%m%d_%H%M%S).log
    if [[ -n ${flags_of[$name]} ]]; then
        mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"${flags_of[$name]}") # quotes are read
    fi
    env "${threads[@]}" CUDA_VISIBLE_DEVICES="$gpu" "$python" "$root/src/train_improved.py" \
        "${common[@]}" "${words[@]}" --experiment_name "$name" </dev/null >"$log" 2>&1 &
    slot_of[$!]=$slot name_of[$!]=$name log_of[$!]=$log begun[$!]=$SECONDS
    echo "started   $name on ${gpu:+gpu }$id, process $!, $log"
}

start_what_fits() {
    local name slot left=() rest
    for slot in "${free[@]}"; do
        rest=()
        for name in "${waiting[@]}"; do
            if [[ -n $slot ]] && suits "$name" "$slot"; then
                start "$name" "$slot"
                slot=''
            else
                rest+=("$name")
            fi
        done
        waiting=("${rest[@]}")
        [[ -z $slot ]] || left+=("$slot")
    done
    free=("${left[@]}")
}

finish() {
    local pid=$1 code=$2 name=${name_of[$1]} how=failed
    case $code in
        0) how=finished ;;
        129 | 130 | 143) how=stopped ;;
    esac
    printf '%-9s %s after %s s, exit code %s\n' "$how" "$name" $((SECONDS - begun[$pid])) "$code"
    if ((code == 0)); then
        finished+=("$name")
    else
        failed+=("$name")
        tail -n 1 "${log_of[$pid]}" | sed 's/^/          /'
    fi
    free+=("${slot_of[$pid]}")
    unset "name_of[$pid]"
}

# Jobs of a script have SIGINT ignored, so they are told by SIGTERM, after which they save.
stop() {
    local number=TERM
    if [[ -n $signal ]]; then
        number=KILL
        echo "Killing ${#name_of[@]} experiments"
    else
        signal=$1
        echo "Stopping: ${#name_of[@]} experiments save and end; once more kills them"
    fi
    ((${#name_of[@]} == 0)) || kill -s "$number" "${!name_of[@]}" 2>/dev/null || true
}
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 1' HUP

start_what_fits
while ((${#name_of[@]})); do
    sleep 0.5 & # wait -n would lose jobs that end at the same time; a signal ends this wait
    wait $! || true
    running=" $(jobs -pr | tr '\n' ' ') "
    for pid in "${!name_of[@]}"; do
        [[ $running != *" $pid "* ]] || continue
        code=0
        wait "$pid" || code=$?
        finish "$pid" "$code"
    done
    [[ -n $signal ]] || start_what_fits
done

echo
echo "${#finished[@]} of ${#names[@]} finished${finished[*]:+: ${finished[*]}}"
((${#failed[@]} == 0)) || echo "${#failed[@]} ended early: ${failed[*]}"
((${#waiting[@]} == 0)) || echo "${#waiting[@]} never began: ${waiting[*]}"
if [[ -n $signal ]]; then
    echo "The same command goes on with --resume latest among the flags of all"
    exit $((128 + signal))
fi
((${#failed[@]} == 0))
