#!/usr/bin/env bash
# One host of a job, as tpu.sh speaks to it over ssh: bash ~/NAME/code/launch/on_host.sh COMMAND NAME ...
#
#   setup                     makes ~/NAME/code.new, which was just unpacked, the code, and its environment
#   run COMMAND...            starts it detached, unless a job is running
#   status | stop SECONDS     one line "HOST STATE DETAIL"; SIGTERM, and waiting until the job has ended
#   logs NODE LINES [follow]  the log, with node and host before each line
#
# ~/NAME/job holds log, pid (of what `run` was given), status (its exit status) and lock, which the
# job holds as long as it lives: whether it runs is never a guess from a number.
set -euo pipefail

command=$1 name=$2
shift 2
home=$HOME/$name
code=$home/code job=$home/job
host=$(hostname)
mkdir -p "$job"

fail() {
  echo "$host: $*" >&2
  exit 3
}

is_running() { ! flock --nonblock "$job/lock" true; }

version_of() { cat "$1/CODE_VERSION" 2>/dev/null || echo none; }

setup() {
  if is_running; then
    [[ $(version_of "$code") == "$(version_of "$code.new")" ]] ||
      fail "a job of $(version_of "$code") is running: stop it before other code is set up"
    echo "$host: set up already, and its job is running"
    return
  fi
  rm -rf "$code"
  mv "$code.new" "$code"
  # What runs leave outlives the code that left it.
  mkdir -p "$home/runs"
  ln -sfn ../runs "$code/runs"
  bash "$code/launch/environment.sh" "${EXTRA:-tpu}" >&2
  echo "$host: set up $(version_of "$code")"
}

run() {
  [[ -e $code/.venv/complete ]] || fail "not set up: tpu.sh setup first"
  exec 9>>"$job/lock"
  if ! flock --nonblock 9; then
    echo "$host: its job is running already"
    return
  fi
  rm -f "$job/status" "$job/pid"
  touch "$job/started"
  cd "$code"
  printf '== %s %s: %s\n' "$(date -u +%FT%TZ)" "$(version_of .)" "$*" >>"$job/log"
  # Its own session, no terminal: losing the ssh connection does not reach it.
  # shellcheck disable=SC2016
  setsid bash -c '
    job=$1; shift
    "$@" & echo $! >"$job/pid"
    status=0; wait $! || status=$?
    echo "$status" >"$job/status.new"; mv "$job/status.new" "$job/status"
  ' run "$job" "$@" >>"$job/log" 2>&1 </dev/null &
  echo "$host: started"
}

# The newest "step N/M" of the log, if there is one.
last_step() {
  tail -n 500 "$job/log" 2>/dev/null | grep -oE 'step +[0-9]+/[0-9]+' | tail -n 1 | tr -s ' ' || true
}

status() {
  local state
  if is_running; then
    state=running
  elif [[ -e $job/status ]]; then
    state=exited:$(<"$job/status")
  elif [[ -e $job/started ]]; then
    state=lost # killed, or the host was restarted
  elif [[ -e $code/.venv/complete ]]; then
    state=ready
  else
    state='bare (not set up: tpu.sh setup first)'
  fi
  echo "$host $state $(last_step)"
}

stop() {
  local deadline=$((SECONDS + $1))
  is_running || { status && return; }
  kill -TERM "$(<"$job/pid")" 2>/dev/null || true
  while is_running; do
    ((SECONDS < deadline)) || fail "its job still runs $1 s after SIGTERM; tpu.sh delete ends it anyway"
    sleep "${POLL_SECONDS:-1}"
  done
  status
}

logs() {
  local prefix="$1 $host | " lines=$2 follow=${3:-}
  touch "$job/log"
  tail -n "$lines" ${follow:+-F} "$job/log" | sed -u "s#^#$prefix#"
}

case $command in
  setup | run | status | stop | logs) "$command" "$@" ;;
  *) fail "no command $command" ;;
esac
