# Sourced by tpu_pod.sh: calls to gcloud, and what state a slice is in.

die() {
    echo "error: $1" >&2
    exit "${2:-1}"
}
say() { echo "$(date '+%F %T') $1"; }
pause() { sleep "$POLL_SECONDS"; }

# ---- gcloud

# Prints its words as a line of shell.
show() {
    local word line=
    for word; do
        case $word in
        *\'*) printf -v word '%q' "$word" ;;
        *[!A-Za-z0-9_./:=@%+,-]* | '') word="'$word'" ;;
        esac
        line="$line$word "
    done
    echo "${line% }"
}

call() { if [ -n "$DRY_RUN" ]; then show "$@"; else "$@"; fi; }

tpus() { call gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }

is_queued() { [ -n "$QUEUED" ] || [ "$SLICES" -gt 1 ]; }

# Runs a line of shell on every host, or on worker $2 of the first slice. A single slice is a TPU VM of that name,
# queued or not.
on_hosts() {
    if [ "$SLICES" -eq 1 ]; then
        tpus tpu-vm ssh "$TPU" --worker="${2:-all}" --command="$1" --quiet
    elif [ "${2:-all}" = all ]; then
        tpus queued-resources ssh "$TPU" --node=all --worker=all --command="$1" --quiet
    else
        tpus queued-resources ssh "$TPU" --node=0 --worker="$2" --command="$1" --quiet
    fi
}

# The line of shell for an action of scripts/_tpu_host.sh.
host_line() {
    local line
    printf -v line ' %q' "$@"
    echo "bash $FOLDER/scripts/_tpu_host.sh$line"
}

# ---- the slice

describe() { tpus "$1" describe "$TPU" --format="value($2)" 2>"$SCRATCH/error"; }
is_missing() { grep -qi 'NOT_FOUND\|not found' "$SCRATCH/error"; }

# Sets KIND to queued, vm, none or unknown, and STATE to the state that Google gives it.
look_up() {
    KIND=unknown
    if STATE=$(describe queued-resources state.state); then
        KIND=queued
    elif is_missing; then
        if STATE=$(describe tpu-vm state); then
            KIND=vm
        elif is_missing; then
            KIND=none STATE=MISSING
        fi
    fi
    [ $KIND != unknown ] || STATE="UNREADABLE ($(tail -n 1 "$SCRATCH/error"))"
}

look_up_or_die() {
    look_up
    [ $KIND != unknown ] || die "the state of $TPU cannot be read: $(tail -n 1 "$SCRATCH/error")"
}

is_ready() { [ "$STATE" = READY ] || [ "$STATE" = ACTIVE ]; }

is_lost() { # the states that only a deletion ends
    case $STATE in
    PREEMPTED | TERMINATED | SUSPENDED | FAILED) ;;
    *) return 1 ;;
    esac
}

find_runtime_version() {
    case $ACCELERATOR_TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "no runtime version is known for $ACCELERATOR_TYPE: give --runtime-version" 2 ;;
    esac
}

# shellcheck disable=SC2086 # CREATE_FLAGS are words
request() {
    if is_queued; then
        local nodes=(--node-id="$TPU")
        [ "$SLICES" -eq 1 ] || nodes=(--node-count="$SLICES" --node-prefix="$TPU")
        tpus queued-resources create "$TPU" "${nodes[@]}" --accelerator-type="$ACCELERATOR_TYPE" \
            --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot} $CREATE_FLAGS --quiet
    else
        tpus tpu-vm create "$TPU" --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" \
            ${SPOT:+--spot} $CREATE_FLAGS --quiet
    fi
}

# Sets STATE to that of a node that is lost; fails if there is none. A queued request may be ACTIVE a while longer than
# its nodes.
find_lost_node() {
    local number node
    for ((number = 0; number < SLICES; number++)); do
        node=$TPU
        [ "$SLICES" -eq 1 ] || node=$TPU-$number
        if ! STATE=$(TPU=$node describe tpu-vm state) && is_missing; then STATE=TERMINATED; fi
        if is_lost; then return; fi
    done
    return 1
}
