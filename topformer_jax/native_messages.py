"""Reads what JAX's C++ code prints, and says what it means; `processes.py` starts it, and nothing imports it.

When a process of a run dies, the coordination service of the others prints pages and aborts them, and no handler of
Python is called. So their standard error goes through this script, which passes on everything but that: it becomes
one line.
"""

import re
import signal
import sys

# absl's prefix of a line: severity, month and day, time, thread, file and line.
PREFIX = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?P<file>[\w.]+):\d+\] ")
COORDINATION = (
    *("coordination_service.cc", "coordination_service_agent.cc", "preemption_notifier.cc"),
    *("preemption_sync_manager.cc", "client.h"),
)
DEAD_TASK = re.compile(r"task:(\d+)|^(\d+)$")
FATAL = "JAX distributed service detected fatal errors"


def main() -> None:
    """Filters standard input to standard error, up to its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they mean the process that this one serves
        signal.signal(number, signal.SIG_IGN)
    is_hidden = is_reported = False
    hidden: list[str] = []
    for raw in sys.stdin.buffer:
        line = raw.decode(errors="replace")
        if prefix := PREFIX.match(line):
            is_hidden = prefix["file"] in COORDINATION
        is_reported |= FATAL in line
        if is_hidden or is_reported:
            hidden.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    if is_reported:
        dead = {found[1] or found[2] for line in hidden if (found := DEAD_TASK.search(line.strip()))}
        who = f"process {', '.join(sorted(dead, key=int))}" if dead else "another process"
        sys.stderr.write(
            f"error: {who} of this run ended or stopped answering; see its output, and start the same command again "
            "on every host\n"
        )


if __name__ == "__main__":
    main()
