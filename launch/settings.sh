# shellcheck shell=bash disable=SC2034,SC2154
# Settings of the launch scripts: flags over an env file over defaults. Sourced, never run.
#
# A script fills SETTINGS with lines "name default what it is" ("-": no default; a default of true or
# false makes a switch) and calls read_settings "$@". After it: setting[NAME], words (what stands
# before --, without flags) and job (what stands after it).

if ((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] < 44)); then
  echo "bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
fi

declare -A setting=() given=()
declare -a words=() job=()

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# misuse MESSAGE: what a wrong command line gets.
misuse() {
  printf '%s: %s\n\n' "${0##*/}" "$*" >&2
  usage >&2
  exit 2
}

settings_help() {
  local name default meaning
  while read -r name default meaning; do
    [[ $name ]] || continue
    case $default in
      -) printf '  --%-26s %s\n' "$name=" "$meaning" ;;
      true | false) printf '  --%-26s %s\n' "$name" "$meaning" ;;
      *) printf '  --%-26s %s\n' "$name=$default" "$meaning" ;;
    esac
  done <<<"$SETTINGS"
}

read_settings() {
  local name default meaning
  while read -r name default meaning; do
    [[ $name ]] || continue
    [[ $default == - ]] && default=
    setting[$name]=$default
  done <<<"$SETTINGS"
  while (($#)); do
    case $1 in
      --)
        shift
        job=("$@")
        break
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*) _read_flag "${1#--}" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  if [[ ${given[env_file]:-} || -f ${setting[env_file]} ]]; then
    _read_env_file "${given[env_file]:-${setting[env_file]}}"
  fi
  for name in "${!given[@]}"; do
    setting[$name]=${given[$name]}
  done
}

# need_job: what stands after -- is what launch.train gets.
need_job() {
  ((${#job[@]})) ||
    misuse "nothing to run: put the arguments of launch.train after --, such as" \
      "-- --config=configs/griffin.py:1b"
}

# need NAME...: one line for each of them that has no value, then the end.
need() {
  local name missing=0
  for name in "$@"; do
    if [[ ! ${setting[$name]} ]]; then
      echo "${0##*/}: --$name is missing (or ${name^^}= in ${setting[env_file]})" >&2
      missing=1
    fi
  done
  if ((missing)); then exit 2; fi
}

# need_count NAME...: each has to be a whole number of at least 0.
need_count() {
  local name
  for name in "$@"; do
    [[ ${setting[$name]} =~ ^[0-9]+$ ]] || misuse "--$name=${setting[$name]} is not a whole number"
    setting[$name]=$((10#${setting[$name]})) # 08 would be octal
  done
}

# need_seconds NAME...: each has to be a number of at least 0, as sleep takes it.
need_seconds() {
  local name
  for name in "$@"; do
    [[ ${setting[$name]} =~ ^([0-9]+[.]?[0-9]*|[.][0-9]+)$ ]] ||
      misuse "--$name=${setting[$name]} is not a number of seconds"
  done
}

is_on() { [[ ${setting[$1]} == true ]]; }

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

_is_switch() { [[ $'\n'$SETTINGS =~ $'\n'"$1"\ +(true|false)\  ]]; }

_read_flag() {
  local name=${1%%=*} value
  name=${name//-/_}
  [[ -v setting[$name] ]] || misuse "there is no flag --$name"
  if [[ $1 == *=* ]]; then
    value=${1#*=}
  elif _is_switch "$name"; then
    value=true
  else
    misuse "--$name needs a value: --$name=..."
  fi
  if _is_switch "$name" && [[ $value != true && $value != false ]]; then
    misuse "--$name=$value is neither true nor false"
  fi
  given[$name]=$value
}

# KEY=value lines; comments and empty lines are passed over; nothing is executed.
_read_env_file() {
  local line key number=0
  [[ -f $1 ]] || misuse "--env_file=$1 is not a file"
  while IFS= read -r line || [[ $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$1:$number is not KEY=value: $line"
    key=${BASH_REMATCH[1],,} line=${BASH_REMATCH[2]}
    [[ -v setting[$key] ]] || die "$1:$number: there is no setting ${key^^}"
    if [[ $line =~ ^\"(.*)\"$ || $line =~ ^\'(.*)\'$ ]]; then line=${BASH_REMATCH[1]}; fi
    setting[$key]=$line
  done <"$1"
}
