"""launch/pretrain.py from end to end, on the CPU: learning, stopping, resuming, refusing.

A run is a process of its own, forked from one that has imported Megatron already.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np
import pretrain_job
import pytest
import torch

from mhc_megatron import faults
from tools.corpus.prepare import Options, corpus_of, prepare
from tools.corpus.sources import Reading

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="checks the CPU mode; this is a GPU machine"
    ),
    pytest.mark.filterwarnings("ignore"),
]

ENTRY = Path(__file__).parents[1] / "launch" / "pretrain.py"

CONFIG = """
num-layers: 2
hidden-size: 32
ffn-hidden-size: 64
num-attention-heads: 2
normalization: RMSNorm
swiglu: true
disable-bias-linear: true
position-embedding-type: rope
attention-dropout: 0.0
hidden-dropout: 0.1
tokenizer-type: NullTokenizer
vocab-size: 257
make-vocab-size-divisible-by: 1
data-path: [{data}]
split: "90,10,0"
seq-length: 32
max-position-embeddings: 32
micro-batch-size: 2
global-batch-size: 4
train-iters: 12
lr: 1e-2
min-lr: 1e-3
lr-warmup-iters: 2
weight-decay: 0.1
clip-grad: 1.0
log-interval: 1
eval-interval: 6
eval-iters: 1
save-interval: 6
num-workers: 0
run:
  stability-interval: 5
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        lines = (f"line {j} of file {i} is much like the others\n" for j in range(40))
        (folder / f"{i:02}.txt").write_text("".join(lines))
    prefix = folder / "small"
    prepare(corpus_of([str(folder)], Reading()), str(prefix), Options(quiet=True))
    return str(prefix)


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.format(data=corpus))
    return str(path)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pretrain_job"])


def forked(target: Callable, *given) -> BaseProcess:
    """A child that runs ``target``, forked from a server that has imported Megatron once for all.

    The server of Python 3.12.1 does not take this process's sys.path, and says nothing of an import
    that fails: it is started with the path in its environment.
    """
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=given)
    process.start()
    return process


def launch(argv: list[str], output: Path, watch: Callable[[int, str], None] | None = None) -> int:
    """Run launch/pretrain.py; its exit code. ``watch`` sees its process number and output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    process = forked(pretrain_job.run, argv, str(output))
    while process.is_alive():
        if watch is not None and output.exists():
            watch(process.pid, output.read_text())
        process.join(0.02)
    return process.exitcode


def arguments(config: str, run: Path, *changes: str) -> list[str]:
    words = ["--config", config, "--run-dir", str(run)]
    for change in changes:
        words += ["--set", change]
    return words


def records(run: Path, event: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, the optimizer's too."""
    import torch.distributed.checkpoint as dcp

    step = (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    folder = run / "checkpoints" / f"iter_{int(step):07d}"
    reader = dcp.FileSystemReader(folder)
    state = {
        key: torch.empty(tuple(meta.size), dtype=meta.properties.dtype)
        for key, meta in reader.read_metadata().state_dict_metadata.items()
        if hasattr(meta, "properties")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "whole"
    assert launch(arguments(config, run), run.parent / "out") == 0, (run.parent / "out").read_text()
    return run


def test_it_learns_and_says_so(whole_run):
    losses = [record["loss"] for record in records(whole_run, "train")]
    assert len(losses) == 12 and losses[0] > 5.4
    assert losses[-1] < losses[0] - 1.5
    start = records(whole_run, "start")[0]
    assert start["hc_parameters"] == 4 * (24 * 128 + 24 + 3)
    assert start["unigram_entropy"] < 3.5 and start["device"] == "cpu"
    assert [r["iteration"] for r in records(whole_run, "valid")] == [6, 12]
    stability = records(whole_run, "stability")
    assert [r["iteration"] for r in stability] == [1, 5, 10]
    assert stability[0]["sublayers"] == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    assert max(stability[-1]["row_error"]) < 1e-5
    assert records(whole_run, "exit")[-1]["reason"] == "complete"
    said = (whole_run.parent / "out").read_text()
    assert re.search(r"iteration +12/12 +loss +\d\.\d+ +grad norm +\d.*tokens/s.*0:00 left", said)
    assert list((whole_run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_and_resumed_is_never_stopped_to_the_bit(sent, config, whole_run, tmp_path):
    run = tmp_path / "run"
    sent_at: list[float] = []

    def stop(pid: int, said: str) -> None:
        if re.search(r"iteration +4/12", said) and not sent_at:
            sent_at.append(time.time())
            os.kill(pid, sent)

    assert launch(arguments(config, run), tmp_path / "out", stop) == 0
    stopped = records(run, "exit")[-1]
    assert stopped["reason"] == "signal" and 4 <= stopped["iteration"] < 12
    assert "stopped at iteration" in (tmp_path / "out").read_text()
    assert launch(arguments(config, run), tmp_path / "out") == 0
    assert records(run, "resume")[-1]["iteration"] == stopped["iteration"]
    ours, theirs = weights(run), weights(whole_run)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


@pytest.mark.slow
def test_bf16_resumes_to_the_bit(config, tmp_path):
    """Float32 connections in a bf16 model."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(arguments(config, whole, "bf16=true"), tmp_path / "out") == 0
    assert launch(arguments(config, run, "bf16=true", "exit-interval=6"), tmp_path / "out") == 0
    assert launch(arguments(config, run, "bf16=true"), tmp_path / "out") == 0
    assert records(run, "resume")[-1]["iteration"] == 6
    ours, theirs = weights(run), weights(whole)
    # The optimizer's flat buffers end in padding that nobody writes.
    names = [key for key in theirs if not key.startswith("optimizer.")]
    assert len(names) > 10 and all(torch.equal(ours[name], theirs[name]) for name in names)
    assert all(theirs[name].dtype == torch.float32 for name in names if "_hc." in name)
    for key in ("loss", "grad_norm"):
        seen = [[r[key] for r in records(folder, "train")] for folder in (run, whole)]
        assert seen[0] == seen[1]


@pytest.mark.slow
def test_with_recompute_it_is_the_same_run(config, whole_run, tmp_path):
    """Blocks of three sublayers, then of what suits best: every weight as without, to the bit."""
    run = tmp_path / "run"
    first = arguments(config, run, "mhc.recompute=3", "exit-interval=6")
    assert launch(first, tmp_path / "out") == 0, (tmp_path / "out").read_text()
    assert launch(arguments(config, run, "mhc.recompute=auto"), tmp_path / "out") == 0
    assert records(run, "resume")[-1]["iteration"] == 6
    ours, theirs = weights(run), weights(whole_run)
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_workers_of_the_loader_read_the_same_batches(config, whole_run, tmp_path):
    run = tmp_path / "run"  # a process of its own: workers of one that was forked differ
    words = arguments(config, run, "num-workers=2", "exit-interval=6")
    done = subprocess.run([sys.executable, ENTRY, *words], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout
    ours, theirs = (
        [record["loss"] for record in records(of, "train")[:6]] for of in (run, whole_run)
    )
    assert ours == theirs


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoints(config, whole_run, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    begin = (f"load={whole_run / 'checkpoints'}", "finetune=true", "train-iters=12")
    assert launch(arguments(config, run, *begin, "exit-interval=6"), out) == 0, out.read_text()
    assert launch(arguments(config, run, *begin), out) == 0, out.read_text()
    assert "going on from" in out.read_text()
    assert records(run, "resume")[-1]["iteration"] == 6
    assert [r["iteration"] for r in records(run, "train")] == list(range(1, 13))


def test_without_a_tracker_the_newest_whole_checkpoint_is_taken(config, whole_run, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole_run, run)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    assert launch(arguments(config, run, "train-iters=12"), out) == 0, out.read_text()
    assert "was damaged or missing. Going on from iteration 12" in " ".join(out.read_text().split())


@pytest.mark.slow  # waits for the other one to end
def test_two_runs_at_once_in_one_folder(config, tmp_path):
    run = tmp_path / "run"
    first = [sys.executable, str(ENTRY), *arguments(config, run, "train-iters=100000")]
    with subprocess.Popen(first, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        second = arguments(config, run)
        assert launch(second, tmp_path / "out") == 2
        assert "another process is training in" in (tmp_path / "out").read_text()
        process.kill()
    assert len(records(run, "start")) == 1


def test_a_reader_that_goes_away_does_not_end_the_run(config, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, str(ENTRY), *arguments(config, run)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert records(run, "exit")[-1]["reason"] == "complete"


def test_plain_residuals_through_the_same_entry(config, tmp_path):
    run = tmp_path / "run"
    assert launch(arguments(config, run, "mhc.variant=none"), tmp_path / "out") == 0
    assert records(run, "start")[0]["hc_parameters"] == 0 and not records(run, "stability")
    assert not any("hc" in key.split(".") for key in weights(run))


def truncated(corpus: str, folder: Path, end: str) -> str:
    copy = folder / "cut"
    for suffix in (".bin", ".idx", ".json"):
        data = Path(corpus + suffix).read_bytes()
        (folder / f"cut{suffix}").write_bytes(data[:-7] if suffix == end else data)
    return str(copy)


#: Name -> (changes, what the sentence says).
BAD = {
    "unknown key": (["num-layer=2"], "did you mean 'num-layers'"),
    "unknown mhc key": (["mhc.varient=mhc"], "did you mean 'variant'"),
    "no streams": (["mhc.n=0"], "n must be at least 1, not 0"),
    "recompute of recompute": (
        [
            "mhc.recompute=auto",
            "recompute-granularity=full",
            "recompute-method=uniform",
            "recompute-num-layers=1",
        ],
        "mhc: recompute auto: recompute-granularity full makes whole layers again",
    ),
    "Mamba layers": (["hybrid-layer-pattern=M-*-"], "'M' stands for layers that are not supported"),
    "ft_launcher's": (["enable-ft-package=true"], "enable-ft-package is not supported: launch/sup"),
    "restart in the process": (["inprocess-restart=true"], "inprocess-restart is not supported"),
    "spikes of every step": (["run.spike_factor=0.5"], "spike_factor must be larger than 1"),
    "no such policy": (["run.loss_spike=ignore"], "loss_spike must be log or stop or skip"),
    "no iterations": (["train-iters=0"], "train-iters must be at least 1"),
    "not a number": (["hidden-size=wide"], "invalid int value: 'wide'"),
    "no such backend": (["attention-backend=x"], "attention-backend: unknown name 'x'; known are"),
    "no such graphs": (["cuda-graph-modules=[x]"], "cuda-graph-modules: unknown name 'x'"),
    "layers from nowhere": (
        ["heterogeneous-layers-config-path=/nope"],
        "heterogeneous-layers-config-path: cannot open /nope: No such file",
    ),
    "query groups": (
        ["num-attention-heads=4", "group-query-attention=true", "num-query-groups=3"],
        "4 attention heads do not divide into 3 query groups",
    ),
    "two rates": (["use-mup=true", "mhc.lr_mult=0.5"], "leave mhc.lr_mult at 1"),
    "mhc is no switch": (["mhc=off"], "mhc.variant=none switches it off"),
    "heads do not divide": (["num-attention-heads=5"], "contradictory settings"),
    "iterations and samples": (["train-samples=100"], "contradictory settings"),
    "warmup too long": (["lr-warmup-iters=12"], "must be smaller than train-iters (12)"),
    "missing corpus": (["data-path=[no/such]"], "no/such.bin does not exist"),
    "wandb is not there": (["wandb-project=x"], "the package wandb is not installed"),
    "no data at all": (["data-path=null"], "no data: set data-path"),
    "vocabulary too large": (
        ["vocab-size=100"],
        "a vocabulary of 257, larger than the model's 100",
    ),
    "split without a document": (["split=99,1,0"], "none falls to the validation set"),
    "no validation": (["split=100,0,0"], "there is no validation set; set eval-iters: 0"),
    "split that nobody asks for": (
        ["split=99,1,0", "eval-iters=0"],
        "none falls to the validation set",
    ),
    "nothing to load": (["load=runs/no-such-run"], "load: there is no checkpoint in runs/no-such"),
    "a file to save into": (["save=/dev/null"], "save: cannot write to /dev/null"),
    "sequence longer than data": (
        ["seq-length=100000", "max-position-embeddings=100000"],
        "fewer than one sequence",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, config, tmp_path):
    changes, sentence = BAD[name]
    assert launch(arguments(config, tmp_path / "run", *changes), tmp_path / "out") == 2
    said = (tmp_path / "out").read_text()
    assert sentence in said and said.count("error:") == 1 and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_wrong_with_the_settings_is_noted_in_the_runs_folder(config, tmp_path):
    """There a supervisor finds it, and does not try again."""
    run = tmp_path / "run"
    run.mkdir()
    assert launch(arguments(config, run, "mhc.varient=mhc"), tmp_path / "out") == 2
    assert [record["code"] for record in faults.read(str(run))] == [2]


@pytest.mark.parametrize(("end", "sentence"), [(".bin", "truncated or of"), (".idx", "truncated")])
def test_truncated_corpus(end, sentence, corpus, config, tmp_path):
    prefix = truncated(corpus, tmp_path, end)
    words = arguments(config, tmp_path / "run", f"data-path=[{prefix}]")
    assert launch(words, tmp_path / "out") == 2
    assert sentence in (tmp_path / "out").read_text()


def test_unwritable_run_folder(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert launch(arguments(config, tmp_path / "file" / "run"), tmp_path / "out") == 2
    assert "cannot write to the run's folder" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("hidden-size=64", "checkpoint"),
        ("mhc.n=2", "checkpoint"),
        ("mhc.variant=hc", "checkpoint"),
        ("ffn-hidden-size=96", "checkpoint"),
        ("mhc.lr_mult=0.5", "keep its lr, min-lr, weight-decay, mhc.lr_mult"),
    ],
)
def test_a_checkpoint_of_another_model_is_left_alone(
    change, sentence, config, whole_run, tmp_path
):
    before = {p: p.stat().st_mtime_ns for p in (whole_run / "checkpoints").rglob("*")}
    words = arguments(config, tmp_path / "run", change, "train-iters=20")
    words += ["--set", f"load={whole_run / 'checkpoints'}"]
    words += ["--set", f"save={whole_run / 'checkpoints'}"]
    assert launch(words, tmp_path / "out") == 2, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert said.count("error:") == 1 and sentence in said
    assert {p: p.stat().st_mtime_ns for p in (whole_run / "checkpoints").rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "trusted"),
    [
        ({}, True),
        ({"load": "runs/../runs/a"}, True),
        ({"load": "runs/b"}, False),
        ({"load": None}, False),
        ({"fp8": None}, False),
        ({"fp8_recipe": "blockwise"}, False),
    ],
)
def test_delayed_scales_are_unpickled_from_the_runs_own_folder_only(settings, trusted, monkeypatch):
    from launch.environment import load_own_scales

    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    own = {"load": "runs/a", "save": "runs/a", "fp8": "hybrid", "fp8_recipe": "delayed"}
    load_own_scales(argparse.Namespace(**own | settings))
    assert os.environ.get(name) == ("1" if trusted else None)


def test_a_gpu_without_transformer_engine_is_enough(config):
    """What Megatron fuses with Transformer Engine or Apex is off where they are not installed."""
    process = forked(pretrain_job.settings_without_transformer_engine, config)
    process.join()
    assert process.exitcode == 0


def test_a_run_is_forked_from_what_has_imported_megatron():
    """Else every run of these files imports it for itself, which takes seconds each."""
    process = forked(exec, "import sys; sys.exit('mhc_megatron.training' not in sys.modules)")
    process.join()
    assert process.exitcode == 0


def test_losses_are_those_of_the_corpus_bytes(whole_run, corpus):
    """The entropy line of the report is the corpus's own, counted here from the .bin file."""
    counts = np.bincount(np.fromfile(corpus + ".bin", dtype=np.uint16), minlength=257)
    p = counts[counts > 0] / counts.sum()
    recorded = records(whole_run, "start")[0]["unigram_entropy"]
    assert recorded == pytest.approx(float(-(p * np.log(p)).sum()), rel=1e-9)
