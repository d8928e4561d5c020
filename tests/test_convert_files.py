"""The two file formats: reading, writing, damage of every kind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mhc_megatron.checkpoint import convert, inspection, safetensors_io, torch_dist
from mhc_megatron.checkpoint.recipes import Output, Recipe, Region
from mhc_megatron.checkpoint.torch_dist import TorchDistSource
from mhc_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn]


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for k, dtype in enumerate(DTYPES):
        x = torch.randn(5 + k, 3, generator=generator)
        state[f"layer.{k}.weight"] = (x * 10).to(dtype)
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.zeros(0, 4)
    return state


def _folder(path: Path, seed: int = 0) -> Path:
    path.mkdir()
    save_file(_state(seed), path / "model.safetensors")
    return path


def _copy(source, keys=None) -> list[Output]:
    infos = source.infos()
    return [
        Output(k, infos[k].shape, infos[k].dtype, Recipe("copy", (Region(k),)))
        for k in keys or infos
    ]


def _torch_dist(path: Path, seed: int = 0) -> Path:
    """A small torch_dist checkpoint, with the settings of a model of no layers."""
    source = _folder(path.with_name(path.name + "-src"), seed)
    reader = safetensors_io.SafetensorsSource(source)
    from argparse import Namespace

    common = {"args": Namespace(num_layers=0, mhc=None), "iteration": 7}
    plan = convert.Plan(
        "torch_dist",
        [source],
        _copy(reader),
        "iter_0000007",
        {torch_dist.COMMON: torch_dist.archive(common)},
        {torch_dist.TRACKER: "7"},
    )
    convert.run(plan, path, quiet=True)
    return path


def test_safetensors_are_read_and_written_as_the_library_does(tmp_path: Path) -> None:
    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    convert.run(
        convert.Plan("safetensors", [source.path], _copy(source)), tmp_path / "b", quiet=True
    )
    there = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in _state().items():
        assert there[name].dtype == value.dtype and there[name].shape == value.shape
        assert torch.equal(
            there[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)
        )


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    rows = source.read(Region("layer.0.weight", (2, 0), (3, 3)))
    assert torch.equal(rows, _state()["layer.0.weight"][2:5])


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    """torch.distributed.checkpoint's own reader, and Megatron's reading of the settings."""
    import torch.distributed.checkpoint as dcp

    folder = _torch_dist(tmp_path / "a") / "iter_0000007"
    wanted = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in _state().items() if v.numel()}
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for name, value in wanted.items():
        assert torch.equal(
            value.flatten().view(torch.uint8), _state()[name].flatten().view(torch.uint8)
        )
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert common["iteration"] == 7 and common["args"].num_layers == 0


def test_a_box_is_put_together_from_chunks(tmp_path: Path) -> None:
    source = _folder(tmp_path / "a")
    value = _state()["layer.4.weight"].float()
    save_file({"w": value}, source / "model.safetensors")
    outputs = [
        Output("w", size, torch.float32, Recipe("copy", (Region("w", at, size),)), at, (9, 3))
        for at, size in (((0, 0), (4, 3)), ((4, 0), (5, 3)))
    ]
    objects = {torch_dist.COMMON: torch_dist.archive({})}
    plan = convert.Plan("torch_dist", [source], outputs, "release", objects, {"x": "y"})
    convert.run(plan, tmp_path / "b", quiet=True)
    there = TorchDistSource(tmp_path / "b" / "release")
    assert torch.equal(there.read(Region("w")), value)
    assert torch.equal(there.read(Region("w", (3, 1), (3, 2))), value[3:6, 1:3])


@pytest.mark.parametrize("kind", ["safetensors", "torch_dist"])
def test_a_target_that_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists; nothing is overwritten"):
        convert.run(convert.Plan(kind, [source.path], _copy(source)), tmp_path / "b", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    names = list(_state())
    save_file({names[0]: _state()[names[0]]}, folder / "one.safetensors")
    weights = {names[0]: "one.safetensors", names[1]: "two.safetensors"}
    (folder / "model.safetensors").unlink()
    (folder / safetensors_io.INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match="the shard two.safetensors is missing"):
        safetensors_io.SafetensorsSource(folder)
    save_file({names[1]: _state()[names[1]]}, folder / "two.safetensors")
    assert set(safetensors_io.SafetensorsSource(folder).infos()) == set(names[:2])
    data = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(data[:-1])
    with pytest.raises(UserError, match="two.safetensors is truncated"):
        safetensors_io.SafetensorsSource(folder)
    (folder / "two.safetensors").write_bytes(data[:5])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        safetensors_io.SafetensorsSource(folder)


def test_missing_and_truncated_torch_dist_files(tmp_path: Path) -> None:
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-10])
    with pytest.raises(UserError, match="__0_0.distcp is truncated"):
        TorchDistSource(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="the shard __0_0.distcp is missing"):
        TorchDistSource(folder)
    with pytest.raises(UserError, match="neither .metadata nor"):
        TorchDistSource(tmp_path)


@pytest.mark.parametrize("said", ["\u00b2", "9" * 5000, "", "-1", None])
def test_a_tracker_that_names_no_step(tmp_path: Path, said: str | None) -> None:
    tracker = _torch_dist(tmp_path / "a") / torch_dist.TRACKER
    tracker.unlink()
    tracker.mkdir() if said is None else tracker.write_text(said)
    wanted = "cannot read .*: Is a directory" if said is None else "must hold an iteration"
    with pytest.raises(UserError, match=wanted):
        torch_dist.resolve(tmp_path / "a")


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """As with ``| head -n 1``: the pipe is closed before the tool writes."""
    read, write = os.pipe()
    os.close(read)
    words = [ROOT / "tools" / "convert_checkpoint.py", "inspect", _torch_dist(tmp_path / "a")]
    with open(write, "w") as out:
        run = subprocess.run([sys.executable, *map(str, words)], stdout=out, stderr=subprocess.PIPE)
    # torch may have its own line to say, on the machine.
    assert run.returncode == 0 and b"BrokenPipe" not in run.stderr


def _edit_metadata(folder: Path, edit) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_a_name_that_became_another_tensors_is_seen(tmp_path: Path) -> None:
    """Without checksums: both entries fall on one name, and one tensor's bytes are left over."""
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"
    (folder / convert.CHECKSUMS).unlink()
    inspection.verify(folder)

    def rename(metadata) -> None:  # as unpickling does with equal keys
        second = next(k for k, v in metadata.state_dict_metadata.items() if hasattr(v, "size"))
        del metadata.state_dict_metadata[second]
        for index in [i for i in metadata.storage_data if i.fqn == second]:
            del metadata.storage_data[index]

    _edit_metadata(folder, rename)
    with pytest.raises(UserError, match=r"bytes \d+ to \d+ of __0_0.distcp belong to no tensor"):
        inspection.verify(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("offset", -1, "negative"),
        ("length", "5", "metadata is damaged"),
        ("relative_path", "../x", "no file's name"),
        ("relative_path", 7, "a name is no text"),
        ("fqn", "elsewhere", "has no place in the files|a place and no shape"),
    ],
)
def test_a_damaged_place_is_one_sentence(tmp_path: Path, field: str, value, said: str) -> None:
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"

    def damage(metadata) -> None:
        index, place = next(iter(metadata.storage_data.items()))
        del metadata.storage_data[index]
        if field == "fqn":
            index = dataclasses.replace(index, fqn=value)
        else:
            place = dataclasses.replace(place, **{field: value})
        metadata.storage_data[index] = place

    _edit_metadata(folder, damage)
    with pytest.raises(UserError, match=said):
        TorchDistSource(folder)


def test_a_place_without_a_field_is_one_sentence(tmp_path: Path) -> None:
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"

    def damage(metadata) -> None:
        del next(iter(metadata.storage_data.values())).__dict__["length"]

    _edit_metadata(folder, damage)
    with pytest.raises(UserError, match="metadata is damaged"):
        TorchDistSource(folder)


def test_a_number_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"
    (folder / ".metadata").write_bytes(b"\x80\x04}r" + b"\xff" * 4 + b".")
    with pytest.raises(UserError, match="metadata is damaged .an object's number is too large"):
        TorchDistSource(folder)


def test_an_object_that_metadata_may_not_hold_is_not_made(tmp_path: Path) -> None:
    folder = _torch_dist(tmp_path / "a") / "iter_0000007"
    marker = tmp_path / "made"
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(UserError, match="metadata is damaged"):
        TorchDistSource(folder)
    assert not marker.exists()


def _verified(path: Path) -> bool:
    try:
        inspection.verify(path)
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each format, with checksums; ``bare`` has none."""
    root = tmp_path_factory.mktemp("whole")
    source = safetensors_io.SafetensorsSource(_folder(root / "src"))
    convert.run(convert.Plan("safetensors", [source.path], _copy(source)), root / "hf", quiet=True)
    _torch_dist(root / "dist")
    shutil.copytree(root / "dist", root / "bare")
    (root / "bare" / "iter_0000007" / convert.CHECKSUMS).unlink()
    for kind in ("hf", "dist", "bare"):
        assert _verified(root / kind)
    return {kind: root / kind for kind in ("hf", "dist", "bare")}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_changed_byte_goes_unseen(whole, tmp_path_factory, data) -> None:
    """One byte of one file changed, or bytes cut off: verify fails; without checksums it fails or
    the values are what they were, one perhaps under another name.
    """
    kind = data.draw(st.sampled_from(["hf", "dist", "bare"]))
    copy = tmp_path_factory.mktemp("damaged") / "x"
    shutil.copytree(whole[kind], copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.name != torch_dist.TRACKER)
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:at]
    file.write_bytes(content)
    if not _verified(copy):
        return
    assert kind == "bare", f"{file.name} changed at {at} and verify passed"
    there, before = TorchDistSource(copy), TorchDistSource(whole["bare"])
    infos, expected = there.infos(), before.infos()
    names = {key: key for key in expected.keys() & infos.keys()}
    names |= zip(expected.keys() - infos.keys(), infos.keys() - expected.keys(), strict=True)
    assert infos == {new: expected[old] for old, new in names.items()}
    for old, new in names.items():
        a, b = there.read(Region(new)), before.read(Region(old))
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(header=st.binary(max_size=200), length=st.integers(0, 2**64 - 1))
def test_random_headers_are_refused(header: bytes, length: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(UserError):
            safetensors_io.read_header(path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        inspection.verify(tmp_path / "a")


# ----------------------------------------------------------------------------------------- memory

LLAMA_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)
SMALLER = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32768,
)


def _synthetic(path: Path, config: dict) -> tuple[int, int]:
    """A Llama of zeros in bf16, as a sparse file; bytes of it and of its largest tensor."""
    from mhc_megatron.checkpoint import arguments
    from mhc_megatron.checkpoint.huggingface import pieces

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    args = arguments.namespace(arguments.megatron_values(config))
    header, at, largest = {}, 0, 0
    for piece in pieces(args, config["vocab_size"]):
        for name, shape in piece.hf:
            size = 2 * math.prod(shape)
            offsets = [at, at + size]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            at, largest = at + size, max(largest, size)
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return at, largest


def _peak(*words) -> int:
    """Bytes that a conversion holds at most, in a process of its own."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "from tools.convert_checkpoint import main\n"
        "code = main(sys.argv[1:])\n"
        "import resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(code)"
    )
    words = [str(word) for word in (*words, "--quiet")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return 1024 * int(done.stdout.split("peak ")[1])


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """At most three times the largest tensor above what a small model takes, whatever the size."""
    tiny = {**LLAMA_8B, **SMALLER, "num_hidden_layers": 1, "vocab_size": 64}
    _synthetic(tmp_path / "tiny", tiny)
    least = _peak("import-hf", tmp_path / "tiny", tmp_path / "t")
    total, largest = _synthetic(tmp_path / "hf", {**LLAMA_8B, **SMALLER})
    assert total > 5 * largest
    assert _peak("import-hf", tmp_path / "hf", tmp_path / "m") < least + 3 * largest
    assert _peak("upcycle", tmp_path / "m", tmp_path / "up") < least + 3 * largest
    assert _peak("export-hf", tmp_path / "m", tmp_path / "back") < least + 3 * largest


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_an_8b_model_converts_under_6_gb(tmp_path: Path) -> None:
    """Llama-3-8B's shapes, 16 GB; a few minutes, and 32 GB of disk."""
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("needs 40 GB of free disk")
    total, _ = _synthetic(tmp_path / "hf", LLAMA_8B)
    assert total > 16e9
    try:
        there = _peak("import-hf", tmp_path / "hf", tmp_path / "m")
        back = _peak("export-hf", tmp_path / "m", tmp_path / "b")
    finally:
        for name in ("m", "b", "m.partial", "b.partial"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    print(f"peak: import-hf {there / 1e9:.2f} GB, export-hf {back / 1e9:.2f} GB")
    assert max(there, back) < 6e9


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch) -> None:
    import errno

    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    plan = convert.Plan("torch_dist", [source.path], _copy(source), "release")
    plan.objects = {torch_dist.COMMON: torch_dist.archive({})}
    monkeypatch.setitem(convert.FILE_BYTES, "torch_dist", 40)  # a file for each tensor
    write, written = torch_dist.write_file, []

    def fills_up(path, outputs, tensors):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        return write(path, outputs, tensors)

    monkeypatch.setitem(convert._WRITERS, "torch_dist", fills_up)
    with pytest.raises(UserError, match="the disk is full; what is converted is kept"):
        convert.run(plan, tmp_path / "b", quiet=True)
    assert not (tmp_path / "b").exists()
    again = []

    def counted(path, outputs, tensors):
        again.append(path.name)
        return write(path, outputs, tensors)

    monkeypatch.setitem(convert._WRITERS, "torch_dist", counted)
    convert.run(plan, tmp_path / "b", quiet=True)
    assert len(written) == 3 and not set(again) & set(written)
    assert not (tmp_path / "b.partial").exists()
    there = TorchDistSource(tmp_path / "b" / "release")
    for name, value in _state().items():
        assert torch.equal(
            there.read(Region(name)).flatten().view(torch.uint8), value.flatten().view(torch.uint8)
        )


def test_a_full_disk_leaves_the_old_checksums(tmp_path: Path, monkeypatch, capsys) -> None:
    import errno

    from tools.convert_checkpoint import main

    folder = _folder(tmp_path / "a")
    assert main(["verify", str(folder), "--record"]) == 0
    before, write = (folder / convert.CHECKSUMS).read_bytes(), Path.write_text
    capsys.readouterr()

    def fills_up(path, text, **options):
        write(path, "", **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fills_up)
        assert main(["verify", str(folder), "--record"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "No space left on device" in said.err
    assert (folder / convert.CHECKSUMS).read_bytes() == before
    assert not (folder / f"{convert.CHECKSUMS}.new").exists()
    (folder / f"{convert.CHECKSUMS}.new").write_text("")  # what a SIGKILL leaves
    assert main(["verify", str(folder), "--record"]) == 0
    assert [p.name for p in folder.glob("checksums*")] == [convert.CHECKSUMS]


def test_a_source_that_changed_is_not_resumed(tmp_path: Path, monkeypatch) -> None:
    folder = _folder(tmp_path / "a")
    plan = convert.Plan("safetensors", [folder], _copy(safetensors_io.SafetensorsSource(folder)))
    before = convert.fingerprint(plan)
    save_file(_state(1), folder / "model.safetensors")
    assert convert.fingerprint(plan) != before


def test_the_bar_counts_every_byte(tmp_path: Path, monkeypatch) -> None:
    """On a terminal there is a progress bar; it ends where the plan does."""
    bars = []

    class Bar(convert.tqdm):
        def __init__(self, *args, disable, **kwargs) -> None:
            assert disable is None  # shown on a terminal only
            super().__init__(*args, **kwargs)
            bars.append(self)

    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    plan = convert.Plan("torch_dist", [source.path], _copy(source), "release")
    plan.objects = {torch_dist.COMMON: torch_dist.archive({})}
    monkeypatch.setitem(convert.FILE_BYTES, "torch_dist", 40)
    monkeypatch.setattr(convert, "tqdm", Bar)
    convert.run(plan, tmp_path / "b")
    assert [bar.n for bar in bars] == [plan.nbytes] == [bars[0].total]


def test_too_little_room_is_said_before(tmp_path: Path, monkeypatch) -> None:
    source = safetensors_io.SafetensorsSource(_folder(tmp_path / "a"))
    monkeypatch.setattr(
        convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(UserError, match="too full"):
        convert.run(convert.Plan("safetensors", [source.path], _copy(source)), tmp_path / "b")


def test_diff_sees_one_bit(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    assert list(inspection.diff(a, b)) == []
    state = _state()
    state["layer.1.weight"].view(torch.int16)[0, 0] ^= 1
    state["more"] = torch.zeros(1)
    save_file(state, b / "model.safetensors")
    found = {x.name: x for x in inspection.diff(a, b)}
    assert set(found) == {"layer.1.weight", "more"}
    assert found["layer.1.weight"].largest > 0


def test_the_average_is_the_mean(tmp_path: Path) -> None:
    from mhc_megatron.checkpoint.average import average_plan

    paths = [_folder(tmp_path / str(k), seed=k) for k in range(3)]
    convert.run(average_plan(paths, [0.5, 0.25, 0.25]), tmp_path / "mean", quiet=True)
    there = load_file(tmp_path / "mean" / "model.safetensors")
    states = [_state(k) for k in range(3)]
    for name in ("layer.0.weight", "layer.1.weight", "scalar"):
        exact = sum(w * s[name].double() for w, s in zip((0.5, 0.25, 0.25), states, strict=True))
        assert torch.equal(there[name], exact.to(states[0][name].dtype))
    assert torch.equal(there["layer.3.weight"], states[2]["layer.3.weight"])  # integers
    for weights in ([1.0, 1.0, 1.0], [math.nan] * 3, [math.inf, -math.inf, 1.0]):
        with pytest.raises(UserError, match="weights with sum 1"):
            average_plan(paths, weights)
