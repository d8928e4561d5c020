#!/bin/bash
# One task of a job step: the ranks of a node (torchrun) or one rank (srun).
#
#   srun ... bash launch/slurm/task.sh torchrun|srun PYTHON SCRIPT ARGUMENTS...
#
# The signals that mean "save and end" are ignored here, and so in torchrun, which would end the
# ranks 30 seconds after it heard one; a rank takes them back for itself (mhc_megatron/faults.py).
set -uo pipefail
trap '' USR1 USR2 TERM

launcher=$1 python=$2
shift 2
case $launcher in
torchrun)
    exec "$python" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --nproc-per-node "${RANKS_PER_NODE:?}" --max-restarts 0 \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --signals-to-handle SIGINT,SIGHUP,SIGQUIT "$@"
    ;;
srun)
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "$python" "$@"
    ;;
*)
    echo "task.sh: the launcher is torchrun or srun, not $launcher" >&2
    exit 2
    ;;
esac
