"""Per-layer values, recorded while a model is traced inside `collecting()`; otherwise not computed.

Inside `collecting`, every block that is traced has a dict for its values (`block`), to which its
layers add: `if observe.is_on(): observe.record(state_rms=...)`.
"""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

_collects: contextvars.ContextVar[bool] = contextvars.ContextVar("collects", default=False)
_values: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar(
  "values", default=None
)


@contextmanager
def collecting() -> Iterator[None]:
  """Inside it, blocks collect what their layers record."""
  token = _collects.set(True)
  try:
    yield
  finally:
    _collects.reset(token)


@contextmanager
def block() -> Iterator[dict[str, jax.Array] | None]:
  """A dict that collects what the layers inside record; None outside of `collecting`."""
  token = _values.set({} if _collects.get() else None)
  try:
    yield _values.get()
  finally:
    _values.reset(token)


def is_on() -> bool:
  """Whether recorded values are kept."""
  return _values.get() is not None


def record(**values: jax.Array) -> None:
  """Adds small float32 arrays to the dict of the block being traced; each name at most once."""
  kept = _values.get()
  assert kept is not None, "observe.record outside of collecting: ask is_on() first"
  assert not set(values) & set(kept), f"{sorted(set(values) & set(kept))} recorded twice"
  kept.update(values)


def rms(x: jax.Array) -> jax.Array:
  """Root mean square of all of x, float32."""
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
