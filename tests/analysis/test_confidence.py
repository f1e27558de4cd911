"""Bootstrap intervals against scipy's, and what they are for."""

import numpy as np
import pytest

from tsparse.analysis import confidence


def documents(n, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(5, 400, n)
  return tokens * rng.normal(2.0, 0.5, n), tokens


def test_the_interval_is_that_of_scipy():
  from scipy.stats import bootstrap

  nll, tokens = documents(60)
  theirs = bootstrap(
    (nll, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile", n_resamples=20_000,
    rng=1,
  ).confidence_interval  # fmt: skip
  lo, hi = confidence.interval(nll, tokens)
  width = theirs.high - theirs.low
  assert abs(lo - theirs.low) < 0.06 * width and abs(hi - theirs.high) < 0.06 * width
  assert [lo, hi] == confidence.interval(nll, tokens)  # the same every time
  assert confidence.interval(nll[:1], tokens[:1]) is None


def test_it_holds_the_truth_about_as_often_as_it_says_and_blocks_change_nothing(monkeypatch):
  held = 0
  for seed in range(100):
    lo, hi = confidence.interval(*documents(50, seed))
    held += lo < 2.0 < hi
  assert 88 <= held <= 99
  whole = confidence.interval(*documents(50))
  monkeypatch.setattr(confidence, "BLOCK", 50 * 64)
  np.testing.assert_allclose(confidence.interval(*documents(50)), whole, rtol=1e-12)


def test_models_on_the_same_tokens_are_compared_in_pairs():
  nll, tokens = documents(200)
  harder = nll + tokens * np.random.default_rng(1).normal(0.01, 0.02, 200)
  model = {"data": "text", "vocabulary": "bytes"}

  def entry(name, nll, **other):
    return model | {"name": name, "per_document": {"nll": nll.tolist(), "tokens": tokens.tolist()}} | other

  models = [entry("a", nll), entry("b", harder), entry("c", nll, vocabulary="other")]
  (found,) = confidence.comparisons(models)
  assert found["models"] == ["a", "b"]
  assert found["difference"] == pytest.approx((harder - nll).sum() / tokens.sum())
  lo, hi = found["interval"]
  alone = np.diff(confidence.interval(nll, tokens))[0]
  assert 0 < lo < found["difference"] < hi and hi - lo < alone / 10  # what is common to both has cancelled
