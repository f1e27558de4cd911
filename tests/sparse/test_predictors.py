"""Neuron predictors against plain numpy: loss and gradient, thresholds, rates, the mask in a model and in decoding."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from rich.console import Console

from tests.analysis.test_masks import held_out
from tsparse import files, sharding
from tsparse.analysis.probe import probe
from tsparse.convert import stored as checkpoints
from tsparse.convert.model import open_model
from tsparse.errors import RunFailure, UserError
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.sparse.generate import Request, complete, load, summary
from tsparse.sparse.layout import leaves_of
from tsparse.sparse.predictors import fit, quality, report, stored
from tsparse.sparse.predictors.run import Candidate, histograms, masked_perplexity, merged_candidate, run

TINY = {"num_layers": 2, "d_model": 16, "d_ff": 24, "num_heads": 2, "head_dim": 8, "activation": "drelu"}
MODELS = {
  "dense": dataclasses.replace(PRESETS["tiny"], **TINY),
  "moe": dataclasses.replace(PRESETS["tiny_moe"], **TINY),
}
RANKS = (8, 4)
quiet = functools.partial(Console, quiet=True)


@functools.cache
def model_of(name):
  config, data = MODELS[name], held_out(None, rows=4)
  params = jax.jit(lambda key: init_parameters(Transformer(config), key))(jax.random.key(0))
  return config, params, dataclasses.replace(data, batches=data.batches[:1])


def one_device():
  return sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])


def weights_of(config):
  return jax.tree.map(np.asarray, fit.initial(jax.random.key(1), config, RANKS, np.ones(2)))


@functools.cache
def observed():
  """What the probe shows of the layers with experts, numpy arrays with a leading axis L; predictors for them."""
  config, params, data = model_of("moe")
  with jax.set_mesh(mesh := one_device()):
    arrays = probe(Transformer(config), params, data.batches, mesh, lambda seen, _: seen._asdict()).sums["ffn"]
  return mesh, arrays, weights_of(config)


def numpy_logits(x, fc1, fc2):  # [B, T, D] -> [B, T, E, F], expert by expert
  fc1, fc2 = (w.reshape(-1, *w.shape[-2:]) for w in (fc1, fc2))
  return np.stack([np.maximum(x @ one, 0) @ two for one, two in zip(fc1, fc2, strict=True)], axis=2)


def test_a_step_follows_the_gradient_of_weighted_cross_entropy():
  """Analytic, in float64: dL/dlogit = (fired ? sigmoid(z) - 1 : w sigmoid(z)) / entries."""
  config, params, data = model_of("moe")
  mesh, seen, weights = observed()
  negative = np.array([0.2, 0.4], np.float32)
  with jax.set_mesh(mesh):
    observe, settings = fit.Gradient("before_norm"), (jax.tree.map(jnp.asarray, weights), jnp.asarray(negative))
    losses, gradient = probe(Transformer(config), params, data.batches, mesh, observe, {"ffn": settings}).sums["ffn"]
  for layer in range(2):
    x, fired, reached = (seen[key][layer].astype(float) for key in ("residual", "hidden", "reached"))
    fc1, fc2 = (weights[key][layer].astype(float).reshape(-1, *weights[key].shape[-2:]) for key in ("fc1", "fc2"))
    z, y, used = numpy_logits(x, fc1, fc2), fired != 0, reached[..., None] / (reached.sum() * fired.shape[-1])
    loss = np.where(y, np.log1p(np.exp(-z)), negative[layer] * np.log1p(np.exp(z)))
    np.testing.assert_allclose(losses[layer], (loss * used).sum(), rtol=1e-5)
    p = 1 / (1 + np.exp(-z))
    dz = np.where(y, p - 1, negative[layer] * p) * used
    for e in range(len(fc1)):
      h = x @ fc1[e]
      d2 = np.einsum("btr,btf->rf", np.maximum(h, 0), dz[:, :, e])
      d1 = np.einsum("btd,btr->dr", x, (dz[:, :, e] @ fc2[e].T) * (h > 0))
      for key, want in (("fc1", d1), ("fc2", d2)):
        got = gradient[key][layer].reshape(-1, *want.shape)[e]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  assert not gradient["fc1"][1, ..., RANKS[1] :].any() and not gradient["fc2"][1, ..., RANKS[1] :, :].any()
  assert weights["fc1"][0].any() and not weights["fc1"][1, ..., RANKS[1] :].any()  # padding stays zero


def test_thresholds_recall_precision_and_reads_are_those_of_numpy():
  config, params, data = model_of("moe")
  mesh, seen, weights = observed()
  with jax.set_mesh(mesh):
    candidates = [Candidate("trained", "after_norm", RANKS, weights)]
    counts = histograms(Transformer(config), params, data.batches, mesh, candidates)["trained"]
  thresholds = quality.choose_thresholds(counts, 0.9)
  parameters = np.array([100, 50])
  found = quality.quality(counts, thresholds, config, parameters)
  kept, all_of, reads = [], [], {"exact": 0.0, "predictor": 0.0}
  for layer in range(2):
    logits = numpy_logits(seen["x"][layer], weights["fc1"][layer], weights["fc2"][layer])
    used = np.broadcast_to(seen["reached"][layer].astype(bool)[..., None], logits.shape)
    fired, is_open = ((seen[key][layer] > 0) & used for key in ("hidden", "gate"))
    expected = (logits > thresholds[layer][:, None]) & used
    for e, threshold in enumerate(thresholds[layer]):  # the largest edge that keeps the recall
      positive = logits[:, :, e][fired[:, :, e]]
      assert (positive > threshold).mean() >= 0.9 > (positive > threshold + 1 / quality.STEPS).mean()
    kept.append([(fired & expected).sum(), expected.sum(), used.sum()])
    all_of.append(fired.sum())
    np.testing.assert_allclose(found["per_layer"]["recall"][layer], kept[-1][0] / all_of[-1])
    tokens = seen["reached"][layer].any(-1).sum()
    rows = lambda mask: (mask.sum() + (mask & is_open).sum() + (mask & fired).sum()) / tokens  # noqa: B023, E731
    reads["exact"] += config.d_model * rows(used)
    reads["predictor"] += config.d_model * rows(expected) + config.experts_per_token * parameters[layer]
  hit, expected, entries = np.sum(kept, 0)
  want = {"recall": hit / sum(all_of), "precision": hit / expected, "predicted_sparsity": 1 - expected / entries}
  assert {key: found[key] for key in want} == pytest.approx(want, rel=1e-6)
  assert found["read"] == pytest.approx(
    reads | {"dense": 2 * config.experts_per_token * 3 * config.d_model * config.d_ff}, rel=1e-6
  )


def test_where_nothing_fired_everything_is_expected():
  counts = np.zeros((1, 2, 3, len(quality.EDGES)))
  counts[0, 0, 2, 0] = 1  # below the lowest edge
  np.testing.assert_array_equal(quality.choose_thresholds(counts, 0.9), [[-np.inf, -np.inf]])


@struct.dataclass
class Given:
  """Multiplies the hidden by a mask that is given, of all rows: [L, B, T, E, F]."""

  mask: jax.Array

  def __call__(self, gate, up, hidden, expert):
    return hidden * self.mask.reshape(hidden.shape)


def test_perplexity_under_a_predictor_is_that_under_an_explicit_mask():
  """In one layer, whose input no mask changes."""
  config, params, data = model_of("moe")
  mesh, seen, weights = observed()
  config = dataclasses.replace(config, num_layers=1)
  first = lambda tree: jax.tree.map(lambda x: x[:1], tree)  # noqa: E731
  params, weights = params | {"layers": first(params["layers"])}, first(weights)
  thresholds = np.linspace(-0.2, 0.3, config.num_experts, dtype=np.float32)[None]
  mask = numpy_logits(seen["residual"][0], weights["fc1"][0], weights["fc2"][0]) > thresholds[0][:, None]
  plain = Transformer(dataclasses.replace(config, moe_impl="dense"))  # shows the hidden in the order of the mask
  with jax.set_mesh(mesh):
    given = {"ffn": Given(jnp.asarray(mask, jnp.float32)[None])}
    natural, want = (evaluate(plain, params, data.batches, mesh, masks) for masks in (None, given))
    candidate = Candidate("trained", "before_norm", RANKS[:1], weights)
    got = masked_perplexity(config, params, candidate, thresholds, data, mesh)
  assert got.loss == pytest.approx(want.loss, rel=1e-6) and abs(got.loss - natural.loss) > 1e-4
  np.testing.assert_array_equal(got.counts["ffn"].fired, want.counts["ffn"].fired)
  assert got.zero_fraction > natural.zero_fraction + 0.02


def test_predictors_that_a_model_holds_are_measured_as_it_uses_them():
  config, params, data = model_of("dense")
  mesh, weights = one_device(), weights_of(config)
  held = dataclasses.replace(config, predictor_ranks=RANKS, predictor_input="before_norm")
  ffn = params["layers"]["ffn"] | {"predictor": weights}
  with jax.set_mesh(mesh):
    want = evaluate(Transformer(held), params | {"layers": params["layers"] | {"ffn": ffn}}, data.batches, mesh)
    candidate = merged_candidate(held, weights)
    got = masked_perplexity(config, params, candidate, candidate.thresholds, data, mesh)
  assert candidate.ranks == RANKS and got.loss == pytest.approx(want.loss, rel=1e-7)
  np.testing.assert_array_equal(got.counts["ffn"].fired, want.counts["ffn"].fired)


def test_the_svd_is_the_nearest_gate_of_its_rank():
  gate, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 16, 24), (3, 5, 16)]))
  found = fit.svd_of_gate(np.asarray(gate), (8, 3), np.array([4.0, 2.0]))
  for layer, (rank, scale) in enumerate([(8, 1), (3, 2)]):
    u, s, v = np.linalg.svd(gate[layer], full_matrices=False)
    want = x @ (u[:, :rank] * s[:rank] @ v[:rank]) * scale
    np.testing.assert_allclose(numpy_logits(x, found["fc1"][layer], found["fc2"][layer])[:, :, 0], want, atol=1e-4)


def test_less_sparse_layers_get_larger_predictors_within_the_budget():
  mistral = PRESETS["mistral_7b"]
  ranks = fit.choose_ranks(np.array([0.95, 0.9, 0.85]), mistral, 0.12)
  assert ranks[0] < ranks[1] < ranks[2] and all(rank % 8 == 0 for rank in ranks)
  held = np.mean(ranks) * (mistral.d_model + mistral.d_ff) / (3 * mistral.d_model * mistral.d_ff)
  assert held == pytest.approx(0.12, rel=0.01) and fit.choose_ranks(np.ones(2), MODELS["dense"], 0.01) == (8, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with a model, text, and predictors trained beside it."""
  folder = tmp_path_factory.mktemp("predictors")
  config, params, _ = model_of("dense")
  store(folder / "model", config, params)
  text = "".join(json.dumps({"text": f"{i} bottles on the wall, {i} bottles of beer"}) + "\n" for i in range(300))
  (folder / "text.jsonl").write_text(text)
  return folder, run(folder / "model", str(folder / "text.jsonl"), **SIZES, console=quiet())


SIZES = {"steps": 60, "seq_len": 32, "batch_size": 8, "tokens": 500, "budget": 0.4, "learning_rate": 2e-2}


def store(path, config, params):
  path.mkdir()
  fields = dataclasses.asdict(config)
  record = {"activation": fields.pop("activation"), "model": fields, "data": {"vocabulary": "bytes", "eos": True}}
  files.write(path / "config.json", files.to_json(record))
  checkpoints.save(path, leaves_of(params), 0)


def test_training_lowers_the_loss_and_keeps_the_recall_on_other_text(trained):
  found = trained[1]
  losses = found["training"]["loss"]
  assert np.mean(losses[-5:]) < 0.7 * losses[0]
  ours, svd = found["predictors"]
  assert [p["name"] for p in (ours, svd)] == ["trained", "svd"] and ours["ranks"] == svd["ranks"]
  assert abs(ours["recall"] - 0.95) < 0.03 and abs(svd["recall"] - 0.95) < 0.03
  fires = 1 - found["natural"]["zero_fraction"]
  assert ours["precision"] > 1.4 * fires and svd["precision"] > 1.4 * fires
  assert ours["read"]["predictor"] < ours["read"]["dense"]
  curve = [(point["predicted_sparsity"], point["recall"]) for point in ours["curve"]]
  assert [p[0] for p in curve] == sorted((p[0] for p in curve), reverse=True)


def test_the_report_has_every_number_as_table_json_and_picture(trained, tmp_path):
  folder, found = trained
  written = json.loads((folder / "model" / "predictors" / "quality.json").read_text())
  assert written == found and written["definitions"]["recall"] and found["bos"]  # of bytes
  assert (folder / "model" / "predictors" / "quality.png").read_bytes().startswith(b"\x89PNG")
  console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
  report.show(found, console)
  text = console.export_text()
  assert f"{found['predictors'][0]['precision']:.1%}" in text and "By target recall" in text


def test_generation_asks_the_predictors_beside_the_model(trained):
  folder = trained[0]
  model = open_model(folder / "model")
  decoder = load(folder / "model", "predictor")
  assert decoder.mode == "predictor" and decoder.predictors.recall == 0.95
  done = complete(decoder, ["12 bottles"], Request(new_tokens=6))
  assert "recall of 95.0%" in summary(decoder, done)
  wide = stored.merge(model, stored.load(folder / "model" / "predictors", model))
  leaves = wide.leaves()[0]
  params = jax.tree.map(lambda x: x, model_of("dense")[1])
  params["layers"]["ffn"]["predictor"] = {
    name: jnp.asarray(leaves[f"layers/ffn/predictor/{name}"].at(())) for name in ("fc1", "fc2", "threshold")
  }
  ids = [decoder.tokenizer.bos, *decoder.tokenizer.encode("12 bottles")]
  row = np.array([[*ids, *done[0].tokens[:-1]]], np.int32)  # the Transformer that holds them says the same
  positions = np.arange(row.shape[1])[None]
  logits, _ = jax.jit(Transformer(wide.config).apply)({"params": params}, row, np.ones_like(row), positions)
  assert logits[0, len(ids) - 1 :].argmax(-1).tolist() == done[0].tokens
  assert all(load(folder / "model", mode).predictors is None for mode in ("exact", "off", "auto"))
  assert load(folder / "model", predictors=folder / "model" / "predictors").predictors is not None


def test_predictors_of_experts_are_stored_as_they_are(tmp_path):
  config, params, _ = model_of("moe")
  store(tmp_path / "model", config, params)
  model, weights = open_model(tmp_path / "model"), weights_of(config)
  weights["threshold"] = np.where(np.eye(2, 4), -np.inf, np.arange(8.0).reshape(2, 4)).astype(np.float32)
  wide = stored.with_predictors(config, RANKS, "after_norm")
  stored.save(tmp_path, model, wide, weights, {"recall": 0.9, "read": {}})
  found = stored.load(tmp_path, model)
  for name, array in weights.items():
    np.testing.assert_array_equal(found.leaves[f"layers/ffn/predictor/{name}"].at(()), array)
  assert (found.ranks, found.source) == (RANKS, "after_norm")


def test_predictors_of_another_model_are_refused(trained, tmp_path):
  folder = trained[0]
  config, params, _ = model_of("dense")
  fewer = dataclasses.replace(config, num_layers=1)
  store(tmp_path / "fewer", fewer, params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])})
  other = jax.tree.map(lambda x: x * 1.2, params)
  store(tmp_path / "other", config, other)
  near = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # rounded, it is still the same model
  store(tmp_path / "near", config, near)
  predictors = folder / "model" / "predictors"
  assert load(tmp_path / "near", "predictor", "", predictors).params["layers"][0]["fc1"].dtype == "bfloat16"
  shutil.copytree(predictors, tmp_path / "torn")
  (tmp_path / "torn" / "predictors.safetensors").write_bytes(b"torn")
  for path, given, sentence in (
    ("fewer", predictors, "num_layers = 2, and .* has 1"),
    ("other", predictors, "gate weights differ"),
    ("near", tmp_path / "torn", "is damaged"),
    ("near", tmp_path / "near", "holds no predictors"),
    ("near", None, "none beside it"),
  ):
    with pytest.raises(UserError, match=sentence):
      load(tmp_path / path, "predictor", "", given)
  with pytest.raises(UserError, match="of no use with --sparse=exact"):
    load(tmp_path / "near", "exact", "", predictors)


def test_what_cannot_be_trained_is_said_and_nothing_is_written(trained, tmp_path):
  folder = trained[0]
  config, params, _ = model_of("dense")
  store(tmp_path / "swiglu", dataclasses.replace(config, activation="swiglu"), params)
  ffn = params["layers"]["ffn"] | {"threshold": jnp.zeros([config.num_layers])}
  jumping = params | {"layers": params["layers"] | {"ffn": ffn}}
  store(tmp_path / "jumping", dataclasses.replace(config, hidden_thresholds=True), jumping)
  text, model = str(folder / "text.jsonl"), folder / "model"
  for path, data, settings, sentence in (
    (tmp_path / "swiglu", text, {}, "exactly zero nowhere"),
    (tmp_path / "jumping", text, {}, "has hidden_thresholds, .*decoded densely"),
    (model, "nothing.jsonl", {}, "No such file"),
    (model, text, {"source": "norm"}, "--input=norm is unknown"),
    (model, text, {"recall": 1.0}, "--recall=1.0 is not a share"),
    (model, text, {"budget": 0.0}, "--budget=0.0 is not a share"),
    (model, text, {"seq_len": 9999}, "--seq_len=9999 is more"),
    (model, text, {"learning_rate": -1.0}, "--learning_rate=-1.0"),
  ):
    with pytest.raises(UserError, match=sentence):
      run(path, data, tmp_path / "out", **SIZES | settings, console=quiet())
  with pytest.raises(UserError, match="is in use"):
    run(model, text, **SIZES, console=quiet())
  with pytest.raises(RunFailure, match="lower --learning_rate"):
    run(model, text, tmp_path / "out", **SIZES | {"learning_rate": 1e30}, console=quiet())
  assert not (tmp_path / "out").exists()
