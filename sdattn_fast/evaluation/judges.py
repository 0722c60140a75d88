"""Judges of pictures beside CLIP, for users who have their models: GenEval's and T2I-CompBench's measures.

Both load what `from_pretrained` of transformers takes, a folder or hub id. Neither is downloaded by itself.

Source: Ghosh et al. 2023, "GenEval", section 3; Huang et al. 2023, "T2I-CompBench", section 4.1 (BLIP-VQA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..guidance.clip_score import ClipScorer

__all__ = ["BlipVqa", "GenEval", "Judge"]


class Judge(Protocol):
    """measures: the names of what it gives, higher is better."""

    measures: tuple[str, ...]

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        """Of each picture (height, width, 3) uint8, of the prompts of these indices and their noun phrases; NaN:
        nothing to measure."""


class BlipVqa:
    """T2I-CompBench's attribute binding: the product over noun phrases of BLIP's probability of "yes" to "a red car?".

    Raises: OSError, from transformers, where the model is; ImportError.
    """

    measures: tuple[str, ...] = ("BLIP-VQA",)

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessor
        except ImportError as error:
            raise ImportError("BLIP-VQA needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        model: Any = BlipForQuestionAnswering.from_pretrained(name, use_safetensors=True)
        self.model = model.to(device).eval()
        self.processor, self.tokenizer = BlipImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        rows = []
        for picture, mine in zip(pictures, phrases, strict=True):
            answers = [self._yes(picture, f"{phrase}?") for phrase in mine]
            rows.append({"BLIP-VQA": float(np.prod(answers)) if answers else float("nan")})
        return rows

    def _yes(self, picture: np.ndarray, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the answer's first word."""
        device = self.model.device
        pixels = self.processor(picture, return_tensors="pt").pixel_values.to(device)
        image = self.model.vision_model(pixels)[0]
        asked = self.tokenizer(question, return_tensors="pt").input_ids.to(device)
        meant = self.model.text_encoder(
            input_ids=asked, attention_mask=torch.ones_like(asked), encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=device), return_dict=True,
        ).last_hidden_state  # fmt: skip
        start = torch.full((1, 1), self.model.decoder_start_token_id, device=device)
        logits = self.model.text_decoder(
            input_ids=start, encoder_hidden_states=meant, encoder_attention_mask=torch.ones_like(asked),
            return_dict=True,
        ).logits[0, -1]  # fmt: skip
        words = [self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        return float(logits[words].softmax(0)[0])


class GenEval:
    """GenEval: are the objects that a prompt's entry names there, in number, colour and place?

    Objects come from any of transformers' object detectors (GenEval's own is a Mask2Former of mmdetection, whose
    figures differ); colours from CLIP over each object's box, as there.

    Args:
        name: a model for `AutoModelForObjectDetection`. scorer: for colours.
        wanted: of each prompt, GenEval's "include": ``{"class": "car", "count": 1, "color": "red", "position": ["left
            of", 0]}``, all but the class optional; empty: nothing to measure.
        threshold: of a detection's score.

    Raises: ValueError: a class that the detector does not know, or an entry that is not such. OSError, ImportError.
    """

    measures: tuple[str, ...] = ("GenEval",)
    COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

    def __init__(
        self, name: str, scorer: ClipScorer, wanted: Sequence[Sequence[Mapping[str, Any]]], threshold: float = 0.3,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        try:
            from transformers import AutoImageProcessor, AutoModelForObjectDetection
        except ImportError as error:
            raise ImportError("GenEval needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        model: Any = AutoModelForObjectDetection.from_pretrained(name, use_safetensors=True)
        self.model = model.to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.scorer, self.wanted, self.threshold = scorer, wanted, threshold
        known = set(self.model.config.id2label.values())
        for number, entries in enumerate(wanted):
            for entry in entries:
                if not isinstance(entry, Mapping) or entry.get("class") not in known:
                    raise ValueError(
                        f"wanted: entry {number} expected a class among the detector's {len(known)}, got {entry!r}"
                    )

    @torch.no_grad()
    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        rows = []
        for i, picture in zip(indices, pictures, strict=True):
            entries = self.wanted[i]
            right = float(self._right(picture, entries)) if entries else float("nan")
            rows.append({"GenEval": right})
        return rows

    def _right(self, picture: np.ndarray, entries: Sequence[Mapping[str, Any]]) -> bool:
        inputs = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        found = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=self.threshold, target_sizes=[picture.shape[:2]]
        )[0]
        boxes: dict[str, list[tuple[float, ...]]] = {}
        for label, box in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True):
            boxes.setdefault(self.model.config.id2label[label], []).append(tuple(box))
        matched: list[list[tuple[float, ...]]] = []
        for entry in entries:
            mine = boxes.get(entry["class"], [])
            if entry.get("color") is not None:
                mine = [box for box in mine if self._colour(picture, box, entry["class"]) == entry["color"]]
            count = int(entry.get("count", 1))
            exact = len(entries) == 1 and "count" in entry
            if len(mine) < count or (exact and len(mine) != count):
                return False
            if entry.get("position") is not None:
                relation, other = entry["position"]
                if not any(_stands(a, b, relation) for a in mine for b in matched[int(other)]):
                    return False
            matched.append(mine)
        return True

    def _colour(self, picture: np.ndarray, box: tuple[float, ...], name: str) -> str:
        x0, y0, x1, y1 = (round(v) for v in box)
        height, width = picture.shape[:2]
        x0, y0 = min(max(0, x0), width - 1), min(max(0, y0), height - 1)
        cut = picture[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)]
        texts = self.scorer.texts([f"a photo of a {colour} {name}" for colour in self.COLOURS])
        return self.COLOURS[int((texts @ self.scorer.pictures([cut])[0]).argmax())]


def _stands(a: tuple[float, ...], b: tuple[float, ...], relation: str) -> bool:
    """Whether box a is so to box b, their centres apart by more than a tenth of their sizes, as GenEval has it."""
    centre = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b)]
    sizes = [(box[2] - box[0], box[3] - box[1]) for box in (a, b)]
    apart = [centre[0][i] - centre[1][i] for i in (0, 1)]
    least = [0.1 * (sizes[0][i] + sizes[1][i]) for i in (0, 1)]
    true = {
        "left of": apart[0] < -least[0], "right of": apart[0] > least[0],
        "above": apart[1] < -least[1], "below": apart[1] > least[1],
    }  # fmt: skip
    if relation not in true:
        raise ValueError(f"wanted: expected a position among {list(true)}, got {relation!r}")
    return true[relation]
