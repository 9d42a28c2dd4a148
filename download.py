"""Every file that comes from outside: where it is, how large, which SHA-256, under which licence.

    python download.py                          fetches all that is not there yet (5.5 GB and two of unknown size)
    python download.py DiT-XL-2-256x256.pt sd-vae-ft-ema
    python download.py --list                   what is there
    python download.py --check                  hashes all that is there

A file gets its name once its size and SHA-256 are right. A download that was stopped goes on from where it was; what
came and is another file is kept beside, as `<file>.rejected` (fetching.py has the rules).
The VAEs lie in the cache of the Hugging Face Hub, whose client fetches them: checked before use, and refused if wrong.
A file that is there and is wrong is refused and left alone: it is the user's.

A file that is there is hashed before its first use, and again once its size or time is another: a change that keeps
both is seen by --check only. Where no SHA-256 is published, that of the first use is kept in `<file>.sha256` and
compared from then on.
"""

from runtime import cli, fetching, released
from runtime.errors import UserError
from runtime.fetching import amount
from runtime.released import FILES, MIRROR, MIRROR_RULE, names


def parse_args(argv=None):
    parser = cli.ArgumentParser(
        description=__doc__,
        positional="[NAME ...]",
        epilog=f"""NAME is one of: {", ".join(names())}.

Environment, for all programs:
  L2C_MIRROR        what --mirror is here
  HF_HOME           the folder with the cache of the Hugging Face Hub, where the VAEs lie
  HF_ENDPOINT       the Hub's mirror
  HF_HUB_OFFLINE=1  nobody is asked: a file that is not there is an error""",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default="all", help="files to fetch, list or check")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show each file, and whether it is there; fetch nothing")
    action.add_argument("--check", action="store_true", help="hash the files that are there; fetch nothing")
    parser.add_argument("--mirror", metavar="URL", help="fetch each file from URL/NAME; not the VAEs")
    args = parser.parse_args(argv)
    if args.mirror is not None and not MIRROR.fullmatch(args.mirror):
        parser.error(f"--mirror is {args.mirror}: {MIRROR_RULE}")
    args.names = names() if args.names == "all" else list(dict.fromkeys(args.names))
    unknown = [name for name in args.names if name not in names()]
    if unknown:
        parser.error(f"unknown NAME {', '.join(unknown)}: choose from {', '.join(names())}")
    return args


def main(args):
    chosen = [file for file in FILES if file.name in args.names]
    if args.list:
        print_list(chosen)
    elif args.check:
        check_all(chosen)
    else:
        absent = [file for file in chosen if not released.is_there(file)]
        known = sum(map(released.to_come, absent))
        unknown = sum(file.size is None for file in absent)
        text = f"to fetch: {len(absent)} of {len(chosen)} files, {amount(known)}"
        if unknown:
            text += f" and {unknown} of unknown size (see --list)"
        for folder, free in fetching.room({file.path: released.to_come(file) for file in absent}).items():
            text += f"; {amount(free)} free in {folder}"
        print(text, flush=True)
        for name in args.names:
            print(f"{name}: {released.shown(released.fetch(name, args.mirror))}", flush=True)


def print_list(chosen):
    """Prints a table of the files; looks at their sizes only."""
    rows = [("name", "size", "there", "licence", "destination")]
    for file in chosen:
        there = "no"
        if released.is_there(file):
            right = file.path.is_file() and file.size in (None, file.path.stat().st_size)
            there = "yes" if right else "wrong"
        rows.append((file.name, amount(file.size), there, file.licence, str(released.shown(file.path))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_all(chosen):
    """Hashes the files that are there, one line each. Raises UserError where any is wrong, after all were seen."""
    faults = []
    for file in chosen:
        shown = released.shown(file.path)
        if not released.is_there(file):
            print(f"{shown}: not there")
            continue
        try:
            compared = released.expected_sha256(file)
            actual = released.check(file, hashed=True)
        except UserError as error:
            faults.append(str(error))
            print(f"{shown}: wrong", flush=True)
        else:
            verdict = "right" if compared else "no SHA-256 known to compare with until now"
            print(f"{shown}: {verdict}, SHA-256 {actual}", flush=True)
    if faults:
        raise UserError("; ".join(faults))


if __name__ == "__main__":
    cli.run(main, parse_args())
