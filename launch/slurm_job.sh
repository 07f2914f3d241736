#!/usr/bin/env bash
# The batch script of slurm.sh, on the first host of the allocation: slurm_job.sh FOLDER CODE COMMAND...
#
# One task a host, as on TPUs: one process feeds all devices of its host, and a supervisor restarts it.
# It ends with the job's exit status, or asks for the job to be queued again where that is 75 (saved,
# start me again) and nobody else has decided: before the time limit, Slurm sends SIGTERM here.
set -euo pipefail

folder=$1 code=$2
shift 2
step=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL)
# Hosts leave one after the other when they have saved: none may be killed for being the second.
step+=(--kill-on-bad-exit=0 --wait="${STOP_SECONDS:-900}")
step+=(--output="$folder/logs/%N.log" --open-mode=append)
if [[ ${CONTAINER:-none} == pyxis ]]; then
  step+=(--container-image="$IMAGE" --container-mounts="$folder:$folder" --container-workdir="$code")
elif [[ ${CONTAINER:-none} == apptainer ]]; then
  step+=(apptainer exec --nv --bind "$folder" --pwd "$code" "$IMAGE")
fi
# jax gives a Slurm task one GPU, unless it is told that they are all its own.
if [[ ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

cd "$code"
restarts=${SLURM_RESTART_COUNT:-0}
echo "== $(date -u +%FT%TZ) job $SLURM_JOB_ID, restart $restarts, on $SLURM_JOB_NODELIST: $*"
"${step[@]}" "$@" &
running=$!
trap 'echo "SIGTERM: the job saves"; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' TERM
status=0
while true; do
  status=0
  wait "$running" || status=$?
  # A signal that was caught also ends `wait`.
  kill -0 "$running" 2>/dev/null || break
done
echo "the job ended with status $status"

# patiently COMMAND...: until it succeeds, for about a minute: a busy Slurm answers some time.
patiently() {
  local try
  for ((try = 1; ; try++)); do
    "$@" && return
    ((try < 12)) || return 1
    echo "$1 failed; asking again (try $try of 12)" >&2
    sleep "${RETRY_SECONDS:-5}"
  done
}

if [[ $status == 75 && ! -e $folder/stop ]] && ((restarts < ${MAX_REQUEUES:-100})); then
  # Where it was cancelled, or Slurm has queued it again already, it is not RUNNING any more.
  state=$(patiently squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=unknown
  if [[ $state == RUNNING ]]; then
    echo "queued again"
    patiently scontrol requeue "$SLURM_JOB_ID" || echo "NOT queued again: scontrol failed"
  elif [[ $state == unknown ]]; then
    # A job that was cancelled would come back.
    echo "NOT queued again, for squeue did not say whether it was cancelled; submit it again"
  fi
fi
exit "$status"
