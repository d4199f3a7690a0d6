#!/usr/bin/env bash
# The whole run as one Slurm job: Ray starts on every node of it, the run on the first, and all ends with the run. Submitted again, it goes on.
#   sbatch run.sh [section.key=value ...]
#SBATCH --job-name=mixtral-8x7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=88
#SBATCH --gpus-per-node=8
#SBATCH --mem=160G
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# The token is a file that only you can read, in the home that all nodes share. It stands in no argument, log or file of the run.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  (umask 077 && mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")" && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"

export HF_HOME="${HF_HOME:-/shared/hub}"
run=/shared/inputs/mixtral-8x7b.yaml  # the run.yaml that came with this file
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes%%$'\n'*}" hostname --ip-address)
address=${address%% *}
port=$((20000 + SLURM_JOB_ID % 10000))  # two jobs of one person do not meet

# On each node the same command: the first starts Ray's head and, when all have come, the run, which RAY_ADDRESS leads to it; the others join and wait.
# The dashboard listens on the first node's loopback alone, where Ray puts it.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # which srun does not take from the job since Slurm 22.05
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus=8 -- \
  env RAY_ADDRESS="$address:$port" pi-ray run "$run" "$@"
