"""A study's command line, called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner


def invoked(study: Any, folder: Path, *options: str) -> Any:
    """What the study printed and its exit code. study: the function behind its `python -m`."""
    app = typer.Typer()
    app.command()(study)
    return CliRunner().invoke(app, [str(folder), *options], catch_exceptions=False)
