"""A parser of command lines whose errors are a :class:`UserError`, and types of its numbers."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable
from typing import NoReturn

from d2_mgd.errors import UserError


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description unchanged, and each option's default unless its help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = "default" in (action.help or "") or action.default in (None, []) or action.nargs == 0
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises :class:`UserError` instead of printing the usage and exiting.

    Args:
        usage: in one line.
        what: sentence about the command, and its most common uses.
    """

    def __init__(self, usage: str, what: str) -> None:
        super().__init__(usage=usage, description=what, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        unknown = next((word.split("=")[0] for word in words if word.startswith("--")), "")
        similar = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        instead = f", but there is {similar[0]}" if similar else ""
        raise UserError(f"{' '.join(message.split())}{instead}; {self.prog} --help lists all options.")


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
