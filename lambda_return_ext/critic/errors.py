"""The one exception that the command line turns into a message and exit code 2."""


class UserError(Exception):
    """Something the user can put right; the message says what and how."""
