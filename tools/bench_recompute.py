#!/usr/bin/env python3
"""Measure what recompute of blocks saves and costs: memory and time over L_r, against Eq. (20).

    python tools/bench_recompute.py                      # one GPU: dense and MoE layers of C = 2560
    python tools/bench_recompute.py --models dense --layers 4 --microbatches 2 --json out.json

Each row is a model of its own in this process: plain residuals (``none``), mHC that keeps
everything (``off``), and mHC with blocks of L_r sublayers, ``auto`` among them. m microbatches run
forward, then all backward, as on the first of m pipeline stages. Of a row are reported

- held: GiB allocated between the forwards and the backwards, beyond the residual model's;
- peak: the same at the worst moment of the backwards;
- Eq. (20): what the formula says of either. The residual model's own x and norm(x) of every
  sublayer, which mHC keeps no more, are added to what was measured, as the formula counts from
  nothing: nC ceil(L / L_r) m, and y of every sublayer; at the peak (n + 2) C L_r more;
- ms: of a forward and backward of one microbatch, and its ratio to ``off``.

The formula leaves out the coefficients (some 236 bytes a token and sublayer at n = 4) and, at the
peak, the gradients of the streams themselves (``off`` has those too). It counts the first x of the
block at hand twice, and a norm(u) beside u, which the kernels make in one.

Layers are Transformer Engine's where it is installed, Megatron's local ones otherwise. Exit code 0;
1 if a row failed (the others are printed all the same); 2 for bad arguments or no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from mhc_megatron.config import MHCConfig  # noqa: E402
from mhc_megatron.errors import Parser  # noqa: E402

GIB = 2**30
N, VOCABULARY = 4, 512
#: Fields of Megatron's configuration over ``transformer_config``'s.
MODELS = {
    "dense": {},
    "moe": {
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    },
}


@dataclass
class Row:
    """One model's measurements; bytes, milliseconds a microbatch."""

    model: str
    recompute: str
    L_r: int = 0
    held: int = 0
    peak: int = 0
    ms: float = math.nan
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench_recompute.py: needs a CUDA device.", file=sys.stderr)
        return 2
    _one_rank()
    rows = []
    for model in options.models:
        for recompute in ("none", "off", "auto", *map(str, options.L_r)):
            row = measure(options, model, recompute)
            rows.append(row)
            print(json.dumps(dataclasses.asdict(row)), file=sys.stderr, flush=True)
    print(table(options, rows), flush=True)  # before a file that may not be written
    if options.json:
        record = {"options": vars(options), "gpu": torch.cuda.get_device_name()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record | {"rows": [dataclasses.asdict(row) for row in rows]}, file, indent=1)
    return 1 if any(row.error for row in rows) else 0


def _parser() -> Parser:
    parser = Parser(prog="bench_recompute.py", description="Memory and time of recompute over L_r.")
    for name, default, what in (
        ("layers", 8, "layers, of two sublayers each"),
        ("hidden", 2560, "C"),
        ("ffn", 6912, "width of a dense feed-forward"),
        ("expert-ffn", 1536, "width of an expert"),
        ("heads", 20, "attention heads"),
        ("sequence", 4096, "tokens of a microbatch"),
        ("microbatches", 4, "m: forwards before the first backward"),
        ("rounds", 5, "measured repetitions, after two"),
    ):
        said = f"{what} ({default})"
        parser.add_argument(f"--{name}", type=_positive, default=default, help=said)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--L-r", dest="L_r", nargs="+", type=_positive, default=[1, 2, 4, 6, 8, 12, 16]
    )
    parser.add_argument("--json", metavar="FILE", type=_writable, help="write the rows there too")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _writable(text: str) -> str:
    """A file that can be written, as far as that shows before the measurement."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text}")
    return text


def _one_rank() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


# ----------------------------------------------------------------------------------------- measure


def measure(options: argparse.Namespace, model: str, recompute: str) -> Row:
    """A row; what goes wrong is in its ``error``."""
    row = Row(model, recompute)
    gpt = None
    try:
        gpt = build(options, model, recompute)
        row.L_r = _L_r(gpt)
        for _ in range(2):
            _step(options, gpt)
        steps = [_step(options, gpt) for _ in range(options.rounds)]
        row.held, row.peak = (max(step[i] for step in steps) for i in (0, 1))
        row.ms = sorted(step[2] for step in steps)[len(steps) // 2]
    except Exception as error:
        traceback.print_exc()
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    del gpt
    gc.collect()
    torch.cuda.empty_cache()
    return row


def build(options: argparse.Namespace, model: str, recompute: str) -> torch.nn.Module:
    """A GPTModel in bf16 whose parameters and their gradients are there before any measurement."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs

    from mhc_megatron.layer_spec import mhc_layer_spec
    from mhc_megatron.recompute import recomputes

    config = transformer_config(options, model)
    variant, L_r = ("none", 0) if recompute == "none" else ("mhc", recompute)
    mhc = MHCConfig(variant=variant, n=N, recompute=int(L_r) if str(L_r).isdecimal() else L_r)
    if has_transformer_engine():
        spec = specs.get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, moe_grouped_gemm=False
        )
    else:
        spec = specs.get_gpt_layer_local_spec(config.num_moe_experts, normalization="RMSNorm")
    gpt = GPTModel(
        config,
        mhc_layer_spec(spec, config, mhc),
        VOCABULARY,
        options.sequence,
        position_embedding_type="rope",
    )
    gpt = gpt.cuda().bfloat16()
    for blocks in recomputes(gpt):
        blocks.in_flight = lambda: options.microbatches  # as on a pipeline stage
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return gpt


def transformer_config(options: argparse.Namespace, model: str):
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = dict(MODELS[model])
    if model == "moe":
        settings["moe_ffn_hidden_size"] = options.expert_ffn
    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_attention_heads=options.heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        # The attention matrix of local layers would bury what is measured here.
        **({} if has_transformer_engine() else {"recompute_granularity": "selective"}),
        **settings,
    )


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _L_r(gpt: torch.nn.Module) -> int:
    from mhc_megatron.recompute import recomputes

    return next((blocks.L_r for blocks in recomputes(gpt)), 0)


def _step(options: argparse.Namespace, gpt: torch.nn.Module) -> tuple[int, int, float]:
    """Bytes held between forwards and backwards, bytes at the peak, milliseconds a microbatch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    tokens = torch.randint(VOCABULARY, (1, options.sequence), device="cuda")
    positions = torch.arange(options.sequence, device="cuda")[None]
    before = torch.cuda.memory_allocated()
    start.record()
    losses = [
        gpt(tokens, positions, None, labels=tokens).float().mean()
        for _ in range(options.microbatches)
    ]
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    while losses:
        losses.pop(0).backward()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return held, peak, start.elapsed_time(end) / options.microbatches


# ------------------------------------------------------------------------------------------- print


def formula(options: argparse.Namespace, L_r: int) -> tuple[int, int]:
    """Eq. (20) in bytes: held, at the peak. L_r = 0: what mHC keeps without recompute.

    That is x and u; the kernels make norm(u) with the read, in the place of u, or Transformer
    Engine makes it inside its linear, whose own affair it is.
    """
    L, m, width = 2 * options.layers, options.microbatches, options.sequence * options.hidden * 2
    if not L_r:
        kept = (N + 2) * L * m
        return kept * width, kept * width
    kept = (N * math.ceil(L / L_r) + L) * m
    return kept * width, (kept + (N + 2) * L_r) * width


def kept_by_residual(options: argparse.Namespace, model: str) -> int:
    """Bytes of x and norm(x) that the residual model keeps between its sublayers."""
    norms = 2 if not has_transformer_engine() else {"dense": 0, "moe": 1}[model]
    widths = (2 + norms) * options.layers * options.microbatches
    return widths * options.sequence * options.hidden * 2


def table(options: argparse.Namespace, rows: list[Row]) -> str:
    """GiB against the formula's, for every row that has a residual model beside it."""
    layers = "Transformer Engine" if has_transformer_engine() else "local"
    lines = [
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, {layers}: "
        f"{options.layers} layers, C {options.hidden}, sequence {options.sequence}, "
        f"m {options.microbatches}, n {N}, bf16; GiB beyond the residual model",
        f"{'model':6} {'L_r':>9} {'held':>7} {'Eq.20':>7} {'ratio':>6} "
        f"{'peak':>7} {'Eq.20':>7} {'ratio':>6} {'ms':>8} {'of off':>6}",
    ]
    by_key = {(row.model, row.recompute): row for row in rows}
    for row in rows:
        base, off = by_key.get((row.model, "none")), by_key.get((row.model, "off"))
        label = row.recompute if row.recompute != "auto" else f"auto={row.L_r}"
        if row.error:
            lines.append(f"{row.model:6} {label:>9} failed: {row.error}")
        elif row is base or base is None or base.error:
            lines.append(
                f"{row.model:6} {label:>9} {row.held / GIB:7.3f} {'':7} {'':6} "
                f"{row.peak / GIB:7.3f} {'':7} {'':6} {row.ms:8.2f} (all of its activations)"
            )
        else:
            lines.append(_line(options, row, base, off, label))
    return "\n".join(lines)


def _line(
    options: argparse.Namespace, row: Row, base: Row, off: Row | None, label: str
) -> str:
    own = kept_by_residual(options, row.model)
    by_formula = formula(options, row.L_r)
    cells = [f"{row.model:6} {label:>9}"]
    for measured, residual, expected in zip(
        (row.held, row.peak), (base.held, base.peak), by_formula, strict=True
    ):
        extra = measured - residual + own
        cells.append(f"{extra / GIB:7.3f} {expected / GIB:7.3f} {extra / expected:6.3f}")
    cells.append(f"{row.ms:8.2f} {row.ms / off.ms if off and not off.error else math.nan:6.3f}")
    return " ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
