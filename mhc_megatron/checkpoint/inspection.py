"""Look at checkpoints: what is in one, how two differ, whether one is whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_kernels import reference
from mhc_megatron.checkpoint import torch_dist
from mhc_megatron.checkpoint.connections import (
    LAYOUTS,
    OURS,
    exit_names,
    ours,
    prediction_stack,
    prediction_sublayers,
    sublayers,
)
from mhc_megatron.checkpoint.convert import CHECKSUMS, checksum_text, file_sha256, open_source
from mhc_megatron.checkpoint.layouts import found_in
from mhc_megatron.checkpoint.recipes import Region, Source, TensorInfo
from mhc_megatron.checkpoint.torch_dist import TorchDistSource
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Two layouts whose names are the same.
BOTH = "megatron-main or megatron-dev"
#: What ``layout_of`` says of connections in another layout than ours.
LAYOUT_NAMES = {*LAYOUTS, BOTH}
#: Elements that are looked at together.
BLOCK = 1 << 24


# ---------------------------------------------------------------------------------------- inspect


def inspect(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, as plain data."""
    source = open_source(path)
    infos = source.infos()
    model = {k: v for k, v in infos.items() if not k.startswith("optimizer.")}
    about = {
        "path": str(source.path),
        "format": "torch_dist" if isinstance(source, TorchDistSource) else "safetensors",
        "layout": layout_of(source),
        "tensors": len(model),
        "parameters": sum(math.prod(v.shape) for v in model.values()),
        "bytes": sum(v.nbytes for v in infos.values()),
        "dtypes": dict(Counter(str(v.dtype).removeprefix("torch.") for v in model.values())),
        "optimizer tensors": len(infos) - len(model),
        "shapes": {
            k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.items()
        },
    }
    if isinstance(source, TorchDistSource):
        about["iteration"] = source.common.get("iteration")
        about["mhc"] = getattr(source.args, "mhc", None)
        about["connections"] = connection_statistics(source)
    return about


def layout_of(source: Source) -> str:
    """``residual``, ``mhc`` (ours) or the name of another layout of connections."""
    names = set(source.infos())
    modules = set(found_in(source)) if isinstance(source, TorchDistSource) else names
    for name, layout in {"mhc": OURS, **LAYOUTS}.items():
        firsts = {layout.layer.format(l=0) + layout.module(k) + layout.phi for k in ("attn", "mlp")}
        if firsts & modules:
            return BOTH if name in ("megatron-main", "megatron-dev") else name
    return "residual"


def connection_statistics(source: TorchDistSource) -> list[dict[str, Any]]:
    """One record for each sublayer: what its connection does where the input contributes nothing.

    With v phi = 0 the coefficients are those of the bias: ``gain`` is the largest |row sum| of
    H_res (forward) and ``gain_backward`` the largest |column sum|; ``from identity`` is
    ||H_res - I||_F over ||I||_F. ``composite`` gains are those of the product so far. ``phi`` is
    its root mean square. Empty for residual models and other layouts.
    """
    mhc = MHCConfig.from_mapping(getattr(source.args, "mhc", None) or {"variant": "none"})
    if not mhc.enabled or layout_of(source) in LAYOUT_NAMES:
        return []
    found, records = found_in(source), []
    product = torch.eye(mhc.n, dtype=torch.float64)
    for layer, kind in sublayers(source.args):
        prefix = OURS.layer.format(l=layer) + OURS.module(kind)
        if prefix + OURS.phi not in found:
            raise UserError(f"{source.path}: {prefix}{OURS.phi} is missing.")
        phi, alpha, bias = (
            _read(source, found[prefix + suffix].region).double()
            for suffix in (OURS.phi, OURS.alpha[0], OURS.bias)
        )
        H_pre, H_post, H_res = static_coefficients(bias, alpha, mhc)
        product = H_res @ product
        records.append(_statistics(f"{layer}.{kind}", phi, alpha, H_pre, H_post, H_res))
        records[-1]["composite"] = _gains(product)
    return records


def _read(source: Source, region: Region) -> Tensor:
    value = source.read(region)
    return value.reshape(value.shape[region.squeeze :])


def static_coefficients(
    bias: Tensor, alpha: Tensor, mhc: MHCConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post, H_res of a connection at v phi = 0."""
    H_pre, H_post, H_res = reference.coefficients(
        torch.zeros(mhc.n, 1, dtype=bias.dtype),
        torch.zeros(mhc.K, mhc.n, dtype=bias.dtype),
        alpha,
        bias,
        variant=mhc.variant,
        iterations=mhc.sinkhorn_iterations,
        eps=max(mhc.norm_eps, 1e-20),
        sinkhorn_kind=mhc.sinkhorn,
    )
    return H_pre, H_post, torch.eye(mhc.n, dtype=bias.dtype) if H_res is None else H_res


def _gains(H: Tensor) -> list[float]:
    return [H.sum(dim=-1).abs().max().item(), H.sum(dim=-2).abs().max().item()]


def _statistics(name, phi, alpha, H_pre, H_post, H_res) -> dict[str, Any]:
    identity = torch.eye(len(H_res), dtype=H_res.dtype)
    gain, backward = _gains(H_res)
    return {
        "sublayer": name,
        "H_pre": H_pre.tolist(),
        "H_post": H_post.tolist(),
        "gain": gain,
        "gain_backward": backward,
        "from identity": ((H_res - identity).norm() / identity.norm()).item(),
        "alpha": alpha.tolist(),
        "phi": phi.square().mean().sqrt().item(),
    }


def describe(about: dict[str, Any], every: bool = False) -> str:
    """``inspect``'s data as text."""
    lines = [
        f"{about['path']}: {about['format']}, {about['layout']}",
        f"{about['tensors']} tensors, {about['parameters']:,} parameters, "
        f"{about['bytes'] / 1e9:.3f} GB; {about['dtypes']}",
    ]
    if "iteration" in about:
        lines.append(
            f"iteration {about['iteration']}, {about['optimizer tensors']} optimizer tensors"
        )
    for name, (shape, dtype) in about["shapes"].items():
        if every or len(about["shapes"]) <= 60:
            lines.append(f"  {name}  {shape}  {dtype}")
    if len(about["shapes"]) > 60 and not every:
        lines.append("  (--all lists the tensors)")
    for record in about.get("connections") or []:
        read = " ".join(f"{x:.3f}" for x in record["H_pre"])
        write = " ".join(f"{x:.3f}" for x in record["H_post"])
        forward, backward = record["composite"]
        lines.append(
            f"  {record['sublayer']:>8}  H_pre {read}  H_post {write}  gain {record['gain']:.4f} / "
            f"{record['gain_backward']:.4f}  composite {forward:.4f} / {backward:.4f}  "
            f"from identity {record['from identity']:.3f}  phi rms {record['phi']:.2e}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class Difference:
    """Of one tensor in two checkpoints; ``relative`` is a Frobenius norm."""

    name: str
    said: str
    largest: float = 0.0
    relative: float = 0.0


def named(source: Any) -> dict[str, tuple[Region, TensorInfo]]:
    """A checkpoint's tensors by module name; optimizer state under ``optimizer...``."""
    if not isinstance(source, TorchDistSource):
        return {name: (Region(name), info) for name, info in source.infos().items()}
    optimizer = {
        name: (Region(name), info)
        for name, info in source.infos().items()
        if name.startswith("optimizer.")
    }
    return {**source.modules(), **optimizer}


def diff(a: Path, b: Path) -> Iterator[Difference]:
    """Tensors that differ, one at a time in memory."""
    first, second = open_source(a), open_source(b)
    left, right = named(first), named(second)
    for name in left.keys() - right.keys():
        yield Difference(name, f"only in {a}")
    for name in right.keys() - left.keys():
        yield Difference(name, f"only in {b}")
    for name, (region, info) in left.items():
        if name not in right:
            continue
        other, what = right[name]
        if info != what:
            yield Difference(
                name, f"{list(info.shape)} {info.dtype} and {list(what.shape)} {what.dtype}"
            )
            if info.shape != what.shape:
                continue
        x, y = _read(first, region), _read(second, other)
        largest, relative = distance(x, y)
        if largest or not _same_bits(x, y):
            yield Difference(
                name, f"largest {largest:.3e}, relative {relative:.3e}", largest, relative
            )


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype:
        return True  # reported by its dtype
    return all(
        torch.equal(a, b)
        for a, b in zip(_bytes(x).split(BLOCK), _bytes(y).split(BLOCK), strict=True)
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest absolute difference and relative Frobenius norm of it."""
    largest = error = norm = 0.0
    for a, b in zip(x.flatten().split(BLOCK), y.flatten().split(BLOCK), strict=True):
        a, b = a.double(), b.double()
        delta = (a - b).abs()
        largest = max(largest, delta.max().item() if len(delta) else 0.0)
        error += delta.square().sum().item()
        norm += a.square().sum().item()
    return largest, math.sqrt(error / norm) if norm else math.sqrt(error)


# ----------------------------------------------------------------------------------------- verify


def verify(path: Path, *, finite: bool = True) -> dict[str, int]:
    """Read everything; counts of what was checked.

    Checked are: every file against ``checksums.json`` where there is one; headers, chunks and
    shapes; the CRC-32 that torch_dist's archives carry; that a model's layers have the same
    tensors; that values are finite. safetensors carry no checksum of their own: without
    ``checksums.json`` a changed value that is still finite cannot be seen.

    Raises:
        UserError: the first thing that is wrong.
    """
    path = Path(path)
    source = open_source(path)
    folder = source.path if source.path.is_dir() else source.path.parent
    counts = {"files": verify_checksums(folder), "tensors": 0, "values": 0}
    for key, info in source.infos().items():
        for region in _boxes(source, key, info):
            value = source.read(region)
            counts["values"] += value.numel()
            if finite and value.is_floating_point():
                _check_finite(f"{source.path}: {key}", value)
        counts["tensors"] += 1
    if isinstance(source, TorchDistSource):
        source.check_coverage()
        _check_objects(source)
        _check_layers(source)
    return counts


def _boxes(source: Any, key: str, info: TensorInfo) -> list[Region]:
    if isinstance(source, TorchDistSource):
        return [Region(key, at, size) for at, size in source.chunks(key)]
    return [Region(key)]


def _check_finite(where: str, value: Tensor) -> None:
    for block in value.flatten().split(BLOCK):
        if block.dtype.itemsize == 1:
            block = block.float()
        if not torch.isfinite(block).all():
            raise UserError(f"{where} holds values that are not finite.")


def _check_objects(source: TorchDistSource) -> None:
    import io

    for key in source.objects:
        torch_dist.check_archive(io.BytesIO(source.object_bytes(key)), f"{source.path}: {key}")
    if not isinstance(source.common, dict):
        raise UserError(f"{source.path}: the common state is damaged.")
    try:
        backend = json.loads((source.path / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source.path}/metadata.json is missing or damaged.") from error
    if backend != "torch_dist":
        raise UserError(
            f"{source.path}/metadata.json names the backend {backend!r}, not torch_dist."
        )


def _check_layers(source: TorchDistSource) -> None:
    """A model has as many layers as its settings say, and mHC's tensors where they say so."""
    modules = source.modules()
    layers = getattr(source.args, "num_layers", None)
    if layers is None:
        return
    seen = {int(k.split(".")[2]) for k in modules if k.startswith("decoder.layers.")}
    if seen != set(range(layers)):
        raise UserError(f"{source.path}: the settings say {layers} layers; it has {sorted(seen)}.")
    mhc = MHCConfig.from_mapping(getattr(source.args, "mhc", None) or {"variant": "none"})
    if not mhc.enabled:
        return
    if layout_of(source) != "mhc":
        return
    for name in connection_tensors(source.args, mhc):
        if name not in modules:
            raise UserError(f"{source.path}: {name} is missing.")


def connection_tensors(args: Any, mhc: MHCConfig) -> list[str]:
    """The tensors that hyper-connections add to a model, in our layout."""
    before = [(OURS.layer.format(l=layer), kind) for layer, kind in sublayers(args)]
    predictions = prediction_sublayers(args)
    for prediction in predictions:
        before += prediction
    suffixes = (OURS.phi, *OURS.alpha, OURS.bias)
    names = [prefix + OURS.module(kind) + suffix for prefix, kind in before for suffix in suffixes]
    if mhc.exit == "learned":
        names += ours(args).head
        for depth in range(len(predictions)):
            names += exit_names(prediction_stack(args, depth))
    return names


def verify_checksums(folder: Path) -> int:
    """The number of files that agree with ``checksums.json``; 0 without one.

    Raises:
        UserError: a file is missing, changed or not listed.
    """
    listed = folder / CHECKSUMS
    if not listed.exists():
        return 0
    try:
        text = listed.read_text(encoding="utf-8")
        sums = json.loads(text)
        if checksum_text(sums) != text:
            raise ValueError
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{listed} is damaged.") from error
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    there -= {CHECKSUMS, f"{CHECKSUMS}.new"}  # the second: of a --record that was killed
    for name in sorted(there ^ set(sums)):
        said = "is missing" if name in sums else f"is not in {CHECKSUMS}"
        raise UserError(f"{folder}: {name} {said}.")
    for name, digest in sums.items():
        if file_sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged: its checksum is not that of {CHECKSUMS}.")
    return len(sums)
