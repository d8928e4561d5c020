"""Layouts of the hyper-connections' tensors: ours, DeepSeek-V4's, Megatron-LM's.

All have the rows of phi and b in the order pre | post | res. They differ in names, in whether alpha
is one tensor or three, and in the orientation of the n*n res rows: here they are H_res[o, i],
applied as x_next[o] = sum_i H_res[o, i] x[i]; DeepSeek-V4's ``comb`` and the H_res of Megatron-LM's
main branch are applied transposed, so their rows are [i, o].

Sources: DeepSeek-V4's checkpoint names and transformers' ``models/deepseek_v4``; in
NVIDIA/Megatron-LM, ``megatron/core/transformer/hyper_connection.py`` and ``transformer_block.py``
(the head), with the same names on both branches:

- ``main``, and ``dev`` since pull request 4839 (May 2026, issue 4957): H_res^T x, V4's Sinkhorn, a
  learned head or (main at first) the mean.
- ``dev`` before that: H_res x. At first (2943, January 2026) exp, rows, then columns, in turn, and
  the mean of the streams; its ``norm.weight`` takes no part in the forward pass. Later V4's
  Sinkhorn and the learned head.

A hybrid stack (``models/hybrid/layers/hybrid_hyper_connection.py``) has one connection a layer,
``hyper_connection``, and the layer's own tensors below ``inner_layer``.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from mhc_megatron.checkpoint.names import PREDICTION
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
        inner: what a hybrid stack's own tensors have between the layer and their name.
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
    inner: str = ""

    def module(self, kind: str) -> str:
        """``attn`` or ``mlp``, as it is called here."""
        return self.attn if kind == "attn" else self.mlp


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
_HYBRID = ("decoder.layers.{l}.", "hyper_connection", "hyper_connection")
_ALPHAS = (".alpha_pre", ".alpha_post", ".alpha_res")
_HEAD = ("decoder.hc_head_fn", "decoder.hc_head_scale", "decoder.hc_head_base")
_TENSORS = (".mapping_proj.weight", ".bias", _ALPHAS, _HEAD)
MEGATRON_MAIN = Layout(*_MEGATRON, *_TENSORS, True, "deepseek-v4", 1e-12)
MEGATRON_DEV = Layout(*_MEGATRON, *_TENSORS, False, "paper", 1e-16, ignored=(".norm.weight",))
MEGATRON_HYBRID = Layout(*_HYBRID, *_TENSORS, True, "deepseek-v4", 1e-12, inner="inner_layer.")
LAYOUTS = {
    "deepseek-v4": DEEPSEEK_V4,
    "transformers": TRANSFORMERS,
    "megatron-main": MEGATRON_MAIN,
    "megatron-dev": MEGATRON_DEV,
    "megatron-hybrid": MEGATRON_HYBRID,
}
#: Megatron's symbols of a hybrid stack's layers that have a connection here -> its kind.
HYBRID_KINDS = {"*": "attn", "-": "mlp", "E": "mlp"}


def spelled(name: str) -> str:
    """A tensor's name as DeepSeek-V4's checkpoints have it."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def transposition(n: int) -> list[int]:
    """Row order that turns res rows [o, i] into [i, o], and back: pre and post stay."""
    res = [2 * n + i * n + o for o in range(n) for i in range(n)]
    return [*range(2 * n), *res]


def is_hybrid(args: Namespace) -> bool:
    """Whether the settings are those of a HybridModel."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def ours(args: Namespace) -> Layout:
    """Our layout for a model: a hybrid stack's final norm has another name."""
    if not is_hybrid(args):
        return OURS
    return dataclasses.replace(OURS, head=tuple(exit_names("decoder.final_norm.")))


def exit_names(prefix: str) -> list[str]:
    """phi, alpha and bias of a learned exit."""
    return [f"{prefix}exit.{name}" for name in ("phi", "alpha", "bias")]


def sublayers(args: Namespace) -> list[tuple[int, str]]:
    """The sublayers of the decoder: layer and ``attn`` or ``mlp``.

    Raises:
        UserError: a hybrid stack with layers that have no connection here.
    """
    if not is_hybrid(args):
        return [(layer, kind) for layer in range(args.num_layers) for kind in ("attn", "mlp")]
    return list(enumerate(_kinds(args.hybrid_layer_pattern.split("/")[0])))


def _kinds(pattern: str) -> list[str]:
    symbols = pattern.replace("|", "")
    for symbol in symbols:
        if symbol not in HYBRID_KINDS:
            raise UserError(
                f"hybrid-layer-pattern: layers {symbol!r} have no hyper-connections here."
            )
    return [HYBRID_KINDS[symbol] for symbol in symbols]


def prediction_sublayers(args: Namespace) -> list[list[tuple[str, str]]]:
    """For each layer of multi-token prediction, what precedes its connections, and their kinds."""
    count = getattr(args, "mtp_num_layers", None) or 0
    if not is_hybrid(args):
        names = [PREDICTION.format(m=depth) for depth in range(count)]
        return [[(name, kind) for kind in ("attn", "mlp")] for name in names]
    patterns = args.hybrid_layer_pattern.split("/")[1:]
    return [
        [
            (f"{prediction_stack(args, depth)}layers.{layer}.", kind)
            for layer, kind in enumerate(_kinds(pattern))
        ]
        for depth, pattern in enumerate(patterns)
    ]


def prediction_stack(args: Namespace, depth: int) -> str:
    """What precedes the exit of a layer of multi-token prediction."""
    if is_hybrid(args):
        return f"mtp.layers.{depth}.mtp_model_layer."
    return PREDICTION.format(m=depth)


def tensor_names(layout: Layout, layers: list[tuple[int, str]]) -> list[str]:
    """Every tensor of a layout's connections, without the head's."""
    return [
        layout.layer.format(l=layer) + layout.module(kind) + suffix
        for layer, kind in layers
        for suffix in (layout.phi, *layout.alpha, layout.bias)
    ]


def connection_names(source) -> list[str]:
    """The tensors of our layout in a torch_dist checkpoint."""
    pattern = re.compile(r"(decoder|mtp)\.layers\.(.*\.)?(attn_hc|mlp_hc)\.(phi|alpha|bias)")
    return [k for k in source.infos() if pattern.fullmatch(k) or _EXITS.search(k)]


_EXITS = re.compile(r"\.exit\.(phi|alpha|bias)$")


@dataclass(frozen=True)
class Found:
    """A connection's tensors where they are."""

    region: Region
    info: TensorInfo


def check_layout(
    where: str, found: dict[str, Found], layout: Layout, args: Namespace, n: int
) -> bool:
    """Every connection is complete and of the right shape; whether there is a learned exit.

    Raises:
        UserError: naming the tensor.
    """
    K, width = n * n + 2 * n, n * args.hidden_size
    alpha = (3,) if len(layout.alpha) == 1 else (1,)
    shapes = {layout.phi: (K, width), layout.bias: (K,), **dict.fromkeys(layout.alpha, alpha)}
    wanted = {
        layout.layer.format(l=layer) + layout.module(kind) + suffix: shape
        for layer, kind in sublayers(args)
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
                f"n = {n} and C = {args.hidden_size} make it {list(shape)}."
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
    found: dict[str, Found], source: Layout, target: Layout, args: Namespace, n: int, learned: bool
) -> Iterator[Target]:
    """The connections of one layout in another."""
    turn = source.transposed != target.transposed
    order = {"order": transposition(n)}
    for layer, kind in sublayers(args):
        prefix = source.layer.format(l=layer) + source.module(kind)
        name = target.layer + target.module(kind)
        for suffix, wanted in ((source.phi, target.phi), (source.bias, target.bias)):
            at = found[prefix + suffix]
            recipe = Recipe("permute_rows" if turn else "copy", (at.region,), order if turn else {})
            yield Target(name + wanted, layer, at.info.shape, recipe, at.info)
        yield from _alphas(name, layer, [found[prefix + suffix] for suffix in source.alpha], target)
    if learned:
        for theirs, name in zip(source.head, target.head, strict=True):
            at = found[theirs]
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
            # Only versions with V4's arithmetic have a head.
            "sinkhorn": "deepseek-v4" if learned else layout.sinkhorn,
            "norm_eps": layout.norm_eps,
            **changes,
        }
    )


def output_of(target: Target, key: str, at=None, size=None, box=None, dtype=None) -> Output:
    """An ``Output`` for a target."""
    return Output(key, box or target.shape, dtype or target.source.dtype, target.recipe, at, size)
