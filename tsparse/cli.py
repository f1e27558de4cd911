"""What every script of experiments/ does around its one function: flags, and errors as sentences.

Exit codes: 0 done, or stopped by SIGTERM with everything saved; 2 bad input (one sentence, no traceback); 1 failure.
"""

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from tsparse.errors import RunFailure, Stopped, UserError
from tsparse.workdir import flatten


def script(main: Callable[..., None], description: str, words: Sequence[str] = ()):
  """Parses the flags of a script, runs `main` and exits.

  Args:
    main: does the work; flags are parsed when it is called. It may raise UserError (exit 2), RunFailure (exit 1) or
      Stopped (its own). It is given the word of `words`, where there are any.
    description: what `--help` prints above the flags.
    words: one of which must stand among the flags.
  """
  if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
    print(f"{description.strip()}\n\nflags:{flags.FLAGS.module_help(sys.argv[0])}")
    sys.exit(0)
  logging.addLevelName(logging.WARNING, "warning")
  logging.basicConfig(format="%(levelname)s: %(message)s")  # as other sentences here: not WARNING:absl:
  try:
    main(*parse(sys.argv, words))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except RunFailure as error:
    print(f"failed: {error}", file=sys.stderr)
    sys.exit(1)
  except Stopped as stop:
    print(f"stopped: {stop}", file=sys.stderr)
    sys.exit(stop.exit_code)
  except KeyboardInterrupt:
    print("interrupted; a training goes on from its last checkpoint when it is started again.", file=sys.stderr)
    sys.exit(130)


def parse(argv: list[str], words: Sequence[str] = ()) -> list[str]:
  """Parses `argv` into absl's flags and returns the one of `words` in it, [] where there are none.

  Raises:
    UserError: an unknown flag, config file, field or word, or a wrong type.
  """
  joined = "\n".join(argv).replace("--config\n", "--config=").split("\n")  # `--config X` is `--config=X`
  for name in (argument.partition("=")[2] for argument in joined if argument.startswith("--config=")):
    file = Path(name.partition(":")[0])
    if not file.is_file():
      known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.py")))
      raise UserError(f"--config={name}: there is no file {file}." + (f" Choose one of {known}." if known else ""))
  try:
    positional = flags.FLAGS(argv)[1:]
  except (AttributeError, KeyError):  # what ml_collections raises for an override of a field that is not there
    raise UserError(unknown_field(argv)) from None
  except UserError:
    raise
  except flags.Error as error:
    lines = str(error).strip().splitlines()  # an error inside a config file comes as a whole traceback
    raise UserError(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}") from None
  except Exception as error:  # a config file is a program of the user's: anything may come out of it
    raise UserError(f"the config cannot be loaded ({type(error).__name__}: {error}).") from None
  if words and (len(positional) != 1 or positional[0] not in words):
    raise UserError(
      f"{' '.join(positional) or 'nothing'} is not one of {', '.join(words)}: give one, beside the flags."
    )
  if positional and not words:
    raise UserError(f"arguments {positional} were not expected: flags are written --name=value.")
  return positional


def unknown_field(argv: list[str]) -> str:
  """Which override of `argv` names no field of its config, and the nearest field there is."""
  overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
  sys.argv = [argument for argument in argv if argument not in overrides]  # ml_collections looks for overrides here
  flags.FLAGS.unparse_flags()
  try:
    flags.FLAGS(sys.argv)
  except AttributeError as error:  # not the override, but the config file itself
    return f"the config cannot be loaded ({error}): it needs a get_config() that returns a ConfigDict."
  fields = flatten(flags.FLAGS["config"].value.to_dict())
  name = next(name for name in (o.lstrip("-").partition("=")[0] for o in overrides) if name not in fields)
  nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
  return f"--{name}: the config has no such field; the nearest is --{nearest} (now {fields[nearest]!r})."
