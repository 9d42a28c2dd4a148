"""Download the released files: weights, routers, VAEs, and what the evaluator needs.

    python download.py                          download all that is missing (5.5 GB and two files of unknown size)
    python download.py DiT-XL-2-256x256.pt sd-vae-ft-ema
    python download.py --list                   show which files exist
    python download.py --check                  hash the files that exist

The other programs download what they need, too. A stopped download resumes (a VAE's starts again). A file gets its name
only when its size and SHA-256 are right; a wrong file that exists already is refused and left alone. If no SHA-256 is
published, that of the first use is kept in NAME.sha256 and required from then on. Only --check hashes files again that
have not changed.
"""

from runtime import cli, released
from runtime.errors import UserError
from runtime.fetching import amount
from runtime.released import MIRROR, MIRROR_RULE, names


def parse_args(argv=None):
    parser = cli.ArgumentParser(
        description=__doc__,
        positional="[NAME ...]",
        epilog=f"""NAME is one of: {", ".join(names())}.

Environment, for all programs:
  L2C_MIRROR        default of --mirror
  HF_HOME           folder with the cache of the Hugging Face Hub
  HF_ENDPOINT       mirror of the Hub
  HF_HUB_OFFLINE=1  no network: a missing file is an error""",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default="all", help="files to download, list or check")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show each file and whether it exists; no download")
    action.add_argument("--check", action="store_true", help="hash the files that exist; no download")
    mirror = cli.number(str, MIRROR.fullmatch, MIRROR_RULE)
    parser.add_argument("--mirror", metavar="URL", type=mirror, help="download URL/NAME instead; not for the VAEs")
    args = parser.parse_args(argv)
    args.names = names() if args.names == "all" else list(dict.fromkeys(args.names))
    if args.mirror and (args.list or args.check):
        parser.error("--mirror is for downloads: leave it out")
    unknown = [name for name in args.names if name not in names()]
    if unknown:
        parser.error(f"unknown NAME {', '.join(unknown)}: choose from {', '.join(names())}")
    return args


def main(args):
    files = [file for file in released.FILES if file.name in args.names]
    if args.list:
        print_list(files)
    elif args.check:
        check_all(files)
    else:
        print_each(
            {name: name for name in args.names}, lambda name: released.fetch(name, args.mirror), "not downloaded"
        )


def print_list(files):
    """Print a line for each file; looks only at its size."""
    for file in files:
        state = "missing"
        if file.exists():
            right = file.path.is_file() and file.size in (None, file.path.stat().st_size)
            state = "exists" if right else "wrong"
        print(f"{file.name:<32}{amount(file.size):>12}  {state:<8}  {file.licence:<12}  {file.path}")


def check_all(files):
    """Hash the files that exist, one line each; after all of them raise UserError if any is wrong."""

    def verdict(file):
        if not file.exists():
            return "missing"
        found = "right" if file.expected_sha256() else "no SHA-256 known to compare with until now"
        return f"{found}, SHA-256 {released.check(file, force=True)}"

    print_each({file.path: file for file in files}, verdict, "wrong")


def print_each(items, text_of, fault):
    """Print "NAME: text_of(item)" for each item of {NAME: item}, or `fault` instead if that raises UserError.

    After all of them raise one UserError with the texts of those that were raised.
    """
    faults = []
    for name, item in items.items():
        try:
            print(f"{name}: {text_of(item)}", flush=True)
        except UserError as error:
            faults.append(str(error))
            print(f"{name}: {fault}", flush=True)
    if faults:
        raise UserError("; ".join(faults))


if __name__ == "__main__":
    cli.run(main, parse_args())
