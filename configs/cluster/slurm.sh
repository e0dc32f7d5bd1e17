#!/bin/bash
# A run on two nodes of eight GPUs under SLURM: sbatch configs/cluster/slurm.sh configs/qwen3_4b_multihop.yaml KEY=VALUE ...
# Ten minutes before the limit the run saves and stops; the job then queues itself again and continues.
#SBATCH --job-name=atpo-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
config=$1
shift
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export config master
srun --kill-on-bad-exit=1 bash -c 'exec atpo-fast train --config "$config" --nodes "$SLURM_NNODES" \
    --node-rank "$SLURM_NODEID" --master "$master:29500" "$@"' atpo-fast "$@"
code=$?
if [ "$code" -eq 143 ]; then # asked to stop, and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
