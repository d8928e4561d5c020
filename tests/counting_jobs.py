"""What tests/test_counting.py runs in forked processes (tests/distributed/cluster.py)."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

#: Recomputing the experts' activation needs their grouped kernels, which are a GPU's.
PLAIN = {"recompute-granularity": None, "recompute-modules": None}
#: Settings that put a whole model into one process.
SERIAL = PLAIN | {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "pipeline-model-parallel-layout": None,
    "expert-model-parallel-size": 1,
    "sequence-parallel": False,
}


def each(job: dict[str, Any]) -> list[Any]:
    """Results of several jobs of this module, (function's name, job) each, in one process."""
    return [globals()[function](one) for function, one in job["jobs"]]


def _arguments(job: dict[str, Any], world: int | None = None):
    """(Megatron's parsed arguments, the settings) of ``job``: config, changes, settings."""
    from megatron.training.global_vars import unset_global_variables

    from launch.settings import load, parse
    from mhc_megatron import cpu

    unset_global_variables()
    settings = load(job["config"], job.get("changes", ()))
    os.environ["WORLD_SIZE"] = str(world or settings.run.gpus or 1)
    values = settings.megatron | cpu.ARGUMENTS | job.get("settings", {})
    return parse(values), settings


def counted(job: dict[str, Any]) -> dict[str, Any]:
    """By formula, with the configuration's own layout; Megatron's own FLOPs a token too."""
    from megatron.training.training import num_floating_point_operations

    from mhc_megatron.counting import count, flops

    args, settings = _arguments(job)
    return {
        **dataclasses.asdict(count(args, settings.mhc)),
        "flops": dataclasses.asdict(flops(args, settings.mhc)),
        "megatron_flops": num_floating_point_operations(args, 1) / args.seq_length,
        "data_parallel": args.data_parallel_size,
    }


def built(job: dict[str, Any]) -> dict[str, int]:
    """The same of the modules of a whole model, built on the meta device."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from mhc_megatron.training import MHCModelBuilder, MHCModelConfig

    args, settings = _arguments(job | {"settings": SERIAL | job.get("settings", {})}, world=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = gpt_config_from_args(args, model_config_cls=MHCModelConfig)
    config.mhc = settings.mhc
    config.transformer.init_model_with_meta_device = True
    config.transformer.perform_initialization = False
    with torch.device("meta"):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = MHCModelBuilder(config).build_model(groups)
    met = args.moe_router_topk / args.num_experts if args.num_experts else 0
    return _sums(dict(model.named_parameters()), met, args.untie_embeddings_and_output_weights)


def _sums(parameters: dict[str, Any], met: float, untied: bool) -> dict[str, int]:
    """Total, active, connections and mtp from the names of ``parameters``."""
    sums = {"total": 0, "active": 0.0, "connections": 0, "mtp": 0}
    for name, parameter in parameters.items():
        if not parameter.is_meta:
            raise AssertionError(f"{name} is on {parameter.device}")
        count = parameter.numel()
        if "_hc." in name or ".exit." in name:
            sums["connections"] += count
        if name.startswith("mtp."):
            sums["mtp"] += count
            continue
        sums["total"] += count
        if ".local_experts." in name:
            sums["active"] += count * met
        elif not name.startswith("embedding.") or (not untied and ".word_embeddings." in name):
            sums["active"] += count
    return sums | {"active": round(sums["active"])}


def owned(job: dict[str, Any]) -> tuple[int, int]:
    """Parameters of this rank: by its stage's footprint, and built on the meta device."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from mhc_megatron.footprint import footprints
    from mhc_megatron.training import MHCModelBuilder, MHCModelConfig

    job = job | {"settings": PLAIN | job.get("settings", {})}
    args, settings = _arguments(job, torch.distributed.get_world_size())
    virtual = args.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        virtual,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = gpt_config_from_args(args, model_config_cls=MHCModelConfig)
    config.mhc = settings.mhc
    config.transformer.init_model_with_meta_device = True
    config.transformer.perform_initialization = False
    builder, parameters = MHCModelBuilder(config), 0
    with torch.device("meta"):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for chunk in range(virtual or 1):
            model = builder.build_model(groups, vp_stage=chunk if virtual else None)
            parameters += sum(p.numel() for p in model.parameters())
    stage = footprints(args, settings.mhc)[parallel_state.get_pipeline_model_parallel_rank()]
    return stage.parameters, parameters


def plan(job: dict[str, Any]) -> tuple[int, str, str]:
    """tools/plan.py: exit code, stdout, stderr."""
    import contextlib
    import io

    from tools.plan import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(job["arguments"])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()
