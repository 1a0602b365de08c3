"""LiteLLM's real proxy as a process on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from live_service import ROOT, free_port, wait_for

KEY = "sk-" + "5f0c" * 16
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1", "LITELLM_MASTER_KEY": KEY}


@contextlib.contextmanager
def proxy_process(
    bin: Path, folder: Path, config: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[httpx.Client]:
    """The proxy under `config`, run in the `folder` (its modules are importable), and a client with the master key.

    Its output goes to the folder's file `log`.
    """
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(bin / "litellm"), "--config", "config.yaml", "--port", str(port), "--host", "127.0.0.1"],
            cwd=folder,
            env=os.environ | QUIET | {"PYTHONPATH": str(ROOT), "ROUTER_ML_DEADLINE_S": "5"} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            headers = {"authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as http:

                def alive() -> bool:
                    assert process.poll() is None, (folder / "log").read_text()
                    with contextlib.suppress(httpx.TransportError):
                        return http.get("/health/liveliness").status_code == 200
                    return False

                wait_for(alive, 120)
                yield http
        finally:
            process.kill()
            process.wait()
