"""Layouts of the hyper-connections' tensors: ours, DeepSeek-V4's, Megatron-LM's.

All have the rows of phi and b in the order pre | post | res. They differ in names, in whether alpha
is one tensor or three, and in the orientation of the n*n res rows: here they are H_res[o, i],
applied as x_next[o] = sum_i H_res[o, i] x[i]; DeepSeek-V4's ``comb`` and the H_res of Megatron-LM's
main branch are applied transposed, so their rows are [i, o].

Sources: DeepSeek-V4's checkpoint names and transformers' ``models/deepseek_v4``; in
NVIDIA/Megatron-LM, ``megatron/core/transformer/hyper_connection.py``: the main branch computes
H_res^T x with V4's Sinkhorn and a learned head, the first version of its development branch H_res x
with Eq. (9) and the mean of the streams (its ``norm.weight`` takes no part in the forward pass and
is left out).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from mhc_megatron.checkpoint.recipes import Output, Recipe, Region, TensorInfo
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: The learned exit's tensors: phi, alpha, bias.
EXIT = tuple(f"decoder.final_layernorm.exit.{name}" for name in ("phi", "alpha", "bias"))


@dataclass(frozen=True)
class Layout:
    """Names of one family's connections.

    Attributes:
        layer: what precedes the connections of layer ``{l}``.
        attn, mlp: the two connections of a layer.
        phi, bias: their tensors' names, after the connection's.
        alpha: one name, or one each for pre, post, res.
        head: the exit's phi, alpha, bias.
        transposed: res rows are [i, o].
        sinkhorn, norm_eps: the arithmetic (``MHCConfig``).
        ignored: tensors of a connection without an effect.
    """

    layer: str
    attn: str
    mlp: str
    phi: str
    bias: str
    alpha: tuple[str, ...]
    head: tuple[str, str, str]
    transposed: bool
    sinkhorn: str
    norm_eps: float
    ignored: tuple[str, ...] = ()


OURS = Layout(
    "decoder.layers.{l}.",
    "attn_hc",
    "mlp_hc",
    ".phi",
    ".bias",
    (".alpha",),
    EXIT,
    False,
    "paper",
    1e-20,
)
DEEPSEEK_V4 = Layout(
    "layers.{l}.",
    "hc_attn",
    "hc_ffn",
    "_fn",
    "_base",
    ("_scale",),
    ("hc_head_fn", "hc_head_scale", "hc_head_base"),
    True,
    "deepseek-v4",
    1e-6,
)
TRANSFORMERS = Layout(
    "model.layers.{l}.",
    "attn_hc",
    "ffn_hc",
    ".fn",
    ".base",
    (".scale",),
    ("model.hc_head.hc_fn", "model.hc_head.hc_scale", "model.hc_head.hc_base"),
    True,
    "deepseek-v4",
    1e-6,
)
#: Spellings of DeepSeek-V4's names -> its checkpoints': transformers' modules have their own, and
#: its ``save_pretrained`` writes a mixture.
SPELLINGS = (
    (r"^model\.", ""),
    (r"\.attn_hc\.", ".hc_attn_"),
    (r"\.ffn_hc\.", ".hc_ffn_"),
    (r"^hc_head\.hc_", "hc_head_"),
)
_MEGATRON = ("decoder.layers.{l}.", "self_attention_hyper_connection", "mlp_hyper_connection")
_ALPHAS = (".alpha_pre", ".alpha_post", ".alpha_res")
_HEAD = ("decoder.hc_head_fn", "decoder.hc_head_scale", "decoder.hc_head_base")
MEGATRON_MAIN = Layout(
    *_MEGATRON, ".mapping_proj.weight", ".bias", _ALPHAS, _HEAD, True, "deepseek-v4", 1e-12
)
MEGATRON_DEV = Layout(
    *_MEGATRON,
    ".mapping_proj.weight",
    ".bias",
    _ALPHAS,
    _HEAD,
    False,
    "paper",
    1e-16,
    ignored=(".norm.weight",),
)
LAYOUTS = {
    "deepseek-v4": DEEPSEEK_V4,
    "transformers": TRANSFORMERS,
    "megatron-main": MEGATRON_MAIN,
    "megatron-dev": MEGATRON_DEV,
}


def spelled(name: str) -> str:
    """A tensor's name as DeepSeek-V4's checkpoints have it."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def transposition(n: int) -> list[int]:
    """Row order that turns res rows [o, i] into [i, o], and back: pre and post stay."""
    res = [2 * n + i * n + o for o in range(n) for i in range(n)]
    return [*range(2 * n), *res]


def tensor_names(layout: Layout, layers: int) -> list[str]:
    """Every tensor of a layout's connections, without the head's."""
    return [
        layout.layer.format(l=layer) + module + suffix
        for layer in range(layers)
        for module in (layout.attn, layout.mlp)
        for suffix in (layout.phi, *layout.alpha, layout.bias)
    ]


def connection_names(source) -> list[str]:
    """The tensors of our layout in a torch_dist checkpoint."""
    pattern = re.compile(r"(decoder|mtp)\.layers\.(.*\.)?(attn_hc|mlp_hc)\.(phi|alpha|bias)")
    return [k for k in source.infos() if pattern.fullmatch(k) or k in EXIT]


@dataclass(frozen=True)
class Found:
    """A connection's tensors where they are."""

    region: Region
    info: TensorInfo


def check_layout(
    where: str, found: dict[str, Found], layout: Layout, layers: int, hidden_size: int, n: int
) -> bool:
    """Every connection is complete and of the right shape; whether there is a learned exit.

    Raises:
        UserError: naming the tensor.
    """
    K, width = n * n + 2 * n, n * hidden_size
    alpha = (3,) if len(layout.alpha) == 1 else (1,)
    shapes = {layout.phi: (K, width), layout.bias: (K,), **dict.fromkeys(layout.alpha, alpha)}
    wanted = {
        layout.layer.format(l=layer) + module + suffix: shape
        for layer in range(layers)
        for module in (layout.attn, layout.mlp)
        for suffix, shape in shapes.items()
    }
    head = dict(zip(layout.head, ((n, width), (1,), (n,)), strict=True))
    learned = any(name in found for name in head)
    for name, shape in {**wanted, **(head if learned else {})}.items():
        if name not in found:
            raise UserError(f"{where}: {name} is missing.")
        if found[name].info.shape != shape:
            raise UserError(
                f"{where}: {name} has shape {list(found[name].info.shape)}; "
                f"n = {n} and C = {hidden_size} make it {list(shape)}."
            )
    return learned


@dataclass(frozen=True)
class Target:
    """One tensor of the layout that is written: name (with ``{l}``), layer, shape, recipe."""

    name: str
    layer: int | None
    shape: tuple[int, ...]
    recipe: Recipe
    source: TensorInfo


def convert_layout(
    found: dict[str, Found], source: Layout, target: Layout, layers: int, n: int, learned: bool
) -> Iterator[Target]:
    """The connections of one layout in another."""
    turn = source.transposed != target.transposed
    order = {"order": transposition(n)}
    for layer in range(layers):
        for module, other in ((source.attn, target.attn), (source.mlp, target.mlp)):
            prefix, name = source.layer.format(l=layer) + module, target.layer + other
            for suffix, wanted in ((source.phi, target.phi), (source.bias, target.bias)):
                at = found[prefix + suffix]
                recipe = Recipe(
                    "permute_rows" if turn else "copy", (at.region,), order if turn else {}
                )
                yield Target(name + wanted, layer, at.info.shape, recipe, at.info)
            alphas = [found[prefix + suffix] for suffix in source.alpha]
            yield from _alphas(name, layer, alphas, target)
    if learned:
        for ours, name in zip(source.head, target.head, strict=True):
            at = found[ours]
            yield Target(name, None, at.info.shape, Recipe("copy", (at.region,)), at.info)


def _alphas(name: str, layer: int, alphas: list[Found], target: Layout) -> Iterator[Target]:
    regions = tuple(found.region for found in alphas)
    info = TensorInfo((3,), alphas[0].info.dtype)
    if len(target.alpha) == 1:
        yield Target(name + target.alpha[0], layer, (3,), Recipe("cat", regions), info)
        return
    for k, suffix in enumerate(target.alpha):
        if len(alphas) == 3:
            recipe = Recipe("copy", (regions[k],))
        else:
            recipe = Recipe("rows", regions, {"start": k, "stop": k + 1})
        yield Target(name + suffix, layer, (1,), recipe, info)


def streams_of(where: str, phi: TensorInfo, hidden_size: int) -> int:
    """n from the shape of a phi [n*n + 2n, n*C].

    Raises:
        UserError: no n fits.
    """
    n = phi.shape[-1] // hidden_size
    if len(phi.shape) != 2 or phi.shape != (n * n + 2 * n, n * hidden_size) or n < 2:
        raise UserError(
            f"{where}: a connection of shape {list(phi.shape)} fits no n at C = {hidden_size}."
        )
    return n


def settings(layout: Layout, n: int, learned: bool, args: Namespace, **changes) -> MHCConfig:
    """MHCConfig of a checkpoint that comes in a layout."""
    was = {k: v for k, v in (getattr(args, "mhc", None) or {}).items() if k in ("lr_mult", "seed")}
    return MHCConfig.from_mapping(
        {
            **was,
            "variant": "mhc",
            "n": n,
            "exit": "learned" if learned else "mean",
            "sinkhorn": layout.sinkhorn,
            "norm_eps": layout.norm_eps,
            **changes,
        }
    )


def output_of(target: Target, key: str, at=None, size=None, box=None, dtype=None) -> Output:
    """An ``Output`` for a target."""
    return Output(key, box or target.shape, dtype or target.source.dtype, target.recipe, at, size)
