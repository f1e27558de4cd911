"""The one exception that is the user's to mend."""


class UserError(Exception):
  """What was asked cannot be done: the message says what was asked, what is wrong and what to do. Commands exit 2."""
