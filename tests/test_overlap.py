"""The overlap schedule on one rank with the CPU's stand-in streams.

What it computes (bit for bit what a run without a plan does), what it issues in which order on
which stream (a file that a person can read), and that no stream uses what another has not yet made
or memory that is given back too early.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch

from mhc_megatron.config import OVERLAP_PIECES, MHCConfig
from tests import overlap_cases
from tests.overlap_cases import KINDS, SHARED, build, plain, planned, steady
from tests.stream_checker import StreamChecker

pytestmark = pytest.mark.usefixtures("megatron_cpu")

GOLDEN = Path(__file__).parent / "golden" / "overlap_order.txt"


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_without_a_plan(kind: str, chunks: int) -> None:
    models = build(KINDS[kind], chunks=chunks)
    differences = plain(models, 3).differences(planned(models, 3))
    if kind == "MTP" and chunks == 1:
        # Embedding and MTP add to one gradient: together without a plan, one by one with it. The
        # sums differ in their last bits.
        (difference,) = differences
        name, _, sizes = difference.partition(": ")
        error, _, size = sizes.partition(" of ")
        assert name == "0.embedding.word_embeddings.weight"
        assert float(error) < 1e-6 * float(size)
    else:
        assert differences == []


def test_four_chunks() -> None:
    models = build(KINDS["shared experts"], chunks=4)
    assert plain(models, 5).differences(planned(models, 5)) == []


@pytest.mark.parametrize("variant", ["identity", "hc"])
@pytest.mark.parametrize("exit", ["mean", "learned"])
def test_variants_and_exits(variant: str, exit: str) -> None:
    models = build(SHARED, MHCConfig(variant=variant, exit=exit, alpha=0.5, init_std=0.1), chunks=2)
    assert plain(models, 3).differences(planned(models, 3)) == []


@pytest.mark.parametrize("kind", ["dense, biases", "shared experts"])
def test_dropout_draws_the_same_numbers(kind: str) -> None:
    """One forward after the other: the plan draws in the order in which forwards do."""
    models = build(KINDS[kind] | {"hidden_dropout": 0.1})
    torch.manual_seed(5)
    expected = plain(models, 1)
    torch.manual_seed(5)
    assert expected.differences(planned(models, 1)) == []
    torch.manual_seed(6)
    assert expected.differences(planned(models, 1))


@pytest.mark.parametrize("ahead", [2, 3, 5])
def test_more_microbatches_in_flight(ahead: int) -> None:
    """The forward of one meets the backward of another that began ``ahead`` microbatches ago."""
    models = build(KINDS["MoE, first layer dense"], chunks=2)
    got = planned(models, 5, steady(2, 5, ahead))
    assert plain(models, 5).differences(got) == []


@pytest.mark.parametrize("L_r", [2, 3, 8])
@pytest.mark.parametrize("kind", ["dense, biases", "MoE, first layer dense", "MTP"])
def test_recompute_of_blocks(kind: str, L_r: int) -> None:
    """Blocks that end within a layer, between layers and with the chunk."""
    expected = plain(build(KINDS[kind], chunks=2), 3)
    models = build(KINDS[kind], MHCConfig(alpha=0.5, init_std=0.1, recompute=L_r), chunks=2)
    assert expected.differences(planned(models, 3, steady(2, 3, ahead=2))) == []


def test_a_refill_comes_before_the_wait(monkeypatch) -> None:
    from mhc_megatron.recompute import Block

    order, refill = [], Block.refill

    def noted(block):
        if block.dropped:
            order.append("refill")
        refill(block)

    monkeypatch.setattr(Block, "refill", noted)
    for without, expected in (
        ("", ["refill", "wait for gradient"]),
        ("early_refill", ["wait for gradient", "refill"]),
    ):
        mhc = MHCConfig(recompute=8, overlap_without=without)
        models = build(SHARED, mhc, chunks=2)
        order.clear()
        planned(models, 1, transfers=order.append)
        # Forward and backward of two chunks, one microbatch: a block of each chunk.
        assert [what for what in order if "x" not in what and "send" not in what] == 2 * expected


def test_random_schedules() -> None:
    models = build(KINDS["MoE, first layer dense"], chunks=2)
    expected = plain(models, 3)
    for seed in range(10):
        pairs = overlap_cases.random_pairs(seed, 2, 3)
        assert expected.differences(planned(models, 3, pairs)) == [], f"seed {seed}: {pairs}"


@pytest.mark.parametrize("piece", OVERLAP_PIECES)
def test_without_a_piece(piece: str) -> None:
    mhc = MHCConfig(alpha=0.5, init_std=0.1, overlap_without=piece)
    models = build(KINDS["MoE, first layer dense"], mhc, chunks=2)
    assert plain(models, 3).differences(planned(models, 3)) == []


def test_evaluation_between_forward_and_backward_disturbs_nothing() -> None:
    """State of a microbatch is its plan's: the module may be used by others meanwhile."""
    models = build(KINDS["MoE, first layer dense"])
    expected = plain(models, 3)

    def evaluate(what: str) -> None:
        with torch.no_grad():
            models[0](**overlap_cases.batch(9))

    assert expected.differences(planned(models, 3, transfers=evaluate)) == []


# ---------------------------------------------------------------------------------- order, streams


class Recorder:
    """What the plan issues, in the host's order: (stream, what)."""

    def __init__(self, monkeypatch) -> None:
        from megatron.core.models.common.utils import TransformerLayerNode
        from megatron.core.pipeline_parallel.utils import ScheduleNode

        self.issued: list[tuple[str, str]] = []
        self.running = "start"
        self.between = lambda: None
        self.layers: dict[int, int] = {}  # by the layer's state, which its nodes share
        acquire, recorder = ScheduleNode.stream_acquire_context, self
        weights = TransformerLayerNode.backward_dw

        @contextlib.contextmanager
        def recorded(node, name=None):
            recorder.between()  # what the last node let go, before this one waits
            kind, _, way = (name or "").partition(" ")
            recorder.note(_where(node.stream), f"{recorder.owner(node)}.{kind}.{way[:1].upper()}")
            with acquire(node, name):
                yield
            recorder.between()

        def backward_dw(node):
            recorder.note(
                _where(torch.cuda.current_stream()), f"{recorder.owner(node)}.{node.name}.dW"
            )
            weights(node)

        monkeypatch.setattr(ScheduleNode, "stream_acquire_context", recorded)
        monkeypatch.setattr(TransformerLayerNode, "backward_dw", backward_dw)

    def owner(self, node) -> str:
        state = getattr(node, "layer_state", None)
        if state is None:
            return "chunk"
        number = _layer(node.submodule)
        if number is not None:
            self.layers[id(state)] = number
        return f"L{self.layers[id(state)]}"

    def note(self, where: str, what: str) -> None:
        self.running = what
        self.issued.append((where, what))


def _where(stream) -> str:
    from megatron.core.pipeline_parallel.utils import get_comm_stream

    from mhc_megatron.overlap import hop_stream, mixing_stream

    names = {
        id(mixing_stream()): "mixing",
        id(get_comm_stream()): "experts' wire",
        id(hop_stream("forward")): "hop forward",
        id(hop_stream("backward")): "hop backward",
    }
    return names.get(id(stream), "compute")


#: Megatron's names of slots -> what is in them.
_SLOTS = {"pre_dispatch_computation": "attention", "moe_dispatch": "dispatch", "mlp": "mlp",
          "moe_combine": "combine", "mhc_post": "mix", "mtp_post_process": "mtp_norm"}  # fmt: skip


def _layer(submodule) -> int | None:
    """The number of the layer that a wrapped submodule was made for."""
    while hasattr(submodule, "func"):
        for argument in submodule.args:
            if hasattr(argument, "layer_number"):
                return argument.layer_number
        submodule = submodule.args[0]
    return None


def table(issued: list[tuple[str, str]]) -> str:
    """One line per issue, one column per stream; time goes down."""
    columns = ["compute", "mixing", "experts' wire", "hop forward", "hop backward"]
    lines = ["".join(f"{name:22s}" for name in columns).rstrip()]
    for where, what in issued:
        for name, slot in _SLOTS.items():
            what = what.replace(f".{name}.", f".{slot}.")
        lines.append((" " * 22 * columns.index(where) + what).rstrip())
    return "\n".join(lines) + "\n"


def test_order_of_issue(monkeypatch) -> None:
    """One pair of a steady state, a dense layer and an MoE layer: against tests/golden."""
    kind = SHARED | {"moe_layer_freq": [0, 1, 0, 1, 0, 1], "num_layers": 6}
    models = build(kind, chunks=3)
    pairs = steady(3, 2)
    # Forward of the middle chunk against the backward of the middle chunk of another microbatch.
    middle = next(i for i, (f, b) in enumerate(pairs) if f and b and f.chunk == b.chunk == 1)
    recorder = Recorder(monkeypatch)
    ways = overlap_cases.Ways(
        models, lambda what: recorder.note(_where(torch.cuda.current_stream()), what)
    )
    from megatron.core.pipeline_parallel.utils import set_streams

    set_streams()
    for f, b in pairs[:middle]:
        ways.run(f, b)
    recorder.issued.clear()
    ways.run(*pairs[middle])
    got = table(recorder.issued)
    assert got == GOLDEN.read_text(encoding="utf-8"), (
        f"the order of issue has changed; if that is meant, put this into {GOLDEN}:\n{got}"
    )


def check(monkeypatch, kind, checker: type[StreamChecker] = StreamChecker) -> list[str]:
    """Findings in a run of three microbatches through three chunks of a layer or two."""
    models = build(kind | {"num_layers": 3}, chunks=3)
    recorder = Recorder(monkeypatch)
    checker = checker(monkeypatch, _where, lambda: recorder.running)
    recorder.between = checker.sweep
    gc.disable()  # what goes must go by reference count, at once
    try:
        with checker:
            planned(models, 3, steady(3, 3))
    finally:
        gc.enable()
    assert len(checker._clocks) >= 3
    return checker.findings


@pytest.mark.parametrize("kind", ["dense, biases", "shared experts", "MTP"])
def test_no_race_and_no_early_free(kind: str, monkeypatch) -> None:
    assert check(monkeypatch, KINDS[kind]) == []


def test_a_missing_wait_is_found(monkeypatch) -> None:
    from mhc_megatron import cpu
    from mhc_megatron.overlap import mixing_stream

    class Deaf(StreamChecker):
        def __init__(self, patch, *names) -> None:
            super().__init__(patch, *names)
            wait = cpu.Event.wait

            def deaf(event, stream=None):
                if stream is not mixing_stream():
                    wait(event, stream)

            patch.setattr(cpu.Event, "wait", deaf)

    findings = check(monkeypatch, SHARED, checker=Deaf)
    assert any("race: " in f and "mhc_post.F" in f and "on mixing" in f for f in findings)
    assert any("race: " in f and "mhc_post.B" in f and "on mixing" in f for f in findings)


def test_a_missing_record_is_found(monkeypatch) -> None:
    """The three that nothing but ``shared`` keeps; within a chunk the nodes' outputs do."""
    monkeypatch.setattr("mhc_megatron.overlap.shared", lambda stream, *tensors: None)
    found = {f.partition(" made on ")[2].partition(", at")[0] for f in check(monkeypatch, SHARED)}
    assert found == {
        "mixing is freed while hop forward may read it",
        "hop forward is freed while compute may read it",
        "compute is freed while hop backward may read it",
    }


@pytest.mark.parametrize("kind", ["dense, biases", "shared experts", "MTP"])
def test_no_parameter_gets_its_gradient_on_the_mixing_stream(kind: str) -> None:
    models, seen = build(KINDS[kind], chunks=2), set()
    for model in models:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: seen.add(_where(torch.cuda.current_stream()))
            )
    planned(models, 3)
    assert "compute" in seen
    assert not seen - {"compute", "experts' wire"}


def test_the_mixings_input_is_not_freed_by_its_nodes_name() -> None:
    from megatron.core.models.common.utils import should_free_input

    from mhc_megatron.overlap import MIXING

    config = overlap_cases.base_config(**SHARED)
    assert should_free_input("moe_combine", True, config, 4)
    assert not should_free_input(MIXING, True, config, 4)


def test_nothing_of_a_plan_stays(monkeypatch) -> None:
    """Plans and their tensors go with the iteration, without the garbage collector."""
    from mhc_megatron.overlap import LayerPlan

    alive, init = weakref.WeakSet(), LayerPlan.__init__

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        alive.add(self)
        alive.add(self.layer_state)

    monkeypatch.setattr(LayerPlan, "__init__", counted)
    models = build(KINDS["MTP"], chunks=2)
    gc.collect()
    gc.disable()
    try:
        planned(models, 3)
        assert len(alive) == 0
    finally:
        gc.enable()


def test_the_host_waits_for_nothing(monkeypatch) -> None:
    """A dense model: Megatron's dispatcher of dropless experts reads their shapes on the host."""
    from mhc_megatron import cpu

    def wait(*args) -> None:
        raise AssertionError("the host waits for the GPU")

    models = build(KINDS["dense"], chunks=2)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(cpu.Stream, "synchronize", wait)
    monkeypatch.setattr(cpu.Event, "synchronize", wait)
    planned(models, 3)


def test_hybrid_models_are_refused() -> None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mhc_megatron.errors import UserError
    from mhc_megatron.layer_spec import mhc_layer_spec

    with pytest.raises(UserError, match="is for GPT models"):
        mhc_layer_spec(ModuleSpec(HybridStack), overlap_cases.base_config(), MHCConfig())


def test_what_cannot_be_planned_is_refused() -> None:
    from mhc_megatron.errors import UserError

    for change in ({"cuda_graph_impl": "local"}, {"moe_ncclep_zero_copy": True}):
        (model,) = build(SHARED)
        for name, value in change.items():
            setattr(model.config, name, value)
        data = overlap_cases.batch(0)
        with pytest.raises(UserError, match="overlap-moe-expert-parallel-comm"):
            model.build_schedule_plan(
                data["input_ids"], data["position_ids"], data["attention_mask"]
            )
