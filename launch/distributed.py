"""Which process of the job this is, and how it joins the others: flags and `join`.

On Cloud TPU, GKE, Slurm and Open MPI jax finds out by itself; elsewhere --coordinator,
--num_processes and --process_id say it. Without any of these, this process is the whole job.
"""

import os
from typing import NamedTuple

import jax
from absl import flags, logging

from launch import rendezvous
from train.job import coordination
from train.job.peers import Peers

_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, the same on all; needed without a known cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes train together.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0.", lower_bound=0
)
_CLUSTER = flags.DEFINE_enum(
  "cluster",
  "auto",
  ["auto", "none", "gcetpu", "gketpu", "k8s", "slurm", "ompi", "mpi4py"],
  "Who tells how many processes there are; none: this process is all there is.",
)
_START_SECONDS = flags.DEFINE_integer(
  "start_seconds", 300, "How long to wait for the other processes to start.", lower_bound=1
)
_HEARTBEAT_SECONDS = flags.DEFINE_float(
  "heartbeat_seconds", 60, "A process not heard of for so long is gone.", lower_bound=1
)
_LEAVE_SECONDS = flags.DEFINE_integer(
  "leave_seconds", 300, "How long to wait for the other processes at the end.", lower_bound=1
)


class Place(NamedTuple):
  """One process's place in a job; `coordinator` is host:port of process 0."""

  coordinator: str
  index: int
  count: int
  cluster: str  # "none" if the flags told it


def join() -> Peers:
  """Joins the other processes of the job, before any device is touched; returns them.

  Raises ValueError for flags that do not fit together, MissingProcessError if not all come.
  """
  place = _place()
  if place is None or place.count == 1:
    return Peers.alone()
  hosts = rendezvous.meet(
    place.coordinator, index=place.index, count=place.count, seconds=_START_SECONDS.value
  )
  # jax's own service would swallow every SIGTERM, even a second one, without saying who got it.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    place.coordinator,
    place.count,
    place.index,
    cluster_detection_method="deactivate" if place.cluster == "none" else place.cluster,
    initialization_timeout=_START_SECONDS.value,
    # Peers notice sooner and name the process; jax's own abort is for when they cannot.
    heartbeat_timeout_seconds=int(2 * _HEARTBEAT_SECONDS.value + 10),
    shutdown_timeout_seconds=_LEAVE_SECONDS.value,
  )
  peers = Peers(
    coordination.client(),
    index=place.index,
    hosts=hosts,
    seconds=_HEARTBEAT_SECONDS.value,
    coordinator=place.coordinator,
  )
  logging.info("%d processes: %s", peers.count, ", ".join(map(peers.name, range(peers.count))))
  if peers.index:
    logging.set_verbosity(logging.WARNING)
  return peers


def _place() -> Place | None:
  """The place by the flags, else by the cluster; None if there is only this process."""
  coordinator, count, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if coordinator is None and count is None and index is None:
    return None if _CLUSTER.value == "none" else _detect(_CLUSTER.value)
  if coordinator is None or count is None or index is None:
    told = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    lacking = ", ".join(f"--{name}" for name, value in told.items() if value is None)
    raise ValueError(
      f"{lacking}: not given; --coordinator, --num_processes and --process_id go together, and on "
      "a known cluster none is needed"
    )
  if index >= count:
    raise ValueError(f"--process_id={index} must be below --num_processes={count}")
  if not coordinator.rpartition(":")[2].isdecimal():
    raise ValueError(f"--coordinator={coordinator} is not host:port")
  return Place(coordinator, index, count, "none")


def _detect(wanted: str) -> Place | None:
  """The place by the first of jax's cluster types that is present, in its order."""
  for cluster in coordination.cluster_types():
    if wanted != "auto" and cluster.name != wanted:
      continue
    if wanted == "auto" and (cluster.opt_in_only_method or _is_one_pod(cluster.name)):
      continue
    if not cluster.is_env_present():
      continue
    count = cluster.get_process_count()
    if count == 1:
      return None
    coordinator = cluster.get_coordinator_address(
      timeout_secs=_START_SECONDS.value,
      override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
    )
    return Place(coordinator, cluster.get_process_id(), count, cluster.name)
  if wanted != "auto":
    raise ValueError(
      f"--cluster={wanted}: this process does not run on one; leave it out to find out, or give "
      "--coordinator, --num_processes and --process_id"
    )
  return None


def _is_one_pod(name: str) -> bool:
  """A Kubernetes pod that is not part of an indexed job: a notebook, say."""
  return name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ
