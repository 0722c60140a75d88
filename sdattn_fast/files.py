"""What a person keeps on disk: a program with what belongs to it, and a choice of heads. JSON, versioned, validated.

`apply` takes either by its path. Files are written aside and renamed, so a full disk or a kill leaves the old one.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .program import Program, Refinement, SalienceDropout, finite_number

__all__ = ["ProgramFile", "atomic_write", "load_heads", "parse_json", "read_json", "save_heads", "write_json"]

_PROGRAM, _HEADS = "sdattn-fast program", "sdattn-fast heads"
_VERSION = 1
_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000


@dataclass(frozen=True)
class ProgramFile:
    """A program with the layers and heads it runs in and the settings of the pipeline, as a JSON file holds them.

    `sdattn-fast tune` writes such files; `apply` and `sdattn-fast generate --program` read them.

    Args:
        program: What happens to the rows of the map.
        layers: Names or fnmatch patterns of layers, as in `apply`. None: all.
        heads: {layer name or pattern: indices of the active heads}. None: all.
        inactive_heads: "plain" or "zero", as in `apply`.
        guidance_scale: Scale of classifier-free guidance, 0 to 1000. None: the pipeline's own. Used by `sdattn-fast
            generate`, not by `apply`.
        num_inference_steps: Number of denoising steps, 1 to 10,000. None: the pipeline's own. Used as `guidance_scale`
            is.
        notes: Anything that JSON can hold, such as where the file comes from and what was measured.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> ProgramFile(Program(SalienceDropout(0.1)), layers=("up_blocks.*",)).save("program.json")
        >>> ProgramFile.load("program.json").program
        Program(dropout=SalienceDropout(ratio=0.1, axis='token', mode='topk'), refine=None, renormalize='none')
        >>> patch = sdattn_fast.apply(pipe, "program.json")
    """

    program: Program = field(default_factory=Program)
    layers: tuple[str, ...] | None = None
    heads: Mapping[str, Sequence[int]] | None = None
    inactive_heads: str = "plain"
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.program, Program):
            raise TypeError(f"program: expected a Program, got {type(self.program).__name__}")
        if self.layers is not None:
            patterns = (self.layers,) if isinstance(self.layers, str) else self.layers
            if not isinstance(patterns, Sequence) or any(not isinstance(name, str) for name in patterns):
                raise TypeError(f"layers: expected names or fnmatch patterns, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(patterns))
        if self.heads is not None:
            object.__setattr__(self, "heads", _checked_heads("heads", self.heads))
        if self.inactive_heads not in ("plain", "zero"):
            raise ValueError(f"inactive_heads: expected 'plain' or 'zero', got {self.inactive_heads!r}")
        scale, steps = self.guidance_scale, self.num_inference_steps
        if scale is not None:
            if not 0 <= finite_number("guidance_scale", scale) <= _MOST_GUIDANCE:
                raise ValueError(f"guidance_scale: expected a number in [0, {_MOST_GUIDANCE}], got {scale!r}")
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int):
                raise TypeError(f"num_inference_steps: expected an int, got {steps!r}")
            if not 1 <= steps <= _MOST_STEPS:
                raise ValueError(f"num_inference_steps: expected 1 to {_MOST_STEPS}, got {steps!r:.40}")
        if not isinstance(self.notes, Mapping):
            raise TypeError(f"notes: expected a mapping, got {type(self.notes).__name__}")

    def save(self, path: str | Path) -> None:
        """Write the file. It replaces an older one only when it is complete.

        Args:
            path: Path of the file. Missing folders are created.

        Raises:
            TypeError: If `notes` holds what JSON cannot.
            OSError: If the file cannot be written.
        """
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "program"}
        write_json(path, _PROGRAM, {"program": asdict(self.program), **content})

    @classmethod
    def load(cls, path: str | Path) -> ProgramFile:
        """Read and check a file.

        Args:
            path: A file that `save` or `sdattn-fast tune` wrote.

        Returns:
            What the file holds.

        Raises:
            TypeError: If a field has the wrong type.
            ValueError: If it is not such a file, or a field is unknown or out of range; the message names file and
                field.
            OSError: If it cannot be read.
        """
        content = read_json(path, _PROGRAM)
        try:
            _only_known(content, [f.name for f in fields(cls)])
            program = content.pop("program", None)
            return cls(program=_program(program), **content)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None


def save_heads(path: str | Path, heads: Mapping[str, Sequence[int]], notes: Mapping[str, Any]) -> None:
    """Write {layer: indices of the active heads}, with what is known about the choice. Raises: OSError, TypeError."""
    write_json(path, _HEADS, {"heads": _checked_heads("heads", heads), "notes": dict(notes)})


def load_heads(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """({layer: indices}, notes) of such a file. Raises: ValueError, TypeError, naming the file; OSError."""
    content = read_json(path, _HEADS)
    try:
        _only_known(content, ["heads", "notes"])
        notes = content.get("notes", {})
        if not isinstance(notes, dict):
            raise TypeError(f"notes: expected a mapping, got {notes!r}")
        return _checked_heads("heads", content.get("heads")), notes
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """The content of a file of that kind, "format" and "version" checked and taken off.

    Raises: FileNotFoundError, OSError; ValueError where it is not JSON, of another kind or of a later version.
    """
    content = parse_json(Path(path).read_bytes(), f"{path}: expected a JSON file of the format {kind!r}")
    stored_format = content.get("format") if isinstance(content, dict) else None
    if stored_format != kind:
        raise ValueError(f"{path}: expected the format {kind!r}, got {stored_format!r}")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} of the format {kind!r}, got {version!r}")
    return {key: x for key, x in content.items() if key not in ("format", "version")}


def parse_json(text: str | bytes, expected: str) -> Any:
    """What a text holds, in UTF-8 with or without a byte order mark. Raises: ValueError that begins with `expected`,
    also for numbers of too many digits and for what is nested too deeply."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}: {error}") from None


def write_json(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a file of that kind: aside first, then renamed. Raises: OSError; TypeError, ValueError (not JSON)."""
    text = json.dumps({"format": kind, "version": _VERSION, **content}, indent=1, default=_plain, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the folder of `path`, made if need be; renamed to it where the block ends well. A full
    disk, an error or a kill leaves what was there. A link keeps its place, and its target is replaced; a device or a
    pipe is written to directly. Raises: OSError."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = f".{path.name}.{socket.gethostname()}-"
    _remove_parts_of_the_dead(path.parent, writers)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{writers}{os.getpid()}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if (
            isinstance(error, OSError) and error.errno is not None and error.filename is None
        ):  # a full disk names no file
            error.filename = str(path)
        raise


def _remove_parts_of_the_dead(folder: Path, writers: str) -> None:
    """Of this file, what processes of this machine left that were killed while they wrote it."""
    for part in folder.glob(f"{glob.escape(writers)}*.part"):
        pid = part.name[len(writers) :].partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and not _is_alive(int(pid)):
                part.unlink()


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _program(content: Any) -> Program:
    """The program that `dataclasses.asdict` took apart."""
    if not isinstance(content, dict):
        raise TypeError(f"program: expected a mapping, got {content!r}")
    parts: dict[str, Any] = dict(content)
    _only_known(parts, [f.name for f in fields(Program)], "program: ")
    for name, kind in (("dropout", SalienceDropout), ("refine", Refinement)):
        values = parts.get(name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise TypeError(f"program.{name}: expected a mapping or null, got {values!r}")
        _only_known(values, [f.name for f in fields(kind)], f"program.{name}: ")
        parts[name] = kind(**values)
    return Program(**parts)


def _only_known(content: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"{prefix}expected the fields {', '.join(known)}, got also {unknown[0]!r}")


def _checked_heads(name: str, heads: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(heads, Mapping):
        raise TypeError(f"{name}: expected a mapping of layers to indices, got {heads!r}")
    for layer, indices in heads.items():
        if not isinstance(layer, str) or isinstance(indices, str) or not isinstance(indices, Sequence):
            raise TypeError(f"{name}: expected a mapping of layers to indices, got {layer!r}: {indices!r}")
        if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
            raise TypeError(f"{name}: expected ints in layer {layer!r}, got {indices!r}")
        if min(indices, default=0) < 0 or len(set(indices)) != len(indices):
            raise ValueError(f"{name}: expected each index >= 0 once in layer {layer!r}, got {list(indices)!r}")
    return {layer: tuple(indices) for layer, indices in heads.items()}


def _plain(value: Any) -> Any:
    """Mappings and numbers of numpy, as JSON writes them."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"expected what JSON holds, got {type(value).__name__}")
