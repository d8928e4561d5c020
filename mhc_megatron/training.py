"""What ``megatron.training.pretrain`` asks of a program: model, data, forward step.

The megatron-core 0.19.2 wheel holds the trainer but not ``pretrain_gpt.py``: the three parts that
this file supplies. ``pretrain`` puts them together; ``launch/pretrain.py`` is its command line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import checkpointing, get_args, get_timers
from megatron.training import training as megatron_training
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.models import gpt as megatron_gpt
from megatron.training.models.gpt import (
    GPTModel,
    GPTModelBuilder,
    GPTModelConfig,
    default_layer_spec,
)
from megatron.training.models.hybrid import (
    HybridModel,
    HybridModelBuilder,
    HybridModelConfig,
    default_hybrid_stack_spec,
)
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mhc_megatron.apex import supply_weight_gradient
from mhc_megatron.checkpoint.sound import settle
from mhc_megatron.config import MHCConfig
from mhc_megatron.corpus import check_corpus, whole_indices
from mhc_megatron.errors import UserError
from mhc_megatron.footprint import check_heads
from mhc_megatron.fp8 import check_expert_scales, scales_before_weights
from mhc_megatron.hybrid import local_hybrid_stack
from mhc_megatron.layer_spec import mhc_layer_spec
from mhc_megatron.optimizer import group_connections
from mhc_megatron.overlap import HyperConnectedGPTModel
from mhc_megatron.pipeline import embedding_ranks, widen_pipeline
from mhc_megatron.recompute import check_recompute

#: Megatron's threshold: a loss this many times the largest seen so far is a spike.
SPIKY_LOSS_FACTOR = 10


@dataclass(kw_only=True)
class MHCModelConfig(GPTModelConfig):
    """Megatron's model configuration plus the connections'."""

    builder: ClassVar[str] = "mhc_megatron.training.MHCModelBuilder"
    mhc: MHCConfig = field(default_factory=MHCConfig)


class MHCModelBuilder(GPTModelBuilder):
    """Megatron's builder with ``mhc_layer_spec`` on its specs and ``widen_pipeline`` at the end."""

    def __init__(self, model_config: MHCModelConfig) -> None:
        super().__init__(model_config)
        base = model_config.transformer_layer_spec
        model_config.transformer_layer_spec = functools.partial(_layer_spec, base=base)

    def build_model(self, *args, **kwargs) -> GPTModel:
        """One stage of the model."""
        with _hyper_connected_parts(self._model_config.mhc):
            return super().build_model(*args, **kwargs)

    def build_distributed_models(self, *args, **kwargs) -> list[GPTModel]:
        """All stages of this rank, wrapped for training."""
        models = super().build_distributed_models(*args, **kwargs)
        return widen_pipeline(models, self._model_config.mhc)


@dataclass(kw_only=True)
class MHCHybridModelConfig(HybridModelConfig):
    """Megatron's configuration of a hybrid model plus the connections'."""

    builder: ClassVar[str] = "mhc_megatron.training.MHCHybridModelBuilder"
    mhc: MHCConfig = field(default_factory=MHCConfig)


class MHCHybridModelBuilder(HybridModelBuilder):
    """``MHCModelBuilder`` for HybridModel."""

    def __init__(self, model_config: MHCHybridModelConfig) -> None:
        super().__init__(model_config)
        config = model_config.transformer
        spec = model_config.hybrid_stack_spec
        if spec is None and config.transformer_impl == "local":
            spec = local_hybrid_stack(config)
        model_config.hybrid_stack_spec = mhc_layer_spec(
            spec or default_hybrid_stack_spec, config, model_config.mhc
        )

    def build_distributed_models(self, *args, **kwargs) -> list[HybridModel]:
        """All stages of this rank, wrapped for training."""
        models = super().build_distributed_models(*args, **kwargs)
        return widen_pipeline(models, self._model_config.mhc)


def _layer_spec(config: MHCModelConfig, vp_stage: int | None = None, *, base):
    if base is None:
        spec = default_layer_spec(config, vp_stage)
    elif callable(base) and not isinstance(base, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(base).parameters
        spec = base(config, vp_stage=vp_stage) if takes_stage else base(config)
    else:
        spec = base
    return mhc_layer_spec(spec, config.transformer, config.mhc, vp_stage)


@contextlib.contextmanager
def _hyper_connected_parts(mhc: MHCConfig):
    """Connections in the multi-token prediction block too, and a model that can overlap them.

    ``GPTModelBuilder.build_model`` (training/models/gpt.py:255) makes the block's spec from the
    plain layer, names GPTModel (:307) and has no parameters for others, so what it calls is
    replaced meanwhile.
    """
    plain, model = megatron_gpt.mtp_block_spec, megatron_gpt.GPTModel

    def mtp_block_spec(config, transformer_layer_spec, vp_stage=None):
        spec = plain(config, transformer_layer_spec, vp_stage=vp_stage)
        return spec and mhc_layer_spec(spec, config.transformer, mhc)

    megatron_gpt.mtp_block_spec = mtp_block_spec
    if mhc.enabled:
        megatron_gpt.GPTModel = functools.partial(HyperConnectedGPTModel, mhc=mhc)
    try:
        yield
    finally:
        megatron_gpt.mtp_block_spec, megatron_gpt.GPTModel = plain, model


def pretrain(
    args: Namespace,
    mhc: MHCConfig,
    forward_step_func: Callable | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Train as Megatron's parsed and validated ``args`` and ``mhc`` say.

    ``say`` gets what a user should read, on every rank.

    Returns when the run is complete; Megatron ends the process (exit code 0) where it stops early
    on a signal, a time limit or ``--exit-interval``.
    """
    skip_dataset_compilation()
    model_config = model_config_from_args(args, mhc)
    datasets.is_distributed = True
    group_connections(mhc)
    explain_checkpoint_errors(mhc, say)
    megatron_training.pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step_func or forward_step,
        get_embedding_ranks=functools.partial(
            embedding_ranks,
            config=model_config.transformer,
            tied=model_config.share_embeddings_and_output_weights,
        ),
    )


def model_config_from_args(
    args: Namespace, mhc: MHCConfig
) -> MHCModelConfig | MHCHybridModelConfig:
    """The configuration of the model that Megatron's ``args`` and ``mhc`` describe."""
    if args.hybrid_layer_pattern is None:
        model_config = gpt_config_from_args(args, model_config_cls=MHCModelConfig)
    else:
        model_config = hybrid_config_from_args(args, model_config_cls=MHCHybridModelConfig)
    model_config.mhc = mhc
    carry_yarn(model_config.transformer, args)
    if args.gradient_accumulation_fusion:
        supply_weight_gradient()
    return model_config


def carry_yarn(config: TransformerConfig, args: Namespace) -> None:
    """Give latent attention the yarn parameters that its arguments name.

    Megatron 0.19.2 takes ``--yarn-original-max-position-embeddings``, ``--yarn-beta-fast`` and
    ``--yarn-beta-slow`` for its other attention only (training/argument_utils.py:384); latent
    attention has fields of other names (``MLATransformerConfig``), which stay at their defaults.
    """
    if not args.multi_latent_attention:
        return
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        value = getattr(args, f"yarn_{name}", None)
        if value is not None:
            setattr(config, name, value)


def skip_dataset_compilation() -> None:
    """Keep Megatron from running ``make`` where the wheel has no Makefile.

    core/datasets/utils.py:20 (``compile_helpers``) compiles the dataset helpers at start and exits
    when it cannot; the wheel ships them compiled, without sources.
    """
    from megatron.core.datasets import utils

    if not os.path.exists(os.path.join(os.path.dirname(utils.__file__), "Makefile")):
        utils.compile_helpers = lambda: None


# ------------------------------------------------------------------------------------------ data


def datasets(num_samples: list[int], vp_stage: int | None = None):
    """Train, validation and test sets from ``--data-path`` and friends (``num_samples`` of each).

    Raises:
        UserError: no such data, or a set without a whole sequence in it.
    """
    args = get_args()
    config = dataset_config(args)
    check_data(config, args.padded_vocab_size)
    if config.path_to_cache:
        config.path_to_cache = cache_folder(config.path_to_cache, _prefixes(config))
    build = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        functools.partial(_is_built_on_rank, vp_stage=vp_stage),
        config,
    )
    with whole_indices():
        return build.build()


def _is_built_on_rank(vp_stage: int | None = None) -> bool:
    return needs_batch(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def needs_batch(vp_stage: int | None) -> bool:
    """Whether this stage embeds tokens or computes a loss (also one of MTP's)."""
    return is_first_or_last_pipeline_stage(vp_stage) or get_args().mtp_num_layers is not None


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """GPTDatasetConfig from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )


def cache_folder(folder: str, prefixes: Sequence[str]) -> str:
    """Where the indices of these corpora are cached, below ``folder``.

    Megatron's key has a corpus's name and nothing of what is in it: one that was made anew under
    its old name would be read by the old one's indices.
    """
    stamp = hashlib.sha256()
    for prefix in prefixes:
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            stamp.update(str(os.path.getsize(path)).encode() + b";")
        with open(f"{prefix}.idx", "rb") as f:  # documents' lengths first, their order last
            stamp.update(f.read(1 << 16))
            f.seek(max(0, os.path.getsize(f"{prefix}.idx") - (1 << 16)))
            stamp.update(f.read())
    return os.path.join(folder, stamp.hexdigest()[:12])


def check_data(config: GPTDatasetConfig, padded_vocab_size: int) -> None:
    """Look at every indexed file once, before Megatron builds anything on it.

    It builds every set that has a share of the documents, also one of which no sample is asked
    for, and would look for ever for one where the share has no document.
    """
    splits = list(config.split_matrix or ())
    validation = [*splits[1:2], *(config.blend_per_split or [])[1:2]]
    if validation == [None] and (get_args().eval_iters or 0) > 0:
        raise UserError("there is no validation set; set eval-iters: 0, or change split.")
    for prefix in _prefixes(config):
        check_corpus(
            prefix,
            sequence_length=config.sequence_length,
            vocab_size=padded_vocab_size,
            splits=splits,
        )


def _prefixes(config: GPTDatasetConfig) -> list[str]:
    blends = [config.blend, *(config.blend_per_split or [])]
    return [prefix for blend in blends if blend for prefix in blend[0]]


def get_batch(data_iterator, vp_stage: int | None) -> dict[str, Tensor | None]:
    """This rank's part of the next microbatch: tokens, labels, loss_mask, position_ids [b, s], ...

    Tensor-parallel rank 0 reads, the others receive; context-parallel ranks take their slices.
    """
    args = get_args()
    if not needs_batch(vp_stage):
        return dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids", "attention_mask"), None
        )
    batch: dict[str, Tensor | None] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = {k: v.cuda(non_blocking=True) for k, v in next(data_iterator).items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        # A stage with MTP layers needs everything, and any stage may hold them.
        mtp_on_this_rank=args.mtp_num_layers is not None,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


# ---------------------------------------------------------------------------------------- forward


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    """One microbatch: (per-token losses [b, s], or a schedule plan; the function of the loss)."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch.get("attention_mask"))
    labels = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    loss = functools.partial(loss_func, batch["loss_mask"])
    if return_schedule_plan:
        return model.build_schedule_plan(*inputs, **labels), loss
    return model(*inputs, **labels), loss


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked losses, the number of tokens, and what Megatron averages and logs."""
    losses, mask = output.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    tokens = mask.sum().detach().to(torch.int)
    _validate(loss)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def _validate(loss: Tensor) -> None:
    """Megatron's rerun machine: NaN and infinity always, spikes where asked for."""
    args, machine = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks = [("found NaN in the loss", torch.isnan, True)]
        checks += [("found Inf in the loss", torch.isinf, True)]
    if args.check_for_spiky_loss:
        spike = functools.partial(
            machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        checks += [("spiky loss", spike, getattr(args, "spiky_loss_ends_run", False))]
    for message, rejects, fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal
        )


# ------------------------------------------------------------------------------ checks at the edge


def check_arguments(args: Namespace) -> None:
    """Settings that Megatron accepts and that cannot work, before anything is built.

    Raises:
        UserError: with what to change.
    """
    if args.train_iters is not None and args.train_iters < 1:
        raise UserError(f"train-iters must be at least 1, not {args.train_iters}.")
    for key in ("enable_ft_package", "inprocess_restart"):
        if getattr(args, key):  # nvidia-resiliency-ext's; Megatron reads them from sys.argv alone
            raise UserError(
                f"{key.replace('_', '-')} is not supported: launch/supervise.py starts a run "
                "again, and run.hang_minutes ends one that hangs."
            )
    decay = args.lr_decay_iters or args.train_iters
    if args.train_iters is not None and args.lr_warmup_iters >= decay:
        raise UserError(
            f"lr-warmup-iters ({args.lr_warmup_iters}) must be smaller than "
            f"{'lr-decay-iters' if args.lr_decay_iters else 'train-iters'} ({decay})."
        )
    if not args.mock_data and get_blend_and_blend_per_split(args) == (None, None):
        raise UserError("no data: set data-path, or mock-data: true.")
    mhc, half = MHCConfig(**args.mhc), args.bf16 or args.fp16
    check_heads(args)
    check_recompute(args, mhc)
    _check_dispatcher(args)
    _check_optimizer(args)
    if half and mhc.enabled:
        _check_reduction(args)
    if mhc.enabled and mhc.lr_mult != 1 and args.use_mup:
        raise UserError("use-mup sets the rate of every matrix itself; leave mhc.lr_mult at 1.")
    tied = not args.untie_embeddings_and_output_weights
    if args.mtp_num_layers and args.pipeline_model_parallel_size > 1 and tied:
        # models/common/language_module/language_module.py:497 fails on every such save and load.
        raise UserError(
            "mtp-num-layers over several pipeline stages: Megatron 0.19.2 cannot save tied "
            "embeddings then; set untie-embeddings-and-output-weights: true."
        )
    others = "".join(sorted(set(args.hybrid_layer_pattern or "") - set("*+-E/|")))
    if others and (mhc.enabled or args.transformer_impl == "local") and not args.spec:
        raise UserError(
            f"hybrid-layer-pattern: {others!r} stands for layers that are not supported; attention "
            "(*), latent attention (+), MLP (-) and experts (E) are."
        )


def _check_dispatcher(args: Namespace) -> None:
    """A flex dispatcher without the library behind it; Megatron says so when it builds a layer."""
    if args.moe_token_dispatcher_type != "flex":
        return
    backend = args.moe_flex_dispatcher_backend
    name, there = {
        "deepep": ("DeepEP", fused_a2a.HAVE_DEEP_EP),
        "hybridep": ("DeepEP's branch hybrid-ep", fused_a2a.HAVE_HYBRIDEP),
        "ncclep": ("Transformer Engine built with NCCL EP", fused_a2a.HAVE_TE_EP),
    }[backend]
    if not there:
        raise UserError(
            f"moe-token-dispatcher-type flex: moe-flex-dispatcher-backend {backend} needs {name}, "
            "which is not installed; use alltoall."
        )


def _check_optimizer(args: Namespace) -> None:
    """Two of Megatron's matrix optimizers that 0.19.2 would stop at, one in the first step.

    optimizer/layer_wise_optimizer.py:513 wraps Muon for bf16 alone, and
    dist_checkpointing/optimizer.py:100 takes no state of another shape than its parameter's.
    """
    if args.use_layer_wise_distributed_optimizer and not args.bf16:
        raise UserError(
            f"optimizer {args.optimizer}: with use-distributed-optimizer Megatron 0.19.2 trains in "
            "bf16 only; set bf16: true, or use-distributed-optimizer: false."
        )
    if args.optimizer == "soap" and args.save and not args.no_save_optim:
        raise UserError(
            "optimizer soap: Megatron 0.19.2 cannot save its preconditioners; set "
            "no-save-optim: true, or take muon."
        )


def _check_reduction(args: Namespace) -> None:
    """An all-reduce of half-precision and float32 gradients at once, which torch refuses.

    All buckets of a later model chunk are one group (core/distributed/param_and_grad_buffer.py
    :1707); the distributed optimizer all-reduces it in these two cases (:702, :737). Its
    reduce-scatter and its gather take several dtypes.
    """
    if args.accumulate_allreduce_grads_in_fp32 or not args.virtual_pipeline_model_parallel_size:
        return
    for name, used in (
        ("num-distributed-optimizer-instances", args.num_distributed_optimizer_instances > 1),
        ("save-wgrads-interval", args.save_wgrads_interval is not None),
    ):
        if used:
            raise UserError(
                f"mhc: {name} with several model chunks a rank reduces the connections' float32 "
                "gradients together with half-precision ones, which torch refuses; set "
                "accumulate-allreduce-grads-in-fp32: true, without grad-reduce-in-bf16."
            )


#: In what Megatron says when the distributed optimizer's state, saved in buckets
#: (``dp_reshardable``), does not fit the layout: training/checkpointing.py:2166, and the names of
#: optimizer/distrib_optimizer.py's buckets that are or are not in the checkpoint.
_STATE_IN_BUCKETS = ("DistributedOptimizer with sharding type", "optimizer.distributed.dp_group")


def explain_checkpoint_errors(mhc: MHCConfig, say: Callable[[str], None] = print) -> None:
    """Make a checkpoint that does not fit end in one sentence, before anything is written.

    A run that goes on from its own folder takes the newest checkpoint there that is whole, and
    says which it passed over.

    Wraps training/checkpointing.py's ``load_checkpoint`` (as training/training.py imported it) and
    ``check_checkpoint_args``, which compares the settings that came with the checkpoint.
    """
    load, check = megatron_training.load_checkpoint, checkpointing.check_checkpoint_args

    def explained(ddp_model, *args, **kwargs):
        run = get_args()
        if run.load and run.load == run.save and run.ckpt_step is None:
            for line in settle(run.load):
                say(line)
        try:
            with scales_before_weights(ddp_model, run):
                return load(ddp_model, *args, **kwargs)
        except (TypeError, AttributeError, NameError, UserError):
            raise
        except (Exception, CheckpointException) as error:  # torch, Megatron, pickle: own ones each
            if any(said in str(error) for said in _STATE_IN_BUCKETS):
                raise UserError(
                    f"the checkpoint in {get_args().load} keeps the optimizer's state as its own "
                    "layout has it: go on in that one, save it there with "
                    "dist-ckpt-optim-fully-reshardable: true, or set no-load-optim: true."
                ) from error
            if _names_a_group(error):
                raise UserError(
                    f"the checkpoint in {get_args().load} has no group of parameters with this "
                    "run's learning rate and weight decay: keep its lr, min-lr, weight-decay, "
                    "mhc.lr_mult and mhc.phi_weight_decay, or set no-load-optim: true."
                ) from error
            raise UserError(
                f"the checkpoint in {get_args().load} does not fit: {_innermost(error)}"
            ) from error

    def compared(checkpoint_args, *args, **kwargs):
        was = getattr(checkpoint_args, "mhc", None) or {"variant": "none"}
        for key in ("variant", "n", "exit", "sinkhorn", "sinkhorn_iterations"):
            now = getattr(mhc, key)
            if key in was and was[key] != now:
                raise UserError(
                    f"the checkpoint in {get_args().load} was made with mhc {key} {was[key]}, "
                    f"this run has {now}; give the run a folder of its own."
                )
        check_expert_scales(checkpoint_args, get_args())
        return check(checkpoint_args, *args, **kwargs)

    megatron_training.load_checkpoint = explained
    checkpointing.check_checkpoint_args = compared


def _names_a_group(error: BaseException) -> bool:
    """Megatron tells groups of parameters by their rates (optimizer/optimizer.py, distrib_optimizer
    too), and says of one that is not in the checkpoint nothing but these numbers."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    return isinstance(key, tuple) or "Could not find parameter group" in str(error)


def _innermost(error: BaseException) -> str:
    """What went wrong, in a line; torch's CheckpointException holds the whole traceback as text."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not said:
        return type(error).__name__
    return said[-1].partition("Exception: ")[2] or said[-1]
