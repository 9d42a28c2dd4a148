"""Command lines of the five programs: a flag that several have means the same in each."""

import importlib
import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from runtime import cli
from runtime.errors import LostPeer, UserError

PROGRAMS = ("sample", "sample_ddp", "train_router", "evaluator", "download")
# Intended differences: published defaults, and the purpose of a flag in a program.
INTENDED = {
    ("--vae", "default"),  # published: one VAE for pictures, the other for evaluation
    ("--num-sampling-steps", "default"),
    ("--num-sampling-steps", "help"),
    ("--num-sampling-steps", "type"),  # steps of a router come in pairs
    ("--cfg-scale", "help"),  # it names the published guidance of the program
    ("--global-seed", "help"),
    ("--forecast", "help"),  # it names the default, which is 2 for a plan that is learned
    ("--record", "help"),  # sample.py needs --compare with it
    ("--dtype", "default"),  # training records its precision on a CPU too
    ("--dtype", "help"),
    ("--dtype", "choices"),  # fp16 would need a scaled loss
}


class Caught(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    def catch(parser, *_):
        raise Caught(parser)

    monkeypatch.setattr(cli.ArgumentParser, "parse_known_args", catch)

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
            assert len(values) == 1 or (flag, field) in INTENDED, f"{flag}: its {field} differs: {values}"
            compared += len(actions) > 1
    assert compared > 50


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_every_flag_and_shows_commands_that_parse(parser_of, program, monkeypatch):
    parser = parser_of(program)
    assert all(action.help for action in parser._actions)
    monkeypatch.undo()
    lines = re.sub(r"\\\n +", "", parser.format_help()).splitlines()
    # Text after a # or several spaces explains the command.
    commands = [
        re.split("#|   ", line.strip())[0].split() for line in lines if re.match(rf" .*\b{program}\.py\b", line)
    ]
    assert commands
    for words in commands:
        importlib.import_module(program).parse_args(words[words.index(f"{program}.py") + 1 :])


def test_help_shows_a_default_of_zero_and_not_one_of_false():
    parser = cli.ArgumentParser()
    parser.add_argument("--seed", default=0, help="of the noise")
    parser.add_argument("--list", action="store_true", help="only show")
    assert "of the noise (default: 0)" in parser.format_help() and "only show\n" in parser.format_help()


@pytest.mark.parametrize(
    "environment, spins",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_openmp_spins_little_unless_the_user_chose_otherwise(environment, spins, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom runtime import cli\ncli.run(lambda _: print(os.getenv('GOMP_SPINCOUNT')), None)\n"
    )
    result = subprocess.run(
        [sys.executable, script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == spins, result.stderr


def test_without_torchrun_each_rank_says_what_it_refuses_at_once(monkeypatch, capsys):
    """Each may have a terminal of its own, and programs without ranks may see the RANK of a container."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            cli.ArgumentParser(prog="program").error("refused")
        assert stop.value.code == 2 and capsys.readouterr().err.count("program: error: refused") == 1


@pytest.mark.parametrize(
    "encoding, printed", [("ascii", rb"5\xb10.1 caf\udce9"), ("utf-8", "5±0.1 ".encode() + rb"caf\udce9")]
)
def test_what_the_terminal_cannot_show_is_printed_as_escapes(encoding, printed, monkeypatch):
    """The name of a file is b"caf\xe9": Latin-1, and not UTF-8."""
    name, output = os.fsdecode(b"caf\xe9"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding, errors="strict"))
    cli.run(lambda _: print(f"5±0.1 {name}"), None)
    assert output.getvalue() == printed + b"\n"


def test_an_output_that_the_shell_has_closed_is_no_fault(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    cli.run(lambda _: print("text", sys.stderr.isatty()), None)


def test_help_is_ascii(parser_of):
    assert all(parser_of(program).format_help().isascii() for program in PROGRAMS)


def test_a_rank_waits_for_torchrun_before_it_prints_what_rank_0_prints_too(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli, "_outlives_main", lambda *seconds: waits.append(seconds))
    monkeypatch.setenv("RANK", "1")

    def fail(error):
        raise error

    for error in (UserError("an image"), LostPeer("process 1 lost the others")):
        with pytest.raises(SystemExit, match=str(error)):
            cli.run(fail, error)
    assert waits == [(cli.WAIT_FOR_SAME, cli.BETWEEN_SAME)]  # only rank 1 lost rank 0
