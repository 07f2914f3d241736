"""Eight simulated CPU devices for the whole session, set before jax is first imported; signals as a
terminal gives them; what test files share."""

import os
import signal
import sys

import pytest

from tests.cluster_checkout import make_checkout
from tests.commands import Commands
from tests.compiler_flags import FAST_TO_COMPILE
from tests.pretended_cloud import Cloud

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    FAST_TO_COMPILE,
  ]
).strip()

# Where the suite runs in the background of a script, Ctrl-C is ignored, and would be by all that it
# starts: a shell cannot undo that.
signal.signal(signal.SIGINT, signal.default_int_handler)

assert "jax" not in sys.modules, "jax was imported before the simulated devices were set"


@pytest.fixture(scope="session")
def _commands_of_all_files():
  commands = Commands()
  yield commands
  commands.close()


@pytest.fixture(scope="module")
def commands(_commands_of_all_files):
  """Runs our commands, with what is slow to import and to compile done once for a worker."""
  yield _commands_of_all_files
  _commands_of_all_files.kill_running()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A repository with our launch scripts, committed."""
  return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path, checkout):
  return Cloud(tmp_path, checkout)
