# Read by the batch script of every job before srun, with the folder of the sweep's logs (slurm.yaml, setup).
logs=$1

# The job finds the code from wherever it was submitted.
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"

# Cores of one task. Since SLURM 22.05 srun does not take them over from sbatch.
if [ -n "$SLURM_CPUS_PER_TASK" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
fi
export BUDGETED_BAR=0

# A worker that was killed, by kill -9 or for memory: the same job goes on from its checkpoint, three times at most. One
# that was told to stop by other than its own signal, as a preemption does where SLURM is not set to send that, has
# saved and may come back as often as it is told. An error of Python's ends in less than 128, and would only come
# again. A job that SLURM has cancelled or requeued itself is not running any more.
go_on_if_killed() {
  local code=$? count="$logs/$SLURM_JOB_ID.killed"
  [ "$code" -ge 128 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || return 0
  if [ "$code" -ne $((128 + 15)) ]; then
    echo "$(date -u +%FT%TZ) srun ended with $code" >>"$count"
    [ "$(wc -l <"$count")" -le 3 ] || return 0
  fi
  scontrol requeue "$SLURM_JOB_ID"
}
trap go_on_if_killed EXIT
