"""metrics.jsonl: what a run tells the world, one JSON object a line, appended as it happens.

The file belongs to one writer (one rank). It may be read at any time, a run may be killed at any
time, and a resumed run appends to what it finds:

- a line is written by one ``write`` call on a descriptor opened with O_APPEND, so that a reader
  sees whole lines, except for the one a kill or a full disk cut short;
- opening a file whose last line was cut short removes that line, so that the next one does not
  continue it;
- ``start``, ``save`` and ``exit`` are forced to the disk: what was logged before a checkpoint is
  there if the checkpoint is;
- after a resume, iterations may repeat. The order of the lines is the truth: a record replaces the
  earlier ones of its kind at the same or a later iteration.

JSON has no NaN and no infinity: such a number is written as null.

Units: tokens are counted from the start of training over all ranks, losses are nats a token, times
are seconds, ``time`` is seconds since 1970, ``tflops`` are model TFLOP/s a GPU, ``mfu`` is a
fraction of ``peak_tflops``, ``memory_gib`` is the peak of one GPU. ``tools/report.py`` reads it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mhc_megatron.files import read_records

_BLOCK = 1 << 16


class MetricsWriter:
    """Appends events to the metrics file of a run; creates the file and its folder.

    Args:
        path: the file, by custom ``metrics.jsonl`` in the run's folder.

    Raises:
        OSError: the file cannot be opened, repaired or written (a full disk leaves no part of the
            line behind).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        #: Bytes of a half-written last line that were removed on opening.
        self.repaired_bytes = _repair_last_line(self._fd)

    def start(
        self,
        *,
        name: str,
        config: Mapping[str, Any],
        mhc: Mapping[str, Any],
        parameters: int,
        hc_parameters: int,
        device: str,
        peak_tflops: float | None = None,
        unigram_entropy: float | None = None,
        world_size: int = 1,
    ) -> None:
        """What the run is, once for every process that trains it (again after a resume).

        Args:
            config: Megatron's arguments, flat, by name; a value JSON has no form for is written
                as its ``str``.
            mhc: the connection's settings, ``variant`` among them.
            parameters: of the whole model, the connections' included.
            hc_parameters: of the connections alone.
            device: a GPU's name, or ``cpu``.
            peak_tflops: dense peak of the device at the run's precision; None where unknown.
            unigram_entropy: of the corpus, nats a token: what a model that knows the frequencies
                of the tokens and nothing else would reach.
        """
        self._append(
            "start",
            sync=True,
            name=name,
            time=time.time(),
            config=config,
            mhc=mhc,
            parameters=parameters,
            hc_parameters=hc_parameters,
            device=device,
            peak_tflops=peak_tflops,
            unigram_entropy=unigram_entropy,
            world_size=world_size,
        )

    def train(
        self,
        *,
        iteration: int,
        consumed_tokens: int,
        loss: float,
        grad_norm: float | None,
        lr: float | None,
        step_time_s: float,
        tokens_per_s: float,
        tflops: float | None = None,
        mfu: float | None = None,
        memory_gib: float | None = None,
    ) -> None:
        """The steps since the last such record: mean loss and step time, tokens/s of all ranks."""
        self._append(
            "train",
            iteration=iteration,
            consumed_tokens=consumed_tokens,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            tflops=tflops,
            mfu=mfu,
            memory_gib=memory_gib,
        )

    def valid(self, *, iteration: int, consumed_tokens: int, loss: float) -> None:
        """The mean loss of one evaluation on the validation set."""
        self._append("valid", iteration=iteration, consumed_tokens=consumed_tokens, loss=loss)

    def stability(
        self,
        *,
        iteration: int,
        consumed_tokens: int,
        sublayers: Sequence[str],
        forward_max: Sequence[float],
        forward_min: Sequence[float],
        backward_max: Sequence[float],
        backward_min: Sequence[float],
        composite_forward_max: Sequence[float],
        composite_forward_min: Sequence[float],
        composite_backward_max: Sequence[float],
        composite_backward_min: Sequence[float],
        row_error: Sequence[float],
        column_error: Sequence[float],
        seconds: float,
    ) -> None:
        """Gains and Sinkhorn errors of H_res, every list with one entry a sublayer.

        The gain of a matrix is, per token, its largest (max) or smallest (min) |row sum|
        (forward) or |column sum| (backward), averaged over tokens (mHC, arXiv 2512.24880,
        section 5.4). Entry k of a composite list is that of the product over sublayers 0..k.
        ``row_error`` and ``column_error`` are the distances of the sums from 1; ``seconds`` is
        what the measurement took.

        Raises:
            ValueError: the lists differ in length.
        """
        lists: dict[str, Any] = {
            "forward_max": forward_max,
            "forward_min": forward_min,
            "backward_max": backward_max,
            "backward_min": backward_min,
            "composite_forward_max": composite_forward_max,
            "composite_forward_min": composite_forward_min,
            "composite_backward_max": composite_backward_max,
            "composite_backward_min": composite_backward_min,
            "row_error": row_error,
            "column_error": column_error,
        }
        for key, values in lists.items():
            if len(values) != len(sublayers):
                raise ValueError(f"{key} has {len(values)} entries for {len(sublayers)} sublayers")
        self._append(
            "stability",
            iteration=iteration,
            consumed_tokens=consumed_tokens,
            sublayers=sublayers,
            **lists,
            seconds=seconds,
        )

    def save(self, *, iteration: int, path: str | None = None) -> None:
        """A checkpoint of this iteration is complete at ``path``."""
        self._append("save", sync=True, iteration=iteration, time=time.time(), path=path)

    def resume(self, *, iteration: int, path: str | None = None) -> None:
        """Training goes on after this iteration; later records of the file are void."""
        self._append("resume", iteration=iteration, time=time.time(), path=path)

    def alarm(self, *, iteration: int, gain: float, threshold: float) -> None:
        """The composite gain of the mixing matrices has passed the run's threshold."""
        self._append("alarm", sync=True, iteration=iteration, gain=gain, threshold=threshold)

    def spike(self, *, iteration: int, loss: float, usual: float, policy: str) -> None:
        """The loss of this step stands out from ``usual``; ``policy`` is log, stop or skip."""
        self._append(
            "spike", sync=True, iteration=iteration, loss=loss, usual=usual, policy=policy
        )

    def exit(self, *, iteration: int, reason: str) -> None:
        """The run ends at this iteration, in an orderly way, for the reason given."""
        self._append("exit", sync=True, iteration=iteration, time=time.time(), reason=reason)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, event: str, *, sync: bool = False, **fields: Any) -> None:
        record = _plain({"event": event, **fields})
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        _write_whole(self._fd, line.encode("ascii"))
        if sync:
            os.fsync(self._fd)


def is_validated(path: str | os.PathLike[str], iteration: int) -> bool:
    """Whether the file has a valid record of ``iteration`` that later training did not replace."""
    found = False
    for record in read_records(path):
        event, at = record.get("event"), record.get("iteration")
        if type(at) is not int:
            continue
        if event == "valid" and at == iteration:
            found = True
        elif (event == "train" and at <= iteration) or (
            event in ("valid", "resume") and at < iteration
        ):
            found = False  # the run went back and has come this way again
    return found


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: non-finite floats are None, unknown objects their ``str``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a tensor, of any number of dimensions
        return _plain(value.tolist())
    return str(value)


def _write_whole(fd: int, data: bytes) -> None:
    """Append ``data`` in one call, or leave the file as it was and raise OSError."""
    before = os.fstat(fd).st_size
    written = os.write(fd, data)
    if written != len(data):
        os.ftruncate(fd, before)
        raise OSError(errno.ENOSPC, "no space for a line of metrics")


def _repair_last_line(fd: int) -> int:
    """End the file with a newline; returns how many bytes of a cut line were removed.

    A last line that lacks nothing but its newline is an object like any other (a cut one lacks its
    closing brace, so it does not parse): it gets the newline.
    """
    size = os.fstat(fd).st_size
    start = _last_line_start(fd, size)
    tail = os.pread(fd, size - start, start)
    if not tail:
        return 0
    try:
        whole = isinstance(json.loads(tail), dict)
    except (ValueError, RecursionError):
        whole = False
    if whole:
        os.write(fd, b"\n")
        return 0
    os.ftruncate(fd, start)
    return len(tail)


def _last_line_start(fd: int, size: int) -> int:
    """Offset after the last newline among the first ``size`` bytes; 0 if there is none."""
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
