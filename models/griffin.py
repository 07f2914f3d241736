"""Griffin (arXiv:2402.19427): two recurrent blocks to one block of local attention."""

from models.block import BlockConfig
from models.decoder import DecoderConfig, DType, Remat
from models.layers import attention, gated_mlp, rg_lru
from models.layers.rg_lru import DecayInit


def griffin(
  *,
  vocab_size: int,
  width: int,
  rnn_width: int,
  num_blocks: int,
  num_heads: int,
  head_size: int,
  window: int,
  mlp_width: int,
  num_gate_blocks: int = 16,
  decay_init: DecayInit = "paper",
  dtype: DType = "bfloat16",
  param_dtype: DType = "float32",
  remat: Remat = "block",
) -> DecoderConfig:
  """Blocks R, R, A, R, R, A, ... cut off at `num_blocks`; no embedding scale, no logit cap."""
  mlp = gated_mlp.Config(mlp_width=mlp_width)
  recurrent = BlockConfig(
    mixer=rg_lru.Config(
      rnn_width=rnn_width, num_gate_blocks=num_gate_blocks, decay_init=decay_init
    ),
    mlp=mlp,
  )
  local = BlockConfig(
    mixer=attention.Config(num_heads=num_heads, head_size=head_size, window=window), mlp=mlp
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    num_blocks=num_blocks,
    pattern=(recurrent, recurrent, local),
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )
