"""The sources of a mixture, which of them are there and how to get the others; no text is read."""

from typing import NamedTuple

from tsparse.data import resolve, stdlib, tasks
from tsparse.data.chat import PREFIX
from tsparse.data.mixtures import MIXTURES, Declared
from tsparse.data.settings import DataSettings
from tsparse.errors import UserError


class Listed(NamedTuple):
  """A source. `place` is where it was found, "" where it is missing; `get` is where to get it."""

  name: str
  category: str
  weight: float
  place: str
  get: str


def inventory(data: DataSettings) -> list[Listed]:
  """Every source of `data`, missing ones too, with weights that add up to 1.

  Raises:
    UserError: the mixture is malformed, or names what is no source and no file.
  """
  parts = resolve.parse_mixture(data.mixture) if data.mixture else [(data.train, 1.0)]
  found = [row for name, weight in parts for row in _listed(name, weight, data)]
  if any(row.weight < 0 for row in found) or not (total := sum(row.weight for row in found)) > 0:
    raise UserError(f"The weights of {data.mixture} are negative or add up to 0: a weight is a share of the tokens.")
  return [row._replace(weight=row.weight / total) for row in found]


def _listed(name: str, weight: float, data: DataSettings) -> list[Listed]:
  declared = {source.name: source for mixture in MIXTURES.values() for source in mixture}
  if name in MIXTURES:
    total = sum(source.weight for source in MIXTURES[name])
    return [_source(source, weight * source.weight / total, data) for source in MIXTURES[name]]
  if name in declared:
    return [_source(declared[name], weight, data)]
  if name in stdlib.TASKS:
    members = stdlib.TASKS[name]
    return [Listed(task, stdlib.CATEGORIES[task], weight / len(members), "Python", "") for task in members]
  if name in tasks.registered():
    return [Listed(task, "", weight * rate, "seqio", "") for task, rate in tasks.members(name)]
  try:
    if place := resolve.path_under(name.removeprefix(PREFIX), data):
      return [Listed(name, "", weight, place, "")]
  except resolve.Missing as e:
    return [Listed(name, "", weight, "", e.get)]
  raise resolve.unknown(name)


def _source(source: Declared, weight: float, data: DataSettings) -> Listed:
  try:
    place = resolve.place_of(source, data)
  except resolve.Missing:
    place = ""
  return Listed(source.name, source.category, weight, place, source.get)
