"""Megatron's own schedules over real links: expert parallelism, an interleaved pipeline, or both.

Four models of the same shape stand side by side on every rank: plain residual and with
hyper-connections, each built with the overlap of expert communication and without. The rows of a
layout take turns on them.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline import widen_pipeline

from .exposed import Links, links
from .model import Shape, chunk, configuration, leave_out
from .wire import host_time

VPP = 2
#: Pieces of the schedule that a run may leave out (``mhc_megatron/overlap.py``).
PIECES = ("mixing_stream", "gradient_wait", "hop_streams", "open_end")


@dataclass(frozen=True)
class Layout:
    """Expert-parallel ranks, and pipeline stages of ``VPP`` chunks (one stage: no pipeline)."""

    ep: int = 1
    pp: int = 1

    @property
    def name(self) -> str:
        parts = [f"EP{self.ep}"] if self.ep > 1 else []
        return " x ".join(parts + ([f"PP{self.pp} x VPP{VPP}"] if self.pp > 1 else [])) or "one"

    @property
    def chunks(self) -> int:
        return VPP if self.pp > 1 else 1

    @property
    def microbatches(self) -> int:
        return 4 * max(2, self.pp)


def layouts(world: int) -> list[Layout]:
    """What is measured on ``world`` ranks: both links where they fit, else one after the other."""
    if world % 4 == 0:
        return [Layout(world // 2, 2)]
    return [Layout(ep=world), Layout(pp=world)]


@dataclass(frozen=True)
class Row:
    """One line of the table: a model and its schedule.

    Attributes:
        name: what a reader calls it.
        residual: Megatron's own GPTModel.
        overlapped: with the combined 1F1B schedule.
        without: pieces of ours that are left out, comma-separated.
    """

    name: str
    residual: bool = False
    overlapped: bool = True
    without: str = ""


WHOLE = Row("mHC, our overlap")
ROWS = [
    Row("residual, no overlap", residual=True, overlapped=False),
    Row("residual, Megatron's overlap", residual=True),
    Row("mHC, no overlap", overlapped=False),
    Row("mHC, Megatron's own placing", without=",".join(PIECES)),
    WHOLE,
    *(Row(f"mHC, ours without {piece}", without=piece) for piece in PIECES),
]


def rows(layout: Layout) -> list[Row]:
    """Megatron's own overlap wants several expert-parallel ranks; the pieces of hops, hops."""
    found = [row for row in ROWS if layout.ep > 1 or not (row.residual and row.overlapped)]
    if layout.pp > 1:
        return found
    return [row for row in found if row.without in ("", "mixing_stream") or "," in row.without]


class Allocator(NamedTuple):
    """What the allocator did in a step, the most of any rank: how often it gave memory back to
    find some, and how often it asked the driver for more."""

    retries: int
    allocations: int


class Models:
    """The models of a layout on this rank; ``step`` runs a row's step.

    Args:
        shape: of one chunk; its experts are those of one rank.
        layout: makes Megatron's process groups, which ``close`` ends.
        cpu: over gloo, with Megatron's own layers.
        hop_ctas: the most blocks of NCCL's kernels between stages; None for NCCL's choice.
        pieces: whether ``rows`` has those with pieces left out.
    """

    def __init__(
        self, shape: Shape, layout: Layout, cpu: bool, hop_ctas: int | None, pieces: bool
    ) -> None:
        self.shape, self.layout, self.cpu, self.hop_ctas = shape, layout, cpu, hop_ctas
        self.rows = [row for row in rows(layout) if pieces or row.without not in PIECES]
        pipeline = {"virtual_pipeline_model_parallel_size": VPP} if layout.pp > 1 else {}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as limits:
            if hop_ctas is not None:
                limits.write(f"pp: {{max_ctas: {hop_ctas}, min_ctas: 1}}\n")
                limits.flush()
                pipeline["nccl_communicator_config_path"] = limits.name
            parallel_state.initialize_model_parallel(
                pipeline_model_parallel_size=layout.pp,
                expert_model_parallel_size=layout.ep,
                **pipeline,
            )
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        self._built: dict[tuple[bool, bool], list] = {}
        for row in self.rows:
            kind = row.residual, row.overlapped
            if kind not in self._built:
                self._built[kind] = self._build(*kind)

    def _build(self, residual: bool, overlapped: bool) -> list:
        shape, layout = self.shape, self.layout
        changes: dict[str, Any] = {"num_layers": shape.layers * layout.pp * layout.chunks}
        if not shape.dense:
            changes |= {
                "num_moe_experts": shape.experts * layout.ep,
                "expert_model_parallel_size": layout.ep,
            }
        if layout.pp > 1:
            changes |= {
                "pipeline_model_parallel_size": layout.pp,
                "virtual_pipeline_model_parallel_size": VPP,
                "overlap_p2p_comm": True,
                "batch_p2p_comm": False,
                "deallocate_pipeline_outputs": True,
            }
        config = configuration(shape, self.cpu, **changes)
        config.overlap_moe_expert_parallel_comm = overlapped
        mhc = MHCConfig(variant="none" if residual else "mhc")
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        end = layout.chunks - 1
        bare = [
            chunk(config, mhc, shape.tokens, first and i == 0, last and i == end,
                  vp_stage=i if layout.pp > 1 else None)
            for i in range(layout.chunks)
        ]  # fmt: skip
        for model in bare:
            for parameter in model.parameters():
                set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            if not self.cpu:
                model.cuda().bfloat16()
        return widen_pipeline(bare, mhc)

    def describe(self) -> str:
        """The layout in words."""
        return (
            f"{self.layout.name}, {self.shape.layers} layers a chunk, {self.layout.microbatches} "
            f"microbatches of {self.shape.tokens} tokens, C {self.shape.hidden}, "
            f"{self.shape.experts} experts a rank"
            f"{'' if self.hop_ctas is None else f', hops of at most {self.hop_ctas} CTAs'}"
        )

    def step(self, row: Row) -> tuple[float, Allocator]:
        """Milliseconds of a step, forward and backward, of the slowest rank.

        A step that is not timed goes before it: the row before leaves memory in other sizes and
        other streams' pools.
        """
        self._run(row)
        before = _allocator()
        ms = self._run(row)
        did = [now - then for now, then in zip(_allocator(), before, strict=True)]
        return _over_ranks(ms, max), Allocator(*(int(_over_ranks(each, max)) for each in did))

    def reserved(self) -> float:
        """GiB that the allocator holds, the most of any rank."""
        held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return _over_ranks(held / 2**30, max)

    def _run(self, row: Row) -> float:
        """This rank's milliseconds; all begin when the last one is ready."""
        models = self._built[row.residual, row.overlapped]
        if not row.residual:
            leave_out(models, row.without)
        dist.barrier()
        torch.cuda.synchronize()
        begin = host_time()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[None] * len(models),
            model=models,
            num_microbatches=self.layout.microbatches,
            seq_length=self.shape.tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        torch.cuda.synchronize()
        ms = host_time() - begin
        for model in models:
            model.zero_grad(set_to_none=True)
        return ms

    def profiled(self, row: Row, keep: Path | None) -> Links:
        """What the links did in a step, the mean over ranks; rank 0's trace goes to ``keep``."""
        from torch.profiler import ProfilerActivity, profile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                self._run(row)
            profiler.export_chrome_trace(str(path))
            found = links(path, after_barrier=True)
            if keep is not None and dist.get_rank() == 0:
                keep.write_bytes(path.read_bytes())
        return Links(*(_over_ranks(value, statistics.fmean) for value in found.values()))

    def _forward(self, data_iterator, model, return_schedule_plan: bool = False):
        device = "cpu" if self.cpu else "cuda"
        tokens = torch.arange(self.shape.tokens, device=device)[None] % 1000
        run = model.build_schedule_plan if return_schedule_plan else model
        mask = None
        out = run(tokens, tokens, mask, labels=tokens.roll(-1, 1))
        return out, _loss

    def close(self) -> None:
        """Give memory and process groups back."""
        self._built.clear()
        parallel_state.destroy_model_parallel()
        gc.collect()
        torch.cuda.empty_cache()


def _loss(out: torch.Tensor):
    loss = out.float().mean()
    return loss, {"loss": loss.detach()}


def _allocator() -> Allocator:
    stats = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return Allocator(stats.get("num_alloc_retries", 0), stats.get("num_device_alloc", 0))


def _over_ranks(value: float, reduce: Callable[[Iterable[float]], float]) -> float:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return reduce(values)
