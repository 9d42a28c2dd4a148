"""Command lines of all programs: shared flags, and faults that end a program with one line."""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
import warnings

from runtime.errors import LostPeer, UserError, explain
from runtime.ranks import number_or
from runtime.signals import second_signal_ends

# Seconds that the other ranks give rank 0 to print why the job ends, and the pause from one rank's message to the next:
# if rank 0 knows the error too, and if it may have met one of the same kind.
WAIT_FOR_MAIN, BETWEEN_RANKS = 60, 10
WAIT_FOR_SAME, BETWEEN_SAME = 3, 0.5


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of a flag, unless it is None or False; keeps line breaks of descriptions."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help and errors of one line, exit code 2.

    description: the docstring of a program, with example commands.
    positional: the positional arguments as the usage line shows them.
    """

    def __init__(self, positional="", **kwargs):
        usage = f"%(prog)s [FLAG ...] {positional}".rstrip()
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, usage=usage, **kwargs)

    def error(self, message):
        # Without torchrun each rank may have a terminal of its own.
        shown = _rank() == 0 or "TORCHELASTIC_RUN_ID" not in os.environ
        prints = shown or _outlives_main(WAIT_FOR_MAIN, BETWEEN_RANKS)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n" if prints else None)


def number(kind, accepts, rule):
    """Make an argparse type: kind(text), if `accepts` is true of it; rule: what must be true, in words."""

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
# The models were trained with 1000 steps. A router decides only the second step of each pair, so it needs two.
sampling_steps = number(int, lambda value: 1 <= value <= 1000, "a whole number from 1 to 1000")
router_steps = number(int, lambda value: 2 <= value <= 1000, "a whole number from 2 to 1000")
fraction = number(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")
share = number(float, lambda value: 0 < value <= 0.5, "a number in (0, 0.5]")
above_0 = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
finite = number(float, math.isfinite, "a finite number")
non_negative = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32-1")


def all_or_positive(text):
    """An argparse type: the word "all", or a whole number of at least 1."""
    return text if text == "all" else positive(text)


def json_file(text):
    """An argparse type: a path that ends in .json."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .json")
    return text


def add_device_argument(parser):
    """Add --device, which `devices.pick_device` reads."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is CUDA if there is a GPU")


def add_record_argument(parser, only="", also=()):
    """Add --record for measured figures; only: text about when the flag applies; also: more names of the flag."""
    parser.add_argument("--record", *also, metavar="JSON", type=json_file, help=f"{only}file for the measured figures")


def add_model_arguments(parser, vae):
    """Add the flags that choose a model, and return their group; vae: the default of --vae."""
    group = parser.add_argument_group("model")
    only = "; not used with a model folder"
    group.add_argument(
        "--model", default="DiT-XL/2", help=f"size and patch, as DiT-XL/2; flow models are SiT-XL/2 etc.{only}"
    )
    group.add_argument("--vae", choices=["ema", "mse"], default=vae, help="released VAE, for a folder without its own")
    group.add_argument("--image-size", type=int, choices=[256, 512], default=256, help=f"pixels per side{only}")
    group.add_argument("--num-classes", metavar="N", type=positive, default=1000, help=f"classes of the model{only}")
    group.add_argument(
        "--ckpt",
        metavar="PATH",
        help=".pt or .safetensors of weights, a model folder, or a folder or Hub name of a DiT of diffusers; "
        "without it the released weights are fetched",
    )
    return group


def add_sampling_arguments(parser, cfg_scale):
    """Add the flags of sampling, and return their group; cfg_scale: the published guidance of the program."""
    group = parser.add_argument_group("sampling")
    sampler = group.add_mutually_exclusive_group()
    names = "for a DiT ddim (eta 0) or ddpm (ancestral), for a flow model euler, heun or sde; default: ddim or euler"
    sampler.add_argument("--sampler", choices=["ddim", "ddpm", "euler", "heun", "sde"], help=names)
    for flag, name in ("--ddim-sample", "ddim"), ("--p-sample", "ddpm"):
        sampler.add_argument(
            flag, dest="sampler", action="store_const", const=name, help=f"the same as --sampler {name}"
        )
    group.add_argument(
        "--num-sampling-steps",
        metavar="N",
        type=sampling_steps,
        default=250,
        help="denoising steps, at most 1000; heun makes N/2 steps of two calls of the model",
    )
    add_guidance_arguments(group, cfg_scale)
    group.add_argument(
        "--noise-scale",
        metavar=("FACTOR", "HIGH"),
        type=above_0,
        nargs="+",
        help="multiply the noise that a DiT predicts by FACTOR, at times up to HIGH (default 1: all); a little below 1 "
        "leaves finer detail, for example 0.97 0.5",
    )
    add_method_arguments(group)
    return group


def add_guidance_arguments(group, cfg_scale):
    """Add the flags of guidance. cfg_scale: the published one of the program."""
    recommended = "or what a model folder recommends"
    scale = f"guidance, 1 is none; default: {cfg_scale}, {recommended}"
    group.add_argument("--cfg-scale", metavar="SCALE", type=finite, help=scale)
    channels = f"channels that are guided, a number or all; default: the first 3, {recommended}"
    group.add_argument("--cfg-channels", metavar="N", type=all_or_positive, help=channels)
    interval = f"guide only at times from LOW to HIGH, 0 is data and 1 noise; default: 0 1, {recommended}"
    group.add_argument("--cfg-interval", metavar=("LOW", "HIGH"), type=fraction, nargs=2, help=interval)


# The setting that each --accelerate-method needs: its flag, and a noun for messages.
METHODS = {
    "dynamiclayer": ("path", "file"),
    "schedule": ("path", "file"),
    "fora": ("interval", "interval"),
    "smoothcache": ("alpha", "largest change"),
    "random": ("cached", "share"),
    "first": ("cached", "share"),
    "last": ("cached", "share"),
}


def add_method_arguments(group):
    """Add --accelerate-method and its settings, for `check_sampling_arguments` and `schedule_of_flags` (training)."""
    group.add_argument(
        "--accelerate-method",
        choices=METHODS,
        help="which layers reuse their output: dynamiclayer: those that the router in --path skips; schedule: those "
        "that the file in --path names; fora: all, between every --interval-th step; smoothcache: those that change "
        "by less than --alpha; random, first, last: random layers, or the first or last blocks, see --cached",
    )
    group.add_argument("--path", metavar="FILE", help="router or schedule file; a missing released file is fetched")
    add_threshold_argument(group)
    group.add_argument("--interval", metavar="N", type=positive, help="of fora: run every N-th step; published: 3")
    group.add_argument(
        "--alpha",
        metavar="CHANGE",
        type=above_0,
        help="of smoothcache: reuse attention, or MLP, for up to 3 steps while its output has changed by less than "
        "this share, measured on 8 samples first; published for DiT-XL/2 and 50 steps: 0.08, 0.18, 0.22",
    )
    group.add_argument(
        "--cached",
        metavar="SHARE",
        type=share,
        help="of random, first and last: share of all layer calls that are reused, at every second step, at most 0.5",
    )
    group.add_argument(
        "--forecast",
        type=int,
        choices=[0, 1, 2],
        help="reuse the last output (0), or a linear (1) or quadratic (2) forecast from the last two or three; "
        "default: what a schedule file says, else 0",
    )


def add_threshold_argument(parser):
    """Add --thres, the score above which a router runs a layer."""
    help_text = "skip layers whose router score is at most this, 0 to 1"
    parser.add_argument("--thres", metavar="SCORE", type=fraction, default=0.1, help=help_text)


def add_precision_arguments(parser, choices, default=None):
    """Add the flags about precision, compilation and device of a DiT, and return their group."""
    group = parser.add_argument_group("device and speed")
    group.add_argument(
        "--dtype",
        choices=choices,
        default=default,
        help="precision of the transformer; the diffusion state is float32, and so is the VAE, except with fp16 or "
        "--experimental vae-fp16 on a GPU; tf32 is fp32 on a CPU"
        + ("" if default else "; without it tf32 on a GPU, fp32 on a CPU"),
    )
    group.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    add_device_argument(group)
    return group


# What --experimental switches on: docs/performance.md says what each does, and what it is expected to bring.
EXPERIMENTAL = ("gelu", "autotune", "fp8", "vae-fp16")


def add_speed_arguments(parser):
    """Add the flags that change how fast sampling is, and the last digits of its results; return their group."""
    group = add_precision_arguments(parser, ["fp32", "tf32", "bf16", "fp16"])
    graphs = "capture the trajectory of a batch once and replay it; needs a GPU"
    group.add_argument("--cuda-graphs", action="store_true", help=graphs)
    group.add_argument(
        "--experimental",
        metavar="NAME",
        nargs="+",
        choices=EXPERIMENTAL,
        help=f"{', '.join(EXPERIMENTAL)}: may be faster on a GPU, but no GPU has measured them (docs/performance.md)",
    )
    return group


def check_speed_arguments(parser, args):
    """Make --experimental a sorted list; refuse a switch without what it needs, and two that exclude each other."""
    names = args.experimental = sorted(set(args.experimental or ()))
    bf16, timed = args.dtype == "bf16", "picks kernels by their times, which are never the same"
    for name, fits, rule in (
        ("autotune", args.compile, "chooses among compiled kernels: add --compile"),
        ("autotune", not getattr(args, "deterministic", False), f"{timed}: leave it or --deterministic out"),
        ("fp8", bf16, "rounds the inputs of products in bf16: add --dtype bf16"),
        ("fp8", "gelu" not in names, "replaces the product that gelu changes: leave one of them out"),
        ("vae-fp16", bf16, "is for a transformer in bf16: add --dtype bf16"),
        ("vae-fp16", not getattr(args, "random_weights", False), "needs a VAE: leave it or --random-weights out"),
    ):
        if name in names and not fits:
            parser.error(f"--experimental {name} {rule}")


def check_guidance_arguments(parser, args):
    """Refuse an interval that is empty, and settings of guidance that is none."""
    for flag, given in ("--cfg-channels", args.cfg_channels), ("--cfg-interval", args.cfg_interval):
        if args.cfg_scale == 1 and given:
            parser.error(f"{flag} is about guidance, and --cfg-scale 1 is none: leave one of them out")
    if args.cfg_interval and not args.cfg_interval[0] < args.cfg_interval[1]:
        low, high = args.cfg_interval
        parser.error(f"--cfg-interval {low:g} {high:g} is empty: pass the lower time first")


def noise_scale_pair(given):
    """The pair (factor, highest time) of a list of one or two numbers.

    Raises ValueError if there are more, and for factors that must be typing errors.
    """
    factor, highest = [*given, 1.0, 1.0][:2]
    if not (1 <= len(given) <= 2 and 0.5 <= factor <= 2 and 0 < highest <= 1):
        text = " ".join(f"{number:g}" for number in given)
        raise ValueError(f"{text}: pass a factor from 0.5 to 2, and at most one time above 0, up to 1")
    return factor, highest


def check_noise_scale(parser, args):
    """Make --noise-scale a pair as `noise_scale_pair`."""
    try:
        args.noise_scale = noise_scale_pair(args.noise_scale or [1.0])
    except ValueError as error:
        parser.error(f"--noise-scale {error}")


def check_method_arguments(parser, args, alone=None):
    """Refuse a method without its setting, and a setting of another method or of none.

    alone: a setting that needs no method.
    """
    method = args.accelerate_method
    needed, noun = METHODS.get(method, (alone, ""))
    for flag in dict.fromkeys(flag for flag, _ in METHODS.values()):
        given, users = getattr(args, flag), " or ".join(name for name in METHODS if METHODS[name][0] == flag)
        if method and flag == needed and not given:
            parser.error(f"--accelerate-method {method} needs its {noun}: add --{flag}")
        if given and flag != needed:
            if not method:
                parser.error(f"--{flag} needs its method: add --accelerate-method {users}")
            parser.error(f"--{flag} is no setting of {method}: leave it out, or pass --accelerate-method {users}")
    has_scores = method == "dynamiclayer" or alone and not method
    if args.thres != parser.get_default("thres") and not has_scores:
        parser.error("--thres is about the scores of a router: leave it out, or pass --accelerate-method dynamiclayer")


def check_sampling_arguments(parser, args):
    """Refuse flags that do nothing or contradict each other, and a method with too few steps for it."""
    check_guidance_arguments(parser, args)
    check_noise_scale(parser, args)
    check_method_arguments(parser, args)
    method, steps = args.accelerate_method, args.num_sampling_steps
    if args.forecast is not None and not method:
        parser.error("--forecast needs a method that reuses outputs: add --accelerate-method")
    if args.interval and args.interval > steps:
        parser.error(f"--interval {args.interval} is more than the {steps} steps: pass at most {steps}")
    if args.cached and args.cached > (half := steps // 2) / steps:
        largest = math.floor(1000 * half / steps) / 1000
        parser.error(f"--cached {args.cached} is too much: {half} of {steps} steps can reuse, so at most {largest:g}")


@contextlib.contextmanager
def one_line_warnings():
    """In this block a warning is one line on standard error; yields the list of the warnings so far."""
    program, texts = os.path.basename(sys.argv[0]), []

    def show(warning, *_):
        texts.append(str(warning))
        print(f"{program}: warning: {warning}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield texts


def _rank():
    return number_or("RANK", 0)


def _outlives_main(wait, between_ranks):
    """Wait until torchrun ends this rank; return True if it does not, False at once without torchrun.

    All ranks refuse the same input and rank 0 prints it. When a rank exits, torchrun ends the others, and that must not
    hit rank 0 before it has printed. If rank 0 did not refuse it, the lowest rank that did returns first and can print.
    wait, between_ranks: seconds.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(wait + between_ranks * number_or("LOCAL_RANK", 0))
    return True


def run(main, args, memory_hint=None):
    """Call main(args); exit with 1 and one line after a fault that is no bug (see `explain`), with 130 after Ctrl-C.

    A bug keeps its traceback. A KeyboardInterrupt may carry a text, which is printed too.
    memory_hint: what to pass if memory runs out.
    """
    # OpenMP threads spin at each barrier, even while the thread that they wait for has no core to run on. Sampling that
    # takes 0.5 s on two idle cores took 2.2 s beside two busy loops; with few spins it takes 0.5 s and 1.15 s.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # the shell closed it
            setattr(sys, stream, open(os.devnull, "w"))
    # Print what the terminal cannot show as escapes: file names that are not UTF-8, and most texts in an ASCII locale.
    sys.stdout.reconfigure(errors="backslashreplace")
    with second_signal_ends():
        _run(main, args, memory_hint)


def _run(main, args, memory_hint):
    program = os.path.basename(sys.argv[0])
    try:
        main(args)
        sys.stdout.flush()  # a full disk behind it is reported here
    except Exception as error:
        text = explain(error, memory_hint)
        if text is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # Python would report it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if _rank() != 0:
            if isinstance(error, UserError) and error.printed_by_main:
                _outlives_main(WAIT_FOR_MAIN, BETWEEN_RANKS)
                sys.exit(1)
            if not isinstance(error, LostPeer):
                _outlives_main(WAIT_FOR_SAME, BETWEEN_SAME)
        sys.exit(f"{program}: error: {text}")
    except KeyboardInterrupt as interrupt:
        if _rank() == 0:
            print(f"\n{program}: interrupted{''.join(f': {text}' for text in interrupt.args)}", file=sys.stderr)
        sys.exit(130)
