"""The edge of every program: arguments refused in one line, faults reported in one line."""

import argparse
import contextlib
import math
import os
import signal
import sys
import warnings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, where there is one to tell; keeps the lines of a table below them."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help and errors of one line, exit code 2.

    description: of the five programs their docstring, with the command lines as they are typed.
    positional: what the usage says after the flags, which are all optional and listed below it.
    """

    def __init__(self, positional="", **kwargs):
        usage = f"%(prog)s [FLAG ...] {positional}".rstrip()
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, usage=usage, **kwargs)

    def error(self, message):
        if os.environ.get("RANK", "0") != "0":  # torchrun's first process says it for all
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, accepts, rule):
    """An argparse type: `kind` (int or float) of the text, where `accepts` says yes; `rule` says what is accepted."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return value

    return convert


positive = number(int, lambda value: value >= 1, "a whole number of at least 1")
non_negative_int = number(int, lambda value: value >= 0, "a whole number of at least 0")
# The models were trained with 1000 steps; a router decides the second step of a pair.
sampling_steps = number(int, lambda value: 1 <= value <= 1000, "a whole number from 1 to 1000")
router_steps = number(int, lambda value: 2 <= value <= 1000, "a whole number from 2 to 1000")
fraction = number(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")
finite = number(float, math.isfinite, "a finite number")
share = number(float, lambda value: 0 < value <= 0.5, "a number in (0, 0.5]")
non_negative = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32-1")


def json_file(text):
    """An argparse type: a path that ends in .json."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .json")
    return text


def add_device_argument(parser):
    """Where a program computes, as `devices.pick_device` reads it."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes CUDA where there is one")


def add_record_argument(parser, only="", also=()):
    """The flag of programs that measure; only: when it means anything; also: other names of it."""
    parser.add_argument(
        "--record",
        *also,
        metavar="JSON",
        type=json_file,
        help=f"{only}file to write the figures and their circumstances to",
    )


def add_model_arguments(parser, vae):
    """The flags that say which model; with a model folder --ckpt says it all. vae: the default of --vae."""
    group = parser.add_argument_group("model")
    only = "; not used with a model folder"
    group.add_argument("--model", default="DiT-XL/2", help=f"size and patch, as DiT-XL/2{only}")
    group.add_argument(
        "--vae", choices=["ema", "mse"], default=vae, help="released VAE; not used with a folder that has its own"
    )
    group.add_argument("--image-size", type=int, choices=[256, 512], default=256, help=f"pixels a side{only}")
    group.add_argument("--num-classes", metavar="N", type=positive, default=1000, help=f"classes of the model{only}")
    group.add_argument(
        "--ckpt",
        metavar="PATH",
        help=".pt or .safetensors of weights, a model folder, or a folder or Hub name of a DiT of diffusers; "
        "without it the released weights are fetched",
    )
    return group


def add_sampling_arguments(parser, cfg_scale):
    """The flags that say how to sample; cfg_scale: the published guidance of the program."""
    group = parser.add_argument_group("sampling")
    sampler = group.add_mutually_exclusive_group()
    sampler.add_argument(
        "--ddim-sample", action="store_true", help="DDIM, eta 0; this is also meant without a sampler flag"
    )
    sampler.add_argument("--p-sample", action="store_true", help="ancestral sampling (DDPM)")
    group.add_argument(
        "--num-sampling-steps",
        metavar="N",
        type=sampling_steps,
        default=250,
        help="denoising steps, at most 1000",
    )
    group.add_argument(
        "--cfg-scale",
        metavar="SCALE",
        type=finite,
        help=f"guidance, 1 is none; without it {cfg_scale}, or what a model folder recommends",
    )
    group.add_argument(
        "--accelerate-method",
        choices=["dynamiclayer", "schedule"],
        help="dynamiclayer: skip what the router of --path says; schedule: what the Schedule saved there says",
    )
    group.add_argument(
        "--path", metavar="FILE", help="router or schedule file; a released one that is not there is fetched"
    )
    add_threshold_argument(group)
    return group


def add_threshold_argument(parser):
    """From which score on a router runs a layer."""
    parser.add_argument(
        "--thres",
        metavar="SCORE",
        type=fraction,
        default=0.1,
        help="layers to which a router gives at most this are skipped, 0 to 1",
    )


def add_precision_arguments(parser, choices, default=None):
    """The flags that say in which precision a DiT runs, and whether its blocks are compiled."""
    group = parser.add_argument_group("device and speed")
    group.add_argument(
        "--dtype",
        choices=choices,
        default=default,
        help="precision of the transformer; the diffusion state is float32, and so is the VAE, but with fp16 on a GPU; "
        "tf32 is fp32 on a CPU" + ("" if default else "; without it tf32 on a GPU, fp32 on a CPU"),
    )
    group.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    add_device_argument(group)
    return group


def add_speed_arguments(parser):
    """The flags of the sampling programs that change how fast they are, and the numbers in their last digits."""
    group = add_precision_arguments(parser, ["fp32", "tf32", "bf16", "fp16"])
    group.add_argument(
        "--cuda-graphs", action="store_true", help="record a batch's whole trajectory once and replay it; needs a GPU"
    )
    return group


def check_sampling_arguments(parser, args):
    """Refuses a method without its file, and a file without its method."""
    if args.accelerate_method and not args.path:
        parser.error(f"--accelerate-method {args.accelerate_method} needs its file: add --path")
    if args.path and not args.accelerate_method:
        parser.error("--path needs its method: add --accelerate-method dynamiclayer for a router, schedule for others")


@contextlib.contextmanager
def sigterm_interrupts():
    """In this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that what is under way can be ended in order.

    Not where a process may wait for another one: such a wait hears no signal that Python handles.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_line_warnings():
    """In this block a warning is one line on standard error; yields the list of those that were said."""
    program, said = os.path.basename(sys.argv[0]), []

    def say(warning, *_):
        said.append(str(warning))
        print(f"{program}: warning: {warning}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield said


def fault(error, memory_hint=None):
    """What to say of an exception that is not the program's fault; "" where another process says it; None of a bug.

    Those are a `UserError`, files that cannot be used (an OSError that nothing else took), and too little memory;
    less: what to pass then.
    """
    from runtime.errors import UserError
    from runtime.memory import out_of_memory

    # A data loading process hands its error on below a traceback: the last line says it.
    text = str(error).strip().rpartition("\n")[2]
    if isinstance(error, UserError):
        return "" if error.printed_by_main else str(error).rpartition("UserError: ")[2]
    if isinstance(error, OSError):
        where = error.filename or "a file, or the output"
        return f"{where} cannot be used: {error.strerror or text}; see that it is there, with the rights and the room"
    if out_of_memory(error):
        return f"memory does not suffice{f': pass {memory_hint}' if memory_hint else ''}"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return "a data loading process was killed, for want of memory perhaps: pass a smaller --num-workers"
    return None


def run(main, args, memory_hint=None):
    """Calls main(args) and exits: 1 with one line for a fault that is not the program's (`fault`), 130 for Ctrl-C.

    A bug keeps its traceback. A KeyboardInterrupt may hold a text of main's, which is said too.
    less: what to pass where memory does not suffice.
    """
    program = os.path.basename(sys.argv[0])
    try:
        main(args)
        sys.stdout.flush()  # so that a full disk behind it is told here
    except Exception as error:
        text = fault(error, memory_hint)
        if text is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # which would be told once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{program}: error: {' '.join(text.split())}" if text else 1)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{program}: interrupted{''.join(f': {text}' for text in interrupt.args)}", file=sys.stderr)
        sys.exit(130)
