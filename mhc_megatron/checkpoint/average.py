"""The average of several checkpoints of one run (or of runs with one start)."""

from __future__ import annotations

from pathlib import Path

from mhc_megatron.checkpoint.convert import Plan, open_source
from mhc_megatron.checkpoint.huggingface import name_errors, read_texts
from mhc_megatron.checkpoint.recipes import Output, Recipe, Region
from mhc_megatron.checkpoint.torch_dist import TorchDistSource
from mhc_megatron.checkpoint.upcycle import torch_dist_plan
from mhc_megatron.errors import UserError


def average_plan(paths: list[Path], weights: list[float] | None = None) -> Plan:
    """Weighted mean of every floating-point tensor, summed in float64; dtypes stay.

    A torch_dist result takes its settings from the last checkpoint and starts a new run (no
    optimizer or random state). Tensors that are not floating point come from the last one.

    Raises:
        UserError: checkpoints that do not match, weights that do not sum to one.
    """
    weights = weights or [1 / len(paths)] * len(paths)
    # "not <=", because no comparison with NaN holds.
    if len(paths) < 2 or len(weights) != len(paths) or not abs(sum(weights) - 1) <= 1e-6:
        raise UserError("average takes two or more checkpoints, and as many weights with sum 1.")
    sources = [open_source(path) for path in paths]
    if len({type(source) for source in sources}) > 1:
        raise UserError("the checkpoints to average must have one format.")
    all_infos = [_infos(source) for source in sources]
    for path, infos in zip(paths[1:], all_infos[1:], strict=True):
        missing, unknown = all_infos[0].keys() - infos.keys(), infos.keys() - all_infos[0].keys()
        if missing or unknown:
            raise UserError(name_errors(str(path), sorted(missing), sorted(unknown), []))
        for key, info in infos.items():
            if info != all_infos[0][key]:
                raise UserError(
                    f"{key}: {list(all_infos[0][key].shape)} {all_infos[0][key].dtype} "
                    f"in {paths[0]}, "
                    f"{list(info.shape)} {info.dtype} in {path}."
                )
    outputs = [
        _averaged(key, info, at, size, weights)
        for key, info in all_infos[-1].items()
        for at, size in _boxes(sources[-1], key)
    ]
    if isinstance(sources[-1], TorchDistSource):
        plan = torch_dist_plan(sources[-1], outputs, release=True)
    else:
        texts = {k: v for k, v in read_texts(Path(paths[-1])).items() if k != "index"}
        plan = Plan("safetensors", [], outputs, texts=texts)
    plan.sources = [source.path for source in sources]
    return plan


def _infos(source) -> dict:
    return {k: v for k, v in source.infos().items() if not k.startswith("optimizer.")}


def _boxes(source, key: str) -> list[tuple]:
    return source.chunks(key) if isinstance(source, TorchDistSource) else [(None, None)]


def _averaged(key: str, info, at, size, weights: list[float]) -> Output:
    count = len(weights)
    shape = size if size is not None else info.shape
    full = info.shape if size is not None else None
    if not info.dtype.is_floating_point:
        recipe = Recipe("copy", (Region(f"{count - 1}:{key}", at, size),))
    else:
        regions = tuple(Region(f"{i}:{key}", at, size) for i in range(count))
        recipe = Recipe("mean", regions, {"weights": weights})
    return Output(key, tuple(shape), info.dtype, recipe, at, full)
