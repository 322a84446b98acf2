"""Command lines: what is wrong with one is an error like any other, and no exit of argparse's own."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError for options that are not allowed, or that lack."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists what is allowed")
