"""The private names of jax that we need, in this one file: its coordination service and clusters.

The service (in process 0) keeps keys and barriers for threads that may not run a collective, and
for processes whose collectives hang. Through the public jax.distributed a process can only join and
leave it. TODO: drop when jax.distributed makes its client and the detected cluster public.
"""

from typing import Any

import jax
from jax._src import clusters, distributed


def client() -> Any:
  """The client of the job's coordination service, once jax.distributed.initialize has returned."""
  found = distributed.global_state.client
  assert found is not None
  return found


def wait_for_all(what: str, *, seconds: int) -> None:
  """Returns when every process has called it with this name; a name is used once. Any thread may
  call it, because it is not a collective of the devices."""
  if jax.process_count() > 1:
    client().wait_at_barrier(what, seconds * 1000)


def cluster_types() -> list[Any]:
  """The clusters that jax can detect, in the order in which it asks for them."""
  return list(clusters.ClusterEnv._cluster_types)
