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
extra=${EXTRA:-tpu}
host=$(hostname)
mkdir -p "$job"

fail() {
  echo "$host: $*" >&2
  exit 3
}

is_running() { ! flock --nonblock "$job/lock" true; }

version_of() { cat "$1/CODE_VERSION" 2>/dev/null || echo none; }

# A Python that the project runs on: the host's own, else one that uv brings.
find_python() {
  local python
  for python in python3.11 python3.12 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user 'uv==0.13.9' >&2
  "$HOME/.local/bin/uv" python install --quiet 3.11 >&2
  "$HOME/.local/bin/uv" python find 3.11
}

setup() {
  local sum python
  if is_running; then
    [[ $(version_of "$code") == "$(version_of "$code.new")" ]] ||
      fail "a job of $(version_of "$code") is running: stop it before other code is set up"
    echo "$host: set up already, and its job is running"
    return
  fi
  ln -sfn ../environment "$code.new/.venv"
  rm -rf "$code"
  mv "$code.new" "$code"
  mkdir -p "$home/environment"
  cd "$code"
  sum=$(cat pyproject.toml requirements.lock | sha256sum)
  # make compares times; code of another commit needs its content compared.
  if [[ $(cat .venv/made_of 2>/dev/null) == "$sum" ]]; then
    find .venv/ -maxdepth 1 -name 'ready-*' -exec touch {} +
  else
    rm -f .venv/ready-*
  fi
  export PATH=$PATH:$HOME/.local/bin
  command -v make >/dev/null || { sudo apt-get update -qq && sudo apt-get install -y -qq make; } >&2
  python=$(find_python)
  make EXTRA="$extra" PYTHON="$python" ".venv/ready-$extra" >&2
  printf '%s\n' "$sum" >.venv/made_of
  echo "$host: set up $(version_of "$code")"
}

run() {
  [[ -e $code/.venv/made_of ]] || fail "not set up: tpu.sh setup first"
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
last_step() { tail -n 500 "$job/log" 2>/dev/null | grep -oE 'step +[0-9]+/[0-9]+' | tail -n 1 | tr -s ' ' || true; }

status() {
  local state
  if is_running; then
    state=running
  elif [[ -e $job/status ]]; then
    state=exited:$(<"$job/status")
  elif [[ -e $job/started ]]; then
    state=lost # killed, or the host was restarted
  elif [[ -e $code/.venv/made_of ]]; then
    state=ready
  else
    state=bare
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
