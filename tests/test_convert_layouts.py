"""Layouts of the connections: DeepSeek-V4's, transformers', Megatron-LM's; checkpoints of runs."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from checkpoint_models import hf_model, megatron_logits, megatron_model, save_hf, tokens
from safetensors.torch import load_file
from test_convert_huggingface import _said, randomised, run

from mhc_kernels import reference
from mhc_megatron.checkpoint import convert, inspection, torch_dist
from mhc_megatron.checkpoint.connections import OURS
from mhc_megatron.checkpoint.layouts import found_in
from mhc_megatron.checkpoint.recipes import Output, Recipe, Region
from mhc_megatron.checkpoint.torch_dist import TorchDistSource
from mhc_megatron.checkpoint.upcycle import add_groups, drop_groups
from mhc_megatron.config import MHCConfig

LAYERS, N, C, VOCAB = 2, 4, 6, 11


def _run_checkpoint(path: Path, mhc: MHCConfig, stacked: bool = True) -> Path:
    """A checkpoint as a run of a small model writes it: stacked layers, optimizer state."""
    generator = torch.Generator().manual_seed(3)
    lead, size = ((LAYERS,), LAYERS) if stacked else ((), 1)
    shapes = {
        "embedding.word_embeddings.weight": (VOCAB, C),
        "decoder.final_layernorm.weight": (C,),
    }
    layers = [""] if stacked else [f"{layer}." for layer in range(LAYERS)]
    for layer in layers:
        at = f"decoder.layers.{layer}"
        shapes[at + "mlp.linear_fc2.weight"] = (*lead, C, 8)
        if mhc.enabled:
            for module in ("attn_hc", "mlp_hc"):
                shapes[f"{at}{module}.phi"] = (*lead, mhc.K, mhc.n * C)
                shapes[f"{at}{module}.alpha"] = (*lead, mhc.alphas)
                shapes[f"{at}{module}.bias"] = (*lead, mhc.K)
    if mhc.exit == "learned" and mhc.enabled:
        for name, shape in (("phi", (N, N * C)), ("alpha", (1,)), ("bias", (N,))):
            shapes[f"decoder.final_layernorm.exit.{name}"] = shape
    outputs = []
    for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        for name, shape in shapes.items():
            data = torch.rand(torch.Size(shape).numel(), generator=generator)
            recipe = Recipe("values", (), {"data": data.tolist()})
            outputs.append(Output(prefix + name, shape, torch.float32, recipe))
    groups = [
        {
            "wd_mult": decay,
            "weight_decay": 0.1 * decay,
            "lr": 0.1,
            "max_lr": 0.2,
            "default_config": True,
        }
        for decay in (1.0, 0.0)
    ]
    common = {
        "args": Namespace(num_layers=LAYERS, hidden_size=C, mhc=mhc.to_mapping()),
        "iteration": 40,
        "optimizer": {"param_groups": groups, "state": {"common_step": torch.tensor(40.0)}},
    }
    if mhc.enabled:
        add_groups(common["optimizer"], mhc)
    objects = {
        torch_dist.COMMON: torch_dist.archive(common),
        "rng_state/shard_0.0_1.1": torch_dist.archive([1]),
    }
    plan = convert.Plan(
        "torch_dist", [], outputs, "iter_0000040", objects, {torch_dist.TRACKER: "40"}
    )
    convert.run(plan, path, quiet=True)
    assert size
    return path


@pytest.fixture
def mhc_checkpoint(tmp_path: Path) -> Path:
    return _run_checkpoint(tmp_path / "mhc", MHCConfig(exit="learned"))


# -------------------------------------------------------------------------------- DeepSeek-V4's


def test_out_and_in_again(mhc_checkpoint: Path, tmp_path: Path) -> None:
    for names in ("deepseek-v4", "transformers"):
        out, back = tmp_path / names, tmp_path / f"{names}-back"
        assert run("export-deepseek-v4", mhc_checkpoint, out, "--names", names) == 0
        assert run("import-deepseek-v4", out, back, "--base", mhc_checkpoint) == 0
        a, b = TorchDistSource(mhc_checkpoint), TorchDistSource(back)
        ours = {k for k in a.infos() if not k.startswith("optimizer.")}
        assert ours == set(b.infos())
        for key in ours:
            assert torch.equal(a.read(Region(key)), b.read(Region(key)))
        assert b.args.mhc["sinkhorn"] == "deepseek-v4" and b.args.mhc["exit"] == "learned"
        assert b.common["iteration"] == 0 and b.path.name == "release"


def test_transformers_modules_take_what_is_exported(mhc_checkpoint: Path, tmp_path: Path) -> None:
    """DeepseekV4HyperConnection, loaded from the export, does what the sublayer does."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4HyperConnection,
        DeepseekV4HyperHead,
    )

    assert (
        run("export-deepseek-v4", mhc_checkpoint, tmp_path / "v4", "--names", "transformers") == 0
    )
    state = load_file(tmp_path / "v4" / "model.safetensors")
    config = AutoConfig.for_model("deepseek_v4", hidden_size=C, hc_mult=N, rms_norm_eps=1e-20)
    source = TorchDistSource(mhc_checkpoint)
    x, y = torch.randn(2, 5, N, C), torch.randn(2, 5, C)
    for layer in range(LAYERS):
        for theirs, ours in (("attn_hc", OURS.attn), ("ffn_hc", OURS.mlp)):
            module, prefix = DeepseekV4HyperConnection(config), f"model.layers.{layer}.{theirs}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
            with torch.no_grad():
                post, comb, collapsed = module(x)
                expected = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ x
            u, H_post, H_res = reference.mhc_pre(
                x, *_connection(source, layer, ours), sinkhorn_kind="deepseek-v4"
            )
            torch.testing.assert_close(u, collapsed, atol=1e-5, rtol=1e-4)
            x_next = reference.mhc_post(x, y, H_post, H_res)
            torch.testing.assert_close(x_next, expected, atol=1e-5, rtol=1e-4)
    head = DeepseekV4HyperHead(config)
    head.load_state_dict({k: state[f"model.hc_head.{k}"] for k in ("hc_fn", "hc_base", "hc_scale")})


def _connection(source: TorchDistSource, layer: int, module: str) -> list[torch.Tensor]:
    found, prefix = found_in(source), OURS.layer.format(l=layer) + module
    read = [found[prefix + suffix].region for suffix in (OURS.phi, OURS.alpha[0], OURS.bias)]
    return [
        source.read(region).flatten(0, region.squeeze) if region.squeeze else source.read(region)
        for region in read
    ]


def test_a_model_of_transformers_comes_in(tmp_path: Path) -> None:
    """A tiny random DeepseekV4ForCausalLM, saved by transformers, gives its connections."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        layer_types=["sliding_attention"] * LAYERS,
        mlp_layer_types=["moe"] * LAYERS,
        hc_mult=N,
        num_nextn_predict_layers=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "v4")
    llama = save_hf(hf_model("llama", num_hidden_layers=LAYERS), tmp_path / "llama")
    assert run("import-hf", llama, tmp_path / "base") == 0
    assert (
        run("import-deepseek-v4", tmp_path / "v4", tmp_path / "m", "--base", tmp_path / "base") == 0
    )
    source = TorchDistSource(tmp_path / "m")
    phi, alpha, bias = _connection(source, 1, "mlp_hc")
    module = model.model.layers[1].ffn_hc
    assert torch.equal(alpha, module.scale)
    n = N
    assert torch.equal(bias[: 2 * n], module.base[: 2 * n])
    there = bias[2 * n :].view(n, n)
    assert torch.equal(there, module.base[2 * n :].view(n, n).t()) and not torch.equal(
        there, there.t()
    )
    assert torch.equal(
        phi[2 * n :].view(n, n, -1), module.fn[2 * n :].view(n, n, -1).transpose(0, 1)
    )
    assert source.args.mhc["norm_eps"] == config.rms_norm_eps
    assert torch.equal(
        source.read(Region("decoder.final_layernorm.exit.phi")), model.model.hc_head.hc_fn
    )


def test_a_mean_exit_becomes_a_head_that_means(tmp_path: Path) -> None:
    path = _run_checkpoint(tmp_path / "m", MHCConfig())
    assert run("export-deepseek-v4", path, tmp_path / "v4") == 0
    state = load_file(tmp_path / "v4" / "model.safetensors")
    assert not state["hc_head_fn"].any()
    torch.testing.assert_close(torch.sigmoid(state["hc_head_base"]), torch.full((N,), 1 / N))


def test_a_base_that_does_not_fit(mhc_checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert run("export-deepseek-v4", mhc_checkpoint, tmp_path / "v4") == 0
    llama = save_hf(hf_model("llama"), tmp_path / "llama")
    assert run("import-hf", llama, tmp_path / "base") == 0
    capsys.readouterr()
    assert (
        run("import-deepseek-v4", tmp_path / "v4", tmp_path / "o", "--base", tmp_path / "base") == 2
    )
    assert "fits no n at C = 32" in _said(capsys)
    assert run("import-deepseek-v4", llama, tmp_path / "o", "--base", mhc_checkpoint) == 2
    assert "no tensors in DeepSeek-V4's layout" in _said(capsys)
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------- Megatron-LM's


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("branch, exit", [("main", "learned"), ("main", "mean"), ("dev", "mean")])
def test_megatron_s_names_and_back(tmp_path: Path, branch: str, exit: str, stacked: bool) -> None:
    path = _run_checkpoint(tmp_path / "m", MHCConfig(exit=exit), stacked)
    assert run("export-megatron", path, tmp_path / "x", "--layout", branch) == 0
    there = TorchDistSource(tmp_path / "x")
    infos = there.infos()
    name = "decoder.layers." + ("" if stacked else "1.")
    assert infos[name + "mlp_hyper_connection.mapping_proj.weight"].shape[-2:] == (24, N * C)
    assert name + "self_attention_hyper_connection.alpha_res" in infos
    assert f"optimizer.state.exp_avg.{name}mlp_hyper_connection.bias" in infos
    assert ("decoder.hc_head_fn" in infos) == (exit == "learned")
    assert not any("attn_hc" in key for key in infos)
    assert len(there.common["optimizer"]["param_groups"]) == 2
    assert there.args.num_residual_streams == N
    assert run("import-megatron", tmp_path / "x", tmp_path / "back", "--layout", branch) == 0
    assert run("diff", path, tmp_path / "back") == 0
    back = TorchDistSource(tmp_path / "back")
    assert back.common["iteration"] == 40 and back.args.mhc["exit"] == exit
    assert back.args.mhc["sinkhorn"] == ("deepseek-v4" if branch == "main" else "paper")
    assert len(back.common["optimizer"]["param_groups"]) == 4


def test_main_s_arithmetic_on_the_exported_tensors(mhc_checkpoint: Path, tmp_path: Path) -> None:
    """Megatron-LM's main branch as its source reads: H_res^T x, softmax first."""
    assert run("export-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "main") == 0
    there, ours = TorchDistSource(tmp_path / "x"), TorchDistSource(mhc_checkpoint)
    x, y = torch.randn(7, N, C), torch.randn(7, C)
    h_pre, h_post, logits = _main_s_terms(there, 1, x, 1e-6)
    h_pre, M = h_pre + 1e-6, _main_s_sinkhorn(logits)
    expected = M.transpose(1, 2) @ x + h_post.unsqueeze(-1) * y.unsqueeze(1)
    u, H_post, H_res = reference.mhc_pre(
        x, *_connection(ours, 1, "attn_hc"), sinkhorn_kind="deepseek-v4", eps=1e-12
    )
    torch.testing.assert_close(u, (h_pre.unsqueeze(-1) * x).sum(1), atol=1e-5, rtol=1e-4)
    x_next = reference.mhc_post(x, y, H_post, H_res)
    torch.testing.assert_close(x_next, expected, atol=1e-5, rtol=1e-4)


def _main_s_terms(source: TorchDistSource, layer: int, x: torch.Tensor, eps: float):
    """What both branches have in common (``_compute_h``): read, write and res logits."""
    prefix = "decoder.layers.self_attention_hyper_connection."
    weight, bias = (source.read(Region(prefix + s))[layer] for s in ("mapping_proj.weight", "bias"))
    alphas = [
        source.read(Region(f"{prefix}alpha_{part}"))[layer] for part in ("pre", "post", "res")
    ]
    flat = x.flatten(1)
    r = 1 / (flat.norm(dim=-1, keepdim=True) / (N * C) ** 0.5 + eps)
    scale = torch.cat([a.expand(k) for a, k in zip(alphas, (N, N, N * N), strict=True)])
    h = r * (flat @ weight.t()) * scale + bias
    return h[:, :N].sigmoid(), 2 * h[:, N : 2 * N].sigmoid(), h[:, 2 * N :].view(-1, N, N)


def _main_s_sinkhorn(logits: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    M = logits.softmax(-1) + 1e-6
    M = M / (M.sum(-2, keepdim=True) + 1e-6)
    for _ in range(iterations - 1):
        M = M / (M.sum(-1, keepdim=True) + 1e-6)
        M = M / (M.sum(-2, keepdim=True) + 1e-6)
    return M


def test_the_first_development_branch_s_arithmetic(tmp_path: Path) -> None:
    """H_res x, not transposed; exp, then rows and columns in turn, columns last."""
    path = _run_checkpoint(tmp_path / "m", MHCConfig())
    assert run("export-megatron", path, tmp_path / "x", "--layout", "dev") == 0
    there, ours = TorchDistSource(tmp_path / "x"), TorchDistSource(path)
    x, y = torch.randn(7, N, C), torch.randn(7, C)
    h_pre, h_post, logits = _main_s_terms(there, 1, x, 1e-8)
    M = logits.exp()
    for _ in range(20):
        M = M / M.sum(-1, keepdim=True).clamp(min=1e-8)
        M = M / M.sum(-2, keepdim=True).clamp(min=1e-8)
    assert (M - M.mT).abs().max() > 0.05  # a transposed matrix would be seen
    u, H_post, H_res = reference.mhc_pre(x, *_connection(ours, 1, "attn_hc"), eps=1e-16)
    torch.testing.assert_close(H_res, M, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(u, (h_pre.unsqueeze(-1) * x).sum(1), atol=1e-5, rtol=1e-4)
    expected = M @ x + h_post.unsqueeze(-1) * y.unsqueeze(1)
    torch.testing.assert_close(
        reference.mhc_post(x, y, H_post, H_res), expected, atol=1e-5, rtol=1e-4
    )


def test_the_development_branch_with_deepseek_v4_s_arithmetic(
    mhc_checkpoint: Path, tmp_path: Path
) -> None:
    """Before pull request 4839: the head is there, and H_res is not transposed."""
    assert run("export-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "main") == 0
    assert run("import-megatron", tmp_path / "x", tmp_path / "back", "--layout", "dev") == 0
    back, there = TorchDistSource(tmp_path / "back"), TorchDistSource(tmp_path / "x")
    assert back.args.mhc["sinkhorn"] == "deepseek-v4" and back.args.mhc["exit"] == "learned"
    x = torch.randn(7, N, C)
    _, _, logits = _main_s_terms(there, 0, x, 1e-6)
    _, _, H_res = reference.mhc_pre(
        x, *_connection(back, 0, "attn_hc"), sinkhorn_kind="deepseek-v4", eps=1e-12
    )
    torch.testing.assert_close(H_res, _main_s_sinkhorn(logits), atol=1e-5, rtol=1e-4)


def test_main_s_head_on_the_exported_tensors(mhc_checkpoint: Path, tmp_path: Path) -> None:
    """learned_output_contract as main's source reads, against our exit."""
    from mhc_megatron.streams import Exit

    assert run("export-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "main") == 0
    assert run("import-megatron", tmp_path / "x", tmp_path / "back", "--layout", "main") == 0
    there, back = TorchDistSource(tmp_path / "x"), TorchDistSource(tmp_path / "back")
    fn, base, scale = (there.read(Region(f"decoder.hc_head_{k}")) for k in ("fn", "base", "scale"))
    x, eps = torch.randn(5, 2, N * C), 1e-6
    rsqrt = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    weights = torch.sigmoid((x @ fn.t()) * rsqrt * scale + base) + eps
    expected = (weights.unsqueeze(-1) * x.unflatten(-1, (N, C))).sum(-2)
    exit = Exit(MHCConfig.from_mapping(back.args.mhc), C, torch.device("cpu"))
    exit.load_state_dict(
        {
            k: back.read(Region(f"decoder.final_layernorm.exit.{k}"))
            for k in ("phi", "alpha", "bias")
        }
    )
    torch.testing.assert_close(exit(x), expected, atol=1e-5, rtol=1e-5)


def test_a_hybrid_model_has_names_of_its_own(tmp_path: Path, capsys) -> None:
    """HyperConnectionHybridLayer's: one connection a layer, the layer within inner_layer."""
    path = _hybrid_checkpoint(tmp_path / "m", "*-|*E", MHCConfig(exit="learned"))
    assert run("verify", path) == 0 and inspection.inspect(path)["layout"] == "mhc"
    assert run("export-megatron", path, tmp_path / "x", "--layout", "main") == 0
    there = TorchDistSource(tmp_path / "x")
    infos = there.infos()
    for prefix in ("", "optimizer.state.exp_avg."):
        assert infos[f"{prefix}decoder.layers.1.inner_layer.mlp.linear_fc2.weight"].shape == (C, 8)
        name = f"{prefix}decoder.layers.3.hyper_connection.mapping_proj.weight"
        assert infos[name].shape == (24, N * C)
        assert f"{prefix}decoder.final_norm.weight" in infos
    assert "decoder.hc_head_fn" in infos and not any("_hc." in key for key in infos)
    assert "decoder.layers.1.inner_layer.mlp.linear_fc2._extra_state/shard_0_1" in there.objects
    assert there.args.enable_mhc_connections and there.args.mhc_num_residual_streams == N
    assert inspection.inspect(tmp_path / "x")["layout"] == "megatron-hybrid"
    assert run("import-megatron", tmp_path / "x", tmp_path / "back", "--layout", "main") == 0
    assert run("diff", path, tmp_path / "back") == 0
    assert TorchDistSource(tmp_path / "back").objects == TorchDistSource(path).objects
    capsys.readouterr()
    assert run("import-megatron", tmp_path / "x", tmp_path / "o", "--layout", "dev") == 2
    assert "hybrid model; give --layout main" in _said(capsys)
    assert run("export-deepseek-v4", path, tmp_path / "o") == 2
    assert "is a hybrid model" in _said(capsys)


def test_a_hybrid_model_is_upcycled(tmp_path: Path, capsys) -> None:
    path = _hybrid_checkpoint(tmp_path / "m", "*-*E", MHCConfig(variant="none"))
    assert run("upcycle", path, tmp_path / "up", "--set", "exit=learned") == 0
    assert run("verify", tmp_path / "up") == 0
    infos = TorchDistSource(tmp_path / "up").infos()
    for prefix in ("", "optimizer.state.exp_avg."):
        hc = {
            k.removeprefix(prefix) for k in infos if k.startswith(prefix + "decoder") and "hc" in k
        }
        assert {k.split(".")[2] + "." + k.split(".")[3] for k in hc} == {
            "0.attn_hc",
            "1.mlp_hc",
            "2.attn_hc",
            "3.mlp_hc",
        }
        assert f"{prefix}decoder.final_norm.exit.phi" in infos
    mamba = _hybrid_checkpoint(tmp_path / "b", "M-*E", MHCConfig(variant="none"))
    assert run("upcycle", mamba, tmp_path / "o") == 2
    assert "layers 'M' have no hyper-connections here" in _said(capsys)


def _hybrid_checkpoint(path: Path, pattern: str, mhc: MHCConfig) -> Path:
    """A checkpoint as a run of a small HybridModel writes it: a name for each layer."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embedding.word_embeddings.weight": (VOCAB, C),
        "decoder.final_norm.weight": (C,),
    }
    kinds = pattern.replace("|", "")
    for layer, symbol in enumerate(kinds):
        at, module = f"decoder.layers.{layer}.", "attn_hc" if symbol == "*" else "mlp_hc"
        inner = "self_attention.linear_proj" if symbol == "*" else "mlp.linear_fc2"
        shapes[f"{at}{inner}.weight"] = (C, 8)
        if mhc.enabled:
            shapes |= {
                f"{at}{module}.phi": (mhc.K, N * C),
                f"{at}{module}.alpha": (3,),
                f"{at}{module}.bias": (mhc.K,),
            }
    if mhc.enabled:
        for name, shape in (("phi", (N, N * C)), ("alpha", (1,)), ("bias", (N,))):
            shapes[f"decoder.final_norm.exit.{name}"] = shape
    outputs = []
    for prefix in ("", "optimizer.state.exp_avg."):
        for name, shape in shapes.items():
            data = torch.rand(torch.Size(shape).numel(), generator=generator)
            recipe = Recipe("values", (), {"data": data.tolist()})
            outputs.append(Output(prefix + name, shape, torch.float32, recipe))
    args = Namespace(
        num_layers=len(kinds), hidden_size=C, hybrid_layer_pattern=pattern, mhc=mhc.to_mapping()
    )
    common = {"args": args, "iteration": 40, "optimizer": {"param_groups": []}}
    objects = {
        torch_dist.COMMON: torch_dist.archive(common),
        "decoder.layers.1.mlp.linear_fc2._extra_state/shard_0_1": torch_dist.archive(None),
    }
    plan = convert.Plan(
        "torch_dist", [], outputs, "iter_0000040", objects, {torch_dist.TRACKER: "40"}
    )
    convert.run(plan, path, quiet=True)
    return path


def _changed(path: Path, out: Path, tensors: dict = (), **args) -> Path:
    """A copy of a checkpoint with further tensors and settings."""
    source = TorchDistSource(path)
    vars(source.args).update(args)
    outputs = _copies(source)
    for name, shape in dict(tensors).items():
        outputs.append(Output(name, shape, torch.float32, Recipe("zeros", (), {"shape": shape})))
    common = torch_dist.archive(source.common)
    objects = {**{k: source.object_bytes(k) for k in source.objects}, torch_dist.COMMON: common}
    plan = convert.Plan(
        "torch_dist", [source.path], outputs, source.path.name, objects, {torch_dist.TRACKER: "40"}
    )
    convert.run(plan, out, quiet=True)
    return out


def test_connections_of_another_kind_are_refused(
    mhc_checkpoint: Path, tmp_path: Path, capsys
) -> None:
    """Nothing of a connection is dropped without a word."""
    assert run("export-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "main") == 0
    capsys.readouterr()
    module = "decoder.layers.self_attention_hyper_connection."
    for number, (tensors, args, said) in enumerate(
        (
            ({}, {"mhc_single_pass": True}, "mhc_single_pass: True has no counterpart here"),
            ({}, {"mhc_connection_variant": "gated_residual"}, "gated_residual has no counterpart"),
            ({module + "ple.weight": (LAYERS, 3)}, {}, "unknown tensors: decoder.layers.0."),
            ({"mtp.layers.0.e_proj.weight": (C, C)}, {}, "layers of multi-token prediction"),
        )
    ):
        other = _changed(tmp_path / "x", tmp_path / str(number), tensors, **args)
        assert run("import-megatron", other, tmp_path / "o", "--layout", "main") == 2
        assert said in _said(capsys)
    ours = _changed(mhc_checkpoint, tmp_path / "ours", {"mtp.layers.0.enorm.weight": (C,)})
    assert run("export-megatron", ours, tmp_path / "o", "--layout", "main") == 2
    assert "layers of multi-token prediction" in _said(capsys)
    old = _changed(tmp_path / "x", tmp_path / "old", {module + "norm.weight": (LAYERS, N * C)})
    assert run("import-megatron", old, tmp_path / "o", "--layout", "dev") == 0  # without an effect


def test_the_development_branch_has_no_head(mhc_checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert run("export-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "dev") == 2
    assert "a learned exit has no place in it" in _said(capsys)
    assert run("import-megatron", mhc_checkpoint, tmp_path / "x", "--layout", "main") == 2
    assert "no tensors in the layout megatron-main" in _said(capsys)


# --------------------------------------------------------------------------- checkpoints of runs


def test_upcycling_carries_the_optimizer(tmp_path: Path) -> None:
    residual = _run_checkpoint(tmp_path / "r", MHCConfig(variant="none"))
    assert (
        run("upcycle", residual, tmp_path / "up", "--set", "lr_mult=0.5", "--set", "exit=learned")
        == 0
    )
    a, b = TorchDistSource(residual), TorchDistSource(tmp_path / "up")
    for key in a.infos():
        assert torch.equal(a.read(Region(key)), b.read(Region(key)))
    new = set(b.infos()) - set(a.infos())
    assert len(new) == 3 * (6 + 3)  # weights and two moments; stacked layers and the exit
    for key in new:
        if key.startswith("optimizer."):
            assert not b.read(Region(key)).any()
    assert b.common["iteration"] == 40 and b.path.name == "iter_0000040"
    assert b.object_bytes("rng_state/shard_0.0_1.1") == a.object_bytes("rng_state/shard_0.0_1.1")
    groups = b.common["optimizer"]["param_groups"]
    assert [(g["wd_mult"], g["max_lr"]) for g in groups[2:]] == [(0.0, 0.1), (1.0, 0.1)]
    assert run("upcycle", residual, tmp_path / "fresh", "--drop-optimizer") == 0
    fresh = TorchDistSource(tmp_path / "fresh")
    assert not any(key.startswith("optimizer") for key in fresh.infos())
    assert "optimizer" not in fresh.common and fresh.path.name == "release"


def test_an_optimizer_in_buckets_is_not_lost_silently(tmp_path: Path, capsys) -> None:
    residual = _run_checkpoint(tmp_path / "r", MHCConfig(variant="none"))
    source = TorchDistSource(residual)
    outputs = [
        dataclasses.replace(o, key=o.key.replace("optimizer.state", "optimizer.bucket.0"))
        for o in _copies(source)
        if "linear_fc2" in o.key or not o.key.startswith("optimizer")
    ]
    plan = convert.Plan("torch_dist", [source.path], outputs, "iter_0000040", texts={"x": "y"})
    plan.objects = {k: source.object_bytes(k) for k in source.objects}
    convert.run(plan, tmp_path / "b", quiet=True)
    assert run("upcycle", tmp_path / "b" / "iter_0000040", tmp_path / "up") == 2
    assert "stored in buckets" in _said(capsys)
    words = ("upcycle", tmp_path / "b" / "iter_0000040", tmp_path / "up", "--drop-optimizer")
    assert run(*words) == 0


def _copies(source: TorchDistSource) -> list[Output]:
    infos = source.infos()
    return [Output(k, i.shape, i.dtype, Recipe("copy", (Region(k),))) for k, i in infos.items()]


def test_groups_are_added_and_dropped() -> None:
    base = [{"wd_mult": d, "lr": 1.0, "default_config": True} for d in (1.0, 0.0)]
    expert = {"wd_mult": 1.0, "lr": 1.0, "default_config": True, "is_expert_parallel": True}
    state = {0: {"param_groups": [dict(g) for g in base]}, 1: {"param_groups": [dict(expert)]}}
    add_groups(state, MHCConfig(phi_weight_decay=0.0))
    assert len(state[0]["param_groups"]) == 3 and len(state[1]["param_groups"]) == 1
    drop_groups(state)
    assert state == {0: {"param_groups": base}, 1: {"param_groups": [expert]}}


def test_the_models_own_rates_stay() -> None:
    """--decoupled-lr gives embedding and output a group of their own."""
    own = {"wd_mult": 1.0, "lr": 1.0, "max_lr": 1.0, "min_lr": 0.1, "default_config": True}
    decoupled = {**own, "max_lr": 0.5, "min_lr": 0.05, "default_config": False}
    state = {"param_groups": [dict(own), dict(decoupled)]}
    add_groups(state, MHCConfig(lr_mult=0.5))
    assert len(state["param_groups"]) == 4
    drop_groups(state)
    assert state == {"param_groups": [own, decoupled]}


def test_inspect_tells_the_gains(mhc_checkpoint: Path, capsys) -> None:
    about = inspection.inspect(mhc_checkpoint)
    assert about["layout"] == "mhc" and about["iteration"] == 40
    assert len(about["connections"]) == 2 * LAYERS
    product = torch.eye(N, dtype=torch.float64)
    source = TorchDistSource(mhc_checkpoint)
    for record, (layer, module) in zip(
        about["connections"],
        [(0, "attn_hc"), (0, "mlp_hc"), (1, "attn_hc"), (1, "mlp_hc")],
        strict=True,
    ):
        bias = _connection(source, layer, module)[2].double()
        H_res = reference.sinkhorn(bias[2 * N :].view(N, N))
        product = H_res @ product
        assert record["from identity"] == pytest.approx(((H_res - torch.eye(N)).norm() / 2).item())
        assert record["gain"] == pytest.approx(1) and record["gain_backward"] > 0.9
        assert record["composite"][1] == pytest.approx(product.sum(0).max().item())
    assert run("inspect", mhc_checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == about["parameters"]


def test_a_connection_that_is_missing_fails_verify(tmp_path: Path, capsys) -> None:
    path = _run_checkpoint(tmp_path / "m", MHCConfig())
    source = TorchDistSource(path)
    outputs = [o for o in _copies(source) if not o.key.endswith("layers.mlp_hc.bias")]
    objects = {k: source.object_bytes(k) for k in source.objects}
    plan = convert.Plan("torch_dist", [source.path], outputs, "iter_0000040", objects)
    convert.run(plan, tmp_path / "b", quiet=True)
    assert run("verify", tmp_path / "b" / "iter_0000040") == 2
    assert "mlp_hc.bias is missing" in _said(capsys)


def test_the_average_of_two_mhc_models_runs(megatron_cpu, tmp_path: Path) -> None:
    hf = save_hf(hf_model("llama", num_hidden_layers=1), tmp_path / "hf")
    assert (
        run("import-hf", hf, tmp_path / "m") == run("upcycle", tmp_path / "m", tmp_path / "u") == 0
    )
    paths = [randomised(tmp_path / "u", tmp_path / str(seed), seed) for seed in (1, 2)]
    assert run("average", *paths, "--out", tmp_path / "mean") == 0
    a, b, mean = (TorchDistSource(p) for p in (*paths, tmp_path / "mean"))
    key = "decoder.layers.0.mlp_hc.phi"
    expected = (a.read(Region(key)).double() + b.read(Region(key)).double()) / 2
    assert torch.equal(mean.read(Region(key)), expected.float())
    assert megatron_logits(megatron_model(tmp_path / "mean"), tokens()).isfinite().all()
