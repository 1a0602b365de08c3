"""The floor that the service is measured against: FastAPI with the same schemas, which always answers the same.

    python -m benchmarks.bare --answer answer.json --port 8001

It checks no key, decides nothing and keeps nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import uvicorn
from fastapi import FastAPI

from serving.schemas import RouteAnswer, RouteBody


def create_app(answer: RouteAnswer) -> FastAPI:
    """An app whose POST /route reads a `RouteBody` and answers `answer`, both as FastAPI itself does it."""
    app = FastAPI()

    @app.post("/route")
    async def route(body: RouteBody) -> RouteAnswer:
        return answer

    return app


@click.command(help=__doc__)
@click.option("--answer", required=True, type=click.Path(path_type=Path, exists=True), help="An answer of the service.")
@click.option("--port", required=True, type=int)
def main(answer: Path, port: int) -> None:
    app = create_app(json.loads(answer.read_text()))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
