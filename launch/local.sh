#!/usr/bin/env bash
# N processes on this machine train together, and are started again after every fault:
#   launch/local.sh -n 4 [-- options of launch.supervise] -- --config=configs/smoke.py --workdir=runs/smoke
# One mesh lies over the devices of all; on a CPU each process is one device (--config.mesh.fsdp=4).
# PYTHON is the interpreter (.venv/bin/python where there is one), JAX_PLATFORMS=cpu unless it is set.
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0"; }

misuse() {
  printf 'error: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

count=
while (($#)); do
  case $1 in
    -n)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || misuse "-n ${2:-}: how many processes? a whole number of at least 1"
      count=$2
      shift 2
      ;;
    --) shift; break ;;
    --help | -h) usage; exit ;;
    *) misuse "$1: what launch.train gets comes after --, and before it only -n" ;;
  esac
done
[[ $count ]] || misuse "-n is missing: how many processes?"

supervise=() train=("$@")
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == -- ]]; then
    supervise=("${@:1:i-1}")
    train=("${@:i+1}")
    break
  fi
done
where=() # the supervisor looks where the processes write
for argument in "${train[@]}"; do
  [[ $argument == --workdir=* || $argument == --local_workdir=* ]] && where+=("$argument")
done
if [[ " ${where[*]}" != *" --workdir="?* ]]; then
  echo "error: --workdir=FOLDER is not given" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$root/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$PYTHON" -m launch.supervise "${where[@]}" "${supervise[@]}" -- \
  "$PYTHON" -m launch.local --processes="$count" -- "$PYTHON" -m launch.train "${train[@]}"
