"""What the probe shows, and every number made of it, against numpy on the raw gate, up and hidden."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tests.analysis.test_masks import held_out
from tsparse import sharding
from tsparse.analysis import experts, neurons, unions
from tsparse.analysis.observe import observe
from tsparse.analysis.probe import by_kind, probe
from tsparse.errors import UserError
from tsparse.evaluate.perplexity import evaluate, evaluate_each
from tsparse.models.config import PRESETS, parameter_counts
from tsparse.models.transformer import Transformer, init_parameters

MOE = dataclasses.replace(
  PRESETS["tiny_moe"], num_layers=3, d_model=32, d_ff=24, head_dim=8, activation="drelu", num_shared_experts=2,
  shared_d_ff=12, shared_gate=True, dense_layers=1, dense_d_ff=40,
)  # fmt: skip
MESHES = {"1 device": {}, "8 devices": {"data": 2, "expert": 2, "tensor": 2}}
SEEN = ("x", "residual", "gate", "up", "hidden", "reached", "down", "positions")


def mesh_of(sizes):
  devices = jax.devices() if sizes else jax.devices()[:1]
  return sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | sizes, devices)


@functools.cache
def tiny():
  """A model with a dense first layer, routed and shared experts; its text, 2 batches of 8 rows of 1 or 2 segments."""
  model, data = Transformer(MOE), held_out(None, rows=8)
  first, second = ({name: x.copy() for name, x in batch.items()} for batch in data.batches)
  second["inputs"] = second["inputs"][::-1].copy()
  for batch in (first, second):
    batch["segment_ids"][:5, 14:] = 2
    batch["positions"][:5, 14:] -= 14
  params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
  return model, params, dataclasses.replace(data, batches=[first, second])


@functools.cache
def observed(mesh):
  model, params, data = tiny()
  mesh = mesh_of(MESHES[mesh])
  with jax.set_mesh(mesh):
    natural = evaluate_each(model, params, data.batches, mesh, [None], lambda: None, data.document_ids, 16)[0]
    return natural, observe(model, params, data, mesh, natural, parts=("counts", "tokens"), levels=(0.0, 0.8, 0.95))


def everything(seen, settings):
  del settings
  return seen._asdict()


@functools.cache
def raw():
  """By kind of FFN, the arrays of Seen with a leading axis L, of the rows of both batches."""
  model, params, data = tiny()
  with jax.set_mesh(mesh := mesh_of({})):
    parts = [probe(model, params, [batch], mesh, everything).sums for batch in data.batches]
  rows = lambda name, *x: x[0] if name == "down" else np.concatenate(x, axis=1)  # noqa: E731
  return {kind: {name: rows(name, *(part[kind][name] for part in parts)) for name in SEEN} for kind in parts[0]}


def layers(function):
  """function(arrays of one FFN) for each of the layers, those of a layer with a shared expert in one list."""
  arrays = raw()
  at = lambda kind, layer: {name: x[layer] for name, x in arrays[kind].items()}  # noqa: E731
  return [[function(at("first", 0))], *([function(at("ffn", i)), function(at("shared", i))] for i in (0, 1))]


def test_losses_counts_and_routing_are_those_of_the_model():
  model, params, data = tiny()
  with jax.set_mesh(mesh := mesh_of({})):
    plain = evaluate(model, params, data.batches, mesh)
    probed = probe(
      model, params, data.batches, mesh, lambda seen, layer: (seen.reached.sum((0, 1)), layer),
      by_kind(jnp.arange(3), MOE),
    )  # fmt: skip
  assert (probed.tokens, probed.real_tokens) == (plain.tokens, plain.real_tokens) and probed.nll == pytest.approx(
    plain.nll, rel=1e-6
  )
  for kind, counts in plain.counts.items():
    np.testing.assert_array_equal(probed.counts[kind].fired, counts.fired)
    np.testing.assert_array_equal(probed.sums[kind][0], counts.routed)
  assert [list(probed.sums[kind][1] / 2) for kind in ("first", "ffn", "shared")] == [[0], [1, 2], [1, 2]]  # 2 batches


def test_gate_up_and_hidden_are_those_of_the_weights():
  """hidden = relu(gate) relu(up), both linear in what the FFN reads: the first layer's is computed here."""
  model, params, data = tiny()
  params, batch, first = jax.tree.map(np.asarray, params), data.batches[0], raw()["first"]
  x = params["embed"][batch["inputs"]]
  np.testing.assert_allclose(first["hidden"], np.maximum(first["gate"], 0) * np.maximum(first["up"], 0), rtol=1e-6)
  assert first["gate"].shape == (1, 16, 24, 1, 40) and x.shape == (8, 24, 32)
  np.testing.assert_array_equal(first["down"][0, 0], params["first"]["ffn"]["down"][0])
  gram = np.linalg.lstsq(params["first"]["ffn"]["gate"][0].T, first["gate"][0, :8, :, 0].reshape(-1, 40).T)[0]
  up = gram.T @ params["first"]["ffn"]["up"][0]  # what the FFN read, found from gate, gives up
  np.testing.assert_allclose(up.reshape(8, 24, 40), first["up"][0, :8, :, 0], atol=1e-4)
  np.testing.assert_allclose(gram.T.reshape(8, 24, 32), first["x"][0, :8], atol=1e-4)


def test_zeros_of_random_drelu_are_three_quarters_and_counted_by_position():
  natural, found = observed("1 device")
  assert abs(natural.zero_fraction - 0.75) < 0.03
  zeros, entries = np.zeros(24), np.zeros(24)
  for ffn in sum(layers(lambda ffn: ffn), []):
    for row, time, expert in np.argwhere(ffn["reached"]):
      position = int(ffn["positions"][row, time])
      zeros[position] += (ffn["hidden"][row, time, expert] == 0).sum()
      entries[position] += ffn["hidden"].shape[-1]
  np.testing.assert_allclose(found["per_position"], zeros / entries, rtol=1e-12)


def test_zeros_are_summed_over_each_document():
  """A row holds one document here, whose last one is cut off by padding in each batch."""
  natural, _ = observed("1 device")
  sums = natural.documents.sums
  zeros = sum(sum(layers(lambda ffn: ((ffn["hidden"] == 0) & (ffn["reached"] > 0)[..., None]).sum((1, 2, 3))), []))
  entries = sum(sum(layers(lambda ffn: ffn["reached"].sum((1, 2)) * ffn["hidden"].shape[-1]), []))
  np.testing.assert_array_equal(sums[:, 2:], np.stack([zeros, entries], axis=1))
  assert sums[:, 2].sum() / sums[:, 3].sum() == pytest.approx(natural.zero_fraction)
  assert sums[:, 1].tolist() == [24.0] * 7 + [10.0] + [24.0] * 7 + [10.0]
  assert sums[:, 0].sum() == pytest.approx(natural.nll)


@pytest.mark.parametrize("name", ["gate", "up", "hidden"])
def test_histograms_are_those_of_numpy(name):
  histograms = observed("1 device")[1]["histograms"]
  edges = np.array(histograms["edges"], np.float32)
  assert len(edges) == 82 and edges[0] == -edges[-1]
  for layer, ffns in enumerate(layers(lambda ffn: ffn[name][ffn["reached"] > 0].ravel())):
    x = np.concatenate(ffns).astype(np.float32)
    below = np.array([(x < edge).mean() for edge in edges])
    np.testing.assert_allclose(histograms[name][layer], np.diff(below), atol=1e-12)
    shares = histograms["below"][name][layer], histograms["above"][name][layer]
    np.testing.assert_allclose(shares, (below[0], 1 - below[-1]), atol=1e-12)
  assert abs(edges[40] + edges[41]) < 1e-6 and np.sum(histograms["gate"]) > 0.98 * 3


def test_windows_are_unions_over_consecutive_tokens_of_one_segment():
  _, found = observed("1 device")
  assert [window["size"] for window in found["union"]["window"]] == [1, 2, 4, 8, 16]
  valid = raw()["first"]["reached"][0, ..., 0] > 0
  for window in found["union"]["window"]:
    size, positions = window["size"], raw()["first"]["positions"][0]
    ends = [(b, t) for b, t in np.argwhere(valid) if positions[b, t] >= size - 1]
    read = layers(lambda ffn: np.mean([  # noqa: B023
      (ffn["hidden"][b, t - size + 1 : t + 1] * ffn["reached"][b, t - size + 1 : t + 1, :, None]).any(0).sum()  # noqa: B023
      for b, t in ends  # noqa: B023
    ]))  # fmt: skip
    neurons_of = layers(lambda ffn: ffn["hidden"].shape[-2] * ffn["hidden"].shape[-1])
    np.testing.assert_allclose(window["per_layer"], 1 - np.array(list(map(sum, read))) / list(map(sum, neurons_of)))
  one = found["union"]["window"][0]
  assert one["zero_fraction"] == pytest.approx(found["union"]["batch"][0]["zero_fraction"])  # of single tokens


def test_a_batch_reads_what_any_of_its_random_tokens_reads():
  """The formula against 4000 drawn groups."""
  natural, found = observed("1 device")
  rng, config = np.random.default_rng(0), MOE
  fired = layers(lambda ffn: ((ffn["hidden"] != 0) & (ffn["reached"] > 0)[..., None]).reshape(16 * 24, -1))
  fired = np.concatenate([np.concatenate(layer, axis=1) for layer in fired], axis=1)
  fired = fired[raw()["first"]["reached"][0].ravel() > 0]  # [tokens, all neurons]
  reached = np.concatenate([raw()["ffn"]["reached"][i].reshape(16 * 24, 4) for i in (0, 1)], axis=1)
  reached = reached[raw()["first"]["reached"][0].ravel() > 0] > 0
  counts = parameter_counts(config)
  others = sum(counts[name] for name in ("attention", "norms", "router", "head"))
  for union in found["union"]["batch"]:
    groups = rng.integers(0, len(fired), (4000, union["size"]))
    read = np.mean([fired[group].any(0).sum() for group in groups])
    experts = np.mean([reached[group].any(0).sum() for group in groups]) * 24 + 40 + 2 * 24
    assert union["zero_fraction"] == pytest.approx(1 - read / fired.shape[1], abs=2e-3)
    assert union["expected_speedup"] == pytest.approx(experts / read, rel=5e-3)
    whole = (others + 96 * experts) / (others + 96 * read)  # a neuron has 3 D weights
    assert union["expected_speedup_model"] == pytest.approx(whole, rel=5e-3)
  assert [union["size"] for union in found["union"]["batch"]] == list(unions.BATCH_SIZES)


def test_experts_are_weighted_by_their_use():
  _, found = observed("1 device")
  routed, tokens = raw()["ffn"], (raw()["first"]["reached"][0] > 0).sum()
  reached = routed["reached"] > 0  # [L, B, T, E]
  load = reached.sum((1, 2)) / (2 * tokens)
  np.testing.assert_allclose(found["experts"]["load"], load)
  np.testing.assert_allclose(found["experts"]["entropy"], -(load * np.log(load)).sum(1), rtol=1e-5)
  active = (routed["hidden"] != 0) & reached[..., None]
  joint = found["experts"]["joint"]
  assert joint["routed"] == 0.5 and joint["paper"] == pytest.approx(1 - 0.9625)
  assert joint["active_in_routed"] == pytest.approx(active.sum() / (reached.sum() * 24))
  assert joint["active_of_all"] == pytest.approx(active.sum() / (2 * tokens * 4 * 24))
  everywhere = sum(sum(layers(lambda ffn: ((ffn["hidden"] != 0) & (ffn["reached"] > 0)[..., None]).sum()), []))
  assert joint["active_of_ffn"] == pytest.approx(everywhere / (tokens * (40 + 2 * (4 * 24 + 24))))
  np.testing.assert_allclose(
    found["experts"]["per_expert_zero_fraction"], 1 - active.sum((1, 2, 4)) / (24 * reached.sum((1, 2)))
  )


def test_the_error_of_an_expert_is_what_its_mask_drops():
  curves, routed = observed("1 device")[1]["experts"]["curves"], raw()["ffn"]
  assert curves["levels"] == [0.8, 0.95] and np.shape(curves["error"]) == (2, 4, 2)
  for (layer, expert, i), found in np.ndenumerate(curves["error"]):
    hidden, down = routed["hidden"][layer, ..., expert, :], routed["down"][layer, expert]
    hidden = hidden[routed["reached"][layer, ..., expert] > 0]
    order, dropped = np.argsort(-np.abs(hidden), axis=-1, kind="stable"), hidden.copy()
    np.put_along_axis(dropped, order[:, : 24 - round(24 * curves["levels"][i])], 0, axis=-1)
    whole = np.linalg.norm(hidden @ down, axis=-1)
    error = np.linalg.norm(dropped @ down, axis=-1) / np.where(whole > 0, whole, np.inf)
    assert found == pytest.approx(error.mean(), rel=1e-4)


def test_masking_one_expert_alone_is_a_mask_of_its_neurons():
  """Against a mask by hand: the others keep all, and the numbers are in their place."""
  model, params, data = tiny()

  @struct.dataclass
  class Alone:
    level: jax.Array  # [L, E]

    def __call__(self, gate, up, hidden, expert):
      order = jnp.argsort(jnp.argsort(-jnp.abs(hidden), axis=-1), axis=-1)
      return jnp.where(order < hidden.shape[-1] - jnp.round(self.level[expert] * hidden.shape[-1])[:, None], hidden, 0)

  done = []
  with jax.set_mesh(mesh := mesh_of({})):
    found = experts.masked_alone(model, params, data, mesh, (0.95, 0.99), lambda: done.append(0))
    levels = jnp.zeros((2, 4)).at[1, 2].set(0.99)
    by_hand = evaluate(model, params, data.batches, mesh, {"ffn": Alone(levels)})
  assert np.shape(found["loss"]) == np.shape(found["perplexity"]) == (2, 4, 2) and len(done) == 2 * 2 * 4 * 2
  assert found["loss"][1][2][1] == pytest.approx(by_hand.loss, rel=1e-6)
  assert len(set(np.ravel(found["loss"]))) == 16


def test_neurons_are_hot_by_how_often_they_fire():
  natural, found = observed("1 device")
  fired = layers(lambda ffn: ((ffn["hidden"] != 0) & (ffn["reached"] > 0)[..., None]).reshape(2, 192, -1).sum(1))
  fired = [np.concatenate(layer, axis=1) for layer in fired]  # [halves, neurons]
  for layer, halves in enumerate(fired):
    ordered = np.sort(halves.sum(0))[::-1]
    share = found["neurons"]["hot_share_80"]["per_layer"][layer]
    k = round(share * len(ordered))
    assert ordered[:k].sum() >= 0.8 * ordered.sum() > ordered[: k - 1].sum()
    covered = found["neurons"]["cdf"]["per_layer"][layer]
    assert covered[0] == 0 and covered[-1] == 1
    assert covered[25] == pytest.approx(ordered[: round(len(ordered) / 2)].sum() / ordered.sum())
    import scipy.stats

    stability = found["neurons"]["stability"]
    assert stability["rank_correlation"]["per_layer"][layer] == pytest.approx(scipy.stats.spearmanr(*halves)[0])
    hottest = [set(np.argsort(-half, kind="stable")[: round(0.2 * len(ordered))]) for half in halves]
    assert stability["hot_overlap"]["per_layer"][layer] == len(hottest[0] & hottest[1]) / len(hottest[0])


def test_neurons_are_counted_by_their_own_zeros():
  found = observed("1 device")[1]["neurons"]["frequency"]
  zeros = layers(lambda ffn: np.concatenate([
    (ffn["hidden"][..., e, :][ffn["reached"][..., e] > 0] == 0).mean(0) for e in range(ffn["reached"].shape[-1])
  ]))  # fmt: skip
  for of_layer, wanted in zip(found["per_layer"], map(np.concatenate, zeros), strict=True):
    np.testing.assert_allclose(of_layer, np.histogram(wanted, 20, (0, 1))[0] / len(wanted), atol=1.01 / len(wanted))
    assert sum(of_layer) == pytest.approx(1)


def test_pairs_that_fire_together_are_found():
  natural, found = observed("1 device")
  pairs = found["neurons"]["coactivation"]
  tokens = natural.real_tokens
  for layer, (kind, i) in enumerate([("first", 0), ("ffn", 0), ("ffn", 1)]):
    ffn = {name: x[i] for name, x in raw()[kind].items()}
    fired = ((ffn["hidden"] != 0) & (ffn["reached"] > 0)[..., None]).reshape(16 * 24, -1)
    fired = fired[:, fired.any(0)].astype(float), fired.astype(float)
    lift = tokens * fired[0].T @ fired[0] / np.outer(fired[0].sum(0), fired[0].sum(0))
    lift = lift[np.triu_indices(len(lift), 1)]
    assert pairs["neurons"][layer] == fired[0].shape[1]  # fewer than 256: all of them
    assert pairs["mean_lift"][layer] == pytest.approx(lift.mean())
    assert pairs["share_above_2"][layer] == pytest.approx((lift > 2).mean())
    one, other, best, given = pairs["top"][layer][0]
    both = fired[1][:, one] @ fired[1][:, other]
    alone = fired[1][:, one].sum(), fired[1][:, other].sum()
    assert both >= 10 and best == pytest.approx(tokens * both / np.prod(alone)) and given == both / min(alone)


def test_eight_devices_give_the_numbers_of_one():
  (natural, one), (sharded, eight) = observed("1 device"), observed("8 devices")
  for kind, counts in natural.counts.items():
    assert np.abs(counts.fired - sharded.counts[kind].fired).sum() <= 1e-4 * counts.fired.sum()
  np.testing.assert_allclose(natural.documents.sums, sharded.documents.sums, rtol=1e-4)
  flat = [jax.tree_util.tree_flatten_with_path(found)[0] for found in (one, eight)]
  assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
  for (path, a), (_, b) in zip(*flat, strict=True):
    if "top" not in str(path):  # neurons of equal lift may change places
      # An entry that lies on an edge to the last bit may be in either bin: 2 of some 20,000 entries of a layer.
      atol = 1e-4 if "histograms" in str(path) else 1e-7
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=str(path))


def test_the_first_layer_that_is_not_finite_is_named():
  model, params, data = tiny()
  params = jax.tree.map(lambda x: x, params)
  params["layers"]["ffn"]["shared"]["up"] = params["layers"]["ffn"]["shared"]["up"].at[1, 3, 3].set(jnp.nan)
  with jax.set_mesh(mesh := mesh_of({})), pytest.raises(UserError, match="not finite: values in layer 2 .* first"):
    probe(model, params, data.batches, mesh, everything)


@pytest.mark.parametrize(("form", "suffix"), [("numpy", "npy"), ("powerinfer", "pt")])
def test_exported_counts_are_read_back(form, suffix, tmp_path):
  natural, _ = observed("1 device")
  neurons.export(natural.counts, tmp_path / "activation", form)
  assert sorted(path.name for path in (tmp_path / "activation").iterdir()) == [
    f"activation_{n}.{suffix}" for n in range(3)
  ]
  for layer, fired in enumerate(neurons.layers(natural.counts)):
    path = tmp_path / "activation" / f"activation_{layer}.{suffix}"
    if form == "powerinfer":
      torch = pytest.importorskip("torch")
      read = torch.load(path, weights_only=True).numpy()
    else:
      read = np.load(path)
    np.testing.assert_array_equal(read, fired)
  assert len(fired) == 4 * 24 + 24
