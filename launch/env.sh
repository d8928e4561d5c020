# Environment of a training job, to be sourced:  source launch/env.sh h100|h800|h200|cpu
#
# Each variable has its reason; what is set already (a site file, a shell) stays. What belongs to one
# cluster's network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_GID_INDEX ...) belongs into its site
# file. CUDA_DEVICE_MAX_CONNECTIONS depends on the configuration: launch/submit.py sets it.

set_default() { [ -n "${!1+set}" ] || export "$1=$2"; }

# Compute nodes often cannot reach the internet: `wandb sync RUN/wandb/...` from the login node.
set_default WANDB_MODE offline
# A rank's CPU work (data, host side of the launches) is serial; torchrun would set this, srun not.
set_default OMP_NUM_THREADS 1
# Threads that wait for each other by spinning take the cores of the ranks.
set_default OMP_WAIT_POLICY PASSIVE
# What is printed is in the log when the process dies.
set_default PYTHONUNBUFFERED 1

gpu_defaults() {
    # Segments that grow: activations of changing sizes (MoE) do not fragment the memory. Not with
    # NCCL's user buffers (nccl-ub), which need the classic allocator.
    set_default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
    # An operation that hangs is aborted after --distributed-timeout-minutes, and every rank dumps
    # what it was waiting for: the last 2000 collectives, with the calls they came from.
    set_default TORCH_NCCL_ASYNC_ERROR_HANDLING 1
    set_default TORCH_NCCL_DUMP_ON_TIMEOUT 1
    set_default TORCH_FR_BUFFER_SIZE 2000
    # NVLink SHARP sums in the switch; it takes memory for each communicator, of which a layout in
    # five dimensions has many. Worth trying where data parallelism stays within NVLink.
    set_default NCCL_NVLS_ENABLE 0
    # One line per communicator problem, no more; INFO is for a first run (docs/cluster.md).
    set_default NCCL_DEBUG WARN
    # InfiniBand: a link that flaps is retried for two minutes (4.096 us * 2^22 * 7) before the job
    # dies of it; NCCL's default, 20, gives up after 30 seconds.
    set_default NCCL_IB_TIMEOUT 22
    set_default NCCL_IB_RETRY_CNT 7
    # Triton and Inductor compile on every rank: into the node's own disk, not into a shared home.
    set_default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/triton-${USER:-$UID}"
    set_default TORCHINDUCTOR_CACHE_DIR "${TMPDIR:-/tmp}/inductor-${USER:-$UID}"
    # Layer norms beside communication: TE's persistent kernels leave it these multiprocessors.
    set_default NVTE_FWD_LAYERNORM_SM_MARGIN 16
    set_default NVTE_BWD_LAYERNORM_SM_MARGIN 16
}

case ${1:-} in
# The H800 is an H100 with NVLink at 400 instead of 900 GB/s: nothing to set, but tensor parallelism
# costs twice as much (docs/cluster.md). The H200 has more memory: less recompute, in the config.
h100 | h800 | h200)
    gpu_defaults
    ;;
cpu)
    # Megatron's CPU mode (mhc_megatron/cpu.py): functions under torch.compile run as they are.
    set_default TORCHDYNAMO_DISABLE 1
    ;;
*)
    echo "env.sh: the profile is h100, h800, h200 or cpu, not '${1:-}'" >&2
    return 2 2>/dev/null || exit 2
    ;;
esac
unset -f set_default gpu_defaults
