"""What a layout asks of each GPU: weights, optimizer, residual streams, and bytes between stages.

Arithmetic on ``counting.model``'s items, without building anything. It covers what
hyper-connections and the layout decide; the activations inside attention, MLP and experts, which
recompute settings and Transformer Engine decide, are not in it.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from mhc_megatron.config import MHCConfig
from mhc_megatron.counting import Item, Part, model, query_groups
from mhc_megatron.errors import UserError

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

#: Items of one model chunk, and the chunks of one pipeline stage.
Chunk = list[Item]
Stage = list[Chunk]


@dataclass(frozen=True)
class Footprint:
    """One GPU of one pipeline stage; sizes in bytes, streams in bytes of the model's dtype.

    Attributes:
        stage: pipeline rank, from 0.
        holds: what its chunks hold, as Megatron's layout strings have it: ``Ett|tt``.
        parameters: on this GPU.
        weights: of the parameters.
        gradients: the buffers they are added up in.
        optimizer: float32 copies of half-precision weights, and two moments.
        in_flight: microbatches of one chunk whose activations wait for backward, at most.
        residual: what a residual model of width C would store between its sublayers for them.
        streams: the same, x of n*C channels stored before every sublayer.
        recomputed: with Eq. (20)'s blocks instead: x before every block, and the n + 2 tensors of
            a token and sublayer of the one block that is being recomputed.
        L_r: sublayers of such a block of decoder layers: what ``mhc.recompute`` says, the best
            integer where it is ``auto`` or off; 0 without hyper-connections.
        p2p: of one activation sent on to the next stage; its gradient comes back as large.
    """

    stage: int
    holds: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    in_flight: int
    residual: int
    streams: int
    recomputed: int
    L_r: int
    p2p: int

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer


def footprints(args: Namespace, mhc: MHCConfig) -> list[Footprint]:
    """One for each pipeline stage, by rank.

    Raises:
        UserError: layers that do not divide over the stages, heads that do not over the
            tensor-parallel ranks; a model that cannot be counted.
    """
    check_heads(args)
    return [_footprint(args, mhc, rank, stage) for rank, stage in enumerate(stages(args, mhc))]


# ------------------------------------------------------------------------------------------ layout


def check_heads(args: Namespace) -> None:
    """What attention asks of its heads, which Megatron looks at when it builds a layer.

    As core/transformer/transformer_config.py (``TransformerConfig.__post_init__``) and attention.py
    have it.

    Raises:
        UserError: heads or query groups that do not divide.
    """
    heads, groups = args.num_attention_heads, query_groups(args)
    tp = args.tensor_model_parallel_size
    if heads % tp:
        raise UserError(f"{heads} attention heads do not divide over {tp} tensor-parallel ranks.")
    if groups % tp and tp % groups:
        raise UserError(
            f"num-query-groups ({groups}) must be a multiple or a divisor of "
            f"tensor-model-parallel-size ({tp})."
        )
    if heads % groups:
        raise UserError(f"{heads} attention heads do not divide into {groups} query groups.")


def stages(args: Namespace, mhc: MHCConfig) -> list[Stage]:
    """The model's items over stages and their chunks."""
    p, v = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    queues: dict[str, list[Item]] = {}
    for item in model(args, mhc):
        queues.setdefault(item.kind, []).append(item)
    chunks = [[queues[kind].pop(0) for kind in kinds] for kinds in _with_final(chunk_kinds(args))]
    return [[chunks[rank + turn * p] for turn in range(v)] for rank in range(p)]


def chunk_kinds(args: Namespace) -> list[list[str]]:
    """The kinds of each chunk's items, in the order in which data passes them.

    As core/transformer/transformer_block.py (``get_num_layers_to_build``) and the class of custom
    layouts, pipeline_parallel_layer_layout.py, divide them.
    """
    if args.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        rows = PipelineParallelLayerLayout.parse_str_to_list(
            str(args.pipeline_model_parallel_layout)
        )
        return [[kind.name for kind in row] for row in rows]
    layers = _layers_by_chunk(args)
    kinds = [["decoder"] * n for n in layers]
    kinds[0].insert(0, "embedding")
    kinds[-1] += ["mtp"] * (args.mtp_num_layers or 0) + ["loss"]
    return kinds


def _with_final(chunks: list[list[str]]) -> list[list[str]]:
    """The final norm comes before what first needs it (``has_final_layernorm_in_this_stage``)."""
    for kinds in chunks:
        first = next((i for i, kind in enumerate(kinds) if kind in ("mtp", "loss")), None)
        if first is not None:
            kinds.insert(first, "final")
            break
    return chunks


def _layers_by_chunk(args: Namespace) -> list[int]:
    """Decoder layers of each chunk, by the order of data, where there is no custom layout."""
    p, v = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    ends = {
        0: args.decoder_first_pipeline_num_layers,
        p - 1: args.decoder_last_pipeline_num_layers,
    }
    given = {rank: n for rank, n in ends.items() if n is not None}
    first = int(bool(args.account_for_embedding_in_pipeline_split))
    last = int(bool(args.account_for_loss_in_pipeline_split))
    left = args.num_layers - sum(given.values()) + first + last
    ranks = p - len(given)
    if left < 0 or (ranks and left % ranks) or (not ranks and left):
        raise UserError(f"{args.num_layers} layers do not divide over {p} pipeline stages.")
    of_rank = [given.get(rank, left // max(ranks, 1)) for rank in range(p)]
    if any(n % v for n in of_rank):
        raise UserError(f"the layers of a stage do not divide over {v} virtual stages.")
    chunks = [of_rank[rank] // v for _ in range(v) for rank in range(p)]
    chunks[0] -= first
    chunks[-1] -= last
    return chunks


def _holds(stage: Stage) -> str:
    letters = {"embedding": "E", "decoder": "t", "final": "", "mtp": "m", "loss": "L"}
    return "|".join("".join(letters[item.kind] for item in chunk) for chunk in stage)


# ------------------------------------------------------------------------------------------ memory


def _footprint(args: Namespace, mhc: MHCConfig, rank: int, stage: Stage) -> Footprint:
    parts = [part for chunk in stage for item in chunk for part in item.parts]
    parts += _copies(args, mhc, stage)
    streams = _streams(args, mhc, rank, stage)
    last = rank == args.pipeline_model_parallel_size - 1
    ends_here = last and len(stage) == 1
    width = (mhc.n if mhc.enabled else 1) * args.hidden_size
    return Footprint(
        stage=rank,
        holds=_holds(stage),
        parameters=sum(_local(args, part) for part in parts),
        weights=sum(_local(args, part) * _width(args, part) for part in parts),
        gradients=sum(_local(args, part) * _gradient_width(args, part) for part in parts),
        optimizer=round(sum(_optimizer(args, part) for part in parts)),
        p2p=0 if ends_here else _tokens(args) * width * _dtype_bytes(args),
        **streams,
    )


def _copies(args: Namespace, mhc: MHCConfig, stage: Stage) -> list[Part]:
    """Tables that a stage has as a copy of another stage's: of the embedding, of the output."""
    kinds = {item.kind for chunk in stage for item in chunk}
    tied = not args.untie_embeddings_and_output_weights
    table = Part("embedding", split=args.padded_vocab_size * args.hidden_size)
    copies = []
    if "embedding" not in kinds and ("mtp" in kinds or ("loss" in kinds and tied)):
        copies.append(table)
    if "mtp" in kinds and "loss" not in kinds and not tied:
        copies.append(table)
    return copies


def _local(args: Namespace, part: Part) -> int:
    """Parameters of ``part`` on one GPU."""
    expert_ranks = args.expert_model_parallel_size * _expert_tensor(args)
    return (
        -(-part.split // args.tensor_model_parallel_size)
        + part.whole
        + -(-part.expert // expert_ranks)
    )


def _expert_tensor(args: Namespace) -> int:
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def _dtype_bytes(args: Namespace) -> int:
    return 2 if args.bf16 or args.fp16 else 4


def _width(args: Namespace, part: Part) -> int:
    return 4 if part.fp32 else _dtype_bytes(args)


def _gradient_width(args: Namespace, part: Part) -> int:
    in_fp32 = part.fp32 or args.accumulate_allreduce_grads_in_fp32
    return 4 if in_fp32 else _dtype_bytes(args)


def _optimizer(args: Namespace, part: Part) -> float:
    """Bytes of float32 weights (where the model's are narrower) and Adam's moments."""
    moments = _BYTES[_name(args.exp_avg_dtype)] + _BYTES[_name(args.exp_avg_sq_dtype)]
    main = 0 if _width(args, part) == 4 else 4
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    dense_shards = expert_shards = 1
    if args.use_distributed_optimizer:
        dense_shards = args.world_size // ranks
        expert_ranks = _expert_tensor(args) * args.expert_model_parallel_size
        expert_shards = args.world_size // (expert_ranks * args.pipeline_model_parallel_size)
    dense = part.split / args.tensor_model_parallel_size + part.whole
    expert = part.expert / (args.expert_model_parallel_size * _expert_tensor(args))
    return (main + moments) * (dense / dense_shards + expert / expert_shards)


def _name(dtype: object) -> str:
    """``fp32`` for "fp32" and for torch.float32, which Megatron's checks turn it into."""
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return names.get(str(dtype), "fp8" if "uint8" in str(dtype) else str(dtype))


# ----------------------------------------------------------------------------------------- streams


def _streams(args: Namespace, mhc: MHCConfig, rank: int, stage: Stage) -> dict[str, int]:
    sublayers = [sum(item.sublayers for item in chunk) for chunk in stage]
    waiting = in_flight(args, rank)
    per_token = _tokens(args) * args.hidden_size * _dtype_bytes(args)
    # Chunks of a stage take turns, so their mean stands for each that waits.
    stored = waiting * sum(sublayers) / len(sublayers)
    n = mhc.n if mhc.enabled else 1
    L_r, elements = 0, 0
    if mhc.enabled and max(sublayers):
        largest = stage[sublayers.index(max(sublayers))]
        L_r, elements = _blocks(mhc, largest, waiting)
    return {
        "in_flight": waiting,
        "residual": round(stored * per_token),
        "streams": round(n * stored * per_token),
        "recomputed": elements * per_token,
        "L_r": L_r,
    }


def _blocks(mhc: MHCConfig, chunk: Chunk, m: int) -> tuple[int, int]:
    """L_r of a chunk's decoder layers (of its prediction layers, if there is nothing else), and the
    width stored: each prediction layer has blocks of its own (recompute.py)."""
    decoder = sum(item.sublayers for item in chunk if item.kind == "decoder")
    runs = [decoder, *(item.sublayers for item in chunk if item.kind == "mtp")]
    kept, refilled, chosen = 0, 0, 0
    for L in filter(None, runs):
        L_r = min(mhc.recompute, L) if isinstance(mhc.recompute, int) else 0
        L_r = L_r or best_block(mhc.n, L, m)[0]
        kept += mhc.n * math.ceil(L / L_r) * m
        refilled, chosen = max(refilled, (mhc.n + 2) * L_r), chosen or L_r
    return chosen, kept + refilled


def best_block(n: int, L: int, m: int = 1) -> tuple[int, int]:
    """Eq. (20): (L_r, width stored) for L sublayers with m microbatches waiting.

    L_r minimizes n ceil(L / L_r) m + (n + 2) L_r, in multiples of C for a token: x before every
    block of each microbatch, and x, u and norm(u) of every sublayer of one block at a time. Blocks
    do not cross a chunk, so L_r is at most L.
    """
    widths = {L_r: n * math.ceil(L / L_r) * m + (n + 2) * L_r for L_r in range(1, L + 1)}
    best = min(widths, key=lambda L_r: widths[L_r])
    return best, widths[best]


def in_flight(args: Namespace, rank: int) -> int:
    """``microbatches_in_flight`` of Megatron's arguments."""
    return microbatches_in_flight(
        args.pipeline_model_parallel_size,
        rank,
        args.virtual_pipeline_model_parallel_size or 1,
        getattr(args, "microbatch_group_size_per_vp_stage", None),
        args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
    )


def microbatches_in_flight(
    p: int, rank: int, v: int = 1, group: int | None = None, batches: int | None = None
) -> int:
    """Microbatches of a chunk that wait for their backward on ``rank`` of p stages, at most.

    1F1B: the stages from this one on. Interleaved, v chunks a stage in groups of ``group``
    microbatches: the warmup of core/pipeline_parallel/schedules.py
    (``get_pp_rank_microbatches``) and one more. ``batches``: microbatches of a step, if known.
    """
    if p == 1:
        return 1
    waiting = p - rank if v == 1 else 2 * (p - rank - 1) + (v - 1) * (group or p) + 1
    return waiting if batches is None else min(batches * v, waiting)


def _tokens(args: Namespace) -> int:
    """Of one microbatch on one GPU, between sublayers."""
    split = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return args.micro_batch_size * args.seq_length // (args.context_parallel_size * split)


def largest(of: Sequence[Footprint]) -> Footprint:
    """The stage whose weights, gradients, optimizer and streams need most memory."""
    return max(of, key=lambda footprint: footprint.state + footprint.streams)
