"""Triton's interpreter in half its time: a plugin for pytest, `pytest -p quick_interpreter`.

At every call of one jitted function by another the interpreter replaces all of `triton.language` anew, though the
launch that they are part of has done so. Here that is done once a launch for each module that a kernel sees.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter

_replaced: set[str] = set()  # modules, in the launch that runs
_seen_by: dict[Any, set[str]] = {}


def pytest_configure(config: Any) -> None:
    if not hasattr(interpreter.InterpretedFunction, "rewrite"):
        return  # a Triton that does otherwise
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        _replaced.clear()
        return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = _call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As `InterpretedFunction.__call__`."""
    seen = _seen_by.get(self.fn)
    if seen is None:
        modules = (one for one in self.fn.__globals__.values() if inspect.ismodule(one))
        seen = {one.__name__ for one in modules if one in (interpreter.tl, interpreter.tl.core)}
        _seen_by[self.fn] = seen
    if not seen <= _replaced:
        interpreter._patch_lang(self.fn)
        _replaced.update(seen)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
