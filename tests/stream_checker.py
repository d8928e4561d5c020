"""Finds races and early frees in work that is issued to streams, on a machine without any.

On the CPU every operation is finished when it returns, so a missing wait between two streams shows
in no result. ``StreamChecker`` watches the stand-ins of mhc_megatron/cpu.py and every operation of
torch, and keeps what a GPU would: for each stream, how far it is known to come after each other
one (a vector clock, carried by events), and for each storage who wrote it, who read it, on which
stream it was made and on which it was recorded. It notes

- a race: an operation touches a storage that another stream wrote (or writes one that another
  stream read) and no event says that it comes after;
- an early free: the last reference to a storage goes while another stream than its own may still
  use it, and neither was it recorded there nor does its own stream wait for that use. The caching
  allocator would hand the memory out again.

torch.cuda._sanitizer does the first on a real GPU; the model is its.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhc_megatron import cpu

Stream = Any
Clock = dict[int, int]


@dataclass
class Storage:
    """What is known of one storage."""

    reference: StorageWeakRef
    made_on: Stream
    made_by: str
    written: tuple[Stream, int]
    read: dict[int, int] = field(default_factory=dict)
    used: dict[int, Stream] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class StreamChecker(TorchDispatchMode):
    """A context manager; ``findings`` says what was wrong, in words.

    Args:
        monkeypatch: pytest's, for the stand-ins.
        name: what a stream is called in a finding.
        node: what runs at present, for a finding.
    """

    def __init__(self, monkeypatch, name: Callable[[Stream], str], node: Callable[[], str]) -> None:
        super().__init__()
        self.name, self.node = name, node
        self.findings: list[str] = []
        self._clocks: dict[int, Clock] = {}
        self._storages: dict[int, Storage] = {}
        self._streams: list[Stream] = []  # alive, so that ids stay theirs
        checker = self

        def record(event, stream=None):
            event.clock = dict(checker._clock(stream or torch.cuda.current_stream()))

        def wait(event, stream=None):
            clock = checker._clock(stream or torch.cuda.current_stream())
            for key, seen in getattr(event, "clock", {}).items():
                clock[key] = max(clock.get(key, 0), seen)

        monkeypatch.setattr(cpu.Event, "record", record)
        monkeypatch.setattr(cpu.Event, "wait", wait)
        monkeypatch.setattr(cpu.Stream, "wait_event", lambda stream, event: wait(event, stream))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: checker._record(tensor, stream)
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return out  # a view touches no memory
        stream = torch.cuda.current_stream()
        clock = self._clock(stream)
        now = clock[id(stream)] = clock[id(stream)] + 1
        written = [
            value
            for argument, value in zip(schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        mutated = {_key(t) for t in _tensors(written)}
        for tensor in _tensors((args, kwargs)):
            self._touch(tensor, stream, clock, now, func, _key(tensor) in mutated)
        for tensor in _tensors(out):
            if (
                _key(tensor) not in self._storages
                or self._storages[_key(tensor)].reference.expired()
            ):
                self._new(tensor, stream, now, func)
        return out

    def sweep(self) -> None:
        """Look for storages that are gone; call it after each node."""
        for key, storage in list(self._storages.items()):
            if storage.reference.expired():
                self._freed(storage)
                del self._storages[key]

    def _clock(self, stream: Stream) -> Clock:
        if id(stream) not in self._clocks:
            self._streams.append(stream)
            self._clocks[id(stream)] = {id(stream): 0}
        return self._clocks[id(stream)]

    def _new(self, tensor, stream: Stream, now: int, func) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages[_key(tensor)] = Storage(
                StorageWeakRef(storage), stream, f"{self.node()} ({func})", (stream, now)
            )

    def _touch(self, tensor, stream: Stream, clock: Clock, now: int, func, writes: bool) -> None:
        storage = self._storages.get(_key(tensor))
        if storage is None:
            return  # older than this check: parameters, data
        writer, then = storage.written
        if clock.get(id(writer), 0) < then:
            self._find(
                f"race: {self.node()} ({func}) on {self.name(stream)} uses what "
                f"{storage.made_by} wrote on {self.name(writer)}, without waiting"
            )
        storage.used[id(stream)] = stream
        if not writes:
            storage.read[id(stream)] = now
            return
        for reader, then in storage.read.items():
            if clock.get(reader, 0) < then:
                self._find(
                    f"race: {self.node()} ({func}) on {self.name(stream)} writes what "
                    f"{self.name(storage.used[reader])} reads, without waiting"
                )
        storage.written = stream, now
        storage.read = {id(stream): now}

    def _record(self, tensor: torch.Tensor, stream: Stream) -> None:
        storage = self._storages.get(_key(tensor))
        if storage is not None:
            storage.recorded.add(id(stream))

    def _freed(self, storage: Storage) -> None:
        own = self._clock(storage.made_on)
        for key, last in storage.read.items():
            safe = key == id(storage.made_on) or key in storage.recorded or own.get(key, 0) >= last
            if not safe:
                self._find(
                    f"early free: what {storage.made_by} made on {self.name(storage.made_on)} is "
                    f"freed while {self.name(storage.used[key])} may read it, at {self.node()}"
                )

    def _find(self, finding: str) -> None:
        if finding not in self.findings:
            self.findings.append(finding)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
