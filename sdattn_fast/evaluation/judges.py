"""Judges of pictures beside CLIP, for users who have their models: GenEval's and T2I-CompBench's measures.

All load what `from_pretrained` of transformers takes, a folder or hub id. None is downloaded by itself.

Source: Ghosh et al. 2023, "GenEval", section 3; Huang et al. 2023, "T2I-CompBench", section 4.1 (BLIP-VQA) and 4.2
(spatial relations); both as in their authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..guidance.clip_score import ClipScorer
from ..loading import load_model

__all__ = ["BlipVqa", "BoxDetection", "BoxDetector", "GenEval", "Judge", "Spatial"]


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

    Raises: ValueError where its files are not whole; OSError, from transformers, where there is none; ImportError.
    """

    measures: tuple[str, ...] = ("BLIP-VQA",)

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessor
        except ImportError as error:
            raise ImportError("BLIP-VQA needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        self.model = load_model(BlipForQuestionAnswering, name, "blip", device)
        self.processor, self.tokenizer = BlipImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        rows = []
        for picture, picture_phrases in zip(pictures, phrases, strict=True):
            answers = [self._yes(picture, f"{phrase}?") for phrase in picture_phrases]
            rows.append({"BLIP-VQA": float(np.prod(answers)) if answers else float("nan")})
        return rows

    def _yes(self, picture: np.ndarray, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the answer's first word."""
        device = self.model.device
        pixels = self.processor(picture, return_tensors="pt").pixel_values.to(device)
        image = self.model.vision_model(pixels)[0]
        question_ids = self.tokenizer(question, return_tensors="pt").input_ids.to(device)
        encoded = self.model.text_encoder(
            input_ids=question_ids, attention_mask=torch.ones_like(question_ids), encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=device), return_dict=True,
        ).last_hidden_state  # fmt: skip
        start = torch.full((1, 1), self.model.decoder_start_token_id, device=device)
        logits = self.model.text_decoder(
            input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=torch.ones_like(question_ids),
            return_dict=True,
        ).logits[0, -1]  # fmt: skip
        words = [self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        return float(logits[words].softmax(0)[0])


@dataclass(frozen=True)
class BoxDetection:
    """label: of the detector's. score: in [0, 1]. box: left, top, right, bottom, in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class BoxDetector:
    """Any of transformers' object detectors, a model for `AutoModelForObjectDetection`.

    Raises: ValueError where its files are not whole; OSError, from transformers, where there is none; ImportError.
    """

    # GenEval's names for three of COCO's classes.
    _ALSO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # noqa: RUF012

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoImageProcessor, AutoModelForObjectDetection
        except ImportError as error:
            raise ImportError("GenEval needs transformers: pip install 'sdattn-fast[diffusers]'") from error
        self.model = load_model(AutoModelForObjectDetection, name, "detector", device)
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.labels = set(self.model.config.id2label.values())

    def label(self, name: str) -> str | None:
        """Its label for a class of GenEval's, None where it knows none."""
        also = self._ALSO.get(name, name)
        return name if name in self.labels else also if also in self.labels else None

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, threshold: float) -> list[BoxDetection]:
        """What is in a picture (height, width, 3) uint8 with at least that score, the surest first."""
        inputs = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        results = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=threshold, target_sizes=[picture.shape[:2]]
        )[0]
        rows = zip(results["labels"].tolist(), results["scores"].tolist(), results["boxes"].tolist(), strict=True)
        detections = [BoxDetection(self.model.config.id2label[label], s, tuple(box)) for label, s, box in rows]
        return sorted(detections, key=lambda d: -d.score)


class GenEval:
    """GenEval: are the objects that a prompt's entry names there, in number, colour and place, and no others?

    GenEval's own detector is a Mask2Former of mmdetection, whose figures differ from another's; colours are told by
    CLIP over each object's box, not its mask.

    Args:
        detector: what finds objects. scorer: for colours.
        wanted: of each prompt, its line of GenEval's `evaluation_metadata.jsonl`: "include", a list of ``{"class":
            "car", "count": 1, "color": "red", "position": ["left of", 0]}``, all but the class optional; "exclude",
            of classes and the counts that are too many; "tag", "counting" for a stricter threshold. Without
            "include": nothing to measure.
        threshold, counting: a detection's least score, of all prompts and of those tagged "counting".

    Raises: ValueError: an entry that is not such, or of a class that the detector does not know.
    """

    measures: tuple[str, ...] = ("GenEval",)
    COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    RELATIONS = ("left of", "right of", "above", "below")
    _MOST = 16  # of a class

    def __init__(
        self, detector: BoxDetector, scorer: ClipScorer, wanted: Sequence[Mapping[str, Any]], threshold: float = 0.3,
        counting: float = 0.9,
    ) -> None:  # fmt: skip
        self.detector, self.scorer, self.wanted = detector, scorer, wanted
        self.threshold, self.counting = threshold, counting
        for number, metadata in enumerate(wanted, 1):
            for kind in ("include", "exclude"):
                for place, entry in enumerate(metadata.get(kind, ())):
                    self._check(entry, kind, place, f"wanted: prompt {number}, {kind!r}")

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        rows = []
        for i, picture in zip(indices, pictures, strict=True):
            wanted = self.wanted[i]
            right = float(self._right(picture, wanted)) if wanted.get("include") else float("nan")
            rows.append({"GenEval": right})
        return rows

    def _right(self, picture: np.ndarray, wanted: Mapping[str, Any]) -> bool:
        detections = self.detector(picture, self.counting if wanted.get("tag") == "counting" else self.threshold)

        def detections_of(entry: Mapping[str, Any]) -> list[BoxDetection]:
            label = self.detector.label(entry["class"])
            return [d for d in detections if d.label == label][: self._MOST]

        matched: list[list[BoxDetection]] = []
        for entry in wanted["include"]:
            count = entry.get("count", 1)
            # Colour and place are asked of the surest alone.
            matches = detections_of(entry)[:count]
            if len(matches) < count:
                return False
            colour = entry.get("color")
            if colour is not None and any(self._colour(picture, d, entry["class"]) != colour for d in matches):
                return False
            if entry.get("position") is not None:
                relation, other = entry["position"]
                if not all(relation in _relations(a.box, b.box) for a in matches for b in matched[other]):
                    return False
            matched.append(matches)
        return not any(len(detections_of(entry)) >= entry.get("count", 1) for entry in wanted.get("exclude", ()))

    def _colour(self, picture: np.ndarray, detection: BoxDetection, name: str) -> str:
        x0, y0, x1, y1 = (round(v) for v in detection.box)
        height, width = picture.shape[:2]
        x0, y0 = min(max(0, x0), width - 1), min(max(0, y0), height - 1)
        cut = picture[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)]
        templates = ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")
        texts = torch.stack([self.scorer.texts([text.format(c) for text in templates]).mean(0) for c in self.COLOURS])
        texts = torch.nn.functional.normalize(texts, dim=-1)
        return self.COLOURS[int((texts @ self.scorer.pictures([cut])[0]).argmax())]

    def _check(self, entry: Any, kind: str, place: int, source: str) -> None:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
            raise ValueError(f'{source}: expected entries such as {{"class": "car", "count": 1}}, got {entry!r}')
        if self.detector.label(entry["class"]) is None:
            known = ", ".join(sorted(self.detector.labels)[:8])
            raise ValueError(
                f"{source}: the detector knows no {entry['class']!r}, but {len(self.detector.labels)} other classes: "
                f"{known}, ..."
            )
        count = entry.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f'{source}: expected "count" to be an int >= 1, got {count!r}')
        if entry.get("color") not in (None, *self.COLOURS):
            raise ValueError(f'{source}: expected "color" among {", ".join(self.COLOURS)}, got {entry["color"]!r}')
        position = entry.get("position")
        if position is not None:
            whole = isinstance(position, Sequence) and not isinstance(position, str) and len(position) == 2
            if not whole or position[0] not in self.RELATIONS or position[1] not in range(place):
                raise ValueError(
                    f'{source}: expected "position" to be a relation among {", ".join(self.RELATIONS)} and the number '
                    f"of an entry before it, got {position!r}"
                )


class Spatial:
    """T2I-CompBench's two-dimensional spatial relations: a quarter of each object's score, and half for their place.

    Of prompts that have one of `RELATIONS`, with the first and the last noun phrase that end in a class of the
    detector's as its objects; NaN for all others. T2I-CompBench's own detector is UniDet, whose figures differ.

    detector: what finds objects. threshold: a detection's least score.
    """

    measures: tuple[str, ...] = ("T2I spatial",)
    RELATIONS = (
        "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    )  # fmt: skip
    _PEOPLE = ("girl", "boy", "man", "woman")
    _NEAR = 150 / 512  # of a side

    def __init__(self, detector: BoxDetector, prompts: Sequence[str], threshold: float = 0.3) -> None:
        self.detector, self.prompts, self.threshold = detector, prompts, threshold

    @classmethod
    def relation(cls, prompt: str) -> str | None:
        return next((r for r in cls.RELATIONS if re.search(rf"\b{r}\b", prompt.lower())), None)

    def measure(
        self, indices: Sequence[int], pictures: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        rows = []
        for i, picture, picture_phrases in zip(indices, pictures, phrases, strict=True):
            relation, objects = self.relation(self.prompts[i]), self._objects(picture_phrases)
            score = float("nan") if relation is None or objects is None else self._score(picture, relation, *objects)
            rows.append({"T2I spatial": score})
        return rows

    def _objects(self, phrases: Sequence[str]) -> tuple[str, str] | None:
        labels = [label for label in map(self._label, phrases) if label is not None]
        return (labels[0], labels[-1]) if len(labels) > 1 else None

    def _label(self, phrase: str) -> str | None:
        words = phrase.lower().split()
        names = [" ".join(words[i:]) for i in range(len(words))]
        names += ["person"] if words and words[-1] in self._PEOPLE else []
        return next((label for label in map(self.detector.label, names) if label is not None), None)

    def _score(self, picture: np.ndarray, relation: str, first: str, last: str) -> float:
        detections = self.detector(picture, self.threshold)
        a, b = (next((d for d in detections if d.label == label), None) for label in (first, last))
        if first == last:
            b = next((d for d in detections if d.label == last and d is not a), None)
        score = 0.25 * sum(d.score for d in (a, b) if d is not None)
        if a is not None and b is not None:
            score += self._placed(a, b, relation, self._NEAR * max(picture.shape[:2])) / 2
        return score if score >= 0.5 else 0.0

    @staticmethod
    def _placed(a: BoxDetection, b: BoxDetection, relation: str, near: float) -> float:
        x, y = (b.centre[i] - a.centre[i] for i in (0, 1))
        if relation in ("next to", "on side of", "near"):
            return 1.0 if min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
        along, across = (x, y) if relation in ("on the left of", "on the right of") else (y, x)
        stands = along > 0 if relation in ("on the left of", "on the top of") else along < 0
        overlap = _iou(a.box, b.box)
        return float(stands and abs(along) > abs(across)) * (1.0 if overlap < 0.1 else 0.1 / overlap)


def _relations(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """How box a stands to box b. What their sizes allow, a tenth of their sum, does not count as a distance, and of
    what is left the share of the distance between the centres must pass a half."""
    boxes = np.array([a, b]).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    left = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if (np.abs(left) < 1e-3).all():
        return set()
    x, y = left / np.linalg.norm(offset)
    true = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, so in true.items() if so}


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / either if either > 0 else 0.0
