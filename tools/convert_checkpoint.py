#!/usr/bin/env python3
"""Convert, upcycle, inspect and verify checkpoints.

    tools/convert_checkpoint.py import-hf  Llama-3-8B/       checkpoints/llama
    tools/convert_checkpoint.py upcycle    checkpoints/llama checkpoints/llama-mhc
    tools/convert_checkpoint.py export-hf  runs/mhc/checkpoints served/
    tools/convert_checkpoint.py verify     served/

docs/checkpoints.md has an example of each command. A result appears whole or not at all; a command
that was stopped goes on where it was when it is given again. Bad input ends with one sentence and
exit code 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

_ROOT = Path(__file__).resolve().parents[1]
for _path in (_ROOT / "kernels", _ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch  # noqa: E402

from mhc_megatron.checkpoint import convert  # noqa: E402
from mhc_megatron.errors import Parser, UserError, quiet_pipe  # noqa: E402

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 with one sentence on stderr."""
    options = parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _interrupt(signum, frame) -> NoReturn:
    raise KeyboardInterrupt


def parser() -> Parser:
    """The command line."""
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return top


def _command(
    commands, name: str, run: Callable, help: str, *, output: bool = True
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=help, description=help)
    sub.set_defaults(run=run)
    if output:
        sub.add_argument("source", type=Path, help="folder to read")
        sub.add_argument("out", type=Path, help="folder to make")
        _running(sub)
    return sub


def _running(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes that write")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _dtype(sub: argparse.ArgumentParser, *names: str) -> None:
    sub.add_argument("--dtype", choices=names, help="cast weights; the error is reported")
    sub.add_argument(
        "--drop-mtp", action="store_true", help="leave out layers of multi-token prediction"
    )


def _write(plan: convert.Plan, options: argparse.Namespace) -> None:
    errors = convert.run(plan, options.out, workers=options.workers, quiet=options.quiet)
    print(f"wrote {options.out}: {len(plan.outputs)} tensors, {plan.nbytes / 1e9:.3f} GB")
    if errors:
        worst = max(errors, key=lambda key: errors[key].relative)
        total = convert.CastError(
            sum(e.error for e in errors.values()), sum(e.norm for e in errors.values())
        )
        print(
            f"cast of {len(errors)} tensors: relative error {total.relative:.2e}, "
            f"largest {errors[worst].relative:.2e} ({worst})"
        )


def _add_import_hf(commands) -> None:
    sub = _command(commands, "import-hf", import_hf, "Hugging Face safetensors -> torch_dist")
    _dtype(sub, "fp32", "bf16", "fp16")
    sub.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default=_default_impl(),
        help="whose names the norms of latent attention get (default: what is installed)",
    )


def _default_impl() -> str:
    import importlib.util

    return "transformer_engine" if importlib.util.find_spec("transformer_engine") else "local"


def import_hf(options: argparse.Namespace) -> None:
    """``import-hf``."""
    from mhc_megatron.checkpoint.huggingface import import_plan

    convert.check_target(options.out)
    plan = import_plan(
        options.source,
        dtype=DTYPES.get(options.dtype),
        transformer_impl=options.transformer_impl,
        drop_mtp=options.drop_mtp,
    )
    _write(plan, options)


def _add_export_hf(commands) -> None:
    sub = _command(commands, "export-hf", export_hf, "torch_dist -> Hugging Face safetensors")
    _dtype(sub, *DTYPES)
    sub.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="folder with config.json and tokenizer to keep",
    )
    sub.add_argument("--vocab-size", type=int, help="rows of the embedding that are not padding")


def export_hf(options: argparse.Namespace) -> None:
    """``export-hf``."""
    from mhc_megatron.checkpoint.huggingface import export_plan

    convert.check_target(options.out)
    plan = export_plan(
        options.source,
        dtype=DTYPES.get(options.dtype),
        hf_config=options.hf_config,
        vocab_size=options.vocab_size,
        drop_mtp=options.drop_mtp,
    )
    _write(plan, options)


def _mhc_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the configuration's mhc part, e.g. n=4 or exit=learned; may be repeated",
    )


def _mhc(options: argparse.Namespace):
    from mhc_megatron.config import MHCConfig

    values = {}
    for change in options.set:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, not {change!r}.")
        values[key] = _number(text)
    return MHCConfig.from_mapping(values)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _add_upcycle(commands) -> None:
    sub = _command(commands, "upcycle", upcycle, "residual torch_dist -> mHC, the same function")
    _mhc_options(sub)
    sub.add_argument(
        "--symmetry",
        choices=("rotate", "none"),
        default="rotate",
        help="how the streams are made to part (checkpoint/upcycle.py)",
    )
    sub.add_argument(
        "--drop-optimizer", action="store_true", help="weights only: the start of a new run"
    )


def upcycle(options: argparse.Namespace) -> None:
    """``upcycle``."""
    from mhc_megatron.checkpoint.upcycle import upcycle_plan

    convert.check_target(options.out)
    plan = upcycle_plan(
        options.source,
        _mhc(options),
        symmetry=options.symmetry,
        drop_optimizer=options.drop_optimizer,
    )
    _write(plan, options)


def _add_deepseek(commands) -> None:
    sub = _command(
        commands,
        "import-deepseek-v4",
        import_deepseek,
        "connections in DeepSeek-V4's layout (safetensors), laid over a torch_dist checkpoint",
    )
    sub.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="torch_dist checkpoint of the rest"
    )
    sub = _command(
        commands,
        "export-deepseek-v4",
        export_deepseek,
        "connections of a torch_dist checkpoint -> DeepSeek-V4's layout (safetensors)",
    )
    sub.add_argument(
        "--names",
        choices=("deepseek-v4", "transformers"),
        default="deepseek-v4",
        help="names of DeepSeek's checkpoints or of transformers' modules",
    )


def import_deepseek(options: argparse.Namespace) -> None:
    """``import-deepseek-v4``."""
    from mhc_megatron.checkpoint.layouts import import_deepseek_plan

    convert.check_target(options.out)
    _write(import_deepseek_plan(options.source, options.base), options)


def export_deepseek(options: argparse.Namespace) -> None:
    """``export-deepseek-v4``."""
    from mhc_megatron.checkpoint.layouts import export_deepseek_plan

    convert.check_target(options.out)
    _write(export_deepseek_plan(options.source, options.names), options)


LAYOUT_HELP = (
    "main: H_res is applied transposed (main; dev since May 2026); dev: it is not (dev before that)"
)


def _add_megatron(commands) -> None:
    for name, direction in (("import-megatron", "->"), ("export-megatron", "<-")):
        sub = _command(
            commands, name, megatron, f"Megatron-LM's own names of the connections {direction} ours"
        )
        sub.add_argument("--layout", choices=("main", "dev"), required=True, help=LAYOUT_HELP)
        sub.set_defaults(export=name.startswith("export"))


def megatron(options: argparse.Namespace) -> None:
    """``import-megatron`` and ``export-megatron``."""
    from mhc_megatron.checkpoint.layouts import megatron_plan

    convert.check_target(options.out)
    _write(megatron_plan(options.source, options.layout, export=options.export), options)


def _add_average(commands) -> None:
    sub = _command(commands, "average", average, "weighted mean of checkpoints", output=False)
    sub.add_argument("sources", type=Path, nargs="+", help="folders to read")
    sub.add_argument("--out", type=Path, required=True, help="folder to make")
    sub.add_argument("--weights", type=float, nargs="+", help="one for each, with sum 1")
    _running(sub)


def average(options: argparse.Namespace) -> None:
    """``average``."""
    from mhc_megatron.checkpoint.average import average_plan

    convert.check_target(options.out)
    _write(average_plan(options.sources, options.weights), options)


def _add_looking(commands) -> None:
    sub = _command(commands, "inspect", inspect, "what is in a checkpoint", output=False)
    sub.add_argument("source", type=Path)
    sub.add_argument("--all", action="store_true", help="list every tensor")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub = _command(commands, "diff", diff, "how two checkpoints differ (exit 1)", output=False)
    sub.add_argument("first", type=Path)
    sub.add_argument("second", type=Path)
    sub = _command(commands, "verify", verify, "whether a checkpoint is whole", output=False)
    sub.add_argument("source", type=Path)
    sub.add_argument("--record", action="store_true", help="write checksums.json after the check")


def inspect(options: argparse.Namespace) -> None:
    """``inspect``."""
    import json

    from mhc_megatron.checkpoint import inspection

    about = inspection.inspect(options.source)
    print(json.dumps(about, indent=1) if options.json else inspection.describe(about, options.all))


def diff(options: argparse.Namespace) -> int:
    """``diff``; 1 where the checkpoints differ."""
    from mhc_megatron.checkpoint import inspection

    count = 0
    for found in inspection.diff(options.first, options.second):
        print(f"{found.name}: {found.said}")
        count += 1
    print(f"{count} tensors differ" if count else "no tensor differs")
    return 1 if count else 0


def verify(options: argparse.Namespace) -> None:
    """``verify``."""
    from mhc_megatron.checkpoint import inspection
    from mhc_megatron.checkpoint.torch_dist import is_torch_dist, resolve

    counts = inspection.verify(options.source)
    if options.record:
        folder = options.source
        convert.write_checksums(resolve(folder) if is_torch_dist(folder) else folder)
    checked = f"{counts['files']} files by checksum, " if counts["files"] else ""
    print(f"{options.source} is whole: {checked}{counts['tensors']} tensors read")


COMMANDS = [
    _add_import_hf,
    _add_export_hf,
    _add_upcycle,
    _add_deepseek,
    _add_megatron,
    _add_average,
    _add_looking,
]

if __name__ == "__main__":
    sys.exit(main())
