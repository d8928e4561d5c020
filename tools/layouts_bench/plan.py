"""What runs: rows of tests/distributed/layouts.py, as wide as FP8 asks, in several precisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.distributed import data

# Before anything reads them. FP8 blocks are of 128 x 128: each rank's share of a sequence is a
# multiple of 128 with two sequence- or context-parallel ranks.
data.SEQUENCE, data.VOCABULARY = 256, 512

from tests.distributed.layouts import (  # noqa: E402
    DISTRIBUTED_OPTIMIZER,
    FULL,
    KINDS,
    ROWS,
    Row,
    selective,
)

#: Fields of every kind: widths that are multiples of 128 on two tensor-parallel ranks too.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "init_method_std": 0.05,
    "use_cpu_initialization": False,
}
#: Fields of the kinds that have them.
WIDER: dict[str, Any] = {
    "moe_ffn_hidden_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}
#: Precision -> fields of the kind; Megatron's own layers in fp32, Transformer Engine's else.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"transformer_impl": "transformer_engine", "dtype": "bfloat16"},
    "fp8": {
        "transformer_impl": "transformer_engine",
        "dtype": "bfloat16",
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
    },
    "fp32": {},
}
#: Relative, of losses and gradient norms against one rank.
TOLERANCE = {"bf16": 2e-2, "fp8": 5e-2, "fp32": 1e-4}
#: An optimizer that a model of this width learns with.
OPTIMIZER = {"lr": 1e-3, "min_lr": 1e-3}


@dataclass(frozen=True)
class Entry:
    """A row in a precision.

    Attributes:
        row: of the table.
        precision: a key of PRECISIONS.
        mhc: fields of MHCConfig that the row changes.
    """

    row: Row
    precision: str
    mhc: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.row.settings["world"]

    @property
    def name(self) -> str:
        return f"{self.row.name} | {self.precision}"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.precision] if self.row.tolerance else 0.0


def _more(kind: str, layout: str, world: int, **settings: Any) -> Row:
    return Row(kind, layout, {"world": world, **settings})


#: What two ranks can show of rows that the table has on more, and of the issue of recompute.
MORE = [
    _more("MoE alltoall, bf16", "EP2, overlap of expert communication", 2, ep=2,
          overlap_moe_expert_parallel_comm=True),
    _more("MLA, MoE, MTP", "EP2, distributed optimizer", 2, ep=2, **DISTRIBUTED_OPTIMIZER),
    _more("dense", "full recompute, TP2, SP", 2, tp=2, sp=True, **FULL),
    _more("MLA", "selective recompute: mla_up_proj, layernorm, PP2, VPP2", 2, pp=2, vp=2,
          **selective("mla_up_proj", "layernorm")),
]  # fmt: skip
BLOCKS = _more("MLA, MoE, MTP", "EP2, recompute of blocks of 3", 2, ep=2)

#: Run before the others, in every precision that has them.
FIRST = {
    "dense | DP2, distributed optimizer",
    "dense | TP2",
    "dense | TP2, SP",
    "dense | PP2",
    "dense | PP2, VPP2",
    "dense | CP2",
    "bf16 | PP2, VPP2, distributed optimizer",
    "MoE alltoall | EP2",
    "MoE alltoall | TP2, SP, expert TP1, EP2",
    "MoE alltoall, bf16 | EP2, overlap of expert communication",
    "MLA | TP2, SP",
    "MLA | PP2",
    "MTP | PP2, VPP2",
    "MLA, MoE, MTP | EP2, distributed optimizer",
    "dense | full recompute, TP2, SP",
}
#: Of the fp32 rows, with Megatron's own layers, whose norms refuse sequence parallelism and whose
#: attention takes no latents.
IN_FP32 = ("DP2", "TP2", "CP2", "PP2", "PP2, VPP2", "EP2", "DP2, distributed optimizer")


def entries(world: int, quick: bool) -> list[Entry]:
    """Everything that fits ``world`` ranks: the first rows in all precisions, then the rest.

    ``quick``: a few rows for a machine without GPUs, where only fp32 is exact.
    """
    rows = [row for row in ROWS + MORE if row.settings["world"] <= world]
    if quick:
        names = {"dense | TP2, SP", "dense | CP2", "MoE alltoall | EP2", "MTP | PP2, VPP2",
                 "bf16 | PP2, VPP2, distributed optimizer"}  # fmt: skip
        found = [Entry(row, "fp32") for row in rows if row.name in names]
        return [*found, Entry(BLOCKS, "fp32", {"recompute": 3})]
    found = [Entry(row, p) for p in PRECISIONS for row in rows if _takes(row, p)]
    # The table has DeepEP's and HybridEP's interfaces on gloo, which says nothing of NCCL.
    found = [entry for entry in found if "flex" not in entry.row.layout]
    found += [Entry(BLOCKS, p, {"recompute": 3}) for p in ("bf16", "fp8")]
    order = list(PRECISIONS)
    largest = min(world, 8)

    def rank(entry: Entry) -> tuple:
        first = entry.row.name in FIRST or (world >= 4 and entry.world == largest)
        # Hybrid stacks last: their layers ask for packages that a machine may lack.
        return not first, "hybrid" in entry.row.kind, entry.world == 1, order.index(entry.precision)

    return sorted(found, key=rank)


def _takes(row: Row, precision: str) -> bool:
    own = "dtype" in KINDS[row.kind]
    if precision != "fp32":
        # A kind that names bf16 itself is a row of bf16; the two are one in fp8.
        return not own or precision == "bf16"
    latent = "MLA" in row.kind
    return row.layout in IN_FP32 and not latent and not own and "hybrid" not in row.kind


def kind(entry: Entry, device: str) -> dict[str, Any]:
    """The entry's fields of Megatron's configurations."""
    base = KINDS[entry.row.kind]
    if device == "cpu":
        return base
    found = WIDE | base | {key: value for key, value in WIDER.items() if key in base}
    found |= PRECISIONS[entry.precision]
    if "num_moe_experts" in base:
        found |= {"moe_router_dtype": "fp32", "moe_grouped_gemm": entry.precision != "fp32"}
    return found


def job(entry: Entry, device: str) -> dict[str, Any]:
    """The entry as a job of tests/distributed/job.py; its weights are for the caller to name."""
    layout = dict(entry.row.settings)
    if device != "cpu":
        # As the trainer does: batched where the schedule is not interleaved.
        layout.setdefault("batch_p2p_comm", not layout.get("vp"))
    return {
        "kind": kind(entry, device),
        "layout": layout,
        "mhc": entry.mhc,
        "optimizer": OPTIMIZER if device != "cpu" else {},
        # cuDNN's deterministic attention has no context parallelism.
        "deterministic": layout.get("cp", 1) == 1,
    }


def reference(entry: Entry, device: str) -> dict[str, Any]:
    """The same model on one rank, whose initial weights all rows of its kind begin with."""
    return job(entry, device) | {"layout": {}, "mhc": {}, "deterministic": True}


def family(entry: Entry) -> str:
    """Entries of one family have a reference in common."""
    return f"{entry.row.kind} | {entry.precision}"
