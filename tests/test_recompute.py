"""Recompute of blocks on one CPU rank: memory against Eq. (20), the order of things, bad input."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.footprint import best_block, microbatches_in_flight

pytestmark = pytest.mark.usefixtures("megatron_cpu")

S, B, C, N, VOCAB, LAYERS = 8, 1, 1024, 4, 64, 6
TOKENS, SUBLAYERS = S * B, 2 * LAYERS
#: Bytes of one tensor of C channels.
WIDTH = TOKENS * C * 4


def model(recompute=0, variant="mhc", layers=LAYERS, hidden_size=C, **changes):
    """A GPTModel of that many dense layers; a sublayer is narrow, so that its own memory is small.

    One Sinkhorn step: eager autograd keeps every step of it, which the kernels do not.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mhc_megatron.layer_spec import mhc_layer_spec

    options = {
        "num_layers": layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
    }
    config = TransformerConfig(**{**options, **changes})
    mhc = MHCConfig(variant=variant, sinkhorn_iterations=1, alpha=0.5, recompute=recompute)
    torch.manual_seed(3)
    spec = mhc_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), config, mhc)
    return GPTModel(config, spec, VOCAB, S, position_embedding_type="rope")


def loss(gpt, number: int = 0, labels: bool = True) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(number))
    mask = torch.triu(torch.ones(1, 1, S, S), diagonal=1).bool()
    positions = torch.arange(S).expand(B, S)
    return gpt(tokens, positions, mask, labels=tokens.roll(-1, 1) if labels else None).mean()


def gradients(gpt) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}


def same_bits(ours, expected) -> bool:
    return all(torch.equal(ours[name], expected[name]) for name in expected)


class Saved:
    """Bytes of the storages that autograd has saved, parameters apart: now, and the most yet."""

    def __init__(self, gpt: torch.nn.Module) -> None:
        self.own = {p.untyped_storage()._cdata for p in gpt.parameters()}
        self.storages: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __enter__(self) -> Saved:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor.detach()

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().nbytes() >= WIDTH:  # often enough
            self.most = max(self.most, self.bytes())
        return tensor

    def bytes(self) -> int:
        alive = (
            torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.storages.values()
        )
        return sum(storage.nbytes() for storage in alive if storage is not None)


def measure(microbatches: int, **settings) -> tuple[int, int]:
    """Bytes saved by the forwards of so many microbatches, and at most during their backwards."""
    gpt = model(**settings)
    gc.collect()
    with Saved(gpt) as saved:
        losses = [loss(gpt, number) for number in range(microbatches)]
        held = saved.bytes()
        for one in losses:
            one.backward()
    return held, saved.most


@pytest.mark.parametrize("m", [1, 4])
def test_memory_is_the_formulas(m: int, capsys) -> None:
    """nC ceil(L / L_r) m + (n + 2) C L_r + the y, beyond the sublayers' own memory.

    Eq. (20) counts the first x of the block that is refilled twice; it is there already. A residual
    model keeps x and norm(x) of every sublayer instead, 2 C; the rest of its memory is the
    sublayers' own.
    """
    residual = measure(m, variant="none")[0] / WIDTH - 2 * SUBLAYERS * m
    rows = []
    for L_r in (0, 1, 2, 3, 4, 6, 12):
        held, most = (of / WIDTH - residual for of in measure(m, recompute=L_r))
        y = SUBLAYERS * m
        kept = N * math.ceil(SUBLAYERS / L_r) * m if L_r else (N + 2) * SUBLAYERS * m
        rows.append((L_r, held, kept + y, most, kept + y + ((N + 2) * L_r - N if L_r else 0)))
    with capsys.disabled():
        print(f"\nwidths of C, {SUBLAYERS} sublayers, m = {m}: held, formula; peak, formula")
        for L_r, held, kept, most, peak in rows:
            print(f"  L_r {L_r:2}  {held:6.1f} {kept:6.1f}  {most:6.1f} {peak:6.1f}")
    for L_r, held, kept, most, peak in rows:
        assert held == pytest.approx(kept, rel=0.1), L_r
        assert most == pytest.approx(peak, rel=0.1), L_r


def test_several_microbatches_in_flight() -> None:
    """Blocks belong to a forward: backwards in the order of the forwards, and in the reverse."""
    for order in ([0, 1, 2], [2, 1, 0]):
        results = []
        for recompute in (0, 4):
            gpt = model(recompute, hidden_size=32)
            losses = [loss(gpt, number) for number in range(3)]
            for number in order:
                losses[number].backward()
            results.append(gradients(gpt))
        assert same_bits(*results)


def test_evaluation_drops_nothing() -> None:
    from mhc_megatron.recompute import recomputes

    kept, gpt = model(0, hidden_size=32), model(4, hidden_size=32)
    first = loss(gpt)
    with torch.no_grad():
        assert torch.equal(loss(gpt), loss(kept))
    (blocks,) = recomputes(gpt)
    assert blocks._open is None and len(blocks._waiting) == 1
    first.backward()
    loss(kept).backward()
    assert same_bits(gradients(gpt), gradients(kept))


@pytest.mark.parametrize("where", ["norm", "mlp"])
def test_an_exception_in_a_forward_leaves_nothing(where: str) -> None:
    """Neither a block of the broken forward, nor a wrong one in the next."""
    from mhc_megatron.recompute import Block, recomputes

    kept, gpt = model(0, hidden_size=32), model(4, hidden_size=32)
    layer = gpt.decoder.layers[2]
    module = layer.mlp if where == "mlp" else layer.pre_mlp_layernorm

    def fail(*args):
        raise KeyError("broken")

    with module.register_forward_hook(fail), pytest.raises(KeyError):
        loss(gpt)
    loss(gpt, 1).backward()
    loss(kept, 1).backward()
    assert same_bits(gradients(gpt), gradients(kept))
    assert recomputes(gpt)[0].waiting() is None
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Block]


def test_a_forward_without_backward_is_forgotten() -> None:
    from mhc_megatron.recompute import prefetch, recomputes

    gpt = model(4, hidden_size=32)
    (blocks,) = recomputes(gpt)
    abandoned = loss(gpt)
    assert blocks.waiting() is not None
    del abandoned
    gc.collect()
    assert blocks.waiting() is None and not prefetch(gpt)
    for number in range(3):
        loss(gpt, number).backward()
    assert len(blocks._waiting) == 1


def test_prefetch_fills_the_last_block_of_the_oldest_forward() -> None:
    from mhc_megatron.recompute import prefetch, recomputes

    kept, gpt = model(0, hidden_size=32), model(5, hidden_size=32)
    losses = [loss(gpt, number) for number in range(2)]
    (blocks,) = recomputes(gpt)
    oldest = blocks.waiting()
    assert oldest.first == 10 and len(oldest.sublayers) == 2
    assert prefetch(gpt) and not oldest.dropped
    assert blocks.waiting() is not oldest
    for one in losses:
        one.backward()
    assert not prefetch(gpt)
    for number in range(2):
        loss(kept, number).backward()
    assert same_bits(gradients(gpt), gradients(kept))


def test_a_second_backward_through_the_same_graph() -> None:
    """Of the logits: Megatron's cross entropy works in place and refuses."""
    results = []
    for recompute in (0, 4):
        gpt = model(recompute, hidden_size=32)
        one = loss(gpt, labels=False)
        one.backward(retain_graph=True)
        one.backward()
        results.append(gradients(gpt))
    assert same_bits(*results)


def test_prediction_layers_of_the_wrapped_spec_share_no_block(monkeypatch) -> None:
    """Megatron makes their block of the decoder's last layer, which may be wrapped already."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from mhc_megatron.recompute import recomputes

    # It keeps losses by depth, those of the process's first model.
    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {})

    def train(recompute: int):
        gpt = model(recompute, layers=2, hidden_size=32, mtp_num_layers=2)
        config, spec = gpt.config, gpt.transformer_layer_spec
        torch.manual_seed(3)
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        gpt = GPTModel(
            config, spec, VOCAB, S, position_embedding_type="rope", mtp_block_spec=mtp
        )
        loss(gpt).backward()
        return gpt

    recomputed, kept = train(3), train(0)
    assert [len(blocks.connections) for blocks in recomputes(recomputed)] == [4, 2, 2]
    assert same_bits(gradients(recomputed), gradients(kept))


def test_two_chunks_share_no_block() -> None:
    from mhc_megatron.recompute import recomputes

    first, second = model(8, layers=2, hidden_size=32), model(8, layers=3, hidden_size=32)
    (of_first,), (of_second,) = recomputes(first), recomputes(second)
    assert of_first is not of_second
    assert (of_first.L_r, of_second.L_r) == (4, 6)


# ------------------------------------------------------------------------------------ L_r and m


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("L", [1, 2, 5, 8, 30, 60])
@pytest.mark.parametrize("m", [1, 2, 11])
def test_auto_is_the_best_of_all_blocks(n: int, L: int, m: int) -> None:
    """Against brute force over every way to cut L sublayers, not only into equal blocks."""
    L_r, width = best_block(n, L, m)
    brute = min(n * blocks * m + (n + 2) * math.ceil(L / blocks) for blocks in range(1, L + 1))
    assert width == brute == n * math.ceil(L / L_r) * m + (n + 2) * L_r
    assert L_r <= L


def test_auto_counts_the_microbatches_that_wait(monkeypatch) -> None:
    from megatron.core import num_microbatches_calculator as calculator

    from mhc_megatron.recompute import recompute_of, recomputes

    gpt = model("auto", hidden_size=32)
    assert recomputes(gpt)[0].L_r == best_block(N, SUBLAYERS, 1)[0]
    config = gpt.config
    monkeypatch.setattr(config, "pipeline_model_parallel_size", 4)
    monkeypatch.setattr(config, "microbatch_group_size_per_vp_stage", None)
    for v in (None, 2):
        monkeypatch.setattr(config, "virtual_pipeline_model_parallel_size", v)
        for rank in range(4):
            blocks = recompute_of(MHCConfig(recompute="auto"), config, rank)
            assert blocks.in_flight() == microbatches_in_flight(4, rank, v or 1)

    class Two:
        get = staticmethod(lambda: 2)

    monkeypatch.setattr(config, "virtual_pipeline_model_parallel_size", None)
    monkeypatch.setattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", Two)
    assert recompute_of(MHCConfig(recompute="auto"), config, 0).in_flight() == 2


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("given, means", [("auto", "auto"), ("off", 0), (False, 0), (0, 0), (3, 3)])
def test_values(given, means) -> None:
    mhc = MHCConfig.from_mapping({"recompute": given})
    assert mhc.recompute == means and type(mhc.recompute) is type(means)
    assert MHCConfig.from_mapping(mhc.to_mapping()) == mhc


@pytest.mark.parametrize("given", [True, -1, 2.0, "on", "3", None])
def test_wrong_values(given) -> None:
    with pytest.raises(UserError, match="recompute must be auto, off, or the number of sublayers"):
        MHCConfig.from_mapping({"recompute": given})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recompute_granularity": "full"}, "recompute-granularity full"),
        ({"cuda_graph_impl": "local"}, "cuda-graph-impl local"),
        ({"cpu_offloading": True}, "cpu-offloading"),
        ({"fine_grained_activation_offloading": True}, "fine-grained-activation-offloading"),
        ({"use_megatron_fsdp": True}, "FSDP"),
    ],
)
def test_contradictions(changes, said) -> None:
    from mhc_megatron.recompute import check_recompute

    config = model(0, layers=1, hidden_size=32).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=said):
        check_recompute(config, MHCConfig(recompute="auto"))
    check_recompute(config, MHCConfig())
    check_recompute(config, MHCConfig(recompute="auto", variant="none"))


def test_blocks_own_the_norms_of_selective_recompute() -> None:
    """One of the two drops norm(u): a norm of ours is not wrapped in Megatron's checkpoint."""
    selective = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    gpt = model(3, layers=2, hidden_size=32, **selective)
    for layer in gpt.decoder.layers:
        assert layer.input_layernorm.forward.__name__ != "checkpointed"
        assert not layer.recompute_input_layernorm and not layer.recompute_pre_mlp_layernorm
