"""Plans that move hyper-connections between layouts (``connections``)."""

from __future__ import annotations

import json
import math
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
    output_of,
    settings,
    spelled,
    streams_of,
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

    A mean exit becomes the head that computes the mean: V4 always has a head.
    """
    source, mhc = mhc_source(path)
    layout, args = LAYOUTS[names], source.args
    found = found_in(source)
    learned = check_layout(str(source.path), found, OURS, args.num_layers, args.hidden_size, mhc.n)
    outputs = [
        output_of(target, target.name.format(l=target.layer))
        for target in convert_layout(found, OURS, layout, args.num_layers, mhc.n, learned)
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
    deeper = [k for k in tensor_names(layout, args.num_layers + 1) if k in infos][
        6 * args.num_layers :
    ]
    if deeper:
        raise UserError(name_errors(str(path), [], deeper, tensor_names(layout, args.num_layers)))
    learned = check_layout(str(path), found, layout, args.num_layers, args.hidden_size, n)
    stacked, layers = stacked_layers(source) > 0, args.num_layers
    outputs = [
        _renumbered(output, "1:")
        for output in mirror(source, skip="optimizer.")
        if not _is_hc(output.key)
    ]
    for target in convert_layout(found, layout, OURS, layers, n, learned):
        outputs.append(_placed(target, layers, stacked, torch.float32))
    mhc = settings(layout, n, learned, args, **_v4_config(Path(path)))
    plan = torch_dist_plan(source, outputs, mhc, release=True)
    plan.sources = [Path(path), source.path]
    return plan


def _first(layout: Layout) -> str:
    return layout.layer.format(l=0) + layout.attn + layout.phi


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
    import dataclasses

    regions = tuple(dataclasses.replace(r, key=number + r.key) for r in output.recipe.inputs)
    return dataclasses.replace(output, recipe=dataclasses.replace(output.recipe, inputs=regions))


def _placed(target, layers: int, stacked: bool, dtype=None, prefix: str = "") -> Output:
    if target.layer is None:
        return output_of(target, prefix + target.name, dtype=dtype)
    key, at, size = place(prefix + target.name, target.layer, target.shape, layers, stacked)
    box = (1, *target.shape) if stacked else target.shape
    return output_of(target, key, at, size, box, dtype)


# ---------------------------------------------------------------------------------- Megatron-LM's


def megatron_plan(path: Path, layout_name: str, *, export: bool) -> Plan:
    """A torch_dist checkpoint with the connections renamed, optimizer state included."""
    layout = LAYOUTS[layout_name]
    from_, to = (OURS, layout) if export else (layout, OURS)
    source = mhc_source(path)[0] if export else TorchDistSource(path)
    args, names = source.args, _hc_pattern(from_)
    found = found_in(source)
    first = found.get(_first(from_))
    if first is None:
        raise UserError(
            f"{source.path} has no tensors in the layout {layout_name} ({_first(from_)})."
        )
    n = streams_of(str(source.path), first.info, args.hidden_size)
    learned = check_layout(str(source.path), found, from_, args.num_layers, args.hidden_size, n)
    if export and layout_name == "megatron-dev" and learned:
        raise UserError(
            "megatron-dev leaves the streams by their mean; a learned exit has no place in it."
        )
    stacked, layers = stacked_layers(source) > 0, args.num_layers
    outputs = [output for output in mirror(source) if not names(output.key)]
    for prefix in ["", *optimizer_prefixes(source)]:
        there = found_in(source, prefix)
        for target in convert_layout(there, from_, to, layers, n, learned):
            outputs.append(_placed(target, layers, stacked, None, prefix))
    if export:
        mhc = mhc_source(path)[1]
        for name, value in megatron_settings(mhc).items():
            setattr(args, name, value)
        return torch_dist_plan(source, outputs, groups=drop_groups)
    mhc = settings(layout, n, learned, args, **_iterations(args))
    return torch_dist_plan(source, outputs, mhc, groups=lambda state: add_groups(state, mhc))


def megatron_settings(mhc: MHCConfig) -> dict[str, Any]:
    """The arguments of Megatron-LM's branches that go with their layout."""
    return {
        "enable_hyper_connections": True,
        "num_residual_streams": mhc.n,
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
