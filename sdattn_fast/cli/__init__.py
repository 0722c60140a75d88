"""The command line, `sdattn-fast`. One file a command; this one puts them together and keeps errors to one line."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from .._version import __version__

__all__ = ["main"]

_INTERRUPTED = 130
_OUT_OF_MEMORY = re.compile("^$|out of memory|can't allocate memory")  # a MemoryError says nothing


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit status 2."""
    try:
        import typer
    except ImportError:
        sys.exit("sdattn-fast: the command line needs typer and rich: pip install 'sdattn-fast[demo]'")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt may have what a terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    try:
        command = typer.main.get_command(_app(typer))
        result = command.main(arguments, prog_name="sdattn-fast", standalone_mode=False)
    except KeyboardInterrupt:
        _end("interrupted", _INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _end(str(error), 2)
    except Exception as error:
        # typer and click each have a base class for usage errors, and which one is raised depends on the release.
        if type(error).__name__ == "Abort":
            _end("interrupted", _INTERRUPTED)
        if isinstance(error, (MemoryError, RuntimeError)) and _OUT_OF_MEMORY.search(str(error)):
            _end(f"out of memory: {error}", 1)
        if not hasattr(error, "format_message"):
            raise
        _end(error.format_message(), 2)
    # Of Ctrl-C, releases of typer return the status or raise Abort.
    if result == _INTERRUPTED:
        _end("interrupted", _INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def _end(text: str, status: int) -> NoReturn:
    print(f"sdattn-fast: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(status)


def _app(typer):
    from .bench import bench
    from .demo import demo
    from .doctor import doctor
    from .evaluate import evaluate
    from .generate import generate
    from .heads import heads
    from .train_lora import train_lora
    from .tune import tune
    from .ui import ui

    app = typer.Typer(
        name="sdattn-fast",
        help="Edit Stable Diffusion's cross-attention: mute, boost, fuse, drop or smooth words.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (doctor, demo, generate, heads, tune, train_lora, evaluate, ui, bench):
        app.command()(command)

    def show_version(wanted: bool) -> None:
        if wanted:
            print(__version__)
            raise typer.Exit

    @app.callback()
    def _root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version."
        ),
    ) -> None: ...

    return app
