"""tools/generate.py: the cache changes nothing, any layout's checkpoint loads, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cluster import Cluster
from tools.prepare_data import main as prepare_data

ROOT = Path(__file__).resolve().parents[1]

SMALL = ("num-layers=2", "hidden-size=64", "ffn-hidden-size=96", "train-iters=3", "lr=0.01",
         "lr-warmup-iters=0", "seq-length=48", "max-position-embeddings=48", "eval-iters=0",
         "init-method-std=0.2", "split='1,0,0'", "mhc.init=static")  # fmt: skip
LATENT = ("multi-latent-attention=true", "kv-lora-rank=16", "qk-head-dim=16", "v-head-dim=16",
          "qk-pos-emb-head-dim=8", "qk-layernorm=true", "rope-type=rope")  # fmt: skip
EXPERTS = ("num-experts=4", "moe-layer-freq='[0,1]'", "moe-ffn-hidden-size=32", "moe-router-topk=2",
           "moe-shared-expert-intermediate-size=32", "moe-router-score-function=sigmoid",
           "moe-router-enable-expert-bias=true", "moe-router-load-balancing-type=none",
           "moe-token-dispatcher-type=alltoall", "mtp-num-layers=1",
           "mhc.exit=learned")  # fmt: skip
#: Name of a run -> ranks and settings beside SMALL.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dense": (1, ()),
    "latent": (1, LATENT + EXPERTS),
    "tensor": (2, ("tensor-model-parallel-size=2", "sequence-parallel=true",
                   "group-query-attention=true", "num-query-groups=2")),  # fmt: skip
    "half": (1, ("bf16=true", "use-distributed-optimizer=true", "mhc.lr-mult=0.5")),
    "residual": (1, ("mhc.variant=none",)),
    "hybrid": (1, ("hybrid-layer-pattern='*-*-/*-'", "num-layers=4", "position-embedding-type=rope",
                   "mtp-num-layers=1")),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("It was a bright cold day in April. " * 400)
    prefix = folder / "corpus"
    assert prepare_data([str(folder / "text.txt"), "--output", str(prefix)]) == 0
    return prefix


@pytest.fixture(scope="module")
def runs(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """Function of a name in RUNS: the folder of that run, trained at first use."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def run(name: str) -> Path:
        if name not in made:
            train(cluster, folder / name, corpus, *RUNS[name])
            made.add(name)
        return folder / name

    return run


def train(cluster: Cluster, run: Path, corpus: Path, world: int, settings: tuple[str, ...]) -> None:
    changes = [*SMALL, *settings, f"data-path=[{corpus}]", f"run.dir={run}"]
    arguments = ["--config", str(ROOT / "configs/tiny.yaml")]
    for change in changes:
        arguments += ["--set", change]
    codes = cluster.run("tests.generation_jobs:train", world, {"arguments": arguments})
    assert codes == [0] * world, (run / "logs/rank-0.log").read_text()[-3000:]


def generate(cluster: Cluster, *arguments: Any) -> tuple[int, str, str]:
    job = {"arguments": [str(argument) for argument in arguments]}
    return cluster.run("tests.generation_jobs:generate", 1, job)[0]


def text(cluster: Cluster, *arguments: Any) -> str:
    code, out, err = generate(cluster, *arguments)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("name", RUNS)
def test_decoding_gives_the_logits_of_the_full_forward(cluster: Cluster, runs, name: str) -> None:
    result = cluster.run("tests.generation_jobs:logits", 1, {"run": str(runs(name))})[0]
    assert result["spread"] > 0.05
    assert result["error"] < (0.1 if name == "half" else 1e-4)
    assert result["connections"] == (0 if name == "residual" else 12)
    assert result["fp32"]


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--top-k", "40", "--seed", "3")])
def test_cached_and_uncached_text_agree(cluster: Cluster, runs, options: tuple[str, ...]) -> None:
    command = (runs("latent"), "--prompt", "It was", "--tokens", 30, *options)
    cached = text(cluster, *command)
    assert cached == text(cluster, *command, "--no-cache")
    assert cached.startswith("It was") and len(cached) > len("It was\n")


def test_seed_and_top_k_and_top_p_choose(cluster: Cluster, runs) -> None:
    command = (runs("dense"), "--prompt", "a", "--tokens", 24)
    drawn = text(cluster, *command, "--temperature", 2, "--seed", 1)
    assert drawn == text(cluster, *command, "--temperature", 2, "--seed", 1)
    assert drawn != text(cluster, *command, "--temperature", 2, "--seed", 2)
    greedy = text(cluster, *command)
    assert greedy == text(cluster, *command, "--top-k", 1, "--seed", 5)
    assert greedy == text(cluster, *command, "--top-p", 1e-6, "--seed", 5)


def damage(run: Path, into: Path) -> dict[str, Path]:
    """Copies of a run, each with something wrong, by what is wrong."""
    folders = {kind: into / kind for kind in ("truncated", "metadata", "tracker", "lost", "file")}
    for folder in folders.values():
        shutil.copytree(run / "checkpoints", folder)
    step = "iter_0000003"
    for part in (folders["truncated"] / step).glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    (folders["metadata"] / step / ".metadata").write_bytes(b"nothing")
    (folders["tracker"] / "latest_checkpointed_iteration.txt").write_text("soon")
    shutil.rmtree(folders["lost"] / step)
    for part in (folders["file"] / step).glob("*.distcp"):
        part.unlink()
    return folders


def test_bad_checkpoints_end_in_one_sentence(cluster: Cluster, runs, tmp_path: Path) -> None:
    folders = damage(runs("dense"), tmp_path) | {"none": tmp_path / "none"}
    said = {
        "truncated": "is damaged: __0_0.distcp has",
        "metadata": "is damaged",
        "file": "is damaged: __0_0.distcp has 0 bytes",
        "tracker": "must hold the number of a step, not 'soon'",
        "lost": "there is no checkpoint of step 3",
        "none": "there is no checkpoint in",
    }
    for kind, folder in folders.items():
        refuse(cluster, said[kind], folder, "--prompt", "a", "--tokens", 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "x" * 40, "--tokens", "20"), "40 tokens and 20 more exceed the model's 48"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--tokens", "0"), "at least 1, not 0"),
        (("--prompt", "a", "--step", "2"), "there is no checkpoint of step 2"),
        (("--prompt", "a", "--temperature", "-1"), "temperature must be at least 0"),
        (("--prompt", "a", "--top-p", "0"), "top-p must be above 0"),
        (("--prompt", "a", "--tokenizer", "no.json"), "no.json cannot be read"),
        (("--prompt", "a", "--seed", "99999999999999999999"), "the seed must be from"),
        (("--prompt", "\udcff"), "must be UTF-8"),
    ],
)
def test_bad_options_end_in_one_sentence(cluster: Cluster, runs, options, said: str) -> None:
    refuse(cluster, said, runs("dense"), *options)


def test_a_corpus_that_went_away(cluster: Cluster, runs, corpus: Path) -> None:
    sidecar = corpus.with_name("corpus.json")
    kept = sidecar.read_text()
    command = (runs("dense"), "--prompt", "It", "--tokens", 5)
    with_corpus = text(cluster, *command)
    try:
        sidecar.unlink()
        refuse(cluster, "name one with --tokenizer", *command)
        assert text(cluster, *command, "--tokenizer", "bytes") == with_corpus
        larger = json.loads(kept)["tokenizer"] | {"kind": "nothing"}
        sidecar.write_text(json.dumps({"tokenizer": larger["kind"]}))
        refuse(cluster, "name one with --tokenizer", *command)
    finally:
        sidecar.write_text(kept)


def refuse(cluster: Cluster, said: str, *arguments: Any) -> None:
    """The command ends with exit code 2 and one line on stderr, nothing on stdout."""
    code, out, err = generate(cluster, *arguments)
    assert (code, out) == (2, ""), err
    assert said in err
    assert err.startswith("generate.py: ") and err.count("\n") == 1 and err.endswith(".\n")
