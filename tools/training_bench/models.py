"""The models of the columns, built as ``mhc_megatron.training.pretrain`` builds one.

All of a precision live side by side in one process and take turns. They share Megatron's parallel
state and arguments, which differ in nothing but the connections; each has weights, gradient buffers
and, where asked for, an optimizer of its own. Weights are initialised on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config, unwrap_model
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import unset_global_variables
from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

from launch.environment import fusions, single_process
from launch.settings import megatron_errors, parse
from mhc_megatron import cpu
from mhc_megatron.config import MHCConfig
from mhc_megatron.optimizer import close_bucket_gaps, connection_overrides
from mhc_megatron.pipeline import embedding_ranks
from mhc_megatron.streams import is_connection
from mhc_megatron.training import model_config_from_args, skip_dataset_compilation

from .columns import PRECISIONS, Column, Slice


def start(part: Slice, precision: str) -> Namespace:
    """Megatron's arguments for a precision, and Megatron itself the first time.

    Raises:
        UserError: settings that contradict each other.
    """
    single_process()
    unset_global_variables()
    values = fusions(part.settings.megatron) | part.settings.megatron | PRECISIONS[precision]
    if cpu.enabled():
        values |= cpu.ARGUMENTS
    args = parse(values)
    with megatron_errors():
        config = model_config_from_args(args, MHCConfig(variant="none"))
    if not torch.distributed.is_initialized():
        skip_dataset_compilation()
        tied = config.share_embeddings_and_output_weights
        initialize_megatron(
            get_embedding_ranks=functools.partial(
                embedding_ranks, config=config.transformer, tied=tied
            )
        )
        set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    return args


def forget() -> None:
    """Drop what Transformer Engine keeps of the models of a precision (FP8 scales by recipe)."""
    try:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    except ImportError:
        return
    FP8GlobalStateManager.reset()


class Model:
    """A column's model and one training step of it.

    Attributes:
        column: what it is.
        chunks: of this rank's pipeline stages, wrapped for training.
        parameters: of this rank, and those of its connections.
        resident: bytes of weights, gradients and optimizer on this GPU.
    """

    def __init__(
        self, column: Column, args: Namespace, part: Slice, *, with_optimizer: bool = False
    ) -> None:
        self.column, self.args, self.part = column, args, part
        before = torch.cuda.memory_allocated()
        model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
        torch.manual_seed(args.seed)
        with self.kernels():
            self.chunks = self._build()
        self.optimizer = self._optimizer() if with_optimizer else None
        self._configure()
        self.resident = torch.cuda.memory_allocated() - before
        self._tokens = _batch(args)
        own = [p for chunk in self.chunks for p in chunk.parameters()]
        self.parameters = sum(p.numel() for p in own)
        self.connections = sum(p.numel() for p in own if is_connection(p))

    def _build(self) -> list[torch.nn.Module]:
        model_config = model_config_from_args(self.args, self.column.mhc)
        config = pretrain_cfg_container_from_args(self.args, model_config)
        builder = model_config.get_builder_cls()(model_config)
        return builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            ddp_config=config.ddp,
            use_megatron_fsdp=config.dist.use_megatron_fsdp,
            use_torch_fsdp2=config.dist.use_torch_fsdp2,
            data_parallel_random_init=False,
        )

    def _optimizer(self):
        config = pretrain_cfg_container_from_args(self.args, None).optimizer
        close_bucket_gaps()
        return get_megatron_optimizer(
            config, self.chunks, config_overrides=connection_overrides(config, self.column.mhc)
        )

    def _configure(self) -> None:
        """What training/training.py:3530 sets on the model's configuration."""
        config = get_model_config(self.chunks[0])
        config.finalize_model_grads_func = finalize_model_grads
        if self.optimizer is not None:
            config.grad_scale_func = self.optimizer.scale_loss
        if self.args.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def release(self) -> None:
        """Give the memory of weights and gradients back.

        Megatron's gradient hooks hold the wrapper through C++ (distributed_data_parallel.py's
        ``grad_accs``), where Python's collector does not see the cycle.
        """
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                for data in (buffer.param_data, buffer.grad_data):
                    if data is not None:
                        data.untyped_storage().resize_(0)
            for p in chunk.parameters():
                if type(p.data) is torch.Tensor:
                    p.data.untyped_storage().resize_(0)

    def kernels(self) -> contextlib.AbstractContextManager[None]:
        """Under which this column's connections are built and run."""
        if not self.column.peer:
            return contextlib.nullcontext()
        from .peers import transformer_engine

        return transformer_engine()

    def prepare(self) -> None:
        """What a run does once for many microbatches: clears the gradients. Not timed."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(self) -> None:
        """Forward and backward of all microbatches, and the optimizer's step where there is one."""
        with self.kernels():
            losses = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
                model=self.chunks,
                num_microbatches=self.part.microbatches,
                seq_length=self.args.seq_length,
                micro_batch_size=self.args.micro_batch_size,
                forward_only=False,
            )
        if self.optimizer is not None:
            self.optimizer.step()
        self._losses = losses

    def loss(self) -> float | None:
        """Mean loss a token of the last microbatch; None on other stages than the last."""
        if not self._losses:
            return None
        total, tokens = self._losses[-1]["lm loss"].tolist()
        return total / tokens

    def _forward(self, data_iterator, model):
        batch = self._tokens
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, functools.partial(_loss, batch["loss_mask"])

    @contextlib.contextmanager
    def without_layers(self) -> Iterator[None]:
        """The same model with nothing between the embedding and the final norm.

        For what the vocabulary costs: embedding, output matrix and loss. Of a plain residual model
        of one stage, whose states are as wide at both ends.
        """
        decoder = unwrap_model(self.chunks[0]).decoder
        with (
            mock.patch.dict(decoder._modules, layers=torch.nn.ModuleList()),
            mock.patch.object(decoder, "num_layers_per_pipeline_rank", 0),
        ):
            yield


def _batch(args: Namespace) -> dict[str, Any]:
    """Random tokens [b, s], the same for every column; a new draw a data-parallel rank."""
    generator = torch.Generator().manual_seed(args.seed + mpu.get_data_parallel_rank())
    shape = (args.micro_batch_size, args.seq_length + 1)
    tokens = torch.randint(args.padded_vocab_size, shape, generator=generator).cuda()
    positions = torch.arange(args.seq_length, device=tokens.device)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(shape[0], args.seq_length, device=tokens.device),
        "position_ids": positions.expand(shape[0], -1).contiguous(),
    }
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
    return batch


def _loss(loss_mask: torch.Tensor, output: torch.Tensor):
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}
