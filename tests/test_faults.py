"""Faults: what a rank does, what the supervisor makes of it, which checkpoint is taken."""

import contextlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.managers
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty

import fault_job
import psutil
import pytest
import soak
import torch
from test_pretrain import arguments, forked, launch, records, weights

from launch import supervise
from launch.environment import check_resiliency
from mhc_megatron import faults, spikes
from mhc_megatron.checkpoint import sound
from mhc_megatron.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode"),
    pytest.mark.filterwarnings("ignore"),
]

SETTINGS = ["train-iters=12", "save-interval=4"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(soak.CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert launch(arguments(config, run, *SETTINGS), run.parent / "out") == 0
    return run


def faulty(words: list[str], output: Path, fault: str, iteration: int) -> int:
    """Exit code of a run in which something goes wrong."""
    process = forked(fault_job.run, words, str(output), fault, iteration)
    process.join(120)
    return process.exitcode


def verdict(run: Path, began: float, code: int) -> supervise.Attempt:
    """The supervisor's, written into its history."""
    attempt = supervise.judge(began, time.time(), code, run, 3, None)
    supervise.append(run, attempt)
    return attempt


def same(run: Path, other: Path) -> bool:
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --------------------------------------------------------------------------- which checkpoint


def truncate(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 100)


#: How the newest checkpoint is damaged -> what is said.
DAMAGES = {
    "data cut short": (truncate, "is cut short"),
    "data file gone": (lambda f: next(f.glob("*.distcp")).unlink(), "is missing"),
    "no .metadata": (lambda f: (f / ".metadata").unlink(), ".metadata"),
    "half of .metadata": (lambda f: os.truncate(f / ".metadata", 500), ".metadata is damaged"),
    "no metadata.json": (lambda f: (f / "metadata.json").unlink(), "metadata.json is missing"),
    "folder gone": (shutil.rmtree, "does not exist"),
}


@pytest.fixture()
def checkpoints(whole_run, tmp_path) -> Path:
    return shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")


def test_a_whole_checkpoint_is_taken(checkpoints):
    assert sound.choose(checkpoints) == sound.Choice(12, 12, [])
    assert sound.choose(checkpoints.parent) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(damage, checkpoints):
    harm, sentence = DAMAGES[damage]
    harm(checkpoints / "iter_0000012")
    choice = sound.choose(checkpoints)
    assert (choice.iteration, choice.named) == (8, 12) and sentence in choice.faults[0]


@pytest.mark.parametrize("content", [b"", b"1x", b"\0\0"])
def test_a_damaged_tracker_means_the_newest_whole_one(content, checkpoints):
    (checkpoints / sound.TRACKER).write_bytes(content)
    truncate(checkpoints / "iter_0000012")
    assert sound.choose(checkpoints).iteration == 8


def test_without_a_tracker_the_newest_whole_one_is_taken(checkpoints):
    """It is written last: the save was whole, or the file was lost."""
    (checkpoints / sound.TRACKER).unlink()
    truncate(checkpoints / "iter_0000012")
    assert sound.choose(checkpoints).iteration == 8
    for folder in checkpoints.glob("iter_*"):
        if folder.name != "iter_0000012":
            shutil.rmtree(folder)
    assert sound.choose(checkpoints) is None  # a first save that did not end


def test_the_supervisor_gives_up_where_nothing_can_be_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise.faults, "cannot_write", lambda folder: True)
    attempt = supervise.judge(time.time(), time.time(), 1, tmp_path, 3, None)
    assert attempt.verdict == supervise.GIVE_UP and "is full" in attempt.reason


def test_checkpoints_in_another_folder_are_progress(tmp_path):
    records = [{"event": "save", "iteration": 40}, {"event": "train", "iteration": 41}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert supervise.checkpoint(tmp_path) == 40


def test_what_the_tracker_does_not_name_yet_is_not_taken(checkpoints):
    sound.set_tracker(checkpoints, 4)
    assert sound.choose(checkpoints) == sound.Choice(4, 4, [])


def test_no_whole_checkpoint_is_an_error(checkpoints):
    for folder in checkpoints.glob("iter_*"):
        truncate(folder)
    with pytest.raises(UserError, match="no checkpoint in .* is whole: .*12.*8.*4"):
        sound.choose(checkpoints)


def test_a_release_checkpoint_is_left_to_megatron(checkpoints):
    (checkpoints / sound.TRACKER).write_text("release")
    assert sound.choose(checkpoints) is None


def test_a_truncated_checkpoint_costs_the_steps_since_the_one_before(config, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    truncate(run / "checkpoints" / "iter_0000012")
    assert launch(arguments(config, run, *SETTINGS), tmp_path / "out") == 0
    said = (tmp_path / "out").read_text()
    assert "is cut short" in said and "Going on from iteration 8 instead." in said
    assert records(run, "resume")[-1]["iteration"] == 8
    assert same(run, whole_run)


# ------------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
def test_a_hang_prints_the_stacks_and_ends(config, tmp_path):
    began, run = time.time(), tmp_path / "run"
    words = arguments(config, run, *SETTINGS, "run.hang_minutes=0.05")
    assert faulty(words, tmp_path / "out", "hang", 3) == 1
    log = (run / "logs" / "rank-0.log").read_text()
    assert faults.HUNG in log and "in wait_for_ever" in log
    attempt = verdict(run, began, 1)
    assert attempt.verdict == "again" and attempt.reason.startswith("rank-0 made no progress")


def test_a_collective_that_never_ends_prints_the_stacks_of_those_who_wait(config, tmp_path):
    """One of two ranks stays away at the third step."""
    began, run = time.time(), tmp_path / "run"
    words = arguments(config, run, *SETTINGS, "run.hang_minutes=0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, fault in enumerate((None, "hang")):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = (words, str(tmp_path / f"out-{rank}"), fault, 3, environment)
        processes.append(forked(fault_job.run, *given))
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 1]
    first, second = ((run / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    # The rank that waits says so too, unless its peer's end was first: then gloo does.
    assert "all_reduce" in first and (faults.HUNG in first or "gloo" in first)
    assert faults.HUNG in second and "in wait_for_ever" in second
    attempt = verdict(run, began, 1)
    assert attempt.verdict == "again" and "made no progress" in attempt.reason


@pytest.mark.slow
def test_a_writer_that_was_killed_ends_its_rank(config, whole_run, tmp_path):
    """Asynchronous saves: the rank notices, and the next attempt ends with the same weights."""
    run, killed = tmp_path / "run", []
    words = arguments(config, run, *SETTINGS, "async-save=true")

    def kill(pid: int, said: str) -> None:
        if "iteration       2/" in said and not killed:
            killed.extend(soak._writers([psutil.Process(pid)]))
            for writer in killed:
                writer.kill()

    began = time.time()
    assert launch(words, tmp_path / "out", kill) == 1 and killed
    assert "the writer of checkpoints has died (exit code -9)" in verdict(run, began, 1).reason
    assert launch(words, tmp_path / "out") == 0
    saved = [r["iteration"] for r in records(run, "save")]
    assert saved == [4, 8, 12] and same(run, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "policy"), [("nan", "bad_loss"), ("spike", "loss_spike")])
def test_a_bad_loss_is_skipped_where_that_is_the_policy(fault, policy, config, tmp_path):
    """Twice at the same iteration, from the same checkpoint; the third time it is left out."""
    run = tmp_path / "run"
    words = arguments(config, run, *SETTINGS, f"run.{policy}=skip")
    for expected in ("again", "again"):
        began = time.time()
        assert faulty(words, tmp_path / "out", fault, 6) == 1
        attempt = verdict(run, began, 1)
        assert (attempt.verdict, attempt.bad_iteration, attempt.checkpoint) == (expected, 6, 4)
    assert faults.skipped_iterations(str(run)) == [6]
    assert faulty(words, tmp_path / "out", fault, 6) == 0
    # The second attempt knows what is usual from the first one's records.
    assert [r["iteration"] for r in records(run, "spike")] == [6, 6] * (fault == "spike")
    steps = [r["iteration"] for r in records(run, "train")]
    assert steps == [1, 2, 3, 4, 5, 5, 5, 7, 8, 9, 10, 11, 12]
    usual = records(run, "train")[4]["loss"]
    assert all(0 < r["loss"] < 2 * usual for r in records(run, "train"))


def test_a_spike_ends_the_run_where_that_is_the_policy(config, tmp_path):
    began, run = time.time(), tmp_path / "run"
    words = arguments(config, run, *SETTINGS, "run.loss_spike=stop")
    assert faulty(words, tmp_path / "out", "spike", 7) == 1
    assert "error: the loss of iteration 7 is " in (tmp_path / "out").read_text()
    attempt = verdict(run, began, 1)
    assert (attempt.verdict, attempt.bad_iteration, attempt.checkpoint) == ("give up", 7, 4)
    assert "usual is 4." in attempt.reason and "(run.loss_spike: stop)" in attempt.reason


@pytest.mark.slow
def test_a_spike_is_told_and_trained_where_that_is_the_policy(config, tmp_path):
    run = tmp_path / "run"
    words = arguments(config, run, *SETTINGS, "run.loss_spike=log")
    assert faulty(words, tmp_path / "out", "spike", 7) == 0
    (spike,) = records(run, "spike")
    assert spike["iteration"] == 7 and spike["policy"] == "log"
    assert spike["loss"] > 6 * spike["usual"] > 20  # the loss of a model that knows nothing is 4.6
    assert (tmp_path / "out").read_text().count("ALARM: the loss of iteration 7 is ") == 1
    assert len(records(run, "train")) == 12


def test_what_a_spike_is(tmp_path):
    watch = spikes.SpikeWatch(2.0)
    for loss in (5.0, 4.0, 4.0, 3.0):
        watch.record(loss)
        assert watch.usual is None and not watch.is_spike(1e9)
    watch.record(3.0)
    assert watch.usual == 4.0 and watch.is_spike(8.1)
    assert not any(map(watch.is_spike, (8.0, float("nan"), float("inf"))))
    for _ in range(spikes.RECORDS):
        watch.record(1.0)
    assert watch.usual == 1.0 and not spikes.SpikeWatch(0.0).is_spike(9.0)


def test_what_is_usual_is_known_again_after_a_resume(tmp_path):
    lines = [{"event": "train", "iteration": i, "loss": float(i)} for i in range(1, 9)]
    lines += [{"event": "train", "iteration": 3, "loss": 30.0}, {"event": "valid", "iteration": 3}]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "tr')
    watch = spikes.SpikeWatch(2.0)
    watch.resume(tmp_path / "m", 5)
    assert watch.usual == 4.0  # of 1, 2, 30, 4, 5


@pytest.mark.slow
def test_a_bad_loss_ends_the_run_where_that_is_the_policy(config, tmp_path):
    """Megatron's rerun machine repeats the step, saves and asks for another GPU."""
    run, codes = tmp_path / "run", []
    words = arguments(config, run, *SETTINGS)
    verdicts = []
    while not verdicts or verdicts[-1].verdict == "again":
        began = time.time()
        codes.append(faulty(words, tmp_path / "out", "nan", 6))
        verdicts.append(verdict(run, began, codes[-1]))
        assert len(codes) < 6
    assert set(codes) == {faults.EXIT_RERUN_ELSEWHERE}
    assert verdicts[-1].verdict == "give up"
    assert verdicts[-1].reason.startswith("3 attempts without a newer checkpoint; rank 0 on ")
    assert "a bad result came twice on this GPU" in verdicts[-1].reason
    # What the run had learned before is whole.
    assert sound.choose(run / "checkpoints").iteration == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.parametrize(
    "asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_full_disk_during_a_save(asynchronous, config, whole_run, tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    size = sum(p.stat().st_size for p in (whole_run / "checkpoints").rglob("*") if p.is_file()) // 3
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) // 4096 * 4}k", "none", folder]
    )
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        began = time.time()
        words = arguments(config, run, *SETTINGS, f"async-save={str(asynchronous).lower()}")
        code = launch(words, tmp_path / "out")
        attempt = verdict(run, began, code)
        assert code == 1 and attempt.verdict == "give up"
        assert "the disk is full" in attempt.reason
        assert sound.choose(folder).iteration == 4
        subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
        assert launch(words, tmp_path / "out") == 0
        assert records(run, "resume")[-1]["iteration"] == 4
        assert same(run, whole_run)
    finally:
        subprocess.run(["umount", folder], check=True)


# ---------------------------------------------------------------------------------- the supervisor


def script(tmp_path: Path, body: str) -> list[str]:
    """A command in place of a run; it knows RUN and counts its starts in N."""
    run = tmp_path / "run"
    text = f"""
RUN={run}; mkdir -p $RUN/checkpoints
N=$(cat $RUN/n 2>/dev/null || echo 0); N=$((N + 1)); echo $N > $RUN/n
note() {{ echo '{{"time":'$(date +%s.%N)',"rank":0,"node":"n","iteration":'$2',"code":'$1','$3'}}' \
  >> $RUN/faults.jsonl; }}
ended() {{ echo '{{"event":"exit","iteration":9,"time":'$(date +%s.%N)',"reason":"'$1'"}}' \
  >> $RUN/metrics.jsonl; }}
reached() {{ echo $1 > $RUN/checkpoints/latest_checkpointed_iteration.txt; }}
{body}
"""
    return ["bash", "-c", text]


def supervised(tmp_path: Path, body: str, attempts: int = 3):
    """(exit code, verdicts, times requeued) of a supervised script."""
    requeued = []
    supervisor = supervise.Supervisor(tmp_path / "run", script(tmp_path, body), attempts)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        code = supervisor.run(lambda: requeued.append(1))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, supervise.history(tmp_path / "run"), len(requeued)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(supervise, "PAUSE", 0.01)
    monkeypatch.setattr(supervise, "_LATE", 0.0)


def test_the_supervisor_needs_no_package():
    """It runs on the node itself, where the ranks' software may be in a container."""
    command = [sys.executable, "-S", "-E", str(ROOT / "launch" / "supervise.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--requeue" in result.stdout, result.stderr


def test_an_old_resiliency_extension_is_refused_with_a_sentence(monkeypatch):
    for found, refused in (("0.4.1", True), ("0.6.0", False), ("0.7.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        with pytest.raises(UserError, match="0.4.1") if refused else contextlib.nullcontext():
            check_resiliency()


def test_complete(tmp_path):
    code, history, requeued = supervised(tmp_path, "ended complete")
    assert (code, [a.verdict for a in history], requeued) == (0, ["complete"], 0)


def test_stopped_by_its_own_limit_goes_back_into_the_queue(tmp_path):
    code, history, requeued = supervised(tmp_path, "ended time_limit")
    assert (code, history[-1].verdict, requeued) == (0, "stopped", 1)


def test_bad_input_is_not_tried_again(tmp_path):
    """torchrun answers 1 whatever its ranks answer: the note has the code."""
    code, history, requeued = supervised(tmp_path, """note 2 null '"reason":"no data"'; exit 1""")
    assert (code, len(history), requeued) == (2, 1, 0) and history[0].reason == "no data"


def test_what_another_process_notes_in_the_folder_is_not_the_runs(tmp_path):
    """Somebody tried to start a second run there, and was refused."""
    foreign = """note 2 null '"reason":"taken","attempt":null'"""
    code, history, _ = supervised(tmp_path, f"{foreign}; ended complete")
    assert (code, history[-1].verdict) == (0, "complete")
    code, history, _ = supervised(tmp_path / "failed", f"{foreign}; exit 1", attempts=1)
    assert (code, history[-1].verdict) == (3, "give up")
    own = """note 2 null '"reason":"taken","attempt":"'$MHC_ATTEMPT'"'; exit 1"""
    code, history, _ = supervised(tmp_path / "own", own)
    assert (code, history[-1].reason) == (2, "taken")


@pytest.mark.parametrize(
    ("folder", "command", "said"),
    [("run", "no-such-command", "no-such-command: No such"), ("/proc/run", "true", "/proc/run: ")],
)
def test_what_cannot_be_started_is_a_sentence(folder, command, said, tmp_path):
    words = [sys.executable, str(ROOT / "launch" / "supervise.py"), "--run-dir", folder, "--"]
    result = subprocess.run([*words, command], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr == ""
    assert f"supervise: refuse: {said}" in result.stdout and result.stdout.count("\n") == 1


def test_a_full_disk_is_not_tried_again(tmp_path):
    body = """note 1 7 '"reason":"OSError","full_disk":true'; exit 1"""
    code, history, _ = supervised(tmp_path, body)
    assert (code, len(history)) == (3, 1) and "the disk is full" in history[0].reason


def test_three_attempts_without_a_newer_checkpoint(tmp_path):
    code, history, requeued = supervised(tmp_path, "reached 5; kill -9 $$")
    # The first reached a checkpoint; the next three did not get further.
    assert (code, len(history), requeued) == (3, 4, 0)
    assert history[-1].reason.startswith("3 attempts without a newer checkpoint; the launcher was")


def test_progress_starts_the_count_anew(tmp_path):
    body = "reached $((N / 2)); if [ $N = 9 ]; then ended complete; else exit 1; fi"
    code, history, _ = supervised(tmp_path, body)
    assert (code, len(history)) == (0, 9)


def test_a_bad_iteration_is_left_out_after_the_second_time(tmp_path):
    body = """if grep -q 7 $RUN/skip-iterations.json; then ended complete; else
note 1 7 '"reason":"nan","bad_result":true,"skip":true'; exit 1; fi"""
    code, history, _ = supervised(tmp_path, body)
    assert (code, len(history)) == (0, 3)
    assert "iteration 7 was bad twice: it is left out" in history[1].reason


def test_a_bad_iteration_is_not_left_out_where_that_is_not_the_policy(tmp_path):
    body = """note 1 7 '"reason":"nan","bad_result":true'; exit 1"""
    code, history, _ = supervised(tmp_path, body)
    assert (code, len(history)) == (3, 3) and "3 attempts" in history[-1].reason
    assert faults.skipped_iterations(str(tmp_path / "run")) == []


def test_a_spike_that_is_to_stop_the_run_is_not_tried_again(tmp_path):
    body = """note 1 7 '"reason":"a spike","bad_result":true,"stop":true'; exit 1"""
    code, history, requeued = supervised(tmp_path, body)
    assert (code, len(history), requeued) == (3, 1, 0) and "a spike" in history[0].reason


def test_a_run_that_does_not_say_how_it_ended_is_not_complete(tmp_path):
    code, history, _ = supervised(tmp_path, "exit 0")
    assert code == 3 and "did not say how" in history[-1].reason


def test_asked_to_stop_while_waiting_for_the_next_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "PAUSE", 30.0)

    def stop() -> None:
        while len(supervise.history(tmp_path / "run")) < 2:  # no pause before the second attempt
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=stop, daemon=True).start()
    code, history, requeued = supervised(tmp_path, "exit 1", attempts=9)
    assert (code, requeued) == (0, 1) and {a.verdict for a in history} == {"again"}


def test_a_history_that_was_cut_short_is_read(tmp_path):
    supervised(tmp_path, "ended complete")
    with open(tmp_path / "run" / supervise.LOG_FILE, "a") as f:
        f.write('{"began": 1.0, "en')
    assert len(supervise.history(tmp_path / "run")) == 1


def test_the_writers_manager_ends_with_its_rank(tmp_path):
    """A process that has started it is killed: the manager goes too."""
    program = f"""
import multiprocessing, os, sys
sys.path[:0] = [{str(ROOT)!r}]
from mhc_megatron import faults
if __name__ == "__main__":
    faults.hold_stop_signal()
    manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=faults._end_with_parent)
    os.write(1, f"{{manager._process.pid}}\\n".encode())
    input()
"""
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    manager = int(process.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # to all, not for it
        os.kill(manager, number)
    time.sleep(0.3)
    assert Path(f"/proc/{manager}").exists()
    process.kill()
    process.wait()
    end = time.time() + 10
    while Path(f"/proc/{manager}").exists() and time.time() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{manager}").exists()


def test_the_writers_manager_stays_small():
    """It keeps results of saves, and imports nothing for them."""
    manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
    with manager:
        queue = faults._PackedQueue(manager.Queue())
        queue.put({"a result": torch.float32})
        assert "libtorch" not in Path(f"/proc/{manager._process.pid}/maps").read_text()
        assert queue.get_nowait() == {"a result": torch.float32}
        with pytest.raises(Empty):
            queue.get_nowait()


def test_notes_are_read_back_in_order_and_cut_ones_left_out(tmp_path):
    faults.note(str(tmp_path), 1, "first\nline", 3)
    faults.note(str(tmp_path), 2, "second", None, full_disk=True)
    with open(tmp_path / faults.FAULTS_FILE, "a") as f:
        f.write(json.dumps({"time": 1})[:-3])
    faults.note(str(tmp_path), 3, "third", 4)
    found = faults.read(str(tmp_path))
    assert [(r["code"], r["reason"], r["iteration"]) for r in found] == [
        (1, "first line", 3),
        (2, "second", None),
        (3, "third", 4),
    ]
    assert faults.read(str(tmp_path), since=time.time() + 1) == []


def test_stacks_on_request(tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from mhc_megatron import faults
def here():
    os.kill(os.getpid(), signal.SIGUSR2)
faults.dump_stacks_when_asked()
here()
print("goes on")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "goes on\n" and "in here" in result.stderr


def test_a_stop_signal_that_comes_early_waits_and_children_do_not_die_of_it():
    program = f"""
import os, signal, subprocess, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from mhc_megatron import faults
faults.hold_stop_signal()
os.kill(os.getpid(), signal.SIGUSR1)
child = subprocess.Popen(["sleep", "30"])
child.send_signal(signal.SIGUSR1)
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
faults.stop_when_asked()
time.sleep(0.5)
print(child.poll())
child.kill()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["asked to stop", "None"], result.stderr


def test_workers_that_heed_no_signal_do_not_hold_up_the_exit():
    program = f"""
import multiprocessing, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from mhc_megatron import faults

def work(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(60)

context = multiprocessing.get_context("fork")
ready = context.Event()
faults.end_workers_at_exit()
context.Process(target=work, args=(ready,), daemon=True).start()
ready.wait()
sys.exit(3)
"""
    result = subprocess.run([sys.executable, "-c", program], timeout=30)
    assert result.returncode == 3
