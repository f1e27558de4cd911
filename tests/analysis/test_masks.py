import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from tsparse import sharding
from tsparse.analysis import curves, masks
from tsparse.analysis.analyze import analyze, hidden_statistics
from tsparse.analysis.cost import pieces
from tsparse.data import EvaluationSet
from tsparse.errors import UserError
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import Evaluation
from tsparse.models.config import ModelConfig, model_config
from tsparse.models.counts import HiddenCounts
from tsparse.models.transformer import Transformer, init_parameters

SIZES = {
  "vocab_size": 264, "num_layers": 3, "d_model": 16, "d_ff": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
  "max_seq_len": 64, "dtype": "float32", "activation": "drelu",
}  # fmt: skip


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
  np.testing.assert_array_equal(jax.jit(masks.largest)(x, k), numpy_largest(x, k) & (x > 0))


def test_top_k_zeroes_round_of_sparsity_times_neurons():
  hidden = np.random.default_rng(0).normal(size=(2, 4, 50)).astype(np.float32)
  for level in (0.0, 0.5, 0.85, 0.9):
    out = np.asarray(masks.TopK(jnp.float32(level))(None, None, hidden, None))
    keep = numpy_largest(np.abs(hidden), 50 - round(level * 50))
    np.testing.assert_array_equal(out, np.where(keep, hidden, 0))


@pytest.mark.parametrize("selection", masks.SELECTIONS)
def test_each_selection_keeps_the_largest_of_its_own_score(selection):
  """Rows of two experts, whose norms differ, and of a dense FFN, in bfloat16 and so with equal scores."""
  rng = np.random.default_rng(0)
  gate, up = jnp.asarray(rng.normal(size=(2, 6, 40)), jnp.bfloat16)
  hidden, expert = jax.nn.silu(gate) * up, jnp.array([0, 1, 1, 0, 1, 0])
  norm = np.exp(rng.normal(size=(2, 40))).astype(np.float32)
  score = {"hidden": hidden, "gate": gate, "up": up}.get(selection)
  for number, norms in ((expert, norm), (None, norm[1])):
    of_row = norms[expert] if number is not None else norms
    wanted = np.abs(np.asarray(hidden * of_row if score is None else score, np.float32))
    out = masks.TopK(jnp.float32(0.7), norms, selection)(gate, up, hidden, number)
    np.testing.assert_array_equal(out, np.where(numpy_largest(wanted, 12), hidden, 0))


def test_norms_are_those_of_the_rows_of_down():
  config = ModelConfig(
    **SIZES, num_experts=3, experts_per_token=2, num_shared_experts=1, shared_d_ff=12, dense_layers=1, dense_d_ff=10
  )
  params = jax.jit(lambda key: init_parameters(Transformer(config), key))(jax.random.key(0))
  norms = masks.down_norms(config, params)
  assert {kind: x.shape for kind, x in norms.items()} == {"ffn": (2, 3, 8), "shared": (2, 12), "first": (1, 10)}
  down = np.asarray(params["layers"]["ffn"]["down"])
  np.testing.assert_allclose(norms["ffn"][1, 2], np.sqrt((down[1, 2] ** 2).sum(1)), rtol=1e-6)
  plain, all_masked = (masks.topk_everywhere(0.5, config, norms, "contribution", shared) for shared in (False, True))
  assert set(plain) == {"ffn", "first"} and set(all_masked) == set(norms)
  assert all_masked["first"].sparsity.shape == (1,) and all_masked["shared"].sparsity.shape == (2,)


def test_an_unknown_selection_is_told_its_nearest():
  for names, sentence in ((["hidden", "gat"], "nearest is 'gate'"), ([], "'' is unknown"), ([""], "'' is unknown")):
    with pytest.raises(UserError, match=sentence):
      masks.check_selections(names)


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
  ids = [np.where(segments > 0, np.arange(rows)[:, None] + first, -1) for first in (0, rows)]  # a document a row
  return EvaluationSet([batch, batch], ids, 8, tokens, "all", complete=True, vocabulary="bytes", eos=True, bos=True)


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
  lines = [[float(np.where(r, x, 0).sum()) for x, r in zip(nll, real, strict=True)] * 2, [*real.sum(1).tolist()] * 2]
  np.testing.assert_allclose(result["per_document"]["nll"], lines[0], rtol=1e-5)
  assert result["per_document"]["tokens"] == lines[1]
  lo, hi = result["confidence"]["loss"]
  assert lo < result["loss"] < hi
  none, half, most = result["curve"]
  assert none["loss"] == pytest.approx(result["loss"], rel=1e-6)
  assert half["loss"] == pytest.approx(result["loss"], rel=1e-4)  # dReLU has three quarters zeros already
  assert abs(most["loss"] - result["loss"]) > abs(half["loss"] - result["loss"])


def test_rows_that_a_mask_leaves_as_they_are_are_not_run_again(monkeypatch):
  """Against every row run at every level; half of the rows have no token with so few zeros, and are not run."""
  config = ModelConfig(**SIZES | {"d_ff": 96})
  model, data = Transformer(config), held_out(config)
  second = {name: x[:, ::-1].copy() if name == "inputs" else x for name, x in data.batches[0].items()}
  batches = [data.batches[0], second | {"segment_ids": np.ones_like(second["segment_ids"])}]
  params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
  mesh, ran = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1]), []
  with jax.set_mesh(mesh):
    [natural] = perplexity.evaluate_each(model, params, batches, mesh, [None])
    most = np.sort(natural.rows.most["ffn"])
    levels = (0.0, 0.1, 1 - most[4] / 96, 0.95)  # the third keeps as many as fired in the fifth of eight rows
    each = [masks.topk_everywhere(level, config) for level in levels]
    slow = perplexity.evaluate_each(model, params, batches, mesh, each)
    losses = curves.losses
    monkeypatch.setattr(curves, "losses", lambda *args: ran.append(args[2]) or losses(*args))
    [curve] = curves.masked_curves(model, params, batches, mesh, natural, levels)
  changed = [curves.changed_rows(level, "hidden", natural, config) for level in levels]
  assert [rows.sum() for rows in changed] == [0, 0, (most > most[4]).sum(), 8] and 0 < changed[2].sum() < 4
  rows = [int((np.asarray(batch["segment_ids"]) > 0).any(1).sum()) for batch in ran]
  assert sorted(rows) == [changed[2].sum(), 4, 4]  # one batch of the rows of two that the third changes, and both
  for point, evaluation, rows in zip(curve["points"], slow, changed, strict=True):
    assert point["loss"] == pytest.approx(evaluation.loss, rel=1e-6)
    np.testing.assert_allclose(evaluation.rows.nll[~rows], natural.rows.nll[~rows], rtol=1e-6)
    assert (np.abs(evaluation.rows.nll - natural.rows.nll)[rows] > 1e-6).all()


def test_a_sweep_compiles_once_for_each_selection_and_places_the_data_once(monkeypatch):
  """One program for the model as it is, and one for all levels of a selection."""
  config = default.get_config()
  config.model.update({"num_layers": 1, "d_model": 16, "d_ff": 32, "head_dim": 4})
  model, data = Transformer(model_config(config)), held_out(config)
  params = init_parameters(model, jax.random.key(0))
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
  placed, place, done = [], perplexity.place, []
  monkeypatch.setattr(curves, "place", lambda *args: placed.append(0) or place(*args))
  before = perplexity.compiled._cache_size(), perplexity.losses._cache_size()
  settings = {"levels": (0.0, 0.5, 0.8, 0.9), "selections": ("gate", "hidden", "contribution")}
  with jax.set_mesh(mesh):
    result = analyze(
      "m", model, params, data, mesh, source="", text="", trained_tokens=0,
      progress=lambda _, amount: done.append(amount), **settings,
    )  # fmt: skip
  assert [curve["selection"] for curve in result["curves"]] == ["gate", "hidden", "contribution"]
  for curve in result["curves"]:
    assert curve["points"][0]["loss"] == pytest.approx(result["loss"], rel=1e-6)
  assert len({point["loss"] for curve in result["curves"] for point in curve["points"][1:]}) == 9
  assert result["curve"] == result["curves"][1]["points"]
  assert (perplexity.compiled._cache_size(), perplexity.losses._cache_size()) == (before[0] + 1, before[1] + 3)
  assert len(placed) == len(data.batches) and len(done) == (1 + 9) * len(data.batches)
  cost = sum(piece.batches(2, 0) for piece in pieces(model.config, 24, **settings).values())
  assert sum(done) == pytest.approx(cost) and 20 < cost < 40


def test_layers_of_several_ffns_are_reported_together():
  rng = np.random.default_rng(0)

  def counts_of(layers, experts, neurons):
    fired = rng.integers(0, 10, (layers, experts, neurons)).astype(float)
    return HiddenCounts(fired=fired, routed=np.full((layers, experts), 10.0))

  by_kind = {"first": counts_of(1, 1, 6), "ffn": counts_of(2, 3, 4), "shared": counts_of(2, 1, 5)}
  found = hidden_statistics(Evaluation(nll=1.0, tokens=10, real_tokens=10, counts=by_kind))
  fired = {kind: c.fired.sum((1, 2)) for kind, c in by_kind.items()}
  together = (fired["ffn"] + fired["shared"]) / (10 * (3 * 4 + 5))
  np.testing.assert_allclose(found["zero_fraction"]["per_layer"], [1 - fired["first"][0] / 60, *(1 - together)])
  assert [len(layer) for layer in found["zero_fraction"]["per_expert"]] == [1, 3, 3]
  np.testing.assert_allclose(found["zero_fraction"]["shared_per_layer"], 1 - fired["shared"] / 50)
  dead = [(by_kind["first"].fired == 0).sum()]
  dead += [sum((by_kind[kind].fired[layer] == 0).sum() for kind in ("ffn", "shared")) for layer in (0, 1)]
  assert found["dead_neurons"] == {"count": sum(dead), "total": 6 + 24 + 10, "per_layer": dead}
