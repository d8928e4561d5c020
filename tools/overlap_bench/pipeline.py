"""Megatron's interleaved schedule over real links: a model over all ranks, two chunks on each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline import widen_pipeline

from .model import Shape, chunk, configuration, leave_out
from .wire import host_time

VPP = 2


class Pipeline:
    """A model over all ranks; ``step`` runs forward and backward of a step's microbatches.

    Args:
        shape: of one chunk.
        cpu: over gloo, with Megatron's own layers.
    """

    def __init__(self, shape: Shape, cpu: bool) -> None:
        self.shape, self.cpu, self.stages = shape, cpu, dist.get_world_size()
        self.microbatches = 4 * self.stages
        config = configuration(
            shape,
            cpu,
            num_layers=shape.layers * self.stages * VPP,
            pipeline_model_parallel_size=self.stages,
            virtual_pipeline_model_parallel_size=VPP,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=True,
        )
        mhc = MHCConfig()
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.bare = [
            chunk(config, mhc, shape.tokens, first and i == 0, last and i == VPP - 1, vp_stage=i)
            for i in range(VPP)
        ]
        for model in self.bare:
            for parameter in model.parameters():
                set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            if not cpu:
                model.cuda().bfloat16()
        self.models = widen_pipeline(self.bare, mhc)

    def describe(self) -> str:
        """The layout in words."""
        return (
            f"PP {self.stages} x VPP {VPP}, {self.shape.layers} layers a chunk, "
            f"{self.microbatches} microbatches of {self.shape.tokens} tokens, C {self.shape.hidden}"
        )

    def step(self, pieces: str) -> float:
        """Milliseconds of a step without ``pieces``; the slowest rank's."""
        leave_out(self.bare, pieces)
        dist.barrier()
        torch.cuda.synchronize()
        begin = host_time()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[None] * VPP,
            model=self.models,
            num_microbatches=self.microbatches,
            seq_length=self.shape.tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        torch.cuda.synchronize()
        ms = torch.tensor([host_time() - begin], device="cpu" if self.cpu else "cuda")
        dist.all_reduce(ms, op=dist.ReduceOp.MAX)
        for model in self.bare:
            model.zero_grad(set_to_none=True)
        return float(ms)

    def _forward(self, data_iterator, model, return_schedule_plan: bool = False):
        device = "cpu" if self.cpu else "cuda"
        tokens = torch.arange(self.shape.tokens, device=device)[None] % 1000
        run = model.build_schedule_plan if return_schedule_plan else model
        mask = None
        out = run(tokens, tokens, mask, labels=tokens.roll(-1, 1))
        return out, _loss


def _loss(out: torch.Tensor):
    loss = out.float().mean()
    return loss, {"loss": loss.detach()}
