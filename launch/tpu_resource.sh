# shellcheck shell=bash disable=SC2034,SC2154
# Asks Google Cloud for TPUs and gives them back: a queued resource or a TPU VM. Sourced by tpu.sh.

# tpus WORD...: gcloud compute tpus WORD... in our project and zone. A dry run prints it.
tpus() {
  local line=(gcloud compute tpus "$@") flags=()
  case "$1 $2" in
    *\ create) read -ra flags <<<"${setting[create_flags]}" ;;
    *\ ssh | *\ scp) read -ra flags <<<"${setting[ssh_flags]}" ;;
  esac
  line+=("${flags[@]}" "--zone=${setting[zone]}" "--project=${setting[project]}" --quiet)
  if is_on dry_run; then quoted "${line[@]}" >&3; else "${line[@]}"; fi
}

nodes() {
  local slice
  if ((setting[slices] == 1)); then
    echo "${setting[name]}"
  else
    for ((slice = 0; slice < setting[slices]; slice++)); do echo "${setting[name]}-$slice"; done
  fi
}

pause_for() { is_on dry_run || sleep "$1"; }

# pause TRY: longer with each try, at most ten minutes.
pause() {
  local double='BEGIN { s *= 2 ^ (t - 1); print s < 600 ? s : 600 }'
  pause_for "$(awk -v s="${setting[retry_seconds]}" -v t="$1" "$double")"
}

# resource_state prints one of
#   absent          there is nothing of that name
#   ready           its hosts can be used
#   waiting:STATE   it will be, or may be
#   gone:STATE      it was taken away, and what is left of it has to be deleted
#   failed:WHY      the request was refused
#   unknown:WHY     gcloud could not say
resource_state() {
  local what=tpu-vm format='value(state)' line node state
  if [[ ${setting[mode]} == queued ]]; then
    what=queued-resources format='value[separator=" "](state.state,state.failedData.error.message)'
  fi
  state=$(_describe "$what" "${setting[name]}" "$format")
  if is_on dry_run; then state=$dry_state; fi
  case $state in
    ACTIVE*)
      # The queue notices a preempted slice later than the slice does.
      for node in $(nodes); do
        line=$(_describe tpu-vm "$node" 'value(state)')
        case $line in
          READY) ;;
          PREEMPTED | TERMINATED | DELETING | absent) echo "gone:$node:$line" && return ;;
          unknown:*) echo "$line" && return ;;
          *) echo "waiting:$node:$line" && return ;;
        esac
      done
      echo ready
      ;;
    READY) echo ready ;;
    absent | unknown:*) echo "$state" ;;
    FAILED*)
      state=${state#FAILED }
      echo "failed:${state//$'\n'/ }"
      ;;
    SUSPENDING* | SUSPENDED* | PREEMPTED | TERMINATED | DELETING*) echo "gone:${state%% *}" ;;
    *) echo "waiting:${state%% *}" ;;
  esac
}

_describe() {
  local error
  error=$(mktemp)
  if is_on dry_run; then
    tpus "$1" describe "$2" "--format=$3"
    echo absent
  elif ! tpus "$1" describe "$2" "--format=$3" 2>"$error"; then
    if grep -qiE 'NOT_FOUND|not found' "$error"; then echo absent; else echo "unknown:$(reason "$error")"; fi
  fi
  rm "$error"
}

# create: there and ready when it returns; nothing is left of the request when it gives up.
create() {
  local state try error
  error=$(mktemp)
  for ((try = 1; ; try++)); do
    : >"$error"
    state=$(resource_state)
    if [[ $state != absent ]]; then is_ours=true; fi
    case $state in
      ready) break ;;
      waiting:*STOP*) die "${setting[name]} is stopped: start it with gcloud, or tpu.sh delete" ;;
      waiting:*) ;;
      unknown:*) ;;
      gone:* | failed:*)
        say "${setting[name]} is $state: deleting what is left of it first"
        delete
        _request "$error"
        ;;
      absent) _request "$error" ;;
    esac
    state=$(wait_for_hosts "$error")
    case $state in
      ready) break ;;
      quota:*)
        _give_up "no quota: ${state#quota:}. Ask for more quota, or use another zone or type"
        ;;
      refused:*) _give_up "refused: ${state#refused:}" ;;
      late) _give_up "no TPUs within ${setting[wait_minutes]} minutes" ;;
      unknown:*)
        is_ours=false
        die "gcloud does not answer (${state#unknown:}); nothing was deleted"
        ;;
    esac
    # No capacity, no answer, or taken away while we waited.
    ((try < setting[capacity_attempts])) || _give_up "no TPUs after $try requests (${state#*:})"
    say "$state; asking again (try $try of ${setting[capacity_attempts]})"
    delete
    pause "$try"
  done
  rm -f "$error"
  say "${setting[name]} is ready: $(nodes | on_one_line)"
}

_request() {
  local error=$1 kind state words=("--accelerator-type=${setting[accelerator_type]}")
  if [[ ${setting[mode]} == vm ]]; then
    words=(tpu-vm create "${setting[name]}" "${words[@]}" "--version=${setting[runtime_version]}")
  else
    words=(queued-resources create "${setting[name]}" "${words[@]}")
    words+=("--runtime-version=${setting[runtime_version]}")
    if ((setting[slices] == 1)); then
      words+=("--node-id=${setting[name]}")
    else
      words+=("--node-count=${setting[slices]}" "--node-prefix=${setting[name]}")
    fi
  fi
  if is_on spot; then words+=(--spot); fi
  say "asking for ${setting[slices]} x ${setting[accelerator_type]} in ${setting[zone]}"
  dry_state=READY
  if tpus "${words[@]}" 2>"$error" >&2; then
    is_ours=true
    return
  fi
  kind=$(classify "$(reason "$error")")
  case $kind in
    # A TPU VM that failed late may be there, in a state of no use.
    capacity:*) is_ours=true && return ;;
    lost:*) is_ours=true ;;
  esac
  if grep -qiE 'ALREADY_EXISTS|already exists' "$error"; then return; fi
  # Before the request nothing had this name: if something has it now, only the answer failed.
  state=$(resource_state)
  if [[ $state != absent ]]; then
    is_ours=true
    say "${setting[name]} is $state and asked for no more, in spite of $(reason "$error")"
    : >"$error"
  fi
}

# wait_for_hosts ERROR: ready, or why not (quota:, capacity:, lost:, refused:, gone:, unknown:, late),
# where the file ERROR holds what the request answered.
wait_for_hosts() {
  local state shown='' unknown=0 end=$((SECONDS + 60 * setting[wait_minutes]))
  if [[ -s $1 ]] && grep -q ERROR "$1"; then
    classify "$(reason "$1")"
    return
  fi
  while true; do
    state=$(resource_state)
    case $state in
      ready) echo ready && return ;;
      failed:*) classify "${state#failed:}" && return ;;
      gone:* | absent) echo "gone:$state" && return ;;
      unknown:*) unknown=$((unknown + 1)) ;;
      *) unknown=0 ;;
    esac
    if ((unknown >= setting[ssh_attempts])); then echo "$state" && return; fi
    if [[ $state != "$shown" ]]; then say "${setting[name]}: $state" && shown=$state; fi
    if ((SECONDS >= end)); then echo late && return; fi
    sleep "${setting[poll_seconds]}"
  done
}

# classify REASON: quota and capacity are both RESOURCE_EXHAUSTED; waiting helps only the second. A
# quota of requests per minute is soon over, and who gives no reason had no capacity in time. Where the
# answer was lost, the request may have been heard.
classify() {
  local text=${1,,}
  case $text in
    "" | " " | *"per minute"* | *"rate limit"*) echo "capacity:$1" ;;
    *quota* | *"request more"*) echo "quota:$1" ;;
    *capacity* | *resource_exhausted* | *"resource exhausted"* | *stockout* | *unavailable* | \
      *"try again"* | *internal*)
      echo "capacity:$1"
      ;;
    *deadline* | *timeout* | *"timed out"* | *connection* | *"error 50"[0-9]*) echo "lost:$1" ;;
    *) echo "refused:$1" ;;
  esac
}

# reason FILE: what gcloud said, on one line.
reason() { { grep -A 3 ERROR "$1" || tail -n 3 "$1"; } | tr -s '\n ' '  ' | cut -c 1-400; }

# Also where the request itself was refused: then what has this name, if anything, is not ours.
_give_up() {
  if [[ $is_ours == false ]]; then die "$1; nothing was made"; fi
  delete
  is_ours=false
  die "$1; nothing is left of ${setting[name]}"
}

# delete: gives everything back and looks that nothing is left.
delete() {
  local try state
  for ((try = 1; ; try++)); do
    if [[ ${setting[mode]} == queued ]]; then
      _delete queued-resources "${setting[name]}" --force
    fi
    if [[ ${setting[mode]} == vm ]]; then _delete tpu-vm "${setting[name]}"; fi
    dry_state=absent
    state=$(left_over)
    [[ $state ]] || break
    ((try < setting[ssh_attempts])) || die "NOT DELETED, and may cost money: $state; delete it by hand"
    say "still there: $state"
    pause "$try"
  done
  say "${setting[name]} is deleted"
}

_delete() {
  local error
  error=$(mktemp)
  if ! tpus "$1" delete "${@:2}" >&2 2>"$error" && ! grep -qiE 'NOT_FOUND|not found' "$error"; then
    say "$(reason "$error")"
  fi
  rm "$error"
}

# left_over: what there still is, or may be, of resource and nodes; a node that outlives its queued
# resource is deleted on its own.
left_over() {
  local node state
  if [[ ${setting[mode]} == queued ]]; then
    state=$(_describe queued-resources "${setting[name]}" 'value(state.state)')
    [[ $state == absent ]] || echo "queued resource ${setting[name]} ($state)"
  fi
  for node in $(nodes); do
    state=$(_describe tpu-vm "$node" 'value(state)')
    if [[ $state == absent ]]; then continue; fi
    echo "node $node ($state)"
    if [[ ${setting[mode]} == queued ]]; then _delete tpu-vm "$node"; fi
  done
}

dry_state=absent # what a dry run takes the resource for
is_ours=false # whether there is, or may be, something that this command has to delete
