#!/usr/bin/env bash
# A job on Cloud TPU, from nothing to done: see `launch/tpu.sh --help`.
#
# This machine only watches: the job runs detached on every host (on_host.sh), under launch.supervise.
# tpu_resource.sh asks for TPUs and gives them back; ship.sh packs the code; settings.sh reads flags.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
SETTINGS="
env_file $HERE/cluster.env settings as KEY=value lines; flags win
name - of the queued resource or TPU VM, and of the folder on its hosts
zone - such as us-east5-b
project - the Google Cloud project
accelerator_type - such as v5litepod-256 or v6e-64
runtime_version - such as v2-alpha-tpuv5-lite or v2-alpha-tpuv6e
mode queued queued: a queued resource, waits for capacity; vm: a TPU VM, at once or not at all
slices 1 more than 1: a multislice job of a queued resource
spot false cheap, and may be taken away at any time
bucket - for the workdir: gs://BUCKET/NAME
workdir - where checkpoints and metrics go, if not there; several hosts have to share it
keep false up: leave the TPUs there at the end
allow_dirty false ship a checkout with changes, as commit and patch
dry_run false print every command and run none
follow false logs: go on as lines come
lines 50 logs: the last so many of each host
node 0 ssh: of which slice
worker 0 ssh: which host of it
max_restarts 100 of the job on a host, by its supervisor
backoff_seconds 10 between these
max_recreations 100 up: how often TPUs that were taken away are asked for again
wait_minutes 1440 for capacity; then the request is taken back
capacity_attempts 50 how often a request without capacity is made again
ssh_attempts 8 when a host refuses the connection
retry_seconds 15 before the first retry; doubles, up to ten minutes
poll_seconds 30 between looks at resource and job
stop_seconds 900 stop: for saving a checkpoint
create_flags - more flags of gcloud's create, such as --network=N --service-account=S
ssh_flags - more flags of gcloud's ssh and scp, such as --internal-ip
"

usage() {
  cat <<TEXT
launch/tpu.sh COMMAND [--SETTING=VALUE ...] [-- arguments of launch.train]

  up        all of it: create, setup, run, watch; again after each preemption, until the job is
            complete; then delete. Ctrl-C leaves the job running, the same command watches it again.
  create    asks for the TPUs and waits until they are there
  setup     ships this checkout's commit to every host and installs the locked dependencies
  run       starts the job on every host; on a host where it runs already, nothing
  status    of the TPUs, and of the job on every host
  logs      of every host, with its name before each line; --follow
  ssh       into one host (--node, --worker); with -- COMMAND, on every host
  stop      SIGTERM to the job, which saves and leaves
  delete    gives the TPUs back, and looks that nothing is left

It needs gcloud, logged in; for several hosts its key in an agent: ssh-add ~/.ssh/google_compute_engine.
Settings (in an env file: NAME=value, see launch/cluster.env.example):
$(settings_help)
TEXT
}

# shellcheck source=launch/settings.sh
source "$HERE/settings.sh"
# shellcheck source=launch/ship.sh
source "$HERE/ship.sh"
# shellcheck source=launch/tpu_resource.sh
source "$HERE/tpu_resource.sh"

# --- the hosts

# on_nodes INTO ssh COMMAND | scp FILE: on every host of every node at once. What they print comes
# whole, node by node, into the file INTO ("-": stdout). A refused connection is tried again; else the
# first failure is this function's.
on_nodes() {
  local into=$1 node status=0 folder one
  shift
  folder=$(mktemp -d)
  for node in $(nodes); do
    _on_node "$folder/$node" "$node" "$@" &
    echo $! >"$folder/$node.pid"
  done
  for node in $(nodes); do
    one=0
    wait "$(<"$folder/$node.pid")" || one=$?
    ((status)) || status=$one
    if [[ $into == - ]]; then cat "$folder/$node.out"; else cat "$folder/$node.out" >>"$into"; fi
    if ((one)); then sed "s#^#$node | #" "$folder/$node.err" >&2; fi
  done
  rm -r "$folder"
  return "$status"
}

_on_node() {
  local file=$1 node=$2 try status words
  case $3 in
    ssh) words=(tpu-vm ssh "$node" --worker=all "--command=$4") ;;
    scp) words=(tpu-vm scp "$4" "$node:${setting[name]}.tar.gz" --worker=all) ;;
  esac
  for ((try = 1; ; try++)); do
    status=0
    tpus "${words[@]}" >"$file.out" 2>"$file.err" || status=$?
    ((status)) || return 0
    ((status == 255 && try < setting[ssh_attempts])) || return "$status"
    say "$node: no connection (try $try of ${setting[ssh_attempts]}): $(tail -n 1 "$file.err")"
    pause "$try"
  done
}

# on_host WORD...: on_host.sh's command as one line for a host's shell, which answers for a host that
# does not have it yet.
on_host() {
  local script=${setting[name]}/code/launch/on_host.sh absent
  # shellcheck disable=SC2016
  case $1 in
    status) absent='echo "$(hostname) bare (not set up: tpu.sh setup first)"; exit' ;;
    *) absent='echo "$(hostname): not set up: tpu.sh setup first" >&2; exit 3' ;;
  esac
  echo "[ -e $script ] || { $absent; }; $(quoted bash "$script" "$1" "${setting[name]}" "${@:2}")"
}

# --- the commands

setup() {
  pack
  trap 'rm -rf "$package"' EXIT
  ship
}

# Packs once: what `up` ships again after a preemption is what it shipped first.
pack() {
  version=$(code_version)
  package=${TMPDIR:-/tmp}/${setting[name]}-${version:0:12}-$$
  pack_code "$version" "$package"
}

ship() {
  local name=${setting[name]} unpack
  say "setting up ${version:0:12} on every host of $(nodes | on_one_line)"
  unpack="set -e; rm -rf $name/code.new; mkdir -p $name/code.new;"
  unpack+=" tar -xzf $name.tar.gz -C $name/code.new; bash $name/code.new/launch/on_host.sh setup $name"
  on_nodes - scp "$package/code.tar.gz" && on_nodes - ssh "$unpack"
}

workdir() {
  local bucket=${setting[bucket]#gs://}
  echo "${setting[workdir]:-gs://$bucket/${setting[name]}}"
}

run() {
  local workdir python=.venv/bin/python
  workdir=$(workdir)
  on_nodes - ssh "$(on_host run "$python" -m launch.supervise \
    "--max_restarts=${setting[max_restarts]}" "--backoff_seconds=${setting[backoff_seconds]}" \
    "--workdir=$workdir" -- "$python" -m launch.train "--workdir=$workdir" "${job[@]}")"
}

check_job() {
  [[ ${setting[workdir]} || ${setting[bucket]} ]] ||
    misuse "say where checkpoints go: --bucket=BUCKET, or --workdir=..."
  case $(workdir) in
    *://* | /* | runs/*) ;;
    *) misuse "--workdir=${setting[workdir]} is neither a URL nor an absolute path nor in runs/" ;;
  esac
  need_job
}

status() {
  local state
  state=$(resource_state)
  echo "${setting[name]} $state"
  case $state in
    ready) on_nodes - ssh "$(on_host status)" ;;
    unknown:*) return 1 ;;
  esac
}

logs() {
  local node line follow=() each=()
  if is_on follow; then follow=(follow); fi
  set -m # each with a process group, which Ctrl-C does not reach: gcloud starts ssh
  for node in $(nodes); do
    line=$(on_host logs "$node" "${setting[lines]}" "${follow[@]}")
    tpus tpu-vm ssh "$node" --worker=all "--command=$line" &
    each+=("$!")
  done
  # shellcheck disable=SC2064
  trap "kill -- ${each[*]/#/-} 2>/dev/null || true" INT TERM
  wait "${each[@]}"
  set +m
}

ssh_in() {
  if ((${#job[@]})); then
    on_nodes - ssh "${job[*]}"
  else
    tpus tpu-vm ssh "$(nodes | sed -n "$((setting[node] + 1))p")" "--worker=${setting[worker]}"
  fi
}

stop() { on_nodes - ssh "$(on_host stop "${setting[stop_seconds]}")"; }

# --- up

# Watches until there is something to do, and says what in `seen`: complete, failed, again (start the
# job where it is not running), gone (the TPUs were taken away), blind (nobody answers). What the hosts
# said at the last look is in `last_look`.
watch_job() {
  local file blind=0 step shown=''
  file=$(mktemp)
  while true; do
    : >"$file"
    if on_nodes "$file" ssh "$(on_host status)"; then
      blind=0
      last_look=$(<"$file")
      if is_on dry_run; then last_look='host exited:0'; fi
      seen=$(judge <<<"$last_look")
      step=$(grep -oE 'step [0-9]+/[0-9]+' <<<"$last_look" | sort -t' ' -k2n | tail -n 1 || true)
      if [[ $step != "$shown" ]]; then say "$step" && shown=$step; fi
    else
      seen=blind
      blind=$((blind + 1))
    fi
    if [[ $seen == failed || $seen == blind ]]; then
      # A preempted slice is noticed here first, and by the resource some time later.
      pause_for "${setting[poll_seconds]}"
      case $(resource_state) in
        gone:* | absent) seen=gone ;;
      esac
    fi
    case $seen in
      running) ;;
      blind)
        if ((blind >= 3)); then
          why_left='its hosts cannot be reached'
          break
        fi
        ;;
      *) break ;;
    esac
    pause_for "${setting[poll_seconds]}"
  done
  rm "$file"
}

# judge: what lines "HOST STATE ..." mean together.
judge() {
  awk '
    { hosts++; count[$2]++; if ($2 ~ /^exited:/ && $2 != "exited:0" && $2 != "exited:75") failed++ }
    END {
      if (failed) print "failed"
      else if (count["running"] && !count["bare"] && !count["ready"] && !count["lost"]) print "running"
      else if (hosts && count["exited:0"] == hosts) print "complete"
      else print "again"
    }'
}

up() {
  local recreations=0 starts=0
  check_job
  pack # before anything is paid for: a checkout with changes is refused
  trap 'leave_up' EXIT
  trap 'why_left=interrupted; exit 130' INT TERM
  while true; do
    create
    seen=gone
    if ship && run; then watch_job; else _lost_or_broken; fi
    case $seen in
      complete)
        say "complete: $(workdir)"
        return
        ;;
      failed)
        say "the job failed, and restarting it did not help:"
        printf '%s\n' "$last_look" >&2
        setting[lines]=20 && setting[follow]=false
        logs || true
        die "gave up; what was saved is in $(workdir)"
        ;;
      again)
        starts=$((starts + 1))
        ((starts <= setting[max_restarts])) || die "started $starts times and never complete; gave up"
        say "starting the job again ($starts) where it is not running"
        ;;
      gone)
        recreations=$((recreations + 1))
        ((recreations <= setting[max_recreations])) ||
          die "the TPUs were taken away $recreations times; gave up"
        say "the TPUs were taken away ($(resource_state)); asking for new ones ($recreations)"
        ;;
      *) die "the hosts cannot be reached; the job may be running" ;;
    esac
  done
}

# After a failed setup or run: whether the TPUs are gone, or it is ours to stop.
_lost_or_broken() {
  pause_for "${setting[poll_seconds]}"
  case $(resource_state) in
    gone:* | absent) seen=gone ;;
    *) die "the hosts could not be set up (above)" ;;
  esac
}

leave_up() {
  local status=$?
  trap - EXIT INT TERM
  rm -rf "$package"
  if [[ $why_left ]]; then
    say "$why_left: ${setting[name]} and its job are left as they are; the same command watches again," \
      "'tpu.sh delete' gives the TPUs back"
  elif is_on keep; then
    say "--keep: ${setting[name]} is still there and costs money; tpu.sh delete gives it back"
  elif [[ $is_ours == true ]]; then
    delete
  fi
  exit "$status"
}

# --- which command

version='' package=''                # what is shipped, and the folder it is packed in
seen='' last_look='' why_left='' # of `up`: its traps outlive its functions

on_one_line() { tr '\n' ' ' | sed 's/ $//'; }

main() {
  exec 3>&1
  read_settings "$@"
  ((${#words[@]} == 1)) || misuse "one command is needed, this is: ${words[*]:-none}"
  need_count slices max_restarts max_recreations wait_minutes capacity_attempts ssh_attempts
  need_count stop_seconds lines node worker
  need_seconds backoff_seconds retry_seconds poll_seconds
  [[ ${setting[mode]} == queued || ${setting[mode]} == vm ]] ||
    misuse "--mode=${setting[mode]} is neither queued nor vm"
  [[ ${setting[mode]} == queued || ${setting[slices]} == 1 ]] ||
    misuse "several slices need --mode=queued"
  ((setting[slices] >= 1)) || misuse "--slices=${setting[slices]} is below 1"
  ((setting[node] < setting[slices])) ||
    misuse "--node=${setting[node]}: slices are numbered from 0, and --slices=${setting[slices]}"
  case ${words[0]} in
    create | up) need name zone project accelerator_type runtime_version ;;
    setup | run | status | logs | ssh | stop | delete) need name zone project ;;
    *) misuse "there is no command ${words[0]}" ;;
  esac
  [[ ${setting[name]} =~ ^[a-z][a-z0-9-]*$ ]] ||
    misuse "--name=${setting[name]}: small letters, digits and - only"
  case ${words[0]} in
    ssh) ssh_in ;;
    run) check_job && run ;;
    *) "${words[0]}" ;;
  esac
}

main "$@"
