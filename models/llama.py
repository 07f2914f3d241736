"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783): the Transformer that others compare with.

RMSNorm with a plain weight, rotary positions on whole heads, some or all heads with a key and value
of their own, SwiGLU, no biases. The papers do not say how weights begin: here as those of the other
families, by layer (models/initial_weights.py: FanIn).
"""

from typing import Literal

from models import residual_block
from models.decoder import DecoderConfig, DType, Remat
from models.layers import attention, mlp, norms
from models.layers.rope import Llama3Scaling, Rope
from models.sizes import Size

PUBLISHED = ("2-7b", "2-13b", "3-8b", "3.2-1b", "3.2-3b")


def llama(
  *,
  vocab_size: int,
  width: int,
  num_blocks: int,
  num_heads: int,
  num_kv_heads: int,
  mlp_width: int,
  theta: float = 10_000.0,
  rope_scaling: Llama3Scaling | None = None,
  unembedding: Literal["tied", "own"] = "own",
  dtype: DType = "bfloat16",
  param_dtype: DType = "float32",
  remat: Remat = "block",
) -> DecoderConfig:
  """`num_blocks` blocks of global attention; heads of width / num_heads."""
  if width % num_heads:
    raise ValueError(f"llama: width {width} is not divisible by num_heads {num_heads}")
  norm = norms.Config(weight="scale", epsilon=1e-5)
  block = residual_block.Config(
    mixer=attention.Config(
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_size=width // num_heads,
      window=None,
      rope=Rope(share=1.0, theta=theta, scaling=rope_scaling),
      output_bias=False,
    ),
    mlp=mlp.Config(mlp_width=mlp_width, activation="silu", biases=False),
    norm=norm,
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    num_blocks=num_blocks,
    pattern=(block,),
    final_norm=norm,
    unembedding=unembedding,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )


def of_size(
  size: Size,
  *,
  vocab_size: int,
  mlp_multiple: int = 64,
  dtype: DType = "bfloat16",
  remat: Remat = "block",
) -> DecoderConfig:
  """A Llama 2 beside a row of the size table: its width, depth and heads, with tied embeddings.

  Every head has a key and value of its own. The MLP is as wide as gives a block the parameters of
  the multi-query Transformer's, which has more of them there and fewer in attention: about 7/3 of
  the width, where Llama 2 has 8/3, rounded to a multiple of `mlp_multiple`.
  """
  # 4 D^2 + 3 D F = (2 D^2 + 2 D H) + 9 D^2 + 8 D; the last are biases.
  mlp_width = (7 * size.width + 2 * size.head_size + 8) / 3
  return llama(
    vocab_size=vocab_size,
    width=size.width,
    num_blocks=size.num_blocks,
    num_heads=size.num_heads,
    num_kv_heads=size.num_heads,
    mlp_width=round(mlp_width / mlp_multiple) * mlp_multiple,
    unembedding="tied",
    dtype=dtype,
    remat=remat,
  )


def published(name: str) -> DecoderConfig:
  """The released model called "2-7b", "2-13b", "3-8b", "3.2-1b" or "3.2-3b"."""
  match name:
    case "2-7b":
      return _llama_2(width=4096, num_blocks=32, num_heads=32, mlp_width=11_008)
    case "2-13b":
      return _llama_2(width=5120, num_blocks=40, num_heads=40, mlp_width=13_824)
    case "3-8b":
      return llama(
        vocab_size=128_256,
        width=4096,
        num_blocks=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14_336,
        theta=500_000.0,
      )
    case "3.2-1b":
      return _llama_3_2(width=2048, num_blocks=16, num_heads=32)
    case "3.2-3b":
      return _llama_3_2(width=3072, num_blocks=28, num_heads=24)
    case _:
      raise ValueError(f"llama: {name!r} is none of the published ones: {', '.join(PUBLISHED)}")


def _llama_2(*, width: int, num_blocks: int, num_heads: int, mlp_width: int) -> DecoderConfig:
  """Every head has a key and value of its own (arXiv:2307.09288, Table 1)."""
  return llama(
    vocab_size=32_000,
    width=width,
    num_blocks=num_blocks,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    mlp_width=mlp_width,
  )


def _llama_3_2(*, width: int, num_blocks: int, num_heads: int) -> DecoderConfig:
  """Tied, and turned more slowly for 128K tokens: as the released config.json says."""
  return llama(
    vocab_size=128_256,
    width=width,
    num_blocks=num_blocks,
    num_heads=num_heads,
    num_kv_heads=8,
    mlp_width=8192,
    theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=32.0, original_context=8192),
    unembedding="tied",
  )
