# shellcheck shell=bash disable=SC2154
# The code that a job runs: one commit, exactly, or a commit and a patch. Sourced after settings.sh.

# code_version: the commit of this checkout; with --allow_dirty and changes, COMMIT+SHA256_OF_PATCH.
# Without --allow_dirty, a tree with changes (untracked files that git does not ignore, too) is refused.
code_version() {
  local commit
  commit=$(git -C "$ROOT" rev-parse --verify --quiet HEAD) || die "$ROOT is not a git checkout"
  if [[ ! $(git -C "$ROOT" status --porcelain) ]]; then
    printf '%s\n' "$commit"
  elif is_on allow_dirty; then
    printf '%s+%.12s\n' "$commit" "$(_all_changes git -C "$ROOT" diff --cached --binary HEAD | sha256sum)"
  else
    git -C "$ROOT" status --short | head -n 10 >&2
    die "the checkout has changes (above): commit them, or ship them as a patch with --allow_dirty"
  fi
}

# pack_code VERSION FOLDER: makes FOLDER/code.tar.gz of it. In it, CODE_VERSION names the version, and
# uncommitted.patch has the changes, if there are any.
pack_code() {
  local version=$1 folder=$2 tree=$1 files=("--add-file=$2/CODE_VERSION")
  if [[ $version == *+* ]]; then
    say "NOT A COMMIT: shipping ${version%+*} with a patch, kept beside the code as uncommitted.patch:"
    git -C "$ROOT" status --short >&2
    files+=("--add-file=$folder/uncommitted.patch")
    tree=$(_all_changes git -C "$ROOT" write-tree)
  else
    say "shipping commit $version"
  fi
  files=(git -C "$ROOT" archive --format=tar.gz "${files[@]}" "--output=$folder/code.tar.gz" "$tree")
  if is_on dry_run; then
    quoted mkdir -p "$folder"
    quoted printf '%s\n' "$version" | sed "s#\$# >$folder/CODE_VERSION#"
    quoted "${files[@]}"
    return
  fi
  mkdir -p "$folder"
  printf '%s\n' "$version" >"$folder/CODE_VERSION"
  if [[ $version == *+* ]]; then
    _all_changes git -C "$ROOT" diff --cached --binary HEAD >"$folder/uncommitted.patch"
  fi
  "${files[@]}"
}

# _all_changes COMMAND...: runs it with an index of its own, which holds all of the working tree.
_all_changes() {
  local folder status=0
  folder=$(mktemp -d)
  GIT_INDEX_FILE=$folder/index git -C "$ROOT" read-tree HEAD
  GIT_INDEX_FILE=$folder/index git -C "$ROOT" add --all
  GIT_INDEX_FILE=$folder/index "$@" || status=$?
  rm -r "$folder"
  return "$status"
}
