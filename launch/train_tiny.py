#!/usr/bin/env python3
"""`make train`: a small GPT with plain residuals and with mHC, same seed and data, and a report.

Takes the Python standard library's sources for its corpus, runs ``launch/pretrain.py`` twice and
``tools/report.py`` on both. What is there already is not done again; a run that was stopped goes
on. Options go in as ``make train ARGS="--runs runs/long --set train-iters=2000"``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Name of the run -> its residual connection. The first is what the report compares with.
RUNS = {"residual": "none", "mhc": "mhc"}
#: With --hc also the unconstrained connection, whose gains grow.
HC = {"hc": "hc"}


def main() -> int:
    options = _parser().parse_args()
    began = time.time()
    steps = [("corpus", _corpus_command(options.data))] if _needs_corpus(options.data) else []
    runs = RUNS | (HC if options.hc else {})
    for name, variant in runs.items():
        folder = os.path.join(options.runs, name)
        if not options.set and _is_complete(folder):
            print(f"{name}: already trained in {folder} (remove it to train again)", flush=True)
        else:
            steps.append((name, _pretrain_command(options, name, variant, folder)))
    report = [sys.executable, os.path.join(ROOT, "tools", "report.py")]
    report += [os.path.join(options.runs, name) for name in runs]
    report += ["--out", os.path.join(options.runs, "report"), "--title", "mHC and plain residuals"]
    steps.append(("report", report))
    for name, command in steps:
        print(f"--- {name}", flush=True)
        code = _run(command)
        if code or _was_stopped(options.runs, name):
            return code
    print(f"done in {time.time() - began:.0f} s; open the report in a browser")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "tiny.yaml"))
    parser.add_argument("--data", default="data/stdlib", metavar="PREFIX", help="indexed corpus")
    parser.add_argument("--runs", default="runs/tiny", metavar="DIR", help="folder of the two runs")
    parser.add_argument("--hc", action="store_true", help="train the unconstrained variant too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def _needs_corpus(prefix: str) -> bool:
    return not all(os.path.exists(prefix + end) for end in (".bin", ".idx", ".json"))


def _corpus_command(prefix: str) -> list[str]:
    tool = os.path.join(ROOT, "tools", "prepare_data.py")
    return [sys.executable, tool, "--stdlib", "--output", prefix]


def _pretrain_command(
    options: argparse.Namespace, name: str, variant: str, folder: str
) -> list[str]:
    command = [sys.executable, os.path.join(ROOT, "launch", "pretrain.py")]
    command += ["--config", options.config, "--run-dir", folder]
    changes = [f"run.name={name}", f"mhc.variant={variant}", f"data-path=[{options.data}]"]
    for change in (*changes, *options.set):
        command += ["--set", change]
    return command


def _run(command: list[str]) -> int:
    """Run ``command``; it gets the terminal's Ctrl-C itself and saves, so wait for it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _was_stopped(runs: str, name: str) -> bool:
    """Whether the run that just ended was asked to stop before its last iteration."""
    return name in RUNS | HC and not _is_complete(os.path.join(runs, name))


def _is_complete(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
            last = json.loads(f.readlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return last.get("event") == "exit" and last.get("reason") == "complete"


if __name__ == "__main__":
    sys.exit(main())
