"""The edge of every program: arguments refused in one line, faults reported in one line."""

import argparse
import os
import sys


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help and errors of one line, exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def positive(text):
    """An int of at least 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def fraction(text):
    """A float in [0, 1], as an argparse type."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1]")
    return value


def run(main, args):
    """Calls main(args) and exits: 1 with one line for a `UserError`, 130 for Ctrl-C; a bug keeps its traceback."""
    from files import UserError

    program = os.path.basename(sys.argv[0])
    try:
        main(args)
    except UserError as error:
        sys.exit(f"{program}: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
