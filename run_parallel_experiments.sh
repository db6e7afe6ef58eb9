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

# Sets gpus to the ids of a list such as 0,2 that CUDA would show: those before the first invalid
# one, such as -1.
read_gpus() {
    local item items=()
    gpus=()
    IFS=, read -ra items <<<"$1"
    for item in "${items[@]}"; do
        item=${item//[[:space:]]/}
        [[ -n $item && $item != -* ]] || return 1
        gpus+=("$item")
    done
    ((${#gpus[@]}))
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=() listed='' slots='' specs=() common=()
while (($#)); do
    case $1 in
        --gpus | --slots)
            (($# > 1)) || refuse "$1 needs a value"
            set -- "$1=$2" "${@:3}" ;;
        --gpus=*)
            listed=${1#*=}
            read_gpus "$listed" || refuse "--gpus '$listed': expected ids such as 0,2; use --slots N for the CPU"
            shift ;;
        --slots=*) slots=${1#*=}; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; common=("$@"); break ;;
        -*) refuse "unknown option $1; flags of all experiments come after --" ;;
        *) specs+=("$1"); shift ;;
    esac
done
((${#specs[@]})) || { usage >&2; exit 2; }
[[ -z $slots || $slots =~ ^[1-9][0-9]*$ ]] || refuse "--slots $slots: expected a number of 1 or more"
[[ -z $slots || -z $listed ]] || refuse "use either --gpus or --slots"

# Where an experiment with these flags keeps its logs.
logs_of() {
    local out='' log=''
    while (($#)); do
        case ${1//-/_} in
            __out_dir) out=${2:-} ;;
            __out_dir=*) out=${1#*=} ;;
            __log_dir) log=${2:-} ;;
            __log_dir=*) log=${1#*=} ;;
        esac
        shift
    done
    echo "${log:-${out:+$out/}logs}"
}

names=()
declare -A flags_of=() folder_of=()
for spec in "${specs[@]}"; do
    read -r -d '' name flags <<<"$spec" || true # to its end, over several lines
    [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
        refuse "'$spec' must begin with a name of letters, digits, . _ and -"
    [[ -z ${flags_of[$name]+set} ]] || refuse "two experiments have the name $name"
    xargs -n 1 <<<"$flags" >/dev/null 2>&1 || refuse "'$spec' has an unmatched quote"
    words=()
    [[ -z $flags ]] || mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$flags") # reads quotes
    words=("${common[@]}" "${words[@]}" --experiment_name "$name")
    flags_of[$name]=${words[*]@Q}
    folder_of[$name]=$(logs_of "${words[@]}")/${name}_gpu_ # and the id of its GPU
    names+=("$name")
done

python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3 || true)
[[ -n $python ]] || refuse "Python is not installed"

# A slot is a GPU, or a share of the CPU.
threads=()
if [[ -z $slots ]] && ((${#gpus[@]} == 0)); then
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        read_gpus "$CUDA_VISIBLE_DEVICES" || true
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

ids=() # the part of file names that stands for each slot, as gpt2.config.experiment_name has it
for gpu in "${gpus[@]}"; do
    id=${gpu:-cpu}
    ids+=("${id//[^A-Za-z0-9.-]/-}")
done

declare -A slot_of=() log_of=() name_of=() begun=()
waiting=("${names[@]}") free=("${!gpus[@]}") finished=() failed=() signal='' sent=''

# Whether an experiment may begin in this slot: not if it had another of these GPUs before.
suits() {
    local name=$1 slot=$2 id
    [[ -d ${folder_of[$name]}${ids[slot]} ]] && return 0
    for id in "${ids[@]}"; do
        [[ -d ${folder_of[$name]}$id ]] && return 1
    done
    return 0
}

# Starts nothing after a signal; passes on a signal that arrives while an experiment starts.
start() {
    local name=$1 slot=$2 gpu=${gpus[$2]} folder=${folder_of[$1]}${ids[$2]} now words log
    printf -v now '%(%Y%m%d_%H%M%S)T' -1
    log=$folder/console_$now.log
    eval "words=(${flags_of[$name]})"
    mkdir -p "$folder"
    [[ -z $signal ]] || return 1
    env "${threads[@]}" CUDA_VISIBLE_DEVICES="$gpu" "$python" "$root/src/train_improved.py" \
        "${words[@]}" </dev/null >"$log" 2>&1 &
    slot_of[$!]=$slot log_of[$!]=$log begun[$!]=$SECONDS name_of[$!]=$name
    [[ -z $sent ]] || kill -s "$sent" $!
    echo "started   $name on ${gpu:+gpu }${ids[slot]}, process $!, $log"
}

start_what_fits() {
    local name slot left=() rest
    for slot in "${free[@]}"; do
        rest=()
        for name in "${waiting[@]}"; do
            if [[ -n $slot && -z $signal ]] && suits "$name" "$slot" && start "$name" "$slot"; then
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
        tail -n 1 "${log_of[$pid]}" 2>/dev/null | sed 's/^/          /' # the log may not exist yet
    fi
    free+=("${slot_of[$pid]}")
    unset "name_of[$pid]"
}

# Background jobs of a script ignore SIGINT, so SIGTERM is sent to them, after which they save.
stop() {
    local words="Stopping: ${#name_of[@]} experiments save and end; once more kills them"
    [[ -z $signal ]] || words="Killing ${#name_of[@]} experiments"
    sent=${signal:+KILL} sent=${sent:-TERM} signal=${signal:-$1}
    send "$sent"
    echo "$words"
}
send() { ((${#name_of[@]} == 0)) || kill -s "$1" "${!name_of[@]}" 2>/dev/null; }
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 1' HUP

# From here on the script ends with the last experiment: not when a helper fails, nor when a reader of
# its output closes the pipe. If it ends earlier all the same, the experiments save and end, too.
set +e
trap : PIPE
trap 'send TERM' EXIT

start_what_fits
while ((${#name_of[@]})); do
    sleep 0.5 & # wait -n would lose jobs that end at the same time; a signal ends this wait
    wait $!
    running=$(jobs -pr) || continue # Ctrl+C ended it
    for pid in "${!name_of[@]}"; do
        [[ $'\n'$running$'\n' != *$'\n'$pid$'\n'* ]] || continue
        wait "$pid"
        finish "$pid" $?
    done
    [[ -n $signal ]] || start_what_fits
done

echo
echo "${#finished[@]} of ${#names[@]} finished${finished[*]:+: ${finished[*]}}"
((${#failed[@]} == 0)) || echo "${#failed[@]} ended early: ${failed[*]}"
((${#waiting[@]} == 0)) || echo "${#waiting[@]} never began: ${waiting[*]}"
if [[ -n $signal ]]; then
    echo "To continue, run the same command with --resume latest after --"
    exit $((128 + signal))
fi
((${#failed[@]} == 0))
