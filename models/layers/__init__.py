"""The layers of a block, one in each file; a layer's config builds its own module.

A mixer is an `nnx.Module` made by `Config.build(width, num_blocks=..., rngs=...)`, with

  __call__(x_BTD, segments, state) -> (y_BTD, state)     state None in, None out: no history
  initial_state(batch, context, dtype) -> state          the state before the first token

A state is a NamedTuple of arrays, which are replaced whole, and of caches, which are written in
place (models/layers/state.py).
"""
