#!/usr/bin/env bash
# TPU slices of Google Cloud: creates them, runs a command on every host, and restarts it after a preemption.
set -euo pipefail

usage() {
    cat <<'END'
bash scripts/tpu_pod.sh ACTION [OPTIONS] [COMMAND...]

  create            creates the slice and waits until it can be used; on demand unless --spot
  setup             copies this folder to every host and installs it there; again after each change
  run COMMAND...    starts the command on every host, in the background: you may close your laptop
  watch COMMAND...  create, setup and run, unless they are done; then waits for the command and exits with its
                    status. If the slice is preempted, does all of this again
  status            the state of the slice, and of the run on each host
  logs              the end of the run's output on the first host; --follow, --worker all
  stop              sends SIGTERM to the run, and waits until it has saved and ended
  delete            deletes the slice: until then, it is billed

Options come before the command. Options with a value may also be environment variables: TPU=NAME for --tpu NAME.
  --tpu NAME               name of the slice
  --zone ZONE, --project ID
  --accelerator-type TYPE  such as v5litepod-8
  --runtime-version NAME   default: the one that Google recommends for the type
  --slices N               number of slices that form one machine (queued)
  --spot, --on-demand      may be preempted, or may not (default)
  --queued                 waits in the queue if there is no capacity, instead of failing
  --code PATH-OR-GIT-URL   what setup installs; default: the folder that this script is in
  --folder NAME            folder for it in each host's home; default: topformer_jax
  --dry-run                prints the commands and runs none
Only from the environment: CREATE_FLAGS, more flags for gcloud's create, such as "--reserved --network=mine";
POLL_SECONDS (60) between checks; CRASHES (3), after which watch gives up; preemptions do not count.
END
}

source "$(dirname "${BASH_SOURCE[0]}")/_tpu_slice.sh"

# ---- the slice

create() {
    request || die "the slice was not created, see above; with --queued a request waits for capacity"
    [ -z "$DRY_RUN" ] || return 0
    local last=
    while look_up_or_die && ! is_ready; do
        ! is_lost || die "$TPU is $STATE: bash scripts/tpu_pod.sh delete, then create again"
        [ "$STATE" = "$last" ] || say "$TPU is $STATE"
        last=$STATE
        pause
    done
    say "$TPU is $STATE"
}

delete() { # what look_up found
    case $KIND in
    queued) tpus queued-resources delete "$TPU" --force --quiet ;;
    vm) tpus tpu-vm delete "$TPU" --quiet ;;
    none) say "there is no $TPU in $ZONE" ;;
    esac
}

find_kind() {
    if [ -z "$DRY_RUN" ]; then
        look_up_or_die
    elif is_queued; then
        KIND=queued
    else
        KIND=vm
    fi
}

# ---- code and run on the hosts

# Packs a folder's files: those that git knows or would take, or all but environment, data and runs.
pack() {
    cd "$1"
    export COPYFILE_DISABLE=1 # on a Mac, no files with attributes
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
            tar --null -T - -czf "$2"
    else
        tar --exclude=./.venv --exclude=./data --exclude=./runs -czf "$2" .
    fi
}

setup() {
    local archive=topformer_code.tar.gz url
    case $CODE in
    *://* | git@*)
        printf -v url '%q' "$CODE"
        on_hosts "if [ -d $FOLDER/.git ]; then git -C $FOLDER pull --ff-only; else git clone $url $FOLDER; fi && $(host_line install)"
        return
        ;;
    esac
    [ -f "$CODE/pyproject.toml" ] || die "$CODE has no pyproject.toml: give --code the folder of a clone, or a git URL" 2
    # Packed once: what watch starts anew is what it has started.
    [ -n "$DRY_RUN" ] || [ -f "$SCRATCH/$archive" ] || (pack "$CODE" "$SCRATCH/$archive") || return
    if [ "$SLICES" -eq 1 ]; then
        tpus tpu-vm scp "$SCRATCH/$archive" "$TPU:" --worker=all --quiet || return
    else
        tpus queued-resources scp "$SCRATCH/$archive" "$TPU:" --node=all --worker=all --quiet || return
    fi
    on_hosts "mkdir -p $FOLDER && tar xzf $archive -C $FOLDER && $(host_line install)"
}

start() { on_hosts "$(host_line start "$@")"; }

ask_hosts() { on_hosts "if [ -e $FOLDER/scripts/_tpu_host.sh ]; then $(host_line status); else echo run: none; fi"; }

# Prints what the run does on all hosts together: running, none, stopped, or its exit status; fails if they do not
# answer. When one host was told to end (143), the others' statuses only follow from that.
find_run() {
    local states state
    states=$(ask_hosts) || return
    states=$(grep -o 'run: [a-z0-9]*' <<<"$states") || return
    for state in running none stopped 143 2; do
        if grep -qx "run: $state" <<<"$states"; then
            echo "$state"
            return
        fi
    done
    sed 's/run: //' <<<"$states" | sort -n | tail -n 1
}

watch() {
    local crashes=0 failures=0 lost=0 was_ready='' started='' state
    look_up_or_die
    while :; do
        if [ $KIND = none ]; then
            say "creating $TPU"
            started=''
            if ! request; then
                [ -n "$was_ready" ] || die "the slice was not created, see above; with --queued a request waits for capacity"
                pause
            fi
        elif is_lost; then
            [ -n "$was_ready" ] || [ "$STATE" != FAILED ] || die "the request for $TPU failed: gcloud compute tpus queued-resources describe $TPU says why"
            say "$TPU is $STATE: deleting it, to create it anew"
            lost=$((lost + 1))
            delete || pause
        elif ! is_ready; then
            [ "$STATE" != STOPPED ] || die "somebody has stopped $TPU: gcloud compute tpus tpu-vm start $TPU"
            say "$TPU is $STATE"
            pause
        elif ! state=$(find_run); then
            say "the hosts of $TPU do not answer"
            if find_lost_node; then continue; fi
            pause
        elif [ "$state" = running ]; then
            was_ready=1 started=1 failures=0
            pause
        elif [ -z "$started" ] || [ "$state" = none ]; then
            was_ready=1
            say "installing on the hosts of $TPU"
            if setup && start "$@"; then
                say "the run has started"
                started=1
            else
                failures=$((failures + 1))
                [ $failures -lt 3 ] || die "the run could not be started on all hosts, see above"
                pause
            fi
        else
            judge_end "$state" "$@"
        fi
        look_up
    done
}

# After the end of a run: ends the watch too, or starts the run again.
judge_end() {
    local state=$1
    shift
    case $state in
    0) say "the run is done" && exit 0 ;;
    stopped) say "the run was stopped" && exit 143 ;;
    2) # a mistake, which would be repeated; but after a preemption perhaps the mark of the run that was cut off
        [ $lost -gt 0 ] || die "the run ended with a mistake (status 2): bash scripts/tpu_pod.sh logs" 2
        ;;
    esac
    pause # a preemption ends the run before it shows in the slice's state
    look_up
    is_ready || return 0
    if [ "$state" != 143 ]; then
        crashes=$((crashes + 1))
        [ $crashes -lt "$CRASHES" ] || die "the run has crashed $crashes times, at last with status $state: bash scripts/tpu_pod.sh logs" "$state"
    fi
    say "the run ended with status $state: starting it again"
    start "$@" || pause
}

show_watch() { # for --dry-run
    echo "# look for the slice, and create it if there is none"
    describe queued-resources state.state
    describe tpu-vm state
    request
    echo "# when the slice is ready"
    setup
    start "$@"
    echo "# every $POLL_SECONDS seconds"
    ask_hosts
    echo "# after a preemption: delete the slice, then start again from the top"
    find_kind
    delete
}

show_status() {
    if [ -n "$DRY_RUN" ]; then
        describe queued-resources state.state
        describe tpu-vm state
    else
        look_up_or_die
        echo "$TPU: $STATE"
        is_ready || return 0
    fi
    ask_hosts
}

# ---- the command line

read_options() {
    local name
    while [ $# -gt 0 ]; do
        case $1 in
        --spot) SPOT=1 ;;
        --on-demand) SPOT= ;;
        --queued) QUEUED=1 ;;
        --dry-run) DRY_RUN=1 ;;
        --follow) FOLLOW=1 ;;
        --help) usage && exit ;;
        --*=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --tpu | --zone | --project | --accelerator-type | --runtime-version | --slices | --code | --folder | --worker)
            [ $# -ge 2 ] || die "$1 has no value" 2
            name=$(tr 'a-z-' 'A-Z_' <<<"${1#--}")
            printf -v "$name" '%s' "$2"
            shift
            ;;
        --*) die "there is no option $1: see bash scripts/tpu_pod.sh --help" 2 ;;
        *) break ;;
        esac
        shift
    done
    COMMAND=("$@")
}

check_options() {
    [ -n "$TPU" ] || die "the slice has no name: give --tpu NAME, or set TPU" 2
    [ -n "$ZONE" ] || die "there is no zone: give --zone ZONE, or set ZONE" 2
    case $SLICES in
    '' | *[!0-9]* | 0) die "--slices cannot be '$SLICES': expected a number from 1" 2 ;;
    esac
    case $FOLDER in
    '' | *[!A-Za-z0-9_./-]*) die "--folder cannot be '$FOLDER': expected letters, digits and _./-" 2 ;;
    esac
    case $1 in
    run | watch) [ ${#COMMAND[@]} -gt 0 ] || die "there is no command to $1" 2 ;;
    *) [ ${#COMMAND[@]} -eq 0 ] || die "$1 takes no command: ${COMMAND[*]}" 2 ;;
    esac
    case $1 in
    create | watch)
        [ -n "$ACCELERATOR_TYPE" ] || die "there is no type: give --accelerator-type TYPE, such as v5litepod-8" 2
        [ -n "$RUNTIME_VERSION" ] || RUNTIME_VERSION=$(find_runtime_version)
        ;;
    esac
    [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || die "there is no gcloud: install the Google Cloud CLI" 2
}

main() {
    local action=${1:---help}
    [ $# -eq 0 ] || shift
    case $action in
    create | setup | run | watch | status | logs | stop | delete) ;;
    --help | -h) usage && return ;;
    *) die "there is no action $action: create, setup, run, watch, status, logs, stop or delete" 2 ;;
    esac
    TPU=${TPU:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-}
    RUNTIME_VERSION=${RUNTIME_VERSION:-} SLICES=${SLICES:-1} SPOT=${SPOT:-} QUEUED=${QUEUED:-}
    FOLDER=${FOLDER:-topformer_jax} CODE=${CODE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
    CREATE_FLAGS=${CREATE_FLAGS:-} POLL_SECONDS=${POLL_SECONDS:-60} CRASHES=${CRASHES:-3}
    DRY_RUN='' FOLLOW='' WORKER=0
    read_options "$@"
    check_options "$action"
    SCRATCH=$(mktemp -d)
    trap 'rm -rf "$SCRATCH"' EXIT

    case $action in
    create | setup) "$action" ;;
    run) start "${COMMAND[@]}" ;;
    watch) if [ -n "$DRY_RUN" ]; then show_watch "${COMMAND[@]}"; else watch "${COMMAND[@]}"; fi ;;
    status) show_status ;;
    logs) on_hosts "$(host_line logs ${FOLLOW:+-F})" "$WORKER" ;;
    stop) on_hosts "$(host_line stop)" ;;
    delete) find_kind && delete ;;
    esac
}

main "$@"
