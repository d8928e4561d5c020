"""Tiny models for the tests of conversions: transformers' own classes, and Megatron's."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import torch

#: Small enough for seconds on a CPU, with every size different so that no mix-up fits by chance.
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    initializer_range=0.2,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    n_routed_experts=8,
    n_shared_experts=2,
    moe_intermediate_size=24,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)


def hf_model(family: str, seed: int = 0, **changes):
    """A random model of transformers' own class, with norms and biases that are not trivial."""
    import transformers

    sizes = {**SIZES, **(LATENT if family == "deepseek_v3" else dict(num_key_value_heads=2))}
    if family == "qwen3":
        sizes["head_dim"] = 12
    config = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def save_hf(model, path: Path, **options) -> Path:
    """Write a model as transformers does."""
    model.save_pretrained(path, **options)
    return path


class Prediction(torch.nn.Module):
    """A layer of multi-token prediction of DeepSeek-V3 (arXiv 2412.19437, Eq. 21-23), made of
    transformers' own modules, whose class has none; names as in DeepSeek-V3's folders."""

    def __init__(self, config, seed: int = 3) -> None:
        super().__init__()
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        C, eps = config.hidden_size, config.rms_norm_eps
        torch.manual_seed(seed)
        self.enorm, self.hnorm = (modeling.DeepseekV3RMSNorm(C, eps) for _ in range(2))
        self.eh_proj = torch.nn.Linear(2 * C, C, bias=False)
        self.layer = modeling.DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.shared_head = torch.nn.ModuleDict({"norm": modeling.DeepseekV3RMSNorm(C, eps)})
        self.rotary = modeling.DeepseekV3RotaryEmbedding(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in [*self.named_parameters(), *self.named_buffers()]:
                if "norm" in name or name.endswith("correction_bias"):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                elif "inv_freq" not in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def logits(self, model, ids: torch.Tensor) -> torch.Tensor:
        """[b, s, vocab] from a model's last states and the next tokens (0 after the last)."""
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        after = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        both = [self.enorm(model.model.embed_tokens(after)), self.hnorm(states)]
        length = ids.shape[1]
        positions = torch.arange(length).expand_as(ids)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        x = self.layer(
            self.eh_proj(torch.cat(both, dim=-1)),
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.rotary(states, positions),
        )
        x = x[0] if isinstance(x, tuple) else x
        return model.lm_head(self.shared_head["norm"](x)).float()

    def tensors(self, model, layer: int) -> dict[str, torch.Tensor]:
        """As a folder holds them: experts one by one, the embedding and the head once more."""
        state = {}
        for name, value in self.state_dict().items():
            name = name.removeprefix("layer.")
            if name.startswith("mlp.experts."):
                state |= _experts(name.rpartition(".")[2], value)
            elif "rotary" not in name:
                state[name] = value
        state["embed_tokens.weight"] = model.model.embed_tokens.weight
        state["shared_head.head.weight"] = model.lm_head.weight
        return {f"model.layers.{layer}.{k}": v.detach().clone() for k, v in state.items()}


def _experts(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers' merged experts, gate and up in one, as a checkpoint has them."""
    state = {}
    for expert, weight in enumerate(value):
        parts = {"down": weight}
        if name == "gate_up_proj":
            parts = dict(zip(("gate", "up"), weight.chunk(2), strict=True))
        state |= {f"mlp.experts.{expert}.{k}_proj.weight": v for k, v in parts.items()}
    return state


def save_with_prediction(model, path: Path) -> Prediction:
    """A DeepSeek-V3 folder with one layer of multi-token prediction."""
    import json

    from safetensors.torch import load_file, save_file

    save_hf(model, path)
    config = json.loads((path / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (path / "config.json").write_text(json.dumps(config))
    prediction = Prediction(model.config)
    state = load_file(path / "model.safetensors")
    state |= prediction.tensors(model, model.config.num_hidden_layers)
    save_file(state, path / "model.safetensors")
    return prediction


def tokens(batch: int = 2, length: int = 19, vocab: int = 61) -> torch.Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocab, (batch, length), generator=generator)


@torch.no_grad()
def hf_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[b, s, vocab] of a transformers model."""
    return model(input_ids=ids, use_cache=False).logits.float()


# --------------------------------------------------------------------------------------- Megatron


def megatron_args(folder: Path, mhc=None, **changes):
    """Megatron's parsed arguments for a converted checkpoint's model.yaml."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from launch import pretrain, settings
    from mhc_megatron import cpu

    with contextlib.suppress(KeyError):
        del os.environ["WORLD_SIZE"]
    pretrain.single_process()
    read = settings.load(str(folder / "model.yaml"))
    values = {
        "micro-batch-size": 1,
        "seq-length": 32,
        "train-iters": 1,
        "lr": 1e-3,
        "mock-data": True,
        "save-interval": 1,
        **pretrain._defaults(read),
        **read.megatron,
        **(cpu.ARGUMENTS if cpu.enabled() else {}),
        **changes,
    }
    values["max-position-embeddings"] = max(64, values["max-position-embeddings"])
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = settings.parse(values)
    finally:
        sys.argv = argv
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    args.padded_vocab_size = args.vocab_size
    return args, mhc or read.mhc


def megatron_model(folder: Path, mhc=None, **changes):
    """The model of a converted checkpoint, built by the run's own builder, weights loaded."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection

    from mhc_megatron import cpu
    from mhc_megatron.checkpoint.torch_dist import resolve
    from mhc_megatron.training import MHCModelBuilder, model_config_from_args

    args, mhc = megatron_args(folder, mhc, **changes)
    config = model_config_from_args(args, mhc)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = MHCModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    path = str(resolve(folder))
    metadata = dist_checkpointing.load_content_metadata(path) or {}
    metadata["dp_cp_group"] = groups.dp_cp
    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata=metadata)},
        path,
        validate_access_integrity=False,
    )
    model.load_state_dict(state["model"])
    return model.to("cpu" if cpu.enabled() else "cuda").eval()


@torch.no_grad()
def megatron_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[b, s, vocab] of a Megatron model."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    logits = model(ids, positions, mask)
    return logits.float()


def prediction_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[b, s, vocab] of a Megatron model's first layer of multi-token prediction."""
    seen = []  # copies: the loss works in the logits' own memory
    handle = model.output_layer.register_forward_hook(
        lambda layer, inputs, out: seen.append(out[0].transpose(0, 1).float().clone())
    )
    main = megatron_logits(model, ids)
    handle.remove()
    others = [x for x in seen if not torch.equal(x, main)]
    assert len(others) == 1
    return others[0]
