"""The multi-query-attention Transformer that Griffin is compared with (arXiv:2402.19427)."""

from models import residual_block
from models.decoder import DecoderConfig, DType, Remat
from models.layers import attention, mlp
from models.sizes import Size


def mqa_transformer(
  *,
  vocab_size: int,
  width: int,
  num_blocks: int,
  num_heads: int,
  head_size: int,
  mlp_width: int,
  window: int | None = None,
  dtype: DType = "bfloat16",
  param_dtype: DType = "float32",
  remat: Remat = "block",
) -> DecoderConfig:
  """`num_blocks` blocks of attention over the whole row, or over a window where one is given."""
  block = residual_block.Config(
    mixer=attention.Config(num_heads=num_heads, head_size=head_size, window=window),
    mlp=mlp.Config(mlp_width=mlp_width),
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    num_blocks=num_blocks,
    pattern=(block,),
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )


def of_size(
  size: Size, *, vocab_size: int, dtype: DType = "bfloat16", remat: Remat = "block"
) -> DecoderConfig:
  """The Transformer of a row of the size table, with global attention."""
  return mqa_transformer(
    vocab_size=vocab_size,
    width=size.width,
    num_blocks=size.num_blocks,
    num_heads=size.num_heads,
    head_size=size.head_size,
    mlp_width=size.mlp_width,
    dtype=dtype,
    remat=remat,
  )
