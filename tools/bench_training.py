#!/usr/bin/env python3
"""What hyper-connections cost in training: the same model with plain residuals and with mHC.

    tools/bench_training.py --config configs/mhc-27b.yaml --layers 4 --tokens 16384
    tools/bench_training.py --config configs/dense-8b.yaml --layers 4 --precision bf16,fp8-blockwise
    torchrun --nproc-per-node 8 tools/bench_training.py --config configs/mhc-27b.yaml --layers 6
    tools/bench_training.py --config configs/tiny.yaml --layers 2 --steps 3     # CPU: a test of it

Every variant is built through the entry of launch/pretrain.py, Megatron's own builder and
distributed data parallelism, in one process; the variants take turns, one step each, on the same
random tokens. A step is forward and backward of ``--microbatches`` microbatches, with
``--optimizer`` its update too. Reported for each: step time, tokens a second, model TFLOP/s and MFU
(FLOPs of the model without hyper-connections), summed kernel time and what it is over the plain
residual's, launches, memory, kernel time by class, and whether the GPU or the host is the
bottleneck. Written to --out: table, JSON, plot, and the last profiler trace of each variant.

A variant is a name (none, mhc, hc, identity, birkhoff), with other settings of the ``mhc:`` part
behind colons: ``mhc:n=2``, ``mhc:kernels=reference``. ``none`` is the baseline of every overhead.

Exit code 0; 1 if a column failed (the rest is written all the same); 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Several models in turns leave holes of many sizes; segments that grow do not.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), os.path.join(_ROOT, "tools"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch.environment import check_resiliency, redirect_output  # noqa: E402
from mhc_megatron.errors import Parser, UserError  # noqa: E402

_START = time.monotonic()
#: Where the bench itself writes, once all other output goes to a log.
_console: TextIO | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        return _main(options, arguments)
    except UserError as error:
        print(f"bench_training: {error}", file=_console or sys.stderr)
        return 2
    except Exception as error:  # the traceback goes to the log, one line to the terminal
        if _console is not None or options.verbose:
            traceback.print_exc()
        print(f"bench_training: {type(error).__name__}: {error}", file=_console or sys.stderr)
        return 1


def _main(options: argparse.Namespace, arguments: list[str]) -> int:
    global _console
    import torch

    from mhc_megatron import cpu

    on_gpu = torch.cuda.is_available()
    check_resiliency()
    part, columns = _check(options, on_gpu)
    rank = int(os.environ.get("RANK", "0"))
    _console = _redirect(options, rank)
    if not on_gpu:
        cpu.enable()
    from training_bench import results

    run = results.Run(_header(arguments, options, part, on_gpu), part.layers, part.full_layers)
    paths: list[Path] = []
    contradictions: list[UserError] = []
    for precision in dict.fromkeys(column.precision for column in columns):
        chosen = [column for column in columns if column.precision == precision]
        try:
            group = _bench(chosen, part, options, on_gpu)
        except UserError as error:  # what one recipe contradicts another may allow
            contradictions.append(error)
            group = results.Group(precision, [results.Result(column) for column in chosen])
            _fail(group, str(error))
        run.groups.append(group)
        # After every precision: a long run that breaks off keeps what it has.
        if rank == 0 and len(contradictions) < len(run.groups):
            paths = results.write(run, options.out, options.plot)
    if len(contradictions) == len(run.groups):
        raise contradictions[0]
    if rank == 0:
        text = results.table(run)
        _console.write(text)
        if options.json:
            import json

            Path(options.json).write_text(json.dumps(results.as_json(run), indent=1) + "\n")
        _say("written: " + ", ".join(str(path) for path in paths))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 1 if run.failed else 0


def _bench(columns, part, options: argparse.Namespace, on_gpu: bool):
    """All columns of one precision."""
    import torch
    from training_bench import measure, models, results

    precision = columns[0].precision
    args = models.start(part, precision)
    built: list[models.Model] = []
    group = results.Group(precision, [results.Result(column) for column in columns])
    try:
        for column in columns:
            _say(f"{precision}: {column.label}: building")
            built.append(models.Model(column, args, part, with_optimizer=options.optimizer))
        # Rank 0's: all ranks write to one folder.
        traces = options.out if options.traces and args.rank == 0 else None
        found = measure.measure(
            built, options.steps, options.profile_steps, traces,
            lambda what: _say(f"{precision}: {what}"),
        )  # fmt: skip
        for result, model, measured in zip(group.results, built, found):
            _fill(result, model, measured, on_gpu)
        _vocabulary(group, built, part, options)
    except UserError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        _fail(group, f"out of GPU memory; fewer --layers, --tokens or --variants fit ({error})")
    except (Exception, SystemExit) as error:  # the next precision may go
        traceback.print_exc()
        _fail(group, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    finally:  # the next precision needs the memory
        for model in built:
            model.release()
        built.clear()
        gc.collect()
        models.forget()
        torch.cuda.empty_cache()
    return group


def _fill(result, model, measured, on_gpu: bool) -> None:
    import torch

    from mhc_megatron.counting import flops
    from mhc_megatron.hardware import peak_tflops

    args, column = model.args, model.column
    try:
        result.flops = flops(args, column.mhc)
    except UserError as error:
        _say(f"no FLOPs: {error}")
    ranks = args.world_size // args.data_parallel_size
    result.tokens = model.part.tokens / ranks
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    # Peaks are of bf16 and FP8 products.
    result.peak_tflops = None if column.precision == "fp32" else peak_tflops(name, column.fp8)
    result.parameters, result.connections = model.parameters, model.connections
    result.resident, result.measured = model.resident, measured


def _vocabulary(group, built, part, options: argparse.Namespace) -> None:
    from training_bench import measure

    if not options.profile_steps or group.baseline is None:
        return
    model = next(m for m in built if m.column is group.baseline.column)
    args = model.args
    if args.world_size > 1 or args.mtp_num_layers or args.hybrid_layer_pattern:
        group.vocabulary_absent = "one GPU and a GPT model without multi-token prediction only"
        return
    try:
        found = measure.vocabulary(model, options.profile_steps)
        group.vocabulary = found and found.kernel_ms
    except Exception as error:  # the slice's own numbers stand without it
        traceback.print_exc()
        group.vocabulary_absent = f"{type(error).__name__}: {error}"


def _fail(group, why: str) -> None:
    for result in group.results:
        if result.measured is None:
            result.failed = " ".join(why.split())[:300]


# ------------------------------------------------------------------------------------- the edge


def _parser() -> Parser:
    parser = Parser(
        prog="bench_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML with Megatron's argument names")
    add("--layers", type=_positive, metavar="K", help="a slice of K layers on one pipeline stage")
    add("--variants", default="none,mhc", help="comma-separated (default none,mhc)")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one setting, as launch/pretrain.py takes it; may be repeated")  # fmt: skip
    add("--precision", help="comma-separated: bf16, fp8-delayed, fp8-current, fp8-blockwise; fp32")
    add("--peer", default="", help="also transformer-engine: its mHC kernels in our layer")
    add("--recompute", metavar="VALUE", help="mhc.recompute for the variants with connections")
    add("--transformer-impl", choices=("local", "transformer_engine"))
    add("--tokens", type=_positive, help="a step and data-parallel rank (default one sequence "
        "times micro-batch-size)")  # fmt: skip
    add("--microbatches", type=_positive, default=1, help="a step (default 1)")
    add("--optimizer", action="store_true", help="a step updates the weights too")
    add("--steps", type=_positive, default=20, help="timed, of each variant (default 20)")
    add("--profile-steps", type=int, default=3, help="of each variant, 0 for none (default 3)")
    add("--out", type=Path, help="folder for table, JSON, plot, traces and log (a new one)")
    add("--json", help="also write the JSON to this file")
    add("--plot", action=argparse.BooleanOptionalAction, default=True)
    add("--traces", action=argparse.BooleanOptionalAction, default=True,
        help="keep the last profiler trace of each variant")  # fmt: skip
    add("--verbose", action="store_true", help="Megatron's output on the terminal, not in a file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _check(options: argparse.Namespace, on_gpu: bool):
    """The slice and the columns that the options ask for.

    Raises:
        UserError: with what to change.
    """
    from training_bench import columns

    if options.profile_steps < 0:
        raise UserError(f"--profile-steps must not be negative, not {options.profile_steps}.")
    part = columns.cut(
        options.config,
        options.set,
        options.layers,
        options.tokens,
        options.microbatches,
        options.transformer_impl,
    )
    mhc: dict[str, Any] = part.settings.mhc.to_mapping()
    variants = [name for name in options.variants.split(",") if name]
    if options.recompute is not None:
        variants = [
            name if name.split(":")[0] == columns.BASELINE or ":recompute=" in name
            else f"{name}:recompute={options.recompute}"
            for name in variants
        ]  # fmt: skip
    precisions = (options.precision or ("bf16" if on_gpu else "fp32")).split(",")
    peers = [name for name in options.peer.split(",") if name]
    chosen = columns.columns(variants, precisions, peers, mhc)
    if not chosen:
        raise UserError("--variants names no column.")
    for column in chosen:
        if not on_gpu and (column.fp8 or column.peer):
            what = column.peer or column.precision
            raise UserError(f"{what} needs a CUDA GPU and Transformer Engine.")
    _check_files(options, columns.FILES)
    return part, chosen


def _check_files(options: argparse.Namespace, names: Sequence[str]) -> None:
    """That what is measured can be written. Raises UserError."""
    options.out = options.out or Path("runs", f"bench_training-{_this_run()}")
    try:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out: {options.out} is not a folder.")
        taken = [name for name in names if (options.out / name).exists()]
    except OSError as error:
        raise UserError(f"--out: cannot write to {options.out}: {error.strerror}.") from error
    if taken:
        raise UserError(
            f"--out: {options.out} already holds {', '.join(taken)}; choose another folder."
        )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json: the folder of {options.json} does not exist.")
    if options.json and Path(options.json).is_dir():
        raise UserError(f"--json: {options.json} is a folder.")


def _this_run() -> str:
    """A name that the ranks of a host share: those of torchrun have its process in common."""
    now = datetime.datetime.now()
    if "WORLD_SIZE" in os.environ:
        return f"{now:%Y%m%d}-{os.getppid()}"
    return f"{now:%Y%m%d-%H%M%S}"


def _redirect(options: argparse.Namespace, rank: int) -> TextIO:
    """The terminal, after everything that libraries print was sent to a log."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise UserError(f"--out: cannot write to {options.out}.")
        if options.verbose:
            return sys.stdout
        return redirect_output(str(options.out / f"rank-{rank}.log"))
    except OSError as error:
        raise UserError(f"--out: cannot write to {options.out}: {error.strerror}.") from error


def _header(arguments: list[str], options, part, on_gpu: bool) -> dict[str, str]:
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = part.settings
    values = settings.megatron
    changed = ", ".join(f"{key} {value}" for key, value in part.overrides.items())
    header = {
        "command": shlex.join(["tools/bench_training.py", *arguments]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "device": f"{torch.cuda.get_device_name()}, {world} of them" if on_gpu else "CPU",
        "software": _software(),
        "model": (
            f"{settings.run.name}: {part.layers} of {part.full_layers} layers, "
            f"C {values.get('hidden-size')}, sequence {values['seq-length']}; "
            f"{part.tokens} tokens a step and data-parallel rank in {part.microbatches} x "
            f"{values['micro-batch-size']} sequences"
        ),
        "changed": changed or "nothing",
        "step": "forward, backward" + (", optimizer" if options.optimizer else ""),
    }
    if on_gpu:
        header["method"] = (
            f"variants in turns, {options.steps} steps of each, median between CUDA events, spread "
            "= (p90 - p10) / median, 95 %: of the added time, rounds resampled; "
            f"kernels: median of {options.profile_steps} profiled steps, "
            "summed over kernels, copies and fills; of rank 0"
        )
    else:
        header["method"] = f"wall clock on the CPU, median of {options.steps}: a test of the bench"
    return header


def _software() -> str:
    from importlib import metadata

    import torch
    import triton

    from mhc_megatron.apex import apex

    found = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    for name in ("megatron-core", "transformer-engine"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"Apex: {apex()}"])


def _say(message: str) -> None:
    elapsed = time.monotonic() - _START
    print(f"[{elapsed:5.0f} s] {message}", file=_console or sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
