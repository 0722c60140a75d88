"""Reward tuning: Optuna searches program, guidance, steps, layers and heads for what CLIP likes best.

Trials are paired by picture (reward.py), and the pruner is Wilcoxon's signed-rank test against the best trial so far.
The first trial is stock attention.

A reward that was tuned proves nothing: `shortlisted` lets a judge of another kind choose among the best trials, and
`reward.compare` measures the choice against stock on other prompts, by both.

Trials, workers on many machines, and what becomes of the trials of a killed worker are Optuna's business: its storage
is an SQLite file or a database server, and a trial whose heartbeat stops is queued again.

Source: Optuna (Akiba et al. 2019).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..files import ProgramFile
from .head_ranking import HeadRanking
from .reward import PictureJudge, Reward
from .search_space import SearchSpace

__all__ = ["best_program", "draw_plots", "open_study", "shortlisted", "tune"]

_SETTINGS_KEY = "sdattn-fast"
_P_THRESHOLD = 0.1
_FEWEST_BEFORE_PRUNING = 6


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
    """Create an Optuna study, or continue one. Its first trial is stock attention.

    Args:
        storage: The path of an SQLite file, or a URL of SQLAlchemy (``postgresql+psycopg://...``) for several machines.
        reward: What is maximized.
        space: What is searched.
        name: Name of the study in the storage.
        model: Name of the pipeline, so that a study is not continued with another one.
        ranking: Ranking of the model's heads. None: all heads stay active.
        seed: Seed of the sampler. None: another one in each worker, as several workers need.
        heartbeat: Seconds between heartbeats of a worker. A trial that misses three is queued again.

    Returns:
        An `optuna.Study`.

    Raises:
        ImportError: If Optuna is missing.
        ValueError: If the study was made with another model, reward, ranking or search space, or by other software.
        OSError: If the storage cannot be opened.

    Examples:
        >>> space, reward = SearchSpace(), Reward(pipe, clip, prompts)
        >>> study = open_study("study.db", reward, space)
        >>> tune(study, reward, space, trials=60)
        >>> best_program(study, space, reward).save("program.json")

    Source: Optuna, Akiba et al. 2019, arXiv 1907.10902.
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
            raise OSError(f"storage: cannot open {_without_password(url)}, name another one: {why}") from None
    settings: dict[str, Any] = {"model": model, "reward": reward.describe(), "space": asdict(space),
            "heads": None if ranking is None else [list(head) for head in ranking.order]}  # fmt: skip
    settings = _as_json(settings)
    # Trials first: another worker that is creating the study writes its attribute before it queues a trial.
    with _plain_storage_errors(optuna):
        trials = study.get_trials(deepcopy=False)
        stored = study.user_attrs.get(_SETTINGS_KEY)
    if stored is None and trials:
        raise ValueError(
            f"study: {name!r} in {_without_password(url)} was not made by sdattn-fast; choose another name"
        )
    if stored is None:
        study.set_user_attr(_SETTINGS_KEY, settings)
        stock = space.stock(reward.call_kwargs, reward.model_layers, ranking)
        study.enqueue_trial(stock, user_attrs={"stock": True}, skip_if_exists=True)
    elif stored != settings:
        raise ValueError(
            f"study: {name!r} in {_without_password(url)} was made with another {_first_difference(stored, settings)}; "
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
    """Run trials of a study.

    A trial stops early if Wilcoxon's signed-rank test finds its pictures worse than those of the best trial.

    Args:
        study: What `open_study` gave.
        reward: What is maximized.
        space: What is searched.
        trials: The number of finished trials, of all workers together, at which to stop.
        ranking: Ranking of the model's heads, as in `open_study`.
        callbacks: Called with the study and each trial that ended.

    Raises:
        OSError: If the storage cannot be read or written; what it has is kept.

    Examples:
        >>> tune(study, reward, space, trials=60)
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

    enough = optuna.study.MaxTrialsCallback(trials, states=states)
    stock = space.stock(reward.call_kwargs, layers, ranking)
    with _quiet(optuna), _plain_storage_errors(optuna):
        _requeue_stock(study, stock, ("FAIL",))
        if len(study.get_trials(deepcopy=False, states=states)) < trials:
            study.optimize(objective, callbacks=[*callbacks, enough])
        # Its worker may have been killed too lately for its heartbeat to be missed.
        while not _states_of_stock(study) & {"COMPLETE", "PRUNED"}:
            _requeue_stock(study, stock, ("FAIL", "RUNNING"))
            study.optimize(objective, n_trials=1, callbacks=callbacks)


def best_program(
    study: Any, space: SearchSpace, reward: Reward, ranking: HeadRanking | None = None, *, number: int | None = None
) -> ProgramFile:
    """The program of a trial.

    Args:
        study: What `open_study` gave.
        space: What was searched.
        reward: What was maximized.
        ranking: Ranking of the model's heads, as in `open_study`.
        number: Number of the trial. None: the one with the best reward.

    Returns:
        The program with its settings, and the trial and its reward as notes.

    Raises:
        ValueError: If no trial is complete, or none with that number.

    Examples:
        >>> best = best_program(study, space, reward)
        >>> best.save("program.json")
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
    study: Any,
    space: SearchSpace,
    reward: Reward,
    judge: PictureJudge,
    ranking: HeadRanking | None = None,
    *,
    length: int = 5,
) -> list[dict[str, Any]]:
    """The trials with the best rewards, drawn again and ordered by a judge of another kind.

    A reward that was maximized cannot show by itself that a program is better.

    Args:
        study: What `open_study` gave.
        space: What was searched.
        reward: What was maximized.
        judge: Takes n texts and n pictures and returns (n,) scores, of another kind than the reward.
        ranking: Ranking of the model's heads, as in `open_study`.
        length: How many trials.

    Returns:
        For each trial, the best by the judge first, a dict of its number "trial", its "reward", the "judge"'s mean
        score and the program's "file".

    Raises:
        ValueError: If no trial is complete.

    Examples:
        >>> other = ClipScorer.load("openai/clip-vit-base-patch32")
        >>> def judge(texts, pictures):
        ...     return other.similarity(pictures, texts).numpy()
        >>> best = shortlisted(study, space, reward, judge)[0]["file"]
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


def draw_plots(study: Any, folder: str | Path) -> list[Path]:
    """Draw Optuna's plots of a study: history, slices, parallel coordinates and timeline.

    With four complete trials or more, also how much each parameter matters (PED-ANOVA). Needs matplotlib.

    Args:
        study: What `open_study` gave.
        folder: Where the PNG files go.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If no trial is complete.
        OSError: If a file cannot be written.

    Examples:
        >>> paths = draw_plots(study, "plots")
    """
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
            draw_functions: dict[str, Callable[[], Any]] = {
                "history": lambda: plots.plot_optimization_history(study),
                "slices": lambda: plots.plot_slice(study),
                "parallel": lambda: plots.plot_parallel_coordinate(study),
                "timeline": lambda: plots.plot_timeline(study),
            }
            if len(complete) >= 4 and len({t.value for t in complete}) > 1:
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                draw_functions["importances"] = lambda: plots.plot_param_importances(study, evaluator=evaluator)
            for name, plot in draw_functions.items():
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


def _states_of_stock(study: Any) -> set[str]:
    return {t.state.name for t in study.get_trials(deepcopy=False) if t.user_attrs.get("stock")}


def _requeue_stock(study: Any, stock: dict[str, Any], lost: Sequence[str]) -> None:
    """Queue the trial of stock attention again where all of them are in these states: what the others are compared
    with must not get lost with the worker that was interrupted in it."""
    if _states_of_stock(study) <= set(lost):
        study.enqueue_trial(stock, user_attrs={"stock": True})


def _complete(study: Any) -> list[Any]:
    optuna = _optuna()
    with _plain_storage_errors(optuna):
        trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not trials:
        raise ValueError(f"study: no trial of {study.study_name!r} is complete")
    return trials


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
def _plain_storage_errors(optuna: Any) -> Iterator[None]:
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


def _first_difference(stored: Any, settings: Any, field: str = "") -> str:
    """ "space: sigma, [0, 2] and not [0, 1]" """
    if isinstance(stored, dict) and isinstance(settings, dict):
        for key in [*settings, *(key for key in stored if key not in settings)]:
            if stored.get(key) != settings.get(key):
                return _first_difference(stored.get(key), settings.get(key), f"{field}: {key}" if field else str(key))
    shown = [text if len(text) < 60 else f"{text[:57]}..." for text in (repr(stored), repr(settings))]
    return f"{field}, {shown[0]} and not {shown[1]}"
