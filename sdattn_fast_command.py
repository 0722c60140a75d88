"""The command `sdattn-fast`, outside the package: importing that takes a second or more, and Ctrl-C may come then."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """As `sdattn_fast.cli.main`."""
    try:
        from sdattn_fast.cli import main as run

        run()
    except KeyboardInterrupt:
        print("sdattn-fast: interrupted", file=sys.stderr)
        sys.exit(130)
