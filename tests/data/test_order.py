import numpy as np
import pytest

from tsparse.data.order import round_keys, shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 64, 1000, 4097])
def test_every_number_is_met_once_in_an_order_of_the_key(n):
  orders = [shuffled(np.arange(n), n, round_keys(seed, 0, epoch)).tolist() for seed in (0, 1) for epoch in (0, 1)]
  assert all(sorted(order) == list(range(n)) for order in orders)
  assert n < 5 or len({tuple(order) for order in orders}) == 4


def test_the_order_looks_random():
  n, orders = 100, np.array([shuffled(np.arange(100), 100, round_keys(0, 0, epoch)) for epoch in range(400)])
  counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])  # 4 expected in each cell
  assert abs((((counts - 4) ** 2) / 4).sum() / (n - 1) ** 2 - 1) < 0.1  # chi-squared per degree of freedom
  following = np.mean(np.abs(np.diff(orders, axis=1)) == 1)
  assert abs(following - 2 / n) < 0.005


def test_the_order_is_the_same_for_ever():
  """A change here would send every saved position to other documents."""
  assert shuffled(np.arange(10), 10, round_keys(3, 1, 4)).tolist() == [9, 1, 7, 5, 3, 8, 4, 6, 0, 2]
