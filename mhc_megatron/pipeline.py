"""n*C channels between pipeline stages.

Megatron's schedules take the shape of what travels between stages from the configuration that they
find on the model: ``get_model_config(model)`` (core/utils.py:688 of megatron-core 0.19.2), then
``config.hidden_size`` (core/pipeline_parallel/schedules.py:1157 interleaved, :2116 1F1B). The
layers were built with a configuration of their own by then. So the model gets a view of it that
differs in ``hidden_size`` alone. Nothing is sent twice and no shapes are exchanged, which
``variable_seq_lengths`` would do at every hop.
"""

from __future__ import annotations

import functools

from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mhc_megatron import wire
from mhc_megatron.config import MHCConfig
from mhc_megatron.streams import enter


def widen_pipeline[Model: (nn.Module, list[nn.Module])](model: Model, mhc: MHCConfig) -> Model:
    """Let n*C channels travel between the pipeline stages of ``model``; returns ``model``.

    Call it once on the chunks of a model, either after they were wrapped for training (a
    ``post_wrap_hooks`` entry of Megatron's model configuration does that), or on the bare model in
    a ``model_provider`` function. ``MHCModelBuilder`` calls it itself.

    Without pipeline parallelism, or where ``mhc`` is not enabled, nothing changes.
    """
    for chunk in model if isinstance(model, list) else [model]:
        wrappers = list(_unwrap(chunk))
        config = wrappers[-1].config
        if not mhc.enabled or config.pipeline_model_parallel_size == 1:
            continue
        if not isinstance(config, WideConfig):
            wire.choose(mhc, config)
            _meet_narrow_hops(wrappers[-1], mhc.n, config.hidden_size)
        for wrapper in wrappers:
            wrapper.config = wide_config(wrapper.config, mhc.n)
    return model


def embedding_ranks(pp_ranks: list[int], config: TransformerConfig, tied: bool) -> list[int]:
    """Ranks of a pipeline that hold the word embeddings: Megatron's ``get_embedding_ranks``.

    The first stage, the last one where the output layer is ``tied`` to it, and every stage with
    multi-token prediction. The megatron-core wheel's default knows the first two; without this the
    embedding of an MTP stage before the last would drift from the first stage's.
    """
    ranks = {pp_ranks[0]} | set(get_mtp_ranks(pp_ranks, config))
    if tied:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)


class WideConfig:
    """Marks a view made by ``wide_config``."""


def wide_config(config: TransformerConfig, n: int) -> TransformerConfig:
    """A view of ``config`` whose ``hidden_size`` is n times as large.

    Not a copy: both share every other attribute, in both directions, because the trainer sets
    functions on what it takes for the model's configuration (``grad_scale_func``, ``no_sync_func``)
    that the layers read from theirs.
    """
    if isinstance(config, WideConfig):
        return config
    view = object.__new__(_wide_class(type(config), n))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


@functools.cache
def _wide_class(base: type[TransformerConfig], n: int) -> type[TransformerConfig]:
    def hidden_size(config: TransformerConfig) -> int:
        return n * config.__dict__["hidden_size"]

    return type(f"Wide{base.__name__}", (WideConfig, base), {"hidden_size": property(hidden_size)})


def _unwrap(module: nn.Module):
    """DistributedDataParallel, Float16Module, ..., the model itself."""
    yield module
    while hasattr(module, "module"):
        module = module.module
        yield module


def _meet_narrow_hops(model: nn.Module, n: int, C: int) -> None:
    """Every hop carries n*C channels, also the two that have only C to say.

    Those come after a stage without layers (an embedding of its own), and after the final norm of a
    model whose multi-token prediction sits on a later stage. The streams are n copies of one
    there; the receiver of the second takes the first of them back.
    """

    def widen(decoder: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        return enter(out, n) if out.shape[-1] == C else out

    def narrow(decoder: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        return out[..., :C].contiguous() if out.shape[-1] == n * C else out

    with_mtp = bool(getattr(model, "mtp_process", False))
    if not model.post_process and not with_mtp:
        model.decoder.register_forward_hook(widen)
    elif len(model.decoder.layers) == 0 and model.config.mtp_num_layers:
        model.decoder.register_forward_hook(narrow)
