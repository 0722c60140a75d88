"""The command line, `sdattn-fast`. One file a command; this one puts them together and keeps errors to one line."""

from __future__ import annotations

import sys

from .._version import __version__

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit status 2."""
    try:
        import typer
    except ImportError:
        sys.exit("sdattn-fast: the command line needs typer and rich: pip install 'sdattn-fast[demo]'")
    app = _app(typer)
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments, prog_name="sdattn-fast", standalone_mode=False)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sdattn-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # typer and click each have a base class for usage errors, and which one is raised depends on the release.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":
                sys.exit(130)
            raise
        print(f"sdattn-fast: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(result if isinstance(result, int) else 0)


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
