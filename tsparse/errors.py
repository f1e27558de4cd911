"""The two ways a command can fail."""


class UserError(Exception):
  """What was asked cannot be done: the message says what was asked, what is wrong and what to do. Exit code 2."""


class RunFailure(Exception):
  """A run that was asked for properly and went wrong (the loss is not finite, say). Exit code 1."""
