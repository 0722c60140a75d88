"""The page, in Gradio: controls on the left, stock beside patched on the right. One drawing at a time, for there is one
pipeline."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# Read when Gradio is imported and launched: nothing is sent anywhere, and nothing is kept in the browser.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

import gradio as gr

from ..guidance.clip_score import ClipScorer
from ..guidance.recipe import RECIPES
from ..lab.detected_text import detected_text
from ..lab.pipeline import WORLDS
from ..patching.layers import cross_attention_layers
from ..patching.words import tokenizer_of
from ..prompts import Prompt, words_to_find
from .controls import Controls, DrawRequest, chosen_phrases, loaded_from
from .drawing import Comparison, Side, draw_both
from .script import script

__all__ = ["LAUNCH", "ServedPipeline", "page"]

EXAMPLES = {
    "shapes": (
        "a large red circle and a large blue square on a gray background",
        "a large green triangle and a large yellow circle on a black background",
        "a large purple star to the left of a large orange square on a white background",
    ),
    "objects": (
        "a soccer ball, a sailboat, a yellow boot and a blue car",
        "a cap and a robot on a white background",
        "a blue cap, an owl and a green apple",
    ),
}

# Fonts of the machine: a page that works offline asks no other server for any.
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "footer_links": [],
    # Small pictures fill their frames, pixel by pixel; as many maps go in a row as there is room for.
    "css": """
        #stock img, #patched img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
        #stock-maps img, #patched-maps img {image-rendering: pixelated}
        #stock-maps .grid-wrap, #patched-maps .grid-wrap {min-height: 100px; max-height: none; overflow: hidden}
        #stock-maps .grid-container, #patched-maps .grid-container {
            grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); grid-auto-rows: auto; gap: 6px
        }
        #stock-maps .caption-label, #patched-maps .caption-label {font-size: 11px; padding: 0 4px; max-width: 100%}
    """,
    "show_error": True,
    "ssr_mode": False,
    "quiet": True,
    "prevent_thread_lock": True,
}


_WIDTHS: list[str | int] = ["85px", "85px", "105px", "110px", "95px", "75px", "auto"]  # of the table's columns


@dataclass(frozen=True)
class ServedPipeline:
    """What the page is of. model: as the command line named it; the lab's are judged by their detectors, too. clip:
    folder or hub id of `scorer`. threshold: of the gate, at first. steps, guidance_scale: at first."""

    pipe: Any
    model: str
    scorer: ClipScorer | None = None
    clip: str | None = None
    threshold: float = 0.2
    steps: int = 30
    guidance_scale: float = 7.5

    @property
    def world(self) -> str | None:
        """Of the lab's pipelines, whose world it is."""
        return self.model if self.model in WORLDS else None


def page(served: ServedPipeline) -> gr.Blocks:
    """The page of a pipeline, to be launched with `LAUNCH`."""
    first = EXAMPLES[served.world][0] if served.world else "a red car and a blue bench"
    detected = detected_text(served.world) if served.world else None
    # Pictures and uploads of a day ago are deleted every hour, and all of them at the end.
    with gr.Blocks(
        title="sdattn_fast", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)
    ) as blocks:
        # Whose phrases are shown: who draws at once after the last keystroke is ahead of them.
        phrased = gr.State(first)
        gr.Markdown(f"# sdattn_fast\nCross-attention with a program for its rows: `{served.model}`, stock and patched.")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                request_fields = _request_components(served, first)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                controls = _control_components(served)
                upload = gr.UploadButton("Load a program or heads (JSON)", file_types=[".json"], size="sm")
                beside = {
                    "stock_maps": gr.Checkbox(True, label="Stock's heat maps, too (one more drawing)"),
                    "memory": gr.Checkbox(
                        served.world is not None, label="Memory on a CPU, too (two more drawings)",
                        visible=str(served.pipe.device) == "cpu",
                    ),
                }  # fmt: skip
            with gr.Column(scale=3, min_width=480):
                results = _result_components(served)
        inputs = request_fields | controls | beside | {"phrased": phrased}
        folder = tempfile.TemporaryDirectory(prefix="sdattn-fast-")

        def drawn(values: dict[Any, Any], progress: Any = gr.Progress()) -> Iterator[dict[Any, Any]]:
            with _errors_on_page():
                field_values = {name: values[component] for name, component in inputs.items()}
                if field_values["phrased"] != field_values["prompt"]:
                    field_values["phrases"] = _phrases(served, field_values["prompt"])
                request = DrawRequest(**{name: field_values[name] for name in request_fields})
                settings = Controls(**{name: field_values[name] for name in controls})
                _warn(served, request.prompt)
                text = script(
                    request, settings, served.model, served.clip, str(served.pipe.device),
                    str(served.pipe.unet.dtype).removeprefix("torch."),
                )  # fmt: skip
                program = Path(folder.name) / "program.json"
                settings.file(request).save(program)
                for comparison in draw_both(
                    served.pipe, request, settings, scorer=served.scorer, detected=detected, tell=progress,
                    **{name: field_values[name] for name in beside},
                ):  # fmt: skip
                    yield _shown(results, served, request, comparison, text, str(program))

        def found_phrases(prompt: str) -> tuple[Any, str]:
            with _errors_on_page():
                texts = _phrases(served, prompt)
            return gr.Dropdown(choices=texts, value=texts), prompt

        def loaded(values: dict[Any, Any]) -> dict[Any, Any]:
            before = Controls(**{name: values[component] for name, component in controls.items()})
            try:
                after, sampling = loaded_from(Path(values[upload]), before)
            except (ValueError, TypeError, OSError) as error:
                # An error would stay beside every control that the file did not change, as a mark "Error".
                gr.Warning(html.escape(str(error), quote=False), title="Not loaded")
                return {component: gr.skip() for component in controls.values()}
            updates = {component: getattr(after, name) for name, component in controls.items()}
            updates[controls["layers"]] = list(after.layers)
            return updates | {request_fields[name]: value for name, value in sampling.items()}

        gr.on(
            [draw.click, request_fields["prompt"].submit], drawn, set(inputs.values()), list(results.values()),
            concurrency_limit=1, show_progress_on=[results["stock"], results["patched"]],
        )  # fmt: skip
        request_fields["prompt"].change(
            found_phrases, request_fields["prompt"], [request_fields["phrases"], phrased], show_progress="hidden",
            trigger_mode="always_last",
        )  # fmt: skip
        upload.upload(
            loaded,
            {upload, *controls.values()},
            [request_fields["steps"], request_fields["guidance_scale"], *controls.values()],
        )
    return blocks


def _request_components(served: ServedPipeline, first: str) -> dict[str, Any]:
    texts = _phrases(served, first)
    components: dict[str, Any] = {
        "prompt": gr.Textbox(first, label="Prompt", lines=2, max_lines=4, submit_btn=False, elem_id="prompt"),
    }
    if served.world:
        gr.Examples([[text] for text in EXAMPLES[served.world]], components["prompt"], label="Examples")
    components["phrases"] = gr.Dropdown(
        texts, value=texts, multiselect=True, allow_custom_value=True, label="Phrases",
        info="Noun phrases that gates, fusion, GradCAM and structure work on; add or take away.", elem_id="phrases",
    )  # fmt: skip
    components["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    with gr.Row():
        components["steps"] = gr.Slider(1, 100, served.steps, step=1, label="Steps")
        components["guidance_scale"] = gr.Slider(0, 20, served.guidance_scale, step=0.1, label="Guidance scale")
    components["negative_prompt"] = gr.Textbox("", label="Negative prompt", lines=1)
    return components


def _control_components(served: ServedPipeline) -> dict[str, Any]:
    """A control a field of `Controls`, technique by technique."""
    start = Controls(gate_threshold=served.threshold)
    components: dict[str, Any] = {}
    with gr.Accordion("Semantic gate: CLIP looks while it is drawn", open=False):
        components["gate"] = gr.Radio(
            ["off", "hard", "soft", "amplify"], value=start.gate, label="Phrases that CLIP misses"
        )
        if served.scorer is None:
            gr.Markdown("No CLIP is loaded: start with `--clip`.")
        components["gate_threshold"] = gr.Slider(
            -1, 1, start.gate_threshold, step=0.01, label="Missed is what scores less than (cosine)"
        )
        components["gate_strength"] = gr.Slider(1.1, 5, start.gate_strength, step=0.1, label="Amplify by")
        components["gate_every"] = gr.Slider(1, 10, start.gate_every, step=1, label="Look every so many steps")
    with gr.Accordion("Phrase fusion", open=False):
        components["fuse"] = gr.Radio(
            ["off", "all", "adjective-noun"], value=start.fuse, label="Words of a phrase that share their mean"
        )
    with gr.Accordion("Heads and layers", open=False):
        components["heads"] = gr.Textbox(start.heads, label='Active heads, JSON: {"up_blocks.*": [0, 2]}; empty: all')
        components["inactive_heads"] = gr.Radio(["plain", "zero"], value=start.inactive_heads, label="The others")
        components["layers"] = gr.Dropdown(
            [name for name, _ in cross_attention_layers(served.pipe.unet)], value=[], multiselect=True,
            allow_custom_value=True, label="Layers, or patterns such as up_blocks.*; none: all",
        )  # fmt: skip
    with gr.Accordion("Salience dropout", open=False):
        components["ratio"] = gr.Slider(0, 1, start.ratio, step=0.05, label="Share dropped, 0: off")
        with gr.Row():
            components["dropout_axis"] = gr.Radio(["token", "space"], value=start.dropout_axis, label="Over")
            components["dropout_mode"] = gr.Radio(["topk", "random"], value=start.dropout_mode, label="Which")
    with gr.Accordion("NMS and smoothing", open=False):
        components["threshold"] = gr.Slider(
            0, 0.95, start.threshold, step=0.05, label="Suppress under this share of the maximum, 0: off"
        )
        components["refine_axis"] = gr.Radio(["token", "space"], value=start.refine_axis, label="Maximum over")
        components["sigma"] = gr.Slider(
            0, 3, start.sigma, step=0.1, label="Smooth by sigma, pixels of the layer, 0: off"
        )
        components["rounds"] = gr.Slider(1, 8, start.rounds, step=1, label="Rounds")
    with gr.Accordion("Renormalise, after gate, phrases, dropout and NMS", open=False):
        components["renormalize"] = gr.Radio(
            ["none", "content", "row"], value=start.renormalize, label="What regains its mass"
        )
    with gr.Accordion("Recipe", open=False):
        components["recipe"] = gr.Radio(
            ["off", *RECIPES], value=start.recipe, label="Correct the picture between its steps, for"
        )
    with gr.Accordion("GradCAM correction", open=False):
        components["correct"] = gr.Radio(
            ["off", "gradient", "reweight"], value=start.correct, label="Towards the nouns, by"
        )
        components["gradient_strength"] = gr.Slider(
            0, 0.3, start.gradient_strength, step=0.01, label="Gradient: step of the latents"
        )
        components["reweight_strength"] = gr.Slider(
            0, 1, start.reweight_strength, step=0.05, label="Reweight: share of the attention"
        )
    with gr.Accordion("Structure", open=False):
        components["structure"] = gr.Checkbox(
            start.structure, label="Smoothing inside objects, by edges and a dense CRF"
        )
    with gr.Accordion("Kernels", open=False):
        components["backend"] = gr.Dropdown(
            ["auto", "cpu", "triton", "cuda", "reference"], value=start.backend, label="Backend"
        )
    return {f.name: components[f.name] for f in fields(Controls)}


def _result_components(served: ServedPipeline) -> dict[str, Any]:
    components: dict[str, Any] = {}
    with gr.Row():
        for name in ("stock", "patched"):
            components[name] = gr.Image(
                label=name.capitalize(),
                type="pil",
                format="png",
                interactive=False,
                height=384,
                elem_id=name,
                buttons=["download", "fullscreen"],
            )
    components["table"] = gr.Dataframe(
        headers=_headers(served),
        column_widths=_WIDTHS[: len(_headers(served))],
        interactive=False,
        label="Cost",
        elem_id="cost",
        wrap=True,
    )
    for name, whose in (("patched_maps", "Patched"), ("stock_maps", "Stock")):
        gr.Markdown(f"**{whose}: where each word looks**, blue the least, red the most")
        components[name] = gr.Gallery(
            show_label=False, columns=8, height="auto", buttons=["fullscreen"], object_fit="contain",
            interactive=False, elem_id=name.replace("_", "-"),
        )  # fmt: skip
    components["looked"] = gr.Textbox(label="What CLIP saw of each phrase (cosines)", visible=False, lines=3)
    with gr.Accordion("The same in Python", open=False):
        components["script"] = gr.Code(language="python", show_label=False, interactive=False)
    components["program"] = gr.DownloadButton("Save the program (JSON)", interactive=False, size="sm")
    return components


def _headers(served: ServedPipeline) -> list[str]:
    judged = [*(["CLIP"] if served.scorer is not None else []), *(["the detector sees"] if served.world else [])]
    return ["", "seconds", "ms a step", "of stock's", "peak MiB", *judged]


def _shown(
    results: dict[str, Any],
    served: ServedPipeline,
    request: DrawRequest,
    comparison: Comparison,
    text: str,
    program: str,
) -> dict[Any, Any]:
    sides = [("stock", comparison.stock)] + (
        [("patched", comparison.patched)] if comparison.patched is not None else []
    )
    rows = []
    for name, side in sides:
        row = [
            name, f"{side.seconds:.2f}", f"{1e3 * side.seconds / request.steps:.1f}",
            f"{side.seconds / comparison.stock.seconds:.2f}", "" if side.mib is None else f"{side.mib:.1f}",
        ]  # fmt: skip
        row += [] if served.scorer is None else [f"{side.score:.3f}"]
        row += [side.seen or ""] if served.world else []
        rows.append(row)
    shown: dict[str, Any] = {
        "stock": comparison.stock.picture,
        "patched": None if comparison.patched is None else comparison.patched.picture,
        "table": rows,
        "stock_maps": _gallery(request, comparison.stock),
        "patched_maps": [] if comparison.patched is None else _gallery(request, comparison.patched),
        "looked": gr.Textbox("\n".join(comparison.looked), visible=bool(comparison.looked)),
        "script": text,
        "program": gr.DownloadButton(value=program, interactive=True),
    }
    return {results[name]: value for name, value in shown.items()}


def _gallery(request: DrawRequest, side: Side) -> list[tuple[Any, str]]:
    named = words_to_find(Prompt(request.prompt), list(side.maps))
    return [(side.maps[word], word) for word in named or side.maps]


def _phrases(served: ServedPipeline, prompt: str) -> list[str]:
    return list(dict.fromkeys(p.text for p in chosen_phrases(prompt, tokenizer_of(served.pipe))))


def _warn(served: ServedPipeline, prompt: str) -> None:
    tokenizer = tokenizer_of(served.pipe)
    count, most = len(tokenizer(prompt, verbose=False).input_ids), int(tokenizer.model_max_length)
    if count > most:
        gr.Warning(f"The prompt has {count} tokens with its ends, and the text encoder reads {most}: the rest is lost.")


@contextmanager
def _errors_on_page() -> Iterator[None]:
    """Errors of bad input become a message on the page, as text, and stay out of the log."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        # Gradio shows messages as HTML: a file's own text must not become a part of the page.
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
