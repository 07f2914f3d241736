"""The commands around a run: text from it (launch.generate) and its speed (launch.bench)."""

import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import console
from models import decoder
from models.generate import generate
from models.hawk import hawk
from tests.compiler_flags import FAST_TO_COMPILE
from tests.reported_runs import killed_run


def test_generated_tokens_are_the_likeliest_of_the_parallel_pass():
  config = hawk(vocab_size=40, width=16, rnn_width=16, num_blocks=1, mlp_width=24, dtype="float32")
  model = decoder.build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  # At the table's own scale the model would only repeat its last token.
  params["embedding"]["table_VD"] *= 0.1
  prompt_BT = jax.random.randint(jax.random.key(1), (2, 5), 0, 40)
  segments_BT = jnp.ones((2, 5), jnp.int32).at[1, :3].set(0)
  settings = {"num_tokens": 9, "key": jax.random.key(2)}
  tokens_BT = generate(model, params, prompt_BT, segments_BT, temperature=0.0, **settings)
  assert tokens_BT.shape == (2, 9)
  assert len(np.unique(tokens_BT)) > 3
  whole_BT = jnp.concatenate([prompt_BT, tokens_BT], axis=1)
  segments_BT = jnp.pad(segments_BT, ((0, 0), (0, 9)), constant_values=1)
  logits_BTV = jax.jit(model.logits)(params, whole_BT, segments_BT)
  np.testing.assert_array_equal(tokens_BT, jnp.argmax(logits_BTV, axis=-1)[:, 4:-1])
  drawn = [generate(model, params, prompt_BT, segments_BT[:, :5], temperature=1.0, **settings)]
  drawn.append(generate(model, params, prompt_BT, segments_BT[:, :5], temperature=1.0, **settings))
  np.testing.assert_array_equal(*drawn)
  assert (drawn[0] != tokens_BT).any()


def test_tokens_are_drawn_anew_each_time_from_logits_over_the_temperature():
  config = hawk(vocab_size=12, width=16, rnn_width=16, num_blocks=1, mlp_width=24, dtype="float32")
  model = decoder.build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  prompt_BT, rows = jnp.full((4000, 1), 5), slice(0, 1)
  ones_BT = jnp.ones_like(prompt_BT)
  logits_V = jax.jit(model.logits)(params, prompt_BT[rows], ones_BT[rows])[0, 0]
  # Far from equally likely, so that the temperature has an effect.
  temperature = float(jnp.std(logits_V))
  settings = {"num_tokens": 2, "key": jax.random.key(1)}
  first_B, _ = generate(model, params, prompt_BT, ones_BT, temperature=temperature, **settings).T
  found_V = np.bincount(first_B, minlength=12) / len(first_B)
  expected_V = jax.nn.softmax(logits_V / temperature)
  assert expected_V.max() > 0.2
  np.testing.assert_allclose(found_V, expected_V, atol=0.03)
  # All 12 equally likely, one token after the other.
  first_B, second_B = generate(model, params, prompt_BT, ones_BT, temperature=1e9, **settings).T
  assert 0.05 < np.mean(first_B == second_B) < 0.12


@pytest.mark.parametrize(
  ("prompt", "temperature", "message"),
  [
    (np.ones(4, np.int32), 0.0, r"tokens are int32 \(4,\).*\[batch, time\], at least one"),
    (np.ones((2, 0), np.int32), 0.0, "the prompt is empty"),
    (np.ones((2, 3), np.int32), float("nan"), "temperature nan at least 0"),
  ],
)
def test_wrong_prompts_and_temperatures_are_named(prompt, temperature, message):
  config = hawk(vocab_size=40, width=16, rnn_width=16, num_blocks=1, mlp_width=24)
  model = decoder.build(config)
  settings = {"num_tokens": 2, "temperature": temperature, "key": jax.random.key(0)}
  with pytest.raises(ValueError, match=message):
    generate(model, model.shapes, prompt, prompt, **settings)


def test_a_run_is_trained_and_continues_a_prompt(commands, tmp_path):
  flags = [f"--config=tests/tiny_config.py:{tmp_path}", f"--workdir={tmp_path / 'run'}"]
  flags += ["--config.total_steps=2", "--config.optimizer.warmup_steps=1"]
  prompt = ["--prompt=abc déf", "--num_tokens=20", "--temperature=0"]
  status, output = commands.run("launch.generate", [*flags, *prompt], tmp_path / "output")
  assert status == 2
  assert "has no checkpoint; train first" in output.splitlines()[-1]
  status, output = commands.run("launch.train", flags, tmp_path / "output")
  assert status == 0, output
  status, output = commands.run("launch.generate", [*flags, *prompt], tmp_path / "output")
  assert status == 0, output
  assert "step 2 of" in output
  assert "orbax" not in output
  other = [*flags, *prompt, "--config.model.width=64"]
  status, wrong = commands.run("launch.generate", other, tmp_path / "output")
  assert status == 2
  assert wrong.splitlines()[-1].startswith("error: ")
  assert "is not of this model and optimizer" in wrong.splitlines()[-1]
  text = output.partition("\nabc déf")[2]
  assert len(text) > 1, output
  split = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
  devices = f"{FAST_TO_COMPILE} --xla_force_host_platform_device_count=8"
  status, output = commands.run(
    "launch.generate", [*flags, *prompt, *split], tmp_path / "output", XLA_FLAGS=devices
  )
  assert status == 0, output
  assert output.partition("\nabc déf")[2] == text


def test_the_bench_prints_one_json_object(commands, tmp_path):
  flags = [f"--config=tests/tiny_config.py:{tmp_path}", "--config.statistics.every=10"]
  flags += ["--steps=2", "--warmup=1", "--loader_seconds=0.1", "--statistics"]
  status, output = commands.run("launch.bench", flags, tmp_path / "output")
  assert status == 0, output
  told = json.loads(output.splitlines()[-1])
  for name in ("tokens_per_second", "compile_seconds", "peak_bytes", "loader_tokens_per_second"):
    assert told[name] > 0, name
  tokens = told["tokens_per_second"] * told["step_seconds"]["median"]
  assert tokens == pytest.approx(8 * 16, rel=1e-3)
  assert (told["config"], told["overrides"]) == ("tiny", {"statistics.every": 10})
  assert 0 < told["statistics"]["share"] < told["statistics"]["of_a_step"]
  flags.append("--config.xla_flags.set=xla_foo=1")
  status, output = commands.run("launch.bench", flags, tmp_path / "output")
  assert status == 2, output
  assert "error: XlaFlags: this compiler for cpu has no flag xla_foo" in output.splitlines()[-1]


@pytest.mark.parametrize(
  ("module", "argument", "words"),
  [
    ("launch.sweep", "--jobs=0", "--jobs=0"),
    ("launch.sweep", "--workdir=runs/sweep", "--config"),
    ("launch.row_lengths", "--remat=all", "none|matmuls|block"),
    ("launch.published", "--recrod=x", "recrod"),
    ("launch.report", "--outptu=x", "outptu"),
    ("launch.prepare", "--workers=0", "--workers=0"),
    ("launch.row_lengths", "--json=runs/none/x.jsonl", "no folder 'runs/none'"),
    ("launch.row_lengths", "--svg=docs", "--svg=docs is a folder"),
    ("launch.row_lengths", "--rows=2048,0", "'0' is no row length"),
    ("launch.row_lengths", "--rows=4k", "'4k' is no row length"),
    ("launch.row_lengths", "--families=", "--families is empty"),
    ("launch.row_lengths", "--families=megalodon", "'megalodon' is none of transformer, hawk"),
    ("launch.published", "--record=runs/none/x.jsonl", "no folder 'runs/none'"),
    ("launch.generate", "--config=configs/smoke.py --temperature=nan", "--temperature=nan"),
    ("launch.generate", "--config=configs/smoke.py --seed=99999999999999999999", "--seed=9999"),
    ("launch.generate", "--config=configs/smoke.py --num_tokens=99999999999", "--num_tokens=9999"),
    ("launch.plan", "--config=configs/smoke.py --price_per_chip_hour=nan", "chip_hour=nan"),
    (
      "launch.plan",
      "--config=configs/hawk.py:100m --chip=h100 --chips=8 --search --config.mesh.sequence=3",
      "mesh.sequence 3 does not divide the 8 devices",
    ),
  ],
)
def test_a_wrong_flag_is_one_line_and_status_2(commands, tmp_path, module, argument, words):
  status, output = commands.run(module, argument.split(), tmp_path / "output")
  assert status == 2
  (line,) = output.splitlines()
  assert line.startswith("error: ")
  assert words in line


def test_a_search_where_nothing_fits_says_what_it_takes(commands, tmp_path):
  flags = ["--config=configs/hawk.py:3b", "--chip=v5e", "--chips=1", "--compile=0"]
  status, output = commands.run("launch.plan", flags, tmp_path / "output")
  assert status == 1, output
  found, _, taken = output.partition("none of these fits:\n")[2].partition("no layout fits v5e:1x1")
  sizes = re.findall(r"DOES NOT FIT, ([\d.]+) GB", found)
  assert sizes == sorted(sizes, key=float)
  assert len(sizes) > 1
  assert f"the least is {sizes[0]} GB on each device" in taken
  assert "it takes v5e:2x2: --config.mesh.fsdp=4" in taken


@pytest.mark.parametrize(
  ("module", "arguments", "words"),
  [
    ("launch.report", ["{run}", "--output=/dev/full"], "/dev/full: No space left"),
    (
      "launch.plan",
      [
        "--config=configs/hawk.py:100m",
        "--chip=v5e",
        "--chips=8",
        "--compile=0",
        "--json=/dev/full",
      ],
      "/dev/full: No space left",
    ),
    (
      "launch.sweep",
      ["--config=configs/scaling.py:mini", "--workdir=README.md/mini"],
      "README.md/mini: Not a directory",
    ),
  ],
)
def test_what_the_storage_refuses_is_one_line_and_status_2(
  commands, tmp_path, module, arguments, words
):
  killed_run(tmp_path / "run")
  arguments = [one.format(run=tmp_path / "run") for one in arguments]
  status, output = commands.run(module, arguments, tmp_path / "output")
  assert status == 2, output
  line = output.splitlines()[-1]
  assert line.startswith("error: ")
  assert words in line
  assert "Traceback" not in output


def test_a_full_disk_leaves_no_part_of_a_new_file(tmp_path, capsys):
  path = tmp_path / "page.html"

  def write():
    with console.writing(path):
      path.write_text("part of it")
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  for is_new in (True, False):
    with pytest.raises(SystemExit) as left:
      write()
    assert left.value.code == 2
    assert re.fullmatch(f"error: {path}: No space left on device: .*\n", capsys.readouterr().err)
    assert path.exists() is not is_new
    path.touch()
