"""A parser of command lines whose errors are a :class:`UserError`, and types of its numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from d2_mgd.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises :class:`UserError` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; {self.prog} --help lists all options.")


def whole(least: int) -> Callable[[str], int]:
    """A type of whole numbers from ``least`` on."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
        return value

    convert.__name__ = "whole number"  # argparse: "invalid whole number value: ..."
    return convert


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """A type of finite numbers from ``least`` on, or ``above`` it."""

    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"must be {'above ' if above else ''}{least:g}{'' if above else ' or more'}, not {text}"
            )
        return value

    convert.__name__ = "number"
    return convert
