"""FP8 weights in checkpoints: what Megatron and Transformer Engine leave open between them."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence

from torch import nn


@contextlib.contextmanager
def scales_before_weights(chunks: Sequence[nn.Module], args: Namespace) -> Iterator[None]:
    """Let FP8 weights with delayed scaling load as the bits that were saved.

    A checkpoint holds them dequantised, and their scales in Transformer Engine's extra state. Twice
    on the way the weights would be quantised with a fresh module's scale of 1, by which most of
    them lie among e4m3's subnormals, and go on so until the optimizer's first step:

    - Megatron's loader quantises each into the module's own tensor (``stream_ckpt_dequant``,
      core/dist_checkpointing/strategies/torch.py:602); turned off here, as Megatron turns it off
      for current scaling;
    - torch loads a module's parameters first and its extra state last
      (``Module._load_from_state_dict``); here the extra state is loaded before as well as after
      them, after since quantising writes its amax into the history.

    Other recipes compute their scales from the weights, and need nothing.
    """
    if not (getattr(args, "fp8_param_gather", False) and args.fp8_recipe == "delayed"):
        yield
        return
    handles = [
        module.register_load_state_dict_pre_hook(_load_extra_state)
        for chunk in chunks
        for module in chunk.modules()
        if getattr(module, "primary_weights_in_fp8", False)
    ]
    streamed, args.stream_ckpt_dequant = args.stream_ckpt_dequant, False
    try:
        yield
    finally:
        args.stream_ckpt_dequant = streamed
        for handle in handles:
            handle.remove()


def _load_extra_state(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Transformer Engine's grouped layer merges its experts' states in a hook of its own before."""
    state = state_dict.get(f"{prefix}_extra_state")
    if state is not None:
        module.set_extra_state(state)
