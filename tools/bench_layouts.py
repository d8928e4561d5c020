#!/usr/bin/env python3
"""Several GPUs of one host: the parallel layouts, the overlap, and what mHC costs, over NCCL.

    tools/bench_layouts.py --out runs/layouts --minutes 7
    tools/bench_layouts.py --device cpu --quick --out /tmp/layouts      # gloo: a test of the bench

One command for 2, 4 or 8 GPUs; it takes all that are there. Three parts, each with a time of its
own; the last one has what is left of --minutes:

overlap   tools/bench_overlap.py: step time of the residual model and of mHC without overlap, with
          Megatron's, with ours and without each piece; NCCL's time and the exposed part of it.
training  tools/bench_training.py on a slice of the 27B model, on one GPU and on all of them with
          experts spread over them: the overhead of mHC, and tokens a second against one GPU's.
layouts   the rows of tests/distributed/layouts.py: three steps from the same weights as on one GPU,
          losses and gradient norms against one GPU's, for mHC and for plain Megatron beside it; in
          bf16 and FP8 with Transformer Engine's layers, in fp32 with Megatron's own.

A row that fails or hangs is ended and said; the others go on. Written to --out: table.txt,
results.json, log.txt.gz, and up to five traces (*.trace.json.gz). Exit code 0; 1 where a row or a
part failed; 2 for bad arguments or fewer than two GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
for _path in (str(_ROOT / "tools"), str(_ROOT / "kernels"), str(_ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from mhc_megatron.errors import Parser  # noqa: E402

# NVLink multicast can take a shared host's GPUs out of service; gloo meets on this host alone.
_VARIABLES = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",  # as torchrun sets it
}
PARTS = ("overlap", "training", "layouts")
#: Largest trace that is kept, in bytes.
TRACE_BYTES = 15 * 2**20
_START = time.monotonic()


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}.")
    try:
        re.compile(options.rows)
    except re.error as error:
        parser.error(f"--rows: {options.rows!r} is no regular expression: {error}.")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.gpus = options.gpus or _count(options.device)
    if options.gpus < 2:
        parser.error("it takes at least two GPUs; --device cpu --quick tests the bench itself.")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"--out: {options.out} is there and not an empty folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ |= _VARIABLES
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    options.until = _START + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="layouts-") as scratch:
        options.scratch, options.log = Path(scratch), Path(scratch, "log.txt")
        options.crew = None
        try:
            return _all(options)
        finally:
            if options.crew is not None:
                options.crew.close()


def _parser() -> Parser:
    parser = Parser(
        prog="bench_layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="small shapes and few rows")
    add("--gpus", type=int, help="the first so many (default all; two processes on a CPU)")
    add("--minutes", type=float, default=7.0, help="for everything (default 7)")
    add("--parts", default=",".join(PARTS), help="comma-separated, in their order")
    add("--overlap-seconds", type=float, default=155.0)
    add("--overlap-rounds", type=int, default=5, help="measurements of a row of the overlap")
    add("--overlap-hop-ctas", type=int, default=4,
        help="NCCL's blocks for a hop in the overlap's second run on four GPUs or more")
    add("--overlap-layers", type=int, default=2, help="of a chunk of the overlap's model")
    add("--overlap-tokens", type=int, default=12288, help="of its microbatches")
    add("--training-seconds", type=float, default=115.0)
    add("--row-seconds", type=float, default=90.0, help="of a row of the layouts")
    add("--rows", default="", metavar="REGEX", help="of the layouts: only rows whose name has it")
    add("--layers", type=int, default=4, help="of the training slice")
    add("--tokens", type=int, default=16384, help="of the training slice, a GPU")
    return parser


def _count(device: str) -> int:
    import torch

    return 2 if device == "cpu" else torch.cuda.device_count()


def _all(options: argparse.Namespace) -> int:
    parts: dict[str, Callable] = {"overlap": overlap, "training": training, "layouts": layouts}
    results: dict[str, Any] = {"header": _header(options)}
    text = [f"{key}: {value}" for key, value in results["header"].items()]
    failed = False
    for name in (part for part in PARTS if part in options.parts):
        began = time.monotonic()
        print(f"[{began - _START:4.0f} s] {name}", flush=True)
        found: dict[str, Any] = {"lines": [], "failed": True}
        try:
            parts[name](options, found)
        except Exception as error:
            traceback.print_exc()
            found["lines"].append(f"{name} failed: {type(error).__name__}: {error}")
            found["failed"] = True
        lines = found.pop("lines")
        failed = failed or found["failed"]
        results[name] = found
        text += ["", f"--- {name}, {time.monotonic() - began:.0f} s", *lines]
        _write(options, results, text)
    print("\n".join(text), flush=True)
    return 1 if failed else 0


def _header(options: argparse.Namespace) -> dict[str, str]:
    from importlib import metadata

    import torch

    if options.device == "cpu":
        device = f"{options.gpus} processes on a CPU"
    else:
        # Another process asks: one that has CUDA open here would hold memory on a GPU.
        device = f"{options.gpus} x {_device_name()}"
    software = [f"torch {torch.__version__}"]
    for name in ("megatron-core", "transformer-engine", "triton"):
        try:
            software.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            software.append(f"no {name}")
    return {
        "command": shlex.join(["tools/bench_layouts.py", *sys.argv[1:]]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "device": device,
        "software": ", ".join(software),
    }


def _device_name() -> str:
    import subprocess

    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "GPU"


def _write(options: argparse.Namespace, results: dict[str, Any], text: list[str]) -> None:
    """After every part: what breaks off keeps what it has."""
    (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (options.out / "table.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    if options.log.exists():
        with options.log.open("rb") as log, gzip.open(options.out / "log.txt.gz", "wb") as out:
            out.write(log.read()[-8_000_000:])


def _keep_traces(options: argparse.Namespace, folder: Path, prefix: str = "") -> None:
    for path in sorted(folder.glob("*.trace.json.gz")) + sorted(folder.glob("trace-*.json.gz")):
        if len(list(options.out.glob("*.trace.json.gz"))) < 5 and (
            path.stat().st_size < TRACE_BYTES
        ):
            stem = path.name.removesuffix(".json.gz").removesuffix(".trace").removeprefix("trace-")
            shutil.copyfile(path, options.out / f"{prefix}{stem}.trace.json.gz")


def _left(options: argparse.Namespace, seconds: float) -> float:
    """So many seconds, or those until the end where they are fewer."""
    return max(1.0, min(seconds, options.until - time.monotonic() - 5))


# ----------------------------------------------------------------------------------------- overlap


def overlap(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Every layout in processes of its own: one that hangs leaves the others."""
    from layouts_bench import ranks

    found["layouts"], errors = {}, []
    end = time.monotonic() + _left(options, options.overlap_seconds)
    runs = _overlap_runs(options)
    for number, (words, share) in enumerate(runs):
        seconds = (end - time.monotonic()) * share
        folder = options.scratch / f"overlap-{number}"
        command = [str(_ROOT / "tools" / "bench_overlap.py"), "--out", str(folder), *words]
        command += ["--device", options.device, "--rounds", str(options.overlap_rounds)]
        # A round or a profile that began goes on to its end.
        command += ["--seconds", f"{0.85 * seconds:.0f}"]
        command += ["--layers", str(options.overlap_layers)]
        command += ["--tokens", str(options.overlap_tokens)]
        if options.quick:
            command.append("--quick")
        error = ranks.run(
            command, options.gpus, seconds, options.log, CUDA_DEVICE_MAX_CONNECTIONS="32"
        )
        for name, section in (("results.json", "NCCL"), ("partial.json", None)):
            if (path := folder / name).exists():
                read = json.loads(path.read_text(encoding="utf-8"))
                read = read.get(section, {}) if section else read
                found["layouts"] |= {of["what"]: of for of in read.values()}
        if error:
            errors.append(f"{' '.join(words)}: {error}")
        _keep_traces(options, folder, f"{number}-" if number else "")
    import bench_overlap

    for of in found["layouts"].values():
        found["lines"] += bench_overlap.nccl_table(of["what"], of["rows"])
    found["lines"] += [f"failed: {error}" for error in errors]
    found["errors"], found["failed"] = errors, bool(errors)


def _overlap_runs(options: argparse.Namespace) -> list[tuple[list[str], float]]:
    """Words for bench_overlap.py, and the share of the time that is left.

    As overlap_bench.pipeline.layouts has them: one layout of a multiple of four GPUs, which runs
    again with hops that take fewer multiprocessors; two of two, the first of which has fewer rows.
    """
    if options.gpus % 4:
        return [(["--layout", "0"], 0.45), (["--layout", "1"], 1.0)]
    fewer = ["--layout", "0", "--hop-ctas", str(options.overlap_hop_ctas), "--no-pieces"]
    return [(["--layout", "0"], 0.62), (fewer, 1.0)]


# ---------------------------------------------------------------------------------------- training


def training(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The slice on one GPU, then on all; with half of the tokens where those do not fit."""
    end = time.monotonic() + _left(options, options.training_seconds)
    if options.device == "cuda" and "layouts" in options.parts:
        _crew(options)
    tokens, error = options.tokens, ""
    for attempt in range(2):
        one, error = _slice(options, 1, tokens, end)
        if not error or attempt or options.device == "cpu":
            break
        found["lines"].append(f"one GPU, {tokens} tokens: {error}")
        tokens //= 2
    many, many_error = _slice(options, options.gpus, tokens, end)
    found |= {"one": one, "all": many}
    found["lines"] += _training_table(options, one, many)
    errors = [text for text in (error, many_error) if text]
    found["lines"] += [f"failed: {text}" for text in errors]
    found["errors"], found["failed"] = errors, bool(errors)


def _slice(
    options: argparse.Namespace, world: int, tokens: int, end: float
) -> tuple[dict[str, Any] | None, str]:
    """What bench_training wrote, its tokens a second those of one rank; and why it failed."""
    from layouts_bench import ranks

    cpu = options.device == "cpu"
    folder = options.scratch / f"training-{world}-{tokens}"
    command = [str(_ROOT / "tools" / "bench_training.py"), "--out", str(folder), "--no-plot"]
    command += ["--variants", "none,mhc"]
    if cpu:
        command += ["--config", str(_ROOT / "configs" / "tiny.yaml"), "--layers", "2"]
        command += ["--steps", "2"]
        small = ("hidden-size=32", "ffn-hidden-size=64", "num-attention-heads=2", "seq-length=32",
                 "max-position-embeddings=32")  # fmt: skip
        for change in small:
            command += ["--set", change]
    else:
        command += ["--config", str(_ROOT / "configs" / "mhc-27b.yaml")]
        command += ["--layers", str(options.layers), "--tokens", str(tokens)]
        command += ["--steps", "10", "--profile-steps", "2", "--recompute", "auto"]
        command += ["--set", "moe-router-force-load-balancing=true"]
    seconds = end - time.monotonic()
    if seconds < 20:
        return None, f"{world} ranks: no time left"
    if world == 1:
        seconds *= 0.6  # the other half is for all of them
    variables = {"CUDA_VISIBLE_DEVICES": "" if cpu else "0"} if world == 1 else {}
    error = ranks.run(
        command, world, seconds, options.log, CUDA_DEVICE_MAX_CONNECTIONS="1", **variables
    )
    for log in sorted(folder.glob("rank-*.log"))[:2]:
        with options.log.open("ab") as out:
            out.write(f"\n=== {log.name}\n".encode() + log.read_bytes()[-200_000:])
    path = folder / "bench_training.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if result is not None and world > 1:
        _read_links(folder, result)
        _keep_traces(options, folder, "training-")
    if result is not None:
        broken = [c["failed"] for group in result["groups"] for c in group["columns"]]
        error = error or " ".join(filter(None, broken))
    return result, f"{world} ranks: {error}" if error else ""


def _read_links(folder: Path, result: dict[str, Any]) -> None:
    """NCCL's time and what of it is exposed, of rank 0's trace of each column."""
    from dataclasses import asdict

    from overlap_bench.exposed import links
    from training_bench.trace import file_name

    for group in result["groups"]:
        for column in group["columns"]:
            path = folder / file_name(group["precision"], column["label"])
            if path.exists():
                column["links"] = asdict(links(path))


def _training_table(options, one: dict[str, Any] | None, many: dict[str, Any] | None) -> list[str]:
    lines = []
    if one or many:
        lines.append((one or many)["model"])
    lines.append(
        f"{'':32s}{'step ms':>10s}{'tokens/s':>12s}{'added, step':>13s}{'kernels ms':>12s}"
        f"{'added, kern.':>13s}{'NCCL ms':>9s}{'exposed':>9s}{'efficiency':>12s}"
    )
    rates = {c["label"]: c.get("tokens_per_s") for c in _columns(one)}
    for name, run in (("1 rank", one), (f"{options.gpus} ranks", many)):
        world = 1 if name == "1 rank" else options.gpus
        for c in _columns(run):
            if c["failed"] or "step_ms" not in c:
                lines.append(f"{c['label']}, {name}: failed: {c['failed']}")
                continue
            profile, links = c.get("profile"), c.get("links")
            cells = [
                f"{c['step_ms']['median']:10.2f}",
                f"{world * c['tokens_per_s']:12,.0f}",
                f"{_percent(c['overhead']['step']):>13s}",
                f"{profile['kernel_ms']:12.2f}" if profile else f"{'-':>12s}",
                f"{_percent(c['overhead']['kernels']):>13s}",
                f"{links['nccl']:9.2f}{links['exposed']:9.2f}" if links else f"{'-':>9s}{'-':>9s}",
            ]
            if world > 1 and rates.get(c["label"]):
                cells.append(f"{100 * c['tokens_per_s'] / rates[c['label']]:10.1f} %")
            lines.append(f"{c['label'] + ', ' + name:32s}{''.join(cells)}")
    return lines


def _columns(run: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [column for group in run["groups"] for column in group["columns"]] if run else []


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.2f} %"


# ----------------------------------------------------------------------------------------- layouts


def layouts(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """All rows that there is time for, each beside its reference on one GPU."""
    from layouts_bench import plan

    entries = plan.entries(options.gpus, options.quick)
    entries = [entry for entry in entries if re.search(options.rows, entry.name)]
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, Any] = {}

    def done(task, outcome) -> None:
        outcomes[task.name] = outcome
        entry = next((e for e in entries if e.name == task.name), None)
        if entry is not None:
            rows.append(_row(entry, outcomes.get(plan.family(entry)), outcome))
            line = _row_line(rows[-1])
        else:
            line = f"reference {task.name}: {outcome.error or f'{outcome.seconds:.1f} s'}"
        print(f"[{time.monotonic() - _START:4.0f} s] {line[:180]}", flush=True)

    with _crew(options) as crew:
        crew.run(_tasks(options, entries), options.until - 8, done)
        _without_connections(options, crew, entries, rows)
    told = {row["name"] for row in rows}
    skipped = [entry.name for entry in entries if entry.name not in told]
    found |= {"rows": rows, "skipped": skipped}
    found["references"] = {
        name: {"seconds": o.seconds, "error": o.error}
        for name, o in outcomes.items() if name not in told
    }  # fmt: skip
    found["lines"] += _layouts_table(rows, skipped)
    found["failed"] = any(not row["ok"] for row in rows) or not rows


def _without_connections(options: argparse.Namespace, crew, entries: list, rows: list) -> None:
    """Say of each row that failed whether plain Megatron fails there too."""
    from layouts_bench.crew import Task

    broken = {row["name"]: row for row in rows
              if "mhc" not in row and not row["error"].startswith("no reference")}  # fmt: skip
    tasks = [
        Task(entry.name, entry.world, _job(options, entry) | {"variants": ["none"]})
        for entry in entries
        if entry.name in broken
    ]

    def done(task, outcome) -> None:
        last = (outcome.error.strip().splitlines() or ["trains"])[-1]
        broken[task.name]["plain_alone"] = last
        print(f"[{time.monotonic() - _START:4.0f} s] {task.name}, plain alone: {last[:120]}")

    crew.run(tasks, options.until - 8, done)


def _crew(options: argparse.Namespace):
    """The processes of the layouts; made once, maybe before their turn, as imports take long."""
    from layouts_bench.crew import Crew

    if options.crew is None:
        slow = 4 if options.device == "cpu" else 1
        options.crew = Crew(
            options.gpus, options.device, options.log, slow * options.row_seconds,
            first=slow * 75, spare=options.device == "cuda",
        )  # fmt: skip
    return options.crew


def _tasks(options: argparse.Namespace, entries: list) -> list:
    """References before what needs them: those of a dozen rows at a time, then the rows."""
    from layouts_bench import plan
    from layouts_bench.crew import Task

    tasks, made = [], set()
    for start in range(0, len(entries), 12):
        some = entries[start : start + 12]
        for entry in some:
            name = plan.family(entry)
            if name not in made:
                made.add(name)
                weights = {"save_initial": _weights(options, name)}
                tasks.append(Task(name, 1, plan.reference(entry, options.device) | weights))
        tasks += [
            Task(entry.name, entry.world, _job(options, entry), after=plan.family(entry))
            for entry in some
        ]
    return tasks


def _job(options: argparse.Namespace, entry) -> dict[str, Any]:
    """A row's job, which begins with its reference's weights."""
    from layouts_bench import plan

    return plan.job(entry, options.device) | {"load": _weights(options, plan.family(entry))}


def _weights(options: argparse.Namespace, name: str) -> str:
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return str(options.scratch / "weights" / safe)


def _row(entry, reference, outcome) -> dict[str, Any]:
    """A line of the table as data."""
    from tests.distributed.compare import differences, losses

    row: dict[str, Any] = {
        "name": entry.name, "kind": entry.row.kind, "layout": entry.row.layout,
        "precision": entry.precision, "ranks": entry.world, "tolerance": entry.tolerance,
        "seconds": outcome.seconds, "error": outcome.error, "ok": False,
    }  # fmt: skip
    if outcome.value is None:
        return row
    one, many = reference.value, outcome.value
    row["losses"] = losses(many, "mhc")
    row["grad_norm"] = many[0]["mhc"]["grad_norm"]
    for variant in ("mhc", "none"):
        loss, norm = differences(one, many, variant)
        row[variant] = {"loss_error": loss, "grad_norm_error": norm}
    row["ok"] = all(error <= entry.tolerance for error in row["mhc"].values())
    return row


def _row_line(row: dict[str, Any]) -> str:
    if "mhc" not in row:
        last = row["error"].splitlines()[-1] if row["error"] else ""
        return f"{row['name']:62s} FAILED: {last[:120]}"
    ours, plain = row["mhc"], row["none"]
    return (
        f"{row['name']:62s} loss {' '.join(f'{x:.4f}' for x in row['losses'])}  "
        f"mHC {ours['loss_error']:.0e} {ours['grad_norm_error']:.0e}  "
        f"plain {plain['loss_error']:.0e} {plain['grad_norm_error']:.0e}"
        f"{'' if row['ok'] else '  OVER'}"
    )


def _layouts_table(rows: list[dict[str, Any]], skipped: list[str]) -> list[str]:
    good, broken = sum(row["ok"] for row in rows), [row for row in rows if "mhc" not in row]
    lines = [
        f"{good} of {len(rows)} rows within their tolerance; {len(broken)} failed; "
        f"{len(skipped)} had no time",
        "largest relative difference to one GPU over three steps: of a loss, of a gradient norm; "
        "for mHC and for plain Megatron; OVER: beyond 2e-2 in bf16, 5e-2 in FP8, 1e-4 in fp32, "
        "0 for recompute on one rank",
    ]
    lines += [_row_line(row) for row in rows]
    for row in broken:
        lines += [f"{row['name']}:", *(f"    {line}" for line in row["error"].splitlines()[-6:])]
        if "plain_alone" in row:
            lines.append(f"    plain Megatron alone: {row['plain_alone'][:200]}")
    if skipped:
        lines.append(f"no time: {'; '.join(skipped)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
