"""import-hf, upcycle, export-hf: the arrows between transformers' classes and Megatron's."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_models import (
    hf_logits,
    hf_model,
    megatron_logits,
    megatron_model,
    prediction_logits,
    save_hf,
    save_with_prediction,
    tokens,
)
from safetensors.torch import load_file, save_file

from mhc_megatron.checkpoint import convert
from mhc_megatron.checkpoint.recipes import Recipe
from mhc_megatron.checkpoint.torch_dist import TorchDistSource
from mhc_megatron.checkpoint.upcycle import SYMMETRIES, mirror, torch_dist_plan, upcycled_bias
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from tools.convert_checkpoint import main

FAMILIES = ["llama", "qwen2", "qwen3", "deepseek_v3"]


def run(*words) -> int:
    return main([str(word) for word in words] + (["--quiet"] if words[0] not in LOOKING else []))


LOOKING = ("inspect", "diff", "verify")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (transformers' model, its folder, the imported checkpoint)."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str):
        if family not in made:
            model = hf_model(family)
            hf = save_hf(model, root / family / "hf")
            assert run("import-hf", hf, root / family / "megatron") == 0
            made[family] = model, hf, root / family / "megatron"
        return made[family]

    return get


def same_tensors(a: Path, b: Path) -> None:
    """Two folders of safetensors hold the same bits under the same names."""
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert right[name].dtype == value.dtype and torch.equal(right[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(models, tmp_path: Path, family: str) -> None:
    import transformers

    model, hf, megatron = models(family)
    assert run("export-hf", megatron, tmp_path / "back") == 0
    same_tensors(hf, tmp_path / "back")
    assert run("verify", tmp_path / "back") == run("verify", megatron) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(model)
    assert torch.equal(hf_logits(again, tokens()), hf_logits(model, tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_computes_what_transformers_computes(megatron_cpu, models, family: str) -> None:
    model, _, megatron = models(family)
    ours = megatron_logits(megatron_model(megatron), tokens())
    theirs = hf_logits(model, tokens())
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tied_embeddings_and_llama_3_s_rope(megatron_cpu, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = hf_model("llama", tie_word_embeddings=True, rope_parameters=rope, num_hidden_layers=1)
    hf = save_hf(model, tmp_path / "hf")
    assert (
        run("import-hf", hf, tmp_path / "m")
        == run("export-hf", tmp_path / "m", tmp_path / "b")
        == 0
    )
    same_tensors(hf, tmp_path / "b")
    ours = megatron_logits(megatron_model(tmp_path / "m"), tokens())
    torch.testing.assert_close(ours, hf_logits(model, tokens()), atol=1e-4, rtol=1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    "changes",
    [
        # DeepSeek-V3's own form, with parameters that are not Megatron's defaults
        {
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        {"original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 1.3},
        {"original_max_position_embeddings": 16},
    ],
)
def test_yarn(megatron_cpu, tmp_path: Path, changes: dict) -> None:
    """Positions before and after the original length; the parameters come back."""
    rope = {**YARN, **changes}
    model = hf_model("deepseek_v3", rope_parameters=rope, qk_rope_head_dim=16, num_hidden_layers=2)
    hf = save_hf(model, tmp_path / "hf")
    assert run("import-hf", hf, tmp_path / "m") == 0
    ids = tokens(length=60)
    theirs, ours = hf_logits(model, ids), megatron_logits(megatron_model(tmp_path / "m"), ids)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    plain = hf_model("deepseek_v3", qk_rope_head_dim=16, num_hidden_layers=2)
    assert (hf_logits(plain, ids) - theirs).abs().max() > 0.1  # the scaling takes part
    assert run("export-hf", tmp_path / "m", tmp_path / "b") == 0
    same_tensors(hf, tmp_path / "b")
    back = json.loads((tmp_path / "b" / "config.json").read_text())["rope_parameters"]
    assert {key: back[key] for key in rope} == rope
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(hf_logits(again, ids), theirs)


def test_latent_attention_without_query_compression(tmp_path: Path, capsys) -> None:
    hf = save_hf(hf_model("deepseek_v3", num_hidden_layers=1, q_lora_rank=None), tmp_path / "hf")
    capsys.readouterr()
    assert run("import-hf", hf, tmp_path / "out") == 2
    assert "q_lora_rank: null is not supported" in _said(capsys)


@pytest.mark.parametrize(
    "changes",
    [{"mscale_all_dim": 1.0, "mscale": 0.0}, {"mscale": 0.7}, {"attention_factor": 1.5}],
)
def test_a_yarn_that_megatron_scales_otherwise(changes: dict) -> None:
    from mhc_megatron.checkpoint.arguments import megatron_values

    config = hf_model("deepseek_v3", num_hidden_layers=1).config.to_dict()
    config["rope_parameters"] = {**YARN, "original_max_position_embeddings": 16, **changes}
    with pytest.raises(UserError, match="mscale and mscale_all_dim only"):
        megatron_values(config)
    config["rope_parameters"] = {**YARN, "truncate": False}
    with pytest.raises(UserError, match="truncate: false"):
        megatron_values(config)


def test_shards_workers_and_bf16(models, tmp_path: Path, monkeypatch, capsys) -> None:
    """A sharded folder, converted by two processes, gives the same bits; a cast tells its error."""
    model, _, megatron = models("llama")
    hf = save_hf(model, tmp_path / "hf", max_shard_size="30KB")
    assert (hf / "model.safetensors.index.json").exists()
    monkeypatch.setitem(convert.FILE_BYTES, "torch_dist", 40_000)
    assert run("import-hf", hf, tmp_path / "m", "--workers", 2) == 0
    assert len(list((tmp_path / "m" / "release").glob("*.distcp"))) > 2
    assert run("diff", megatron, tmp_path / "m") == 0
    capsys.readouterr()
    monkeypatch.setitem(convert.FILE_BYTES, "safetensors", 20_000)
    assert run("export-hf", tmp_path / "m", tmp_path / "b", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    error = float(said.split("relative error ")[1].split(",")[0])
    assert 5e-4 < error < 4e-3
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in model.state_dict().items():
        there = load_file(tmp_path / "b" / index["weight_map"][name])[name]
        assert torch.equal(there, value.bfloat16())


def test_fp8_out_and_in_again(tmp_path: Path, capsys) -> None:
    model = hf_model("llama", hidden_size=160, intermediate_size=136, num_hidden_layers=1)
    hf = save_hf(model, tmp_path / "hf")
    assert run("import-hf", hf, tmp_path / "m") == 0
    assert run("export-hf", tmp_path / "m", tmp_path / "fp8", "--dtype", "fp8") == 0
    error = float(capsys.readouterr().out.split("relative error ")[1].split(",")[0])
    assert 0.01 < error < 0.04
    there = load_file(tmp_path / "fp8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert there[name].dtype == torch.float8_e4m3fn
    assert there[name + "_scale_inv"].shape == (2, 2)  # [160, 136] in blocks of 128
    assert run("import-hf", tmp_path / "fp8", tmp_path / "again") == 0
    assert run("export-hf", tmp_path / "again", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")[name].float()
    weight = model.state_dict()[name]
    assert (back - weight).norm() / weight.norm() < 0.04


# --------------------------------------------------------------------- Transformer Engine's names


@pytest.fixture
def engine_names(megatron_cpu, monkeypatch) -> dict:
    """Megatron's own Transformer Engine specs, with layers that have its names on a CPU.

    A norm that is fused into a linear layer is that layer's ``layer_norm_weight``. The changes of
    arguments that go with it. tests/gpu/test_convert_gpu.py has the real layers.
    """
    from megatron.core.extensions import transformer_engine_spec_provider
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class NormedLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, *args, config, **kwargs) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            self.eps = config.layernorm_epsilon
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

        def forward(self, x, *args, **kwargs):
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
            return super().forward(x, *args, **kwargs)

    class Provider(backends.LocalSpecProvider):
        def linear(self) -> type:
            return ColumnParallelLinear

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormedLinear

    norm = Provider().layer_norm(rms_norm=True)
    for module in (gpt_layer_specs, transformer_engine_spec_provider):
        monkeypatch.setattr(module, "TESpecProvider", Provider)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", norm)
    return {"transformer-impl": "transformer_engine"}


def test_transformer_engine_s_names_of_latent_attention(
    engine_names: dict, predicting, tmp_path: Path
) -> None:
    """Import under these names, load, compute, upcycle, export."""
    model, prediction, hf, _ = predicting
    impl = ("--transformer-impl", "transformer_engine")
    assert run("import-hf", hf, tmp_path / "m", *impl) == 0
    names = TorchDistSource(tmp_path / "m").modules()
    for prefix in ("decoder.layers.1.", "mtp.layers.0.transformer_layer."):
        up = prefix + "self_attention.linear_{}_up_proj.layer_norm_weight"
        assert {up.format("kv"), up.format("q")} <= names.keys()
        assert prefix + "input_layernorm.weight" in names
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names  # dense
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names  # experts
    ours = megatron_model(tmp_path / "m", **engine_names)
    for mine, theirs in (
        (megatron_logits(ours, tokens()), hf_logits(model, tokens())),
        (prediction_logits(ours, tokens()), prediction.logits(model, tokens())),
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert run("export-hf", tmp_path / "m", tmp_path / "back") == 0
    same_tensors(hf, tmp_path / "back")
    assert run("upcycle", tmp_path / "m", tmp_path / "up") == 0
    again = megatron_logits(megatron_model(tmp_path / "up", **engine_names), tokens())
    before = megatron_logits(ours, tokens())
    torch.testing.assert_close(again, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_transformer_engine_s_names_of_other_attention(
    engine_names: dict, models, family: str
) -> None:
    """They are what the local layers store too."""
    model, _, megatron = models(family)
    ours = megatron_logits(megatron_model(megatron, **engine_names), tokens())
    torch.testing.assert_close(ours, hf_logits(model, tokens()), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- multi-token prediction


@pytest.fixture(scope="module")
def predicting(tmp_path_factory):
    """DeepSeek-V3 with a layer of multi-token prediction: model, layer, folder, checkpoint."""
    root = tmp_path_factory.mktemp("predicting")
    model = hf_model("deepseek_v3", num_hidden_layers=2)
    prediction = save_with_prediction(model, root / "hf")
    assert run("import-hf", root / "hf", root / "megatron") == 0
    return model, prediction, root / "hf", root / "megatron"


def test_multi_token_prediction_there_and_back(megatron_cpu, predicting, tmp_path: Path) -> None:
    """Every tensor bit for bit, and what the layer predicts is Eq. 21's."""
    model, prediction, hf, megatron = predicting
    assert run("export-hf", megatron, tmp_path / "back") == 0
    same_tensors(hf, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert run("verify", megatron) == 0
    theirs, ours = prediction.logits(model, tokens()), megatron_model(megatron)
    assert theirs.std() > 0.3
    torch.testing.assert_close(prediction_logits(ours, tokens()), theirs, atol=1e-4, rtol=1e-4)
    again = megatron_logits(ours, tokens())
    torch.testing.assert_close(again, hf_logits(model, tokens()), atol=1e-4, rtol=1e-4)


def test_prediction_layers_left_out_or_not_whole(predicting, tmp_path: Path, capsys) -> None:
    _, _, hf, megatron = predicting
    assert run("import-hf", hf, tmp_path / "main", "--drop-mtp") == 0
    assert not any(key.startswith("mtp.") for key in TorchDistSource(tmp_path / "main").infos())
    assert run("export-hf", megatron, tmp_path / "served", "--drop-mtp") == 0
    served = load_file(tmp_path / "served" / "model.safetensors")
    assert not any(name.startswith("model.layers.2.") for name in served)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    capsys.readouterr()
    for name, change, said in (
        ("eh_proj.weight", None, "eh_proj.weight is missing; --drop-mtp leaves"),
        ("hnorm.weight", None, "missing tensors: model.layers.2.hnorm.weight"),
        ("shared_head.head.weight", 1.0, "is not lm_head.weight; Megatron shares it"),
    ):
        state = load_file(hf / "model.safetensors")
        taken = state.pop(f"model.layers.2.{name}")
        if change:
            state[f"model.layers.2.{name}"] = taken + change
        folder = tmp_path / name
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text((hf / "config.json").read_text())
        assert run("import-hf", folder, tmp_path / "out") == 2
        assert said in _said(capsys)


@pytest.mark.parametrize("exit", ["mean", "learned"])
def test_an_upcycled_prediction_is_the_same_function(
    megatron_cpu, predicting, tmp_path: Path, monkeypatch, exit: str
) -> None:
    """And an mHC model with such a layer loads in transformers, which leaves it out."""
    import transformers

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    _, _, _, megatron = predicting
    assert run("upcycle", megatron, tmp_path / "up", "--set", f"exit={exit}") == 0
    assert run("verify", tmp_path / "up") == 0
    before, after = megatron_model(megatron), megatron_model(tmp_path / "up")
    assert "mtp.layers.0.mtp_model_layer.attn_hc.phi" in after.state_dict()
    for logits in (megatron_logits, prediction_logits):
        torch.testing.assert_close(
            logits(after, tokens()), logits(before, tokens()), atol=1e-5, rtol=1e-5
        )
    assert run("export-hf", tmp_path / "up", tmp_path / "served") == 0
    served = load_file(tmp_path / "served" / "model.safetensors")
    assert "model.layers.2.attn_hc.phi" in served
    assert ("model.layers.2.exit.phi" in served) == (exit == "learned")
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "served", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not about["unexpected_keys"] and not about["missing_keys"]
    ours = megatron_logits(after, tokens())
    torch.testing.assert_close(hf_logits(model.eval(), tokens()), ours, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- upcycle


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("variant", ["mhc", "identity", "birkhoff", "hc"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_coefficients_keep_the_function(variant: str, n: int, symmetry: str) -> None:
    """sum H_pre = 1, H_post = 1 and the rows of H_res sum to one, for every sublayer."""
    from mhc_megatron.checkpoint.inspection import static_coefficients

    mhc = MHCConfig(variant=variant, n=n)
    for index in range(5):
        bias = upcycled_bias(mhc, index, symmetry).double()
        H_pre, H_post, H_res = static_coefficients(
            bias, torch.full((mhc.alphas,), 0.01).double(), mhc
        )
        assert H_pre.sum().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(H_post, torch.ones_like(H_post))
        torch.testing.assert_close(H_res.sum(-1), torch.ones_like(H_post), atol=1e-6, rtol=0)
        if symmetry == "rotate" and n > 2:
            assert H_pre.argmax().item() == index % n and H_pre.max() > 0.49
        if symmetry == "none" and variant == "mhc":
            assert bias[0].item() == pytest.approx(-math.log(n - 1), abs=1e-6)


@pytest.mark.parametrize(
    "family, changes, symmetry",
    [
        ("llama", [], "rotate"),
        ("llama", ["n=3"], "none"),
        ("qwen2", ["exit=learned"], "rotate"),
        ("deepseek_v3", ["variant=birkhoff"], "rotate"),
    ],
)
def test_an_upcycled_model_is_the_same_function(
    megatron_cpu, models, tmp_path: Path, family: str, changes: list[str], symmetry: str
) -> None:
    _, _, megatron = models(family)
    words = [word for change in changes for word in ("--set", change)]
    assert run("upcycle", megatron, tmp_path / "up", "--symmetry", symmetry, *words) == 0
    assert run("verify", tmp_path / "up") == 0
    before = megatron_logits(megatron_model(megatron), tokens())
    after = megatron_logits(megatron_model(tmp_path / "up"), tokens())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_rotation_parts_the_streams(megatron_cpu, models, tmp_path: Path, symmetry: str) -> None:
    """After one step the gradients of b_post differ between streams, or never do."""
    _, _, megatron = models("llama")
    assert run("upcycle", megatron, tmp_path / "up", "--symmetry", symmetry) == 0
    model = megatron_model(tmp_path / "up")
    ids = tokens()
    mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool), diagonal=1)
    model(
        ids, torch.arange(ids.shape[1]).expand_as(ids), mask, labels=ids.roll(-1)
    ).mean().backward()
    post = model.decoder.layers[0].attn_hc.bias.grad[4:8]
    spread = (post.max() - post.min()) / post.abs().max()
    assert spread > 0.05 if symmetry == "rotate" else spread < 1e-3


# ------------------------------------------------------------------------- mHC models, exported


def randomised(source: Path, out: Path, seed: int = 9) -> Path:
    """The same checkpoint with random connections."""
    reader, generator = TorchDistSource(source), torch.Generator().manual_seed(seed)
    outputs = []
    for output in mirror(reader):
        if "_hc." in output.key or ".exit." in output.key:
            scale = 0.1 if output.key.endswith("phi") else 0.7
            data = scale * torch.randn(math.prod(output.shape), generator=generator)
            recipe = Recipe("values", (), {"data": data.tolist()})
            output = dataclasses.replace(output, recipe=recipe)
        outputs.append(output)
    convert.run(torch_dist_plan(reader, outputs), out, quiet=True)
    return out


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", []),
        ("qwen2", ["sinkhorn=deepseek-v4", "exit=learned", "norm_eps=1e-6"]),
        ("qwen3", ["variant=birkhoff", "n=3"]),
        ("llama", ["variant=identity", "n=2"]),
        ("llama", ["variant=hc"]),
        ("deepseek_v3", ["exit=learned"]),
    ],
)
def test_transformers_loads_and_generates(
    megatron_cpu, models, tmp_path: Path, monkeypatch, family: str, changes: list[str]
) -> None:
    """Through trust_remote_code: Megatron's logits, the same tokens with a cache and without."""
    import transformers

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    _, _, megatron = models(family)
    words = [word for change in changes for word in ("--set", change)]
    assert run("upcycle", megatron, tmp_path / "up", *words) == 0
    mhc = randomised(tmp_path / "up", tmp_path / "mhc")
    assert run("export-hf", mhc, tmp_path / "served") == 0
    assert run("verify", tmp_path / "served") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "served", trust_remote_code=True, dtype=torch.float32
    ).eval()
    ours = megatron_logits(megatron_model(mhc), tokens())
    torch.testing.assert_close(hf_logits(model, tokens()), ours, atol=1e-4, rtol=1e-4)
    residual = megatron_logits(megatron_model(megatron), tokens())
    assert (ours - residual).abs().max() > 0.1  # the connections take part
    with torch.no_grad():
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        cached = model.generate(tokens()[:, :5], use_cache=True, **options)
        plain = model.generate(tokens()[:, :5], use_cache=False, **options)
    assert torch.equal(cached, plain) and cached.shape == (2, 13)


def test_connections_stay_float32_in_a_bf16_model(models, tmp_path: Path, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    _, _, megatron = models("llama")
    assert run("upcycle", megatron, tmp_path / "up", "--set", "exit=learned") == 0
    assert run("export-hf", tmp_path / "up", tmp_path / "served", "--dtype", "bf16") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "served", trust_remote_code=True, dtype="auto"
    )
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.layers[0].attn_hc.phi.dtype == model.model.exit.phi.dtype == torch.float32
    assert model(input_ids=tokens()).logits.isfinite().all()


def exported(**mhc):
    """A model of the module that an export writes, with random weights."""
    from mhc_megatron.checkpoint import modeling_mhc

    config = modeling_mhc.MHCLlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config.mhc = MHCConfig(**mhc).to_mapping()
    torch.manual_seed(0)
    return modeling_mhc.MHCLlamaForCausalLM(config)


def test_a_copy_of_an_exported_model_has_its_own_exit() -> None:
    model = exported(exit="learned")
    frozen = copy.deepcopy(model)
    ids = torch.arange(7).unsqueeze(0)
    expected = frozen(input_ids=ids).logits
    with torch.no_grad():
        model.model.exit.bias.fill_(-50.0)
    found = frozen(input_ids=ids).logits
    assert torch.equal(found, expected)
    found.sum().backward()
    assert frozen.model.exit.bias.grad is not None and model.model.exit.bias.grad is None


def test_an_exported_model_s_sinkhorn_is_the_run_s() -> None:
    from mhc_kernels import reference
    from mhc_megatron.checkpoint import modeling_mhc

    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1))
    logits[..., 2] -= 110  # a column's factor cancels
    found = modeling_mhc.sinkhorn(logits, 20)
    torch.testing.assert_close(found, reference.sinkhorn(logits, 20))


def test_what_must_not_be_split_is_named_as_its_class_is() -> None:
    model = exported()
    assert type(model.model.layers[0]).__name__ in model._no_split_modules


# -------------------------------------------------------------------------------------- bad input


def _said(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def _edit(hf: Path, out: Path, change) -> Path:
    out.mkdir()
    state = load_file(hf / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors")
    (out / "config.json").write_text((hf / "config.json").read_text())
    return out


def test_names_and_shapes_that_do_not_fit(models, tmp_path: Path, capsys) -> None:
    _, hf, _ = models("llama")
    name = "model.layers.1.mlp.up_proj.weight"

    def renamed(state):
        state["model.layers.1.mlp.upp_proj.weight"] = state.pop(name)

    folder = _edit(hf, tmp_path / "a", renamed)
    assert run("import-hf", folder, tmp_path / "out") == 2
    said = _said(capsys)
    assert "upp_proj.weight (nearest: " + name in said and "missing tensors: " + name in said
    folder = _edit(hf, tmp_path / "b", lambda s: s.update({name: s[name][:-1]}))
    assert run("import-hf", folder, tmp_path / "out") == 2
    assert "has shape [55, 32]; the config makes it [56, 32]" in _said(capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("model_type", "gpt2", "model_type 'gpt2' is not supported"),
        ("hidden_act", "gelu", "hidden_act: gelu is not supported"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}, "rope_type 'dynamic'"),
        ("num_hidden_layers", None, "the config has no"),
        ("hidden_size", "32", 'hidden_size must be a whole number of at least 1, not "32"'),
    ],
)
def test_settings_that_are_not_supported(models, tmp_path, capsys, key, value, said) -> None:
    _, hf, _ = models("llama")
    folder = _edit(hf, tmp_path / "a", lambda state: None)
    config = json.loads((hf / "config.json").read_text())
    config[key] = value
    if value is None:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert run("import-hf", folder, tmp_path / "out") == 2
    assert said in _said(capsys)


@pytest.mark.parametrize("value", [None, "32", [], True, float("nan"), 0])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "hidden_size"),
        ("llama", "num_hidden_layers"),
        ("llama", "num_attention_heads"),
        ("llama", "vocab_size"),
        ("llama", "rope_theta"),
        ("llama", "model_type"),
        ("deepseek_v3", "kv_lora_rank"),
        ("deepseek_v3", "moe_intermediate_size"),
        ("deepseek_v3", "n_group"),
    ],
)
def test_numbers_of_a_config_that_are_none(family: str, key: str, value) -> None:
    from checkpoint_models import LATENT, SIZES

    from mhc_megatron.checkpoint.arguments import megatron_values

    config = {**SIZES, **(LATENT if family == "deepseek_v3" else {}), "model_type": family}
    assert megatron_values(config)["hidden-size"] == 32
    with pytest.raises(UserError, match=key):
        megatron_values({**config, key: value})
    if key != "rope_theta":
        del config[key]
        with pytest.raises(UserError, match=key):
            megatron_values(config)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ([1], "rope_parameters must hold keys and values"),
        ({"rope_theta": None}, "rope_theta must be a number above 0, not null"),
        ({"rope_type": "llama3"}, "rope_parameters has no 'factor'"),
        ({"rope_type": "llama3", "factor": "8"}, 'factor must be a number above 0, not "8"'),
    ],
)
def test_rope_parameters_that_are_none(rope, said: str) -> None:
    from checkpoint_models import SIZES

    from mhc_megatron.checkpoint.arguments import megatron_values

    with pytest.raises(UserError, match=said):
        megatron_values({**SIZES, "model_type": "llama", "rope_parameters": rope})


def test_mhc_taken_for_residual_and_the_reverse(models, tmp_path: Path, capsys) -> None:
    _, hf, megatron = models("llama")
    assert run("upcycle", megatron, tmp_path / "up") == 0
    assert run("upcycle", tmp_path / "up", tmp_path / "out") == 2
    assert "is an mHC checkpoint already" in _said(capsys)
    assert run("export-deepseek-v4", megatron, tmp_path / "out") == 2
    assert "is a residual checkpoint" in _said(capsys)
    assert run("export-hf", tmp_path / "up", tmp_path / "served") == 0
    capsys.readouterr()
    assert run("import-hf", tmp_path / "served", tmp_path / "out") == 2
    assert "is not a residual model" in _said(capsys)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    config["model_type"], _ = "llama", config.pop("mhc")
    (tmp_path / "served" / "config.json").write_text(json.dumps(config))
    assert run("import-hf", tmp_path / "served", tmp_path / "out") == 2
    assert "unknown tensors" in (said := _said(capsys)) and "It is an mHC checkpoint" in said
    reader = TorchDistSource(tmp_path / "up")
    plan = torch_dist_plan(reader, mirror(reader), MHCConfig(variant="none"))
    convert.run(plan, tmp_path / "lies", quiet=True)
    assert run("export-hf", tmp_path / "lies", tmp_path / "out") == 2
    assert "is an mHC checkpoint, and its settings say that it is not" in _said(capsys)
    plan = torch_dist_plan(
        TorchDistSource(megatron), mirror(TorchDistSource(megatron)), MHCConfig()
    )
    convert.run(plan, tmp_path / "lies2", quiet=True)
    assert run("export-hf", tmp_path / "lies2", tmp_path / "out") == 2
    assert "attn_hc.phi is missing" in _said(capsys)
    assert not (tmp_path / "out").exists()


def _state_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_damaged_sources_lose_nothing(models, tmp_path: Path, capsys) -> None:
    """One sentence, exit code 2, no target, and the source as it was."""
    model, _, megatron = models("llama")
    hf = save_hf(model, tmp_path / "hf", max_shard_size="30KB")
    shard = sorted(hf.glob("model-*.safetensors"))[1]
    whole, dist = shard.read_bytes(), tmp_path / "m"
    shutil.copytree(megatron, dist)
    stored = next((dist / "release").glob("__0_0.distcp"))
    sizes = stored.read_bytes()
    for file, content, words, said in (
        (shard, None, ("import-hf", hf), "is missing"),
        (shard, whole[:-7], ("import-hf", hf), "is truncated"),
        (shard, whole[:4], ("import-hf", hf), "truncated or not a safetensors file"),
        (shard, b"\xff" + whole[1:], ("import-hf", hf), str(shard)),
        (stored, None, ("export-hf", dist), "is missing"),
        (stored, sizes[:-9], ("upcycle", dist), "is truncated"),
        (stored, sizes[:200] + b"?" + sizes[201:], ("export-hf", dist), "is damaged"),
        (dist / "release" / ".metadata", b"x", ("export-hf", dist), ".metadata is damaged"),
    ):
        before = file.read_bytes()
        file.unlink() if content is None else file.write_bytes(content)
        there = _state_of(tmp_path)
        capsys.readouterr()
        assert run(*words, tmp_path / "out") == 2, said
        assert said in _said(capsys)
        assert not (tmp_path / "out").exists()
        left = _state_of(tmp_path)
        assert {k: v for k, v in left.items() if not k.startswith("out.partial")} == there
        file.write_bytes(before)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def test_a_full_disk_is_one_sentence(models, tmp_path: Path, capsys, monkeypatch) -> None:
    _, hf, _ = models("llama")
    full = shutil._ntuple_diskusage(9, 9, 0)
    with monkeypatch.context() as patched:
        patched.setattr(convert.shutil, "disk_usage", lambda path: full)
        assert run("import-hf", hf, tmp_path / "out") == 2
    assert "is too full" in _said(capsys) and not (tmp_path / "out").exists()

    def fills_up(path, outputs, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(convert._WRITERS, "torch_dist", fills_up)
    assert run("import-hf", hf, tmp_path / "out") == 2
    assert "the disk is full; what is converted is kept" in _said(capsys)
    assert not (tmp_path / "out").exists()


def test_folders_that_exist_or_do_not(models, tmp_path: Path, capsys) -> None:
    _, hf, megatron = models("llama")
    (tmp_path / "there").mkdir()
    for words in (
        ("import-hf", hf, tmp_path / "there"),
        ("export-hf", megatron, tmp_path / "there"),
        ("upcycle", megatron, tmp_path / "there"),
    ):
        assert run(*words) == 2
        assert "exists; nothing is overwritten" in _said(capsys)
    assert run("import-hf", hf, tmp_path / "no" / "where") == 2
    assert "does not exist; make it first" in _said(capsys)
    assert run("import-hf", tmp_path / "nothing", tmp_path / "out") == 2
    assert "cannot read" in _said(capsys)
    assert run("verify", tmp_path / "nothing") == run("inspect", tmp_path / "there") == 2
    assert list((tmp_path / "there").iterdir()) == []


def test_a_killed_conversion_goes_on(models, tmp_path: Path) -> None:
    """SIGKILL in the middle: no target; the same command ends with the same bits."""
    import os
    import signal
    import subprocess
    import sys
    import time

    _, hf, megatron = models("llama")
    root = Path(__file__).resolve().parents[1]
    out = tmp_path / "out"
    code = (
        f"import sys, time; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels')!r}]\n"
        "from mhc_megatron.checkpoint import convert\n"
        "from tools.convert_checkpoint import main\n"
        "convert.FILE_BYTES['torch_dist'] = 20000\n"
        "write = convert.write_job\n"
        "def slow(job, tick=lambda n: None):\n"
        "    time.sleep(0.05 + 100 * job.path.endswith('__5_0.distcp'))\n"
        "    return write(job, tick)\n"
        "convert.write_job = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["import-hf", str(hf), str(out), "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / convert.JOURNAL
    deadline = time.time() + 50
    while time.time() < deadline:
        if journal.exists() and len(journal.read_text().splitlines()) >= 6:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and len(journal.read_text().splitlines()) == 6
    first = tmp_path / "out.partial" / "result" / "release" / "__0_0.distcp"
    before = os.stat(first)
    convert.FILE_BYTES["torch_dist"], saved = 20000, convert.FILE_BYTES["torch_dist"]
    try:
        assert main(words) == 0
    finally:
        convert.FILE_BYTES["torch_dist"] = saved
    after = os.stat(out / "release" / "__0_0.distcp")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (tmp_path / "out.partial").exists()
    assert run("diff", megatron, out) == 0 and run("verify", out) == 0
