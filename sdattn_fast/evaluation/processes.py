"""An evaluation drawn by as many processes as `accelerate launch` or torchrun started, with a progress bar."""

from __future__ import annotations

from typing import Any

from .run import Evaluation

__all__ = ["draw_missing", "process_state"]


def process_state(cpu: bool = False) -> Any:
    """accelerate's `PartialState`: which process this is, how many there are, and its device.

    Raises: ImportError where accelerate is missing.
    """
    from datetime import timedelta

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("evaluate needs accelerate: pip install 'sdattn-fast[evaluate]'") from error
    # One process may be done hours before another, or wait while the first calibrates.
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def draw_missing(evaluation: Evaluation, state: Any, console: Any) -> None:
    """Draw what the evaluation lacks, and return when every process has drawn its share."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = len(evaluation.units())
    with Progress(*columns, console=console, disable=not console.is_terminal or not state.is_main_process) as progress:
        task = progress.add_task("Drawing", total=total, completed=total - evaluation.missing())

        def tell(text: str) -> None:
            progress.update(task, completed=total - evaluation.missing(), description=text)
            if not console.is_terminal and state.is_main_process:
                print(text, flush=True)

        evaluation.run(state.process_index, state.num_processes, tell)
    state.wait_for_everyone()
