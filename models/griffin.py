"""Griffin (arXiv:2402.19427): two recurrent blocks to one block of local attention."""

from models import residual_block
from models.decoder import DecoderConfig, DType, EmbeddingScale, Remat
from models.layers import attention, mlp, rg_lru
from models.layers.rg_lru import DecayInit
from models.sizes import Size


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
  embedding_scale: EmbeddingScale = "none",
  logit_cap: float | None = None,
  dtype: DType = "bfloat16",
  param_dtype: DType = "float32",
  remat: Remat = "block",
) -> DecoderConfig:
  """Blocks R, R, A, R, R, A, ... cut off at `num_blocks`."""
  geglu = mlp.Config(mlp_width=mlp_width)
  recurrent = residual_block.Config(
    mixer=rg_lru.Config(
      rnn_width=rnn_width, num_gate_blocks=num_gate_blocks, decay_init=decay_init
    ),
    mlp=geglu,
  )
  local = residual_block.Config(
    mixer=attention.Config(num_heads=num_heads, head_size=head_size, window=window), mlp=geglu
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    num_blocks=num_blocks,
    pattern=(recurrent, recurrent, local),
    embedding_scale=embedding_scale,
    logit_cap=logit_cap,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )


def of_size(
  size: Size,
  *,
  vocab_size: int,
  window: int = 1024,
  num_gate_blocks: int = 16,
  dtype: DType = "bfloat16",
  remat: Remat = "block",
) -> DecoderConfig:
  """The Griffin of a row of the size table. The defaults are the paper's: sections 2.3 and 4.1."""
  return griffin(
    vocab_size=vocab_size,
    width=size.width,
    rnn_width=size.rnn_width,
    num_blocks=size.num_blocks,
    num_heads=size.num_heads,
    head_size=size.head_size,
    window=window,
    mlp_width=size.mlp_width,
    num_gate_blocks=num_gate_blocks,
    dtype=dtype,
    remat=remat,
  )


def recurrentgemma_2b() -> DecoderConfig:
  """RecurrentGemma 2B (arXiv:2404.07839): 2.03B parameters and 0.66B of embedding."""
  return _recurrentgemma(width=2560, num_blocks=26, num_heads=10)


def recurrentgemma_9b() -> DecoderConfig:
  """RecurrentGemma 9B (arXiv:2404.07839v2): 7.53B parameters and 1.05B of embedding."""
  return _recurrentgemma(width=4096, num_blocks=38, num_heads=16)


def _recurrentgemma(*, width: int, num_blocks: int, num_heads: int) -> DecoderConfig:
  """Griffin with scaled embeddings, capped logits, and one gate block for each head."""
  return griffin(
    vocab_size=256_000,
    width=width,
    rnn_width=width,
    num_blocks=num_blocks,
    num_heads=num_heads,
    head_size=width // num_heads,
    window=2048,
    mlp_width=3 * width,
    num_gate_blocks=num_heads,
    decay_init="recurrentgemma",
    embedding_scale="sqrt_width",
    logit_cap=30.0,
  )
