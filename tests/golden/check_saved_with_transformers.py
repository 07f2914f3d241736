"""Opens in transformers what we write: recurrentgemma_hf/ours* and tokenizers_hf/.

Fails if a tensor is missing, unexpected or of another shape, or if the config reads otherwise than
meant; records the logits, computed in float32, in ours_logits.npz, and the ids of the tokenizers in
ids.json. When to run it is said in save_for_transformers.py and make_tokenizers_hf.py; the
environment is that of make_recurrentgemma_hf.py.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "recurrentgemma_hf"
TOKENIZERS = pathlib.Path(__file__).parent / "tokenizers_hf"
TEXTS = ["Friends, Romans", " déjà  vu\t— 日本 🎭\n", "don't", "a\x00b"]


def main():
  models()
  tokenizers()


def models():
  arrays = {}
  for name in ("ours", "ours_bfloat16", "ours_hawk"):
    stored = transformers.RecurrentGemmaForCausalLM.from_pretrained(FOLDER / name)
    expected = torch.bfloat16 if name == "ours_bfloat16" else torch.float32
    assert stored.dtype == expected, f"{name}: opened as {stored.dtype}, saved as {expected}"
    model, info = transformers.RecurrentGemmaForCausalLM.from_pretrained(
      FOLDER / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for problem, names in info.items():
      assert not names, f"{name}: {problem}: {names}"
    check(name, model.config)
    tokens_BT = np.random.RandomState(3).randint(0, 37, (2, 12)).astype(np.int32)
    with torch.no_grad():
      logits_BTV = model.eval()(torch.from_numpy(tokens_BT).long(), use_cache=False).logits
    arrays |= {f"{name}/tokens_BT": tokens_BT, f"{name}/logits_BTV": logits_BTV.numpy()}
    print(name, "opened; largest logit", float(logits_BTV.abs().max()))
  np.savez_compressed(FOLDER / "ours_logits.npz", **arrays)


def check(name, config):
  meant = {
    "vocab_size": 37,
    "hidden_size": 16,
    "lru_width": 24,
    "intermediate_size": 80,
    "num_hidden_layers": 2 if name == "ours_hawk" else 5,
    "num_attention_heads": 4 if name == "ours_hawk" else 2,
    "num_key_value_heads": 1,
    "head_dim": 4 if name == "ours_hawk" else 8,
    "conv1d_width": 4,
    "attention_window_size": 2048 if name == "ours_hawk" else 12,
    "logits_soft_cap": 30.0 if name == "ours_hawk" else 20.0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "rope_parameters": {
      "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5
    },
  }  # fmt: skip
  for key, value in meant.items():
    got = getattr(config, key)
    assert got == value, f"{name}: {key} reads {got!r}, meant {value!r}"


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
