"""A model's settings: Hugging Face's config.json and Megatron's arguments, as tables."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from typing import Any

from mhc_megatron.checkpoint.names import FAMILIES
from mhc_megatron.config import MHCConfig, nearest
from mhc_megatron.errors import UserError

#: Megatron's argument -> the config's key.
SAME: dict[str, str] = {
    "num-layers": "num_hidden_layers",
    "hidden-size": "hidden_size",
    "ffn-hidden-size": "intermediate_size",
    "num-attention-heads": "num_attention_heads",
    "max-position-embeddings": "max_position_embeddings",
    "norm-epsilon": "rms_norm_eps",
    "vocab-size": "vocab_size",
}
GROUPED_QUERY = {"num-query-groups": "num_key_value_heads", "kv-channels": "head_dim"}
LATENT = {
    "q-lora-rank": "q_lora_rank",
    "kv-lora-rank": "kv_lora_rank",
    "qk-head-dim": "qk_nope_head_dim",
    "qk-pos-emb-head-dim": "qk_rope_head_dim",
    "v-head-dim": "v_head_dim",
}
EXPERTS = {
    "num-experts": "n_routed_experts",
    "moe-ffn-hidden-size": "moe_intermediate_size",
    "moe-router-topk": "num_experts_per_tok",
    "moe-router-num-groups": "n_group",
    "moe-router-group-topk": "topk_group",
    "moe-router-topk-scaling-factor": "routed_scaling_factor",
}
YARN = {
    "rotary-scaling-factor": "factor",
    "yarn-original-max-position-embeddings": "original_max_position_embeddings",
    "yarn-beta-fast": "beta_fast",
    "yarn-beta-slow": "beta_slow",
    "mscale": "mscale",
    "mscale-all-dim": "mscale_all_dim",
}
#: What Megatron takes where they are not given (MLATransformerConfig).
YARN_DEFAULTS = {
    "factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
#: The parameters of Llama 3's scaling that Megatron has as constants (rotary_pos_embedding.py).
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: What every supported model has.
ALWAYS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "position-embedding-type": "rope",
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "tokenizer-type": "NullTokenizer",
    "make-vocab-size-divisible-by": 1,
}
#: DeepSeek-V3's routing.
ROUTING: dict[str, Any] = {
    "moe-router-score-function": "sigmoid",
    "moe-router-enable-expert-bias": True,
    "moe-router-load-balancing-type": "seq_aux_loss",
    "moe-router-dtype": "fp32",
}
#: Config keys with the only value that Megatron's layers support.
REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleave": True,
    "norm_topk_prob": True,
}
#: Megatron's settings that the exported classes do not have, with a value that has no effect.
UNSUPPORTED: dict[str, Any] = {
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "window_size": None,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "rotary_seq_len_interpolation_factor": 1,
    "moe_shared_expert_gate": False,
    "moe_latent_size": None,
    "use_mup": False,
    "hybrid_layer_pattern": None,
}
#: Where an argument's attribute is not its name.
DESTINATIONS = {"norm-epsilon": "layernorm_epsilon"}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def megatron_values(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, under their command-line names, for a Hugging Face config.

    Raises:
        UserError: a model type or a setting that is not supported.
    """
    family = config.get("model_type", "")
    if not isinstance(family, str) or family not in FAMILIES:
        near = nearest(str(family), list(FAMILIES))
        raise UserError(f"model_type {family!r} is not supported{near}")
    _check_numbers(config, family)
    for key, wanted in REQUIRED.items():
        if config.get(key, wanted) not in (wanted, None):
            raise UserError(f"{key}: {config[key]} is not supported; only {wanted} is.")
    if config.get("attention_bias") and family != "qwen2":
        raise UserError(
            "attention_bias: true is not supported: Megatron has no bias on q, k, v, o."
        )
    values = {**ALWAYS, **_named(SAME, config)}
    values["untie-embeddings-and-output-weights"] = not config.get("tie_word_embeddings", False)
    values |= _rope(config, latent=family == "deepseek_v3")
    if family == "deepseek_v3":
        return values | _latent_values(config)
    heads = config["num_attention_heads"]
    config = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads} | {
        key: value for key, value in config.items() if value is not None
    }
    values |= {"group-query-attention": True, **_named(GROUPED_QUERY, config)}
    values |= {"add-qkv-bias": family == "qwen2", "qk-layernorm": family == "qwen3"}
    return values


def _check_numbers(config: dict[str, Any], family: str) -> None:
    """The config's numbers are numbers.

    Raises:
        UserError: naming the first that is not there or is none.
    """
    sizes = [name for name in SAME.values() if name != "rms_norm_eps"]
    if family == "deepseek_v3":
        sizes += [name for name in LATENT.values() if name != "q_lora_rank"]
        _number(config, "first_k_dense_replace", whole=True, least=0)
        _number(config, "q_lora_rank", whole=True, optional=True)
    for name in sizes:
        _number(config, name, whole=True)
    _number(config, "rms_norm_eps", least=0)
    for name in GROUPED_QUERY.values():
        _number(config, name, whole=True, optional=True)
    for name in ("num_nextn_predict_layers", "n_shared_experts"):
        _number(config, name, whole=True, least=0, optional=True)
    if family == "deepseek_v3" and config["first_k_dense_replace"] < config["num_hidden_layers"]:
        for name in EXPERTS.values():
            _number(config, name, whole=name != "routed_scaling_factor")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        said = json.dumps(config["tie_word_embeddings"])
        raise UserError(f"the config: tie_word_embeddings must be true or false, not {said}.")


def _number(
    table: dict[str, Any],
    name: str,
    where: str = "the config",
    *,
    whole: bool = False,
    least: int | None = None,
    optional: bool = False,
) -> None:
    """``table[name]`` is a number, at least ``least``, by default 1 for a whole one, or above 0."""
    if name not in table and not optional:
        raise UserError(f"{where} has no {name!r}.")
    value = table.get(name)
    if value is None and optional:
        return
    # Exact for an int of hundreds of digits, false for NaN.
    fits = type(value) in ((int,) if whole else (int, float)) and value <= sys.float_info.max
    least = 1 if least is None and whole else least
    if not fits or not (value > 0 if least is None else value >= least):
        kind = "a whole number" if whole else "a number"
        bound = "above 0" if least is None else f"of at least {least}"
        raise UserError(f"{where}: {name} must be {kind} {bound}, not {json.dumps(value)[:40]}.")


def _latent_values(config: dict[str, Any]) -> dict[str, Any]:
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    if config.get("q_lora_rank") is None:
        # core/transformer/mla_qk_norm_config.py:148: with the norm that the keys and values need,
        # a direct query projection gets one too (Transformer Engine) or is refused (local).
        raise UserError(
            "q_lora_rank: null is not supported: Megatron's latent attention has no query "
            "projection without a norm of its own beside a norm of keys and values."
        )
    values = {"multi-latent-attention": True, "qk-layernorm": True, **_named(LATENT, config)}
    if dense < layers:
        shared = config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0)
        values |= {**ROUTING, **_named(EXPERTS, config)}
        _check_groups(config)
        values["moe-layer-freq"] = f"([0]*{dense}+[1]*{layers - dense})"
        values["moe-shared-expert-intermediate-size"] = shared or None
    return {key: value for key, value in values.items() if value is not None}


def _check_groups(config: dict[str, Any]) -> None:
    """DeepSeek-V3 rates a group by its two best experts; Megatron by its topk / group_topk best."""
    groups, topk = config["topk_group"], config["num_experts_per_tok"]
    if config["n_group"] > 1 and topk != 2 * groups:
        raise UserError(
            f"num_experts_per_tok must be twice topk_group for Megatron, not {topk} and {groups}."
        )


def _named(table: dict[str, str], config: dict[str, Any]) -> dict[str, Any]:
    try:
        return {key: config[name] for key, name in table.items()}
    except KeyError as error:
        raise UserError(f"the config has no {error.args[0]!r}.") from error


def _rope(config: dict[str, Any], latent: bool) -> dict[str, Any]:
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            raise UserError(f"the config: {name} must hold keys and values.")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    _number({"rope_theta": base}, "rope_theta")
    values = {"rotary-base": int(base)}
    if base != int(base) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"rope_parameters {rope} are not supported.")
    if latent:
        values |= {"rope-type": "rope", "rotary-scaling-factor": 1.0}
    if kind == "yarn" and latent:
        return values | {"rope-type": "yarn", **_yarn(rope, config)}
    if kind == "llama3" and not latent:
        for key, wanted in LLAMA3.items():
            if rope.get(key, wanted) != wanted:
                raise UserError(f"rope_parameters: {key} must be {wanted}, not {rope[key]}.")
        _number(rope, "factor", "rope_parameters")
        return values | {"use-rope-scaling": True, "rope-scaling-factor": rope["factor"]}
    if kind != "default":
        raise UserError(f"rope_type {kind!r} is not supported for this model.")
    return values


def _yarn(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for yarn; what the config leaves out is written out.

    transformers (modeling_rope_utils.py, ``_compute_yarn_parameters``) scales cos and sin by a
    given ``attention_factor``, else by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1,
    else, where one of them is missing or 0, by m(1). Megatron knows the quotient only.

    Raises:
        UserError: where the two would differ.
    """
    for name in (*YARN_DEFAULTS, "attention_factor"):  # 0 is as if it were not there
        _number(rope, name, "rope_parameters", least=0, optional=True)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    values = {
        "rotary-scaling-factor": factor,
        "yarn-original-max-position-embeddings": original,
        "yarn-beta-fast": rope.get("beta_fast") or YARN_DEFAULTS["beta_fast"],
        "yarn-beta-slow": rope.get("beta_slow") or YARN_DEFAULTS["beta_slow"],
        "mscale": YARN_DEFAULTS["mscale"] if mscale is None else mscale,
        "mscale-all-dim": YARN_DEFAULTS["mscale_all_dim"] if all_dim is None else all_dim,
    }

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    wanted = rope.get("attention_factor")
    if not wanted:
        wanted = m(mscale) / m(all_dim) if mscale and all_dim else m(1)
    if not math.isclose(wanted, m(values["mscale"]) / m(values["mscale-all-dim"]), rel_tol=1e-9):
        raise UserError(
            "rope_parameters: Megatron scales yarn's angles by mscale and mscale_all_dim only, "
            f"which gives another factor than the config's {wanted:.6g}."
        )
    if not rope.get("truncate", True):
        raise UserError("rope_parameters: truncate: false is not supported.")
    return values


def namespace(values: dict[str, Any], mhc: MHCConfig | None = None) -> Namespace:
    """Megatron's arguments as its trainer stores them, as far as a model needs them."""
    args = Namespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        iteration=0,
        add_position_embedding=True,
        add_bias_linear=False,
        padded_vocab_size=values["vocab-size"],
        mhc=(mhc or MHCConfig(variant="none")).to_mapping(),
    )
    for key, value in values.items():
        setattr(args, DESTINATIONS.get(key, key.replace("-", "_")), value)
    args.moe_layer_freq = moe_layers(args) if getattr(args, "num_experts", None) else 1
    return args


def moe_layers(args: Namespace) -> list[int]:
    """One entry a layer: 1 where its MLP is a mixture of experts."""
    layers = args.num_layers
    if not getattr(args, "num_experts", None):
        return [0] * layers
    freq = getattr(args, "moe_layer_freq", 1)
    if isinstance(freq, str):
        dense, moe = _pattern(freq)
        return [0] * dense + [1] * moe
    if isinstance(freq, int):
        return [1 if i % freq == 0 else 0 for i in range(layers)]
    return list(freq)


def predictions(args: Namespace) -> int:
    """The number of multi-token prediction layers."""
    return getattr(args, "mtp_num_layers", None) or 0


def _pattern(text: str) -> tuple[int, int]:
    """``([0]*1+[1]*2)`` -> (1, 2)."""
    dense, moe = (int(part.partition("*")[2]) for part in text.strip("()").split("+"))
    return dense, moe


def family_of(args: Namespace) -> str:
    """The Hugging Face model type of Megatron's settings.

    Raises:
        UserError: no supported one has them.
    """
    required = (
        ("num_layers", None),
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("position_embedding_type", "rope"),
    )
    for name, wanted in required:
        value = getattr(args, name, None)
        if value is None:
            raise UserError(f"the checkpoint's settings have no {name}; it cannot be exported.")
        if wanted is not None and value != wanted:
            raise UserError(f"{name}: {value} is not supported; only {wanted} is.")
    if not getattr(args, "disable_bias_linear", True) or getattr(args, "add_bias_linear", False):
        raise UserError("linear layers with a bias are not supported (disable-bias-linear).")
    for name, wanted in UNSUPPORTED.items():
        if getattr(args, name, None) not in (None, False, wanted):
            raise UserError(f"{name}: {getattr(args, name)} is not supported by export-hf.")
    if getattr(args, "rotary_percent", 1.0) != 1.0 or getattr(args, "rotary_interleaved", False):
        raise UserError("rotary-percent below 1 and rotary-interleaved are not supported.")
    if getattr(args, "multi_latent_attention", False):
        return "deepseek_v3"
    if getattr(args, "num_experts", None):
        raise UserError("a mixture of experts without latent attention is not supported.")
    if getattr(args, "qk_layernorm", False):
        return "qwen3"
    return "qwen2" if getattr(args, "add_qkv_bias", False) else "llama"


def hf_config(args: Namespace, vocab: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Hugging Face config for Megatron's settings.

    ``base`` is a config to start from: what Megatron does not know (token ids) stays as it is.
    """
    family = family_of(args)
    config = {**(base or {}), "model_type": family, "architectures": [ARCHITECTURES[family]]}
    config |= {name: _get(args, key) for key, name in SAME.items() if key != "vocab-size"}
    config |= {"vocab_size": vocab, "hidden_act": "silu", "tie_word_embeddings": not untied(args)}
    config |= {"rope_parameters": _rope_parameters(args, family == "deepseek_v3")}
    config.pop("rope_scaling", None)
    config.pop("rope_theta", None)
    if family != "deepseek_v3":
        config |= {name: _get(args, key) for key, name in GROUPED_QUERY.items()}
        if not getattr(args, "group_query_attention", False):
            config["num_key_value_heads"] = args.num_attention_heads
        if config["head_dim"] is None:
            config["head_dim"] = args.hidden_size // args.num_attention_heads
        if family == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        return config
    config |= {name: _get(args, key) for key, name in LATENT.items()}
    config["num_key_value_heads"] = args.num_attention_heads
    config["num_nextn_predict_layers"] = predictions(args)
    config["first_k_dense_replace"] = (moe_layers(args) + [1]).index(1)
    if sum(moe_layers(args)):
        _check_routing(args)
        config |= {name: _get(args, key) for key, name in EXPERTS.items()}
        for name in ("n_group", "topk_group", "routed_scaling_factor"):
            config[name] = config[name] or 1
        _check_groups(config)
        shared = getattr(args, "moe_shared_expert_intermediate_size", None) or 0
        config["n_shared_experts"] = shared // args.moe_ffn_hidden_size
    return config


def _check_routing(args: Namespace) -> None:
    """DeepSeek-V3 routes by sigmoids with a bias for each expert.

    Raises:
        UserError: another routing.
    """
    for name, wanted in (
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_enable_expert_bias", True),
    ):
        if getattr(args, name, wanted) != wanted:
            raise UserError(f"{name}: {getattr(args, name)} is not supported; only {wanted} is.")


def _rope_parameters(args: Namespace, latent: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if latent and getattr(args, "rope_type", "yarn") == "yarn":
        known = {name: _get(args, key) for key, name in YARN.items()}
        given = {name: value for name, value in known.items() if value is not None}
        rope |= {"rope_type": "yarn", **YARN_DEFAULTS, **given}
    elif not latent and getattr(args, "use_rope_scaling", False):
        rope |= {"rope_type": "llama3", "factor": args.rope_scaling_factor, **LLAMA3}
    return rope


def _get(args: Namespace, key: str) -> Any:
    return getattr(args, DESTINATIONS.get(key, key.replace("-", "_")), None)


def untied(args: Namespace) -> bool:
    """Whether the output layer has weights of its own."""
    return bool(getattr(args, "untie_embeddings_and_output_weights", False))


def dimensions(args: Namespace, vocab: int) -> dict[str, Any]:
    """The words of ``names``' shapes, and the settings that its rules depend on."""
    heads, latent = args.num_attention_heads, getattr(args, "multi_latent_attention", False)
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    channels = getattr(args, "kv_channels", None) or args.hidden_size // heads
    words = {
        "vocab": vocab,
        "hidden": args.hidden_size,
        "two_hidden": 2 * args.hidden_size,
        "ffn": args.ffn_hidden_size,
        "channels": channels,
        "groups": groups,
        "q": heads * channels,
        "kv": groups * channels,
        "untied": untied(args),
        "qkv_bias": bool(getattr(args, "add_qkv_bias", False)),
        "qk_norm": bool(getattr(args, "qk_layernorm", False)) and not latent,
    }
    if latent:
        rope, q_lora = args.qk_pos_emb_head_dim, getattr(args, "q_lora_rank", None)
        words |= {
            "q": heads * (args.qk_head_dim + rope),
            "v": heads * args.v_head_dim,
            "q_lora": q_lora,
            "kv_lora": args.kv_lora_rank,
            "kv_down": args.kv_lora_rank + rope,
            "kv_up": heads * (args.qk_head_dim + args.v_head_dim),
        }
    if getattr(args, "num_experts", None):
        words |= {
            "experts": args.num_experts,
            "expert_ffn": args.moe_ffn_hidden_size,
            "shared_ffn": getattr(args, "moe_shared_expert_intermediate_size", None),
            "shared": bool(getattr(args, "moe_shared_expert_intermediate_size", None)),
            "expert_bias": bool(getattr(args, "moe_router_enable_expert_bias", False)),
        }
    return words
