"""Jobs on a real Slurm of this machine, on its CPUs: submit, preempt, requeue, resume, sweep.

Skipped where Slurm is not installed or this is not root (tests/slurm_cluster.py).
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from slurm_cluster import Slurm, missing

from launch import supervise

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode"),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]

SITE = """
partition: low
gpus-per-node: 2
gpu-request: ""
cpus-per-gpu: 1
exclusive: false
launcher: {launcher}
python: {python}
stop-seconds: {stop}
time: "10"
env:
  PYTHONPATH: {path}
"""

ITERATIONS = 120  # the steps after the fourth take longer than Slurm to preempt the job


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    # A short path: munge's socket is in it.
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the configuration and a site file for each launcher."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "small.yaml").write_text(soak.CONFIG + f"train-iters: {ITERATIONS}\n")
    for launcher in ("torchrun", "srun"):
        text = SITE.format(launcher=launcher, python=sys.executable, path=_path(), stop=30)
        (folder / f"{launcher}.yaml").write_text(text)
    return folder


def _path() -> str:
    return f"{ROOT}:{ROOT / 'kernels'}"


def submit(slurm: Slurm, *words: str) -> str:
    """launch/submit.py's job number."""
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--profile", "cpu", *words]
    result = subprocess.run(
        command, env=slurm.env, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


def pretrain(slurm: Slurm, files: Path, run: Path, launcher: str, *changes: str) -> str:
    words = ["--config", str(files / "small.yaml"), "--site", str(files / f"{launcher}.yaml")]
    for change in (f"save-interval={ITERATIONS}", *changes):
        words += ["--set", change]
    return submit(slurm, *words, "--run-dir", str(run))


def said(run: Path) -> str:
    return "\n".join(p.read_text(errors="replace") for p in run.glob("logs/slurm-*.out"))


def losses(run: Path) -> dict[int, float]:
    return {r["iteration"]: r["loss"] for r in soak.records(run) if r["event"] == "train"}


@pytest.fixture(scope="module")
def whole(slurm, files, tmp_path_factory) -> Path:
    """A run that nothing disturbed, one task a rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    job = pretrain(slurm, files, run, "srun")
    assert slurm.wait(job) == "COMPLETED", said(run)
    return run


def test_an_undisturbed_run(whole):
    start = next(r for r in soak.records(whole) if r["event"] == "start")
    assert start["world_size"] == 2
    assert list(losses(whole)) == list(range(1, ITERATIONS + 1))
    assert [a.verdict for a in supervise.history(whole)] == ["complete"]
    assert {p.name for p in (whole / "logs").glob("rank-*")} == {"rank-0.log", "rank-1.log"}


def test_preempted_it_saves_goes_back_into_the_queue_and_resumes(slurm, files, whole, tmp_path):
    """A job of higher priority takes the node; slurmctld sends SIGTERM and waits."""
    run = tmp_path / "run"
    job = pretrain(slurm, files, run, "torchrun", f"run.name=preempted{os.getpid()}")
    slurm.until("the fourth step", lambda: soak._last_iteration(run) >= 4, 300)
    urgent = slurm.command(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 1", check=True,
    ).strip()  # fmt: skip
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED", said(run)
    assert slurm.field(job, "Restarts") == "1"
    first, last = supervise.history(run)
    assert (first.verdict, last.verdict) == ("stopped", "complete")
    resumed = [r["iteration"] for r in soak.records(run) if r["event"] == "resume"]
    assert resumed == [first.checkpoint] and 4 <= resumed[0] < ITERATIONS
    # Nothing was trained twice, and the curve is that of the run that nothing disturbed.
    steps = [r["iteration"] for r in soak.records(run) if r["event"] == "train"]
    assert steps == list(range(1, ITERATIONS + 1))
    assert losses(run) == losses(whole)
    ours, theirs = soak.tensors(run), soak.tensors(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


#: In place of pyxis, which Debian has no package of: keeps its options, starts the rest.
SRUN = """#!/bin/bash
words=()
for word; do
    case $word in --container-*) echo "$word" >>{folder}/options;; *) words+=("$word");; esac
done
exec {srun} "${{words[@]}}"
"""


def test_a_checkpoint_is_converted_in_a_job_in_a_container(slurm, files, whole, tmp_path):
    (tmp_path / "bin").mkdir()
    srun = shutil.which("srun", path=slurm.env["PATH"])
    (tmp_path / "bin" / "srun").write_text(SRUN.format(folder=tmp_path, srun=srun))
    (tmp_path / "bin" / "srun").chmod(0o755)
    site = (files / "torchrun.yaml").read_text()
    site += f"setup: ['PATH={tmp_path}/bin:$PATH']\n"
    site += "container: {image: /img/torch.sqsh, mounts: ['/data:/data']}\n"
    (tmp_path / "site.yaml").write_text(site)
    words = ["--site", str(tmp_path / "site.yaml"), "--run-dir", str(tmp_path), "--convert"]
    out = tmp_path / "mean"
    source = str(whole / "checkpoints")
    job = submit(slurm, *words, "--", "average", source, source, "--out", str(out))
    assert slurm.wait(job) == "COMPLETED", said(tmp_path)
    assert (out / "latest_checkpointed_iteration.txt").exists(), said(tmp_path)
    assert (tmp_path / "options").read_text().splitlines() == [
        "--container-image=/img/torch.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}",
    ]


SWEEP = """
command: [launch/pretrain.py, --config, {config}, --run-dir, "{{out}}", "{{set}}"]
set: {{train-iters: 5, save: null, load: null, run.stability_interval: 0}}
grid: {{mhc.variant: [none, mhc]}}
"""


def test_sweep_and_table(slurm, files, tmp_path):
    """One rank a run, so that both runs of the sweep have room at the same time."""
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(config=files / "small.yaml"))
    site = (files / "srun.yaml").read_text().replace("gpus-per-node: 2", "gpus-per-node: 1")
    (tmp_path / "site.yaml").write_text(site)
    out = tmp_path / "out"
    words = ["--sweep", str(tmp_path / "sweep.yaml"), "--site", str(tmp_path / "site.yaml")]
    job = submit(slurm, *words, "--run-dir", str(out))
    assert slurm.wait(job) == "COMPLETED", said(out)
    collect = [sys.executable, str(ROOT / "tools" / "collect.py"), str(out), "--json"]
    result = subprocess.run(collect, capture_output=True, text=True, timeout=60)
    rows = json.loads(result.stdout)
    assert [(row["name"], row["gpus"], row["steps"]) for row in rows] == [
        ("variant=mhc", 1, 5),
        ("variant=none", 1, 5),
    ]
    plain = rows[1]["step_ms"]
    assert rows[0]["overhead"] == pytest.approx(rows[0]["step_ms"] / plain - 1)


@pytest.mark.slow
def test_a_node_that_is_gone_costs_the_steps_since_the_last_save(slurm, files, whole, tmp_path):
    """slurmd and everything that it started is killed: Slurm requeues the job by itself."""
    run = tmp_path / "run"
    name = f"run.name=gone{os.getpid()}"
    job = pretrain(slurm, files, run, "srun", name, "save-interval=4")
    slurm.until("the sixth step", lambda: soak._last_iteration(run) >= 6, 300)
    slurm.kill_node()
    slurm.until("slurmctld's notice", lambda: slurm.state(job) == "PENDING", 120)
    slurm.start_node()
    assert slurm.wait(job) == "COMPLETED", said(run)
    resumed = [r["iteration"] for r in soak.records(run) if r["event"] == "resume"]
    assert resumed and resumed[0] % 4 == 0 and 4 <= resumed[0] < ITERATIONS
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_the_time_limit_and_a_chain(slurm, files, whole, tmp_path):
    """One minute is not enough: a signal before it, a save, the queue, and on to the end."""
    run = tmp_path / "run"
    text = SITE.format(launcher="torchrun", python=sys.executable, path=_path(), stop=20)
    (tmp_path / "site.yaml").write_text(text)
    trained = [r["step_time_s"] for r in soak.records(whole) if r["event"] == "train"]
    iterations = round(60 / statistics.median(trained))
    words = ["--config", str(files / "small.yaml"), "--site", str(tmp_path / "site.yaml")]
    words += ["--set", f"run.name=limited{os.getpid()}", "--set", f"train-iters={iterations}"]
    words += ["--run-dir", str(run), "--time", "1", "--chain", "2"]
    last = submit(slurm, *words)
    first = str(int(last) - 1)
    for job in (first, last):
        assert slurm.wait(job, 600) == "COMPLETED", said(run)
    history = supervise.history(run)
    assert {a.verdict for a in history} == {"stopped", "complete"}
    assert int(slurm.field(first, "Restarts")) >= 1
    # The second link found nothing left to do.
    assert [a.job for a in history][-1] == last and history[-1].verdict == "complete"
    steps = [r["iteration"] for r in soak.records(run) if r["event"] == "train"]
    assert steps == list(range(1, iterations + 1))
