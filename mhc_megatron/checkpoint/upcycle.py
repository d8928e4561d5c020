"""A residual checkpoint -> an mHC checkpoint that computes the same function.

With phi = 0 the coefficients are constants. n equal streams stay equal under any H_res whose rows
sum to one; with sum_i H_pre_i = 1 a sublayer reads what it read before, with H_post = 1 it adds
what it added before, and the mean of the streams (or the learned exit at its start, 1/n each) is
the residual stream. So ``bias`` alone decides, and the logits are the residual model's up to the
rounding of the sums over n.

Equal streams with equal weights would also get equal gradients, for ever. ``symmetry`` breaks that
without touching the function: ``rotate`` (the default) lets sublayer l read half of its input from
stream l mod n and 1 / (2 (n - 1)) from each other one, and leans H_res towards the identity
(``identity_bias`` on the diagonal: .95 at 4). A stream's gradient then depends on who reads it, so
H_post, and with it the streams, part at the first step. ``none`` is the symmetric point
(H_pre = 1/n: b_pre = -ln(n - 1), -ln 3 for n = 4; H_res = 1/n throughout).

A layer of multi-token prediction is a stack of its own: n equal streams enter and leave within it.

Optimizer state: the moments of every old parameter go along; the new ones start with zero moments
at the old step count, which makes their first updates small (Adam's bias correction is over:
(1 - beta1) / sqrt(1 - beta2) of the learning rate at most).
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from mhc_megatron.checkpoint import torch_dist
from mhc_megatron.checkpoint.connections import (
    OURS,
    connection_names,
    exit_names,
    ours,
    prediction_stack,
    prediction_sublayers,
    sublayers,
)
from mhc_megatron.checkpoint.convert import Plan
from mhc_megatron.checkpoint.recipes import Output, Recipe, Region
from mhc_megatron.checkpoint.torch_dist import TorchDistSource, archive, place
from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import initial_bias
from mhc_megatron.errors import UserError

SYMMETRIES = ("rotate", "none")


def upcycled_bias(mhc: MHCConfig, index: int, symmetry: str) -> torch.Tensor:
    """b [K] of sublayer ``index``, float32: sum of H_pre 1, H_post 1."""
    n = mhc.n
    read = torch.full((n,), 1 / n, dtype=torch.float64)
    if symmetry == "rotate":
        read[:] = 1 / (2 * (n - 1))
        read[index % n] = 0.5
    if mhc.variant == "hc":  # no sigmoid: b is the matrix
        return torch.cat([read, torch.ones(n), torch.eye(n).flatten()]).float()
    # n = 2: sigmoid^-1(1/2) twice; rotate and none are then the same point.
    pre = torch.log(read / (1 - read))
    kind = "identity" if symmetry == "rotate" else "paper"
    chosen = MHCConfig.from_mapping({**mhc.to_mapping(), "init": kind})
    return torch.cat([pre.float(), torch.zeros(n), initial_bias(chosen, index)[2 * n :]])


def upcycle_plan(
    path: Path, mhc: MHCConfig, *, symmetry: str = "rotate", drop_optimizer: bool = False
) -> Plan:
    """The plan of ``upcycle``.

    Raises:
        UserError: not a residual checkpoint, or its optimizer state cannot be carried.
    """
    source = TorchDistSource(path)
    args = source.args
    _check(source, args, mhc)
    moments = optimizer_prefixes(source)
    if not drop_optimizer:
        check_optimizer(source, moments)
    release = drop_optimizer or source.path.name == "release"
    outputs = mirror(source, skip="optimizer." if drop_optimizer else None)
    for prefix in ["", *([] if drop_optimizer else moments)]:
        zero = prefix not in ("", *(p for p in moments if "param" in p))
        outputs += new_tensors(source, args, mhc, symmetry, prefix, zero)
    return torch_dist_plan(
        source, outputs, mhc, release=release, groups=lambda state: add_groups(state, mhc)
    )


def _check(source: TorchDistSource, args: Namespace, mhc: MHCConfig) -> None:
    was = MHCConfig.from_mapping(getattr(args, "mhc", None) or {"variant": "none"})
    if was.enabled or connection_names(source):
        raise UserError(
            f"{source.path} is an mHC checkpoint already; upcycle takes residual models."
        )
    if not mhc.enabled:
        raise UserError("upcycle needs an mHC variant with n > 1 (variant, n).")
    if not hasattr(args, "num_layers") or not hasattr(args, "hidden_size"):
        raise UserError(f"{source.path} does not hold the settings of its model (args).")
    if getattr(args, "apply_residual_connection_post_layernorm", False):
        raise UserError(
            "upcycle takes pre-norm models (no apply-residual-connection-post-layernorm)."
        )


def optimizer_prefixes(source: TorchDistSource) -> list[str]:
    """``optimizer.state.exp_avg.`` and so on: what precedes a parameter's name."""
    # The word embedding alone is in every kind of model under one name.
    name = "embedding.word_embeddings.weight"
    return sorted(key.removesuffix(name) for key in source.tensors if key.endswith("." + name))


def check_optimizer(source: TorchDistSource, moments: list[str]) -> None:
    """Optimizer state must be stored by parameter.

    Raises:
        UserError: it is stored in the distributed optimizer's buckets.
    """
    bucketed = any("optimizer" in key for key in (*source.tensors, *source.objects))
    if bucketed and not moments:
        raise UserError(
            f"the optimizer state of {source.path} is stored in buckets, not by parameter: save it "
            "with dist-ckpt-optim-fully-reshardable, or leave it out with --drop-optimizer."
        )


def mirror(source: TorchDistSource, skip: str | None = None) -> list[Output]:
    """Every stored chunk as it is."""
    return [
        Output(key, size, info.dtype, Recipe("copy", (Region(key, at, size),)), at, info.shape)
        for key, info in source.infos().items()
        if skip is None or not key.startswith(skip)
        for at, size in source.chunks(key)
    ]


def new_tensors(
    source: TorchDistSource,
    args: Namespace,
    mhc: MHCConfig,
    symmetry: str,
    prefix: str = "",
    zero: bool = False,
) -> list[Output]:
    """The connections' tensors, float32; ``zero``: zeros of the same shapes (moments)."""
    layers, n, C = args.num_layers, mhc.n, args.hidden_size
    stacked = torch_dist.stacked_layers(source) > 0
    outputs, decoder = [], sublayers(args)
    places = [(OURS.layer, layer, kind) for layer, kind in decoder]
    for prediction in prediction_sublayers(args):
        places += [(before, 0, kind) for before, kind in prediction]
    for index, (before, layer, kind) in enumerate(places):
        data = {
            OURS.phi: (mhc.K, n * C),
            OURS.alpha[0]: [mhc.alpha] * mhc.alphas,
            OURS.bias: upcycled_bias(mhc, index, symmetry).tolist(),
        }
        in_stack = stacked and before == OURS.layer
        for suffix, value in data.items():
            recipe, shape = _constant(value, zero)
            name = f"{prefix}{before}{OURS.module(kind)}{suffix}"
            key, at, size = place(name, layer, shape, layers, in_stack)
            box = (1, *shape) if in_stack else shape
            outputs.append(Output(key, box, torch.float32, recipe, at, size))
    if mhc.exit == "learned":
        values = ((n, n * C), [mhc.alpha], [-math.log(n - 1)] * n)
        depths = range(len(prediction_sublayers(args)))
        heads = [ours(args).head, *(exit_names(prediction_stack(args, d)) for d in depths)]
        for names in heads:
            for name, value in zip(names, values, strict=True):
                recipe, shape = _constant(value, zero)
                outputs.append(Output(prefix + name, shape, torch.float32, recipe))
    return outputs


def _constant(value: tuple[int, ...] | list[float], zero: bool) -> tuple[Recipe, tuple[int, ...]]:
    """A tuple is the shape of zeros, a list the values of a vector."""
    shape = value if isinstance(value, tuple) else (len(value),)
    if zero or isinstance(value, tuple):
        return Recipe("zeros", (), {"shape": list(shape)}), shape
    return Recipe("values", (), {"data": value}), shape


def add_groups(optimizer: Any, mhc: MHCConfig) -> None:
    """Add the connections' parameter groups to an optimizer's stored state, in place.

    Megatron pairs stored groups with a run's by their number and settings (core/optimizer/
    optimizer.py:594); ``mhc_megatron.optimizer`` says which the connections have. Lists of groups
    may lie in the state of a chained optimizer, one for each of its parts.
    """
    for groups in _group_lists(optimizer):
        dense = [group for group in groups if not group.get("is_expert_parallel")]
        if not dense:
            continue
        first = next((g for g in dense if g.get("wd_mult", 1.0) == 1.0), dense[0])
        for decay in sorted({float(mhc.phi_weight_decay), 0.0}):
            groups.append(_group(first, mhc.lr_mult, decay))


def _group(first: dict[str, Any], lr_mult: float, decay: float) -> dict[str, Any]:
    group = {**copy.deepcopy(first), "wd_mult": decay, "default_config": False}
    group["is_decoupled_lr"] = True  # what sets the group apart
    group["weight_decay"] = first.get("weight_decay", 0.0) * decay
    for name in ("lr", "max_lr", "min_lr"):
        if group.get(name) is not None:
            group[name] = group[name] * lr_mult
    return group


def drop_groups(optimizer: Any) -> None:
    """The inverse of ``add_groups``: one group for each of the model's decays and rates."""
    for groups in _group_lists(optimizer):
        seen, kept = set(), []
        for group in groups:
            told_apart = ("wd_mult", "is_expert_parallel", "max_lr", "min_lr")  # --decoupled-lr's
            key = tuple(group.get(name) or 0 for name in told_apart)
            if not group.get("is_decoupled_lr") and key not in seen:
                seen.add(key)
                kept.append(group)
        groups[:] = kept


def _group_lists(state: Any) -> list[list[dict[str, Any]]]:
    if not isinstance(state, dict):
        return []
    found = [value for key, value in state.items() if key == "param_groups"]
    return found + [x for value in state.values() for x in _group_lists(value)]


def torch_dist_plan(
    source: TorchDistSource,
    outputs: list[Output],
    mhc: MHCConfig | None = None,
    *,
    release: bool | None = None,
    objects: dict[str, bytes] | None = None,
    groups: Callable[[Any], None] | None = None,
    rename: Callable[[str], str] = lambda key: key,
) -> Plan:
    """The plan of a checkpoint like the source's with other tensors and, with ``mhc``, settings.

    ``release``: without iteration, optimizer and random state, as a start of another run.
    ``groups`` changes the optimizer's stored parameter groups, ``rename`` the objects' names.
    """
    common = copy.deepcopy(source.common)
    release = source.path.name == "release" if release is None else release
    kept = {rename(key): source.object_bytes(key) for key in source.objects}
    if release and source.path.name != "release":
        kept = {key: data for key, data in kept.items() if "_extra_state" in key}
        names = ("args", "checkpoint_version", "content_metadata")
        common = {name: common[name] for name in names if name in common}
        common |= {"iteration": 0, "num_floating_point_operations_so_far": 0.0}
    if mhc is not None:
        common["args"].mhc = mhc.to_mapping()
    if groups is not None:
        groups(common.get("optimizer"))
    kept |= objects or {}
    kept[torch_dist.COMMON] = archive(common)
    folder = "release" if release else source.path.name
    name = folder if release else str(common.get("iteration", 0))
    if not release:
        folder = f"iter_{int(name):07d}"
    return Plan(
        "torch_dist",
        [source.path],
        outputs,
        folder,
        kept,
        {torch_dist.TRACKER: name, **_texts(source.path, mhc)},
    )


def _texts(folder: Path, mhc: MHCConfig | None) -> dict[str, str]:
    """model.yaml and the tokenizer's files of an imported checkpoint, the ``mhc`` part renewed."""
    root, texts = folder.parent, {}
    if (root / "hf").is_dir():
        for path in sorted((root / "hf").iterdir()):
            texts[f"hf/{path.name}"] = path.read_text(encoding="utf-8")
    if (root / "model.yaml").exists():
        text = (root / "model.yaml").read_text(encoding="utf-8")
        if mhc is not None:
            head, values = text.splitlines()[0], yaml.safe_load(text)
            values["mhc"] = mhc.to_mapping()
            text = f"{head}\n{yaml.safe_dump(values, sort_keys=False)}"
        texts["model.yaml"] = text
    return texts
