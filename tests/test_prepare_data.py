"""tools/prepare_data.py: what goes in comes out, whole or not at all.

Pairs are read back by ``read_layout``, written from the layout that Megatron documents and sharing
no code with the tool; one test holds that reader, the tool and Megatron's own classes together.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import gzip
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tools import prepare_data
from tools.corpus import CorpusError, blocks, encoders, indexed, sources
from tools.corpus.prepare import Options, Reading, corpus_of, prepare, stdlib_corpus, verify

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "prepare_data.py"
EOD = 256
TEXTS = [
    "The quick brown fox\njumps over the lazy dog.\n",
    'naïve café — 漢字, emoji 🦊, tab\t, quote " and backslash \\',
    "x",
    "a literal <|endoftext|> is text like any other",
    "line\r\nends\r\n" * 40,
]


def read_layout(prefix: Path) -> list[np.ndarray]:
    """The documents of a pair, from the documented layout alone."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and index[9:17] == (1).to_bytes(8, "little")
    dtype = {8: np.uint16, 4: np.int32}[index[17]]
    count, boundaries = (int.from_bytes(index[i : i + 8], "little") for i in (18, 26))
    lengths = np.frombuffer(index, np.int32, count, 34)
    pointers = np.frombuffer(index, np.int64, count, 34 + 4 * count)
    documents = np.frombuffer(index, np.int64, boundaries, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * boundaries
    assert documents.tolist() == list(range(count + 1))
    tokens = np.memmap(f"{prefix}.bin", dtype, mode="r")
    assert tokens.size == lengths.sum()
    starts = (pointers // tokens.itemsize).tolist()
    return [tokens[p : p + n] for p, n in zip(starts, lengths.tolist(), strict=True)]


def decoded(prefix: Path) -> list[bytes]:
    """The texts of a byte-level pair; every document ends with the end-of-document id."""
    documents = read_layout(prefix)
    assert all(document[-1] == EOD and document[:-1].max() < 256 for document in documents)
    return [document[:-1].astype(np.uint8).tobytes() for document in documents]


def cli(*arguments: object) -> int:
    """Run the tool in this process; its exit code."""
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in held}
    try:
        return prepare_data.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        return int(error.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_lines(path: Path, texts: list[str], key: str = "text") -> bytes:
    """A .jsonl file, and its bytes."""
    data = b"".join(json.dumps({"id": i, key: t}).encode() + b"\n" for i, t in enumerate(texts))
    path.write_bytes(data)
    return data


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


# -- every format in ---------------------------------------------------------------------------


def make_folder(folder: Path) -> list[object]:
    (folder / "b" / "deep").mkdir(parents=True)
    order = ["a.txt", "b/deep/z.txt", "b/m.txt", "b/n.txt", "c.txt"]
    for name, text in zip(order, TEXTS, strict=True):
        (folder / name).write_bytes(text.encode())
    (folder / "ignored.md").write_text("not asked for")
    (folder / "b" / "empty.txt").write_text("")
    return [folder]


def make_suffix(folder: Path) -> list[object]:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.py").write_bytes(text.encode())
    (folder / "0.txt").write_text("not asked for")
    return [folder, "--suffix", "py"]


def make_jsonl(folder: Path) -> list[object]:
    data = write_lines(folder / "a.jsonl", TEXTS, key="body")
    crlf = b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n").rstrip()  # BOM, blank lines, no end
    (folder / "a.jsonl").write_bytes(crlf)
    return [folder / "a.jsonl", "--json-key", "body"]


def make_gz(folder: Path) -> list[object]:
    data = write_lines(folder / "plain", TEXTS)
    half = data.index(b"\n") + 5  # two members that meet inside a line, zeros behind
    packed = gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(512)
    (folder / "a.jsonl.gz").write_bytes(packed)
    return [folder / "a.jsonl.gz"]


def make_zst(folder: Path) -> list[object]:
    data = write_lines(folder / "plain", TEXTS)
    (folder / "a.jsonl.zst").write_bytes(zstd(data[:77]) + zstd(data[77:]))
    return [folder / "a.jsonl.zst"]


def make_text_gz(folder: Path) -> list[object]:
    for number, text in enumerate(TEXTS):
        packed = gzip.compress(text.encode()) if number % 2 else zstd(text.encode())
        (folder / f"{number}.txt.{'gz' if number % 2 else 'zst'}").write_bytes(packed)
    return [folder]


def make_parquet(kind: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        import pyarrow
        from pyarrow import parquet

        column = pyarrow.array(TEXTS)
        if kind == "dictionary":
            column = column.dictionary_encode()
        elif kind == "binary":
            column = column.cast(pyarrow.binary())
        table = pyarrow.table({"id": list(range(len(TEXTS))), "body": column})
        parquet.write_table(table, folder / "a.parquet", row_group_size=2)
        return [folder / "a.parquet", "--column", "body"]

    return make


FORMATS = {
    "folder": make_folder,
    "suffix": make_suffix,
    "jsonl": make_jsonl,
    "jsonl.gz": make_gz,
    "jsonl.zst": make_zst,
    "txt.gz": make_text_gz,
    "parquet string": make_parquet("string"),
    "parquet dictionary": make_parquet("dictionary"),
    "parquet binary": make_parquet("binary"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_round_trips(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = FORMATS[name](folder)
    prefix = tmp_path / "out" / "corpus"
    assert cli(*arguments, "--output", prefix) == 0
    assert decoded(prefix) == [text.encode() for text in TEXTS]
    assert cli("--verify", prefix, arguments[0], "--quiet") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_per_line_and_order_of_sources(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"one\n\ntwo \xff\r\nthree")
    write_lines(tmp_path / "a.jsonl", ["json", ""])
    arguments = (tmp_path / "b.txt", tmp_path / "a.jsonl", tmp_path / "b.txt", "--per-line")
    assert cli(*arguments, "--output", tmp_path / "c") == 0
    lines = [b"one", b"two \xff", b"three"]
    assert decoded(tmp_path / "c") == [*lines, b"json", *lines]
    sidecar = json.loads((tmp_path / "c.json").read_text())
    assert [source["documents"] for source in sidecar["sources"]] == [3, 1, 3]
    assert sidecar["empty_documents"] == 1


@given(size=st.integers(1, 70), block=st.integers(1, 16), eod=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_file_in_pieces(size: int, block: int, eod: bool, tmp_path: Path) -> None:
    data = bytes(random.Random(size).randbytes(size))
    paths = [tmp_path / "long.txt", tmp_path / "short.txt"]
    for path, content in zip(paths, (data, b"end"), strict=True):
        path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        corpus = corpus_of([str(path) for path in paths], Reading())
        prepare(corpus, str(tmp_path / "c"), Options(append_eod=eod, force=True))
        verify(str(tmp_path / "c"), lambda reading: corpus)
    ends = [EOD] if eod else []
    expected = [[*data, *ends], [*b"end", *ends]]
    assert [document.tolist() for document in read_layout(tmp_path / "c")] == expected


def test_sidecar_states_the_stream(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    prefix = str(tmp_path / "c")
    sidecar = prepare(corpus_of([str(tmp_path / "a.jsonl")], Reading()), prefix)
    assert sidecar == json.loads((tmp_path / "c.json").read_text())
    stream = [token for document in read_layout(tmp_path / "c") for token in document.tolist()]
    counts = collections.Counter(stream).values()
    nats = -math.fsum(n / len(stream) * math.log(n / len(stream)) for n in counts)
    assert sidecar["unigram_entropy"] == pytest.approx(nats, abs=1e-12)
    assert (sidecar["tokens"], sidecar["documents"]) == (len(stream), len(TEXTS))
    assert (sidecar["vocab_size"], sidecar["eod_id"], sidecar["dtype"]) == (257, 256, "uint16")


def test_workers_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2048)  # many blocks of every kind
    rng = random.Random(1)
    texts = [rng.choice(TEXTS) * rng.randrange(1, 12) for _ in range(60)]
    write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "long.txt").write_bytes("".join(texts).encode())
    train_huggingface(tmp_path / "tokenizer.json")
    for tokenizer in ("bytes", tmp_path / "tokenizer.json"):
        for workers in (1, 2, 3):
            prefix = tmp_path / f"out{workers}" / "c"
            more = ("--workers", workers, "--tokenizer", tokenizer, "--force", "--quiet")
            assert cli(tmp_path, "--output", prefix, *more) == 0
        for suffix in indexed.SUFFIXES:
            one, two, three = (Path(f"{tmp_path}/out{n}/c{suffix}").read_bytes() for n in (1, 2, 3))
            assert one == two == three
        assert len(read_layout(tmp_path / "out1" / "c")) == 3 * len(texts) + 1


# -- tokenizers --------------------------------------------------------------------------------


def train_huggingface(path: Path, eod: str = "<|endoftext|>") -> None:
    """A byte-level BPE with what real files carry: truncation, padding, a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", eod]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))


def test_huggingface(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders

    train_huggingface(tmp_path / "tokenizer.json")
    write_lines(tmp_path / "a.jsonl", TEXTS)
    arguments = ("--output", tmp_path / "c", "--tokenizer", tmp_path, "--workers", 1)
    assert cli(tmp_path / "a.jsonl", *arguments) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()
    documents = read_layout(tmp_path / "c")
    eod = tokenizer.token_to_id("<|endoftext|>")
    assert all(document[-1] == eod and eod not in document[:-1] for document in documents)
    assert [tokenizer.decode(document[:-1].tolist(), False) for document in documents] == TEXTS
    sidecar = json.loads((tmp_path / "c.json").read_text())
    assert (sidecar["vocab_size"], sidecar["eod_id"]) == (tokenizer.get_vocab_size(), eod)
    assert sidecar["tokenizer"]["kind"] == "huggingface" and sidecar["tokenizer"]["sha256"]


def test_vocabulary_chooses_the_dtype(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "a.txt").write_text("big small big")
    for largest, dtype in ((65498, "uint16"), (65499, "int32"), (65536, "int32")):
        vocab = {"small": 0, "[UNK]": 1, "<eos>": 2, "big": largest}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "t.json"))
        arguments = ("--output", tmp_path / "c", "--tokenizer", tmp_path / "t.json", "--force")
        assert cli(tmp_path / "a.txt", *arguments, "--workers", 1) == 0
        (document,) = read_layout(tmp_path / "c")
        assert document.tolist() == [largest, 0, largest, 2] and document.dtype.name == dtype
    assert cli(tmp_path / "a.txt", *arguments, "--dtype", "uint16") == 2


def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_prefix=str(tmp_path / "t"), vocab_size=320,
        byte_fallback=True, minloglevel=2, remove_extra_whitespaces=False, model_type="bpe",
        normalization_rule_name="identity", add_dummy_prefix=False,
    )  # fmt: skip
    write_lines(tmp_path / "a.jsonl", TEXTS)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for more, eod in (([], model.eos_id()), (["--eod-token", "<s>"], model.bos_id())):
        arguments = ("--output", tmp_path / "c", "--tokenizer", tmp_path / "t.model", "--force")
        assert cli(tmp_path / "a.jsonl", *arguments, "--workers", 1, *more) == 0
        documents = read_layout(tmp_path / "c")
        assert [document[-1] for document in documents] == [eod] * len(TEXTS)
        assert [model.decode(document[:-1].tolist()) for document in documents] == TEXTS


def write_ranks(path: Path, merges: list[bytes]) -> None:
    """A .tiktoken file of the single bytes and some longer tokens."""
    import base64

    tokens = [bytes([value]) for value in range(256)] + merges
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def test_tiktoken(tmp_path: Path) -> None:
    write_ranks(tmp_path / "t.tiktoken", [b"th", b"the", b" a", b"zy"])
    write_lines(tmp_path / "a.jsonl", [*TEXTS, "the lazy"])
    arguments = ("--output", tmp_path / "c", "--tokenizer", tmp_path / "t.tiktoken")
    pattern = r" ?\p{L}+|\s+|."
    more = ("--workers", 1, "--pattern", pattern)
    assert cli(tmp_path / "a.jsonl", *arguments, *more) == 0
    documents = read_layout(tmp_path / "c")
    assert documents[-1].tolist() == [257, ord(" "), ord("l"), ord("a"), 259, 260]
    assert cli(tmp_path / "a.jsonl", *arguments, "--force", "--pattern", "gpt2") == 0
    assert read_layout(tmp_path / "c")[0][-1] == 50256


def test_tiktoken_patterns_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    for name, (pattern, eod_id) in encoders.PATTERNS.items():
        stated = public.ENCODING_CONSTRUCTORS[name]()
        assert pattern == stated["pat_str"]
        assert eod_id == stated["special_tokens"]["<|endoftext|>"]


# -- Megatron ----------------------------------------------------------------------------------


def test_megatron_reads_it_and_would_write_the_same(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert cli(tmp_path / "a.jsonl", "--output", tmp_path / "c") == 0
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for text in TEXTS:
        tokens = [*text.encode(), EOD]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = (Path(f"{tmp_path}/{name}{suffix}").read_bytes() for name in "cm")
        assert ours == theirs
    dataset = IndexedDataset(str(tmp_path / "c"))
    assert [bytes(document[:-1].astype(np.uint8)).decode() for document in dataset[:]] == TEXTS
    for size in (2, 257, 65499, 65500, 65536, 200_000):
        assert indexed.dtype_for(size) == np.dtype(DType.optimal_dtype(size))


def test_the_trainer_takes_it(pair: Path) -> None:
    from mhc_megatron.corpus import check_corpus, unigram_entropy
    from mhc_megatron.errors import UserError

    sidecar = indexed.read_sidecar(pair)
    check_corpus(str(pair), sequence_length=sidecar["tokens"] - 1, vocab_size=257)
    assert unigram_entropy(str(pair)) == sidecar["unigram_entropy"]
    with pytest.raises(UserError, match="vocabulary of 257"):
        check_corpus(str(pair), sequence_length=8, vocab_size=256)


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, '{"unigram_entropy": "x"}'])
def test_the_trainer_takes_a_pair_with_another_tools_json(pair: Path, text: str) -> None:
    from mhc_megatron.corpus import check_corpus, unigram_entropy

    pair.with_name(pair.name + ".json").write_text(text)
    check_corpus(str(pair), sequence_length=10, vocab_size=257)
    assert unigram_entropy(str(pair)) is None


def test_a_vocabulary_that_is_no_number(pair: Path) -> None:
    from mhc_megatron.corpus import check_corpus
    from mhc_megatron.errors import UserError

    pair.with_name(pair.name + ".json").write_text('{"vocab_size": "many"}')
    with pytest.raises(UserError, match="vocab_size must be a number, not 'many'"):
        check_corpus(str(pair), sequence_length=10, vocab_size=257)


def test_no_torch_in_the_tool() -> None:
    code = "import sys, tools.prepare_data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_stdlib(tmp_path: Path) -> None:
    assert cli("--stdlib", "--output", tmp_path / "std", "--quiet") == 0
    texts = decoded(tmp_path / "std")
    folder = Path(os.__file__).parent
    assert (folder / "os.py").read_bytes() in texts
    assert cli("--verify", tmp_path / "std", "--stdlib", "--quiet") == 0
    names = [file.path for file in stdlib_corpus().files]
    assert names == sorted(names, key=os.fsencode)
    inner = {part for name in names for part in Path(name).relative_to(folder).parts[:-1]}
    assert not inner & {"site-packages", "test", "tests", "idle_test"}
    assert sum(map(len, texts)) > 5_000_000


# -- verify ------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A small pair."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(corpus_of([str(tmp_path / "a.jsonl")], Reading()), str(tmp_path / "c"))
    return tmp_path / "c"


FLIPS = {
    "suffix": st.sampled_from((".bin", ".idx")),
    "place": st.floats(0, 1, exclude_max=True),
    "bit": st.integers(0, 7),
}


@given(**FLIPS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_verify_finds_a_flipped_bit(suffix: str, place: float, bit: int, pair: Path) -> None:
    path = Path(f"{pair}{suffix}")
    data = path.read_bytes()
    position = int(place * len(data))
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)
    try:
        with pytest.raises(CorpusError, match="c.(bin|idx|json)"):
            verify(str(pair))
    finally:
        path.write_bytes(data)
    verify(str(pair))


@given(suffix=st.sampled_from(indexed.SUFFIXES), place=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_verify_finds_truncation(suffix: str, place: float, pair: Path) -> None:
    path = Path(f"{pair}{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(place * (len(data) - 2))])  # JSON's last line feed is no loss
    try:
        with pytest.raises(CorpusError, match="c.(bin|idx|json)"):
            verify(str(pair))
    finally:
        path.write_bytes(data)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_verify_finds_an_edited_sidecar(pair: Path, data: st.DataObject) -> None:
    path = Path(f"{pair}.json")
    text = path.read_text()
    digits = [i for i, character in enumerate(text) if character.isdigit()]
    place = data.draw(st.sampled_from(digits))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[place]]))
    edited = text[:place] + digit + text[place + 1 :]
    with contextlib.suppress(json.JSONDecodeError):  # such as 012
        assume(json.loads(edited) != json.loads(text))  # the 17th digit of a float may say nothing
    path.write_text(edited)
    try:
        with pytest.raises(CorpusError):
            verify(str(pair))
    finally:
        path.write_text(text)


def test_verify_against_sources(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pair.with_name("a.jsonl")
    assert cli("--verify", pair, source) == 0
    for texts in (TEXTS[:-1], [*TEXTS, "more"], [*TEXTS[:2], "y", *TEXTS[3:]]):
        write_lines(source, texts)
        assert cli("--verify", pair) == 0
        assert cli("--verify", pair, source) == 2
    for suffix in indexed.SUFFIXES:
        Path(f"{pair}{suffix}").rename(pair.with_name("away"))
        assert cli("--verify", pair) == 2
        assert f"c{suffix}" in capsys.readouterr().err
        pair.with_name("away").rename(f"{pair}{suffix}")


def test_verify_notices_a_changed_tokenizer(tmp_path: Path) -> None:
    train_huggingface(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("text")
    assert cli(tmp_path / "a.txt", "--output", tmp_path / "c", "--tokenizer", tmp_path) == 0
    again = ("--verify", tmp_path / "c", tmp_path / "a.txt", "--workers", 1)
    assert cli(*again) == 0
    (tmp_path / "tokenizer.json").rename(tmp_path / "moved.json")
    train_huggingface(tmp_path / "tokenizer.json", eod="</s>")
    assert cli("--verify", tmp_path / "c") == 0
    assert cli(*again) == 2
    assert cli(*again, "--tokenizer", tmp_path / "moved.json") == 0


# -- whole or not at all -----------------------------------------------------------------------


def assert_whole_or_nothing(prefix: Path) -> bool:
    """Whether the pair is there; what is there is whole."""
    there = [suffix for suffix in indexed.SUFFIXES if Path(f"{prefix}{suffix}").exists()]
    assert there == list(indexed.SUFFIXES[: len(there)])
    if ".idx" in there:
        assert b"".join(decoded(prefix))
    if ".json" in there:
        verify(str(prefix))
    return len(there) == 3


def test_kill_at_random_moments(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [text * 2000 for text in TEXTS])
    (tmp_path / "a.jsonl").write_bytes(data * 10)
    command = [sys.executable, TOOL, tmp_path / "a.jsonl", "--output", tmp_path / "c", "--quiet"]
    start = time.monotonic()
    subprocess.run([*command, "--force"], check=True)
    whole = time.monotonic() - start
    assert assert_whole_or_nothing(tmp_path / "c")
    rng, killed = random.Random(0), 0
    for _ in range(10):
        for suffix in indexed.SUFFIXES:
            Path(f"{tmp_path}/c{suffix}").unlink(missing_ok=True)
        process = subprocess.Popen([*command, "--workers", str(rng.choice((1, 2)))])
        time.sleep(rng.uniform(0.3, 1.1) * whole)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert_whole_or_nothing(tmp_path / "c")
    assert killed
    subprocess.run([*command, "--force"], check=True)  # over whatever the killed ones left
    assert assert_whole_or_nothing(tmp_path / "c")
    assert not list(tmp_path.glob("*.partial"))


KILL_AT = """
import os, signal, sys
from tools import prepare_data
calls, last = 0, int(sys.argv[1])
def counted(function):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
sys.exit(prepare_data.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("force", [False, True])
def test_kill_at_every_step_of_the_commit(tmp_path: Path, force: bool) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "other.txt").write_text("another corpus")
    outcomes = []
    for step in range(1, 20):
        prefix = tmp_path / f"{step}" / "c"
        if force:
            assert cli(tmp_path / "other.txt", "--output", prefix) == 0
        arguments = [str(tmp_path / "a.jsonl"), "--output", str(prefix), "--force", "--quiet"]
        run = subprocess.run([sys.executable, "-c", KILL_AT, str(step), *arguments], cwd=ROOT)
        whole = assert_whole_or_nothing(prefix)
        if Path(f"{prefix}.idx").exists():
            old = [b"another corpus"]
            assert decoded(prefix) in ([old] if force else []) + [[t.encode() for t in TEXTS]]
        outcomes.append(whole)
        if run.returncode == 0:
            break
    assert run.returncode == 0 and whole and not all(outcomes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    source = tmp_path / "a.jsonl"
    data = write_lines(source, [text * 2000 for text in TEXTS])
    source.write_bytes(data * 100)
    command = [sys.executable, TOOL, source, "--output", tmp_path / "c"]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored in a background job
    )  # fmt: skip
    partial = tmp_path / "c.bin.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 1 << 20):
        time.sleep(0.005)
    process.send_signal(number)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 128 + number, message
    assert message.count("\n") == 1 and number.name in message
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [text * 2000 for text in TEXTS])
    (tmp_path / "a.jsonl").write_bytes(data * 100)
    command = [sys.executable, TOOL, tmp_path / "a.jsonl", "--output", tmp_path / "c"]
    process = subprocess.Popen([*command, "--workers", "2"])
    partial = tmp_path / "c.bin.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 1 << 20):
        time.sleep(0.005)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(child) for child in children)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_full_disk(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [text * 200 for text in TEXTS])
    (tmp_path / "many.jsonl").write_bytes(b'{"text": "x"}\n' * 20_000)
    # The tokens do not fit; then they do (40 kB a file), and the index does not.
    for source in ("a.jsonl", "many.jsonl"):
        run = subprocess.run(
            [sys.executable, TOOL, tmp_path / source, "--output", tmp_path / "out" / "c"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert run.returncode == 2 and "full" in run.stderr and run.stderr.count("\n") == 1
        assert not os.listdir(tmp_path / "out")


def test_overwriting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    assert cli(tmp_path / "a.txt", "--output", tmp_path / "c") == 0
    assert cli(tmp_path / "b.txt", "--output", tmp_path / "c") == 2
    assert "--force" in capsys.readouterr().err and decoded(tmp_path / "c") == [b"first"]
    missing = tmp_path / "missing.txt"
    assert cli(tmp_path / "b.txt", missing, "--output", tmp_path / "c", "--force") == 2
    assert decoded(tmp_path / "c") == [b"first"]
    assert cli(tmp_path / "b.txt", "--output", tmp_path / "c", "--force") == 0
    assert decoded(tmp_path / "c") == [b"second"]
    (tmp_path / "c.json").write_text('{"mine": 1}')
    assert cli(tmp_path / "a.txt", "--output", tmp_path / "c", "--force") == 2
    assert (tmp_path / "c.json").read_text() == '{"mine": 1}'


def test_two_runs_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    with indexed.PairWriter(tmp_path / "c", np.dtype("<u2"), force=False):
        assert cli(tmp_path / "a.txt", "--output", tmp_path / "c") == 2
        assert "another run" in capsys.readouterr().err
    assert cli(tmp_path / "a.txt", "--output", tmp_path / "c") == 0


def test_document_too_long_for_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 10)
    monkeypatch.setattr(indexed, "MAX_DOCUMENT_TOKENS", 36)
    for size, code in ((35, 0), (36, 2), (100, 2)):
        (tmp_path / "a.txt").write_text("x" * size)
        assert cli(tmp_path / "a.txt", "--output", tmp_path / f"{size}") == code


# -- bad input ---------------------------------------------------------------------------------


def bad_line(line: bytes) -> Callable[[Path], list[object]]:
    """A corpus whose second file has ``line`` as its second line."""

    def make(folder: Path) -> list[object]:
        write_lines(folder / "a.jsonl", TEXTS)
        data = write_lines(folder / "b.jsonl", TEXTS)
        first, rest = data.split(b"\n", 1)
        (folder / "b.jsonl").write_bytes(first + b"\n" + line + b"\n" + rest)
        return [folder]

    return make


def cut_short(name: str) -> Callable[[Path], list[object]]:
    """A corpus with a whole file, and after it one that lost its end."""

    def make(folder: Path) -> list[object]:
        write_lines(folder / "a.jsonl", TEXTS)
        arguments = FORMATS[name](folder)
        path = Path(str(arguments[0]))
        path.write_bytes(path.read_bytes().rstrip(b"\0")[:-6])
        return [folder / "a.jsonl", *arguments]

    return make


def damaged(folder: Path) -> list[object]:
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"x" * 99)[:-8] + b"checksum")
    (folder / "a.txt").write_text("good")
    return [folder]


def dead_link(folder: Path) -> list[object]:
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").symlink_to(folder / "nowhere")
    return [folder]


def a_pipe(folder: Path) -> list[object]:
    (folder / "a.txt").write_text("good")
    os.mkfifo(folder / "b.txt")
    return [folder]


def latin1(folder: Path) -> list[object]:
    train_huggingface(folder / "tokenizer.json")
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes("good\ncafé".encode("latin-1"))
    return [folder, "--tokenizer", folder / "tokenizer.json", "--workers", "1"]


def null_row(folder: Path) -> list[object]:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["good", None, "good"]}), folder / "b.parquet")
    return [folder]


def no_unknown(folder: Path) -> list[object]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"good": 0, "<eos>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "t.json"))
    (folder / "a.txt").write_text("good good")
    (folder / "b.txt").write_text("strange")
    return [folder, "--tokenizer", folder / "t.json", "--workers", "1"]


#: Input of which a part cannot be read: (what makes it, where the message says it is).
PARTLY_BAD = {
    "line is no JSON": (bad_line(b'{"text": "a'), "b.jsonl, line 2: not valid JSON"),
    "line is no object": (bad_line(b"[1]"), "b.jsonl, line 2: not a JSON object"),
    "key is missing": (bad_line(b'{"body": "a"}'), "b.jsonl, line 2: no key 'text'"),
    "text is a number": (bad_line(b'{"text": 5}'), "b.jsonl, line 2: 'text' is not a string"),
    "line is not UTF-8": (bad_line(b'{"text": "\xff"}'), "b.jsonl, line 2: not UTF-8"),
    "lone surrogate": (bad_line(rb'{"text": "\ud800"}'), "b.jsonl, line 2: half of a surrogate"),
    "deep nesting": (bad_line(b"[" * 200_000), "b.jsonl, line 2: not valid JSON"),
    "truncated gz": (cut_short("jsonl.gz"), "a.jsonl.gz: truncated"),
    "truncated zst": (cut_short("jsonl.zst"), "a.jsonl.zst: truncated"),
    "truncated parquet": (cut_short("parquet string"), "a.parquet: truncated or damaged"),
    "damaged gz": (damaged, "b.txt.gz: damaged .gz"),
    "dead link": (dead_link, "b.txt: No such file"),
    "pipe": (a_pipe, "b.txt: not a regular file"),
    "not UTF-8": (latin1, "b.txt, line 2: not UTF-8"),
    "null": (null_row, "b.parquet, row 2: the value is null"),
    "refused by the tokenizer": (no_unknown, "b.txt: the tokenizer refuses it"),
}


@pytest.mark.parametrize("name", PARTLY_BAD)
def test_partly_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, place = PARTLY_BAD[name]
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = [*make(folder), "--output", tmp_path / "out" / "c"]
    assert cli(*arguments) == 2
    skipped, message = capsys.readouterr().err.splitlines()
    assert place in skipped and "--skip-bad" in message
    kept = (tmp_path / "out" / "c.bin").read_bytes()
    assert cli(*arguments, "--skip-bad", "--force") == 0
    assert (tmp_path / "out" / "c.bin").read_bytes() == kept
    listed = capsys.readouterr().err
    assert listed.startswith("skipped ") and place in listed
    sidecar = json.loads((tmp_path / "out" / "c.json").read_text())
    assert sidecar["skipped"]["count"] == listed.count("\n") == 1
    assert sidecar["documents"] == len(read_layout(tmp_path / "out" / "c")) >= 1
    if name == "key is missing":
        assert decoded(tmp_path / "out" / "c") == [text.encode() for text in TEXTS * 2]
    if name == "truncated gz":  # the lines before the damage are kept, the broken one is not
        assert 5 <= sidecar["documents"] < 10
    verify(str(tmp_path / "out" / "c"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_panic_of_the_tokenizer_leaves_one_document_out(workers: int, tmp_path: Path) -> None:
    """tiktoken's regular expressions give up on a million spaces with a panic, and its stack."""
    lines = [base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256)]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(lines))
    write_lines(tmp_path / "a.jsonl", ["before", " " * 1_000_000 + "x", "after"])
    words = [sys.executable, TOOL, tmp_path / "a.jsonl", "--output", tmp_path / "c", "--workers"]
    words += [workers, "--tokenizer", tmp_path / "t.tiktoken", "--pattern", "gpt2"]
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert run.returncode == 2
    skipped, message = run.stderr.splitlines()
    assert "a.jsonl, line 2: the tokenizer refuses it (" in skipped and "--skip-bad" in message
    assert [document.size for document in read_layout(tmp_path / "c")] == [7, 6]


def test_memory_that_ends_is_no_document_to_skip() -> None:
    def encode(documents):
        raise MemoryError

    documents = blocks.Documents([b"a"], ["a.txt"])
    with pytest.raises(CorpusError, match="not enough memory for the tokens at a.txt"):
        blocks.encode_documents(documents, encoders.Encoder(encode, 2, 1, encoders.decode_bytes))


def test_first_bad_input_is_named_whatever_the_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    write_lines(tmp_path / "a.jsonl", TEXTS * 20)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("bad\n" * 300)
    messages = set()
    for workers in (1, 2):
        output = ("--output", tmp_path / "c", "--force", "--workers", workers)
        assert cli(tmp_path / "a.jsonl", *output) == 2
        messages.add(capsys.readouterr().err)
    assert len(messages) == 1 and messages.pop().startswith("skipped ")
    skipped = json.loads((tmp_path / "c.json").read_text())["skipped"]
    assert skipped["count"] == 300 and "line 101:" in skipped["first"][0]


def wrong(name: str) -> Callable[[Path], list[object]]:
    """A request that no option makes good; a.txt is a good source."""

    def make(folder: Path) -> list[object]:
        good = folder / "a.txt"
        good.write_text("good")
        (folder / "empty").mkdir()
        (folder / "hollow").mkdir()
        (folder / "hollow" / "a.txt").write_text("")
        (folder / "blank.jsonl").write_text('\n{"text": ""}\n')
        (folder / "a.bin").write_text("what is it")
        (folder / "broken.json").write_text("{}")
        (folder / "broken.model").write_text("no model")
        (folder / "broken.tiktoken").write_text("no ranks")
        (folder / "void.json").write_text("")
        write_ranks(folder / "large.tiktoken", [])
        with (folder / "large.tiktoken").open("a") as file:
            file.write("YWI= 2147483648\n")
        if name in ("no eod", "eod not there"):
            train_huggingface(folder / "tokenizer.json", eod="<end>")
        return [folder / item if item in os.listdir(folder) else item for item in WRONG[name][0]]

    return make


#: Arguments (names in the folder become paths), and what the message must say.
WRONG: dict[str, tuple[list[str], str]] = {
    "no source": ([], "no sources"),
    "missing": (["/nowhere/a.txt"], "/nowhere/a.txt does not exist"),
    "empty folder": (["empty"], "holds no file with suffix .txt, .jsonl, .parquet"),
    "empty files": (["hollow"], "the corpus is empty"),
    "empty text": (["blank.jsonl"], "the corpus is empty"),
    "suffix not there": (["empty", "--suffix", ".rs"], "holds no file with suffix .rs"),
    "unknown suffix": (["a.bin"], "a.bin: unknown suffix"),
    "no tokenizer": (["a.txt", "--tokenizer", "/nowhere/t.json"], "t.json cannot be read"),
    "unknown tokenizer": (["a.txt", "--tokenizer", "gpt2"], "the kind is not known"),
    "empty tokenizer": (["a.txt", "--tokenizer", "void.json"], "void.json is empty"),
    "broken huggingface": (["a.txt", "--tokenizer", "broken.json"], "is no tokenizer.json"),
    "broken sentencepiece": (["a.txt", "--tokenizer", "broken.model"], "no SentencePiece model"),
    "no pattern": (["a.txt", "--tokenizer", "broken.tiktoken"], "give --pattern"),
    "broken tiktoken": (
        ["a.txt", "--tokenizer", "broken.tiktoken", "--pattern", "gpt2"],
        "broken.tiktoken, line 1",
    ),
    "id beyond int32": (
        ["a.txt", "--tokenizer", "large.tiktoken", "--pattern", "."],
        "token id 2147483648 does not fit int32",
    ),
    "no eod": (["a.txt", "--tokenizer", "tokenizer.json"], "give --eod-token or --no-eod"),
    "eod not there": (["a.txt", "--tokenizer", "tokenizer.json", "--eod-token", "<x>"], "'<x>'"),
    "eod for bytes": (["a.txt", "--eod-token", "x"], "need a --tokenizer"),
    "workers": (["a.txt", "--workers", "0"], "--workers 0: at least 1"),
    "workers text": (["a.txt", "--workers", "many"], "--workers"),
    "unknown option": (["a.txt", "--nope"], "--nope"),
    "stdlib and more": (["a.txt", "--stdlib"], "--stdlib takes no other sources"),
    "empty suffix": (["a.txt", "--suffix", ""], "--suffix is empty"),
    "below a file": (["a.txt", "--output", "@/a.txt/c"], "cannot be written"),
    "unwritable": (["a.txt", "--output", "/proc/c"], "/proc/c.bin.partial: cannot be written"),
    "long name": (["a.txt", "--output", "@/" + "c" * 300], "written (File name too long)"),
    "long source": (["x" * 300 + ".txt"], "does not exist or cannot be reached"),
    "a folder": (["a.txt", "--output", "@/empty"], "is a folder"),
    "verify otherwise": (["a.txt", "--verify", "x", "--no-eod"], "--no-eod: --verify takes it"),
    "two tasks": (["a.txt", "--verify", "x"], "either --output PREFIX or --verify"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_request(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = [str(item).replace("@", str(folder)) for item in wrong(name)(folder)]
    before = sorted(folder.rglob("*"))
    if not {"--output", "--verify"} & set(arguments) or name == "two tasks":
        arguments += ["--output", str(tmp_path / "out" / "c")]
    assert cli(*arguments) == 2
    message = capsys.readouterr().err
    assert WRONG[name][1] in message and message.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "out").mkdir(mode=0o500)
    assert cli(tmp_path / "a.txt", "--output", tmp_path / "out" / "c") == 2


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """No test leaves a partial file, but for the ones that kill."""
    yield
    assert not [path for path in tmp_path.rglob("*.partial") if "kill" not in str(path)]
