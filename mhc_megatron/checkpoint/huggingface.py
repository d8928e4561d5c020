"""Hugging Face safetensors -> Megatron torch_dist, and back.

Both directions walk the same table (``names``); every tensor is checked by name and shape before
anything is written. The imported checkpoint has Megatron's global tensors, layer by layer, so that
any tensor-, pipeline- and expert-parallel layout loads it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mhc_megatron.checkpoint import arguments, torch_dist
from mhc_megatron.checkpoint.connections import OURS
from mhc_megatron.checkpoint.convert import Plan
from mhc_megatron.checkpoint.names import (
    DECODER,
    EXTRA_STATES,
    FAMILIES,
    IGNORED,
    MTP,
    MTP_COPIES,
    MTP_SIGN,
    PREDICTION,
    Rule,
)
from mhc_megatron.checkpoint.recipes import FP8_BLOCK, Output, Recipe, Region, TensorInfo
from mhc_megatron.checkpoint.safetensors_io import SafetensorsSource
from mhc_megatron.checkpoint.torch_dist import TorchDistSource, archive
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Files beside the weights that belong to the model: copied on import and on export.
TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
#: How the sharded state is laid out (read by Megatron, training/checkpointing.py:2198).
CONTENT = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
SCALE = "_scale_inv"
#: The file that an mHC model is loaded with.
MODELING = "modeling_mhc.py"


@dataclass(frozen=True)
class Piece:
    """A rule at one layer and expert, with shapes in numbers."""

    rule: Rule
    megatron: str
    local: str
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    layer: int | None
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron tensor."""
        shapes = [shape for _, shape in self.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def pieces(args: Namespace, vocab: int) -> list[Piece]:
    """Every tensor of a model, in Megatron's order; the layers of multi-token prediction last."""
    words, count = arguments.dimensions(args, vocab), arguments.predictions(args)
    moe, found = arguments.moe_layers(args), []
    moe += moe[-1:] * count
    rules = FAMILIES[arguments.family_of(args)]
    for layer in [None, *range(args.num_layers + count)]:
        predicts = layer is not None and layer >= args.num_layers
        for rule in rules + MTP if predicts else rules:
            if ("{" in rule.megatron) != (layer is not None):
                continue
            kind = None if layer is None else "moe" if moe[layer] else "dense"
            if rule.layers not in ("all", kind) or (rule.when and not words.get(rule.when)):
                continue
            experts = range(words["experts"]) if "{e}" in rule.megatron else [None]
            depth = layer - args.num_layers if predicts else None
            found += [_piece(rule, layer, depth, expert, words) for expert in experts]
    return found


def _piece(
    rule: Rule, layer: int | None, depth: int | None, expert: int | None, words: dict[str, Any]
) -> Piece:
    at = {"l": layer, "m": depth, "e": expert}
    hf = tuple(
        (name.format(**at), tuple(words[word] for word in shape.split())) for name, shape in rule.hf
    )
    names = [rule.megatron, rule.local]
    if depth is not None:
        names = [name.replace(DECODER, PREDICTION) for name in names]
    return Piece(rule, *(name.format(**at) for name in names), hf, layer, expert)


# ---------------------------------------------------------------------------------------- import


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UserError: missing or damaged.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold keys and values.")
    return config


def import_plan(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    transformer_impl: str = "local",
    drop_mtp: bool = False,
) -> Plan:
    """The plan of ``import-hf``; ``drop_mtp`` leaves out the layers of multi-token prediction.

    Raises:
        UserError: unsupported settings; tensors that are unknown, missing or of a wrong shape.
    """
    config = read_config(path)
    if config.get("mhc") is not None:
        raise UserError(f"{path} is an mHC model that export-hf wrote; it is not a residual model.")
    values, source = arguments.megatron_values(config), SafetensorsSource(path)
    count = 0 if drop_mtp else predictions_in(source, config)
    if count:
        values["mtp-num-layers"] = count
    args = arguments.namespace(values)
    args.transformer_impl = transformer_impl
    check_copies(source, config, count)
    plan_pieces = pieces(args, config["vocab_size"])
    check_names(source, plan_pieces, config)
    infos, groups = source.infos(), arguments.dimensions(args, config["vocab_size"])["groups"]
    local = transformer_impl == "local"
    outputs = [_imported(piece, infos, groups, dtype, local, args) for piece in plan_pieces]
    dtypes = {output.dtype for output in outputs if len(output.shape) > 1}
    args.params_dtype = min(dtypes, key=lambda d: d.itemsize)
    args.bf16 = values["bf16"] = args.params_dtype == torch.bfloat16
    args.fp16 = values["fp16"] = args.params_dtype == torch.float16
    return Plan(
        "torch_dist",
        [path],
        outputs,
        "release",
        {**extra_states(plan_pieces, args), torch_dist.COMMON: archive(common_state(args))},
        {
            torch_dist.TRACKER: "release",
            "model.yaml": model_yaml(values),
            **{f"hf/{name}": text for name, text in read_texts(path).items()},
        },
    )


def check_names(source: SafetensorsSource, wanted: list[Piece], config: dict[str, Any]) -> None:
    """Every tensor that is wanted is there, of the right shape, and no other is.

    Raises:
        UserError: naming the tensors.
    """
    infos = source.infos()
    shapes = {name: shape for piece in wanted for name, shape in piece.hf}
    missing = [name for name in shapes if name not in infos]
    unknown = [
        name
        for name in infos
        if name not in shapes and not _ignored(name, config, infos) and not _predicts(name, config)
    ]
    if missing or unknown:
        raise UserError(name_errors(str(source.path), missing, unknown, list(shapes)))
    for name, shape in shapes.items():
        if infos[name].shape != shape:
            raise UserError(
                f"{source.path}: {name} has shape {list(infos[name].shape)}; "
                f"the config makes it {list(shape)}."
            )


def name_errors(where: str, missing: list[str], unknown: list[str], known: list[str]) -> str:
    """One sentence on names, the unknown ones with their nearest."""
    import difflib

    parts = []
    if unknown:
        listed = []
        for name in unknown[:8]:
            near = difflib.get_close_matches(name, known[:4000], n=1, cutoff=0.6)
            listed.append(name + (f" (nearest: {near[0]})" if near else ""))
        parts.append(f"unknown tensors: {', '.join(listed)}{_more(unknown)}")
    if missing:
        parts.append(f"missing tensors: {', '.join(missing[:8])}{_more(missing)}")
    hint = ""
    if any("hc" in re.split(r"[._]", name) for name in unknown):
        hint = " It is an mHC checkpoint; import it with import-deepseek-v4 or import-megatron."
    return f"{where}: {'; '.join(parts)}.{hint}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 8} more" if len(names) > 8 else ""


def _ignored(name: str, config: dict[str, Any], infos: dict[str, TensorInfo]) -> bool:
    if any(re.fullmatch(pattern, name) for pattern in IGNORED):
        return True
    if name == "lm_head.weight" and config.get("tie_word_embeddings"):
        return True
    if name.endswith(SCALE):
        return name.removesuffix(SCALE) in infos
    return False


def _predicts(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is of a multi-token prediction layer that is left out, or a copy in one."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = config.get("num_nextn_predict_layers") or 0
    return bool(layer and 0 <= int(layer[1]) - config["num_hidden_layers"] < extra)


def predictions_in(source: SafetensorsSource, config: dict[str, Any]) -> int:
    """How many multi-token prediction layers a folder holds.

    transformers' own classes leave them out when they save a model, whatever its config says.

    Raises:
        UserError: more than the config names, or some and not all.
    """
    layers, infos = config["num_hidden_layers"], source.infos()
    named = config.get("num_nextn_predict_layers") or 0
    signs = [MTP_SIGN.format(l=layers + k) in infos for k in range(named)]
    some = [name for name in infos if _predicts(name, config)]
    if some and not all(signs):
        lost = MTP_SIGN.format(l=layers + signs.index(False))
        raise UserError(
            f"{source.path}: {lost} is missing; --drop-mtp leaves the layers of multi-token "
            "prediction out."
        )
    return named if some else 0


def check_copies(source: SafetensorsSource, config: dict[str, Any], count: int) -> None:
    """The embeddings and heads that a folder repeats are the model's, bit for bit.

    Megatron's layers of multi-token prediction share them.

    Raises:
        UserError: naming one that differs.
    """
    infos, layers = source.infos(), config["num_hidden_layers"]
    for layer in range(layers, layers + count):
        for name, original in MTP_COPIES.items():
            name = name.format(l=layer)
            if original not in infos:
                original = "model.embed_tokens.weight"  # tied
            if name in infos and not _same_rows(source, name, original):
                raise UserError(
                    f"{source.path}: {name} is not {original}; Megatron shares it between the "
                    "model and its layers of multi-token prediction (--drop-mtp leaves them out)."
                )


def _same_rows(source: SafetensorsSource, name: str, other: str, rows: int = 4096) -> bool:
    """Whether two tensors hold the same bits, read some rows at a time."""
    infos = source.infos()
    if name == other or infos.get(other) != infos[name]:
        return name == other
    shape = infos[name].shape
    for start in range(0, shape[0], rows):
        box = (start, 0), (min(rows, shape[0] - start), *shape[1:])
        a, b = (source.read(Region(key, *box)) for key in (name, other))
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True


def _imported(
    piece: Piece, infos: dict, groups: int, dtype: torch.dtype | None, local: bool, args: Namespace
) -> Output:
    regions = tuple(Region(name) for name, _ in piece.hf)
    source = infos[piece.hf[0][0]].dtype
    scaled = piece.hf[0][0] + SCALE in infos
    if scaled:
        source = torch.bfloat16
    keep = source == torch.float32 and piece.megatron.endswith("expert_bias")
    to = source if keep or dtype is None else dtype
    if scaled:
        regions = tuple(dataclasses.replace(r, scale=r.key + SCALE) for r in regions)
    if piece.rule.how == "qkv":
        recipe = Recipe("merge_qkv", regions, {"groups": groups})
    else:
        recipe = Recipe(piece.rule.how, regions)
    name = piece.local if local and piece.local else piece.megatron
    output = Output(name, piece.shape, to, recipe, report=to != source)
    if piece.expert is None:
        return output
    return dataclasses.replace(
        output,
        key=name.replace(f"local_experts.{piece.expert}.", "experts."),
        shape=(1, *piece.shape),
        offset=(piece.expert,) + (0,) * len(piece.shape),
        size=(args.num_experts, *piece.shape),
    )


def extra_states(plan_pieces: list[Piece], args: Namespace) -> dict[str, bytes]:
    """``_extra_state`` of every linear layer and norm: Transformer Engine's modules ask for theirs;
    [None] says there is none."""
    empty, states = archive(None), {}
    for piece in plan_pieces:
        if piece.rule.linear or piece.megatron.endswith("norm.weight"):
            name = piece.megatron.removesuffix(".weight") + "._extra_state"
            shard = "shard_0_1"
            if piece.expert is not None:
                name = name.replace(f"local_experts.{piece.expert}.", "experts.")
                shard = f"shard_{piece.expert}_{args.num_experts}"
            states[f"{name}/{shard}"] = empty
    for name in EXTRA_STATES:
        names = [name.format(l=layer) for layer in range(args.num_layers)]
        for depth in range(arguments.predictions(args)):
            names.append(name.replace(DECODER, PREDICTION).format(m=depth))
        states |= {f"{module}._extra_state/shard_0_1": empty for module in names}
    return states


def common_state(args: Namespace) -> dict[str, Any]:
    """What Megatron's trainer reads before any tensor."""
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": dict(CONTENT),
        "num_floating_point_operations_so_far": 0.0,
    }


def model_yaml(values: dict[str, Any], mhc: MHCConfig | None = None) -> str:
    """The model's part of a configuration for launch/pretrain.py."""
    data: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    data["mhc"] = {"variant": "none"} if mhc is None else mhc.to_mapping()
    head = "# The model of this checkpoint, for launch/pretrain.py; add data, batch and schedule.\n"
    return head + yaml.safe_dump(data, sort_keys=False)


def read_texts(path: Path) -> dict[str, str]:
    """The small files that go with a model."""
    if not path.is_dir():
        return {}
    return {n: (path / n).read_text(encoding="utf-8") for n in TEXTS if (path / n).exists()}


# ---------------------------------------------------------------------------------------- export


def export_plan(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
    vocab_size: int | None = None,
    drop_mtp: bool = False,
) -> Plan:
    """The plan of ``export-hf``; ``drop_mtp`` leaves out the layers of multi-token prediction.

    An mHC model takes its modeling file along: ``AutoModelForCausalLM.from_pretrained`` loads the
    folder with ``trust_remote_code=True``.

    Raises:
        UserError: unsupported settings; names or shapes that do not fit.
    """
    source = TorchDistSource(path)
    args = source.args
    texts = model_texts(path, source.path, hf_config)
    base = json.loads(texts["config.json"]) if "config.json" in texts else None
    vocab = exported_vocab(source, vocab_size, base)
    check_predictions(args, drop_mtp)
    outputs, left = export_outputs(source, args, vocab, dtype)
    if drop_mtp:
        left = [name for name in left if not name.startswith("mtp.")]
    config = arguments.hf_config(args, vocab, base)
    mhc = MHCConfig.from_mapping(getattr(args, "mhc", None) or {"variant": "none"})
    if mhc.enabled:
        outputs += connection_outputs(source, mhc, left)
        config |= mhc_config(config["model_type"], mhc)
        texts[MODELING] = (Path(__file__).parent / MODELING).read_text(encoding="utf-8")
    refuse_connections(source, left)
    config["dtype"] = _dtype_name(outputs)
    if dtype == torch.float8_e4m3fn:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    return Plan("safetensors", [source.path], outputs, texts=texts)


def check_predictions(args: Namespace, drop_mtp: bool) -> None:
    """Layers of multi-token prediction have a place in DeepSeek-V3's folders only.

    Raises:
        UserError: another family has some.
    """
    if drop_mtp:
        args.mtp_num_layers = None
    family = arguments.family_of(args)
    if arguments.predictions(args) and family != "deepseek_v3":
        raise UserError(
            f"layers of multi-token prediction have no place in a {family} model; leave them out "
            "with --drop-mtp."
        )


def model_texts(path: Path, folder: Path, given: Path | None) -> dict[str, str]:
    """Config and tokenizer that came with the model, if any: given, or kept by the import."""
    if given is not None:
        texts = read_texts(given) or {}
        return {**texts, "config.json": json.dumps(read_config(given))}
    for place in (path / "hf", folder / "hf", folder.parent / "hf"):
        if place.is_dir():
            return read_texts(place)
    return {}


def exported_vocab(source: TorchDistSource, given: int | None, base: dict | None) -> int:
    """Rows of the embedding that are real: the others pad it to a multiple."""
    infos = source.infos()
    key = "embedding.word_embeddings.weight"
    if key not in infos:
        raise UserError(f"{source.path} has no {key}: it is no GPT checkpoint.")
    rows = infos[key].shape[0]
    vocab = given or (base or {}).get("vocab_size") or rows
    if vocab > rows:
        raise UserError(f"the vocabulary has {vocab} entries, the embedding only {rows} rows.")
    return vocab


def export_outputs(
    source: TorchDistSource, args: Namespace, vocab: int, dtype: torch.dtype | None
) -> tuple[list[Output], list[str]]:
    """The Hugging Face tensors of a model, and the names of what else the checkpoint holds."""
    modules = source.modules()
    wanted = pieces(args, vocab)
    found: dict[str, tuple[Region, TensorInfo]] = {}
    missing = []
    for piece in wanted:
        name = next((n for n in (piece.megatron, piece.local) if n in modules), None)
        if name is None:
            missing.append(piece.megatron)
        else:
            found[piece.megatron] = modules.pop(name)
    if missing:
        raise UserError(name_errors(str(source.path), missing, [], []))
    words = arguments.dimensions(args, vocab)
    outputs = []
    for piece in wanted:
        outputs += _exported(piece, *found[piece.megatron], words, dtype)
    return [*outputs, *_copies(outputs, args)], list(modules)


def _copies(outputs: list[Output], args: Namespace) -> Iterator[Output]:
    """The embedding and the head once more for each layer of multi-token prediction."""
    made = {output.key: output for output in outputs}
    for layer in range(args.num_layers, args.num_layers + arguments.predictions(args)):
        for name, original in MTP_COPIES.items():
            output = made.get(original) or made["model.embed_tokens.weight"]
            yield dataclasses.replace(output, key=name.format(l=layer))


def connection_outputs(source: TorchDistSource, mhc: MHCConfig, left: list[str]) -> list[Output]:
    """The connections under the modeling file's names; they are taken out of ``left``."""
    modules, outputs, args = source.modules(), [], source.args
    width = mhc.n * args.hidden_size
    shapes = {OURS.phi: (mhc.K, width), OURS.alpha[0]: (mhc.alphas,), OURS.bias: (mhc.K,)}
    exit_shapes = {".phi": (mhc.n, width), ".alpha": (1,), ".bias": (mhc.n,)}
    layers, count = args.num_layers, arguments.predictions(args)
    before = {DECODER.format(l=layer): f"model.layers.{layer}." for layer in range(layers)}
    heads = {"decoder.final_layernorm.exit": "model.exit"}
    for depth in range(count):
        ours = PREDICTION.format(m=depth)
        before[ours] = f"model.layers.{layers + depth}."
        heads[f"{ours}exit"] = f"{before[ours]}exit"
    names = {
        ours + module + suffix: (theirs + module + suffix, shape)
        for ours, theirs in before.items()
        for module in (OURS.attn, OURS.mlp)
        for suffix, shape in shapes.items()
    }
    if mhc.exit == "learned":
        names |= {
            ours + suffix: (theirs + suffix, shape)
            for ours, theirs in heads.items()
            for suffix, shape in exit_shapes.items()
        }
    for name, (hf, shape) in names.items():
        if name not in left:
            raise UserError(
                f"{source.path} is said to be an mHC checkpoint (args.mhc), and {name} is missing."
            )
        left.remove(name)
        region, info = modules[name]
        if info.shape != shape:
            raise UserError(
                f"{name} has shape {list(info.shape)}; the settings make it {list(shape)}."
            )
        outputs.append(Output(hf, shape, torch.float32, Recipe("copy", (region,))))
    return outputs


def mhc_config(family: str, mhc: MHCConfig) -> dict[str, Any]:
    """What the config of an mHC model has besides its base's."""
    stem = arguments.ARCHITECTURES[family].removesuffix("ForCausalLM")
    model, config = f"MHC{stem}ForCausalLM", f"MHC{stem}Config"
    module = MODELING.removesuffix(".py")
    keys = ("variant", "n", "sinkhorn", "sinkhorn_iterations", "norm_eps", "exit")
    return {
        "model_type": f"mhc_{family}",
        "architectures": [model],
        "auto_map": {
            "AutoConfig": f"{module}.{config}",
            "AutoModelForCausalLM": f"{module}.{model}",
        },
        "mhc": {key: getattr(mhc, key) for key in keys},
    }


def refuse_connections(source: TorchDistSource, left: list[str]) -> None:
    """What is left over must not be the model's."""
    if any(".attn_hc." in name or ".mlp_hc." in name or ".exit." in name for name in left):
        raise UserError(
            f"{source.path} is an mHC checkpoint, and its settings say that it is not; "
            "it cannot be exported as a residual model."
        )
    if left:
        raise UserError(name_errors(str(source.path), [], left, []))


def _exported(
    piece: Piece, region: Region, info: TensorInfo, words: dict, dtype: torch.dtype | None
) -> Iterator[Output]:
    padded = "vocab" in piece.rule.hf[0][1].split()
    expected = (info.shape[0], *piece.shape[1:]) if padded else piece.shape
    if info.shape != expected:
        raise UserError(
            f"{piece.megatron} has shape {list(info.shape)}; the settings make it {list(expected)}."
        )
    start = 0
    for name, shape in piece.hf:
        recipe = Recipe("copy", (region,))
        if padded and info.shape[0] > shape[0]:
            recipe = Recipe("copy", (dataclasses.replace(region, offset=(0, 0), size=shape),))
        if piece.rule.how == "cat":
            recipe = Recipe("rows", (region,), {"start": start, "stop": start + shape[0]})
        elif piece.rule.how == "qkv":
            part = re.search(r"\.([qkv])_proj\.", name)[1]
            options = {"part": part, "groups": words["groups"], "channels": words["channels"]}
            options["queries"] = words["q"] // words["channels"] // words["groups"]
            recipe = Recipe("part_qkv", (region,), options)
        start += shape[0]
        yield from cast_output(name, shape, info.dtype, recipe, dtype, piece.rule.linear)


def cast_output(
    name: str,
    shape: tuple[int, ...],
    source: torch.dtype,
    recipe: Recipe,
    dtype: torch.dtype | None,
    linear: bool,
) -> Iterator[Output]:
    """One tensor in the dtype that is asked for; fp8 is for linear layers, with their scales."""
    if dtype == torch.float8_e4m3fn and linear:
        blocks = tuple(-(-length // FP8_BLOCK) for length in shape)
        weight, scale = (dataclasses.replace(recipe, then=f"fp8_{x}") for x in ("weight", "scale"))
        yield Output(name, shape, dtype, weight, report=True)
        yield Output(name + SCALE, blocks, torch.float32, scale)
        return
    if dtype == torch.float8_e4m3fn:
        dtype = torch.bfloat16
    keep = name.endswith("e_score_correction_bias")
    to = source if keep or dtype is None else dtype
    yield Output(name, shape, to, recipe, report=to != source)


def _dtype_name(outputs: list[Output]) -> str:
    """The dtype in which a model is to be loaded: its embedding's."""
    return str(outputs[0].dtype).removeprefix("torch.")
