#!/usr/bin/env bash
# sbatch --nodes=2 examples/launch/slurm_srun.sh ppo --config run.yaml [name=value ...]
# One task a GPU, which srun starts: a task is a rank. README.md beside this file starts from a fresh account.
#SBATCH --job-name=megarlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --dependency=singleton
#SBATCH --output=%x_%j.log
# --signal: five minutes before the limit the ranks save and end with 75, and the job is queued again below.
# --requeue: so is one whose node dies. --dependency: of jobs with one name and user one runs at a time, so that a chain
# can be submitted at once. Any of them is overridden on sbatch's command line.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch [--nodes=N] slurm_srun.sh COMMAND --config FILE [name=value ...]" >&2; exit 2; }

# What an MPI in an image would take for its own start.
for name in "${!PMI_@}" "${!PMIX_@}" "${!OMPI_@}"; do unset "$name"; done
# Ranks would find the same by themselves; said here so that the log has it.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# CONTAINER_IMAGE=/images/megarlhf.sqsh CONTAINER_MOUNTS=/data:/data sbatch ... runs in an image, by Pyxis.
container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD" --no-container-mount-home
    --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi

logs=${LOGS:-logs}/$SLURM_JOB_ID
mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
  "rank 0 on $MASTER_ADDR:$MASTER_PORT, logs in $logs/rank_N.log"

# --wait: where a rank dies, the others end two minutes later, and not when their collectives time out.
code=0
srun --mpi=none --wait=120 --open-mode=append --output="$logs/rank_%t.log" "${container[@]}" \
  "${PYTHON:-python}" -m megarlhf.cli "$@" || code=$?
if [ "$code" -eq 75 ]; then
  echo "stopped after a saved step; queued again"
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -ne 0 ] && ! timeout 60 srun --mpi=none --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true; then
  # The ranks of the other nodes end long before Slurm sees that one is gone, and it would call that a job that failed.
  echo "a node does not answer; Slurm queues the job again once it has noticed (SlurmdTimeout)"
  sleep 900
fi
exit "$code"
