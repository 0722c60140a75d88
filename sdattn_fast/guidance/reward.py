"""Reward tuning: Optuna searches program, guidance, steps, layers and heads for what CLIP likes best.

The reward of a picture is ``sigmoid(cosine / temperature)``, the cosine being CLIP's of picture and prompt; a trial's
is the mean over a set of prompts, each with the same noise in every trial. So trials are paired by picture, and the
pruner is Wilcoxon's signed-rank test against the best trial so far. The first trial is stock attention.

A reward that was tuned proves nothing: `shortlisted` lets a judge of another kind choose among the best trials, and
`compare` measures the choice against stock on other prompts, by both.

Trials, workers on many machines, and what becomes of the trials of a killed worker are Optuna's business: its storage
is an SQLite file or a database server, and a trial whose heartbeat stops is queued again.

Source: Optuna (Akiba et al. 2019); the reward after PnP-OVSS (Luo et al. 2024), which tunes without labels by CLIP.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import ProgramFile, read_json
from ..program import Program, Refinement, SalienceDropout
from ..unet.apply import apply
from ..unet.layers import cross_attention_layers, select_layers
from .clip_score import ClipScorer
from .heads import HeadRanking

__all__ = [
    "Judge",
    "Reward",
    "SearchSpace",
    "best_program",
    "compare",
    "draw_plots",
    "open_study",
    "shortlisted",
    "tune",
]

Judge = Callable[[Sequence[str], Sequence[Any]], np.ndarray]

_MADE = "sdattn-fast"
_P_THRESHOLD = 0.1
_FEWEST_BEFORE_PRUNING = 6


@dataclass(frozen=True)
class SearchSpace:
    """What is searched. Pairs are (lowest, highest), both included; tuples of strings are choices; None: left alone.

    Args:
        guidance_scale, num_inference_steps: of the pipeline.
        dropout_ratio, dropout_axis: `SalienceDropout`, which a trial may also do without; None: never.
        threshold, sigma, refine_steps, refine_axis: `Refinement`, likewise; threshold and sigma None: never.
        renormalize: `Program.renormalize`.
        layers: patterns of `apply`; those that match no layer of the model are passed over.
        heads: the share of the best heads of a ranking that stay active; None, or without a ranking: all.
        inactive_heads: what becomes of the others.

    Raises:
        TypeError, ValueError: naming the field.
    """

    guidance_scale: tuple[float, float] | None = (1.0, 10.0)
    num_inference_steps: tuple[int, int] | None = None
    dropout_ratio: tuple[float, float] | None = (0.05, 0.6)
    dropout_axis: tuple[str, ...] = ("token", "space")
    threshold: tuple[float, float] | None = (0.0, 0.9)
    sigma: tuple[float, float] | None = (0.0, 2.0)
    refine_steps: tuple[int, int] = (1, 4)
    refine_axis: tuple[str, ...] = ("token", "space")
    renormalize: tuple[str, ...] = ("none", "content", "row")
    layers: tuple[str, ...] = ("*", "down_blocks.*", "mid_block.*", "up_blocks.*")
    heads: tuple[float, float] | None = (0.1, 1.0)
    inactive_heads: tuple[str, ...] = ("plain", "zero")

    def __post_init__(self) -> None:
        limits = {
            "guidance_scale": (0.0, 100.0), "num_inference_steps": (1, 1000), "dropout_ratio": (0.0, 1.0),
            "threshold": (0.0, 0.999), "sigma": (0.0, 64.0), "refine_steps": (1, 16), "heads": (0.0, 1.0),
        }  # fmt: skip
        known = {
            "dropout_axis": ("token", "space"), "refine_axis": ("token", "space"), "inactive_heads": ("plain", "zero"),
            "renormalize": ("none", "content", "row"), "layers": None,
        }  # fmt: skip
        for name, (low, high) in limits.items():
            whole = name in ("num_inference_steps", "refine_steps")
            may_be_none = name != "refine_steps"
            object.__setattr__(self, name, _range(name, getattr(self, name), low, high, whole, may_be_none))
        for name, choices in known.items():
            object.__setattr__(self, name, _choices(name, getattr(self, name), choices))

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """From a JSON file ``{"format": "sdattn-fast space", "version": 1, "sigma": [0, 1], ...}``; fields that it does
        not name keep their defaults. Raises: ValueError, TypeError, naming file and field; OSError."""
        content = read_json(path, "sdattn-fast space")
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: expected the fields of a search space, got also {min(unknown)!r}")
        try:
            return cls(**content)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def suggest(self, trial: Any, model_layers: Sequence[str], ranking: HeadRanking | None) -> ProgramFile:
        """What an Optuna trial is to run. model_layers: the names of the layers there are."""
        dropout = refine = None
        if self.dropout_ratio is not None and trial.suggest_categorical("dropout", (False, True)):
            axis = trial.suggest_categorical("dropout_axis", self.dropout_axis)
            dropout = SalienceDropout(trial.suggest_float("dropout_ratio", *self.dropout_ratio), axis)
        refinable = self.threshold is not None or self.sigma is not None
        if refinable and trial.suggest_categorical("refine", (False, True)):
            refine = Refinement(
                trial.suggest_int("refine_steps", *self.refine_steps),
                None if self.threshold is None else trial.suggest_float("threshold", *self.threshold),
                0.0 if self.sigma is None else trial.suggest_float("sigma", *self.sigma),
                trial.suggest_categorical("refine_axis", self.refine_axis),
            )
        program = Program(dropout, refine, trial.suggest_categorical("renormalize", self.renormalize))
        patterns = _matching(self.layers, model_layers)
        layers = trial.suggest_categorical("layers", patterns)
        scale = steps = heads = None
        inactive = "plain"
        if self.guidance_scale is not None:
            scale = trial.suggest_float("guidance_scale", *self.guidance_scale)
        if self.num_inference_steps is not None:
            steps = trial.suggest_int("num_inference_steps", *self.num_inference_steps)
        if ranking is not None and self.heads is not None:
            share = trial.suggest_float("heads", *self.heads)
            count = max(1, round(share * len(ranking.scores)))
            inactive = trial.suggest_categorical("inactive_heads", self.inactive_heads)
            if count < len(ranking.scores):
                here = set(select_layers(layers, model_layers))
                heads = {layer: found for layer, found in ranking.best(count).items() if layer in here}
        return ProgramFile(
            program, None if layers == "*" else (layers,), heads, inactive if heads else "plain", scale, steps
        )

    def stock(
        self, asked: Mapping[str, Any], model_layers: Sequence[str], ranking: HeadRanking | None
    ) -> dict[str, Any]:
        """The parameters of the trial that is stock attention, as near to the pipeline's call as the ranges allow."""
        found: dict[str, Any] = {"renormalize": self.renormalize[0], "layers": _matching(self.layers, model_layers)[0]}
        if self.dropout_ratio is not None:
            found["dropout"] = False
        if self.threshold is not None or self.sigma is not None:
            found["refine"] = False
        for name in ("guidance_scale", "num_inference_steps"):
            limits = getattr(self, name)
            if limits is not None and name in asked:
                found[name] = min(max(asked[name], limits[0]), limits[1])
        if ranking is not None and self.heads is not None:
            found |= {"heads": self.heads[1], "inactive_heads": self.inactive_heads[0]}
        return found


class Reward:
    """Pictures of a set of prompts under a program, and their rewards.

    Args:
        pipe: a diffusers pipeline, not patched. clip: what scores. prompts: the texts.
        seeds: pictures a prompt; the noise of prompt i's picture j is that of ``seed + i * seeds + j``, in every trial.
        temperature: of the sigmoid, > 0. batch: pictures at once.
        asked: for the pipeline, where a program's file does not say other: num_inference_steps, guidance_scale, ...

    Raises: TypeError, ValueError, naming the argument.
    """

    def __init__(
        self,
        pipe: Any,
        clip: ClipScorer,
        prompts: Sequence[str],
        *,
        seeds: int = 1,
        seed: int = 0,
        temperature: float = 0.25,
        batch: int = 8,
        **asked: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise ValueError(f"prompts: expected at least one, each some words, got {prompts!r}")
        for name, value in (("seeds", seeds), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
        self.pipe = pipe
        self.clip = clip
        self.texts = [prompt for prompt in prompts for _ in range(seeds)]
        self.seed = seed
        self.temperature = float(temperature)
        self.batch = batch
        self.asked = asked
        self.seeds = seeds

    @property
    def model_layers(self) -> list[str]:
        """The names of the pipeline's cross-attention layers."""
        return [name for name, _ in cross_attention_layers(self.pipe.unet)]

    def pictures(self, file: ProgramFile, which: Sequence[int] | None = None) -> Iterator[tuple[list[int], list[Any]]]:
        """Batches of (indices into `texts`, PIL pictures)."""
        which = range(len(self.texts)) if which is None else which
        asked = dict(self.asked)
        for name in ("guidance_scale", "num_inference_steps"):
            if getattr(file, name) is not None:
                asked[name] = getattr(file, name)
        with apply(self.pipe, file, seed=self.seed):
            for start in range(0, len(which), self.batch):
                part = [int(i) for i in which[start : start + self.batch]]
                noise = [torch.Generator().manual_seed(self.seed + i) for i in part]
                yield part, list(self.pipe([self.texts[i] for i in part], **asked, generator=noise).images)

    def score(self, which: Sequence[int], pictures: Sequence[Any]) -> np.ndarray:
        """(n,) float64 rewards in (0, 1)."""
        cosines = self.clip.similarity(pictures, [self.texts[i] for i in which]).double()
        return torch.sigmoid(cosines / self.temperature).numpy()

    def all(self, file: ProgramFile) -> tuple[np.ndarray, list[Any]]:
        """(rewards, pictures) of every prompt."""
        pictures = [one for _, batch in self.pictures(file) for one in batch]
        return self.score(range(len(self.texts)), pictures), pictures

    def describe(self) -> dict[str, Any]:
        """What makes two rewards comparable; kept with a study."""
        plain = {key: x for key, x in self.asked.items() if isinstance(x, (str, int, float))}
        return {"prompts": self.texts[:: self.seeds], "seeds": self.seeds, "seed": self.seed,
                "temperature": self.temperature, "asked": plain}  # fmt: skip


def open_study(
    storage: str | Path,
    reward: Reward,
    space: SearchSpace,
    *,
    name: str = "tune",
    model: str = "",
    ranking: HeadRanking | None = None,
    seed: int | None = None,
    heartbeat: int = 30,
) -> Any:
    """Create an Optuna study, or take one up again.

    Args:
        storage: an SQLite file, or a URL of SQLAlchemy's (``postgresql+psycopg://...``) that many workers share.
        name: of the study within the storage. model: whatever names the pipeline.
        seed: of the sampler; None: another one in every worker, as there must be with several.
        heartbeat: seconds between signs of life; a trial that misses three is given up, and queued again.

    Raises: ImportError without Optuna; ValueError where the study was made with another model, reward or search space,
        or not by this package; OSError where the storage cannot be reached.
    """
    optuna = _optuna()
    from sqlalchemy.exc import SQLAlchemyError

    url = _url(storage)
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with _quiet(optuna), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            database = _database(
                url, engine_kwargs=options, heartbeat_interval=heartbeat, grace_period=3 * heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
            )  # fmt: skip
            study = optuna.create_study(
                storage=database, study_name=name, direction="maximize", load_if_exists=True,
                sampler=optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed),
                pruner=optuna.pruners.WilcoxonPruner(
                    p_threshold=_P_THRESHOLD, n_startup_steps=max(_FEWEST_BEFORE_PRUNING, reward.batch)
                ),
            )  # fmt: skip
        except (SQLAlchemyError, ImportError) as error:
            why = getattr(error, "orig", error)
            raise OSError(f"storage: cannot open {_without_password(url)}: {why}") from None
    made: dict[str, Any] = {"model": model, "reward": reward.describe(), "space": asdict(space),
            "heads": None if ranking is None else [list(head) for head in ranking.order]}  # fmt: skip
    made = _as_json(made)
    # Trials first: another worker that is creating the study writes its attribute before it queues a trial.
    trials = study.get_trials(deepcopy=False)
    found = study.user_attrs.get(_MADE)
    if found is None and trials:
        raise ValueError(
            f"study: {name!r} in {_without_password(url)} was not made by sdattn-fast; choose another name"
        )
    if found is None:
        study.set_user_attr(_MADE, made)
        stock = space.stock(reward.asked, reward.model_layers, ranking)
        study.enqueue_trial(stock, user_attrs={"stock": True}, skip_if_exists=True)
    elif found != made:
        raise ValueError(
            f"study: {name!r} in {_without_password(url)} was made with another {_first_difference(found, made)}; "
            "choose another name or storage, or what it was made with"
        )
    return study


def tune(
    study: Any,
    reward: Reward,
    space: SearchSpace,
    trials: int,
    *,
    ranking: HeadRanking | None = None,
    callbacks: Sequence[Callable[[Any, Any], None]] = (),
) -> None:
    """Run trials until the study, over all its workers, has `trials` that were finished or pruned.

    callbacks: called with the study and each trial that ended.

    Raises: OSError where the storage cannot be read or written, as on a full disk; what it had it keeps.
    """
    optuna = _optuna()
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    layers = reward.model_layers

    def objective(trial: Any) -> float:
        file = space.suggest(trial, layers, ranking)
        # Another order each time, as the pruner asks: the first prompts alone must not decide.
        order = np.random.default_rng(trial.number).permutation(len(reward.texts))
        values: list[float] = []
        for which, pictures in reward.pictures(file, order.tolist()):
            for i, value in zip(which, reward.score(which, pictures).tolist(), strict=True):
                trial.report(value, i)
                values.append(value)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(np.mean(values))

    if len(study.get_trials(deepcopy=False, states=states)) >= trials:
        return
    enough = optuna.study.MaxTrialsCallback(trials, states=states)
    with _quiet(optuna), _told_plainly(optuna):
        study.optimize(objective, callbacks=[*callbacks, enough])


def best_program(
    study: Any, space: SearchSpace, reward: Reward, ranking: HeadRanking | None = None, *, number: int | None = None
) -> ProgramFile:
    """The program of a trial, by default of the one with the best reward.

    Raises: ValueError: no trial is complete, or there is none of that number.
    """
    complete = {t.number: t for t in _complete(study)}
    if number is None:
        number = max(complete, key=lambda n: (complete[n].value, -n))
    if number not in complete:
        raise ValueError(f"number: expected a complete trial, got {number}")
    trial = complete[number]
    fixed = _optuna().trial.FixedTrial(trial.params)
    file = space.suggest(fixed, reward.model_layers, ranking)
    notes = {"study": study.study_name, "trial": number, "reward": trial.value, "trials": len(study.trials)}
    return ProgramFile(**{f.name: getattr(file, f.name) for f in fields(file) if f.name != "notes"}, notes=notes)


def shortlisted(
    study: Any, space: SearchSpace, reward: Reward, judge: Judge, ranking: HeadRanking | None = None, *, length: int = 5
) -> list[dict[str, Any]]:
    """The trials with the best rewards, each drawn again and judged on the same prompts, best by the judge first.

    judge: texts and pictures -> (n,) scores, of another kind than the reward. Returns: dicts of "trial", "reward",
    "judge" and "file". Raises: ValueError: no trial is complete.
    """
    best = sorted(_complete(study), key=lambda t: (-t.value, t.number))
    distinct: dict[str, Any] = {}
    for trial in best:
        distinct.setdefault(repr(sorted(trial.params.items())), trial)
    rows = []
    for trial in list(distinct.values())[:length]:
        file = best_program(study, space, reward, ranking, number=trial.number)
        _, pictures = reward.all(file)
        score = float(np.mean(judge(reward.texts, pictures)))
        rows.append({"trial": trial.number, "reward": trial.value, "judge": score, "file": file})
    return sorted(rows, key=lambda row: (-row["judge"], -row["reward"]))


def compare(reward: Reward, file: ProgramFile, judge: Judge | None = None) -> dict[str, dict[str, Any]]:
    """The program against stock attention on this reward's prompts, which should not be those it was chosen on.

    Returns: "reward", and "judge" where there is one, each with the means "stock" and "tuned", their "difference" and
    its 95 % percentile bootstrap interval, "low" and "high", over pairs of pictures; and which it "supports": "better",
    "worse" or "no difference".
    """
    stock, tuned = (reward.all(one) for one in (ProgramFile(), file))
    found = {"reward": _paired(stock[0], tuned[0])}
    if judge is not None:
        found["judge"] = _paired(*(np.asarray(judge(reward.texts, one[1]), dtype=float) for one in (stock, tuned)))
    return found


def draw_plots(study: Any, folder: str | Path) -> list[Path]:
    """Optuna's plots of a study as PNG files: history, slices, parallel coordinates, timeline, and, from four complete
    trials on, how much each parameter matters (PED-ANOVA). Raises: ValueError: no trial is complete; OSError."""
    optuna = _optuna()
    import matplotlib

    complete = _complete(study)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        from matplotlib import pyplot

        # Optuna sets a style for the whole process.
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plots = optuna.visualization.matplotlib
            asked: dict[str, Callable[[], Any]] = {
                "history": lambda: plots.plot_optimization_history(study),
                "slices": lambda: plots.plot_slice(study),
                "parallel": lambda: plots.plot_parallel_coordinate(study),
                "timeline": lambda: plots.plot_timeline(study),
            }
            if len(complete) >= 4 and len({t.value for t in complete}) > 1:
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                asked["importances"] = lambda: plots.plot_param_importances(study, evaluator=evaluator)
            for name, plot in asked.items():
                axes = plot()
                figure = (axes.flat[0] if isinstance(axes, np.ndarray) else axes).figure
                if name == "parallel":
                    figure.set_size_inches(1.7 * len({p for t in complete for p in t.params}) + 3, 6)
                figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
                pyplot.close("all")
                written.append(folder / f"{name}.png")
    finally:
        matplotlib.use(before)
    return written


def _paired(stock: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    from scipy.stats import bootstrap

    difference = tuned - stock
    low = high = float(difference.mean())
    if len(difference) > 1 and np.ptp(difference) > 0:
        interval = bootstrap(
            (difference,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    elif len(difference) < 2:
        low, high = -math.inf, math.inf
    supports = "better" if low > 0 else "worse" if high < 0 else "no difference"
    return {
        "stock": float(stock.mean()), "tuned": float(tuned.mean()), "difference": float(difference.mean()),
        "low": low, "high": high, "pictures": len(difference), "supports": supports,
    }  # fmt: skip


def _complete(study: Any) -> list[Any]:
    found = study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,))
    if not found:
        raise ValueError(f"study: no trial of {study.study_name!r} is complete")
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tuning needs Optuna: pip install 'sdattn-fast[tune]'") from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's lines, which go between those of whoever shows progress; the callbacks say what happens."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _database(url: str, **options: Any) -> Any:
    """Optuna's storage. Of workers that start at once on an empty database all want to create its tables, and all but
    one fail; the tables are there when they look again."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    storage = _optuna().storages.RDBStorage
    for wait in (0.5, 1.0, 2.0):
        try:
            return storage(url, **options)
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if "exists" not in str(error):
                raise
            time.sleep(wait)
    return storage(url, **options)


def _url(storage: str | Path) -> str:
    if isinstance(storage, str) and "://" in storage:
        return storage
    path = Path(storage).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


@contextlib.contextmanager
def _told_plainly(optuna: Any) -> Iterator[None]:
    """What the database said is why a storage fails; SQLAlchemy adds the statement, and Optuna its own words."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise OSError(f"storage: {getattr(error.__cause__, 'orig', None) or getattr(error, 'orig', error)}") from error


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def _as_json(value: Any) -> Any:
    """As it comes back from the storage, tuples as lists."""
    import json

    return json.loads(json.dumps(value))


def _first_difference(found: Any, made: Any, where: str = "") -> str:
    """ "space: sigma, [0, 2] and not [0, 1]" """
    if isinstance(found, dict) and isinstance(made, dict):
        for key in [*made, *(key for key in found if key not in made)]:
            if found.get(key) != made.get(key):
                return _first_difference(found.get(key), made.get(key), f"{where}: {key}" if where else str(key))
    shown = [text if len(text) < 60 else f"{text[:57]}..." for text in (repr(found), repr(made))]
    return f"{where}, {shown[0]} and not {shown[1]}"


def _matching(patterns: Sequence[str], layers: Sequence[str]) -> list[str]:
    import fnmatch

    found = [p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in layers)]
    if not found:
        raise ValueError(f"layers: none of {', '.join(map(repr, patterns))} matches a layer of the model")
    return found


def _range(name: str, given: Any, low: float, high: float, whole: bool, may_be_none: bool) -> Any:
    expected = f"{'two ints' if whole else 'two numbers'}, lowest and highest, from {low} to {high}"
    if given is None and may_be_none:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"{name}: expected {expected}, got {given!r}")
    kinds = (int,) if whole else (int, float)
    if any(isinstance(x, bool) or not isinstance(x, kinds) for x in given):
        raise TypeError(f"{name}: expected {expected}, got {given!r}")
    if not low <= given[0] <= given[1] <= high:
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
    return tuple(given) if whole else (float(given[0]), float(given[1]))


def _choices(name: str, given: Any, known: tuple[str, ...] | None) -> tuple[str, ...]:
    expected = "patterns of layers" if known is None else f"some of {', '.join(known)}"
    if isinstance(given, str) or not isinstance(given, Sequence) or any(not isinstance(x, str) for x in given):
        raise TypeError(f"{name}: expected {expected}, got {given!r}")
    if not given or len(set(given)) != len(given) or (known is not None and not set(given) <= set(known)):
        raise ValueError(f"{name}: expected {expected}, each once, got {list(given)!r}")
    return tuple(given)
