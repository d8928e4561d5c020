"""What one rank of a test runs: a few training steps of a small model in some layout.

A job is a dictionary:

    kind, layout    see models.py
    mhc             fields of MHCConfig
    batch           sequences of a step, over all ranks and microbatches (default data.BATCH)
    steps           how many (default 3), the first one's number is ``first_step``
    builder         module with a ``build`` function, in the place of ours
    load, save      folders of torch_dist checkpoints
    save_initial    where the model goes before the first step
    optimizer       fields of OptimizerConfig
    ddp             fields of DistributedDataParallelConfig
    resume          also load the optimizer's state from ``load``
    sharding        how the optimizer's state is saved: dp_reshardable or fully_reshardable
    asynchronous    save through Megatron's asynchronous writer
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config, unwrap_model

from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import HyperConnection
from mhc_megatron.optimizer import connection_overrides, mend_checkpoints
from mhc_megatron.streams import is_connection
from tests.distributed.data import BATCH, OPTIMIZER, SEQUENCE, VOCABULARY
from tests.distributed.models import build, build_with, initialize

#: Large alpha and phi, so that a wrong H_res anywhere shows in the loss.
MHC = {"variant": "mhc", "n": 4, "alpha": 0.5, "init_std": 0.1}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; losses and gradient norm of each step, loss as this rank knows it."""
    if not parallel_state.is_initialized():
        initialize(job["kind"], job["layout"])
    layout = job["layout"]
    mhc = MHCConfig(**(MHC | job.get("mhc", {})))
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(11)
    ddp = {"grad_reduce_in_fp32": True, **job.get("ddp", {}), **layout.get("ddp", {})}
    make = build_with(job["builder"]) if "builder" in job else build
    model = make(job["kind"], layout, mhc, ddp)
    if not job.get("load"):
        stir(model)
    optimizer = make_optimizer(job, model, ddp, mhc)
    if job.get("load"):
        load(job, model, optimizer)
    if job.get("save_initial"):
        save(job | {"save": job["save_initial"]}, model, None)
    _configure(model, optimizer, ddp)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    PipelineOffloadManager.reset_instance()  # it knows the layers of the model before
    first = job.get("first_step", 0)
    numbers = range(first, first + job.get("steps", 3))
    batch, unscored = job.get("batch", BATCH), job["kind"].get("unscored", ())
    steps = [step(model, optimizer, number, batch, unscored) for number in numbers]
    if job.get("save"):
        if ddp.get("overlap_param_gather"):
            # As training/training.py does before it saves: the last step's parameters arrive.
            for chunk in model:
                chunk.disable_forward_pre_hook()
        save(job, model, optimizer)
    return {
        "loss": [loss for loss, _ in steps],
        "grad_norm": [float(norm) for _, norm in steps],
        "gives_loss": parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0,
        # Of one step; Megatron counts in the first one.
        "offloaded": getattr(PipelineOffloadManager.get_instance(), "_offload_summary_bytes", {}),
    }


def train_both(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job with connections, and the same with Megatron's own residual path; or ``variants``."""
    results = {}
    for variant in job.get("variants", ("mhc", "none")):
        folders = {
            key: os.path.join(job[key], variant) for key in ("load", "save_initial") if key in job
        }
        chosen = job.get("mhc", {}) if variant == "mhc" else {}
        results[variant] = train(job | folders | {"mhc": chosen | {"variant": variant}})
    return results


def _configure(model, optimizer, ddp: dict[str, Any]) -> None:
    """What training/training.py sets on the model's configuration before its first step."""
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.get("overlap_grad_reduce"):
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]


@torch.no_grad()
def stir(model: list[torch.nn.Module]) -> None:
    """Biases that tell the streams apart, which initial ones do not."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, HyperConnection):
                generator = torch.Generator().manual_seed(module.index)
                module.bias.add_(torch.randn(module.bias.shape, generator=generator).cuda())


def make_optimizer(job, model, ddp, mhc):
    settings = OPTIMIZER | job.get("optimizer", {})
    dtype = job["kind"].get("dtype", "float32")
    config = OptimizerConfig(
        **settings,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        params_dtype=getattr(torch, dtype),
        use_distributed_optimizer=ddp.get("use_distributed_optimizer", False),
        overlap_param_gather=ddp.get("overlap_param_gather", False),
    )
    mend_checkpoints()
    overrides = connection_overrides(config, mhc)
    return get_megatron_optimizer(config, model, config_overrides=overrides)


def step(
    model, optimizer, number: int, batch: int = BATCH, unscored: Sequence[int] = ()
) -> tuple[float, float]:
    """One optimizer step: the sum of this rank's token losses, the norm of all gradients."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    data_ranks = parallel_state.get_data_parallel_world_size()
    sequences = range(parallel_state.get_data_parallel_rank(), batch, data_ranks)
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, unscored=unscored),
        data_iterator=[iter([(number, i) for i in sequences]) for _ in model],
        model=model,
        num_microbatches=len(sequences),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
    updated, grad_norm, _ = optimizer.step()
    return sum(float(entry["lm loss"][0]) for entry in losses), grad_norm


def forward_step(
    data_iterator, model, return_schedule_plan: bool = False, unscored: Sequence[int] = ()
):
    """As ``mhc_megatron.training.forward_step``, without the trainer's global state.

    The tokens at ``unscored`` have no loss.
    """
    number, index = next(data_iterator)
    generator = torch.Generator().manual_seed(1000 * number + index)
    tokens = torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=generator)
    # Something to learn: every other token repeats the one before.
    tokens[:, 1::2] = tokens[:, 0:-1:2]
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(1, SEQUENCE),
        "position_ids": torch.arange(SEQUENCE)[None],
    }
    batch["loss_mask"][:, list(unscored)] = 0
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
    # No mask: Megatron's local attention makes a causal one.
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor):
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


# ------------------------------------------------------------------------------------- checkpoints


def save(job: dict[str, Any], model, optimizer) -> None:
    """A torch_dist checkpoint of the model and the optimizer."""
    if torch.distributed.get_rank() == 0:
        os.makedirs(job["save"], exist_ok=True)
    torch.distributed.barrier()
    request = dist_checkpointing.save(
        _sharded_state(job, model, optimizer),
        job["save"],
        async_sharded_save=job.get("asynchronous", False),
        async_strategy="mcore",
        content_metadata=_metadata(job),
    )
    if request is not None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    torch.distributed.barrier()


def load(job: dict[str, Any], model, optimizer) -> None:
    """The model of the checkpoint, and the optimizer's state where the job resumes."""
    resume = job.get("resume", False)
    sharded = _sharded_state(job, model, optimizer if resume else None, is_loading=True)
    state = dist_checkpointing.load(sharded, job["load"])
    for i, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(state[f"model{i}"], strict=True)
    if resume:
        optimizer.load_state_dict(state["optimizer"])
    else:
        optimizer.reload_model_params()


def _sharded_state(job, model, optimizer, is_loading: bool = False) -> dict[str, Any]:
    metadata = _metadata(job)
    state = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(unwrap_model(model))
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
    return state


def _metadata(job: dict[str, Any]) -> dict[str, Any]:
    """As training/checkpointing.py:468 makes it."""
    return {
        "distrib_optim_sharding_type": job.get("sharding", "dp_reshardable"),
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


# ------------------------------------------------------------------------------------------ dtypes


def dtypes(job: dict[str, Any]) -> dict[str, Any]:
    """Names of the dtypes of parameters, their gradients and main copies, after one step."""
    initialize(job["kind"], job["layout"])
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    mhc = MHCConfig(**(MHC | job.get("mhc", {})))
    ddp = job["ddp"]
    model = build(job["kind"], job["layout"], mhc, ddp)
    optimizer = make_optimizer(job, model, ddp, mhc)
    _configure(model, optimizer, ddp)
    step(model, optimizer, 0)
    main = _main_parameters(optimizer)
    seen: dict[str, Any] = {"connections": {}, "others": {}}
    for name, parameter in model[0].named_parameters():
        types = {
            "parameter": _name(parameter),
            "gradient": _name(parameter.main_grad),
            # A float32 parameter is its own main copy, or has a float32 shard of its own.
            "main": _name(main.get(id(parameter), parameter)),
        }
        seen["connections" if is_connection(parameter) else "others"][name] = types
    seen["buffers"] = [
        sorted({_name(p) for p in buffer.params})
        for buffer in model[0].buffers + model[0].expert_parallel_buffers
    ]
    return seen


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _main_parameters(optimizer) -> dict[int, torch.Tensor]:
    """id of a model's parameter -> what the optimizer steps in its place."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for ours, theirs in (
            ("model_float16_groups", "shard_fp32_from_float16_groups"),
            ("model_fp32_groups", "shard_fp32_groups"),
            ("float16_groups", "fp32_from_float16_groups"),
        ):
            for group, mains in zip(
                getattr(part, ours, []), getattr(part, theirs, []), strict=True
            ):
                pairs += zip(group, mains, strict=True)
    return {id(parameter): main for parameter, main in pairs}


# ------------------------------------------------------------------------------- parameter groups


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a parameter -> its group's multipliers and the class of its optimizer."""
    initialize(job["kind"], job["layout"])
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    mhc = MHCConfig(**(MHC | job.get("mhc", {})))
    ddp = job.get("ddp", {})
    model = build(job["kind"], job["layout"], mhc, ddp)
    optimizer = make_optimizer(job, model, ddp, mhc)
    names = {id(p): name for name, p in unwrap_model(model)[0].named_parameters()}
    seen = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        whole = getattr(part, "model_param_group_index_map", None)
        for index, group in enumerate(part.param_groups):
            members = group["params"]
            if whole is not None:
                # The distributed optimizer steps shards; this maps parameters to groups.
                members = [p for p, (of, _) in whole.items() if of == index]
            for parameter in members:
                seen[names[id(parameter)]] = {
                    "wd_mult": group["wd_mult"],
                    "max_lr": group["max_lr"],
                    "optimizer": type(part.optimizer).__name__,
                }
    return seen
