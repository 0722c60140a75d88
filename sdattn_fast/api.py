"""`apply`: put a program, or a recipe, into a pipeline or UNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .files import ProgramFile, load_heads
from .patching import Patch
from .patching.install import install
from .patching.settings import DropoutWhen, Heads, Settings
from .patching.token_inputs import TokenInputs
from .program import Capture, Program

if TYPE_CHECKING:
    from .guidance.recipe import Recipe

__all__ = ["apply"]


def apply(
    pipe_or_unet: Any,
    program: Program | ProgramFile | str | Path = Program(),
    *,
    recipe: Recipe | str | None = None,
    layers: str | Sequence[str] | None = None,
    heads: Heads | str | Path = None,
    inactive_heads: str = "plain",
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    protected: Tensor | None = None,
    active: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    capture: Capture | None = None,
    fold: str = "auto",
    text_cache: bool = True,
    backend: str = "auto",
    dropout_when: DropoutWhen = "always",
) -> Patch:
    """Run a program in the cross-attention of a diffusers pipeline (its UNet or transformers, and ControlNets) or of a
    single model.

    With a pipeline, the prompts' tokens are found automatically: words are content; BOS, EOS and padding are protected;
    and the unconditional entries of the batch get plain attention. With a model alone every token is content (but for
    padding, in transformers that say what is) and every entry active, unless `protected` and `active` say otherwise.
    docs/models.md lists the models that are served.

    Args:
        pipe_or_unet: A pipeline with a ``unet`` or a ``transformer``, or one of these or a ControlNet alone, also
            wrapped by torch.compile, PEFT or DistributedDataParallel.
        program: What happens to the rows of the map; ``Program()`` is plain attention. Or a `ProgramFile`, or the path
            of one (.json): its layers and heads are used unless the arguments name others.
        recipe: What corrects every picture that the pipeline draws, between its steps: "objects" that would be left
            out, as Attend-and-Excite and A-STAR do; "binding" of colours to their nouns, as SynGen does; "both";
            "fast", which is "objects" with weaker corrections that end after the UNet's down blocks; or a
            `guidance.Recipe`. It reads the call's prompts and needs no callback. `Patch.left_out` says what it could
            not do for a picture. None: nothing.
        layers: Names or fnmatch patterns such as ``"up_blocks.*"``. None: all. Names are module paths such as
            ``"down_blocks.0.attentions.0.transformer_blocks.0.attn2"``, those of a ControlNet after ``"controlnet."``.
        heads: Indices of the active heads of every layer; or {name or pattern: indices}, where layers left out keep all
            heads; or the path of a file that `sdattn-fast heads` wrote. None: all heads.
        inactive_heads: "plain": inactive heads get plain attention. "zero": their output is zero, which ruined the
            pictures of one of our test models and changed nothing on the other (docs/evaluation.md).
        gate: Tensor, bool or floating, finite and >= 0, of factors for the content tokens: 0 mutes a token, more than 1
            boosts it. Shape (N,) for all prompts, (P, N) for P prompts, (A, N) for the A active entries (prompts times
            images per prompt) or (B, N) for the UNet's whole batch; a gate for each head is (P, H, N), (A, H, N) or (B,
            H, N).
        phrases: Integer tensor, (N,), (P, N), (A, N) or (B, N): content tokens with the same id >= 0 each get their
            mean; -1: no phrase. `guidance.phrase_ids` makes it.
        protected: Bool tensor, (N,), (P, N), (A, N) or (B, N): tokens that the program leaves as they are, in place of
            those found.
        active: (B,) bool tensor: entries of the UNet's batch to which the program applies, in place of those found.
        seed: Seed of random dropout, an int in [0, 2**63), which is mixed with layer and timestep. Picture i of those
            that are encoded together (of a model alone: active entry i) has seed + i, so that it is the same picture
            alone with that seed. Or a sequence of such ints, one for each picture. None: drawn from torch's generator.
        capture: Which maps to keep in `Patch.maps`. None: no maps.
        fold: Whether the weights of `to_q` and `to_out` are multiplied into the prompt's keys and values, once per
            prompt. "auto": in layers where a cost model predicts a gain (only on CPUs so far). "never": in no layer.
            "always": in every layer; an error where that is impossible.
        text_cache: Whether keys, values and everything else that depends only on the prompt are reused in later steps,
            while prompt and weights stay the same.
        backend: "auto", "triton", "cuda", "cpu" or "reference", as in `semantic_attention`.
        dropout_when: When salience dropout applies: "always"; "training": only in train mode; or a schedule {step:
            ratio} that replaces the dropout's ratio, linear between the given steps and constant outside. Steps are
            denoising steps, counted from 0; in train mode they are `Patch.step`, which the training loop sets.

    Returns:
        The patch, which is also a context manager that ends with `Patch.remove`.

    Warns:
        UserWarning: If layers are not patched because their processors cannot be replaced (those of your own classes,
            for example), if there is no layer to patch, or if the pipeline has no `encode_prompt`. While a picture is
            drawn, for what the recipe leaves out of it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong shape or value, the model is patched already, or the pipeline cannot
            carry a recipe: it has no tokenizer, does not call back after its steps, or draws videos.
        OSError: If a file cannot be read.
        ImportError: If a recipe is asked for, and TextBlob or NLTK is missing.

    Examples:
        >>> with sdattn_fast.apply(pipe, recipe="objects"):
        ...     image = pipe("a cat and a frog").images[0]
        >>> gate = torch.ones(77)
        >>> gate[2] = 2.0  # boosts "red"
        >>> with sdattn_fast.apply(pipe, gate=gate):
        ...     image = pipe("a red car").images[0]

    Source: docs/design.md, "From pipe(...) to a kernel and back".
    """
    heads_of_all = isinstance(heads, (str, Path))
    rows, layers, heads, inactive_heads = _from_files(program, layers, heads, inactive_heads)
    guided = None if recipe is None else _checked_recipe(recipe, pipe_or_unet)
    if guided is not None:
        if active is not None:
            raise ValueError("active: a recipe finds the entries that are prompts by itself; expected None")
        if fold == "always":
            raise ValueError(
                "fold: a recipe needs gradients, which folded layers do not have; expected 'auto' or 'never'"
            )
        rows, capture = _with_recipe(guided, rows, capture)
    settings = Settings(rows, inactive_heads, capture, fold, text_cache, backend, dropout_when)
    given = TokenInputs.checked(gate=gate, phrases=phrases, protected=protected, active=active, seed=seed)
    patch = install(pipe_or_unet, settings, given, layers=layers, heads=heads, heads_of_all=heads_of_all)
    if guided is not None and patch.installed:
        from .guidance.recipe_guide import RecipeGuide

        try:
            patch.guide = RecipeGuide(patch, guided)
        except BaseException:
            patch.remove()
            raise
    return patch


def _checked_recipe(recipe: Any, pipe: Any) -> Recipe:
    # Here and not above: `import sdattn_fast` needs torch alone, and guidance needs more.
    from .guidance.recipe import Recipe
    from .guidance.recipe_guide import check_pipeline

    checked = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    check_pipeline(pipe)
    return checked


def _with_recipe(recipe: Recipe, program: Any, capture: Capture | None) -> tuple[Any, Capture]:
    """The program and the capture that a recipe needs."""
    if recipe.program != Program():
        if program != Program():
            raise ValueError("program: the recipe has a program of its own; pass the one or the other")
        program = recipe.program
    if capture is None:
        return program, Capture(steps=())  # its corrections' maps alone
    if isinstance(capture, Capture) and (capture.tokens is not None or capture.reduce != "mean"):
        raise ValueError(f"capture: a recipe needs tokens=None and reduce='mean', got {capture!r}")
    return program, capture


def _from_files(
    program: Any, layers: str | Sequence[str] | None, heads: Heads | str | Path, inactive_heads: str
) -> tuple[Any, str | Sequence[str] | None, Heads, str]:
    """Paths read, and what a program's file says filled in where the keywords are silent."""
    if isinstance(program, str) and not program.endswith(".json"):
        raise TypeError(
            f"program: expected a sdattn_fast.Program, a ProgramFile or the path of one (.json), got {program!r}; the "
            "name of a recipe is passed as recipe="
        )
    if isinstance(program, (str, Path)):
        program = ProgramFile.load(program)
    if isinstance(program, ProgramFile):
        layers = program.layers if layers is None else layers
        if heads is None:
            heads = program.heads
            inactive_heads = program.inactive_heads if inactive_heads == "plain" else inactive_heads
        program = program.program
    return program, layers, load_heads(heads)[0] if isinstance(heads, (str, Path)) else heads, inactive_heads
