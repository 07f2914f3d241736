"""Scaling laws fitted to data whose constants are known."""

import html
import json
import re

import numpy as np
import pytest
from scipy import optimize

from tests import drawn
from train.drawing import colors
from train.drawing.numbers import scientific, short
from train.scaling import report as scaling_report
from train.scaling.law import Runs, isoflop, surface
from train.scaling.surface_fit import HUBER_DELTA, fit_surfaces
from train.scaling.sweep import flops_name

# The constants of arXiv:2203.15556.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
TRUTH = {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA, "optimal": BETA / (ALPHA + BETA)}
# L(C), N(C) and D(C) of the synthetic isoFLOP curves.
LOSS, SIZE = (20.0, -0.05), (0.1, 0.48)


def _runs(budgets, sizes, losses_of, *, noise=0.0, seed=0):
  """Runs at `sizes` times the best of each budget, with losses_of(N, D, C)."""
  C = np.repeat(budgets, len(sizes))
  N = SIZE[0] * C ** SIZE[1] * np.tile(sizes, len(budgets))
  D = C / 6 / N
  scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(C)))
  return Runs(C, C, N, D, losses_of(N, D, C) * scatter)


def _surface_loss(N, D, C):
  del C
  return E + A * N**-ALPHA + B * D**-BETA


def _parabola(N, D, C):
  del D
  away = np.log(N / (SIZE[0] * C ** SIZE[1]))
  return np.exp(np.log(LOSS[0] * C ** LOSS[1]) + 0.02 * away**2)


BUDGETS = np.geomspace(1e18, 1e21, 6)
SIZES = np.geomspace(0.2, 5, 7)


def test_without_noise_the_constants_are_found():
  found = surface(_runs(BUDGETS, SIZES, _surface_loss), num_samples=10)
  for name, value in TRUTH.items():
    assert getattr(found, name).value == pytest.approx(value, rel=2e-3), name
  law = isoflop(_runs(BUDGETS, SIZES, _parabola), num_samples=10)
  assert law.loss.coefficient.value == pytest.approx(LOSS[0], rel=1e-6)
  assert law.loss.exponent.value == pytest.approx(LOSS[1], rel=1e-6)
  assert law.parameters.exponent.value == pytest.approx(SIZE[1], rel=1e-6)
  assert law.tokens.exponent.value == pytest.approx(1 - SIZE[1], rel=1e-6)
  assert [one.budget for one in law.minima] == pytest.approx(list(BUDGETS))
  first = law.minima[0]
  assert first.parameters.value == pytest.approx(SIZE[0] * 1e18 ** SIZE[1])
  assert np.exp(np.polyval(first.curve, np.log(first.parameters.value))) == pytest.approx(
    first.loss.value
  )


def _covered(fit, truth, num_datasets):
  """The share of data sets in which each constant lies within its interval of 90 %."""
  hits = dict.fromkeys(truth, 0)
  for seed in range(num_datasets):
    found = fit(seed)
    for name, value in truth.items():
      interval = found[name]
      hits[name] += interval.low <= value <= interval.high
  return {name: count / num_datasets for name, count in hits.items()}


# 90 %, less two standard errors of a share that is counted in so many data sets.
def _least(num_datasets):
  return 0.9 - 2 * np.sqrt(0.9 * 0.1 / num_datasets)


def test_the_surface_is_within_its_own_intervals_nine_times_of_ten():
  num = 100

  def fit(seed):
    runs = _runs(BUDGETS, SIZES, _surface_loss, noise=3e-3, seed=seed)
    return surface(runs, num_samples=80, seed=seed)._asdict()

  covered = _covered(fit, TRUTH, num)
  assert min(covered.values()) >= _least(num), covered
  # Nor are the intervals so wide that they say nothing.
  found = fit(0)
  assert found["alpha"].high - found["alpha"].low < 0.06
  assert found["E"].high - found["E"].low < 0.15


@pytest.mark.parametrize("num_budgets", [3, 5])
def test_the_isoflop_laws_are_within_their_own_intervals_nine_times_of_ten(num_budgets):
  num, budgets = 200, BUDGETS[:num_budgets]
  truth = {
    "loss.coefficient": LOSS[0],
    "loss.exponent": LOSS[1],
    "parameters.exponent": SIZE[1],
    "tokens.exponent": 1 - SIZE[1],
    "first minimum": SIZE[0] * budgets[0] ** SIZE[1],
  }

  def fit(seed):
    runs = _runs(budgets, SIZES[1:-1], _parabola, noise=2e-3, seed=seed)
    law = isoflop(runs, num_samples=150, seed=seed)
    found = {"first minimum": law.minima[0].parameters}
    for power in ("loss", "parameters", "tokens"):
      for name in ("coefficient", "exponent"):
        found[f"{power}.{name}"] = getattr(getattr(law, power), name)
    return found

  covered = _covered(fit, truth, num)
  assert min(covered.values()) >= _least(num), covered
  assert max(covered.values()) <= 0.97, covered


def test_the_fit_is_as_good_as_that_of_scipy_from_the_true_constants():
  runs = _runs(BUDGETS, SIZES, _surface_loss, noise=1e-2, seed=5)
  log_N, log_D, log_L = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.losses)

  def cost(theta):
    e, a, b, alpha, beta = theta
    predicted = np.log(np.exp(e) + np.exp(a - alpha * log_N) + np.exp(b - beta * log_D))
    size = np.abs(predicted - log_L)
    inside = size <= HUBER_DELTA
    return np.where(inside, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum()

  start = np.array([np.log(E), np.log(A), np.log(B), ALPHA, BETA])
  theirs = optimize.minimize(cost, start, method="L-BFGS-B", options={"maxiter": 5000}).fun
  ours = surface(runs, num_samples=10)
  theta = [np.log(ours.E.value), np.log(ours.A.value), np.log(ours.B.value)]
  assert cost([*theta, ours.alpha.value, ours.beta.value]) <= theirs * 1.0001


def test_a_run_that_went_wrong_does_not_bend_the_surface():
  runs = _runs(BUDGETS, SIZES, _surface_loss, noise=3e-3)
  before = surface(runs, num_samples=10)
  runs.losses[10] *= 1.3
  after = surface(runs, num_samples=10)
  assert after.alpha.value == pytest.approx(before.alpha.value, abs=0.02)
  assert after.E.value == pytest.approx(before.E.value, abs=0.05)


def test_a_budget_whose_best_size_was_not_trained_is_left_out_and_named():
  all_small = _runs(BUDGETS[:1], SIZES[:3], _parabola)
  others = _runs(BUDGETS[1:4], SIZES, _parabola)
  runs = Runs(
    *(np.concatenate(pair) for pair in zip(vars(all_small).values(), vars(others).values()))
  )
  law = isoflop(runs, num_samples=10)
  assert law.unbracketed == (1e18,)
  assert [one.budget for one in law.minima] == pytest.approx(list(BUDGETS[1:4]))
  assert law.loss.exponent.value == pytest.approx(LOSS[1], rel=1e-6)
  alone = isoflop(all_small, num_samples=10)
  assert alone.minima == ()
  assert alone.loss is None


def test_a_floor_is_claimed_only_where_the_runs_support_it():
  budgets = np.geomspace(1e17, 1e22, 8)

  def with_floor(N, D, C):
    return _parabola(N, D, C) / (LOSS[0] * C ** LOSS[1]) * (1.5 + 4e4 * C**-0.25)

  floor = isoflop(_runs(budgets, SIZES, with_floor, noise=5e-4)).loss.floor
  assert floor.low <= 1.5 <= floor.high
  assert floor.high - floor.low < 0.2
  law = isoflop(_runs(budgets, SIZES, _parabola, noise=5e-4)).loss
  assert law.floor == (0, 0, 0)
  low, high = law.band(np.array([1e19]))
  assert low < law.at(np.array([1e19])) < high
  few = isoflop(_runs(budgets[::2], SIZES, with_floor, noise=5e-4)).loss
  assert few.floor.value == 0


def test_too_few_runs_make_no_surface():
  assert surface(_runs(BUDGETS[:1], SIZES[:6], _surface_loss)) is None
  starts = np.array([[0.5, 6.0, 6.0, 0.3, 0.3]])
  assert fit_surfaces(np.ones(3), np.ones(3), np.ones((2, 3)), starts).shape == (2, 5)


def test_without_a_degree_of_freedom_an_interval_is_endless():
  law = isoflop(_runs(BUDGETS[:3], SIZES[2:5], _parabola), num_samples=10)
  assert law.loss.exponent.value == pytest.approx(LOSS[1], rel=1e-6)
  assert np.isinf(law.loss.exponent.low)
  assert np.isinf(law.loss.exponent.high)


def _points(tmp_path, **changes):
  """A points.json of two families, the second a tenth worse, and what is in it."""
  runs = _runs(BUDGETS[:3], SIZES, _parabola, noise=1e-3)
  records = [
    {
      "name": f"{family}/{index}/{flops_name(budget)}",
      "family": family,
      "budget": budget,
      "parameters": int(runs.parameters[index]),
      "embedding": 10,
      "tokens": int(runs.tokens[index]),
      "steps": 100,
      "flops": budget,
      "loss": runs.losses[index] * worse,
      "bits_per_byte": 1.0,
      "tokens_per_second": 1.0,
    }
    for family, worse in (("hawk", 1.0), ("transformer", 1.1))
    for index, budget in enumerate(runs.budgets)
  ]
  content = {"config": "a.py:b", "runs": records, "missing": ["hawk/x"], **changes}
  (tmp_path / "points.json").write_text(json.dumps(content))
  return tmp_path / "points.json"


def test_the_page_needs_nothing_else_and_says_what_was_found(tmp_path):
  path = _points(tmp_path)
  output = tmp_path / "out" / "page.html"
  lines = scaling_report.report(path, output)
  page = output.read_text()
  assert not drawn.outside(page)
  assert "1 of 43 runs are missing (hawk/x)" in page
  assert page.count("<svg") == 3
  assert "Hawk is best, and its interval lies below the others'" in lines[0]
  content = json.loads((tmp_path / "out" / "points.json").read_text())
  exponent = content["laws"]["hawk"]["isoflop"]["loss"]["exponent"]
  assert exponent[0] == pytest.approx(LOSS[1], abs=1e-3)
  assert f"C^{exponent[0]:.3g} (" in lines[1]
  # The same from what it wrote, to the byte.
  scaling_report.report(tmp_path / "out" / "points.json", tmp_path / "again" / "page.html")
  for name in ("page.html", "loss.svg", "isoflop.svg", "optimal.svg", "points.json"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def _changed(path, edit):
  """The points of a file after `edit` of each run."""
  content = json.loads(path.read_text())
  for run in content["runs"]:
    edit(run)
  path.write_text(json.dumps(content))
  return scaling_report.read(path)


def test_the_headline_is_of_the_largest_budget(tmp_path):
  def better_where_small(run):
    if run["family"] == "transformer" and run["budget"] < 0.9 * BUDGETS[2]:
      run["loss"] /= 1.1 * 1.1

  laws = scaling_report.fit(_changed(_points(tmp_path), better_where_small))
  assert scaling_report.headline(laws).startswith(f"At {BUDGETS[2]:.0e} FLOPs: hawk ")


def test_the_headline_is_as_sure_as_the_intervals(tmp_path):
  def as_good(run):
    if run["family"] == "transformer":
      run["loss"] /= 1.1 * 0.99999

  laws = scaling_report.fit(_changed(_points(tmp_path), as_good))
  assert "Hawk is best, within the intervals of the next" in scaling_report.headline(laws)


def _column(page, head):
  """name -> what is in the column `head` of the tables of a page that have it."""
  found = {}
  for table in re.findall(r"<table>(.*?)</table>", page):
    heads, *rows = (
      [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
      for row in re.findall(r"<tr>(.*?)</tr>", table)
    )
    if head in heads:
      found |= {row[0]: row[heads.index(head)] for row in reversed(rows)}
  return found


def test_every_column_is_what_its_head_says(tmp_path):
  def half(run):
    run["bits_per_byte"] = run["loss"] / 2

  points = _changed(_points(tmp_path, config="a<i>.py:b"), half)
  laws = scaling_report.fit(points)
  scaling_report.write(points, laws, tmp_path / "page.html")
  page = (tmp_path / "page.html").read_text()
  assert "<h1>Scaling laws: a&lt;i&gt;.py:b</h1>" in page
  first = points.runs[0]
  assert _column(page, "loss, nats/token")[first["name"]] == f"{first['loss']:.4f}"
  assert _column(page, "bits/byte")[first["name"]] == f"{first['loss'] / 2:.4f}"
  best = laws.isoflop["hawk"].minima[0]
  assert _column(page, "D / N")["hawk"] == f"{best.tokens / best.parameters.value:.0f}"
  law = laws.surface["hawk"]
  for head, value in (("α", law.alpha.value), ("β", law.beta.value)):
    assert float(_column(page, head)["hawk"].split()[0]) == pytest.approx(value, abs=1e-3)
  pictures = dict(
    zip(("loss", "isoflop", "optimal"), re.findall(r"<svg.*?</svg>", page, re.S), strict=True)
  )
  for name, picture in pictures.items():
    assert (tmp_path / f"{name}.svg").read_text() == picture + "\n"
  units = {
    "loss": ("training compute C (FLOPs)", "held-out loss (nats per token)"),
    "isoflop": ("parameters N", "held-out loss (nats per token)"),
    "optimal": ("training compute C (FLOPs)", "best number of parameters N"),
  }
  for name, picture in pictures.items():
    words = drawn.words(picture)
    assert set(units[name]) <= words.keys()
    for family in ("Hawk", "Transformer"):
      (word,) = [word for word in words if word.startswith(family)]
      assert drawn.color_of(picture, word) == colors.of_family(family).color
  tooltips = [words for *_, words in drawn.tooltips(pictures["isoflop"])]
  run = f"{short(first['parameters'])} parameters: loss {first['loss']:.4f}"
  assert f"hawk, {scientific(first['budget'])} FLOPs\n{run}" in tooltips


def test_a_budget_that_is_left_out_is_named(tmp_path):
  runs = json.loads(_points(tmp_path).read_text())["runs"]
  assert (runs[3]["family"], runs[6]["budget"]) == ("hawk", BUDGETS[0])
  points = scaling_report.read(_points(tmp_path, runs=runs[:3] + runs[7:]))
  lines = scaling_report.summary(points, scaling_report.fit(points))
  assert "hawk: left out, for the best size was not among the trained: 1e+18" in lines


def test_a_page_of_nothing_is_refused_and_one_of_little_says_so(tmp_path):
  with pytest.raises(ValueError, match="has finished yet"):
    scaling_report.report(_points(tmp_path, runs=[]), None)
  path = _points(tmp_path)
  content = json.loads(path.read_text())
  lines = scaling_report.report(_points(tmp_path, runs=content["runs"][:2]), None)
  assert "hawk: fewer than two budgets" in lines[1]


@pytest.mark.parametrize("text", ["", "[]", '{"config": 1}'])
def test_a_file_that_is_no_sweep_is_named(tmp_path, text):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"config\.json is not the points\.json of a sweep \("):
    scaling_report.read(path)
  (tmp_path / "sweep.json").write_text(text[:1])
  with pytest.raises(ValueError, match=r"sweep\.json is damaged: "):
    scaling_report.read(tmp_path)
