"""How a run failed: failure.json in its folder, and advice where the disk is to blame; only the
standard library."""

import errno
import json
import pathlib

FAILURE = "failure.json"


def record_failure(workdir: pathlib.Path, *, step: int, error: str) -> None:
  """Writes failure.json, by which a supervisor sees whether the same failure comes again."""
  (workdir / FAILURE).write_text(json.dumps({"step": step, "error": error}) + "\n")


def read_failure(workdir: pathlib.Path) -> tuple[object, object] | None:
  """Step and error of the failure that a run recorded; None if there is no record."""
  try:
    failure = json.loads((workdir / FAILURE).read_text())
    return failure["step"], failure["error"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


def storage_advice(error: OSError, workdir: pathlib.Path) -> str:
  """One line: what is wrong with which path, and what to do."""
  what = f"{error.filename or workdir}: {error.strerror or error}"
  match error.errno:
    case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
      do = "free space there"
    case errno.EROFS | errno.EACCES | errno.EPERM:
      do = "let this user write there, or use another --workdir"
    case errno.ENOTDIR | errno.EEXIST:
      do = "a file is where a folder has to be: move it, or use another --workdir"
    case _:
      do = "see that the file system is well"
  return f"{what}. To go on from the last complete checkpoint: {do}, then start the run again"
