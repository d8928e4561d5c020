#!/usr/bin/env python3
"""What the overlap schedule hides, piece by piece.

    python tools/bench_overlap.py --out runs/overlap            # one GPU, an emulated wire
    torchrun --nproc-per-node 4 tools/bench_overlap.py --out runs/overlap     # over NCCL
    python tools/bench_overlap.py --device cpu --quick          # a test of the bench itself

One GPU: a chunk of a middle pipeline stage in a steady state (``overlap_bench/slots.py``), the
transfers between stages emulated by the copy engines at --gb-per-s, the experts' all-to-all by its
time at --expert-gb-per-s (0: none). It is an emulation: no network, no NCCL kernels on the SMs.
Measured are milliseconds of a slot (a forward and a backward of the chunk) with the whole schedule,
without each piece (``mhc_megatron/overlap.py`` says what they are), with Megatron's own placing,
and without any overlap. Exposed is what a row takes beyond the whole schedule on a wire that takes
no time. Rows take turns. A row whose host needs longer to issue a slot than the GPU to run it says
nothing about overlap and is marked.

Then a timeline: two slots under torch.profiler; trace and picture.

Several GPUs: Megatron's own schedules over NCCL (``overlap_bench/pipeline.py``), milliseconds of a
step, each after one that is not timed: the plain residual model and mHC, each without overlap and
with Megatron's, mHC with ours and with each piece left out. Two GPUs: EP2, then PP2 x VPP2; a
multiple of four: experts and pipeline at once (EP2 x PP2 x VPP2, EP4 x PP2 x VPP2). Then a profiled
step of each row: time of NCCL's kernels, and the part of it in which no other kernel ran (exposed).

Written to --out: table.txt, results.json; *.png and *.trace.json.gz of the
whole schedule (timeline) and of Megatron's placing (megatrons). Exit code 0; 1 if a part failed
(the rest is written all the same); 2 for bad arguments or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as launch/env.sh
_ROOT = Path(__file__).parents[1]
for _path in (str(_ROOT / "kernels"), str(_ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import torch  # noqa: E402

from mhc_megatron.errors import Parser  # noqa: E402

_START = time.monotonic()
WHOLE, MEGATRON = "", "mixing_stream,gradient_wait,hop_streams,open_end"
#: Row -> (pieces left out, wire: its share of n*C bytes, whether anything overlaps).
ROWS: dict[str, tuple[str, float, bool]] = {
    "whole schedule, no wire": (WHOLE, 0.0, True),
    "whole schedule": (WHOLE, 1.0, True),
    "without mixing_stream": ("mixing_stream", 1.0, True),
    "without gradient_wait": ("gradient_wait", 1.0, True),
    "without hop_streams": ("hop_streams", 1.0, True),
    "without open_end": ("open_end", 1.0, True),
    "Megatron's own placing": (MEGATRON, 1.0, True),
    "Megatron's own placing, no wire": (MEGATRON, 0.0, True),
    "whole schedule, hops of one stream (C)": (WHOLE, 0.25, True),
    "no overlap, transfers waited for": (MEGATRON, 1.0, False),
}


def main() -> int:
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        _parser().error("no GPU; --device cpu --quick tests the bench itself.")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        from mhc_megatron import cpu

        cpu.enable()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    start(several, options.device, options.hop_ctas)
    parts: dict[str, Callable] = {"NCCL": pipeline} if several else {"emulation": emulation}
    failed, results, text = [], {"arguments": vars(options), "device": device_name(options)}, []
    for name, part in parts.items():
        try:
            results[name], lines = part(options, out)
            text += lines
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if int(os.environ.get("RANK", 0)) == 0:
        if failed:
            text.append(f"failed: {', '.join(failed)}")
        (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (out / "table.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        (out / "partial.json").unlink(missing_ok=True)
        print("\n".join(text))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 1 if failed or any("failed" in line for line in text) else 0


def _parser() -> Parser:
    parser = Parser(prog="bench_overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/overlap", help="folder of what is written")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, few slots")
    parser.add_argument("--gb-per-s", type=float, default=50.0, help="of the wire between stages")
    parser.add_argument(
        "--expert-gb-per-s", type=float, default=200.0, help="of the experts' all-to-all; 0: none"
    )
    parser.add_argument("--layers", type=int, default=4, help="of a chunk")
    parser.add_argument("--tokens", type=int, default=4096, help="of a microbatch")
    parser.add_argument("--hidden", type=int, default=2560, help="C")
    parser.add_argument("--dense", action="store_true", help="no experts")
    parser.add_argument("--slots", type=int, default=8, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of a row")
    parser.add_argument("--layout", type=int, default=None, metavar="I",
                        help="several GPUs: only the I-th of their layouts, from 0")
    parser.add_argument("--seconds", type=float, default=3600.0,
                        help="several GPUs: begin no round and no profile after that many")
    parser.add_argument("--hop-ctas", type=int, default=None, metavar="N",
                        help="several GPUs: at most N of NCCL's blocks for a hop between stages")
    parser.add_argument("--no-pieces", action="store_true",
                        help="several GPUs: no rows with pieces of the schedule left out")
    return parser


def start(several: bool, device: str, hop_ctas: int | None = None) -> None:
    """Process groups; all ranks of a pipeline, or one."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if several:
        limits = None
        if hop_ctas is not None and device == "cuda":
            # With two stages Megatron sends one way over the group of all ranks
            # (pipeline_parallel/p2p_communication.py:75).
            limits = dist.ProcessGroupNCCL.Options()
            limits.config.max_ctas = hop_ctas
        dist.init_process_group(backend, pg_options=limits)
        return  # each layout has groups of its own
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def device_name(options: argparse.Namespace) -> str:
    return "cpu" if options.device == "cpu" else torch.cuda.get_device_name()


def shape_of(options: argparse.Namespace):
    from overlap_bench.model import Shape

    if options.quick:
        return Shape(layers=2, tokens=32, hidden=64, heads=4, experts=4, topk=2, expert_ffn=32,
                     dense_ffn=128, dense=options.dense)  # fmt: skip
    heads = max(1, options.hidden // 128)
    return Shape(
        layers=options.layers, tokens=options.tokens, hidden=options.hidden, heads=heads,
        dense=options.dense,
    )  # fmt: skip


# ----------------------------------------------------------------------------- one GPU, emulation


def emulation(options: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[str]]:
    """The ablation table on an emulated wire, and the timeline."""
    from megatron.core.pipeline_parallel.utils import set_streams
    from overlap_bench import wire
    from overlap_bench.model import chunk, configuration, send_to_experts

    from mhc_megatron.config import MHCConfig

    cpu, shape = options.device == "cpu", shape_of(options)
    set_streams()
    clock = wire.Clock(cpu)
    model = chunk(configuration(shape, cpu), MHCConfig(), shape.tokens, first=False, last=False)
    model = model if cpu else model.cuda().bfloat16()
    expert_ms = 0.0
    if options.expert_gb_per_s > 0 and not shape.dense:
        expert_ms = shape.expert_bytes / 1e6 / options.expert_gb_per_s
        send_to_experts([model], lambda: clock.spin(expert_ms))
    wires = {
        rate: [wire.Wire(down, rate, clock) for down in (True, False)]
        for rate in (0.0, options.gb_per_s)
    }
    example = torch.randn(shape.tokens, 1, shape.n * shape.hidden, device=options.device)
    example = example.to(torch.float32 if cpu else torch.bfloat16)
    rows = rounds(options, model, example, wires, shape)
    engine = wires[options.gb_per_s][0].engine, wires[options.gb_per_s][1].engine
    result: dict[str, Any] = {
        "shape": asdict(shape),
        "hop_bytes": shape.hop_bytes,
        "expert_all_to_all_ms": expert_ms,
        "copy_engines_gb_per_s": engine,
        "rows": rows,
    }
    lines = table(rows, shape, options, engine, expert_ms)
    print("\n".join(lines), flush=True)  # before the profiler, which takes a while
    try:
        if not cpu:
            result["timeline"] = timeline(options, out, model, example, wires, shape)
            lines.append(timeline_line(result["timeline"]))
    except Exception:
        traceback.print_exc()
        lines.append("timeline: failed")
    return result, lines


def rounds(options, model, example, wires, shape) -> dict[str, dict[str, float]]:
    """Row -> medians over rounds in which the rows take turns."""
    from overlap_bench.slots import measure

    slots, count = (2, 2) if options.quick else (options.slots, options.rounds)
    samples: dict[str, list] = {name: [] for name in ROWS}
    for _ in range(count):
        for name in ROWS:
            with steady(name, options, model, example, wires, shape) as stage:
                samples[name].append(measure(stage, slots))
            model.zero_grad(set_to_none=True)
    return {
        name: {
            "ms": statistics.median(t.gpu for t in times),
            "least_ms": min(t.gpu for t in times),
            "most_ms": max(t.gpu for t in times),
            "host_ms": statistics.median(t.host for t in times),
        }
        for name, times in samples.items()
    }


@contextlib.contextmanager
def steady(name: str, options, model, example, wires, shape):
    """The stage of one row, in its steady state."""
    from overlap_bench.model import leave_out
    from overlap_bench.slots import Steady

    pieces, share, overlapped = ROWS[name]
    leave_out([model], pieces)
    rate = options.gb_per_s if share else 0.0
    size = int(share * shape.hop_bytes)
    stage = Steady(model, example, *wires[rate], bytes=size, overlapped=overlapped)
    yield stage
    stage.close()
    leave_out([model], WHOLE)


def table(rows, shape, options, engine, expert_ms: float) -> list[str]:
    """The ablation table in words."""
    ideal = rows["whole schedule, no wire"]["ms"]
    hop_ms = shape.hop_bytes / 1e6 / options.gb_per_s
    lines = [
        f"overlap schedule on one {device_name(options)}: EMULATED wire",
        f"chunk of {shape.layers} {'dense' if shape.dense else 'MoE'} layers, C {shape.hidden}, "
        f"n {shape.n}, {shape.tokens} tokens a microbatch; hop {shape.hop_bytes / 2**20:.0f} MiB "
        f"= {hop_ms:.2f} ms each way at {options.gb_per_s:g} GB/s; experts' all-to-all "
        f"{expert_ms:.2f} ms; copy engines {engine[0]:.0f} and {engine[1]:.0f} GB/s",
        f"{'':42s}{'ms a slot':>10s}{'spread':>16s}{'exposed':>9s}{'host':>8s}",
    ]
    for name, row in rows.items():
        mark = "  host-bound" if row["host_ms"] > 0.95 * row["ms"] else ""
        spread = f"{row['least_ms']:.2f}..{row['most_ms']:.2f}"
        lines.append(
            f"{name:42s}{row['ms']:10.2f}{spread:>16s}{row['ms'] - ideal:9.2f}"
            f"{row['host_ms']:8.2f}{mark}"
        )
    return lines


def timeline(options, out: Path, model, example, wires, shape) -> dict[str, Any]:
    """Two slots of the whole schedule and of Megatron's placing: trace, picture, numbers."""
    from overlap_bench.timeline import draw, hidden, record

    result = {}
    for name, stem in (("whole schedule", "timeline"), ("Megatron's own placing", "megatrons")):
        with steady(name, options, model, example, wires, shape) as stage:
            for _ in range(3):
                stage.slot()
            torch.cuda.synchronize()
            found = record(lambda stage=stage: [stage.slot() for _ in range(2)],
                           out / f"{stem}.trace.json.gz")  # fmt: skip
        result[name] = hidden(found)
        title = f"{name}: {device_name(options)}, emulated wire"
        draw(found, out / f"{stem}.png", title, (0.35, 0.85))
    return result


def timeline_line(result: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{name}: F_post,res {of['mixing_ms']:.2f} ms in two slots, {of['beside_any']:.0%} of it "
        f"beside other nodes, {of['beside_attention']:.0%} beside attention"
        for name, of in result.items()
    )


# ---------------------------------------------------------------------------- several GPUs, NCCL


def pipeline(options: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Every layout of so many ranks: its rows' steps, then a profiled step of each."""
    import torch.distributed as dist
    from overlap_bench.pipeline import Models, layouts

    chosen = layouts(dist.get_world_size())
    if options.layout is not None:
        chosen = chosen[options.layout : options.layout + 1]
    result: dict[str, Any] = {}
    lines = [
        f"overlap schedule over {dist.get_backend()}: {dist.get_world_size()} x "
        f"{device_name(options)}"
    ]
    for layout in chosen:
        models = Models(
            shape_of(options), layout, options.device == "cpu", options.hop_ctas,
            pieces=not options.no_pieces,
        )  # fmt: skip
        rows: dict[str, dict[str, Any]] = {}
        result[layout.name] = {"what": models.describe(), "rows": rows}
        turns(options, models, rows, lambda: _save(out, result))
        if options.device == "cuda":
            result[layout.name]["what"] += f"; the allocator holds {models.reserved():.0f} GiB"
        profiles(options, out, models, rows)
        _save(out, result)
        lines += nccl_table(result[layout.name]["what"], rows)
        models.close()
    return result, lines


def turns(options: argparse.Namespace, models, found: dict[str, Any], save: Callable) -> None:
    """Add every row's milliseconds to ``found``, round by round, or why there are none."""
    found |= {row.name: {"steps": [], "retries": 0, "allocations": 0} for row in models.rows}
    for i in range(1 + (2 if options.quick else options.rounds)):
        if i > 1 and _late(options):
            break
        # Another order each round, the same on every rank.
        for row in random.Random(i).sample(models.rows, len(models.rows)):
            of = found[row.name]
            if "error" in of:
                continue
            try:
                ms, allocator = models.step(row)
            except Exception as error:
                traceback.print_exc()
                of["error"] = f"{type(error).__name__}: {error}"[:300]
                continue
            if i > 0:  # the first round warms up
                of["steps"].append(ms)
                of["retries"] += allocator.retries
                of["allocations"] += allocator.allocations
                of["ms"] = statistics.median(of["steps"])
        save()


def profiles(options: argparse.Namespace, out: Path, models, found: dict[str, Any]) -> None:
    """Add what the links did to each row; the traces of two rows stay."""
    from overlap_bench.pipeline import PIECES, WHOLE

    if options.device == "cpu":
        return
    kept = {WHOLE.name: "ours", "mHC, Megatron's own placing": "megatrons"}
    # Those first that matter most, as the time may end.
    order = sorted(models.rows, key=lambda row: row.without in PIECES)
    for row in order:
        if "error" in found[row.name] or _late(options):
            continue
        stem = kept.get(row.name)
        slug = models.layout.name.replace(" ", "").lower()
        path = out / f"{slug}-{stem}.trace.json.gz" if stem else None
        found[row.name]["links"] = asdict(models.profiled(row, path))


def nccl_table(what: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """One layout in words; the differences are to the row without overlap of the same model.

    Marked is a row in whose timed steps an allocator ran out of memory and started anew, which
    says little, or asked the driver for more, which waits for the GPU.
    """
    head = "".join(f"{name:>{width}s}" for name, width in (
        ("ms a step", 11), ("spread", 18), ("change", 9), ("over resid.", 12),
        ("NCCL", 9), ("exposed", 9), ("busy", 9)))  # fmt: skip
    lines = [what, f"{'':36s}{head}"]
    for name, of in rows.items():
        if "ms" not in of:
            lines.append(f"{name:36s} failed: {of.get('error', 'no step was timed')}")
            continue
        model = name.split(",")[0]
        alone = rows.get(f"{model}, no overlap", {}).get("ms")
        plain = rows.get("residual, Megatron's overlap" if "no overlap" not in name
                         else "residual, no overlap", {}).get("ms")  # fmt: skip
        spread = f"{min(of['steps']):.2f}..{max(of['steps']):.2f}"
        links = of.get("links")
        told = [f"{links[key]:9.2f}" for key in ("nccl", "exposed", "busy")] if links else []
        lines.append(
            f"{name:36s}{of['ms']:11.2f}{spread:>18s}{_share(of['ms'], alone):>9s}"
            f"{_share(of['ms'], plain if model == 'mHC' else None):>12s}{''.join(told)}"
            f"{_marks(of)}"
        )
    return [*lines, ""]


def _marks(of: dict[str, Any]) -> str:
    if of.get("retries"):
        return "  short of memory"
    return f"  {of['allocations']} cudaMalloc" if of.get("allocations") else ""


def _share(ms: float, other: float | None) -> str:
    return f"{100 * (ms / other - 1):+.1f} %" if other else "-"


def _late(options: argparse.Namespace) -> bool:
    """Whether the time is up, as rank 0 sees it."""
    import torch.distributed as dist

    answer = [time.monotonic() - _START > options.seconds]
    dist.broadcast_object_list(answer)
    return answer[0]


def _save(out: Path, result: dict[str, Any]) -> None:
    """What there is so far, in case that the rest never comes."""
    if int(os.environ.get("RANK", 0)) == 0:
        (out / "partial.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
