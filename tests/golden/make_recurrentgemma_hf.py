"""Writes tests/golden/recurrentgemma_hf/: tiny directories that `transformers` saved, with logits.

  python3.11 -m venv ~/oracle
  ~/oracle/bin/pip install "torch==2.13.0" "transformers==5.24.0" "numpy>=2.2"
  ~/oracle/bin/python tests/golden/make_recurrentgemma_hf.py

single/ is float32 in one file; sharded/ the same model in bfloat16, in several files with an index;
hawk/ has recurrent blocks only. logits.npz has tokens and float32 logits for each (sharded/: of the
rounded weights, computed in float32), on rows no longer than the window: past it `transformers`
sees one key less than the model was trained with.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "recurrentgemma_hf"
WINDOW = 12


def main():
  arrays = {}
  for seed, (name, block_types) in enumerate(
    {
      "single": ["recurrent", "recurrent", "attention"],
      "sharded": ["recurrent", "recurrent", "attention"],
      "hawk": ["recurrent"],
    }.items()
  ):
    config = transformers.RecurrentGemmaConfig(
      vocab_size=37,
      hidden_size=16,
      lru_width=24,
      intermediate_size=2 * 40,  # twice the MLP's width
      num_hidden_layers=2 if name == "hawk" else 5,
      num_attention_heads=2,
      num_key_value_heads=1,
      attention_window_size=WINDOW,
      logits_soft_cap=20.0,
      block_types=block_types,
      attn_implementation="eager",
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    spread(model, np.random.default_rng(0 if name == "sharded" else seed))
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    if name == "sharded":
      model.to(torch.bfloat16).save_pretrained(FOLDER / name, max_shard_size="20KB")
      # Not model.float(): the rotary frequencies have been rounded too by now.
      model = transformers.RecurrentGemmaForCausalLM.from_pretrained(
        FOLDER / name, dtype=torch.float32, attn_implementation="eager"
      ).eval()
    else:
      model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)

    tokens_BT = np.random.default_rng(7).integers(0, 37, (2, WINDOW), np.int32)
    with torch.no_grad():
      logits_BTV = model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy()
    arrays |= {f"{name}/tokens_BT": tokens_BT, f"{name}/logits_BTV": logits_BTV}
    print(name, "largest logit", np.abs(logits_BTV).max())
  np.savez_compressed(FOLDER / "logits.npz", **arrays)


def spread(model, rng):
  """Gives every parameter values that have an effect, multiples of 2^-10."""
  with torch.no_grad():
    for name, weight in model.named_parameters():
      normal = rng.normal(size=tuple(weight.shape))
      if name.endswith("recurrent_param"):
        values = rng.uniform(-6.0, 1.0, weight.shape)
      elif "conv_1d.weight" in name:
        values = 0.5 * normal
      elif "embed_tokens" in name:
        values = 1.5 * normal / np.sqrt(weight.shape[-1])
      elif weight.ndim == 1 or name.endswith("gate_bias"):
        values = 0.3 * normal
      elif name.endswith("gate_weight"):
        values = normal / np.sqrt(weight.shape[-2])
      else:
        values = normal / np.sqrt(weight.shape[-1])
      weight.copy_(torch.from_numpy(np.round(values * 1024) / 1024))


if __name__ == "__main__":
  main()
