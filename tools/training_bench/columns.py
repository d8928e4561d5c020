"""What is compared: variants, precisions, and the slice of a configuration they run on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from launch.settings import Settings, load
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Precision -> Megatron's arguments. The FP8 recipes are Transformer Engine's on Hopper.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": None, "fp8-format": None},
    "bf16": {"bf16": True, "fp8-format": None},
    "fp8-delayed": {"bf16": True, "fp8-format": "hybrid", "fp8-recipe": "delayed"},
    "fp8-current": {"bf16": True, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
    "fp8-blockwise": {"bf16": True, "fp8-format": "e4m3", "fp8-recipe": "blockwise"},
}
#: Implementations of the connection that are not ours, by the name of --peer.
PEERS = ("transformer-engine",)
BASELINE = "none"
#: What a run writes into its folder, beside log and traces.
FILES = ("bench_training.txt", "bench_training.json", "bench_training.png")


@dataclass(frozen=True)
class Column:
    """One model that is measured.

    Attributes:
        label: ``mhc``, ``mhc:recompute=none``, ``transformer-engine``.
        precision: a key of PRECISIONS.
        mhc: its connections.
        peer: whose kernels run in the place of ours; empty for ours.
    """

    label: str
    precision: str
    mhc: MHCConfig
    peer: str = ""

    @property
    def fp8(self) -> bool:
        return self.precision.startswith("fp8")


def columns(
    variants: Iterable[str],
    precisions: Iterable[str],
    peers: Iterable[str],
    mhc: Mapping[str, Any],
) -> list[Column]:
    """All columns, precision by precision, in the order given.

    Args:
        variants: ``name`` or ``name:key=value:key=value`` with keys of MHCConfig.
        precisions: keys of PRECISIONS.
        peers: of PEERS; each is a column with ``mhc``'s values and variant mhc, the norms apart and
            nothing recomputed, which their kernels have no calls for.
        mhc: the configuration's own values, before a variant changes them.

    Raises:
        UserError: an unknown name or value, or the same column twice.
    """
    for name, known in ((p, tuple(PRECISIONS)) for p in precisions):
        if name not in known:
            raise UserError(f"--precision: {name!r} is not one of {', '.join(known)}.")
    for name in peers:
        if name not in PEERS:
            raise UserError(f"--peer: {name!r} is not one of {', '.join(PEERS)}.")
    found = [
        Column(label, precision, MHCConfig.from_mapping({**mhc, **_variant(label)}))
        for precision in precisions
        for label in variants
    ]
    theirs = {**mhc, "variant": "mhc", "fuse_norm": False, "recompute": "off"}
    found += [
        Column(peer, precision, MHCConfig.from_mapping(theirs), peer)
        for precision in precisions
        for peer in peers
    ]
    found.sort(key=lambda column: list(precisions).index(column.precision))
    if len({(column.label, column.precision) for column in found}) < len(found):
        raise UserError("--variants or --precision names the same column twice.")
    return found


def _variant(text: str) -> dict[str, Any]:
    name, *changes = text.split(":")
    values: dict[str, Any] = {"variant": name}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UserError(f"--variants: {text!r} is not name or name:key=value.")
        try:
            values[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--variants: {change!r} has no valid value.") from error
    return values


# ------------------------------------------------------------------------------------------- slice


@dataclass
class Slice:
    """A configuration cut to what a bench runs.

    Attributes:
        settings: with the overrides in.
        layers: how many, and of how many.
        full_layers: of the configuration.
        tokens: a step and data-parallel rank.
        microbatches: a step.
        overrides: what was changed in the configuration, beside precision and variant.
    """

    settings: Settings
    layers: int
    full_layers: int
    tokens: int
    microbatches: int
    overrides: dict[str, Any] = field(default_factory=dict)


def cut(
    path: str,
    changes: list[str],
    layers: int | None,
    tokens: int | None,
    microbatches: int = 1,
    transformer_impl: str | None = None,
) -> Slice:
    """Read a configuration and cut it to ``layers`` layers and one pipeline stage.

    What ``changes`` (``--set``) name stays as they say. Leading dense layers keep their share, at
    least one where there is one. Multi-token prediction, which would be half of a small slice, is
    left out of one unless ``--set mtp-num-layers`` asks for it.

    Raises:
        UserError: what cannot be read or cut.
    """
    settings = load(path, changes)
    given = {change.partition("=")[0].replace("_", "-") for change in changes}
    values = settings.megatron
    full = values.get("num-layers")
    if not isinstance(full, int):
        raise UserError(f"{path} has no num-layers.")
    if values.get("cuda-graph-impl") in ("transformer_engine", "full_iteration"):
        raise UserError(
            f"cuda-graph-impl {values['cuda-graph-impl']} is captured by the trainer's loop, which "
            "the bench does not run; local graphs can be measured."
        )
    overrides: dict[str, Any] = {}
    if layers is not None:
        if not 1 <= layers <= full:
            raise UserError(f"--layers must be from 1 to {full}, not {layers}.")
        if "num-layers" in given:
            raise UserError("--layers and --set num-layers say the same thing twice.")
        overrides |= _fewer_layers(values, layers)
    overrides |= _layout(values | overrides, int(os.environ.get("WORLD_SIZE", "1")))
    overrides |= _step(values, tokens, microbatches) | _no_files(values)
    if transformer_impl is not None:
        overrides["transformer-impl"] = transformer_impl
    overrides = {key: value for key, value in overrides.items() if key not in given}
    settings.megatron = values | overrides
    shown = {
        key: value
        for key, value in overrides.items()
        if (values.get(key) or value) and values.get(key) != value
        if not (key.endswith("parallel-size") and value == 1 and key not in values)
        if key not in _UNSHOWN
    }
    return Slice(
        settings,
        layers or full,
        full,
        settings.megatron["micro-batch-size"] * settings.megatron["seq-length"] * microbatches,
        microbatches,
        shown,
    )


def _fewer_layers(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    changed: dict[str, Any] = {
        "num-layers": layers,
        "mtp-num-layers": None,
        "mtp-loss-scaling-factor": None,
        "pipeline-model-parallel-size": 1,
        "pipeline-model-parallel-layout": None,
        "num-layers-per-virtual-pipeline-stage": None,
        "num-virtual-stages-per-pipeline-rank": None,
        "decoder-first-pipeline-num-layers": None,
        "decoder-last-pipeline-num-layers": None,
        "account-for-embedding-in-pipeline-split": None,
        "account-for-loss-in-pipeline-split": None,
    }
    frequency = values.get("moe-layer-freq")
    if values.get("num-experts") is not None and isinstance(frequency, str) and "[" in frequency:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that Megatron does not find
            from megatron.training.arguments import moe_freq_type

        pattern = moe_freq_type(frequency)
        dense = len(pattern) - sum(pattern)
        kept = min(layers - 1, max(1, round(dense * layers / len(pattern)))) if dense else 0
        changed["moe-layer-freq"] = f"([0]*{kept}+[1]*{layers - kept})"
    return changed


def _layout(values: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The configuration's parallel sizes as far as ``world`` GPUs hold them."""
    tensor = math.gcd(world, values.get("tensor-model-parallel-size") or 1)
    context = math.gcd(world // tensor, values.get("context-parallel-size") or 1)
    expert = math.gcd(world, values.get("expert-model-parallel-size") or 1)
    if (pipeline := values.get("pipeline-model-parallel-size") or 1) > 1:
        if world % (pipeline * tensor * context):
            raise UserError(
                f"pipeline-model-parallel-size {pipeline} does not fit {world} GPUs; --layers "
                "takes a slice of one stage."
            )
        expert = math.gcd(world // pipeline, expert)
    changed: dict[str, Any] = {
        "tensor-model-parallel-size": tensor,
        "context-parallel-size": context,
        "overlap-param-gather": False,
    }
    if tensor == 1:
        changed["sequence-parallel"] = False
    if values.get("num-experts") is not None:
        changed["expert-model-parallel-size"] = expert
    if world == tensor * context * pipeline:
        changed["overlap-grad-reduce"] = False
    return changed


def _step(values: Mapping[str, Any], tokens: int | None, microbatches: int) -> dict[str, Any]:
    sequence = values.get("seq-length")
    if not isinstance(sequence, int) or sequence < 1:
        raise UserError("the configuration has no seq-length.")
    micro = values.get("micro-batch-size") or 1
    if tokens is not None:
        micro, rest = divmod(tokens, sequence * microbatches)
        if rest or micro < 1:
            raise UserError(
                f"--tokens must be a multiple of seq-length x microbatches = "
                f"{sequence} x {microbatches}, not {tokens}."
            )
    return {"micro-batch-size": micro, "global-batch-size": None}


def _no_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """A bench reads no data and leaves no checkpoint; it never reaches the end of training."""
    decay = values.get("lr-warmup-iters") or 0
    return {
        "mock-data": True,
        "data-path": None,
        "split": None,
        "load": None,
        "save": None,
        "save-interval": None,
        "tensorboard-dir": None,
        "wandb-project": None,
        "train-iters": max(values.get("train-iters") or 0, decay + 1000),
        "log-throughput": None,
        # Once a step it reads all gradients and waits for the GPU; a step of many microbatches
        # hides that, one of few does not.
        "check-for-nan-in-loss-and-grad": False,
    }


_UNSHOWN = {
    "mock-data", "data-path", "split", "load", "save", "save-interval", "tensorboard-dir",
    "wandb-project", "train-iters", "log-throughput", "global-batch-size",
    "check-for-nan-in-loss-and-grad",
}  # fmt: skip
