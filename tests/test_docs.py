"""The documents: commands parse and run, links and named files exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

LIST = ["git", "ls-files", "-co", "--exclude-standard"]
FILES = [
    name
    for name in subprocess.run(LIST, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if (ROOT / name).exists()
]
DOCUMENTS = [name for name in FILES if name.endswith(".md")]


def blocks(document, language=""):
    """The fenced blocks of a language in a document."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    return [text for kind, text in found if kind == language]


def commands(document):
    """The command lines in the blocks of a document, continued lines joined."""
    lines = "\n".join(blocks(document)).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|make) ", line)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document):
    for command in commands(document):
        words = [word for word in shlex.split(command, comments=True) if not re.match("[A-Z_]+=", word)]
        if words[0] == "make":
            assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in words[1:]), command
            continue
        at = next((k for k, word in enumerate(words) if word.endswith(".py")), 2 if words[1] == "-m" else None)
        if at is None:  # python -c
            continue
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words[1:at] + ["program.py"])
        module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
        module.parse_args(words[at + 1 :])


# Make a command small enough for a test.
SMALLER = (
    # a search for three plans of 50 steps takes minutes
    ("--num-sampling-steps 50 --target-speedup 2 3 4", "--num-sampling-steps 4 --target-speedup 1.5"),
    (r"--num-fid-samples \d+", "--num-fid-samples 12"),
    (r"-n-500\.npz", "-n-12.npz"),
    (r"--max-steps \d+", "--max-steps 2"),
    (r"checkpoints/\d+\.pt", "checkpoints/0000002.pt"),
    (r"--compare", "--compare --repeats 1"),
)


@pytest.mark.parametrize(
    "document",
    ["README.md", *(pytest.param(f"docs/{name}.md", marks=pytest.mark.slow) for name in ("guide", "tutorial"))],
)
def test_the_commands_on_the_small_model_run_as_typed(document, tmp_path):
    """In a folder like a clone, whose files are links, with images to train on."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    for k in range(80):
        path = tmp_path / "demo" / "data" / "train" / f"class{k % 10}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | own | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    for code in blocks(document, "python"):
        if "DiTPipeline" not in code:  # it needs weights of 2.7 GB
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    small = [line for line in commands(document) if re.search(r"ckpt/fashion_mnist|--preset fashion", line)]
    assert small
    for command in small:
        for pattern, text in SMALLER:
            command = re.sub(pattern, text, command)
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def anchors(document):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / document).read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Files that a program writes or a user brings.
MADE = (
    r"last\.pt|metrics\.jsonl|config\.json|dit\.safetensors|router\.(png|gif)|fora2\.pt|.*[A-Z]{3,}.*|classify_image.*"
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document):
    text, folder = (ROOT / document).read_text(), Path(document).parent
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        place = os.path.normpath(folder / path) if path else document
        assert place in FILES or (ROOT / place).is_dir(), f"{document}: {target}"
        assert not anchor or anchor in anchors(place), f"{document}: {target}"
    names = {Path(name).name for name in FILES}
    for name in re.findall(r"`([\w./-]+\.(?:py|md|json|pt|png|gif|npz|pb|txt|toml|slurm))`", text):
        exists = {name, os.path.normpath(folder / name)} & {*FILES} or ("/" not in name and name in names)
        assert exists or re.fullmatch(MADE, Path(name).name), f"{document} names {name}"
