import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from tsparse import sharding
from tsparse.analysis import masks
from tsparse.analysis.analyze import analyze, hidden_statistics
from tsparse.data import EvaluationSet
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import Evaluation
from tsparse.models.config import model_config
from tsparse.models.counts import HiddenCounts
from tsparse.models.transformer import Transformer, init_parameters


def numpy_largest(x, k):
  order = np.argsort(-x, axis=-1, kind="stable")  # among equals the lower index first
  keep = np.zeros(x.shape, bool)
  np.put_along_axis(keep, order[..., :k], True, axis=-1)
  return keep


@pytest.mark.parametrize("k", [0, 1, 7, 32, 63, 64])
def test_exactly_the_k_largest_are_kept_whatever_the_ties(k):
  x = np.abs(np.random.default_rng(0).normal(size=(5, 3, 64))).astype(np.float32)
  x[1] = np.round(x[1], 1)  # many ties
  x[2], x[3, :, 5:] = 0, 0
  np.testing.assert_array_equal(jax.jit(masks.largest)(x, k), numpy_largest(x, k))


def test_top_k_zeroes_round_of_sparsity_times_neurons():
  hidden = np.random.default_rng(0).normal(size=(2, 4, 50)).astype(np.float32)
  for level in (0.0, 0.5, 0.85, 0.9):
    out = np.asarray(masks.TopK(jnp.float32(level))(None, None, hidden))
    keep = numpy_largest(np.abs(hidden), 50 - round(level * 50))
    np.testing.assert_array_equal(out, np.where(keep, hidden, 0))


def held_out(config, rows=4, time=24):
  rng = np.random.default_rng(0)
  segments = np.ones((rows, time), np.int32)
  segments[-1, 10:] = 0
  batch = {
    "inputs": rng.integers(0, 259, (rows, time)).astype(np.int32),
    "targets": rng.integers(0, 259, (rows, time)).astype(np.int32),
    "segment_ids": segments,
    "positions": np.broadcast_to(np.arange(time, dtype=np.int32), (rows, time)),
  }
  tokens = 2 * int((segments > 0).sum())
  return EvaluationSet([batch, batch], 8, tokens, split="all", complete=True, vocabulary="bytes", eos=True)


@pytest.mark.parametrize("experts", [0, 4])
def test_analysis_equals_a_direct_computation(experts):
  config = default.get_config()
  config.activation = "drelu"
  config.model.update({"num_layers": 2, "d_model": 32, "d_ff": 64, "head_dim": 8})
  config.model.update({"num_experts": experts, "experts_per_token": 2 if experts else 0})
  model, data = Transformer(model_config(config)), held_out(config)
  params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    result = analyze(
      "m", model, params, data, mesh, source="here", text="there", trained_tokens=0, levels=(0.0, 0.5, 0.9)
    )

  batch = data.batches[0]
  logits, counts = model.apply({"params": params}, batch["inputs"], batch["segment_ids"], batch["positions"])
  logp = jax.nn.log_softmax(logits)
  nll = -np.take_along_axis(np.asarray(logp), batch["targets"][..., None], axis=-1)[..., 0]
  real = batch["segment_ids"] > 0
  assert result["tokens"] == 2 * real.sum() and result["loss"] == pytest.approx(nll[real].mean(), rel=1e-5)
  assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))
  fired, routed = np.asarray(counts["ffn"].fired), np.asarray(counts["ffn"].routed)
  zeros = result["zero_fraction"]
  assert zeros["mean"] == pytest.approx(1 - fired.sum() / (routed.sum() * 64), rel=1e-5)
  np.testing.assert_allclose(zeros["per_expert"], 1 - fired.sum(-1) / (routed * 64), rtol=1e-5)
  np.testing.assert_allclose(zeros["per_layer"], 1 - fired.sum((1, 2)) / (routed.sum(1) * 64), rtol=1e-5)
  assert result["dead_neurons"]["count"] == (fired == 0).sum()
  none, half, most = result["curve"]
  assert none["loss"] == pytest.approx(result["loss"], rel=1e-6)
  assert half["loss"] == pytest.approx(result["loss"], rel=1e-4)  # dReLU has three quarters zeros already
  assert abs(most["loss"] - result["loss"]) > abs(half["loss"] - result["loss"])


def test_a_sweep_of_levels_compiles_once():
  """One program for the model as it is, and one for all levels."""
  config = default.get_config()
  config.model.update({"num_layers": 1, "d_model": 16, "d_ff": 32, "head_dim": 4})
  model, data = Transformer(model_config(config)), held_out(config)
  params = init_parameters(model, jax.random.key(0))
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
  before = perplexity.compiled._cache_size()
  with jax.set_mesh(mesh):
    result = analyze("m", model, params, data, mesh, source="", text="", trained_tokens=0, levels=(0.0, 0.5, 0.8, 0.9))
  assert len({point["loss"] for point in result["curve"]}) == 4
  assert perplexity.compiled._cache_size() == before + 2


def test_layers_of_several_ffns_are_reported_together():
  rng = np.random.default_rng(0)

  def counts_of(layers, experts, neurons):
    fired = rng.integers(0, 10, (layers, experts, neurons)).astype(float)
    return HiddenCounts(fired=fired, routed=np.full((layers, experts), 10.0))

  by_kind = {"first": counts_of(1, 1, 6), "ffn": counts_of(2, 3, 4), "shared": counts_of(2, 1, 5)}
  found = hidden_statistics(Evaluation(nll=1.0, tokens=10, counts=by_kind))
  fired = {kind: c.fired.sum((1, 2)) for kind, c in by_kind.items()}
  together = (fired["ffn"] + fired["shared"]) / (10 * (3 * 4 + 5))
  np.testing.assert_allclose(found["zero_fraction"]["per_layer"], [1 - fired["first"][0] / 60, *(1 - together)])
  assert [len(layer) for layer in found["zero_fraction"]["per_expert"]] == [1, 3, 3]
  np.testing.assert_allclose(found["zero_fraction"]["shared_per_layer"], 1 - fired["shared"] / 50)
  dead = [(by_kind["first"].fired == 0).sum()]
  dead += [sum((by_kind[kind].fired[layer] == 0).sum() for kind in ("ffn", "shared")) for layer in (0, 1)]
  assert found["dead_neurons"] == {"count": sum(dead), "total": 6 + 24 + 10, "per_layer": dead}
