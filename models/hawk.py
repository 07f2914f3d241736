"""Hawk (arXiv:2402.19427): recurrent blocks only."""

from models import residual_block
from models.decoder import DecoderConfig, DType, Remat
from models.layers import mlp, rg_lru
from models.layers.rg_lru import DecayInit
from models.sizes import Size


def hawk(
  *,
  vocab_size: int,
  width: int,
  rnn_width: int,
  num_blocks: int,
  mlp_width: int,
  num_gate_blocks: int = 16,
  decay_init: DecayInit = "paper",
  dtype: DType = "bfloat16",
  param_dtype: DType = "float32",
  remat: Remat = "block",
) -> DecoderConfig:
  """`num_blocks` recurrent blocks; no embedding scale, no logit cap."""
  recurrent = residual_block.Config(
    mixer=rg_lru.Config(
      rnn_width=rnn_width, num_gate_blocks=num_gate_blocks, decay_init=decay_init
    ),
    mlp=mlp.Config(mlp_width=mlp_width),
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    num_blocks=num_blocks,
    pattern=(recurrent,),
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )


def of_size(
  size: Size,
  *,
  vocab_size: int,
  num_gate_blocks: int = 16,
  dtype: DType = "bfloat16",
  remat: Remat = "block",
) -> DecoderConfig:
  """The Hawk of a row of the size table. The default is the paper's: section 4.1."""
  return hawk(
    vocab_size=vocab_size,
    width=size.width,
    rnn_width=size.rnn_width,
    num_blocks=size.num_blocks,
    mlp_width=size.mlp_width,
    num_gate_blocks=num_gate_blocks,
    dtype=dtype,
    remat=remat,
  )
