"""A folder of pictures and captions, as people keep them for fine-tuning.

Either `metadata.jsonl`, a line ``{"file_name": "a.png", "text": "a red car"}`` a picture (Hugging Face's imagefolder),
or beside every picture `a.png` its caption in `a.txt`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..files import parse_json

__all__ = ["CaptionedFolder"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class CaptionedFolder:
    """A folder of pictures with captions. Pictures are read when they are used.

    Either the folder has a `metadata.jsonl` with a line ``{"file_name": "a.png", "text": "a red car"}`` for each
    picture, or each picture `a.png` has its caption in `a.txt`. ``len()`` gives the number of pictures.

    Args:
        folder: Its path. Without `metadata.jsonl`, png, jpg, jpeg, webp and bmp files are taken.

    Attributes:
        folder: Its path.
        items: The path and the caption of each picture.

    Raises:
        ValueError: If there is no such folder, no picture, a picture without a caption, or a wrong line of metadata.

    Examples:
        >>> data = CaptionedFolder("pictures")
        >>> data.caption(0), data.picture(0, (512, 512)).shape
        ('a red car', torch.Size([3, 512, 512]))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"data: expected a folder of pictures and captions, got {str(folder)!r}")
        table = self.folder / "metadata.jsonl"
        self.items = self._of_table(table) if table.exists() else self._of_files()
        if not self.items:
            raise ValueError(f"data: expected pictures ({', '.join(_PICTURES)}) in {str(folder)!r}, got none")

    def __len__(self) -> int:
        return len(self.items)

    def caption(self, index: int) -> str:
        """The caption of a picture.

        Args:
            index: Which picture.

        Returns:
            Its text.
        """
        return self.items[index][1]

    def picture(self, index: int, size: tuple[int, int], flip: bool = False) -> Tensor:
        """A picture, scaled to cover a size and cropped to its middle.

        Args:
            index: Which picture.
            size: (height, width) in pixels.
            flip: Whether to mirror it.

        Returns:
            (3, height, width) float32 tensor in [-1, 1].

        Raises:
            ValueError: If the file cannot be read as a picture.
        """
        import numpy as np
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = self.items[index][0]
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"data: {path} cannot be read as a picture: {error}") from error
        fitted = ImageOps.fit(upright, size[::-1], Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(ImageOps.mirror(fitted) if flip else fitted))
        return pixels.permute(2, 0, 1).float() / 127.5 - 1.0

    def _of_table(self, table: Path) -> list[tuple[Path, str]]:
        items = []
        for number, line in enumerate(_text_of(table).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, "expected JSON")
                name, text = row["file_name"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}, got {line[:80]!r}'
                ) from error
            path = self.folder / str(name)
            if not isinstance(text, str) or not path.is_file():
                raise ValueError(
                    f"{table}, line {number}: expected a picture's name and its caption, got {line[:80]!r}"
                )
            items.append((path, text.strip()))
        return items

    def _of_files(self) -> list[tuple[Path, str]]:
        items = []
        for path in sorted(p for p in self.folder.iterdir() if p.suffix.lower() in _PICTURES):
            caption = path.with_suffix(".txt")
            if not caption.exists():
                raise ValueError(
                    f"data: {path.name} has no caption: expected {caption.name} beside it, or metadata.jsonl"
                )
            items.append((path, " ".join(_text_of(caption).split())))
        return items


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected text in UTF-8 in {path}: {error}") from None
