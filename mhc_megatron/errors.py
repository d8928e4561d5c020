"""Errors that a user can mend: one clear sentence, printed without a traceback, exit code 2."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something outside the code is wrong (a setting, a file, a folder); says what to change."""


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def quiet_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """A command's ``main`` that ends without a traceback when its reader has seen enough (head)."""

    @functools.wraps(main)
    def run(*words, **options) -> int:
        try:
            code = main(*words, **options)
            sys.stdout.flush()  # here, not when Python ends
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return run
