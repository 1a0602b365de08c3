"""The command line for a process that has another one run it: its words come through stdin, and its end with them.

A command line and an environment can be read by others, and what is said here may hold a database's password. `main`
reads one JSON object, the `words` of a `router-ml` command and how `nice` it is to be, from the first line of stdin,
runs it, and exits as it does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path

_LONGEST = 1 << 20  # bytes of the first line


def main() -> None:
    """Runs the command, out of everybody's way; the end of stdin ends it at once, whatever it is at."""
    said = b""
    while not said.endswith(b"\n") and len(said) < _LONGEST:
        more = os.read(0, 65536)
        if not more:
            return  # whoever wanted it is gone
        said += more
    told = json.loads(said)
    with contextlib.suppress(OSError):
        os.nice(int(told["nice"]))
    with contextlib.suppress(OSError):
        # Where memory runs out this one is to be ended, and not the service that has started it.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.getLogger("urllib3").setLevel(logging.ERROR)

    def listen() -> None:
        while os.read(0, 65536):
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    from router_ml.cli import main as command

    command.main(args=told["words"], prog_name="router-ml")


if __name__ == "__main__":
    main()
