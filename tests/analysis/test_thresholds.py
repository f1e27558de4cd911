"""Thresholds: what they zero, that the search meets its targets, and the whole on a real model."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.analysis.test_probe import everything, mesh_of, raw
from tsparse import sharding
from tsparse.analysis import neurons, thresholds
from tsparse.analysis.observe import observe
from tsparse.analysis.probe import Seen, probe
from tsparse.convert.model import open_model
from tsparse.data import evaluation_batches, load_vocabulary
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.train import checkpoint

DTYPES = {"reached": bool, "positions": jnp.int32}


def seen(kind, layer):
  arrays = {name: x[layer] for name, x in raw()[kind].items()}
  return Seen(**{name: jnp.asarray(x, DTYPES.get(name, jnp.float32)) for name, x in arrays.items()})


def silu(x):
  return x / (1 + np.exp(-x))


def test_interventions_zero_what_is_below_the_threshold():
  gate, up = np.random.default_rng(0).normal(size=(2, 3, 5, 40)).astype(np.float32)
  hidden = silu(gate) * up
  magnitude = thresholds.Magnitude(jnp.float32(0.2))(gate, up, hidden, None)
  np.testing.assert_array_equal(magnitude, np.where(np.abs(hidden) >= np.float32(0.2), hidden, 0))
  cats = thresholds.Cats(jnp.float32(0.2), "swiglu")(gate, up, hidden, None)
  np.testing.assert_array_equal(cats == 0, np.abs(silu(gate)) < 0.2)
  relu = thresholds.Cats(jnp.float32(0.2), "drelu")(gate, up, hidden, None)
  np.testing.assert_array_equal(relu == 0, gate < np.float32(0.2))


@pytest.mark.parametrize(("kind", "layer"), [("first", 0), ("ffn", 1), ("shared", 0)])
def test_shares_and_errors_are_those_of_numpy(kind, layer):
  ffn, epsilon = seen(kind, layer), np.geomspace(1e-3, 1, 7).astype(np.float32)
  gate, hidden, reached, down = (np.asarray(x, np.float64) for x in (ffn.gate, ffn.hidden, ffn.reached, ffn.down))
  used = reached > 0
  for observe_below, size in (
    (thresholds.hidden_below, np.abs(hidden)),
    (thresholds.GateBelow("drelu"), np.maximum(gate, 0)),
  ):
    total, number = observe_below(ffn, epsilon)
    np.testing.assert_array_equal(np.sum(total, 1), [(size[used] < e).sum() for e in epsilon])
    assert number.sum() == used.sum() * hidden.shape[-1]

  total, number = thresholds.cett(ffn, epsilon)
  contribution = np.abs(hidden) * np.linalg.norm(down, axis=-1)  # [B, T, E, F]
  output = np.linalg.norm(np.einsum("btef,efd->bted", hidden, down), axis=-1)[used]
  for e, found in zip(epsilon, np.sum(total, 1), strict=True):
    dropped = np.einsum("btef,efd->bted", np.where(contribution < e, hidden, 0), down)
    error = np.linalg.norm(dropped, axis=-1)[used] / np.where(output > 0, output, np.inf)  # 0 where no neuron fires
    assert found == pytest.approx(error.sum(), rel=1e-5)
    kept = thresholds.Contribution(e, np.linalg.norm(ffn.down, axis=-1))(None, None, ffn.hidden, np.arange(len(down)))
    np.testing.assert_array_equal(kept == 0, (contribution < e) | (hidden == 0))
  assert number.sum() == used.sum()


def test_the_search_meets_its_targets_in_every_layer_with_thresholds_of_one_shape():
  scales, shapes = np.array([1e-3, 1.0, 40.0]), set()

  def measure(epsilon):
    shapes.add(epsilon.shape)
    values = 1 - np.exp(-epsilon / scales[:, None])
    values[2] = np.maximum(values[2], 0.7)  # three quarters of zeros: no threshold gives less
    return values

  found = thresholds.search(measure, 3, [0.05, 0.5, 0.9]).at([0.05, 0.5, 0.9])
  np.testing.assert_allclose(measure(found)[:2], [[0.05, 0.5, 0.9]] * 2, atol=1e-3)
  np.testing.assert_allclose(measure(found)[2], [0.7, 0.7, 0.9], atol=1e-3)
  assert shapes == {(3, thresholds.GRID.size), (3, 3)}


def test_ppl_p_is_the_largest_error_within_the_limit():
  at = lambda value: {"cett": value, "sparsity": value, "perplexity": 10 * (1 + value**2)}  # noqa: E731
  natural = SimpleNamespace(perplexity=10.0, zero_fraction=0.0)
  known = [at(value) for value in (0.05, 0.2, 0.4)]
  found = thresholds.ppl_p(at, known, natural, 1.0)
  assert 0.1 - 0.15 / 32 < found["cett"] <= 0.1 and not found["at_least"]
  assert thresholds.ppl_p(at, known, natural, 0.1)["cett"] == pytest.approx(0.1**1.5, abs=0.05 / 32)
  assert thresholds.ppl_p(at, known, natural, 50.0) == {
    "p": 50.0, "at_least": True, "cett": 0.4, "sparsity": 0.4, "perplexity": pytest.approx(11.6)
  }  # fmt: skip


def stories(folder, skip, tokens, tmp_path):
  """A text of the model stories260k, without the first `skip` documents."""
  lines = (folder / "tinystories" / "valid_v2.jsonl").read_text().splitlines()[skip : skip + 8]
  path = tmp_path / f"{skip}.jsonl"
  path.write_text("\n".join(lines))
  vocabulary = str(folder / "stories260k" / "tokenizer.model")
  source = SimpleNamespace(train="", validation=str(path), vocabulary=vocabulary, eos=False)
  return evaluation_batches(source, seq_len=128, batch_size=8, max_tokens=tokens), lines


def test_a_real_model(shared_data, tmp_path):
  """Against transformers and numpy: one program for the levels of a method, thresholds from other documents."""
  import torch
  import transformers

  stored = open_model(shared_data / "stories260k")
  model = Transformer(stored.config)
  data, lines = stories(shared_data, 0, 700, tmp_path)
  calibration, _ = stories(shared_data, 8, 700, tmp_path)
  shapes, logical = abstract_parameters(model)
  with jax.set_mesh(mesh := mesh_of({})):
    params, _ = stored.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))
    natural = evaluate(model, params, data.batches, mesh)
    shown, seen_of = (
      probe(model, params, text.batches[:1], mesh, everything).sums["ffn"] for text in (data, calibration)
    )
    swapped = Transformer(dataclasses.replace(model.config, activation="drelu"))
    zeros = evaluate(swapped, params, data.batches, mesh).zero_fraction
    found = observe(model, params, data, mesh, natural, calibration=calibration, levels=(0.0, 0.5, 0.9))

  # The first row begins with BOS and a whole document: its hidden is what transformers' down projections read.
  vocabulary = load_vocabulary(stored.vocabulary)
  row = data.batches[0]["inputs"][0], data.batches[0]["segment_ids"][0]
  length = int((row[1] == 1).sum())
  assert any(vocabulary.encode(json.loads(line)["text"])[: length - 1] == list(row[0][1:length]) for line in lines)
  theirs, hidden = transformers.AutoModelForCausalLM.from_pretrained(shared_data / "stories260k").eval(), []
  for layer in theirs.model.layers:
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0].numpy()))
  with torch.no_grad():
    theirs(torch.tensor([row[0][:length].tolist()]))
  np.testing.assert_allclose(shown["hidden"][:, 0, :length, 0], hidden, atol=2e-4)

  assert natural.zero_fraction == 0 and 0.6 < zeros < 0.9  # trained with SwiGLU, then swapped
  assert found["neurons"]["hot_share_80"]["mean"] == pytest.approx(0.8, abs=0.01)  # all fire always
  assert found["union"]["batch"][-1]["expected_speedup"] == 1
  used = seen_of["reached"][..., 0] > 0
  result = found["thresholds"]
  assert result["calibration"] == {"documents": calibration.documents, "tokens": calibration.tokens, "held_out": True}
  for i, target in enumerate((0.5, 0.9)):
    fat, teal, cats = (result[name][i] for name in ("fat", "teal_down", "cats"))
    size = [np.abs(h[u]) for h, u in zip(seen_of["hidden"], used, strict=True)]
    assert (np.concatenate(size) < fat["epsilon"]).mean() == pytest.approx(target, abs=2e-3)
    for layer in range(5):
      assert (size[layer] < teal["epsilon_per_layer"][layer]).mean() == pytest.approx(target, abs=2e-3)
      gates = np.abs(silu(seen_of["gate"][layer][used[layer]]))
      assert (gates < cats["epsilon_per_layer"][layer]).mean() == pytest.approx(target, abs=2e-3)
    for method in (fat, teal, cats):
      assert method["sparsity"] == pytest.approx(target, abs=0.04) and method["loss"] > natural.loss
  losses = [point["loss"] for point in result["cett"]]
  assert losses == sorted(losses) and result["cett"][0]["perplexity"] < 1.02 * natural.perplexity
  assert result["ppl_p"][0]["perplexity"] <= 1.01 * natural.perplexity and result["ppl_p"][0]["sparsity"] > 0.1


def test_neurons_of_a_sample_are_spread_over_their_frequencies():
  fired = np.array([5.0, 0, 9, 1, 7, 3, 8, 2])
  counts = {"ffn": SimpleNamespace(fired=fired[None, None], routed=np.array([[9.0]]))}
  np.testing.assert_array_equal(neurons.sample(counts, 4), [[2, 4, 5, 3]])  # of the 7 that fire
  np.testing.assert_array_equal(neurons.sample(counts, 9), [[2, 6, 4, 0, 5, 7, 3, -1, -1]])
