#!/usr/bin/env python3
"""Measure mHC kernels side by side: time, bytes, errors and saved memory.

    python tools/bench_kernels.py --out runs/kernels            # one Hopper GPU, the default shapes
    python tools/bench_kernels.py --shapes 4096x2560 --columns ours,te --quick
    python tools/bench_kernels.py --device cpu --quick          # a test of the bench itself

Columns, all in one run and taking turns (``kernel_bench/timing.py`` says how):

- ``ours``: the kernels of mhc_kernels;
- ``reference``: the eager equations; ``compile``: torch.compile of them;
- ``te``: Transformer Engine's Triton kernels; ``tile``: DeepSeek's TileKernels (1.x); ``liger``:
  Liger-Kernel; each where it is installed. A column that cannot take part is listed with the
  reason.

Reported for each: milliseconds (median and spread) of pre, post and post_pre, forward and backward,
and of the chain: pre, seven post_pre, post with F = identity, per sublayer; GB/s and fraction of
the floor, with the bytes that must move (``kernel_bench/case.py``) and the copy bandwidth measured
in the same rounds; the relative Frobenius error of every output and gradient against float64; and
the bytes kept for backward, per token and sublayer. Written to --out: table, JSON, plot.

Exit code 0; 1 if a column that is present failed somewhere (the rest is written all the same);
2 for bad arguments or no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _path in (str(_ROOT / "kernels"), str(_ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import torch  # noqa: E402
from kernel_bench import accuracy, results  # noqa: E402
from kernel_bench.case import DTYPES, SUBLAYERS, Case, Inputs, make_inputs  # noqa: E402
from kernel_bench.columns import COLUMNS, CPU_COLUMNS, Absent, Column, load  # noqa: E402
from kernel_bench.results import ColumnResult, Run, ShapeResult  # noqa: E402
from kernel_bench.tasks import make_tasks  # noqa: E402
from kernel_bench.timing import EMPTY, FLUSH, GraphClock, Times, WallClock, copy_bandwidth  # noqa: E402

from mhc_kernels.reference import VARIANTS, phi_rows  # noqa: E402
from mhc_megatron.errors import Parser  # noqa: E402

SHAPES = "4096x1280,4096x1920,4096x2560,16384x2560,8192x4096,4096x7168"
QUICK_SHAPES = {"cuda": "4096x2560", "cpu": "64x32,64x64,128x64"}
ROUNDS = {"cuda": 24, "cpu": 3}
QUICK_ROUNDS = {"cuda": 6, "cpu": 3}

_START = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Run the bench; returns the exit code (SystemExit(2) for bad arguments)."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = _check(parser, options)
    device = torch.device(options.device)
    rounds = (QUICK_ROUNDS if options.quick else ROUNDS)[options.device]
    run = Run(_header(arguments, device, rounds))
    for case in cases:
        shape = bench_shape(case, options.columns, device, rounds)
        if all(column.absent for column in shape.columns):
            reasons = "; ".join(f"{column.name}: {column.absent}" for column in shape.columns)
            parser.error(f"no column can take part at {case}: {reasons}")
        run.shapes.append(shape)
        paths = results.write(run, options.out)  # after every shape: a long run that breaks off
    print(results.table(run), end="")
    print("written: " + ", ".join(str(path) for path in paths), file=sys.stderr)
    return 1 if run.failed else 0


def bench_shape(
    case: Case, names: list[str], device: torch.device, rounds: int, seed: int = 0
) -> ShapeResult:
    """Errors, saved bytes and times of every column at one shape."""
    inputs = make_inputs(case, device, seed)
    found = [_load(name, case, device) for name in names]
    present = [(column, result) for column, result in found if column is not None]
    if present:
        exact = accuracy.Float64(case, inputs)
        for column, result in present:
            _log(f"{case}: {column.name}: errors")
            _measure_values(column, inputs, exact, result)
        del exact
    _free(device)
    clock = GraphClock(device) if device.type == "cuda" else WallClock()
    for column, result in present:
        _log(f"{case}: {column.name}: warm-up")
        _add_tasks(clock, column, inputs, result)
    _log(f"{case}: timing")
    samples = clock.run(rounds)
    for _, result in present:
        for (name, part), times in ((k, v) for k, v in samples.items() if isinstance(k, tuple)):
            if name == result.name:
                divide_by = SUBLAYERS if part.startswith("chain") else 1
                result.times[part] = Times.of(times, divide_by)
    shape = ShapeResult(case, None, None, [result for _, result in found])
    if isinstance(clock, GraphClock):
        shape.copy = copy_bandwidth(samples, clock.copy_bytes)
        shape.empty_graph = Times.of(samples[EMPTY]).median
    del clock
    _free(device)
    return shape


def _load(name: str, case: Case, device: torch.device) -> tuple[Column | None, ColumnResult]:
    try:
        column = load(name, case, device)
    except Absent as reason:
        return None, ColumnResult(name, absent=str(reason))
    return column, ColumnResult(name, column.version, column.note)


def _measure_values(
    column: Column, inputs: Inputs, exact: accuracy.Float64, result: ColumnResult
) -> None:
    def errors() -> None:
        result.errors = accuracy.errors(column, inputs, exact)

    def saved() -> None:
        result.saved = accuracy.saved_bytes(column, inputs)

    _attempt(result, "errors", errors)
    _attempt(result, "saved bytes", saved)


def _add_tasks(
    clock: GraphClock | WallClock, column: Column, inputs: Inputs, result: ColumnResult
) -> None:
    tasks = []
    _attempt(result, "operands", lambda: tasks.extend(make_tasks(column, inputs)))
    for task in tasks:
        _attempt(result, task.part, partial(clock.add, (column.name, task.part), task))


def _attempt(result: ColumnResult, what: str, action: Callable[[], object]) -> None:
    """Run ``action``; a failure of one implementation is recorded and does not end the bench."""
    try:
        action()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        result.failed[what] = f"{type(error).__name__}: {line}"
        _log(f"{result.name}: {what} failed: {result.failed[what]}")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parser() -> Parser:
    parser = Parser(
        prog="bench_kernels",
        description=__doc__.split("\n\n")[0],
        epilog="exit codes: 0; 1 a present column failed somewhere; 2 bad arguments or no GPU",
    )
    parser.add_argument("--shapes", help=f"TxC, comma-separated (default {SHAPES})")
    parser.add_argument("--columns", help=f"comma-separated, of {','.join(COLUMNS)}")
    parser.add_argument("--variant", default="mhc", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--n", type=int, default=4, help="streams (default 4)")
    parser.add_argument("--dtype", default="bf16", help=f"of x and y: {', '.join(DTYPES)}")
    parser.add_argument("--out", type=Path, help="folder for table, JSON and plot (a new one)")
    parser.add_argument("--quick", action="store_true", help="one shape, fewer rounds")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    return parser


def _check(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """Turn the options into values, or end with one sentence and exit code 2."""
    for name, allowed in (("variant", VARIANTS), ("dtype", DTYPES), ("device", ROUNDS)):
        if getattr(options, name) not in allowed:
            value = getattr(options, name)
            parser.error(f"--{name} must be one of {', '.join(allowed)}, not {value!r}")
    default_columns = COLUMNS if options.device == "cuda" else CPU_COLUMNS
    options.columns = (options.columns or ",".join(default_columns)).split(",")
    for name in options.columns:
        if name not in COLUMNS:
            parser.error(f"--columns: {name!r} is not one of {', '.join(COLUMNS)}")
    if len(set(options.columns)) < len(options.columns):
        parser.error("--columns names a column twice")
    try:
        phi_rows(options.n, options.variant)
    except ValueError as error:
        parser.error(f"--n: {error}")
    default_shapes = QUICK_SHAPES[options.device] if options.quick else SHAPES
    cases = [_case(parser, text, options) for text in (options.shapes or default_shapes).split(",")]
    _check_device(parser, options)
    options.out = _check_out(parser, options.out)
    return cases


def _case(parser: Parser, text: str, options: argparse.Namespace) -> Case:
    T, _, C = text.strip().partition("x")
    if not (T.isdecimal() and C.isdecimal() and int(T) > 0 and int(C) > 0):
        parser.error(f"--shapes: {text!r} is not TxC with positive numbers, like 4096x2560")
    if int(C) % 16:
        parser.error(f"--shapes: C must be a multiple of 16, not {C}")
    return Case(int(T), int(C), options.n, options.dtype, options.variant)


def _check_device(parser: Parser, options: argparse.Namespace) -> None:
    if options.device == "cpu" and not options.quick:
        parser.error(
            "--device cpu goes with --quick only: it tests the bench, its times mean little"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA GPU is available; the bench itself can be tested with --device cpu --quick"
        )


def _check_out(parser: Parser, out: Path | None) -> Path:
    if out is None:
        return Path("runs", f"bench_kernels-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out: {out} is not a folder")
    taken = [name for name in results.FILES if (out / name).exists()]
    if taken:
        parser.error(f"--out: {out} already holds {', '.join(taken)}; choose another folder")
    return out


def _header(arguments: list[str], device: torch.device, rounds: int) -> dict[str, str]:
    import triton

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        method = (
            f"CUDA-graph replays between two events, median of {rounds}, columns taking turns; "
            f"cold L2: before each replay a buffer of {FLUSH * l2 >> 20} MiB is read; nothing is "
            "subtracted; spread = (p90 - p10) / median; GB/s counts the bytes that must move"
        )
    else:
        name = "CPU"
        method = f"wall clock on the CPU, median of {rounds}: a test of the bench, not a result"
    return {
        "command": shlex.join(["tools/bench_kernels.py", *arguments]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "device": name,
        "software": f"torch {torch.__version__}, triton {triton.__version__}",
        "method": method,
    }


def _log(message: str) -> None:
    print(f"[{time.monotonic() - _START:5.0f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
