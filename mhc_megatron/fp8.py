"""FP8 weights in checkpoints: what Megatron and Transformer Engine leave open between them."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron.core.utils import unwrap_model
from torch import nn

from mhc_megatron.errors import UserError


@contextlib.contextmanager
def scales_before_weights(chunks: Sequence[nn.Module], args: Namespace) -> Iterator[None]:
    """Let FP8 weights with delayed scaling load as the bits that were saved.

    A checkpoint holds them dequantised, and their scales in Transformer Engine's extra state, which
    its modules load before their weights. Two things come before that:

    - Megatron's loader quantises each weight into the fresh module's own tensor, whose scale is 1
      (``stream_ckpt_dequant``, core/dist_checkpointing/strategies/torch.py:602): most of a weight
      then lies among e4m3's subnormals, until the optimizer's first step. Off here, as Megatron has
      it for current scaling;
    - the states of a rank's experts, saved one by one, are merged in a hook
      (core/extensions/transformer_engine.py:2249) that runs after the module took the first of them
      for its own. Merged here at the model's root, before any module loads.

    Other recipes compute their scales from the weights, and need nothing.
    """
    if not (getattr(args, "fp8_param_gather", False) and args.fp8_recipe == "delayed"):
        yield
        return
    handles = [
        root.register_load_state_dict_pre_hook(_merge_states) for root in unwrap_model([*chunks])
    ]
    streamed, args.stream_ckpt_dequant = args.stream_ckpt_dequant, False
    try:
        yield
    finally:
        args.stream_ckpt_dequant = streamed
        for handle in handles:
            handle.remove()


def _merge_states(root: nn.Module, state_dict: dict, prefix: str, *rest) -> None:
    """Run the hooks of the modules below, which find nothing left to do when their turn comes."""
    for name, module in root.named_modules():
        if module is not root and getattr(module, "primary_weights_in_fp8", False):
            for hook in module._load_state_dict_pre_hooks.values():
                hook(state_dict, f"{prefix}{name}.", *rest)


def check_expert_scales(saved: Namespace, args: Namespace) -> None:
    """Refuse delayed scales of grouped experts that are to go to ranks with more or fewer of them.

    Megatron takes a rank's scales apart as (kind, expert) and puts them together the same way
    (core/extensions/transformer_engine.py:2488, :2303); Transformer Engine has them as (expert,
    kind). What comes apart and together alike is whole; any other number of experts would get
    inputs' scales for weights, and weights beyond e4m3's largest number.

    Args:
        saved: the settings that came with the checkpoint.
        args: this run's.

    Raises:
        UserError: with what to change.
    """
    if not all(
        getattr(each, "fp8", None)
        and getattr(each, "fp8_recipe", None) == "delayed"
        and getattr(each, "num_experts", None)
        and getattr(each, "moe_grouped_gemm", False)
        for each in (saved, args)
    ):
        return
    was, now = (each.num_experts // each.expert_model_parallel_size for each in (saved, args))
    if was != now:
        raise UserError(
            f"the checkpoint in {args.load} has delayed FP8 scales of {was} experts a rank, which "
            f"Megatron would mix up for this run's {now}: set expert-model-parallel-size: "
            f"{saved.expert_model_parallel_size}."
        )
