"""A run's last numbers for Prometheus, as node_exporter's textfile collector reads them.

The file is replaced as a whole, so that the collector never sees half of it. Its modification time
(``node_textfile_mtime_seconds``) tells a run that has stopped writing from one that is slow.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from mhc_megatron.errors import UserError

#: Metric -> (type, help). Names end in their unit, as Prometheus asks.
METRICS: dict[str, tuple[str, str]] = {
    "mhc_iteration": ("counter", "Iterations trained."),
    "mhc_consumed_tokens_total": ("counter", "Tokens trained on, all ranks."),
    "mhc_loss_nats": ("gauge", "Mean training loss a token since the last record."),
    "mhc_grad_norm": ("gauge", "Norm of the gradient before clipping."),
    "mhc_step_time_seconds": ("gauge", "Mean time of a step since the last record."),
    "mhc_tokens_per_second": ("gauge", "Tokens a second, all ranks."),
    "mhc_tflops_per_gpu": ("gauge", "Model TFLOP/s a GPU."),
    "mhc_mfu_ratio": ("gauge", "Model FLOPs over the GPU's dense peak."),
    "mhc_memory_peak_gib": ("gauge", "Peak memory of this rank's GPU."),
    "mhc_composite_gain": ("gauge", "Amax gain of the product of all mixing matrices."),
    "mhc_sinkhorn_error": ("gauge", "Largest distance of a row or column sum from 1."),
    "mhc_checkpoint_iteration": ("gauge", "Iteration of the last complete checkpoint."),
    "mhc_loss_spikes_total": ("counter", "Steps whose loss was a spike, in this process."),
    "mhc_gain_alarm": ("gauge", "1 while the composite gain is above run.alarm_gain."),
}


class Exporter:
    """Keeps the newest value of each metric in one file.

    Args:
        folder: node_exporter's ``--collector.textfile.directory``.
        run: the run's name, a label of every metric and part of the file's name.

    Raises:
        UserError: the folder is not there and cannot be made.
    """

    def __init__(self, folder: str, run: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"run: prometheus: {folder}: {error.strerror}.") from error
        self.path = os.path.join(folder, f"mhc_{re.sub(r'[^A-Za-z0-9_.-]', '_', run)}.prom")
        self._run = run
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Take a new value; None and what is not finite removes the metric."""
        assert name in METRICS, name
        key = (name, tuple(sorted(labels.items())))
        if value is None or not math.isfinite(value):
            self._values.pop(key, None)
        else:
            self._values[key] = float(value)

    def write(self, values: Mapping[str, float | None] | None = None) -> None:
        """Replace the file, with ``values`` set first. A full disk does not stop the run."""
        for name, value in (values or {}).items():
            self.set(name, value)
        try:
            with open(self.path + ".new", "w", encoding="utf-8") as f:
                f.write(self.text())
            os.replace(self.path + ".new", self.path)
        except OSError as error:
            print(f"{self.path}: {error.strerror}", flush=True)

    def text(self) -> str:
        """The file's content, in Prometheus' text format."""
        lines: list[str] = []
        for name, (kind, about) in METRICS.items():
            samples = [(labels, v) for (n, labels), v in self._values.items() if n == name]
            if samples:
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for labels, value in sorted(samples):
                named = ",".join(f'{k}="{_escape(v)}"' for k, v in (("run", self._run), *labels))
                lines.append(f"{name}{{{named}}} {value!r}")
        return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
