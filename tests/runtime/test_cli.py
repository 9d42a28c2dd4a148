"""The command lines of the five programs, side by side: a flag means the same in each, in one place of the code."""

import importlib
import re

import pytest

from runtime import cli
from runtime.cli import ArgumentParser

PROGRAMS = ("sample", "sample_ddp", "train_router", "evaluator", "download")
# What differs by intent: the published defaults, and what a flag is about in each program.
OWN = {
    ("--vae", "default"),  # pictures are decoded by one published VAE, evaluations by the other
    ("--num-sampling-steps", "default"),
    ("--num-sampling-steps", "help"),
    ("--num-sampling-steps", "type"),  # a router's steps come in pairs
    ("--cfg-scale", "help"),  # which names the published guidance of the program
    ("--global-seed", "help"),
    ("--record", "help"),  # with sample.py it belongs to --compare
    ("--dtype", "default"),  # a training says in which precision it was, also on a CPU
    ("--dtype", "help"),
    ("--dtype", "choices"),  # and fp16 would need its loss scaled
}


class Caught(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    def catch(parser, *_):
        raise Caught(parser)

    monkeypatch.setattr(ArgumentParser, "parse_known_args", catch)

    def parser_of(program):
        with pytest.raises(Caught) as caught:
            importlib.import_module(program).parse_args([])
        return caught.value.args[0]

    return parser_of


def test_a_flag_of_several_programs_means_the_same_in_each(parser_of):
    flags, compared = {}, 0
    for program in PROGRAMS:
        for action in parser_of(program)._actions:
            for flag in action.option_strings:
                flags.setdefault(flag, {})[program] = action
    for flag, actions in flags.items():
        for field in ("default", "help", "type", "choices", "metavar", "nargs"):
            values = {str(getattr(action, field)) for action in actions.values()}
            assert len(values) == 1 or (flag, field) in OWN, f"{flag}: its {field} differs: {values}"
            compared += len(actions) > 1
    assert compared > 50


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_tells_every_flag_and_shows_command_lines_that_parse(parser_of, program, monkeypatch):
    parser = parser_of(program)
    assert all(action.help for action in parser._actions)
    monkeypatch.undo()
    lines = re.sub(r"\\\n +", "", parser.format_help()).splitlines()
    # What stands after a # or several spaces explains the command.
    commands = [
        re.split("#|   ", line.strip())[0].split() for line in lines if re.match(rf" .*\b{program}\.py\b", line)
    ]
    assert commands
    for words in commands:
        importlib.import_module(program).parse_args(words[words.index(f"{program}.py") + 1 :])


def test_a_default_of_zero_is_told_and_one_of_false_is_not():
    parser = cli.ArgumentParser()
    parser.add_argument("--seed", default=0, help="of the noise")
    parser.add_argument("--list", action="store_true", help="only show")
    assert "of the noise (default: 0)" in parser.format_help() and "only show\n" in parser.format_help()
