"""launch/submit.py without a Slurm: what is rendered, what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cluster, submit, sweep
from launch.settings import load
from mhc_megatron.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ["--config", str(ROOT / "configs" / "mhc-27b.yaml"), "--profile", "h800"]


def rendered(capsys, *words: str, after: list[str] | None = None) -> str:
    code = submit.main([*words, "--dry-run", *(["--", *after] if after else [])])
    assert code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def site(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return ["--site", str(path)]


def refused(capsys, *words: str) -> str:
    assert submit.main([*words, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def is_bash(script: str) -> bool:
    assert "\nexec " in script and "\nsource launch/env.sh " in script
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_27b_on_32_nodes(capsys, tmp_path):
    script = rendered(capsys, *PROGRAM, "--nodes", "32", *site(tmp_path, "{}"))
    assert is_bash(script)
    for line in (
        "#SBATCH --nodes=32",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --dependency=singleton",
        "source launch/env.sh h800",
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        "export RANKS_PER_NODE=8",
    ):
        assert line in script.splitlines()
    assert "task.sh torchrun .venv/bin/python" in script
    assert "--container" not in script and "module load" not in script


def test_all_to_all_overlap_gets_several_queues(capsys, tmp_path):
    words = [*PROGRAM, "--nodes", "32", *site(tmp_path, "{}")]
    script = rendered(capsys, *words, "--set", "overlap-moe-expert-parallel-comm=true")
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=32" in script.splitlines()


def test_everything_a_site_may_ask_for(capsys, tmp_path):
    text = """
account: proj
partition: big
qos: high
sbatch: ["--constraint=h800"]
gpus-per-node: 4
gpu-request: "--gres=gpu:h800:{gpus}"
cpus-per-gpu: 10
launcher: srun
srun: ["--mpi=none"]
python: /opt/venv/bin/python
modules: [cuda/13.0]
setup: ["ulimit -l unlimited"]
container: {image: /img/torch.sqsh, mounts: ["/data:/data"], options: ["--no-container-mount-home"]}
env: {NCCL_IB_GID_INDEX: 3, QUOTED: "a b"}
"""
    script = rendered(capsys, *PROGRAM, "--nodes", "32", *site(tmp_path, text))
    assert is_bash(script)
    for line in (
        "#SBATCH --account=proj",
        "#SBATCH --partition=big",
        "#SBATCH --qos=high",
        "#SBATCH --constraint=h800",
        "#SBATCH --gres=gpu:h800:4",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=10",
        "module load cuda/13.0 || exit 2",
        "ulimit -l unlimited",
        "export NCCL_IB_GID_INDEX=3",
        "export QUOTED='a b'",
    ):
        assert line in script.splitlines()
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in script
    assert "--mpi=none" in script and "task.sh srun /opt/venv/bin/python" in script


def test_the_example_site_file_is_the_defaults():
    example = cluster.load_site(str(ROOT / "launch" / "slurm" / "site.example.yaml"))
    assert example == cluster.Site()


def test_changes_with_spaces_and_quotes_arrive(capsys, tmp_path):
    change = "run.name=it's a name"
    script = rendered(
        capsys, *PROGRAM, "--nodes", "32", "--set", change, *site(tmp_path, "{}")
    )
    words = subprocess.run(
        ["bash", "-c", script[script.index("exec ") :].replace("exec ", "printf '%s\\n' ", 1)],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[words.index("--set") + 1] == change


def test_the_header_is_quoted_as_sbatch_reads_it(capsys, tmp_path):
    folder = tmp_path / 'my "runs" #1' / "90%"
    words = [*PROGRAM, "--nodes", "32", "--run-dir", str(folder), "--set", "run.name=my run"]
    lines = rendered(capsys, *words, *site(tmp_path, "{}")).splitlines()
    assert '#SBATCH --job-name="my run"' in lines
    quoted = f'{tmp_path}/my \\"runs\\" #1/90%%/logs/slurm-%j.out'
    assert f'#SBATCH --output="{quoted}"' in lines


def test_sweep_and_conversion(capsys, tmp_path):
    example = str(ROOT / "launch" / "slurm" / "sweep.example.yaml")
    script = rendered(
        capsys, "--sweep", example, "--nodes", "2", "--profile", "h100", *site(tmp_path, "{}")
    )
    assert is_bash(script) and "launch/sweep.py" in script and "--world 16" in script
    words = ["verify", "runs/a b/checkpoints"]
    script = rendered(
        capsys, "--profile", "h100", "--convert", *site(tmp_path, "{}"), after=words
    )
    assert is_bash(script) and "convert_checkpoint.py verify 'runs/a b/checkpoints'" in script
    assert "--gpus-per-node" not in script


def test_a_conversion_s_relative_paths_are_of_where_it_runs(capsys, tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--profile", "h100", "--dry-run", "--convert", *site(tmp_path, "{}"), "--", "verify"]
    assert submit.main([*words, "checkpoint"]) == 2
    assert "give --convert absolute paths" in capsys.readouterr().err
    assert submit.main([*words, str(tmp_path / "checkpoint")]) == 0


def test_the_environment_needs_no_user():
    """Under ``set -u``, as the job's script is; a container may not say who runs it."""
    command = ["env", "-u", "USER", "bash", "-uc", "source launch/env.sh h100; echo on"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "on\n" and result.stderr == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "3"], "24 ranks cannot hold expert 8 x expert-tensor 1 x pipeline 4"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--nodes", "32", "--set", "global-batch-size=1279"], "a global batch of 1279"),
        (["--nodes", "32", "--set", "tensor-model-parallel-size=7"], "tensor 7 x pipeline 4"),
        (
            ["--nodes", "32", "--set", "tensor-model-parallel-size=two"],
            "tensor-model-parallel-size must be a whole number, at least 1, not 'two'",
        ),
        (["--nodes", "32", "--run-dir", "a\nb"], "that a job script's header cannot hold"),
        (["--nodes", "32", "--site", "no/such.yaml"], "cannot read the site file no/such.yaml"),
    ],
)
def test_refusals(words, sentence, capsys):
    assert sentence in refused(capsys, *PROGRAM, *words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("acount: x", "unknown key 'acount'; did you mean 'account'"),
        ("gpus-per-node: eight", "gpus-per-node must be int"),
        ("launcher: mpirun", "launcher must be torchrun or srun"),
        ("modules: cuda", "modules must be list"),
        ("container: {imag: x}", "container: unknown key 'imag'"),
        ("env: {'A B': x}", "env must be dict"),
        ("gpu-request: '--gres=gpu:{type}:{gpus}'", "gpu-request may name {gpus} only"),
        ("gpu-request: '--gres=gpu:{gpus'", "gpu-request may name {gpus} only"),
        ("stop-seconds: 0", "stop-seconds is too small"),
        ("a: [", "not valid YAML"),
        ("a: 2026-13-45", "not valid YAML"),
    ],
)
def test_bad_site_files(text, sentence, capsys, tmp_path):
    assert sentence in refused(capsys, *PROGRAM, "--nodes", "32", *site(tmp_path, text))


def test_no_sbatch_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [*PROGRAM, "--nodes", "32", "--run-dir", str(tmp_path / "run")]
    assert submit.main([*words, *site(tmp_path, "{}")]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def environment(profile: str, **given: str) -> dict[str, str]:
    """What launch/env.sh leaves behind."""
    result = subprocess.run(
        ["bash", "-c", f"set -u; USER=me; source '{ROOT}/launch/env.sh' {profile} && env -0"],
        env={"PATH": os.environ["PATH"], **given}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if "=" in line)


def test_environment_of_each_profile():
    assert environment("h100")["NCCL_IB_TIMEOUT"] == "22"
    assert environment("h800", NCCL_IB_TIMEOUT="18")["NCCL_IB_TIMEOUT"] == "18"
    assert "NCCL_DEBUG" not in environment("cpu")
    command = f"source '{ROOT}/launch/env.sh' v100"
    wrong = subprocess.run(["bash", "-c", command], capture_output=True)
    assert wrong.returncode == 2


def test_each_variable_of_the_environment_has_its_reason():
    lines = (ROOT / "launch" / "env.sh").read_text().splitlines()
    variables = [i for i, line in enumerate(lines) if line.strip().startswith("set_default ")]
    assert len(variables) > 15
    for i in variables:
        while lines[i].strip().startswith("set_default "):  # a pair may share one
            i -= 1
        assert lines[i].strip().startswith("# "), lines[i + 1]


def test_layout_of_every_configuration_fits_the_gpus_it_names():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        settings = load(str(path))
        cluster.check_layout(settings, settings.run.gpus or 1)


# ---------------------------------------------------------------------------------------- sweeps

SWEEP = """
command: [bash, -c, 'echo "$@" > {{out}}/said; {body}', bash, "{{set}}"]
minutes: {minutes}
set: {{a: 1}}
grid: {{b: [1, 2]}}
points:
  x: {{c: text}}
  y: {{a: null}}
"""


def sweep_file(tmp_path: Path, body: str = "true", minutes: float = 1) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(body=body, minutes=minutes))
    return str(path)


def test_sweep_runs_every_point_once(tmp_path, capfd):
    path, out = sweep_file(tmp_path), tmp_path / "out"
    assert sweep.main([path, "--out", str(out), "--", "env", "X=1"]) == 0
    assert (out / "x-b=2" / "said").read_text() == '--set a=1 --set c="text" --set b=2\n'
    assert (out / "y-b=1" / "said").read_text() == "--set a=null --set b=1\n"
    assert sweep.main([path, "--out", str(out)]) == 0
    assert capfd.readouterr().out.count("measured already") == 4


def test_a_failing_point_does_not_keep_the_next_from_its_turn(tmp_path, capfd):
    path, out = sweep_file(tmp_path, 'case "$*" in *text*) exit 7;; esac'), tmp_path / "out"
    assert sweep.main([path, "--out", str(out)]) == 1
    said = capfd.readouterr().out
    assert said.count("failed with code 7") == 2 and said.count("done") == 2


def test_a_point_that_takes_too_long_is_ended(tmp_path, capfd):
    path, out = sweep_file(tmp_path, "sleep 100", minutes=0.003), tmp_path / "out"
    assert sweep.main([path, "--out", str(out)]) == 1
    assert capfd.readouterr().out.count("failed with code 124") == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_sweep_and_its_run(number, tmp_path):
    path, out = sweep_file(tmp_path, "echo $$ > {out}/pid; exec sleep 100"), tmp_path / "out"
    # A shell's background job has SIGINT ignored, and so would what it starts.
    words = ["env", "--default-signal", sys.executable, str(ROOT / "launch" / "sweep.py")]
    words += [path, "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = out / "x-b=1" / "pid"
    until = time.time() + 60
    while not (pid.exists() and pid.read_text().strip()) and time.time() < until:
        time.sleep(0.05)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == ""
    assert said == "x-b=1: stopped; the next job goes on from here\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (out / "x-b=1" / "point.json").exists()


def test_a_command_that_is_not_there_is_one_sentence(tmp_path, capsys):
    path = sweep_file(tmp_path)
    assert sweep.main([path, "--out", str(tmp_path / "out"), "--", "no-such-launcher"]) == 2
    said = "error: cannot start no-such-launcher: No such file or directory.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("command: x", "command must be a list"),
        ("command: [x]\nponts: {}", "unknown key 'ponts'"),
        ("command: [x]\ngrid: {a: 1}", "grid must hold a list"),
        ("[]", "must hold keys and values"),
        ("command: [x]\nname: 2026-13-45", "not valid YAML"),
        ("command: [x]\npoints: {a: 1}", "every point must hold"),
        ("command: [x]\nminutes: .inf", "minutes must be a number above 0, not inf"),
    ],
)
def test_bad_sweeps(text, sentence, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        sweep.read(str(tmp_path / "s.yaml"))
