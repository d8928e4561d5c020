"""Text generation from a checkpoint of ``launch/pretrain.py``, on one process, with a KV cache.

The checkpoint says what the model is: Megatron saves its arguments with it, ``args.mhc`` among
them. It may come from any parallel layout; here it is loaded whole. The cache is Megatron's own
(``StaticInferenceContext``, filled by transformer/attention.py). The streams need none: a token's
n*C channels are made from its embedding and its attention, as at training.

``megatron.core.inference``'s engines are not used: they are made for batches of requests on GPUs,
and one sequence needs no more than the loop below.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from mhc_megatron import cpu
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.training import model_config_from_args

# ------------------------------------------------------------------------------------ checkpoints


def find_checkpoint(path: str, step: int | None = None) -> str:
    """The folder ``iter_0000200`` of a checkpoint: the one of ``step``, or the latest.

    Args:
        path: a run's folder, the folder of its checkpoints, or one checkpoint's own.

    Raises:
        UserError: there is none.
    """
    if step is None and os.path.exists(os.path.join(path, "metadata.json")):
        return path
    inner = os.path.join(path, "checkpoints")
    folder = inner if os.path.isdir(inner) else path
    if step is None:
        step = _latest(folder)
    checkpoint = os.path.join(folder, f"iter_{step:07d}")
    if not os.path.isdir(checkpoint):
        raise UserError(f"there is no checkpoint of step {step} in {folder}.")
    if not os.path.exists(os.path.join(checkpoint, "metadata.json")):
        raise UserError(f"{checkpoint} is not a whole torch_dist checkpoint: no metadata.json.")
    return checkpoint


def _latest(folder: str) -> int:
    """The step that Megatron's tracker names."""
    tracker = os.path.join(folder, "latest_checkpointed_iteration.txt")
    try:
        with open(tracker, encoding="utf-8", errors="replace") as f:
            said = f.read().strip()
    except OSError as error:
        raise UserError(f"there is no checkpoint in {folder}: {error.strerror}.") from error
    if not re.fullmatch(r"[0-9]{1,12}", said):
        raise UserError(f"{tracker} must hold the number of a step, not {said[:40]!r}.")
    return int(said)


def read_arguments(checkpoint: str) -> tuple[Namespace, MHCConfig]:
    """The arguments that a checkpoint was trained with, and its connections'.

    Raises:
        UserError: the checkpoint is damaged, or holds a model that this module cannot build.
    """
    with _explained(checkpoint):
        check_whole(checkpoint)
        args = dist_checkpointing.load_common_state_dict(checkpoint).get("args")
    if args is None:
        raise UserError(f"the checkpoint {checkpoint} does not hold the settings of its run.")
    mhc = MHCConfig.from_mapping(getattr(args, "mhc", None) or {"variant": "none"})
    return args, mhc


def check_whole(checkpoint: str) -> None:
    """That every file of a checkpoint is as long as its index says; loading reads parts only.

    Raises:
        UserError: a file is missing or too short.
    """
    index = FileSystemReader(checkpoint).read_metadata().storage_data or {}
    ends: dict[str, int] = {}
    for place in index.values():
        path = place.relative_path
        ends[path] = max(ends.get(path, 0), place.offset + place.length)
    for path, end in ends.items():
        file = os.path.join(checkpoint, path)
        size = os.path.getsize(file) if os.path.exists(file) else 0
        if size < end:
            raise UserError(
                f"the checkpoint {checkpoint} is damaged: {path} has {size:,} bytes of {end:,}."
            )


class _explained:
    """Turns whatever a damaged checkpoint makes Megatron or torch raise into one UserError.

    torch's CheckpointException is no Exception.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        damaged = isinstance(error, Exception | CheckpointException)
        if damaged and not isinstance(error, UserError):
            raise UserError(
                f"the checkpoint {self.checkpoint} is damaged or does not fit its settings "
                f"({_reason(error)})."
            ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:160]


# ------------------------------------------------------------------------------------------ model

#: Arguments that say how the training run was spread and made fast; one process needs none of it.
SERIAL: dict[str, Any] = {
    "world_size": 1,
    "rank": 0,
    "data_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "fine_grained_activation_offloading": False,
    "cpu_offloading": False,
    "cuda_graph_impl": "none",
    "gradient_accumulation_fusion": False,
    # Predictions of later tokens serve training; multi-latent attention cannot fuse its rotation
    # with a cache (multi_latent_attention.py:711).
    "mtp_num_layers": None,
    "apply_rope_fusion": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "fp8": None,
    "fp4": None,
}

#: The same for a machine without Transformer Engine, as ``cpu.ARGUMENTS`` is for training.
LOCAL: dict[str, Any] = {
    "transformer_impl": "local",
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "no_persist_layer_norm": True,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
}


def load_model(checkpoint: str, args: Namespace, mhc: MHCConfig) -> GPTModel | HybridModel:
    """The model of a checkpoint with its weights, for evaluation, on the GPU or else the CPU.

    Changes ``args`` to one process. Call once a process; without a GPU after ``cpu.enable()``.

    Raises:
        UserError: the checkpoint is damaged or does not fit its own settings.
    """
    vars(args).update(SERIAL)
    if cpu.enabled() or not _has_transformer_engine():
        vars(args).update(LOCAL)
    vars(args)["use_cpu_initialization"] = cpu.enabled()
    _one_process(args.seed)
    pattern = getattr(args, "hybrid_layer_pattern", None)  # other programs' checkpoints have none
    # Neither stages nor a prediction layer.
    args.hybrid_layer_pattern = pattern and pattern.partition("/")[0].replace("|", "")
    config = model_config_from_args(args, mhc)
    builder = config.get_builder_cls()(config)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.to(dtype=args.params_dtype, device="cuda").eval().requires_grad_(False)
    with _explained(checkpoint):
        metadata = dist_checkpointing.load_content_metadata(checkpoint)
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        model.load_state_dict(dist_checkpointing.load(wanted, checkpoint)["model"])
    return model


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _one_process(seed: int) -> None:
    """Process groups of one rank and Megatron's generators."""
    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu.enabled() else "nccl"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


# -------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 for all.
        top_p: only the fewest most probable tokens that together have probability p.
        seed: of the draws; the same on any device.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"the temperature must be at least 0, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top-k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}.")
        if not -(2**63) <= self.seed < 2**64:  # what torch takes
            raise UserError(f"the seed must be from -2**63 to below 2**64, not {self.seed}.")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from its logits [V]; float32 on the CPU, where every device draws the same."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, tokens = torch.sort(logits, descending=True, stable=True)
    # In double and from the largest on: no temperature is too small to divide by.
    values = ((values.double() - values[0]) / sampling.temperature).float()
    if sampling.top_k:
        values, tokens = values[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = torch.softmax(values, dim=0)
    before = torch.cumsum(probabilities, dim=0) - probabilities
    # The first token always stays: nothing comes before it.
    probabilities = probabilities.where(before < sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


# ------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model: GPTModel | HybridModel,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling,
    *,
    vocab_size: int,
    stop: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """At most ``tokens`` tokens that follow ``prompt``, as they come.

    Args:
        vocab_size: tokens that the tokenizer knows; the model's padded ones are never chosen.
        stop: a token that ends the text; it is not given out.
        cache: keep keys and values. Without it every token runs the whole sequence again.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary, more tokens than positions.
    """
    check_prompt(prompt, tokens, vocab_size, model.max_sequence_length)
    generator = torch.Generator().manual_seed(sampling.seed)
    sequence = list(prompt)
    context = StaticInferenceContext(1, len(prompt) + tokens) if cache else None
    for _ in range(tokens):
        logits = next_logits(model, sequence, context)
        token = choose(logits[:vocab_size], sampling, generator)
        if token == stop:
            return
        sequence.append(token)
        yield token


def check_prompt(prompt: Sequence[int], tokens: int, vocab_size: int, positions: int) -> None:
    """Raise UserError where ``prompt`` and ``tokens`` more do not fit the model."""
    if not prompt:
        raise UserError("the prompt is empty; the model needs a token to start from.")
    if tokens < 1:
        raise UserError(f"the number of tokens must be at least 1, not {tokens}.")
    if max(prompt) >= vocab_size or min(prompt) < 0:
        raise UserError(f"the prompt holds token {max(prompt)}; the model has {vocab_size:,}.")
    if len(prompt) + tokens > positions:
        raise UserError(
            f"the prompt's {len(prompt):,} tokens and {tokens:,} more exceed the model's "
            f"{positions:,} positions."
        )


def next_logits(
    model: GPTModel | HybridModel,
    sequence: Sequence[int],
    context: StaticInferenceContext | None,
) -> Tensor:
    """Logits [V] of the token after ``sequence``; runs only what ``context`` does not know yet."""
    known = context.sequence_len_offset if context is not None else 0
    new = torch.tensor([sequence[known:]], device="cuda")
    positions = torch.arange(known, len(sequence), device="cuda")[None]
    logits = model(new, positions, None, inference_context=context, runtime_gather_output=True)
    if context is not None:
        context.increment_sequence_len_offset(new.shape[1])
        context.enable_decode_mode()
    return logits[0, -1]
