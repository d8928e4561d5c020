"""Plans that move hyper-connections between layouts (``connections``)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhc_megatron.checkpoint.connections import (
    EXIT,
    LAYOUTS,
    OURS,
    Found,
    Layout,
    check_layout,
    connection_names,
    convert_layout,
    is_hybrid,
    ours,
    output_of,
    settings,
    spelled,
    streams_of,
    sublayers,
    tensor_names,
)
from mhc_megatron.checkpoint.convert import Plan
from mhc_megatron.checkpoint.huggingface import name_errors
from mhc_megatron.checkpoint.recipes import Output, Recipe, Region
from mhc_megatron.checkpoint.safetensors_io import SafetensorsSource
from mhc_megatron.checkpoint.torch_dist import TorchDistSource, place, stacked_layers, unstack
from mhc_megatron.checkpoint.upcycle import (
    add_groups,
    drop_groups,
    mirror,
    optimizer_prefixes,
    torch_dist_plan,
)
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError


def found_in(source: TorchDistSource, prefix: str = "", number: str = "") -> dict[str, Found]:
    """Module names below ``prefix`` (of optimizer state) with their places."""
    found = {}
    for key, info in source.infos().items():
        if not key.startswith(prefix) or (not prefix and key.startswith("optimizer.")):
            continue
        for name, region in unstack(key.removeprefix(prefix), info.shape):
            shape = (region.size or info.shape)[region.squeeze :]
            at = Region(number + prefix + region.key, region.offset, region.size, region.squeeze)
            found[name] = Found(at, type(info)(tuple(shape), info.dtype))
    return found


# ------------------------------------------------------------------------------- DeepSeek-V4's


def export_deepseek_plan(path: Path, names: str = "deepseek-v4") -> Plan:
    """Connections of an mHC checkpoint -> safetensors in DeepSeek-V4's layout.

    A mean exit becomes the head that computes the mean: V4 always has a head. Connections within
    layers of multi-token prediction stay behind: V4's carry n streams into theirs.
    """
    source, mhc = mhc_source(path)
    layout, args = LAYOUTS[names], source.args
    found = found_in(source)
    _refuse_hybrid(source)
    learned = check_layout(str(source.path), found, OURS, args, mhc.n)
    outputs = [
        output_of(target, target.name.format(l=target.layer))
        for target in convert_layout(found, OURS, layout, args, mhc.n, learned)
    ]
    if not learned:
        n, width = mhc.n, mhc.n * args.hidden_size
        head = (
            Recipe("zeros", (), {"shape": [n, width]}),
            Recipe("values", (), {"data": [mhc.alpha]}),
            Recipe("values", (), {"data": [-math.log(n - 1)] * n}),
        )
        shapes = ((n, width), (1,), (n,))
        for name, shape, recipe in zip(layout.head, shapes, head, strict=True):
            outputs.append(Output(name, shape, torch.float32, recipe))
    config = {
        "hc_mult": mhc.n,
        "hc_sinkhorn_iters": mhc.sinkhorn_iterations,
        "hc_eps": 1e-6,
        "rms_norm_eps": mhc.norm_eps,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
    }
    return Plan(
        "safetensors", [source.path], outputs, texts={"config.json": json.dumps(config, indent=2)}
    )


def _refuse_hybrid(source: TorchDistSource) -> None:
    if is_hybrid(source.args):
        raise UserError(f"{source.path} is a hybrid model; DeepSeek-V4's layout has none.")


def mhc_source(path: Path) -> tuple[TorchDistSource, MHCConfig]:
    """An mHC checkpoint of this project and its settings.

    Raises:
        UserError: a residual one, or a variant without Sinkhorn.
    """
    source = TorchDistSource(path)
    mhc = MHCConfig.from_mapping(getattr(source.args, "mhc", None) or {"variant": "none"})
    if not mhc.enabled or not connection_names(source):
        raise UserError(f"{source.path} is a residual checkpoint; it has no hyper-connections.")
    if mhc.variant != "mhc":
        raise UserError(f"only variant mhc has a counterpart in other layouts, not {mhc.variant}.")
    return source, mhc


def import_deepseek_plan(path: Path, base: Path) -> Plan:
    """DeepSeek-V4's connections, laid over a Megatron checkpoint of the same depth and width.

    Everything else of ``base`` stays; its own connections and its optimizer state, which belong to
    other values, do not. V4's attention has no counterpart in Megatron-Core 0.19.2.
    """
    given, source = SafetensorsSource(path), TorchDistSource(base)
    args = source.args
    _refuse_hybrid(source)
    _refuse_predictions(source)
    layout = LAYOUTS["deepseek-v4"]
    infos = {spelled(name): info for name, info in given.infos().items()}
    places = {spelled(name): name for name in given.infos()}
    if not any(name.endswith(layout.attn + layout.phi) for name in infos):
        raise UserError(f"{path} has no tensors in DeepSeek-V4's layout ({_first(layout)}).")
    found = {name: Found(Region(f"0:{places[name]}"), info) for name, info in infos.items()}
    phi = infos.get(_first(layout))
    if phi is None:
        raise UserError(f"{path}: {_first(layout)} is missing.")
    n = streams_of(str(path), phi, args.hidden_size)
    known = tensor_names(layout, sublayers(args))
    deeper = [(args.num_layers, kind) for kind in ("attn", "mlp")]
    unknown = [name for name in tensor_names(layout, deeper) if name in infos]
    if unknown:
        raise UserError(name_errors(str(path), [], unknown, known))
    learned = check_layout(str(path), found, layout, args, n)
    stacked, layers = stacked_layers(source) > 0, args.num_layers
    outputs = [
        _renumbered(output, "1:")
        for output in mirror(source, skip="optimizer.")
        if not _is_hc(output.key)
    ]
    for target in convert_layout(found, layout, OURS, args, n, learned):
        outputs.append(_placed(target, layers, stacked, torch.float32))
    mhc = settings(layout, n, learned, args, **_v4_config(Path(path)))
    plan = torch_dist_plan(source, outputs, mhc, release=True)
    plan.sources = [Path(path), source.path]
    return plan


def _first(layout: Layout, kind: str = "attn") -> str:
    return layout.layer.format(l=0) + layout.module(kind) + layout.phi


def _v4_config(path: Path) -> dict:
    file = path / "config.json"
    if not file.exists():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    known = {"rms_norm_eps": "norm_eps", "hc_sinkhorn_iters": "sinkhorn_iterations"}
    if config.get("hc_eps", 1e-6) != 1e-6:
        raise UserError(f"{file}: hc_eps {config['hc_eps']} is not supported; only 1e-6 is.")
    return {ours: config[key] for key, ours in known.items() if key in config}


def _is_hc(key: str) -> bool:
    return ".attn_hc." in key or ".mlp_hc." in key or key in EXIT


def _renumbered(output: Output, number: str) -> Output:
    regions = tuple(dataclasses.replace(r, key=number + r.key) for r in output.recipe.inputs)
    return dataclasses.replace(output, recipe=dataclasses.replace(output.recipe, inputs=regions))


def _placed(target, layers: int, stacked: bool, dtype=None, prefix: str = "") -> Output:
    if target.layer is None:
        return output_of(target, prefix + target.name, dtype=dtype)
    key, at, size = place(prefix + target.name, target.layer, target.shape, layers, stacked)
    box = (1, *target.shape) if stacked else target.shape
    return output_of(target, key, at, size, box, dtype)


# ---------------------------------------------------------------------------------- Megatron-LM's


def megatron_plan(path: Path, branch: str, *, export: bool) -> Plan:
    """A torch_dist checkpoint with the connections renamed, optimizer state included.

    ``branch`` is ``main`` or ``dev`` (``connections``); a hybrid model has names of its own.
    """
    source = mhc_source(path)[0] if export else TorchDistSource(path)
    args = source.args
    layout = megatron_layout(source, branch)
    from_, to = (ours(args), layout) if export else (layout, ours(args))
    found = found_in(source)
    first = found.get(_first(from_, sublayers(args)[0][1]))
    if first is None:
        raise UserError(
            f"{source.path} has no tensors in the layout megatron-{branch} "
            f"({_first(from_, sublayers(args)[0][1])})."
        )
    _refuse_predictions(source)
    _refuse_variants(source)
    n = streams_of(str(source.path), first.info, args.hidden_size)
    learned = check_layout(str(source.path), found, from_, args, n)
    if export and branch == "dev" and learned:
        raise UserError(
            "megatron-dev leaves the streams by their mean; a learned exit has no place in it."
        )
    check_rest(source, found, from_)
    stacked, layers = stacked_layers(source) > 0, args.num_layers
    names, move = _hc_pattern(from_), _mover(from_, to)
    outputs = [
        dataclasses.replace(output, key=move(output.key))
        for output in mirror(source)
        if not names(output.key)
    ]
    for prefix in ["", *optimizer_prefixes(source)]:
        there = found_in(source, prefix)
        for target in convert_layout(there, from_, to, args, n, learned):
            outputs.append(_placed(target, layers, stacked, None, prefix))
    if export:
        mhc = mhc_source(path)[1]
        for name, value in megatron_settings(mhc).items():
            setattr(args, name, value)
        return torch_dist_plan(source, outputs, groups=drop_groups, rename=move)
    mhc = settings(layout, n, learned, args, **_iterations(args))
    return torch_dist_plan(
        source, outputs, mhc, groups=lambda state: add_groups(state, mhc), rename=move
    )


def megatron_layout(source: TorchDistSource, branch: str) -> Layout:
    """The names of a branch of Megatron-LM for this model.

    Raises:
        UserError: a hybrid model of a branch that has none.
    """
    if not is_hybrid(source.args):
        return LAYOUTS[f"megatron-{branch}"]
    if branch != "main":
        raise UserError(f"{source.path} is a hybrid model; give --layout main.")
    return LAYOUTS["megatron-hybrid"]


def _mover(from_: Layout, to: Layout) -> Callable[[str], str]:
    """Names of a hybrid stack's own tensors: with ``inner_layer`` there, without it here."""

    def move(key: str) -> str:
        match = re.search(r"(?:^|\.)decoder\.layers\.\d+\.", key)
        if from_.inner == to.inner or match is None:
            return key
        head, tail = key[: match.end()], key[match.end() :]
        return head + to.inner + tail.removeprefix(from_.inner)

    return move


def _refuse_predictions(source: TorchDistSource) -> None:
    """Layers of multi-token prediction carry n streams elsewhere, and have other projections.

    Raises:
        UserError: there are some.
    """
    if any(key.startswith("mtp.") for key in source.infos()):
        raise UserError(
            f"{source.path} has layers of multi-token prediction; with hyper-connections they have "
            "no counterpart in other implementations (e_proj and h_proj for each stream)."
        )


#: Settings of Megatron-LM that make its connections others, with the values that do not.
_VARIANTS: dict[str, tuple[Any, ...]] = {
    "mhc_single_pass": (None, False),
    "mhc_connection_variant": (None, "mhc"),
    "mhc_variant": (None, "mhc"),
}


def _refuse_variants(source: TorchDistSource) -> None:
    for name, known in _VARIANTS.items():
        value = getattr(source.args, name, None)
        if value not in known:
            raise UserError(f"{source.path}: {name}: {value} has no counterpart here.")


def check_rest(source: TorchDistSource, found: dict[str, Found], layout: Layout) -> None:
    """Nothing else is in a connection: it would be lost without a word.

    Raises:
        UserError: naming the tensors.
    """
    known = tensor_names(layout, sublayers(source.args))
    inside = [name for name in found if _hc_pattern(layout)(name)]
    unknown = set(inside) - set(known) - set(layout.head)
    unknown = sorted(name for name in unknown if not name.endswith(layout.ignored or ("\0",)))
    if unknown:
        raise UserError(name_errors(str(source.path), [], unknown, known))


def megatron_settings(mhc: MHCConfig) -> dict[str, Any]:
    """The arguments of Megatron-LM's branches that go with their layout."""
    return {
        "enable_hyper_connections": True,
        "enable_mhc_connections": True,  # its later name
        "num_residual_streams": mhc.n,
        "mhc_num_residual_streams": mhc.n,
        "mhc_sinkhorn_iterations": mhc.sinkhorn_iterations,
        "mhc_init_gating_factor": mhc.alpha,
    }


def _iterations(args) -> dict:
    count = getattr(args, "mhc_sinkhorn_iterations", None)
    return {"sinkhorn_iterations": count} if count else {}


def _hc_pattern(layout: Layout):
    def matches(key: str) -> bool:
        inside = any(f".{module}." in key for module in (layout.attn, layout.mlp))
        return inside or any(key.endswith(name) for name in layout.head)

    return matches
