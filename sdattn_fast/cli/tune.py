"""`sdattn-fast tune`: search the program that CLIP likes best, and say whether another judge likes it too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Model, check_out_folder, plain_console, sampling_options, within

__all__ = ["tune"]


def tune(
    model: Model = "shapes",
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with one prompt per line, to choose on; default: captions of the lab's world."),
    ] = None,
    report_prompts: Annotated[
        Path | None,
        typer.Option(help="File with other prompts, to report on; default: held-out captions of the lab's world."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Number of trials, over all workers.", callback=within(1, 10**6))] = 60,
    storage: Annotated[
        str | None, typer.Option(help="SQLite file or database URL; default: study.db in --out.")
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "tune",
    space: Annotated[Path | None, typer.Option(help="JSON file with the search space.")] = None,
    heads: Annotated[
        Path | None, typer.Option(help="Ranking by `sdattn-fast heads`; without it, all heads stay active.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a CLIP model; default: the pipeline's own.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Another CLIP model that judges the best trials; for the lab's, the detector does."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the reward, sigmoid(cosine / temperature).")
    ] = 0.25,
    pictures: Annotated[
        int, typer.Option(help="Number of captions of the lab's world to choose on.", callback=within(1, 10**5))
    ] = 24,
    report_pictures: Annotated[
        int, typer.Option(help="Number of captions of the lab's world to report on.", callback=within(1, 10**5))
    ] = 64,
    seeds: Annotated[int, typer.Option(help="Pictures per prompt.", callback=within(1, 1000))] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of the noise, the same in every trial.", callback=within(0, 2**62 - 1))
    ] = 0,
    shortlist: Annotated[
        int,
        typer.Option(help="Number of best trials by reward among which the judge chooses.", callback=within(1, 1000)),
    ] = 5,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--steps", help="Number of denoising steps, unless it is searched.", callback=within(1, 10_000)),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale of stock attention.", callback=within(0, 1000))
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of pictures drawn at once.", callback=within(1, 4096))] = 8,
    heartbeat: Annotated[
        int, typer.Option(help="Seconds between a worker's heartbeats.", callback=within(1, 86_400))
    ] = 30,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on cuda.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder for program.json, report.json and the plots.")] = Path(
        "tuned"
    ),
) -> None:
    """Tune a program by CLIP reward. Run it again to resume, on several machines to be faster."""

    from ..evaluation.world_subjects import bound_objects_of, world_subject
    from ..files import write_json
    from ..lab.pipeline import WORLDS
    from ..patching.words import tokenizer_of
    from ..prompts import read_prompts, report_truncation
    from ..tuning import HeadRanking
    from ..tuning.reward import Reward, compare
    from ..tuning.search_space import SearchSpace
    from ..tuning.study import best_program, draw_plots, open_study, shortlisted
    from .generate import pipeline_of
    from .heads import clip_of, clip_source

    check_out_folder(out)
    for name, path in (("--prompts", prompts), ("--report-prompts", report_prompts)):
        if path is None and model not in WORLDS:
            raise typer.BadParameter("expected a file of prompts for a model of your own", param_hint=name)
    from ..lab.shapes.captions import objects_of
    from ..lab.shapes.judge import bound_objects

    subjects = [
        world_subject(model, count, choosing=choosing)
        for path, count, choosing in ((prompts, pictures, True), (report_prompts, report_pictures, False))
        if path is None
    ]
    chosen_on = [p.text for p in read_prompts(prompts)] if prompts else list(subjects[0].prompts)
    reported = (
        [p.text for p in read_prompts(report_prompts, "report-prompts")]
        if report_prompts
        else list(subjects[-1].prompts)
    )
    both = set(chosen_on) & set(reported)
    if both:
        raise typer.BadParameter(
            f"expected prompts that are not among those chosen on, got {min(both)!r}", param_hint="--report-prompts"
        )
    searched = SearchSpace() if space is None else SearchSpace.load(space)
    ranking = None if heads is None else HeadRanking.load(heads)
    console = plain_console()
    pipe = pipeline_of(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    scorer = clip_of(model, clip, pipe.device)
    options = sampling_options(model, num_inference_steps, guidance_scale)
    keywords = {"seeds": seeds, "temperature": temperature, "batch": batch, **options}
    reward = Reward(pipe, scorer, chosen_on, seed=seed, **keywords)
    judging: Any = None
    judged_by = "none"
    if judge is not None:
        if clip_source(model, judge) == clip_source(model, clip):
            raise typer.BadParameter("expected another CLIP than the one tuned for", param_hint="--judge")
        second = clip_of(model, judge, pipe.device)
        judged_by, judging = f"CLIP {judge}", lambda texts, drawn: second.similarity(drawn, texts).double().numpy()
    elif model == "shapes" and all(map(objects_of, [*chosen_on, *reported])):
        judged_by, judging = "detector: objects bound", bound_objects
    elif len(subjects) == 2:
        judged_by, judging = "detector: objects bound", bound_objects_of(*subjects)

    opened = open_study(
        storage or out / "study.db", reward, searched, name=study, model=model, ranking=ranking, heartbeat=heartbeat
    )
    with report_truncation(tokenizer_of(pipe), [*chosen_on, *reported], console):
        _run(console, opened, reward, searched, trials, ranking)
        if judging is None:
            file = best_program(opened, searched, reward, ranking)
            rows: list[dict[str, Any]] = []
        else:
            rows = shortlisted(opened, searched, reward, judging, ranking, length=shortlist)
            file = rows[0]["file"]
            for row in rows:
                console.print(f"trial {row['trial']}: reward {row['reward']:.4f}, {judged_by} {row['judge']:.4f}")
        # The noise of the report is not the noise of the choice either.
        other = Reward(pipe, scorer, reported, seed=seed + len(reward.texts), **keywords)
        figures = compare(other, file, judging)
    # What was not searched was fixed, and belongs to what was found.
    file = replace(file, **{key: x for key, x in options.items() if getattr(file, key) is None})
    notes = {**file.notes, "model": model, "judged by": judged_by, "report": figures, "reported on": len(reported)}
    replace(file, notes=notes).save(out / "program.json")
    shortlist_of = [{key: x for key, x in row.items() if key != "file"} for row in rows]
    write_json(out / "report.json", "sdattn-fast report", {**notes, "shortlist": shortlist_of})
    plots = draw_plots(opened, out)
    _show(console, file, figures, judged_by)
    print(f"wrote {out / 'program.json'}, {out / 'report.json'} and {len(plots)} plots")


def _run(console: Any, study: Any, reward: Any, space: Any, trials: int, ranking: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..tuning.study import tune as run_trials

    ended = ("COMPLETE", "PRUNED")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Trials", total=trials)

        def report_trial(study: Any, trial: Any) -> None:
            states = [t.state.name for t in study.get_trials(deepcopy=False)]
            done = sum(state in ended for state in states)
            value = f"{trial.value:.4f}" if trial.state.name == "COMPLETE" else trial.state.name.lower()
            best = f"{study.best_value:.4f}" if "COMPLETE" in states else "none"
            progress.update(task, completed=done, description=f"Trials, best {best}")
            if not console.is_terminal:
                print(f"{done} of {trials}: trial {trial.number} {value}, best {best}", flush=True)

        run_trials(study, reward, space, trials, ranking=ranking, callbacks=(report_trial,))


def _show(console: Any, file: Any, figures: dict[str, dict[str, Any]], judged_by: str) -> None:
    from rich.table import Table

    table = Table("measured on other prompts", "stock", "tuned", "difference, 95 %", "supports")
    for name, row in figures.items():
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        label = "reward" if name == "reward" else judged_by
        table.add_row(label, f"{row['stock']:.4f}", f"{row['tuned']:.4f}", interval, row["supports"])
    console.print(table)
    console.print(
        f"{file.program!r}, layers {', '.join(file.layers) if file.layers else 'all'}, "
        f"heads {'all' if file.heads is None else f'chosen, others {file.inactive_heads}'}, "
        f"guidance {file.guidance_scale}, steps {file.num_inference_steps}"
    )
    if "judge" not in figures:
        console.print("No judge but the tuned reward itself: give --judge another CLIP before you believe it.")
    elif figures["judge"]["supports"] != "better":
        outcome = "hurts" if figures["judge"]["supports"] == "worse" else "does not show that it helps"
        console.print(f"By the judge, {judged_by}, the tuned program {outcome}.")
