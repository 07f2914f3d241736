"""Which steps are spikes, whatever the host has already read; settings that cannot work."""

import types

import numpy as np
import pytest

from data.pipeline import DataConfig
from train import replay
from train.bad_steps import BadStepError, BadStepPolicy, BadSteps, RollBack
from train.step import NO_LIMITS

DATA = DataConfig(sources=(("nowhere", 1.0),), row_length=16)
POLICY = BadStepPolicy(spike="skip", spike_window=8, spike_deviations=3.0)


def _good_steps(tmp_path, losses, policy=POLICY):
  bad_steps = BadSteps(policy, tmp_path, data=DATA, batch_size=8)
  for step, loss in enumerate(losses, start=1):
    told = types.SimpleNamespace(is_applied=True, loss=loss, grad_norm=1.0)
    assert bad_steps.remember(step, told)
  return bad_steps


def test_a_limit_is_the_median_and_the_spread_of_the_steps_before_the_last(tmp_path):
  losses = [9.0, 2.0, 2.1, 1.9, 2.2, 1.8, 2.3, 1.7, 2.0]
  bad_steps = _good_steps(tmp_path, losses)
  assert bad_steps.limits(9) == NO_LIMITS
  limits = bad_steps.limits(10)
  # Of steps 1 to 8: median 2.05; deviations 6.95 .05 .05 .15 .15 .25 .25 .35, median 0.2.
  assert limits.loss == pytest.approx(2.05 + 3 * 1.4826 * 0.2)
  assert limits.loss.dtype == np.float32
  # All equal: a thousandth of the median is the least deviation.
  assert limits.grad_norm == pytest.approx(1.003)
  # Whether step 10 has been read already, as before a checkpoint, makes no difference to step 11.
  early = _good_steps(tmp_path, [*losses, 50.0])
  assert early.limits(11) == bad_steps.limits(11)
  # Nor does a restart.
  again = BadSteps(POLICY, tmp_path, data=DATA, batch_size=8)
  again.begin(10, early.record(10))
  assert again.limits(11) == early.limits(11)
  ignoring = BadStepPolicy(spike_window=8)
  assert _good_steps(tmp_path, losses, ignoring).limits(10) == NO_LIMITS


def test_rollbacks_to_one_checkpoint_end_and_the_next_checkpoint_counts_anew(tmp_path):
  policy = BadStepPolicy(non_finite="rollback", max_rollbacks=2, also_before=1)
  bad_steps = BadSteps(policy, tmp_path, data=DATA, batch_size=8)
  bad_steps.begin(0, None)
  for checkpoint, step, expected in [
    (10, 12, (10, 11)),
    (10, 11, (10, 11, 12)),
    # Step 21 is the first after its checkpoint: nothing before it is passed over.
    (20, 21, (10, 11, 12, 23)),
  ]:
    record = bad_steps.record(checkpoint)
    bad_steps.pass_over(RollBack(step, "bad"), checkpoint=checkpoint)
    bad_steps.begin(checkpoint, record)
    assert bad_steps.passed_over == expected
  with pytest.raises(BadStepError, match=r"checkpoint of step 10 2 times, .*max_rollbacks is 2"):
    bad_steps.pass_over(RollBack(13, "bad"), checkpoint=10)
  (tmp_path / "passed_over.json").write_text("{")
  with pytest.raises(ValueError, match=r"passed_over.json cannot be read .*mend it, or move it"):
    bad_steps.begin(0, None)


def test_what_the_run_told_of_a_step_is_found_among_lines_of_others(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"epoch": 3}\n{"step": 4, "train/loss": 2.5}\n')
  assert replay._found(tmp_path, 4).told == 2.5
  assert replay._found(tmp_path, 3).told is None


def test_gradient_norms_of_a_replay_are_of_the_mean_over_targets_the_worst_first():
  square_norms = {"a": {"w": np.array([36.0, 9.0])}, "b": np.array(np.inf), "c": np.array(81.0)}
  norms = [("b", np.inf), ("c", 3.0), ("a/w[0]", 2.0), ("a/w[1]", 1.0)]
  assert replay._by_badness(square_norms, 3.0) == norms
  assert replay._by_badness({"c": np.array(0.0)}, 0.0) == [("c", 0.0)]  # a batch of padding


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"non_finite": "ignore"}, "non_finite 'ignore' is none of"),
    ({"spike": "never"}, "spike 'never' is none of"),
    ({"max_rollbacks": 0}, "max_rollbacks 0 must be at least 1"),
    ({"also_before": -1}, "also_before -1 must be at least 0"),
    ({"spike_window": 3}, "spike_window 3 must be at least 4"),
    ({"spike_deviations": 0.0}, "spike_deviations 0.0 must be above 0"),
  ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    BadStepPolicy(**settings)
