"""Every number of an analysis where only some tokens are scored, as in conversations, against a model in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.analysis.test_probe import MOE, mesh_of, tiny
from tsparse.analysis import confidence
from tsparse.analysis.analyze import analyze
from tsparse.analysis.cost import pieces
from tsparse.analysis.probe import Seen
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import parameter_counts
from tsparse.sparse.predictors import quality

LEVELS = (0.0, 0.8, 0.95)
KINDS = (("first",), ("ffn", "shared"), ("ffn", "shared"))  # of the three layers


@functools.cache
def chat():
  """The text of `tiny` as conversations: a mask that differs by row, rows without a scored token, padding."""
  model, params, data = tiny()
  rng, batches = np.random.default_rng(3), []
  for batch in data.batches:
    mask = (rng.random(batch["inputs"].shape) < np.linspace(0.1, 0.9, 8)[:, None]) & (batch["segment_ids"] > 0)
    mask[[1, 4]] = False
    batches.append(batch | {"loss_mask": mask.astype(np.int32)})
  return model, jax.tree.map(np.asarray, params), dataclasses.replace(data, batches=batches, documents=16)


@functools.cache
def analysed():
  model, params, data = chat()
  done = []
  with jax.set_mesh(mesh := mesh_of({})):
    parts = ("counts", "tokens", "thresholds")
    about = {"source": "", "text": "text", "trained_tokens": 0, "by_source": {"text": data}}
    progress = lambda _, amount: done.append(amount)  # noqa: E731
    found = analyze("m", model, params, data, mesh, levels=LEVELS, parts=parts, progress=progress, **about)
  cost = sum(piece.batches(2, 2) for piece in pieces(MOE, 24, LEVELS, parts=parts).values())
  assert sum(done) == pytest.approx(cost)  # the bar comes to its end
  return found


def unmasked(kind, layer, gate, up, hidden):
  return hidden


def forward(intervene=unmasked, on_input=lambda layer, x: x):
  """-ln p [B, T] of all rows, and of each layer by kind of FFN gate, up, hidden [B, T, E, F], x, reached, down."""
  _, params, data = chat()
  inputs, targets, segments, positions = (
    np.concatenate([batch[name] for batch in data.batches])
    for name in ("inputs", "targets", "segment_ids", "positions")
  )
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + MOE.norm_eps) * scale  # noqa: E731
  angles = positions[..., None, None] * MOE.rope_theta ** (-2 * np.arange(MOE.head_dim // 2) / MOE.head_dim)
  turn = np.exp(1j * angles)

  def rotated(x):
    pairs = (x[..., : MOE.head_dim // 2] + 1j * x[..., MOE.head_dim // 2 :]) * turn
    return np.concatenate([pairs.real, pairs.imag], -1)

  seen = (segments[:, :, None] == segments[:, None]) & np.tri(segments.shape[1], dtype=bool)
  real, x, found = segments > 0, params["embed"][inputs].astype(np.float64), []
  for number in range(3):
    stack, i = ("layers", number - 1) if number else ("first", 0)
    layer = jax.tree.map(lambda leaf: leaf[i], params[stack])  # noqa: B023
    of, heads = layer["attention"], MOE.num_heads // MOE.num_kv_heads
    normed = norm(x, layer["attention_norm"])
    query, key = (rotated(np.einsum("btd,dnh->btnh", normed, of[name])) for name in ("query", "key"))
    key, value = (np.repeat(y, heads, 2) for y in (key, np.einsum("btd,dnh->btnh", normed, of["value"])))
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(MOE.head_dim)
    scores = np.exp(np.where(seen[:, None], scores, -np.inf) - scores.max(-1, keepdims=True))
    mixed = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), value)
    x = x + np.einsum("btnh,nhd->btd", mixed, of["out"])
    normed, ffn, outs, shown = norm(x, layer["ffn_norm"]), layer["ffn"], 0, {}
    for kind in KINDS[number]:
      weights = ffn["shared"] if kind == "shared" else ffn
      gate, up, down = (weights[n].reshape(-1, *weights[n].shape[-2:]) for n in ("gate", "up", "down"))
      read = on_input(number, normed)
      gate, up = np.einsum("btd,edf->btef", read, gate), np.einsum("btd,edf->btef", read, up)
      hidden = intervene(kind, number, gate, up, np.maximum(gate, 0) * np.maximum(up, 0))
      share = np.ones((*real.shape, 1))
      if kind == "ffn":
        logits = normed @ ffn["router"]
        chosen = np.argsort(np.argsort(-logits, -1, "stable"), -1) < MOE.experts_per_token
        share = np.where(chosen, np.exp(logits), 0)
        share = share / share.sum(-1, keepdims=True)
      if kind == "shared":
        share = 1 / (1 + np.exp(-normed @ ffn["shared_gate"]))[..., None]
      outs = outs + np.einsum("btef,efd,bte->btd", hidden, down, share)
      reached = real[..., None] & ((share > 0) if kind == "ffn" else True)
      shown[kind] = {"x": read, "gate": gate, "up": up, "hidden": hidden, "reached": reached, "down": down}
    x = x + outs * real[..., None] if number else x + outs
    found.append(shown)
  head = params["head"] if "head" in params else params["embed"].T
  logits = norm(x, params["final_norm"]) @ head
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return nll, found


@functools.cache
def natural():
  return forward()


def fired(ffn):
  return (ffn["hidden"] != 0) & ffn["reached"][..., None]


def each(function):
  """function(of an FFN) of each layer, in a list of its FFNs."""
  return [[function(ffn) for ffn in layer.values()] for layer in natural()[1]]


def sums(function):
  """[L]: its sum over the FFNs of each layer."""
  return np.array([sum(map(np.sum, layer)) for layer in each(function)], float)


def entries(ffn):
  return ffn["reached"].sum() * ffn["hidden"].shape[-1]


def masks():
  """Which tokens are scored, and which are real, [B, T]."""
  batches = chat()[2].batches
  return tuple(np.concatenate([batch[name] for batch in batches]) > 0 for name in ("loss_mask", "segment_ids"))


def zeros_of(layers):
  return 1 - sum(fired(f).sum() for layer in layers for f in layer.values()) / sums(entries).sum()


def test_losses_are_of_the_scored_tokens_and_zeros_of_all_real_ones():
  result, (nll, _), (scored, real) = analysed(), natural(), masks()
  assert 0 < scored.sum() < 0.6 * real.sum() and scored.sum(1).min() == 0
  for of_text in (result, *result["sources"]):
    assert (of_text["tokens"], of_text["real_tokens"]) == (scored.sum(), real.sum())
    assert of_text["loss"] == pytest.approx(nll[scored].mean(), rel=1e-5)
  zeros = result["zero_fraction"]
  assert zeros["mean"] == result["sources"][0]["zero_fraction"] == pytest.approx(zeros_of(natural()[1]))
  np.testing.assert_allclose(zeros["per_layer"], 1 - sums(lambda f: fired(f).sum()) / sums(entries))
  routed = [layer["ffn"] for layer in natural()[1][1:]]
  per_expert = [1 - fired(f).sum((0, 1, 3)) / (f["reached"].sum((0, 1)) * 24) for f in routed]
  np.testing.assert_allclose(zeros["per_expert"][1:], per_expert)
  shared = [layer["shared"] for layer in natural()[1][1:]]
  np.testing.assert_allclose(zeros["shared_per_layer"], [1 - fired(f).sum() / entries(f) for f in shared])
  dead = sums(lambda f: (~fired(f).any((0, 1))).sum())
  assert result["dead_neurons"]["per_layer"] == dead.tolist() and result["dead_neurons"]["count"] == dead.sum()

  lines = result["per_document"]
  by_row = lambda x: x.reshape(16, -1).sum(1)  # noqa: E731
  zero = by_row(sum(sum(each(lambda f: ((f["hidden"] == 0) & f["reached"][..., None]).sum((2, 3))), [])))
  whole = by_row(sum(sum(each(lambda f: f["reached"].sum(2) * f["hidden"].shape[-1]), [])))
  assert lines["tokens"] == by_row(scored).tolist()
  np.testing.assert_allclose(lines["nll"], by_row(np.where(scored, nll, 0)), rtol=1e-5)
  np.testing.assert_allclose(lines["zero_fraction"], zero / whole)
  assert result["confidence"]["zero_fraction"] == pytest.approx(confidence.interval(zero, whole))
  spoke = by_row(scored) > 0
  interval = confidence.interval(by_row(np.where(scored, nll, 0))[spoke], by_row(scored)[spoke])
  assert result["confidence"]["loss"] == pytest.approx(interval, rel=1e-5)

  counts = parameter_counts(MOE)
  read = {"ffn": 0.5 * (1 - np.average(per_expert, weights=[f["reached"].sum((0, 1)) for f in routed]))}
  read["dense"] = 1 - zeros["per_layer"][0]
  read["shared"] = 1 - np.mean(zeros["shared_per_layer"])
  others = result["parameters"]["activated"] - counts["ffn"] * read["ffn"] - counts["shared"] * read["shared"]
  rest = sum(n for name, n in counts.items() if name not in ("ffn", "shared", "first"))
  assert others == pytest.approx(rest + counts["first"] * read["dense"])


def test_the_widest_token_of_a_row_is_known_by_kind_of_ffn():
  model, params, data = chat()
  with jax.set_mesh(mesh := mesh_of({})):
    found = evaluate(model, params, data.batches, mesh)
  for kind in ("first", "ffn", "shared"):
    of_kind = [fired(layer[kind]).sum((2, 3)).max(1) for layer in natural()[1] if kind in layer]
    np.testing.assert_array_equal(found.rows.most[kind], np.max(of_kind, 0))
  scored, _ = masks()
  np.testing.assert_allclose(found.rows.nll, np.where(scored, natural()[0], 0).sum(1), rtol=1e-5)


def test_positions_and_histograms_are_of_all_real_tokens():
  result, (_, real) = analysed(), masks()
  positions = np.concatenate([batch["positions"] for batch in chat()[2].batches])
  zero, whole = np.zeros(24), np.zeros(24)
  for ffn in sum(each(lambda f: f), []):
    np.add.at(zero, positions[real], ((ffn["hidden"] == 0) & ffn["reached"][..., None]).sum((2, 3))[real])
    np.add.at(whole, positions[real], (ffn["reached"].sum(2) * ffn["hidden"].shape[-1])[real])
  np.testing.assert_allclose(result["zero_fraction"]["per_position"], zero / whole)
  edges = np.array(result["histograms"]["edges"])
  for name in ("gate", "up", "hidden"):
    for layer, values in enumerate(each(lambda f: f[name][f["reached"]].ravel())):  # noqa: B023
      values = np.concatenate(values)
      shares = np.histogram(values, edges)[0] / len(values)
      np.testing.assert_allclose(result["histograms"][name][layer], shares, atol=2 / len(values))


def test_unions_and_pairs_are_of_all_real_tokens():
  result, (_, real) = analysed(), masks()
  by_layer = [np.concatenate(layer, 1) for layer in each(lambda f: fired(f)[real].reshape(real.sum(), -1))]
  reached = each(lambda f: f["reached"][real].repeat(f["hidden"].shape[-1], 1))
  reached = [np.concatenate(layer, 1) for layer in reached]
  for union in result["union"]["batch"]:
    unread = [(1 - layer.mean(0)) ** union["size"] for layer in by_layer]
    away = [(1 - layer.mean(0)) ** union["size"] for layer in reached]
    assert union["zero_fraction"] == pytest.approx(np.concatenate(unread).mean()) and 0 < union["zero_fraction"] < 1
    np.testing.assert_allclose(union["per_layer"], [layer.mean() for layer in unread], atol=1e-12)
    speedup = np.sum(1 - np.concatenate(away)) / np.sum(1 - np.concatenate(unread))
    assert union["expected_speedup"] == pytest.approx(speedup)
  positions = np.concatenate([batch["positions"] for batch in chat()[2].batches])
  for window in result["union"]["window"]:
    size = window["size"]
    ends = [(b, t) for b, t in np.argwhere(real) if positions[b, t] >= size - 1]
    read = sum(sum(each(lambda f: np.mean([fired(f)[b, t - size + 1 : t + 1].any(0).sum() for b, t in ends])), []))  # noqa: B023
    neurons = sum(sum(each(lambda f: f["hidden"].shape[2] * f["hidden"].shape[3]), []))
    assert window["zero_fraction"] == pytest.approx(1 - read / neurons)

  pairs = result["neurons"]["coactivation"]
  for layer, kinds in enumerate(natural()[1]):
    together = fired(next(iter(kinds.values())))[real].reshape(real.sum(), -1).astype(float)
    together = together[:, together.any(0)]
    often = together.mean(0)
    lift = (together.T @ together / len(together) / np.outer(often, often))[np.triu_indices(len(often), 1)]
    assert pairs["mean_lift"][layer] == pytest.approx(lift.mean())
    assert pairs["share_above_2"][layer] == pytest.approx((lift > 2).mean())
    assert pairs["top"][layer][0][2] == pytest.approx(
      max(x for x, n in zip(lift, (together.T @ together)[np.triu_indices(len(often), 1)], strict=True) if n >= 10)
    )


def test_experts_are_weighed_by_all_real_tokens():
  result, (_, real) = analysed()["experts"], masks()
  routed = [layer["ffn"] for layer in natural()[1][1:]]
  np.testing.assert_allclose(result["load"], [f["reached"].sum((0, 1)) / (2 * real.sum()) for f in routed])
  active = sum(fired(f).sum() for f in routed)
  assert result["joint"]["active_of_all"] == pytest.approx(active / (real.sum() * 2 * 4 * 24))
  assert result["joint"]["active_in_routed"] == pytest.approx(active / (real.sum() * 2 * 2 * 24))
  everything = sums(lambda f: fired(f).sum()).sum() / (real.sum() * (40 + 2 * (4 * 24 + 24)))
  assert result["joint"]["active_of_ffn"] == pytest.approx(everything)
  for layer, ffn in enumerate(routed):
    for level, errors in zip(result["curves"]["levels"], np.transpose(result["curves"]["error"][layer]), strict=True):
      rank = np.argsort(np.argsort(-ffn["hidden"], -1, "stable"), -1)
      dropped = np.where(rank >= 24 - round(24 * level), ffn["hidden"], 0)
      np.testing.assert_allclose(errors, mean_error(ffn, dropped), rtol=1e-4)


def mean_error(ffn, dropped):
  """[E]: mean over the tokens of each expert of what is dropped over its output, by length."""
  part, whole = (np.linalg.norm(np.einsum("btef,efd->bted", x, ffn["down"]), axis=-1) for x in (dropped, ffn["hidden"]))
  error = np.where(ffn["reached"] & (whole > 0), part / np.where(whole > 0, whole, 1), 0)
  return error.sum((0, 1)) / ffn["reached"].sum((0, 1))


def of_ffn(point, kind, layer):
  """The threshold [E] of an FFN in a point of a curve."""
  if "epsilon" in point:
    return np.float32(point["epsilon"])
  return np.float32([point["epsilon_shared"][layer - 1]] if kind == "shared" else point["epsilon_per_expert"][layer])


@pytest.mark.parametrize("method", ["curve", "fat", "teal_down", "cats", "teal", "cett"])
def test_masks_and_thresholds_are_of_all_real_tokens_and_their_losses_of_the_scored(method):
  result, (scored, real) = analysed(), masks()
  shares, points = [], result["curve"] if method == "curve" else result["thresholds"][method]
  for point in points[:: len(points) // 2]:

    def mask(kind, layer, gate, up, hidden, point=point):
      if method == "curve":
        rank = np.argsort(np.argsort(-hidden, -1, "stable"), -1)
        keep = rank < hidden.shape[-1] - round(hidden.shape[-1] * point["sparsity"])
        return hidden if kind == "shared" else np.where(keep, hidden, 0)
      size = np.maximum(gate, 0) if method == "cats" else hidden
      if method == "cett":
        size = hidden * np.linalg.norm(natural()[1][layer][kind]["down"], axis=-1)
      return np.where(size >= of_ffn(point, kind, layer)[..., None], hidden, 0)

    def on_input(layer, x, point=point):
      return np.where(np.abs(x) >= np.float32(point["input_epsilon_per_layer"][layer]), x, 0) if method == "teal" else x

    nll, masked = forward(mask, on_input)
    assert point["loss"] == pytest.approx(nll[scored].mean(), rel=1e-4)
    if method == "teal":
      assert point["hidden_zeros"] == pytest.approx(zeros_of(masked), abs=1e-4)
    elif method != "curve":
      assert point["sparsity"] == pytest.approx(zeros_of(masked), abs=1e-4)
    if method == "cett":
      for layer, kinds in enumerate(natural()[1]):
        for kind, ffn in kinds.items():
          dropped = np.where(mask(kind, layer, None, None, ffn["hidden"]) == 0, ffn["hidden"], 0)
          np.testing.assert_allclose(mean_error(ffn, dropped), point["cett"], atol=0.02)
    shares.append(zeros_of(masked))
  assert result["thresholds"]["calibration"]["tokens"] == real.sum() and shares == sorted(shares)


def test_the_recall_of_predictors_is_of_all_real_tokens():
  """What the probe shows has no loss mask; entries of the layers that have experts."""
  rng, counts, expected = np.random.default_rng(0), [], []
  for ffn in (layer["ffn"] for layer in natural()[1][1:]):
    fc1, fc2 = rng.normal(size=(4, 32, 8)).astype(np.float32), rng.normal(size=(4, 8, 24)).astype(np.float32)
    arrays = {name: jnp.asarray(x, bool if name == "reached" else jnp.float32) for name, x in ffn.items()}
    seen = Seen(residual=None, positions=None, **arrays)
    counts.append(quality.Histograms("drelu", (("p", "after_norm"),))(seen, {"p": {"fc1": fc1, "fc2": fc2}})["p"])
    logits = np.einsum("bter,erf->btef", np.maximum(np.einsum("btd,edr->bter", ffn["x"], fc1), 0), fc2)
    expected.append((logits > 0.5) & ffn["reached"][..., None])
  found = quality.quality(np.array(counts, float), np.full((2, 4), 0.5, np.float32), MOE, np.zeros(2))
  routed = [layer["ffn"] for layer in natural()[1][1:]]
  hits = [fired(f) & e for f, e in zip(routed, expected, strict=True)]
  assert found["recall"] == pytest.approx(np.sum(hits) / sum(fired(f).sum() for f in routed), rel=1e-4)
  assert found["predicted_sparsity"] == pytest.approx(1 - np.sum(expected) / sum(map(entries, routed)), rel=1e-4)
