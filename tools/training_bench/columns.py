"""What is compared: variants, precisions, and the slice of a configuration they run on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.settings import Settings, load, yaml_value
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Precision -> Megatron's arguments. The FP8 recipes are Transformer Engine's on Hopper.
PRECISIONS: dict[str, dict[str, Any]] = {
    name: {"fp16": None, "bf16": None, "fp8-format": None} | values
    for name, values in {
        "fp32": {},
        "bf16": {"bf16": True},
        "fp8-delayed": {"bf16": True, "fp8-format": "hybrid", "fp8-recipe": "delayed"},
        "fp8-current": {"bf16": True, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
        "fp8-blockwise": {"bf16": True, "fp8-format": "e4m3", "fp8-recipe": "blockwise"},
    }.items()
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
        label: ``mhc``, ``mhc:recompute=off``, ``transformer-engine``.
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
            values[key.replace("-", "_")] = yaml_value(value)
        except UserError as error:
            raise UserError(f"--variants: {change!r}: {error}") from error
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
    options = {"layers": layers, "tokens": tokens, "transformer-impl": transformer_impl}
    _check_given(given, {name for name, value in options.items() if value is not None})
    values = settings.megatron
    full = _whole(values, "num-layers")
    if not full:
        raise UserError(f"{path} has no num-layers.")
    if values.get("cuda-graph-impl") in ("transformer_engine", "full_iteration"):
        raise UserError(
            f"cuda-graph-impl {values['cuda-graph-impl']} is captured by the trainer's loop, which "
            "the bench does not run; local graphs can be measured."
        )
    overrides: dict[str, Any] = {}
    if layers is not None:
        overrides |= _fewer_layers(values, layers, full, given)
    if transformer_impl is not None:
        overrides["transformer-impl"] = transformer_impl
    overrides = {key: value for key, value in overrides.items() if key not in given}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    overrides |= _layout(values | overrides, world) | _step(values, tokens, microbatches)
    overrides = {key: value for key, value in (overrides | NO_RUN).items() if key not in given}
    settings.megatron = values | overrides
    _batch(settings.megatron, world, microbatches, given)
    shown = {
        key: value
        for key, value in overrides.items()
        if (values.get(key) or value) and values.get(key) != value
        if not (key.endswith("parallel-size") and value == 1 and key not in values)
        if key not in NO_RUN
    }
    return Slice(
        settings,
        layers or full,
        full,
        settings.megatron["micro-batch-size"] * settings.megatron["seq-length"] * microbatches,
        microbatches,
        shown,
    )


#: Option -> the setting that it stands for.
_OPTIONS = {
    "layers": "num-layers",
    "tokens": "micro-batch-size",
    "transformer-impl": "transformer-impl",
}


def _check_given(given: set[str], options: set[str]) -> None:
    """Refuse ``--set`` of what one of ``options`` says as well, or of what the bench cannot run."""
    for option, key in _OPTIONS.items():
        if option in options and key in given:
            raise UserError(f"--{option} and --set {key} say the same thing twice.")
    for key in sorted(given & {"fp16", "bf16", "fp8-format", "fp8-recipe"}):
        raise UserError(f"--set {key}: --precision says what a column runs in.")
    if "check-for-nan-in-loss-and-grad" in given:
        raise UserError("--set check-for-nan-in-loss-and-grad: the trainer's loop checks them.")


def _whole(values: Mapping[str, Any], key: str) -> int:
    """A number of something; 0 where there is none."""
    value = values.get(key) or 0
    if type(value) is not int or value < 0:
        raise UserError(f"{key} must be a whole number, not {value!r}.")
    return value


def _fewer_layers(
    values: Mapping[str, Any], layers: int, full: int, given: set[str]
) -> dict[str, Any]:
    if not 1 <= layers <= full:
        raise UserError(f"--layers must be from 1 to {full}, not {layers}.")
    if values.get("hybrid-layer-pattern"):
        raise UserError("--layers: a hybrid stack is what its hybrid-layer-pattern says; --set it.")
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
    listed = isinstance(frequency, str) and "[" in frequency and "moe-layer-freq" not in given
    if values.get("num-experts") is not None and listed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that Megatron does not find
            from megatron.training.arguments import moe_freq_type

        try:
            pattern = moe_freq_type(frequency)
        except Exception as error:  # what Python's parser finds
            raise UserError(f"moe-layer-freq: {frequency!r} is no pattern.") from error
        dense = len(pattern) - sum(pattern)
        kept = min(layers - 1, max(1, round(dense * layers / len(pattern)))) if dense else 0
        changed["moe-layer-freq"] = f"([0]*{kept}+[1]*{layers - kept})"
    return changed


def _layout(values: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The configuration's parallel sizes as far as ``world`` GPUs hold them."""
    tensor = math.gcd(world, _whole(values, "tensor-model-parallel-size") or 1)
    context = math.gcd(world // tensor, _whole(values, "context-parallel-size") or 1)
    pipeline = _whole(values, "pipeline-model-parallel-size") or 1
    if world % (pipeline * tensor * context):
        raise UserError(
            f"pipeline-model-parallel-size {pipeline} does not fit {world} GPUs; --layers takes a "
            "slice of one stage."
        )
    experts_tensor = _whole(values, "expert-tensor-parallel-size")
    a_stage = world // pipeline
    if experts_tensor:
        experts_tensor = math.gcd(a_stage, experts_tensor)
    expert = math.gcd(
        a_stage // (experts_tensor or tensor), _whole(values, "expert-model-parallel-size") or 1
    )
    changed: dict[str, Any] = {
        "tensor-model-parallel-size": tensor,
        "context-parallel-size": context,
        "overlap-param-gather": False,
    }
    if tensor == 1:
        changed["sequence-parallel"] = False
    if values.get("num-experts") is not None:
        changed["expert-model-parallel-size"] = expert
        if experts_tensor:
            changed["expert-tensor-parallel-size"] = experts_tensor
    if world == tensor * context * pipeline:
        changed["overlap-grad-reduce"] = False
    return changed


def _step(values: Mapping[str, Any], tokens: int | None, microbatches: int) -> dict[str, Any]:
    sequence = _whole(values, "seq-length")
    if not sequence:
        raise UserError("the configuration has no seq-length.")
    micro = _whole(values, "micro-batch-size") or 1
    if tokens is not None:
        micro, rest = divmod(tokens, sequence * microbatches)
        if rest or micro < 1:
            raise UserError(
                f"--tokens must be a multiple of seq-length x microbatches = "
                f"{sequence} x {microbatches}, not {tokens}."
            )
    return {"micro-batch-size": micro}


def _batch(values: dict[str, Any], world: int, microbatches: int, given: set[str]) -> None:
    """Set the batch of a step, by which ``mhc.recompute: auto`` counts what is in flight."""
    model = math.prod(
        _whole(values, f"{kind}-parallel-size") or 1
        for kind in ("tensor-model", "pipeline-model", "context")
    )
    ranks = max(1, world // model)
    step = values["micro-batch-size"] * microbatches * ranks
    if "global-batch-size" in given and values["global-batch-size"] != step:
        raise UserError(
            f"--set global-batch-size: a step has {step} sequences here, {microbatches} x "
            f"{values['micro-batch-size']} on {ranks} data-parallel ranks; --microbatches and "
            "--tokens change that."
        )
    values["global-batch-size"] = step


#: A bench reads no data, leaves no checkpoint, has no schedule and reaches no end of training.
NO_RUN: dict[str, Any] = {
    "mock-data": True,
    **dict.fromkeys(("data-path", "train-data-path", "valid-data-path", "test-data-path", "split")),
    **dict.fromkeys(("load", "save", "save-interval", "tensorboard-dir", "wandb-project")),
    **dict.fromkeys(("train-samples", "lr-warmup-samples", "lr-decay-samples")),
    **dict.fromkeys(("lr-warmup-iters", "lr-warmup-fraction", "lr-decay-iters")),
    **dict.fromkeys(("lr-wsd-decay-iters", "lr-wsd-decay-samples", "rampup-batch-size")),
    "lr-decay-style": "constant",
    "train-iters": 1000,
    "log-throughput": None,
    # Once a step it reads all gradients and waits for the GPU; a step of many microbatches hides
    # that, one of few does not.
    "check-for-nan-in-loss-and-grad": False,
}
