"""Opens in transformers what we write: recurrentgemma_hf/ours*, llama_hf/ours*, tokenizers_hf/.

Fails if a tensor is missing, unexpected or of another shape, or if the config reads otherwise than
meant; records the logits, computed in float32, in ours_logits.npz, and the ids of the tokenizers in
ids.json. When to run it is said in save_for_transformers.py and make_tokenizers_hf.py; the
environment is that of make_llama_hf.py.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent
TOKENIZERS = GOLDEN / "tokenizers_hf"
TEXTS = ["Friends, Romans", " déjà  vu\t— 日本 🎭\n", "don't", "a\x00b"]

# What the configs must read as in transformers.
EVERY = {
  "vocab_size": 37, "hidden_size": 16, "bos_token_id": None, "eos_token_id": 1,
  "pad_token_id": None,
}  # fmt: skip
GRIFFIN = {
  "lru_width": 24, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 2,
  "num_key_value_heads": 1, "head_dim": 8, "conv1d_width": 4, "attention_window_size": 12,
  "logits_soft_cap": 20.0,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
LLAMA = {
  "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SCALED = {
  "rope_type": "llama3", "rope_theta": 500.0, "factor": 32.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
OTHERS = {
  ("recurrentgemma_hf", "ours_hawk"): {
    "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4, "logits_soft_cap": 30.0,
    "attention_window_size": 2048,
  },
  ("llama_hf", "ours_tied_bfloat16"): {
    "num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True,
    "rope_parameters": SCALED,
  },
}  # fmt: skip


def main():
  models()
  tokenizers()


def models():
  for family, meant in (("recurrentgemma_hf", GRIFFIN), ("llama_hf", LLAMA)):
    arrays = {}
    for folder in sorted((GOLDEN / family).glob("ours*/")):
      stored = transformers.AutoModelForCausalLM.from_pretrained(folder)
      expected = torch.bfloat16 if "bfloat16" in folder.name else torch.float32
      assert stored.dtype == expected, f"{folder}: opened as {stored.dtype}, saved as {expected}"
      model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
      )
      for problem, names in info.items():
        assert not names, f"{folder}: {problem}: {names}"
      for key, value in (EVERY | meant | OTHERS.get((family, folder.name), {})).items():
        got = getattr(model.config, key)
        assert got == value, f"{folder}: {key} reads {got!r}, meant {value!r}"
      tokens_BT = np.random.RandomState(3).randint(0, 37, (2, 12)).astype(np.int32)
      with torch.no_grad():
        logits_BTV = model.eval()(torch.from_numpy(tokens_BT).long(), use_cache=False).logits
      name = folder.name
      arrays |= {f"{name}/tokens_BT": tokens_BT, f"{name}/logits_BTV": logits_BTV.numpy()}
      print(family, name, "opened; largest logit", float(logits_BTV.abs().max()))
    np.savez_compressed(GOLDEN / family / "ours_logits.npz", **arrays)


def tokenizers():
  """The ids are the same whatever model lies beside the tokenizer."""
  recorded = {}
  for folder in sorted(path for path in TOKENIZERS.iterdir() if path.is_dir()):
    for model_type in ("recurrent_gemma", "llama"):
      with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        (pathlib.Path(place) / "config.json").write_text(json.dumps({"model_type": model_type}))
        words = transformers.AutoTokenizer.from_pretrained(place)
        found = {
          "special": [words.bos_token_id, words.eos_token_id, words.pad_token_id],
          "texts": {text: words(text)["input_ids"] for text in TEXTS},
        }
        for text, ids in found["texts"].items():
          assert words.decode(ids, skip_special_tokens=True) == text, (folder, text)
        assert recorded.setdefault(folder.name, found) == found, (folder, model_type)
    print(folder.name, "opened as", type(words).__name__)
  text = json.dumps(recorded, indent=1, sort_keys=True, ensure_ascii=False)
  (TOKENIZERS / "ids.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
