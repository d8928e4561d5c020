"""Tensor names: Hugging Face's and Megatron's, as tables.

A ``Rule`` is one Megatron tensor and what it is made of. ``{l}`` is the layer's number, ``{e}`` the
expert's, ``{m}`` that of a layer of multi-token prediction. Shapes are in the words of
``arguments.dimensions``: ``"q hidden"`` is [q, hidden].

Megatron's names are those of ``torch_dist.TorchDistSource.modules``. Two differ between its layer
specs (models/gpt/gpt_layer_specs.py): a norm that Transformer Engine fuses into the linear after it
is ``<linear>.layer_norm_weight`` there; the local spec has the norm's own name (``local``), which,
it stores under the fused one (``sharded_state_dict_keys_map``) in models without latent attention.
Both are read, the one of the chosen ``transformer-impl`` is written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor.

    Attributes:
        megatron: its name.
        hf: names and shapes of the Hugging Face tensors that it holds.
        how: ``copy``, ``cat`` (one after the other) or ``qkv`` (group by group).
        layers: ``all``, ``dense`` or ``moe``.
        when: a setting of ``arguments.dimensions`` that must hold.
        local: its name under the local layer spec, where that is another.
        linear: a linear layer: carries Megatron's ``_extra_state``.
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    how: str = "copy"
    layers: str = "all"
    when: str = ""
    local: str = ""
    linear: bool = False


#: A layer of the model.
DECODER = "decoder.layers.{l}."
_M, _H = DECODER, "model.layers.{l}."
_ATTN, _EXPERT = _M + "self_attention.", "mlp.experts.{e}."

MODEL = (
    Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocab hidden"),)),
    Rule("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),)),
    Rule("output_layer.weight", (("lm_head.weight", "vocab hidden"),), when="untied"),
)

ATTENTION = (
    Rule(_ATTN + "linear_qkv.layer_norm_weight", ((_H + "input_layernorm.weight", "hidden"),)),
    Rule(
        _ATTN + "linear_qkv.weight",
        (
            (_H + "self_attn.q_proj.weight", "q hidden"),
            (_H + "self_attn.k_proj.weight", "kv hidden"),
            (_H + "self_attn.v_proj.weight", "kv hidden"),
        ),
        how="qkv",
        linear=True,
    ),
    Rule(
        _ATTN + "linear_qkv.bias",
        (
            (_H + "self_attn.q_proj.bias", "q"),
            (_H + "self_attn.k_proj.bias", "kv"),
            (_H + "self_attn.v_proj.bias", "kv"),
        ),
        how="qkv",
        when="qkv_bias",
    ),
    Rule(
        _ATTN + "q_layernorm.weight",
        ((_H + "self_attn.q_norm.weight", "channels"),),
        when="qk_norm",
    ),
    Rule(
        _ATTN + "k_layernorm.weight",
        ((_H + "self_attn.k_norm.weight", "channels"),),
        when="qk_norm",
    ),
    Rule(
        _ATTN + "linear_proj.weight",
        ((_H + "self_attn.o_proj.weight", "hidden q"),),
        linear=True,
    ),
    Rule(
        _M + "mlp.linear_fc1.layer_norm_weight",
        ((_H + "post_attention_layernorm.weight", "hidden"),),
    ),
)

LATENT_ATTENTION = (
    Rule(_M + "input_layernorm.weight", ((_H + "input_layernorm.weight", "hidden"),)),
    Rule(
        _ATTN + "linear_q_down_proj.weight",
        ((_H + "self_attn.q_a_proj.weight", "q_lora hidden"),),
        linear=True,
    ),
    Rule(
        _ATTN + "linear_q_up_proj.layer_norm_weight",
        ((_H + "self_attn.q_a_layernorm.weight", "q_lora"),),
        local=_ATTN + "q_layernorm.weight",
    ),
    Rule(
        _ATTN + "linear_q_up_proj.weight",
        ((_H + "self_attn.q_b_proj.weight", "q q_lora"),),
        linear=True,
    ),
    Rule(
        _ATTN + "linear_kv_down_proj.weight",
        ((_H + "self_attn.kv_a_proj_with_mqa.weight", "kv_down hidden"),),
        linear=True,
    ),
    Rule(
        _ATTN + "linear_kv_up_proj.layer_norm_weight",
        ((_H + "self_attn.kv_a_layernorm.weight", "kv_lora"),),
        local=_ATTN + "kv_layernorm.weight",
    ),
    Rule(
        _ATTN + "linear_kv_up_proj.weight",
        ((_H + "self_attn.kv_b_proj.weight", "kv_up kv_lora"),),
        linear=True,
    ),
    Rule(
        _ATTN + "linear_proj.weight",
        ((_H + "self_attn.o_proj.weight", "hidden v"),),
        linear=True,
    ),
    Rule(
        _M + "mlp.linear_fc1.layer_norm_weight",
        ((_H + "post_attention_layernorm.weight", "hidden"),),
        layers="dense",
        local=_M + "pre_mlp_layernorm.weight",
    ),
    Rule(
        _M + "pre_mlp_layernorm.weight",
        ((_H + "post_attention_layernorm.weight", "hidden"),),
        layers="moe",
    ),
)


def _gated(megatron: str, hf: str, width: str, layers: str, when: str = "") -> tuple[Rule, ...]:
    """A gated MLP: fc1 is the gate's rows, then the up projection's."""
    gate, up, down = (_H + hf + f"{name}_proj.weight" for name in ("gate", "up", "down"))
    inside, outside = f"{width} hidden", f"hidden {width}"
    return (
        Rule(
            _M + megatron + "linear_fc1.weight",
            ((gate, inside), (up, inside)),
            how="cat",
            layers=layers,
            when=when,
            linear=True,
        ),
        Rule(
            _M + megatron + "linear_fc2.weight",
            ((down, outside),),
            layers=layers,
            when=when,
            linear=True,
        ),
    )


DENSE_MLP = _gated("mlp.", "mlp.", "ffn", "dense")

MOE = (
    Rule(
        _M + "mlp.router.weight",
        ((_H + "mlp.gate.weight", "experts hidden"),),
        layers="moe",
    ),
    Rule(
        _M + "mlp.router.expert_bias",
        ((_H + "mlp.gate.e_score_correction_bias", "experts"),),
        layers="moe",
        when="expert_bias",
    ),
    *_gated("mlp.experts.local_experts.{e}.", _EXPERT, "expert_ffn", "moe"),
    *_gated("mlp.shared_experts.", "mlp.shared_experts.", "shared_ffn", "moe", when="shared"),
)

#: A multi-token prediction layer besides its transformer layer. ``{m}`` is its number; in
#: DeepSeek-V3's folders it is layer ``{l}`` = num_hidden_layers + m, with the tensors of an
#: ordinary last layer. Megatron stores that one under ``PREDICTION``
#: (transformer/multi_token_prediction.py:1551, ``sharded_state_dict``).
_P = "mtp.layers.{m}."
PREDICTION = _P + "transformer_layer."
MTP = (
    Rule(_P + "enorm.weight", ((_H + "enorm.weight", "hidden"),)),
    Rule(_P + "hnorm.weight", ((_H + "hnorm.weight", "hidden"),)),
    Rule(_P + "eh_proj.weight", ((_H + "eh_proj.weight", "hidden two_hidden"),), linear=True),
    Rule(_P + "final_layernorm.weight", ((_H + "shared_head.norm.weight", "hidden"),)),
)
#: DeepSeek-V3's folders repeat the embedding and the head in each: here -> what they repeat.
MTP_COPIES = {
    _H + "embed_tokens.weight": "model.embed_tokens.weight",
    _H + "shared_head.head.weight": "lm_head.weight",
}
#: What tells how many there are.
MTP_SIGN = _H + "eh_proj.weight"

#: ``model_type`` of a Hugging Face config -> the tables of its tensors.
FAMILIES: dict[str, tuple[Rule, ...]] = {
    "llama": MODEL + ATTENTION + DENSE_MLP,
    "qwen2": MODEL + ATTENTION + DENSE_MLP,
    "qwen3": MODEL + ATTENTION + DENSE_MLP,
    "deepseek_v3": MODEL + LATENT_ATTENTION + DENSE_MLP + MOE,
}

#: What checkpoints hold besides and models do not need.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

#: Modules with an ``_extra_state`` besides the linear ones (Transformer Engine's attention).
EXTRA_STATES = (_ATTN + "core_attention",)
