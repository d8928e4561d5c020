"""A transformer with (Manifold-Constrained) Hyper-Connections, for transformers' Auto classes.

Written into the folder by mhc-megatron's ``convert_checkpoint.py export-hf``. The model is
transformers' own Llama, Qwen2, Qwen3 or DeepSeek-V3 with its residual additions replaced: n
residual streams x [batch, sequence, n, C] run through the layers, and a sublayer F (attention or
MLP, with its norm) reads and changes them by (arXiv 2512.24880, Eq. 3)

    u      = H_pre x
    x_next = H_res x + H_post^T F(u)

where H_pre, H_post and H_res are functions of x (``HyperConnection``). The embedding is repeated n
times at the first layer; ``Exit`` brings the streams together before the final norm. The keys and
values of attention are as in the base model, so caches and generation work unchanged.
"""

from __future__ import annotations

import importlib
import itertools

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

#: Added by DeepSeek-V4's arithmetic (``sinkhorn: deepseek-v4``) to denominators and read weights.
V4_EPS = 1e-6


class HyperConnection(nn.Module):
    """The connection of one sublayer. phi [K, n*C], alpha [3 or 2], bias [K]; all float32.

    The K rows are pre (n) | post (n) | res; H_res[o, i] is what stream o gets of stream i.
    """

    def __init__(self, mhc: dict, hidden_size: int) -> None:
        super().__init__()
        self.mhc, self.n, self.variant = mhc, mhc["n"], mhc["variant"]
        n = self.n
        res = {"identity": 0, "birkhoff": len(list(itertools.permutations(range(n))))}
        self.sizes = [n, n, res.get(self.variant, n * n)]
        self.phi = nn.Parameter(torch.zeros(sum(self.sizes), n * hidden_size))
        self.alpha = nn.Parameter(torch.ones(2 if self.variant == "identity" else 3))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [b, s, n, C] -> u [b, s, C] in x's dtype, H_post [b, s, n], H_res [b, s, n, n]."""
        projected = project(x, self.phi, self.mhc["norm_eps"])
        if self.variant == "hc":
            projected = torch.tanh(projected)
        alpha = torch.cat([a.expand(k) for a, k in zip(self.alpha, self.sizes, strict=False)])
        pre, post, res = (alpha * projected + self.bias).split(self.sizes, dim=-1)
        if self.variant != "hc":
            pre, post = torch.sigmoid(pre) + read_eps(self.mhc), 2 * torch.sigmoid(post)
        u = torch.einsum("...n,...nc->...c", pre, x.float()).to(x.dtype)
        return u, post, self.mixing(res)

    def mixing(self, res: Tensor) -> Tensor | None:
        """H_res from its logits; None is the identity."""
        n = self.n
        if self.variant == "identity":
            return None
        if self.variant == "birkhoff":
            eye = torch.eye(n, device=res.device)
            every = torch.stack([eye[list(p)] for p in itertools.permutations(range(n))])
            return torch.tensordot(torch.softmax(res, dim=-1), every, dims=1)
        res = res.unflatten(-1, (n, n))
        if self.variant == "hc":
            return res
        if self.mhc["sinkhorn"] == "deepseek-v4":
            return sinkhorn_deepseek_v4(res, self.mhc["sinkhorn_iterations"])
        return sinkhorn(res, self.mhc["sinkhorn_iterations"])


class Exit(nn.Module):
    """[b, s, n, C] -> [b, s, C]: the mean of the streams, or a learned weight for each."""

    def __init__(self, mhc: dict, hidden_size: int) -> None:
        super().__init__()
        self.mhc, n = mhc, mhc["n"]
        if mhc["exit"] == "learned":
            self.phi = nn.Parameter(torch.zeros(n, n * hidden_size))
            self.alpha = nn.Parameter(torch.ones(1))
            self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        if self.mhc["exit"] != "learned":
            return x.mean(dim=-2)
        logits = self.alpha * project(x, self.phi, self.mhc["norm_eps"]) + self.bias
        weights = torch.sigmoid(logits) + read_eps(self.mhc)
        return torch.einsum("...n,...nc->...c", weights, x.float()).to(x.dtype)


def project(x: Tensor, phi: Tensor, eps: float) -> Tensor:
    """v phi^T with v = x / rms(x) over all n*C values, float32 (Eq. 7)."""
    flat = x.float().flatten(-2)
    return (flat @ phi.t()) * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + eps)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Eq. (9): exp, then columns and rows in turn, rows last. A column's factor cancels."""
    m = torch.exp(logits - logits.amax(dim=-2, keepdim=True))
    for _ in range(iterations):
        m = m / m.sum(dim=-2, keepdim=True)
        m = m / m.sum(dim=-1, keepdim=True)
    return m


def sinkhorn_deepseek_v4(logits: Tensor, iterations: int) -> Tensor:
    """The same with a softmax first and V4_EPS in every denominator."""
    m = torch.softmax(logits, dim=-2) + V4_EPS
    m = m / (m.sum(dim=-1, keepdim=True) + V4_EPS)
    for _ in range(iterations - 1):
        m = m / (m.sum(dim=-2, keepdim=True) + V4_EPS)
        m = m / (m.sum(dim=-1, keepdim=True) + V4_EPS)
    return m


def read_eps(mhc: dict) -> float:
    """What DeepSeek-V4 adds to the weights with which streams are read."""
    return V4_EPS if mhc["sinkhorn"] == "deepseek-v4" else 0.0


class HyperConnectedLayer:
    """Comes before a decoder layer's class: the same sublayers, connected by streams."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x = hidden_states
        if x.ndim == 3:  # the first layer makes the streams
            x = x.unsqueeze(-2).expand(*x.shape[:-1], self.attn_hc.n, x.shape[-1])
        u, H_post, H_res = self.attn_hc(x)
        y, _ = self.self_attn(hidden_states=self.input_layernorm(u), **kwargs)
        x = self.write(x, y, H_post, H_res)
        u, H_post, H_res = self.mlp_hc(x)
        y = self.mlp(self.post_attention_layernorm(u))
        return self.write(x, y, H_post, H_res)

    @staticmethod
    def write(x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        """Eq. (3): x_next[o] = sum_i H_res[o, i] x[i] + H_post[o] y."""
        mixed = x.float() if H_res is None else torch.einsum("...oi,...ic->...oc", H_res, x.float())
        return (mixed + H_post.unsqueeze(-1) * y.float().unsqueeze(-2)).to(x.dtype)


def connect(model: nn.Module, config) -> None:
    """Give every layer of a base model its two connections, and the model its exit.

    Layers of multi-token prediction, which follow the model's in a folder, are not loaded.
    """
    extra = range(config.num_hidden_layers, config.num_hidden_layers + predictions(config))
    model._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.{layer}\." for layer in extra}
    mhc, C = config.mhc, config.hidden_size
    for layer in model.model.layers:
        base = type(layer)
        # The base's name: what splits a model over devices or shards it looks for that.
        layer.__class__ = type(base.__name__, (HyperConnectedLayer, base), {})
        layer.attn_hc, layer.mlp_hc = HyperConnection(mhc, C), HyperConnection(mhc, C)
    model.model.exit = Exit(mhc, C)
    # In the norm's __dict__, behind the registry of modules: a deepcopy of the model has its own.
    model.model.norm.__dict__["streams_exit"] = (model.model.exit,)
    model.model.norm.register_forward_pre_hook(
        lambda norm, x: (norm.__dict__["streams_exit"][0](x[0]), *x[1:])
    )


def predictions(config) -> int:
    """The number of layers of multi-token prediction that a folder holds."""
    return getattr(config, "num_nextn_predict_layers", None) or 0


#: Parameters that stay float32 when the model is loaded in another dtype.
FP32 = ["attn_hc", "mlp_hc", "model.exit"]


class MHCLlamaConfig(LlamaConfig):
    model_type = "mhc_llama"
    mhc: dict | None = None


class MHCQwen2Config(Qwen2Config):
    model_type = "mhc_qwen2"
    mhc: dict | None = None


class MHCQwen3Config(Qwen3Config):
    model_type = "mhc_qwen3"
    mhc: dict | None = None


class MHCDeepseekV3Config(DeepseekV3Config):
    model_type = "mhc_deepseek_v3"
    mhc: dict | None = None


class MHCLlamaForCausalLM(LlamaForCausalLM):
    config_class = MHCLlamaConfig
    _keep_in_fp32_modules_strict = FP32

    def __init__(self, config) -> None:
        super().__init__(config)
        connect(self, config)


class MHCQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = MHCQwen2Config
    _keep_in_fp32_modules_strict = FP32

    def __init__(self, config) -> None:
        super().__init__(config)
        connect(self, config)


class MHCQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = MHCQwen3Config
    _keep_in_fp32_modules_strict = FP32

    def __init__(self, config) -> None:
        super().__init__(config)
        connect(self, config)


class MHCDeepseekV3ForCausalLM(DeepseekV3ForCausalLM):
    config_class = MHCDeepseekV3Config
    _keep_in_fp32_modules_strict = [*FP32, "e_score_correction_bias"]

    def __init__(self, config) -> None:
        super().__init__(config)
        connect(self, config)


def _merge_experts_on_loading() -> None:
    """Checkpoints hold DeepSeek-V3's experts one by one; transformers merges them by model type."""
    mapping = importlib.import_module("transformers.conversion_mapping")
    conversions = mapping.get_checkpoint_conversion_mapping("deepseek_v3")
    name = MHCDeepseekV3Config.model_type
    if conversions and not mapping.get_checkpoint_conversion_mapping(name):
        mapping.register_checkpoint_conversion_mapping(name, conversions)


_merge_experts_on_loading()
