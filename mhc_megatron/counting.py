"""Parameters and floating-point operations of a model by formula, from Megatron's parsed arguments.

A model is a list of *items*: the embedding, its decoder layers, the final norm, multi-token
prediction layers, and the output. Each item is a few ``Part``s. ``tests/test_counting.py`` builds
the models and finds the same numbers; the formulas follow megatron-core 0.19.2's modules
(transformer/attention.py, multi_latent_attention.py, mlp.py, moe/, multi_token_prediction.py).

A token's *active* parameters are those that it is multiplied with: everything but the embedding
table, which it looks up, and the experts that it does not meet. With the connections counted,
this is the definition that gives the paper's numbers (.612, 1.66 and 4.14 B). Multi-token
prediction, which serves training, is apart from total and active parameters alike, as DeepSeek-V3
does it (671 B and 37 B).
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Backward costs two products for each one forward.
TRAINING = 3


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model, by how a parallel layout spreads them.

    Attributes:
        name: attention, dense, router, experts, shared, norms, connections, embedding, output or
            mtp.
        split: over tensor-parallel ranks.
        whole: on every rank of a stage.
        expert: over expert- and expert-tensor-parallel ranks.
        active: those of all three that a token is multiplied with.
        products: those of ``active`` in matrix products, 2 FLOPs each; the connections', whose
            operations ``connection_flops`` knows, not among them.
        fp32: they are float32 whatever the model's dtype.
    """

    name: str
    split: int = 0
    whole: int = 0
    expert: int = 0
    active: int = 0
    products: int = 0
    fp32: bool = False

    @property
    def total(self) -> int:
        return self.split + self.whole + self.expert


def matrices(name: str, split: int = 0, whole: int = 0) -> Part:
    """A part of matrices that every token is multiplied with."""
    return Part(name, split=split, whole=whole, active=split + whole, products=split + whole)


def vectors(name: str, whole: int, split: int = 0) -> Part:
    """A part of norms' weights or biases."""
    return Part(name, split=split, whole=whole, active=whole + split)


@dataclass(frozen=True)
class Item:
    """A piece of a pipeline stage.

    Attributes:
        kind: ``embedding``, ``decoder``, ``mtp`` or ``loss``, as Megatron's LayerType names them,
            or ``final``: the streams' exit and the norm after it.
        parts: its parameters.
        sublayers: residual functions in it, each with a connection.
    """

    kind: str
    parts: tuple[Part, ...]
    sublayers: int = 0

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model; ``total`` and ``active`` without multi-token prediction.

    Attributes:
        total: all parameters, the connections' included.
        active: those a token is multiplied with.
        connections: those of the hyper-connections, the prediction layers' too.
        mtp: those of the multi-token prediction layers.
        parts: total by name of part, multi-token prediction as one of them.
    """

    total: int
    active: int
    connections: int
    mtp: int
    parts: dict[str, int]


def count(args: Namespace, mhc: MHCConfig) -> Counts:
    """Parameters of the whole model.

    Raises:
        UserError: a kind of model that the formulas do not cover.
    """
    items = model(args, mhc)
    main = [part for item in items if item.kind != "mtp" for part in item.parts]
    mtp = sum(item.total for item in items if item.kind == "mtp")
    parts: dict[str, int] = {}
    for part in main:
        parts[part.name] = parts.get(part.name, 0) + part.total
    return Counts(
        total=sum(part.total for part in main),
        active=sum(part.active for part in main),
        connections=sum(p.total for i in items for p in i.parts if p.name == "connections"),
        mtp=mtp,
        parts=parts | ({"mtp": mtp} if mtp else {}),
    )


def model(args: Namespace, mhc: MHCConfig) -> list[Item]:
    """The items of a model, from the embedding to the loss."""
    check_supported(args)
    experts = moe_layers(args)
    layers = [Item("decoder", _layer(args, mhc, moe), 2) for moe in experts]
    predictions = [
        Item("mtp", (*_layer(args, mhc, experts[-1]), *_prediction(args, mhc)), 2)
        for _ in range(args.mtp_num_layers or 0)
    ]
    final = Item("final", (vectors("norms", _norm(args)), *_exit(args, mhc)))
    loss = Item("loss", (output(args),))
    return [Item("embedding", (embedding(args),)), *layers, final, *predictions, loss]


def check_supported(args: Namespace) -> None:
    """Raise UserError for models that the formulas do not cover."""
    for key in ("moe_latent_size", "experimental_attention_variant", "hybrid_layer_pattern"):
        if getattr(args, key, None) is not None:
            name = key.replace("_", "-")
            raise UserError(f"parameters of a model with {name} cannot be counted by formula.")
    if getattr(args, "heterogeneous_layers_config_path", None) or args.attention_output_gate:
        raise UserError(
            "parameters of heterogeneous layers or gated attention cannot be counted by formula."
        )


def moe_layers(args: Namespace) -> list[bool]:
    """Which decoder layers have experts (``--moe-layer-freq``)."""
    if args.num_experts is None:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [i % args.moe_layer_freq == 0 for i in range(args.num_layers)]
    return [bool(moe) for moe in args.moe_layer_freq]


# ------------------------------------------------------------------------------------------- parts


def embedding(args: Namespace) -> Part:
    """Token table, looked up rather than multiplied with, and a table of learned positions."""
    learned = args.position_embedding_type == "learned_absolute"
    positions = args.max_position_embeddings * args.hidden_size if learned else 0
    table = args.padded_vocab_size * args.hidden_size
    if args.untie_embeddings_and_output_weights:
        return Part("embedding", split=table, whole=positions)
    return Part("embedding", split=table, whole=positions, active=table, products=table)


def output(args: Namespace) -> Part:
    """The output matrix; tied, it is the embedding's table and has no parameters of its own."""
    tied = not args.untie_embeddings_and_output_weights
    return matrices("output", split=0 if tied else args.padded_vocab_size * args.hidden_size)


def _norm(args: Namespace, width: int | None = None) -> int:
    return (width or args.hidden_size) * (2 if args.normalization == "LayerNorm" else 1)


def _layer(args: Namespace, mhc: MHCConfig, moe: bool) -> tuple[Part, ...]:
    connections = Part("connections")
    if mhc.enabled:
        own = mhc.K * mhc.n * args.hidden_size + mhc.K + mhc.alphas
        connections = Part("connections", whole=2 * own, active=2 * own, fp32=True)
    attention = _latent_attention(args) if args.multi_latent_attention else _attention(args)
    mlp = _moe(args) if moe else _mlp("dense", args, args.ffn_hidden_size)
    return (vectors("norms", 2 * _norm(args)), *attention, *mlp, connections)


def _attention(args: Namespace) -> tuple[Part, ...]:
    C, D, heads = args.hidden_size, args.kv_channels, args.num_attention_heads
    qkv = D * (heads + 2 * query_groups(args))
    bias_qkv = qkv if args.add_bias_linear or args.add_qkv_bias else 0
    return (
        matrices("attention", split=C * qkv + D * heads * C),
        vectors("attention", split=bias_qkv, whole=C if args.add_bias_linear else 0),
        vectors("norms", 2 * _norm(args, D) if args.qk_layernorm else 0),
    )


def query_groups(args: Namespace) -> int:
    """Heads of keys and values; as many as of queries where they are not grouped."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _latent_attention(args: Namespace) -> tuple[Part, ...]:
    """Multi-latent attention: low-rank keys and values, queries too where they have a rank."""
    C, heads, rank_kv, rank_q = (
        args.hidden_size,
        args.num_attention_heads,
        args.kv_lora_rank,
        args.q_lora_rank,
    )
    query = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
    up = rank_kv * heads * (args.qk_head_dim + args.v_head_dim)
    out = heads * args.v_head_dim * C
    down = C * (rank_kv + args.qk_pos_emb_head_dim) + (C * rank_q if rank_q else 0)
    # Without a rank of their own, Megatron norms the queries' input again (mla_qk_norm_config.py).
    norms = _norm(args, rank_kv) + _norm(args, rank_q or C)
    return (
        # Megatron keeps the down-projections whole on every tensor-parallel rank.
        matrices("attention", split=(rank_q or C) * query + up + out, whole=down),
        vectors("attention", C if args.add_bias_linear else 0),
        vectors("norms", norms if args.qk_layernorm else 0),
    )


def _mlp(name: str, args: Namespace, width: int) -> tuple[Part, ...]:
    up = (2 if args.swiglu else 1) * width
    parts = [matrices(name, split=args.hidden_size * (up + width))]
    if args.add_bias_linear:
        parts.append(vectors(name, split=up, whole=args.hidden_size))
    return tuple(parts)


def _moe(args: Namespace) -> tuple[Part, ...]:
    """Router, routed experts, shared expert."""
    C, E = args.hidden_size, args.num_experts
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    up = (2 if args.swiglu else 1) * width
    weights, biases = C * (up + width), (up + C) if args.add_bias_linear else 0
    topk = args.moe_router_topk
    routed = Part(
        "experts",
        expert=E * (weights + biases),
        active=topk * (weights + biases),
        products=topk * weights,
    )
    parts = [matrices("router", whole=C * E), routed]
    if args.add_bias_linear:
        parts.append(vectors("router", E))
    if args.moe_shared_expert_intermediate_size:
        parts += _mlp("shared", args, args.moe_shared_expert_intermediate_size)
        if args.moe_shared_expert_gate:
            parts.append(matrices("shared", whole=C))
    return tuple(parts)


def _exit(args: Namespace, mhc: MHCConfig) -> tuple[Part, ...]:
    own = mhc.parameters(0, args.hidden_size)
    return (Part("connections", whole=own, active=own, fp32=True),) if own else ()


def _prediction(args: Namespace, mhc: MHCConfig) -> tuple[Part, ...]:
    """What a multi-token prediction layer has beside its decoder layer."""
    C = args.hidden_size
    return (
        matrices("mtp", split=2 * C * C),  # eh_proj
        vectors("norms", 3 * _norm(args)),  # of the embedding, the state, and the output
        *_exit(args, mhc),
    )


# ------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token in training, forward and backward, nothing recomputed.

    Attributes:
        model: of the model without hyper-connections; MFU counts these.
        attention: the part of ``model`` that grows with the sequence's length.
        connections: what the hyper-connections add.
    """

    model: float
    attention: float
    connections: float


def flops(args: Namespace, mhc: MHCConfig) -> Flops:
    """Operations a token of a sequence of ``args.seq_length``, causal attention."""
    items = model(args, mhc)
    layers = args.num_layers + (args.mtp_num_layers or 0)
    products = sum(part.products for item in items for part in item.parts)
    # Every prediction multiplies with the output matrix once more.
    products += (args.mtp_num_layers or 0) * args.padded_vocab_size * args.hidden_size
    attention = layers * attention_flops(args)
    sublayers = sum(item.sublayers for item in items)
    return Flops(
        model=TRAINING * (2 * products + attention),
        attention=TRAINING * attention,
        connections=TRAINING * sublayers * connection_flops(mhc, args.hidden_size),
    )


def attention_flops(args: Namespace) -> float:
    """Forward operations a token of one core attention: half of all pairs, as it is causal.

    Raises:
        UserError: attention in windows, which sees fewer.
    """
    if args.window_size:  # window-attn-skip-freq does nothing without it
        raise UserError("operations of a model with window-size cannot be counted by formula.")
    if args.multi_latent_attention:
        widths = args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim
    else:
        widths = 2 * args.kv_channels
    return args.seq_length * args.num_attention_heads * widths


def connection_flops(mhc: MHCConfig, C: int) -> int:
    """Forward operations a token of one connection: x phi, then H_pre x and H_res x + H_post y.

    Variant ``identity`` has no H_res: it adds H_post y to x itself.
    """
    if not mhc.enabled:
        return 0
    mixing = 0 if mhc.variant == "identity" else mhc.n
    return 2 * mhc.n * C * (mhc.K + mixing + 2)
