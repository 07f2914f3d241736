"""Writes tests/golden/llama_hf/: tiny Llamas that `transformers` saved, with logits and gradients.

  python3.11 -m venv ~/oracle
  ~/oracle/bin/pip install "torch==2.13.0" "transformers==5.24.0" "numpy>=2.2"
  ~/oracle/bin/python tests/golden/make_llama_hf.py

scaled/ is float32 in one file, untied, with two key-value heads and Llama-3's scaling; its
config.json is that of transformers 5 (rope_parameters). tied/ is bfloat16 in several files, tied,
with one key-value head and heads wider than width / heads; its config.json is of the older form
(rope_theta and rope_scaling). multi/ has a key-value head for each head and leaves all to defaults
that old files leave out.

golden.npz holds for each, computed in float64 but for the rotary angles, which are float32 there
(tied/: of the rounded weights): "plain" rows that are one document, "packed" rows of several, each
computed alone, with padding (segment 0) after them. The loss is the mean cross-entropy of the next
token, over all tokens followed by one of their document, plus the sum of mix_BTV * logits_BTV over
all tokens divided by their number. Gradients have the names of the tensors.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "llama_hf"
TIME = 24
PACKED = [[7, 11, 4], [1, 2, 15]]
SCALING = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,  # a frequency of the four is in each of three bands
}
SETTINGS = {
  "vocab_size": 37,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "rms_norm_eps": 1e-5,
  "attn_implementation": "eager",
}
MODELS = {
  "scaled": {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": SCALING | {"rope_theta": 500.0},
  },
  "tied": {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": SCALING | {"rope_theta": 500.0, "factor": 32.0},
  },
  "multi": {"num_hidden_layers": 1},
}


def main():
  arrays = {}
  for seed, (name, settings) in enumerate(MODELS.items()):
    config = transformers.LlamaConfig(**SETTINGS | settings)
    model = transformers.LlamaForCausalLM(config)
    spread(model, np.random.default_rng(seed))
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    if name == "tied":
      model.to(torch.bfloat16)
    model.save_pretrained(FOLDER / name, max_shard_size="6KB" if name == "tied" else "1GB")
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    if name != "scaled":
      write_old_config(FOLDER / name / "config.json")
    # Not model.float(): the rotary frequencies have been rounded too by now.
    model, info = transformers.LlamaForCausalLM.from_pretrained(
      FOLDER / name, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    for problem, names in info.items():
      assert not names, f"{name}: {problem}: {names}"
    assert model.config.rope_parameters == config.rope_parameters, model.config.rope_parameters
    rng = np.random.default_rng(7)
    for case, lengths in (("plain", [[TIME]] * 2), ("packed", PACKED)):
      found = run(model, lengths, rng)
      arrays |= {f"{name}/{case}/{key}": value for key, value in found.items()}
      print(name, case, "loss", found["loss"], "largest logit", np.abs(found["logits_BTV"]).max())
  np.savez_compressed(FOLDER / "golden.npz", **arrays)


def run(model, lengths, rng):
  """Rows of documents of these lengths, each document run alone; all arrays of a case."""
  tokens_BT = rng.integers(0, 37, (2, TIME), np.int32)
  mix_BTV = (0.1 * rng.normal(size=(2, TIME, 37))).astype(np.float32)
  segments_BT = np.zeros((2, TIME), np.int32)
  logits_BTV = np.zeros((2, TIME, 37), np.float32)
  num_tokens = sum(map(sum, lengths))
  num_targets = num_tokens - sum(map(len, lengths))
  total = torch.zeros((), dtype=torch.float64)
  model.zero_grad()
  for row, of_row in enumerate(lengths):
    start = 0
    for number, length in enumerate(of_row, start=1):
      part = slice(start, start + length)
      start += length
      segments_BT[row, part] = number
      tokens_T = torch.from_numpy(tokens_BT[row, part]).long()
      logits_TV = model(tokens_T[None], use_cache=False).logits[0]
      logits_BTV[row, part] = logits_TV.detach().numpy()
      total = total + (torch.from_numpy(mix_BTV[row, part]) * logits_TV).sum() / num_tokens
      if length > 1:
        total = (
          total
          + torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="sum")
          / num_targets
        )
  total.backward()
  return {
    "tokens_BT": tokens_BT,
    "segments_BT": segments_BT,
    "mix_BTV": mix_BTV,
    "logits_BTV": logits_BTV,
    "loss": total.detach().numpy(),
    **{f"grads/{name}": weight.grad.float().numpy() for name, weight in model.named_parameters()},
  }


def write_old_config(path):
  """As transformers 4 wrote it; what is default there is left out."""
  settings = json.loads(path.read_text())
  rope = settings.pop("rope_parameters")
  if rope["rope_type"] == "default":
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
      del settings[key]
  else:
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope
  settings["torch_dtype"] = settings.pop("dtype")
  path.write_text(json.dumps(settings, indent=2) + "\n")


def spread(model, rng):
  """Gives every parameter values that have an effect, multiples of 2^-10."""
  with torch.no_grad():
    for name, weight in model.named_parameters():
      normal = rng.normal(size=tuple(weight.shape))
      values = 1 + 0.3 * normal if "norm" in name else normal / np.sqrt(weight.shape[-1])
      weight.copy_(torch.from_numpy(np.round(values * 1024) / 1024))


if __name__ == "__main__":
  main()
