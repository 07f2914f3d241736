#!/usr/bin/env bash
# A job on a Slurm cluster, from a login node: see `launch/slurm.sh --help`.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
SETTINGS="
env_file $HERE/slurm.env settings as KEY=value lines; flags win
name - of the job; one of a name is queued or runs at a time
folder - on a file system that all hosts share: code, environment and logs
workdir - where checkpoints and metrics go; else FOLDER/workdir
nodes 1 hosts, with one task each
gpus_per_node 0 0: a cluster of CPUs
cpus_per_task 0 0: what the cluster gives
time - limit, such as 1-00:00:00; at its end the job is queued again
partition - of the cluster
account - to be charged
extra cuda which jax: cuda or cpu
container none pyxis or apptainer: what starts the image
image - of the container; its python3 has the dependencies
max_restarts 20 of the job on a host, by its supervisor
backoff_seconds 10 between these
max_requeues 100 how often the job is queued again
stop_seconds 900 for saving, before the time limit and in stop
poll_seconds 5 between looks
lines 50 logs: the last so many of each host
follow false logs: go on as lines come
allow_dirty false submit a checkout with changes, as commit and patch
dry_run false print every command and run none
sbatch_flags - more flags of sbatch, such as --qos=long --exclusive
"

usage() {
  cat <<TEXT
launch/slurm.sh COMMAND [--SETTING=VALUE ...] [-- arguments of launch.train]

  submit    puts this checkout's commit and the locked dependencies into FOLDER, and queues the job;
            where it is queued or running already, nothing
  status    of the job, and the last step of every host
  logs      of every host, with its name before each line; --follow
  stop      SIGTERM to the job, which saves and leaves, and is not queued again

Settings (in an env file: NAME=value):
$(settings_help)
TEXT
}

# shellcheck source=launch/settings.sh
source "$HERE/settings.sh"
# shellcheck source=launch/ship.sh
source "$HERE/ship.sh"

# call WORD...: runs it, or prints it.
call() { if is_on dry_run; then quoted "$@"; else "$@"; fi; }

job_ids() { squeue --noheader --me --name="${setting[name]}" --format=%i; }

submit() {
  local version folder=${setting[folder]} code package workdir python=.venv/bin/python line ids
  check_job
  if ! is_on dry_run; then
    ids=$(job_ids)
    if [[ $ids ]]; then
      say "${setting[name]} is queued or running already: job $ids"
      return
    fi
  fi
  version=$(code_version)
  code=$folder/code-${version:0:12}${version:40}
  workdir=${setting[workdir]:-$folder/workdir}
  call mkdir -p "$folder/logs"
  call rm -f "$folder/stop"
  if [[ ! -e $code/.venv/complete && ${setting[container]} == none || ! -d $code ]]; then
    package=$folder/package-${version:0:12}
    pack_code "$version" "$package"
    call rm -rf "$code.new"
    call mkdir -p "$code.new"
    call tar -xzf "$package/code.tar.gz" -C "$code.new"
    call rm -rf "$package" "$code"
    call mv "$code.new" "$code"
  fi
  if [[ ${setting[container]} == none ]]; then
    call bash "$code/launch/environment.sh" "${setting[extra]}"
  else
    python=python3
  fi
  line=(sbatch --parsable "--job-name=${setting[name]}" "--nodes=${setting[nodes]}")
  line+=(--ntasks-per-node=1)
  if ((setting[gpus_per_node])); then line+=("--gpus-per-node=${setting[gpus_per_node]}"); fi
  if ((setting[cpus_per_task])); then line+=("--cpus-per-task=${setting[cpus_per_task]}"); fi
  local name more=()
  for name in time partition account; do
    if [[ ${setting[$name]} ]]; then line+=("--$name=${setting[$name]}"); fi
  done
  read -ra more <<<"${setting[sbatch_flags]}"
  line+=(--requeue "--signal=B:TERM@${setting[stop_seconds]}")
  line+=(--open-mode=append "--output=$folder/logs/batch.out")
  line+=("--export=$(exported)" "${more[@]}" "$code/launch/slurm_job.sh" "$folder" "$code")
  line+=("$python" -m launch.supervise "--max_restarts=${setting[max_restarts]}")
  line+=("--backoff_seconds=${setting[backoff_seconds]}" "--workdir=$workdir")
  line+=(-- "$python" -m launch.train "--workdir=$workdir" "${job[@]}")
  if is_on dry_run; then
    quoted "${line[@]}"
  else
    say "job $("${line[@]}"); logs in $folder/logs, checkpoints in $workdir"
  fi
}

# What the batch script reads from its environment.
exported() {
  local values=ALL,CONTAINER=${setting[container]},IMAGE=${setting[image]}
  echo "$values,STOP_SECONDS=${setting[stop_seconds]},MAX_REQUEUES=${setting[max_requeues]}"
}

check_job() {
  need_job
  case ${setting[container]} in
    none) [[ ! ${setting[image]} ]] || misuse "--image needs --container=pyxis or apptainer" ;;
    pyxis | apptainer) need image ;;
    *) misuse "--container=${setting[container]} is none of none, pyxis, apptainer" ;;
  esac
  [[ ${setting[folder]} == /* ]] || misuse "--folder=${setting[folder]} is not an absolute path"
  [[ ${setting[workdir]:-/} == /* || ${setting[workdir]} == *://* ]] ||
    misuse "--workdir=${setting[workdir]} is neither an absolute path nor a URL"
  [[ ${setting[image]} != *,* ]] || misuse "--image=${setting[image]} has a comma in it"
}

status() {
  local file
  call squeue --me "--name=${setting[name]}" "--format=%.12i %.12T %.20S %.6D %R"
  for file in "${setting[folder]}"/logs/*.log; do
    [[ -e $file ]] || continue
    echo "$(basename "$file" .log)" \
      "$(tail -n 500 "$file" | grep -oE 'step +[0-9]+/[0-9]+' | tail -n 1 | tr -s ' ')"
  done
}

logs() {
  local file each=() follow=()
  if is_on follow; then follow=(-F); fi
  set -m # each with a process group, or Ctrl-C would leave tail running
  for file in "${setting[folder]}"/logs/*.log; do
    [[ -e $file ]] || die "no logs in ${setting[folder]}/logs yet"
    tail -n "${setting[lines]}" "${follow[@]}" "$file" | sed -u "s#^#$(basename "$file" .log) | #" &
    each+=("$!")
  done
  # shellcheck disable=SC2064
  trap "kill -- ${each[*]/#/-} 2>/dev/null || true" INT TERM
  wait "${each[@]}"
}

stop() {
  local ids id state end=$((SECONDS + setting[stop_seconds]))
  if is_on dry_run; then
    call touch "${setting[folder]}/stop"
    call squeue --noheader --me "--name=${setting[name]}" --format=%i
    echo "scancel --signal=TERM JOB.0, then as long as it is there: squeue"
    return
  fi
  touch "${setting[folder]}/stop"
  ids=$(job_ids)
  for id in $ids; do
    # Taken for one that waits, a running job would be ended without saving.
    state=$(squeue --noheader --jobs="$id" --format=%T) ||
      die "squeue does not say whether job $id runs; nothing was sent to it, stop again"
    if [[ $state == RUNNING ]]; then
      scancel --signal=TERM "$id.0"
    else
      scancel "$id"
    fi
  done
  while true; do
    # Where nobody answers it is there as before.
    if state=$(job_ids); then ids=$state; else say "squeue does not answer"; fi
    [[ $ids ]] || break
    ((SECONDS < end)) ||
      die "job $ids still runs ${setting[stop_seconds]} s after SIGTERM; scancel ends it"
    sleep "${setting[poll_seconds]}"
  done
  say "${setting[name]} is not in the queue"
}

main() {
  read_settings "$@"
  ((${#words[@]} == 1)) || misuse "one command is needed, this is: ${words[*]:-none}"
  need_count nodes gpus_per_node cpus_per_task max_restarts max_requeues stop_seconds lines
  need_seconds backoff_seconds poll_seconds
  ((setting[nodes] >= 1)) || misuse "--nodes=${setting[nodes]} is below 1"
  case ${words[0]} in
    submit | status | logs | stop) need name folder ;;
    *) misuse "there is no command ${words[0]}" ;;
  esac
  "${words[0]}"
}

main "$@"
