"""The one exception that is the user's to mend."""


class UserError(Exception):
  """What was asked cannot be done: the message says what was asked, what is wrong and what to do. Commands exit 2."""


class RunFailure(Exception):
  """A run that was asked for properly and went wrong (the loss is not finite, say). Commands exit 1."""
