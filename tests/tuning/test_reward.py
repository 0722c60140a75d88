"""Reward tuning: the search space, studies that survive a kill, several workers, and a choice that others judge."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import sdattn_fast
from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.files import ProgramFile
from sdattn_fast.tuning import HeadRanking
from sdattn_fast.tuning.reward import Reward, compare
from sdattn_fast.tuning.search_space import SearchSpace
from sdattn_fast.tuning.study import best_program, draw_plots, open_study, shortlisted, tune

optuna = pytest.importorskip("optuna")

SPACE = SearchSpace(heads=None)
LAYERS = ["down_blocks.0.attn2", "mid_block.attn2", "up_blocks.0.attn2"]


class Pretended(Reward):
    """A reward on pictures that cost nothing: (index of the prompt, guidance); prompts differ, guidance 6 is best."""

    def __init__(self, prompts: int = 12, seconds: float = 0.0, hangs: bool = False) -> None:
        super().__init__(None, None, [f"prompt {i}" for i in range(prompts)], batch=4, guidance_scale=4.0)
        self.seconds = seconds
        self.hangs = hangs  # in the second trial, after its first batch
        self.runs = 0

    @property
    def model_layers(self):
        return LAYERS

    def pictures(self, file: ProgramFile, which=None):
        which = range(len(self.texts)) if which is None else which
        self.runs += 1
        scale = self.call_kwargs["guidance_scale"] if file.guidance_scale is None else file.guidance_scale
        for start in range(0, len(which), self.batch):
            time.sleep(600 if self.hangs and self.runs == 2 and start else self.seconds)
            yield list(which[start : start + self.batch]), [(i, scale) for i in which[start : start + self.batch]]

    def score(self, which, pictures):
        # No two prompts differ by as much between two guidances: of such ties the pruner would try all permutations.
        return np.array([(1 + 0.01 * i) / (1 + (scale - 6) ** 2) for i, scale in pictures])


RANKING = HeadRanking(
    {(layer, h): 0.1 * i - 0.01 * h for i, layer in enumerate(LAYERS) for h in (0, 1)}, "x", 3, {6: 0.1}
)


@pytest.fixture
def study(tmp_path):
    return open_study(tmp_path / "study.db", Pretended(), SPACE, seed=0)


@contextlib.contextmanager
def worker(storage, trials, heartbeat, seconds, log=os.devnull, hangs=False, together=None):
    """Another process at work on the study; it writes the numbers of the trials it ran to `log`. Forked, since to
    import torch anew takes longer than all it does, and it runs none of torch's operations. together: a barrier at
    which it waits for others that have opened the study."""

    def work() -> None:
        reward = Pretended(seconds=seconds, hangs=hangs)
        study = open_study(storage, reward, SPACE, heartbeat=heartbeat)
        if together is not None:
            together.wait(60)
        with open(log, "w") as file:
            tune(study, reward, SPACE, trials, callbacks=(lambda study, trial: print(trial.number, file=file),))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def states(study):
    return [t.state.name for t in study.get_trials(deepcopy=False)]


def test_every_field_of_the_space_reaches_the_program():
    params = {
        "dropout": True, "dropout_axis": "space", "dropout_ratio": 0.3, "refine": True, "refine_steps": 2,
        "threshold": 0.5, "sigma": 1.5, "refine_axis": "token", "renormalize": "content", "layers": "up_blocks.*",
        "guidance_scale": 7.0, "num_inference_steps": 9, "heads": 0.5, "inactive_heads": "zero",
    }  # fmt: skip
    space = SearchSpace(num_inference_steps=(5, 20))
    file = space.suggest(optuna.trial.FixedTrial(params), LAYERS, RANKING)
    program = Program(SalienceDropout(0.3, "space"), Refinement(2, 0.5, 1.5), "content")
    # Half of the six heads: both of the up block, which ranks best, and the middle's first, which is not patched.
    assert file == ProgramFile(program, ("up_blocks.*",), {LAYERS[2]: (0, 1)}, "zero", 7.0, 9)
    plain = {"dropout": False, "refine": False, "renormalize": "none", "layers": "*", "heads": 1.0,
             "guidance_scale": 4.0, "inactive_heads": "zero"}  # fmt: skip
    assert SearchSpace().suggest(optuna.trial.FixedTrial(plain), LAYERS, RANKING) == ProgramFile(guidance_scale=4.0)
    fixed = SearchSpace(guidance_scale=None, dropout_ratio=None, threshold=None, sigma=None)
    chosen = {"renormalize": "row", "layers": "mid_block.*"}
    assert fixed.suggest(optuna.trial.FixedTrial(chosen), LAYERS, None) == ProgramFile(
        Program(renormalize="row"), ("mid_block.*",)
    )


@pytest.mark.parametrize(
    "fields, kind, says",
    [
        ({"sigma": (2, 1)}, ValueError, "sigma: expected two numbers"),
        ({"sigma": "12"}, TypeError, "sigma: expected two numbers"),
        ({"threshold": (0, 1)}, ValueError, "threshold: expected two numbers, lowest and highest, from 0.0 to 0.999"),
        ({"refine_steps": (1.0, 2.0)}, TypeError, "refine_steps: expected two ints"),
        ({"refine_steps": None}, TypeError, "refine_steps: expected two ints"),
        ({"dropout_axis": ("time",)}, ValueError, "dropout_axis: expected some of token, space"),
        ({"layers": "mid"}, TypeError, "layers: expected patterns"),
        ({"renormalize": ()}, ValueError, "renormalize: expected some of"),
    ],
)
def test_bad_spaces(fields, kind, says):
    with pytest.raises(kind, match=says):
        SearchSpace(**fields)


def test_a_space_from_a_file(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"format": "sdattn-fast space", "version": 1, "sigma": [0, 1], "threshold": None}))
    assert SearchSpace.load(path) == SearchSpace(sigma=(0, 1), threshold=None)
    path.write_text(json.dumps({"format": "sdattn-fast space", "version": 1, "sygma": [0, 1]}))
    with pytest.raises(ValueError, match=r"space.json: expected the fields of a search space, got also 'sygma'"):
        SearchSpace.load(path)


def test_tuning_finds_the_guidance_that_is_best_and_prunes_what_is_worse(study, tmp_path):
    reward = Pretended()
    tune(study, reward, SPACE, 16)
    assert set(states(study)) == {"COMPLETE", "PRUNED"} and len(study.trials) == 16
    first = study.trials[0]
    assert first.user_attrs["stock"] and not first.params["dropout"] and first.params["guidance_scale"] == 4.0
    assert first.value == pytest.approx(0.2 * 1.055), "the first trial is stock attention"
    file = best_program(study, SPACE, reward)
    assert abs(file.guidance_scale - 6) < 1 and file.notes["reward"] == study.best_value > 0.5
    tune(study, reward, SPACE, 16)
    assert len(study.trials) == 16, "a study that has its trials is left alone"
    plots = draw_plots(study, tmp_path / "plots")
    wanted = {"history", "slices", "parallel", "timeline"}
    assert {p.stem for p in plots} == wanted | ({"importances"} if states(study).count("COMPLETE") >= 4 else set())
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    file.save(tmp_path / "program.json")
    assert ProgramFile.load(tmp_path / "program.json") == file


def test_the_judge_chooses_and_reports_and_the_reward_alone_does_not(study):
    reward = Pretended()
    tune(study, reward, SPACE, 12)
    # A judge that likes least what the reward likes most.
    rows = shortlisted(study, SPACE, reward, lambda texts, drawn: np.array([-scale for _, scale in drawn]), length=3)
    assert [row["judge"] for row in rows] == sorted((row["judge"] for row in rows), reverse=True)
    assert rows[0]["file"].guidance_scale == min(row["file"].guidance_scale for row in rows)
    best = sorted((t.value for t in study.trials if t.state.name == "COMPLETE"), reverse=True)[:3]
    assert sorted((row["reward"] for row in rows), reverse=True) == best
    figures = compare(
        reward, ProgramFile(guidance_scale=6.0), lambda texts, drawn: np.array([-s - i for i, s in drawn])
    )
    assert figures["reward"]["supports"] == "better" and figures["judge"]["supports"] == "worse"
    assert figures["judge"]["difference"] == pytest.approx(-2) and figures["reward"]["pictures"] == 12
    same = compare(reward, ProgramFile(guidance_scale=4.0))
    assert same["reward"]["supports"] == "no difference" and same["reward"]["difference"] == 0


def test_a_study_made_otherwise_is_refused(study, tmp_path):
    path = tmp_path / "study.db"
    open_study(path, Pretended(), SPACE)
    with pytest.raises(ValueError, match=r"was made with another space: sigma, \[0.0, 2.0\] and not \[0.0, 1.0\]"):
        open_study(path, Pretended(), SearchSpace(heads=None, sigma=(0, 1)))
    with pytest.raises(ValueError, match="was made with another reward: prompts"):
        open_study(path, Pretended(prompts=13), SPACE)
    with pytest.raises(ValueError, match="was made with another heads"):
        open_study(path, Pretended(), SPACE, ranking=RANKING)
    other = optuna.create_study(storage=f"sqlite:///{path}", study_name="theirs")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match=r"'theirs' .* was not made by sdattn-fast"):
        open_study(path, Pretended(), SPACE, name="theirs")
    with pytest.raises(OSError, match=r"storage: cannot open postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x"):
        open_study("postgresql+psycopg://me:secret@127.0.0.1:1/x", Pretended(), SPACE)
    with pytest.raises(ValueError, match="no trial of 'tune' is complete"):
        best_program(study, SPACE, Pretended())


@pytest.mark.parametrize(
    "keywords, says",
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"prompts": ["a", " "]}, "prompts: expected at least one, each some words"),
        ({"temperature": 0}, "temperature: expected a finite number > 0"),
        ({"seeds": 0}, "seeds: expected an int >= 1"),
        ({"batch": True}, "batch: expected an int >= 1"),
    ],
)
def test_bad_rewards(keywords, says):
    with pytest.raises(ValueError, match=says):
        Reward(None, None, **{"prompts": ["a"], **keywords})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_survives_kill_9(tmp_path):
    path = tmp_path / "study.db"
    study = open_study(path, Pretended(), SPACE, heartbeat=1)
    with worker(path, 9, 1, 0.0, hangs=True) as killed:
        # All four values of the first batch: it is then between the storage's transactions.
        while len(study.trials) < 2 or len(study.trials[1].intermediate_values) < 4:
            assert killed.is_alive()
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
    before = [(t.number, t.value) for t in study.trials if t.state.name == "COMPLETE"]
    (number,) = [t.number for t in study.trials if t.state.name == "RUNNING"]
    assert [n for n, _ in before] == [0] and number == 1
    # Another takes over; the trial that was lost is noticed when its heart has not beaten for three seconds.
    with worker(path, 9, 1, 0.3) as again:
        again.join(60)
        assert again.exitcode == 0
    trials = study.trials
    assert sum(state in ("COMPLETE", "PRUNED") for state in states(study)) == 9
    assert [(n, trials[n].value) for n, _ in before] == before, "what was done stays done"
    assert trials[number].state.name == "FAIL"
    retried_number = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number
    (retried,) = [t for t in trials if retried_number(t) == number]
    assert retried.state.name in ("COMPLETE", "PRUNED") and retried.params == trials[number].params


def test_a_study_that_is_broken_is_named(tmp_path):
    open_study(tmp_path / "study.db", Pretended(4), SPACE)
    whole = (tmp_path / "study.db").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:8192] + b"x" * (len(whole) - 8192), b"no database"):
        (tmp_path / "study.db").write_bytes(part)
        with pytest.raises(OSError, match=r"storage: cannot open .*study\.db, name another one: "):
            open_study(tmp_path / "study.db", Pretended(4), SPACE)


@pytest.mark.parametrize("kill", [False, True])
def test_a_stock_trial_that_was_interrupted_runs_again(tmp_path, monkeypatch, kill):
    """By Ctrl-C, which fails it, or by a kill so late that its heartbeat is not missed yet."""
    study, reward = open_study(tmp_path / "study.db", Pretended(4), SPACE, heartbeat=60), Pretended(4)
    if kill:
        study.ask()
    else:
        with monkeypatch.context() as interrupted:
            # A shell starts what it runs in the background with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            interrupted.setattr(reward, "score", lambda which, pictures: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                tune(study, reward, SPACE, 2)
    study = open_study(tmp_path / "study.db", reward, SPACE, heartbeat=60)
    tune(study, reward, SPACE, 2)
    stock = [t.state.name for t in study.trials if t.user_attrs.get("stock")]
    assert stock == ["RUNNING" if kill else "FAIL", "COMPLETE"]
    finished = len(study.trials)
    tune(study, reward, SPACE, 2)
    assert len(study.trials) == finished, "once is enough"


def test_a_full_disk_is_said_and_what_was_done_stays(study, tmp_path):
    """SQLite may have as many pages as it has now, which is what a full disk is to it."""
    from sqlalchemy import event

    def cap(connection, record, proxy):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    tune(study, Pretended(), SPACE, 2)
    before = [(t.number, t.value) for t in study.trials]
    pool = study._storage._backend.engine.pool
    event.listen(pool, "checkout", cap)
    with pytest.raises(OSError, match="storage: database or disk is full"):
        tune(study, Pretended(prompts=200), SPACE, 60)
    event.remove(pool, "checkout", cap)
    again = open_study(tmp_path / "study.db", Pretended(), SPACE)
    assert [(t.number, t.value) for t in again.trials][:2] == before
    tune(again, Pretended(), SPACE, 6)
    assert sum(state in ("COMPLETE", "PRUNED") for state in states(again)) >= 6


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_workers_share_a_postgresql_study(postgresql, tmp_path):
    # One alone could have run all trials before a busy machine lets the other begin.
    both = multiprocessing.get_context("fork").Barrier(2)
    with (
        worker(postgresql, 10, 5, 0.1, tmp_path / "0", together=both) as one,
        worker(postgresql, 10, 5, 0.1, tmp_path / "1", together=both) as two,
    ):
        one.join(90)
        two.join(90)
        assert [one.exitcode, two.exitcode] == [0, 0]
    study = open_study(postgresql, Pretended(), SPACE)
    done = [t.number for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(done) in (10, 11), "the other worker's last trial may be under way when there are enough"
    ran = [[int(line) for line in (tmp_path / name).read_text().splitlines()] for name in "01"]
    assert sorted(ran[0] + ran[1]) == done, "every trial was run by one of them, and by one alone"
    assert all(len(each) >= 2 for each in ran), "both worked"
    assert any(t.user_attrs.get("stock", False) for t in study.trials)


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a server of its own; without Debian's package `postgresql` the test is skipped, and says so."""
    pytest.importorskip("psycopg")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    binaries = installed[-1].parent if installed else Path(shutil.which("initdb") or "/nowhere/initdb").parent
    if not (binaries / "postgres").exists():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # The server refuses to run as root, and pytest's folders are closed to others.
    user = None
    if os.geteuid() == 0:
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None)
    folder = tempfile.mkdtemp(prefix="sdattn-pg-")
    if user is not None:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = f"{folder}/data"
    quiet = {"check": True, "cwd": folder, "user": user, "stdout": subprocess.DEVNULL}
    try:
        subprocess.run([binaries / "initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync"], **quiet)
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        subprocess.run([binaries / "pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{folder}/log", "start"], **quiet)
        try:
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_reward_is_of_the_pipelines_own_pictures_and_of_no_nan() -> None:
    """diffusers makes black pictures of NaN, which CLIP would score like any other."""
    import torch

    from sdattn_fast.lab import load_pipeline

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    reward = Reward(pipe, None, ["a red circle", "a blue square"], batch=2, num_inference_steps=1)
    ((which, pictures),) = reward.pictures(ProgramFile())
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    with sdattn_fast.apply(pipe, ProgramFile()):
        want = pipe(reward.texts, num_inference_steps=1, generator=noise).images
    assert which == [0, 1]
    for picture, wanted in zip(pictures, want, strict=True):
        assert picture.mode == wanted.mode and np.array_equal(np.asarray(picture), np.asarray(wanted))
    pipe.vae.post_quant_conv.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="pictures: expected finite numbers, got NaN or infinity in picture 0 of 2"):
        list(reward.pictures(ProgramFile()))
