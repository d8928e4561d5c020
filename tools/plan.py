#!/usr/bin/env python3
"""What a configuration asks for, before any GPU is booked.

    tools/plan.py --config configs/mhc-27b.yaml
    tools/plan.py --config configs/mhc-27b.yaml --gpus 256 --set mhc.variant=none --json

Prints parameters, floating-point operations a token, and for each pipeline stage the memory of one
GPU that weights, optimizer and residual streams take, and what travels between stages. Nothing is
built; formulas and their limits are in mhc_megatron/counting.py and mhc_megatron/footprint.py.
Exit code 2: the configuration cannot be read or contradicts itself; one sentence says why.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch.settings import Settings, load, parse  # noqa: E402
from mhc_megatron.errors import UserError, quiet_pipe  # noqa: E402

GIB, MIB = 2**30, 2**20


@quiet_pipe
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        settings = load(options.config, options.set)
        plan = make(settings, options.gpus)
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan, indent=1) if options.json else text(plan))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py", description="Parameters, FLOPs, memory and traffic of a configuration."
    )
    parser.add_argument("--config", required=True, help="YAML with Megatron's argument names")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, e.g. mhc.n=2 or micro-batch-size=2; may be repeated",
    )
    parser.add_argument(
        "--gpus", type=_positive, metavar="N",
        help="default: the configuration's run.gpus, or else the fewest that its layout allows",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON, in bytes")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def make(settings: Settings, gpus: int | None = None) -> dict[str, Any]:
    """The plan: name, layout, parameters, FLOPs, and one entry a pipeline stage.

    Raises:
        UserError: Megatron refuses the settings, or the formulas do not cover the model.
    """
    args = arguments_of(settings, gpus)
    from mhc_megatron.counting import count, flops
    from mhc_megatron.footprint import footprints
    from mhc_megatron.recompute import check_recompute

    check_recompute(args, settings.mhc)
    counts, operations = count(args, settings.mhc), flops(args, settings.mhc)
    return {
        "name": settings.run.name,
        "mhc": settings.mhc.to_mapping(),
        "layout": {
            "gpus": args.world_size,
            "data": args.data_parallel_size,
            "tensor": args.tensor_model_parallel_size,
            "pipeline": args.pipeline_model_parallel_size,
            "virtual": args.virtual_pipeline_model_parallel_size or 1,
            "context": args.context_parallel_size,
            "expert": args.expert_model_parallel_size,
            "microbatches": args.global_batch_size
            // (args.micro_batch_size * args.data_parallel_size),
            "tokens_per_step": args.global_batch_size * args.seq_length,
        },
        "parameters": dataclasses.asdict(counts),
        "flops_per_token": dataclasses.asdict(operations),
        "stages": [
            {**dataclasses.asdict(stage), "state": stage.state}
            for stage in footprints(args, settings.mhc)
        ],
    }


def arguments_of(settings: Settings, gpus: int | None) -> argparse.Namespace:
    """Megatron's parsed arguments for ``gpus`` ranks, on any machine and without its output."""
    os.environ |= {"WORLD_SIZE": str(gpus or settings.run.gpus or fewest(settings)), "RANK": "0"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import torch

        from mhc_megatron import cpu

        values = dict(settings.megatron)
        if cpu.enabled() or not torch.cuda.is_available():
            cpu.enable()
            values |= cpu.ARGUMENTS
        args = parse(values)
    # The CPU has no optimizer for these; the plan is of the run on GPUs.
    for key in ("exp-avg-dtype", "exp-avg-sq-dtype"):
        if key in settings.megatron:
            setattr(args, key.replace("-", "_"), settings.megatron[key])
    return args


def fewest(settings: Settings) -> int:
    """The fewest GPUs that the layout allows."""

    def size(name: str) -> int:
        value = settings.megatron.get(f"{name}-parallel-size") or 1
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}-parallel-size must be at least 1, not {value!r}.")
        return value

    tensor = size("tensor-model")
    expert_tensor = settings.megatron.get("expert-tensor-parallel-size")
    dense = tensor * size("context")
    expert = size("expert-model") * (tensor if expert_tensor is None else size("expert-tensor"))
    return size("pipeline-model") * math.lcm(dense, expert)


# ------------------------------------------------------------------------------------------- print


def text(plan: dict[str, Any]) -> str:
    """The plan as a page for a terminal."""
    return "\n\n".join([_head(plan), _parameters(plan), _flops(plan), _stages(plan)])


def _head(plan: dict[str, Any]) -> str:
    layout, mhc = plan["layout"], plan["mhc"]
    sizes = ", ".join(
        f"{name} {layout[name]}"
        for name in ("data", "tensor", "pipeline", "virtual", "context", "expert")
        if layout[name] > 1
    )
    return (
        f"{plan['name']}: mhc {mhc['variant']}, n = {mhc['n']}\n"
        f"{layout['gpus']} {'GPU' if layout['gpus'] == 1 else 'GPUs'}: {sizes or 'one'}; "
        f"{layout['microbatches']} microbatches, "
        f"{layout['tokens_per_step']:,} tokens a step"
    )


def _parameters(plan: dict[str, Any]) -> str:
    counts = plan["parameters"]
    rows = [
        ("total", counts["total"], ""),
        ("active", counts["active"], "without the embedding table and experts not met"),
        ("connections", counts["connections"], f"{counts['connections'] / counts['total']:.2%}"),
    ]
    if counts["mtp"]:
        rows.append(("prediction", counts["mtp"], "multi-token prediction, not in the total"))
    parts = ", ".join(
        f"{name} {_short(value)}"
        for name, value in counts["parts"].items()
        if value and name not in ("connections", "mtp")
    )
    lines = [f"  {name:<12} {_short(value):>8}  {note}".rstrip() for name, value, note in rows]
    return "\n".join(["parameters", *lines, f"  of the total: {parts}"])


def _flops(plan: dict[str, Any]) -> str:
    of = plan["flops_per_token"]
    return (
        "floating-point operations a token, forward and backward\n"
        f"  {'model':<12} {of['model'] / 1e9:>8.3f} G  core attention "
        f"{of['attention'] / of['model']:.1%} of it\n"
        f"  {'connections':<12} {of['connections'] / 1e9:>8.3f} G  "
        f"{of['connections'] / of['model']:.2%} more"
    )


_COLUMNS = ("stage", "holds", "parameters", "weights", "gradients", "optimizer", "together",
            "in flight", "width C", "width n*C", "recomputed", "L_r", "p2p MiB")  # fmt: skip


def _stages(plan: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    for stage in plan["stages"]:
        row = [
            stage["holds"],
            _short(stage["parameters"]),
            *(f"{stage[k] / GIB:.2f}" for k in ("weights", "gradients", "optimizer", "state")),
            str(stage["in_flight"]),
            *(f"{stage[k] / GIB:.2f}" for k in ("residual", "streams", "recomputed")),
            str(stage["L_r"]),
            f"{stage['p2p'] / MIB:.0f}",
        ]
        rows.append([str(stage["stage"]), *row])
    table = [list(_COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join(
        [
            "one GPU of each pipeline stage, GiB",
            *(f"  {line}" for line in lines),
            "  'together' is weights, gradients and optimizer. 'width C' to 'recomputed' is the",
            "  residual stream alone, of all microbatches in flight: stored before each sublayer",
            "  at width C, at width n*C, and with Eq. (20)'s blocks of L_r sublayers. Activations",
            "  within attention, MLP and experts come on top.",
        ]
    )


def _short(value: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.{3 if unit == 1e9 else 1}f} {name}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
