#!/usr/bin/env python3
"""Submit a job to Slurm: pretraining, a sweep of layouts, a conversion.

    launch/submit.py --config configs/mhc-27b.yaml --nodes 32 --profile h800 --dry-run
    launch/submit.py --config configs/mhc-27b.yaml --nodes 32 --profile h800 --chain 5
    launch/submit.py --sweep launch/slurm/sweep.example.yaml --nodes 2 --profile h100
    launch/submit.py --profile h100 --convert -- upcycle checkpoints/llama checkpoints/llama-mhc

What the site asks for comes from launch/slurm/site.yaml (--site); site.example.yaml explains it.
--dry-run prints the script and submits nothing. --chain N submits the same run N times: Slurm
starts one after the other (--dependency=singleton), each goes on from the last checkpoint, and
those left over when the run is complete end at once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch.cluster import PROFILES, ROOT, Job, Site, check_layout, load_site, render  # noqa: E402
from launch.settings import load  # noqa: E402
from mhc_megatron.errors import UserError, quiet_pipe  # noqa: E402

SITE = os.path.join(_ROOT, "launch", "slurm", "site.yaml")


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:end])
    options.words = words[end + 1 :]
    try:
        site = load_site(options.site or (SITE if os.path.exists(SITE) else None))
        script = render(job := _job(options, site), site)
        if options.dry_run:
            sys.stdout.write(script)
            return 0
        for _ in range(options.chain):
            print(submit(script, job.run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--config", help="pretrain: YAML with Megatron's argument names")
    kind.add_argument("--sweep", help="measure layouts: YAML as launch/slurm/sweep.example.yaml")
    kind.add_argument(
        "--convert", action="store_true", help="tools/convert_checkpoint.py; its arguments after --"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--profile", choices=PROFILES, required=True, help="the GPU")
    parser.add_argument("--site", help="what the site asks for (launch/slurm/site.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run-dir", help="the run's folder")
    parser.add_argument("--time", help="time limit, over the site's")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="submit N links")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    return parser


def _job(options: argparse.Namespace, site: Site) -> Job:
    for key in ("nodes", "chain"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key} must be at least 1.")
    common = {"nodes": options.nodes, "profile": options.profile, "time": options.time}
    if bool(options.words) != options.convert:
        raise UserError("--convert takes the arguments of tools/convert_checkpoint.py after --.")
    if options.convert:
        relative = [word for word in options.words if not os.path.isabs(word)]
        if os.path.realpath(".") != os.path.realpath(ROOT) and any(map(os.path.exists, relative)):
            raise UserError(f"the job runs in {ROOT}: give --convert absolute paths.")
        folder = os.path.abspath(options.run_dir or os.path.join("runs", "convert"))
        return Job("convert", "convert", run_dir=folder, convert=options.words, **common)
    if options.sweep:
        from launch.sweep import read

        sweep = read(options.sweep)
        folder = os.path.abspath(options.run_dir or os.path.join("runs", sweep.name))
        path = os.path.abspath(options.sweep)
        return Job("sweep", sweep.name, run_dir=folder, sweep=path, **common)
    settings = load(options.config, options.set)
    check_layout(settings, options.nodes * site.ranks_per_node)
    folder = os.path.abspath(options.run_dir or settings.run.dir)
    return Job(
        "pretrain",
        settings.run.name,
        run_dir=folder,
        config=os.path.abspath(options.config),
        settings=settings,
        changes=options.set,
        dependency="singleton",
        **common,
    )


def submit(script: str, run_dir: str) -> str:
    """Give the script to sbatch; the job's number.

    Raises:
        UserError: there is no sbatch, or it refuses.
    """
    try:
        os.makedirs(os.path.join(run_dir, "logs"), exist_ok=True)
        result = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise UserError("there is no sbatch here: submit from a login node of a Slurm.") from error
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}.") from error
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"sbatch refuses: {re.sub(r'^sbatch: (error: )?', '', said[0])}")
    return result.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    sys.exit(main())
