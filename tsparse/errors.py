"""The two ways a command can fail, and the one in which it is stopped."""


class UserError(Exception):
  """What was asked cannot be done: the message says what was asked, what is wrong and what to do. Exit code 2."""


class RunFailure(Exception):
  """A run that was asked for properly and went wrong (the loss is not finite, say). Exit code 1."""


class Stopped(Exception):
  """A signal stopped a run, which saved itself first. Exit code as given."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code
