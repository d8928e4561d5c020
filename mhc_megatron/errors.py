"""Errors that a user can mend: one clear sentence, printed without a traceback, exit code 2."""


class UserError(Exception):
    """Something outside the code is wrong (a setting, a file, a folder); says what to change."""
