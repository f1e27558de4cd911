"""Thresholds: what they zero, that the search meets its targets, and the whole on a real model."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.analysis.test_probe import everything, mesh_of, raw, tiny
from tests.test_analyze import reference
from tsparse import sharding
from tsparse.analysis import calibration, neurons, thresholds
from tsparse.analysis.observe import observe
from tsparse.analysis.probe import Seen, probe
from tsparse.convert.model import open_model
from tsparse.data import bos_id, evaluation_batches, load_vocabulary
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

  of_experts, expert = np.float32([0.1, 0.3, 0.6]), np.array([2, 0, 0, 1, 2])  # of each row its own
  own = of_experts[expert][:, None]
  magnitude = thresholds.Magnitude(of_experts)
  np.testing.assert_array_equal(magnitude(gate, up, hidden, expert), np.where(np.abs(hidden) >= own, hidden, 0))
  cats = thresholds.Cats(of_experts, "swiglu")(gate, up, hidden, expert)
  np.testing.assert_array_equal(cats == 0, np.abs(silu(gate)) < own)
  teal = thresholds.Teal(np.float32([0.4]), magnitude)
  np.testing.assert_array_equal(teal.on_input(gate), np.where(np.abs(gate) >= np.float32(0.4), gate, 0))
  np.testing.assert_array_equal(teal(gate, up, hidden, expert), magnitude(gate, up, hidden, expert))


@pytest.mark.parametrize(("kind", "layer"), [("first", 0), ("ffn", 1), ("shared", 0)])
def test_shares_and_errors_are_those_of_numpy(kind, layer):
  ffn = seen(kind, layer)
  gate, hidden, reached, down = (np.asarray(x, np.float64) for x in (ffn.gate, ffn.hidden, ffn.reached, ffn.down))
  epsilon = np.geomspace(1e-3, 1, 7) * (1 + np.arange(len(down)))[:, None]  # of each expert its own
  epsilon, used = epsilon.astype(np.float32), reached > 0
  for observe_below, size in (
    (thresholds.hidden_below, np.abs(hidden)),
    (thresholds.GateBelow("drelu"), np.maximum(gate, 0)),
  ):
    total, number = observe_below(ffn, epsilon)
    below = [[(size[:, :, i][used[:, :, i]] < e).sum() for e in of_one] for i, of_one in enumerate(epsilon)]
    np.testing.assert_array_equal(np.sum(total, -1), below)
    np.testing.assert_array_equal(np.sum(number, -1), used.sum((0, 1)) * hidden.shape[-1])
  total, number = thresholds.input_below(ffn, epsilon[:1])
  x = np.abs(np.asarray(ffn.x))[used.any(2)]  # what a token gives to all its experts
  np.testing.assert_array_equal(np.sum(total, -1)[0], [(x < e).sum() for e in epsilon[0]])
  assert np.sum(number) == x.size

  total, number = thresholds.cett(ffn, epsilon)
  contribution = np.abs(hidden) * np.linalg.norm(down, axis=-1)  # [B, T, E, F]
  output = np.linalg.norm(np.einsum("btef,efd->bted", hidden, down), axis=-1)
  output = np.where(used & (output > 0), output, np.inf)  # 0 where no neuron fires
  for e, found in zip(epsilon.T, np.sum(total, -1).T, strict=True):
    dropped = np.einsum("btef,efd->bted", np.where(contribution < e[:, None], hidden, 0), down)
    np.testing.assert_allclose(found, (np.linalg.norm(dropped, axis=-1) / output).sum((0, 1)), rtol=1e-5)
    kept = thresholds.Contribution(e, np.linalg.norm(ffn.down, axis=-1))(None, None, ffn.hidden, np.arange(len(down)))
    np.testing.assert_array_equal(kept == 0, (contribution < e[:, None]) | (hidden == 0))
  np.testing.assert_array_equal(np.sum(number, -1), used.sum((0, 1)))


def test_the_search_meets_its_targets_in_every_layer_in_few_passes():
  scales, calls = np.array([1e-3, 1.0, 40.0]), []

  def measure(epsilon):
    calls.append(epsilon)
    values = 1 - np.exp(-epsilon / scales[:, None])
    values[2] = np.maximum(values[2], 0.7)  # three quarters of zeros: no threshold gives less
    return values

  grid = np.tile(calibration.GRID, (3, 1))
  for shape, most in ((measure(grid), 3), (1.1 * measure(grid) ** 1.1, 4)):  # itself, and what rises about as it does
    calls.clear()
    found = calibration.search(measure, calibration.Curves.of(grid, shape), [0.05, 0.5, 0.9]).at([0.05, 0.5, 0.9])
    assert {epsilon.shape for epsilon in calls} == {(3, 3)} and len(calls) <= most
    np.testing.assert_allclose(measure(found)[:2], [[0.05, 0.5, 0.9]] * 2, atol=1e-3)
    np.testing.assert_allclose(measure(found)[2], [0.7, 0.7, 0.9], atol=1e-3)


def test_each_expert_has_thresholds_of_its_own():
  """A model with a dense first layer, routed and shared experts, calibrated on the text that is shown in `raw`."""
  model, params, data = tiny()
  with jax.set_mesh(mesh := mesh_of({})):
    natural = evaluate(model, params, data.batches, mesh)
    found = thresholds.threshold_curves(model, params, data, mesh, natural, data, (0.9,), cetts=())
  assert found["cett"] == found["ppl_p"] == []
  size = {kind: np.abs(ffn["hidden"]) for kind, ffn in raw().items()}  # [L, B, T, E, F]
  act_gate = {kind: np.maximum(ffn["gate"], 0) for kind, ffn in raw().items()}
  for method, sizes in (("teal_down", size), ("teal", size), ("cats", act_gate)):
    (point,) = found[method]
    first, *others = point["epsilon_per_expert"]
    assert (len(first), *map(len, others)) == (1, 4, 4) and len(point["epsilon_shared"]) == 2
    of_kind = {"first": [first], "ffn": others, "shared": [[epsilon] for epsilon in point["epsilon_shared"]]}
    for kind, layers in of_kind.items():
      for layer, expert in np.ndindex(np.shape(layers)):
        mine = sizes[kind][layer][..., expert, :][raw()[kind]["reached"][layer][..., expert] > 0]
        assert (mine < np.float32(layers[layer][expert])).mean() == pytest.approx(0.9, abs=2e-3 + 2 / mine.size)
  assert len({epsilon for layer in others for epsilon in layer}) == 8
  (teal,) = found["teal"]
  for layer, epsilon in enumerate(teal["input_epsilon_per_layer"]):
    kind, i = ("ffn", layer - 1) if layer else ("first", 0)
    x = np.abs(raw()[kind]["x"][i])[raw()[kind]["reached"][i].any(-1)]
    assert (x < np.float32(epsilon)).mean() == pytest.approx(0.9, abs=2e-3)
  assert teal["sparsity"] == pytest.approx((2 * teal["input_zeros"] + teal["hidden_zeros"]) / 3)
  assert teal["input_zeros"] == pytest.approx(0.9, abs=0.05) and teal["loss"] != found["teal_down"][0]["loss"]


def test_an_expert_that_no_token_reached_has_the_thresholds_of_its_layer():
  ffns = calibration.FFNs({"ffn": (2, 3), "first": (1, 1)})
  row = np.arange(14.0).reshape(7, 2)
  np.testing.assert_array_equal(ffns.row(ffns.by_kind(row)), row)
  assert ffns.by_kind(row)["ffn"].shape == (2, 3, 2) and ffns.number == 7
  scale = np.array([[1.0, 1.0, 1.0], [4.0, 4.0, 4.0]])[..., None]

  def probe_of(model, params, batches, mesh, observe, settings):
    number, epsilon = np.array([[10, 0, 20], [5, 5, 5]])[..., None], np.asarray(settings["ffn"]["share"])
    share = (1 - np.exp(-epsilon / scale))[..., None] * number[..., None]
    of_first = np.asarray(settings["first"]["share"])[..., None], np.ones((1, 1, 1))
    return SimpleNamespace(sums={"ffn": {"share": (share, number)}, "first": {"share": of_first}})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(calibration, "probe", probe_of)
    measures = {"share": calibration.Measure(None, ffns)}
    calibrator = calibration.Calibrator(None, None, None, None)
    found = calibrator.thresholds(measures, [0.5], calibrator.grid(measures))["share"].at([0.5])
  np.testing.assert_allclose(ffns.by_kind(found)["ffn"][..., 0], np.log(2) * scale[..., 0] * np.ones(3), rtol=5e-3)


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
  others, _ = stories(shared_data, 8, 700, tmp_path)
  shapes, logical = abstract_parameters(model)
  with jax.set_mesh(mesh := mesh_of({})):
    params, _ = stored.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))
    natural = evaluate(model, params, data.batches, mesh)
    shown, seen_of = (probe(model, params, text.batches[:1], mesh, everything).sums["ffn"] for text in (data, others))
    swapped = Transformer(dataclasses.replace(model.config, activation="drelu"))
    zeros = evaluate(swapped, params, data.batches, mesh).zero_fraction
    found = observe(model, params, data, mesh, natural, calibration=others, levels=(0.0, 0.5, 0.9))

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
  assert result["calibration"] == {"documents": others.documents, "tokens": others.tokens, "held_out": True}
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

  # TEAL by transformers: the inputs of its gate, up and down projections, thresholded.
  tokens_of = lambda i: [b["targets"][ids == i] for b, ids in zip(data.batches, data.document_ids, strict=True)]  # noqa: E731
  documents = [np.concatenate(tokens_of(i)).tolist() for i in range(data.documents)]
  zeros = {"gate_proj": [], "up_proj": [], "down_proj": []}
  for module, of_input, of_hidden in zip(
    theirs.model.layers, result["teal"][0]["input_epsilon_per_layer"], result["teal"][0]["epsilon_per_layer"],
    strict=True,
  ):  # fmt: skip
    for name, found_zeros in zeros.items():
      epsilon = of_hidden if name == "down_proj" else of_input

      def threshold(_, inputs, epsilon=epsilon, found_zeros=found_zeros):
        masked = torch.where(inputs[0].abs() >= epsilon, inputs[0], 0)
        found_zeros.append((masked == 0).float().mean(-1)[0])
        return (masked,)

      getattr(module.mlp, name).register_forward_pre_hook(threshold)
  loss, tokens, _ = reference(theirs, documents, bos_id(vocabulary), seq_len=128)
  teal = result["teal"][0]
  assert tokens == data.tokens and teal["loss"] == pytest.approx(loss, abs=2e-4)
  shares = {name: float(torch.cat(found_zeros).mean()) for name, found_zeros in zeros.items()}
  assert (teal["input_zeros"], teal["hidden_zeros"]) == pytest.approx(
    (shares["up_proj"], shares["down_proj"]), abs=1e-4
  )
  assert teal["sparsity"] == pytest.approx(np.mean(list(shares.values())), abs=1e-4)
  assert teal["loss"] > result["teal_down"][0]["loss"] > natural.loss

  losses = [point["loss"] for point in result["cett"]]
  assert losses == sorted(losses) and result["cett"][0]["perplexity"] < 1.02 * natural.perplexity
  assert result["ppl_p"][0]["perplexity"] <= 1.01 * natural.perplexity and result["ppl_p"][0]["sparsity"] > 0.1


def test_neurons_of_a_sample_are_spread_over_their_frequencies():
  fired = np.array([5.0, 0, 9, 1, 7, 3, 8, 2])
  counts = {"ffn": SimpleNamespace(fired=fired[None, None], routed=np.array([[9.0]]))}
  np.testing.assert_array_equal(neurons.sample(counts, 4), [[2, 4, 5, 3]])  # of the 7 that fire
  np.testing.assert_array_equal(neurons.sample(counts, 9), [[2, 6, 4, 0, 5, 7, 3, -1, -1]])
