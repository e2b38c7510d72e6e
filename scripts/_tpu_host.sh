#!/usr/bin/env bash
# What scripts/tpu_pod.sh does on each host of a slice: install, start COMMAND, status, stop, logs.
set -euo pipefail
RUN="$HOME/topformer_run" # log, status, pid, and a lock that is held as long as a run goes on
mkdir -p "$RUN"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "error: $1" >&2
    exit 1
}

take_lock() {
    exec 9>>"$RUN/lock"
    flock -n 9
}

install() {
    # Pages of 2 MB, without which a TPU's runtime starts and ends slowly.
    sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' || :
    if [ ! -x .venv/bin/python ]; then
        # Ubuntu 22.04, which Google's images are, has Python 3.10.
        if ! { python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv .venv; }; then
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --python 3.12 .venv
        fi
    fi
    .venv/bin/python -m pip install --quiet --editable '.[gcs]' 'jax[tpu]'
}

start() {
    [ -x .venv/bin/python ] || die "nothing is installed on $(hostname): bash scripts/tpu_pod.sh setup"
    take_lock || die "a run is going on already on $(hostname): bash scripts/tpu_pod.sh stop"
    rm -f "$RUN/status" "$RUN/stopped" "$RUN/pid"
    echo "== $(date -u '+%F %T') UTC: $*" >>"$RUN/log"
    # A session of its own, which the end of this one does not end.
    setsid nohup bash scripts/_tpu_host.sh keep "$@" </dev/null >>"$RUN/log" 2>&1 &
}

keep() { # in the background, with the lock of start
    status=1
    trap 'echo $status >"$RUN/status"' EXIT
    source .venv/bin/activate
    trap '' TERM # a shutdown sends it to everything: the command saves, and this waits
    (
        trap - TERM EXIT
        exec "$@" 9>&-
    ) &
    echo $! >"$RUN/pid"
    status=0
    wait $! || status=$?
}

status() {
    if ! take_lock; then
        echo "run: running"
    elif [ -e "$RUN/stopped" ]; then
        echo "run: stopped"
    elif [ -e "$RUN/status" ]; then
        echo "run: $(cat "$RUN/status")"
    else
        echo "run: none"
    fi
}

stop() {
    if take_lock; then
        echo "no run is going on"
        return
    fi
    until [ -s "$RUN/pid" ]; do sleep 0.1; done # it may just be starting
    touch "$RUN/stopped"
    kill -TERM "$(cat "$RUN/pid")"
    flock -w 900 9 || die "the run has not ended in 15 minutes"
    echo "the run has ended with status $(cat "$RUN/status")"
}

logs() { tail -n 50 "$@" "$RUN/log"; }

case ${1:-} in
install | start | keep | status | stop | logs) "$@" ;;
*) die "bash scripts/_tpu_host.sh is called by scripts/tpu_pod.sh" ;;
esac
