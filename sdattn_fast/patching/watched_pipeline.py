"""A pipeline whose calls, and what it encodes, a patch sees.

The pipeline's class becomes a subclass of itself, so that its copies (`copy.copy`, one for each request of a server)
are seen as themselves: a function set on the instance would be copied with it and run the original.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from .token_classes import EncoderListener

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["PipelineWatcher", "WatchedPipeline", "encode_function"]

_WATCHED = "_sdattn_fast_watched"


class PipelineWatcher(Protocol):
    """What is told of a pipeline's calls."""

    def calling(self, pipe: Any) -> AbstractContextManager[Any]:
        """Around a call of the pipeline, or of a copy."""

    def arguments(
        self, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the pipeline is called with, inside `calling`, in place of the user's arguments."""

    def encoded(
        self, pipe: Any, result: Any, heard: EncoderListener, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """After `encode_prompt` was called."""


def encode_function(pipe: Any) -> str | None:
    """The name of the method by which a pipeline encodes its prompts, None where it has none (InstructPix2Pix's begins
    with an underscore)."""
    return next((n for n in ("encode_prompt", "_encode_prompt") if callable(getattr(pipe, n, None))), None)


class WatchedPipeline:
    """A pipeline that is watched until `remove`. Raises: ValueError where it is watched already."""

    def __init__(self, pipe: Any, watcher: PipelineWatcher) -> None:
        self.pipe = pipe
        self.watcher: PipelineWatcher | None = watcher
        self._name = encode_function(pipe)
        self._replaced: Any = None
        self._wrapper: Any = None
        others = vars(pipe).get(_WATCHED)  # a copy has its original's
        if others is not None and others.pipe is pipe and others.watcher is not None:
            raise ValueError(f"pipe: this {type(pipe).__name__} is watched by another patch; remove() that first")
        vars(pipe)[_WATCHED] = self
        self._class = _plain_class(type(pipe))
        try:
            pipe.__class__ = _watched_class(self._class, self._name)
        except TypeError:  # no class of Python's own making
            warnings.warn(
                f"sdattn_fast.apply: calls of a {self._class.__name__} cannot be watched, since its class cannot be "
                "derived from; copies of it and its own calls are not told from loops",
                UserWarning,
                stacklevel=4,
            )
            self._wrap_instance()
        else:
            if self._name in vars(pipe):  # somebody's own, which hides the class's
                self._wrap_instance()

    def watches(self, pipe: Any) -> bool:
        """Whether it is this pipeline, or a copy of it."""
        return vars(pipe).get(_WATCHED) is self

    def remove(self) -> None:
        """Put back what was there. Copies run as they did before."""
        self.watcher = None
        pipe = self.pipe
        if type(pipe) is _watched_class(self._class, self._name):
            pipe.__class__ = self._class
        if vars(pipe).get(_WATCHED) is self:
            del vars(pipe)[_WATCHED]
        # Unless somebody wrapped it again meanwhile.
        if self._wrapper is not None and vars(pipe).get(self._name) is self._wrapper:
            assert self._name is not None
            delattr(pipe, self._name)
            if self._replaced is not None:
                setattr(pipe, self._name, self._replaced)

    def encode(self, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a pipeline's own method, and tell of it."""
        if self.watcher is None:
            return function(*args, **kwargs)
        with EncoderListener(pipe) as heard:
            result = function(*args, **kwargs)
        if self.watcher is not None:
            self.watcher.encoded(pipe, result, heard, function, args, kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A deep copy of a pipeline has modules of its own, which no patch serves."""
        return None

    def _wrap_instance(self) -> None:
        if self._name is None:
            return
        self._replaced = vars(self.pipe).get(self._name)
        original = getattr(self.pipe, self._name)

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            return self.encode(self.pipe, original, args, kwargs)

        self._wrapper = encode_prompt
        setattr(self.pipe, self._name, encode_prompt)


def _plain_class(cls: type) -> type:
    return cls.__mro__[1] if _IS_WATCHED in vars(cls) else cls


_IS_WATCHED = "_sdattn_fast_is_watched"


@functools.cache
def _watched_class(cls: type, encode: str | None) -> type:
    """The subclass, of the same name, as which pipelines save themselves."""
    members: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members[_IS_WATCHED] = True
    call = next((vars(one)["__call__"] for one in cls.__mro__ if "__call__" in vars(one)), None)
    if call is not None:

        @functools.wraps(call)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            watcher = _watcher(self)
            # Looked up now: somebody may have replaced the class's since.
            function = functools.partial(cls.__call__, self)
            if watcher is None:
                return function(*args, **kwargs)
            with watcher.calling(self):
                args, kwargs = watcher.arguments(self, function, args, kwargs)
                return function(*args, **kwargs)

        members["__call__"] = __call__
    method = None if encode is None else getattr(cls, encode, None)  # else the instance's own
    if encode is not None and method is not None:

        @functools.wraps(method)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = functools.partial(getattr(cls, encode), self)
            watched = vars(self).get(_WATCHED)
            return function(*args, **kwargs) if watched is None else watched.encode(self, function, args, kwargs)

        members[encode] = encode_prompt

    def __copy__(self: Any) -> Any:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickles and deep copies are of the plain class: they have modules of their own.
        return object.__new__, (cls,), {name: value for name, value in vars(self).items() if name != _WATCHED}

    members["__copy__"] = __copy__
    members["__reduce_ex__"] = __reduce_ex__
    return type(cls.__name__, (cls,), members)


def _watcher(pipe: Any) -> PipelineWatcher | None:
    watched = vars(pipe).get(_WATCHED)
    return None if watched is None else watched.watcher
