"""Measures training on the devices at hand: `python -m launch.bench --config=configs/bench_cpu.py`.

Prints one JSON object: tokens_per_second (median over the timed steps), compile_seconds (trace, lower
and compile the step), peak_bytes (of the compiled step: arguments + temporaries + outputs that alias
no argument, per device), loader_tokens_per_second, the config and the device. Rows are random bytes
in documents of random length: the time does not depend on what is in them. The loader is measured on
the config's token store if it is there, else on one made of the same rows.
"""

import dataclasses
import datetime
import json
import pathlib
import platform
import shlex
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from data import pipeline, token_store
from data.rows import Batch
from launch.overrides import flatten, run_app
from models import decoder
from models.flops import count_params, flops_per_token
from sharding import logical, topology
from sharding.mesh import make_mesh
from train import state
from train.config import Run, placement_rules
from train.loop import batch_sharding, compile_step, to_devices
from train.metrics import mfu
from train.optimizer import decay_mask

_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before the timed ones.", lower_bound=0)
