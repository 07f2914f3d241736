"""In the place of `python -m launch.train` in tests of sweeps: in an instant, or as a file says.

  python tests/sweep_worker.py --config=tests/sweep_config.py:FOLDER/FAMILY/STEPS --workdir=DIR

It writes a line to FOLDER/starts and its process id to FOLDER/pid, fails as often as
FOLDER/FAMILY.fails says, waits while FOLDER/hold is there, leaves with status 75 when it is told to
stop, and else writes the metrics of its last step.
"""

import json
import os
import pathlib
import signal
import sys
import time


def _told_to_stop(*_: object) -> None:
  (folder / "told").touch()
  sys.exit(75)


arguments = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
path, family, steps = arguments["config"].partition(":")[2].rsplit("/", 2)
folder, workdir = pathlib.Path(path), pathlib.Path(arguments["workdir"])
signal.signal(signal.SIGTERM, _told_to_stop)
with (folder / "starts").open("a") as starts:
  starts.write(f"{family}/{steps}\n")
(folder / "pid").write_text(str(os.getpid()))
fails = folder / f"{family}.fails"
if fails.exists() and (left := int(fails.read_text())):
  fails.write_text(str(left - 1))
  sys.exit("no luck today")
while (folder / "hold").exists():
  time.sleep(0.02)
record = {
  "step": int(steps),
  "time": time.time(),
  "train/tokens_per_second": 1000.0,
  "eval/loss": 2.0 + 1 / int(steps),
  "eval/bits_per_byte": 3.0,
}
(workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
