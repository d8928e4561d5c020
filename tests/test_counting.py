"""Parameters by formula: equal to the modules that Megatron builds, and to the paper's table.

Also that every configuration passes Megatron's own checks in its own layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cluster import Cluster

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: Total and active parameters of the models of arXiv 2512.24880, in 1e9.
PAPER = {"mhc-3b": (2.97, 0.612), "mhc-9b": (9.18, 1.66), "mhc-27b": (27.0, 4.14)}
#: The same of others, from their reports.
PUBLISHED = {"deepseek-v3-671b": (671, 37), "dense-1b": (1.236, 1.236), "dense-8b": (8.03, 7.50)}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
#: With 15,000 experts this one takes long to build; a slow test does.
LARGE = "deepseek-v3-671b"

#: Variants of the connections that no configuration has.
CHANGES = (
    ("mhc.variant=hc",),
    ("mhc.variant=none",),
    ("mhc.variant=birkhoff", "mhc.exit=learned"),
    ("mhc.n=2", "mhc.variant=identity"),
)
#: Kinds of layers that no configuration has, over tiny.yaml, so that the formulas cover them.
KINDS: dict[str, dict[str, Any]] = {
    "biases": {"disable-bias-linear": False, "normalization": "LayerNorm", "swiglu": False},
    "qkv bias": {"add-qkv-bias": True, "qk-layernorm": True, "kv-channels": 32},
    "tied, positions": {"position-embedding-type": "learned_absolute"},
    "query rank": {
        "multi-latent-attention": True, "q-lora-rank": 24, "kv-lora-rank": 16, "qk-head-dim": 16,
        "v-head-dim": 20, "qk-pos-emb-head-dim": 8, "rope-type": "rope", "qk-layernorm": True,
    },
    "latents without norms": {
        "multi-latent-attention": True, "kv-lora-rank": 16, "qk-head-dim": 16, "v-head-dim": 16,
        "qk-pos-emb-head-dim": 8, "rope-type": "rope",
    },
    "experts in every other layer": {
        "num-experts": 4, "moe-layer-freq": 2, "moe-ffn-hidden-size": 48, "moe-router-topk": 2,
        "moe-shared-expert-intermediate-size": 40, "moe-shared-expert-gate": True,
    },
    "prediction": {"mtp-num-layers": 2, "untie-embeddings-and-output-weights": True},
}  # fmt: skip


def path(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


def both(cluster: Cluster, jobs: list[dict[str, Any]]) -> list[tuple[dict, dict]]:
    """(by formula, built) of each job, all in one process."""
    twice = [(what, job) for job in jobs for what in ("counted", "built")]
    results = cluster.run("tests.counting_jobs:each", 1, {"jobs": twice})[0]
    return list(zip(results[::2], results[1::2], strict=True))


@pytest.fixture(scope="module")
def models(cluster: Cluster) -> dict[str, tuple[dict, dict]]:
    """(by formula, built) of every configuration; the large one's modules of two slices instead."""
    jobs = [
        (what, {"config": path(name)})
        for name in NAMES
        for what in ("counted", *(() if name == LARGE else ("built",)))
    ]
    jobs += [("built", {"config": path(LARGE), "settings": slice_of(layers)}) for layers in (4, 5)]
    results = iter(cluster.run("tests.counting_jobs:each", 1, {"jobs": jobs})[0])
    models = {name: [next(results) for what, job in jobs if job == {"config": path(name)}]
              for name in NAMES}  # fmt: skip
    four, five = results
    models[LARGE].append({key: four[key] + 57 * (five[key] - four[key]) for key in four})
    return {name: (formula, built) for name, (formula, built) in models.items()}


def slice_of(layers: int) -> dict[str, Any]:
    """The large model with its three dense layers and some of its 58 others."""
    return {"num-layers": layers, "moe-layer-freq": f"([0]*3+[1]*{layers - 3})"}


@pytest.mark.parametrize("name", NAMES)
def test_formula_is_what_is_built(models, name: str) -> None:
    formula, built = models[name]
    assert {key: formula[key] for key in built} == built
    assert sum(formula["parts"].values()) == formula["total"] + formula["mtp"]


@pytest.mark.slow
def test_formula_is_the_whole_large_model(cluster: Cluster) -> None:
    [(formula, built)] = both(cluster, [{"config": path(LARGE)}])
    assert {key: formula[key] for key in built} == built


def test_formula_of_variants_and_kinds_of_layers(cluster: Cluster) -> None:
    variants = [
        {"config": path("tiny"), "changes": changes, "settings": {"mtp-num-layers": 1}}
        for changes in CHANGES
    ]
    kinds = [{"config": path("tiny"), "settings": settings} for settings in KINDS.values()]
    for name, (formula, built) in zip(
        [*map(str, CHANGES), *KINDS], both(cluster, variants + kinds), strict=True
    ):
        assert {key: formula[key] for key in built} == built, name
        assert (formula["connections"] == 0) == ("variant=none" in name), name


@pytest.mark.parametrize("name", PAPER | PUBLISHED)
def test_published_totals(models, name: str) -> None:
    formula = models[name][0]
    total, active = (PAPER | PUBLISHED)[name]
    assert formula["total"] == pytest.approx(total * 1e9, rel=0.01)
    assert formula["active"] == pytest.approx(active * 1e9, rel=0.01)
    if name in PAPER:  # to every digit that the paper prints
        assert [f"{formula[key] / 1e9:.3g}" for key in ("total", "active")] == [
            f"{value:.3g}" for value in PAPER[name]
        ]


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_megatrons(models, name: str) -> None:
    """Megatron leaves the router out and counts norms' weights of low-rank queries."""
    formula = models[name][0]
    assert formula["flops"]["model"] == pytest.approx(formula["megatron_flops"], rel=0.004)


def test_one_key_switches_the_variant(cluster: Cluster, models) -> None:
    """Every variant passes Megatron's checks; the rest of the model is the same."""
    jobs = [
        ("counted", {"config": path(name), "changes": (f"mhc.variant={variant}",)})
        for name in NAMES
        for variant in ("none", "hc")
    ]
    counts = cluster.run("tests.counting_jobs:each", 1, {"jobs": jobs})[0]
    for i, name in enumerate(NAMES):
        none, hc, mhc = *counts[2 * i : 2 * i + 2], models[name][0]
        rests = {c["total"] + c["mtp"] - c["connections"] for c in (none, hc, mhc)}
        assert len(rests) == 1, name
        assert none["connections"] == 0 < hc["connections"] == mhc["connections"], name
        assert none["flops"]["connections"] == 0 < mhc["flops"]["connections"], name


LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "stages of two chunks, custom": ("mhc-27b", 4, {"expert-model-parallel-size": 1}),
    "tensor and pipeline": (
        "dense-1b", 4, {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2},
    ),
    "uneven, untied": (
        "dense-8b", 3, {
            "tensor-model-parallel-size": 1, "sequence-parallel": False,
            "pipeline-model-parallel-size": 3, "decoder-first-pipeline-num-layers": 10,
            "decoder-last-pipeline-num-layers": 10, "global-batch-size": 512,
        },
    ),
    "experts": ("mhc-3b", 2, {"expert-model-parallel-size": 2}),
    "prediction apart from the loss": (
        "deepseek-v3-671b", 2, {
            "num-layers": 4, "moe-layer-freq": "([0]*3+[1]*1)", "num-experts": 16,
            "moe-router-group-topk": 4, "pipeline-model-parallel-size": 2,
            "pipeline-model-parallel-layout": "Ett|t|tm|L", "expert-model-parallel-size": 1,
        },
    ),
}  # fmt: skip
SLOW = ("uneven, untied", "experts")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS]
)
def test_footprint_is_what_a_rank_builds(cluster: Cluster, layout: str) -> None:
    name, world, settings = LAYOUTS[layout]
    job = {"config": path(name), "settings": settings}
    results = cluster.run("tests.counting_jobs:owned", world, job)
    assert [footprint for footprint, _ in results] == [built for _, built in results]
