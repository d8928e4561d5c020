"""What is seen of a run: the live line, metrics.jsonl, TensorBoard, the stability record.

Megatron's loop has no callbacks, so ``Observer.attach`` wraps six functions of
``megatron.training.training`` (0.19.2) by name: ``train_step`` (line 2336), ``training_log``
(2568), ``save_checkpoint_and_time`` (3030), ``train`` (3342), ``evaluate`` (4160) and
``evaluate_and_print_results`` (4342), and ``schedule_async_save`` of its ``checkpointing``. Each
wrapper calls the original and only looks at what goes in and comes out; a spike in the loss ends
the process where the run's policy says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import checkpointing, get_args, get_timers
from megatron.training import training as megatron_training
from megatron.training.global_vars import get_signal_handler, get_tensorboard_writer
from megatron.training.utils import is_last_rank

from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import HyperConnection
from mhc_megatron.corpus import unigram_entropy
from mhc_megatron.exporter import Exporter
from mhc_megatron.faults import Watchdog
from mhc_megatron.hardware import peak_tflops
from mhc_megatron.metrics import MetricsWriter, is_validated
from mhc_megatron.spikes import LossSpike, SpikeWatch
from mhc_megatron.stability import Monitor

#: A field of a training record -> its metric.
_PROMETHEUS = {
    "iteration": "mhc_iteration",
    "consumed_tokens": "mhc_consumed_tokens_total",
    "loss": "mhc_loss_nats",
    "grad_norm": "mhc_grad_norm",
    "step_time_s": "mhc_step_time_seconds",
    "tokens_per_s": "mhc_tokens_per_second",
    "tflops": "mhc_tflops_per_gpu",
    "mfu": "mhc_mfu_ratio",
    "memory_gib": "mhc_memory_peak_gib",
}


class Observer:
    """Watches one run. Only the last rank, which knows the loss, writes.

    Args:
        run: the run's settings (``launch.settings.RunSettings``): its folder, where metrics.jsonl
            is written, its name, the steps between stability records, the watchdog's minutes.
        mhc: the run's connections.
        console: where the live line goes; None for nowhere.
    """

    def __init__(self, run: Any, mhc: MHCConfig, console: TextIO | None) -> None:
        self.run_dir, self.name, self.mhc = run.dir, run.name, mhc
        self.stability_interval, self.console = run.stability_interval, console
        self.watchdog = Watchdog(run.hang_minutes)
        self.prometheus, self.alarm_gain = run.prometheus, run.alarm_gain
        self.exporter: Exporter | None = None
        self._alarmed = False
        self.spike_policy, self.spikes = run.loss_spike, SpikeWatch(run.spike_factor)
        self._spikes = 0
        self._saving: int | None = None
        self.metrics: MetricsWriter | None = None
        self.monitor: Monitor | None = None
        self.iteration = 0
        self.peak: float | None = None
        self._losses: list[torch.Tensor] = []
        self._remaining = _RemainingTime()
        self._line_open = False
        self._testing = False
        self._evaluated = -1

    def attach(self) -> None:
        """Wrap Megatron's functions. Once a process."""
        for name in (
            "train",
            "train_step",
            "training_log",
            "evaluate",
            "evaluate_and_print_results",
            "save_checkpoint_and_time",
        ):
            self._wrap(megatron_training, name)
        self._wrap(checkpointing, "schedule_async_save")

    def _wrap(self, module: Any, name: str) -> None:
        original = getattr(module, name)
        setattr(module, name, functools.partial(getattr(self, f"_{name}"), original))

    # ------------------------------------------------------------------- the wrapped functions

    def _train(self, original: Callable, forward_step_func, model, *rest, **kwargs):
        args = get_args()
        self.iteration = args.iteration
        # A replayed CUDA graph runs no Python, and so no observer of H_res.
        if self.mhc.enabled and self.stability_interval and args.cuda_graph_impl == "none":
            self.monitor = Monitor(model)
        counts = _count_parameters(model)
        if is_last_rank():
            self._start(*counts)
        try:
            result = original(forward_step_func, model, *rest, **kwargs)
        except SystemExit:
            self.exit(_exit_reason(args))
            raise
        finally:
            self.watchdog.stop()
        return result

    def _train_step(self, original: Callable, *rest, **kwargs):
        step = kwargs.get("iteration", self.iteration) + 1
        if self.monitor is None or step % self.stability_interval and step != 1:
            return original(*rest, **kwargs)
        with self.monitor:
            result = original(*rest, **kwargs)
        gains = self.monitor.gains(mpu.get_pipeline_model_parallel_group())
        if self.metrics is not None and gains is not None:
            seconds, self.monitor.seconds = self.monitor.seconds, 0.0
            self.metrics.stability(
                iteration=step,
                consumed_tokens=self._tokens(step_done=False),
                **dataclasses.asdict(gains),
                seconds=seconds,
            )
            self._tensorboard_gains(step, gains)
            self._watch_gains(step, gains)
        return result

    def _training_log(
        self,
        original: Callable,
        loss_dict,
        total_loss_dict,
        learning_rate,
        iteration,
        *rest,
        **kwargs,
    ):
        args = get_args()
        self.watchdog.progress()
        self.iteration = iteration
        if "lm loss" in loss_dict:
            self._losses.append(loss_dict["lm loss"].detach().float().reshape(-1)[:1])
            if self.metrics is not None and self.spikes.factor:
                self._watch_loss(iteration, self._losses[-1].item())
        if self.metrics is not None and self._losses and iteration % args.log_interval == 0:
            # ``rest`` goes on as loss_scale, report_memory_flag, skipped_iter, grad_norm, ...
            self._log_step(args, iteration, learning_rate, grad_norm=rest[3])
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kwargs)

    def _evaluate(self, original: Callable, *rest, **kwargs):
        result = original(*rest, **kwargs)
        self.watchdog.progress()
        losses = (result[0] or {}).get("lm loss")
        # Megatron evaluates once more after the last step, on other batches of the same set, and
        # does so too where a process finds all steps done.
        again = self._evaluated == self.iteration
        if self.metrics is not None and losses is not None and not (self._testing or again):
            self._evaluated, value = self.iteration, float(losses)
            self.metrics.valid(iteration=self.iteration, consumed_tokens=self._tokens(), loss=value)
            self._print(f"iteration {self.iteration:>7,}   validation loss {value:.4f}")
        return result

    def _evaluate_and_print_results(self, original: Callable, prefix: str, *rest, **kwargs):
        self._testing = prefix.endswith("test set")
        return original(prefix, *rest, **kwargs)

    def _save_checkpoint_and_time(self, original: Callable, iteration: int, *rest, **kwargs):
        self._saving = iteration
        result = original(iteration, *rest, **kwargs)
        self._saving = None
        self.watchdog.progress()
        if not get_args().async_save:
            self._saved(iteration)
        return result

    def _schedule_async_save(self, original: Callable, request):
        """Called inside the former: this save is complete when it is finalized, steps later."""
        if self._saving is not None:
            request.add_finalize_fn(functools.partial(self._saved, self._saving))
        return original(request)

    def _saved(self, iteration: int) -> None:
        if self.metrics is not None:
            self.metrics.save(iteration=iteration, path=get_args().save)
        if self.exporter is not None:
            self.exporter.write({"mhc_checkpoint_iteration": iteration})

    # ------------------------------------------------------------------------------ what is written

    def _start(self, parameters: int, hc_parameters: int) -> None:
        args = get_args()
        cuda = torch.cuda.get_device_name()
        self.peak = peak_tflops(cuda, fp8=bool(args.fp8))
        self.metrics = MetricsWriter(os.path.join(self.run_dir, "metrics.jsonl"))
        self.metrics.start(
            name=self.name,
            config=vars(args),
            mhc=self.mhc.to_mapping(),
            parameters=parameters,
            hc_parameters=hc_parameters,
            device=cuda,
            peak_tflops=self.peak,
            unigram_entropy=_entropy(args),
            world_size=args.world_size,
        )
        if self.prometheus:
            self.exporter = Exporter(self.prometheus, self.name)
            self.exporter.set("mhc_loss_spikes_total", 0)
        if args.iteration:
            self.spikes.resume(self.metrics.path, args.iteration)
            self.metrics.resume(iteration=args.iteration, path=args.load)
            if is_validated(self.metrics.path, args.iteration):
                self._evaluated = args.iteration
            self._print(f"resumed at iteration {args.iteration:,}")
        extra = f", {hc_parameters:,} of them in hyper-connections" if hc_parameters else ""
        self._print(f"{self.name}: {parameters:,} parameters{extra}; log in {self.run_dir}")

    def _log_step(self, args, iteration: int, lr: float | None, grad_norm: float | None) -> None:
        steps = len(self._losses)
        loss = torch.cat(self._losses).mean().item()
        self._losses.clear()
        seconds = get_timers()("interval-time").elapsed(reset=False) / steps
        batch = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
        flops = megatron_training.num_floating_point_operations(args, batch)
        tflops = flops / seconds / args.world_size / 1e12
        known = self.peak is not None
        speed = batch * args.seq_length / seconds
        record = {
            "iteration": iteration,
            "consumed_tokens": self._tokens(),
            "loss": loss,
            "grad_norm": grad_norm,
            "step_time_s": seconds,
            "tokens_per_s": speed,
            "tflops": tflops,
            "mfu": tflops / self.peak if known else None,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 or None,
        }
        self.metrics.train(lr=lr, **record)
        self.spikes.record(loss)
        if self.exporter is not None:
            self.exporter.write({_PROMETHEUS[key]: value for key, value in record.items()})
        left = self._remaining(seconds, args.train_iters - iteration)
        self._live(
            f"iteration {iteration:>7,}/{args.train_iters:,}   loss {loss:7.4f}   "
            f"grad norm {grad_norm or 0:7.3f}   {speed:>11,.0f} tokens/s"
            + (f"   MFU {tflops / self.peak:5.1%}" if known else "")
            + f"   {left} left"
        )

    def _watch_loss(self, iteration: int, loss: float) -> None:
        """What the run's policy says about a step's loss that stands out.

        Raises:
            LossSpike: it does, and the policy is not to go on.
        """
        if self.spikes.is_spike(loss):
            usual, policy = self.spikes.usual, self.spike_policy
            self._spikes += 1
            self.metrics.spike(iteration=iteration, loss=loss, usual=usual, policy=policy)
            if self.exporter is not None:
                self.exporter.write({"mhc_loss_spikes_total": self._spikes})
            said = f"the loss of iteration {iteration:,} is {loss:.4g}, usual is {usual:.4g}"
            if policy != "log":
                raise LossSpike(f"{said} (run.loss_spike: {policy})")
            self.say(f"ALARM: {said}")

    def _watch_gains(self, step: int, gains) -> None:
        """Prometheus, and an alarm when the composite gain passes ``run.alarm_gain``."""
        worst = max(
            gains.composite_forward_max[gains.last], gains.composite_backward_max[gains.last]
        )
        alarm = bool(self.alarm_gain) and not worst <= self.alarm_gain  # a NaN is one too
        if alarm and not self._alarmed:
            self.metrics.alarm(iteration=step, gain=worst, threshold=self.alarm_gain)
            self.say(
                f"ALARM: iteration {step:,}: the composite gain is {worst:.4g}, above "
                f"run.alarm_gain = {self.alarm_gain:g}"
            )
        self._alarmed = alarm
        if self.exporter is not None:
            for direction in ("forward", "backward"):
                for side in ("max", "min"):
                    value = getattr(gains, f"composite_{direction}_{side}")[gains.last]
                    self.exporter.set("mhc_composite_gain", value, direction=direction, side=side)
            error = max(*gains.row_error, *gains.column_error)
            self.exporter.write({"mhc_sinkhorn_error": error, "mhc_gain_alarm": float(alarm)})

    def _tensorboard_gains(self, step: int, gains) -> None:
        writer = get_tensorboard_writer()
        if writer is None:
            return
        for field in dataclasses.fields(gains):
            values = getattr(gains, field.name)
            if field.name.startswith("composite"):
                writer.add_scalar(f"mhc/{field.name}", values[gains.last], step)
            elif field.name != "sublayers":
                worst = min(values) if field.name.endswith("_min") else max(values)
                writer.add_scalar(f"mhc/{field.name}", worst, step)

    def exit(self, reason: str = "complete") -> None:
        """The last record of a run that ended in an orderly way."""
        if self.metrics is not None:
            self.metrics.exit(iteration=self.iteration, reason=reason)
            if reason != "complete":
                self._print(f"stopped at iteration {self.iteration:,}: {reason}")

    def _tokens(self, step_done: bool = True) -> int:
        args = get_args()
        samples = args.consumed_train_samples
        if not step_done:
            samples += args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
        return samples * args.seq_length

    def _live(self, line: str) -> None:
        """A line that the next one replaces on a terminal; a line of its own in a file."""
        if self.console is None:
            return
        if self.console.isatty():
            self._write(f"\r\x1b[2K{line}")
            self._line_open = True
        else:
            self._write(line + "\n")

    def say(self, line: str) -> None:
        """A line for the terminal and for this rank's log."""
        print(line, flush=True)
        self._print(line)

    def _print(self, line: str) -> None:
        if self.console is not None:
            self._write(("\n" if self._line_open else "") + line + "\n")
        self._line_open = False

    def _write(self, text: str) -> None:
        """A terminal, or a pipe's reader, that has gone is no reason to end the run."""
        try:
            self.console.write(text)
            self.console.flush()
        except OSError:
            self.console = None


class _RemainingTime:
    """Time left, from a slowly moving mean of the step time."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def __call__(self, seconds: float, steps: int) -> str:
        self._mean = seconds if self._mean is None else 0.8 * self._mean + 0.2 * seconds
        total = math.ceil(self._mean * max(0, steps))
        hours, rest = divmod(total, 3600)
        return (
            f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
        )


def _exit_reason(args) -> str:
    if args.exit_signal_handler and getattr(get_signal_handler(), "_signal_received", False):
        return "signal"
    return "time limit or exit interval"


def _entropy(args) -> float | None:
    """Unigram entropy of the corpus, where there is one and it says."""
    paths = [path for path in args.data_path or [] if not _is_number(path)]
    return unigram_entropy(paths[0]) if len(paths) == 1 else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count_parameters(model: list[torch.nn.Module]) -> tuple[int, int]:
    """Parameters of the whole model and of its connections; a collective call.

    Counts what tensor- and expert-parallel ranks share once (Megatron's own marks), and a tied
    embedding once.
    """
    own = [0, 0]
    tp = mpu.get_tensor_model_parallel_rank()
    for chunk in model:
        connections = {
            id(p) for m in chunk.modules() if isinstance(m, HyperConnection) for p in m.parameters()
        }
        for parameter in chunk.parameters():
            expert = not getattr(parameter, "allreduce", True)
            sharded = getattr(parameter, "tensor_model_parallel", False) or expert
            if getattr(parameter, "shared", False) or (tp and not sharded):
                continue
            own[0] += parameter.numel()
            own[1] += parameter.numel() * (id(parameter) in connections)
    total = torch.tensor(own, dtype=torch.float64, device="cuda")
    dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return int(total[0]), int(total[1])
