"""The documents and docstrings: commands run or parse, links and files exist, public functions tell what they take."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

TRACKED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
DOCUMENTS = [name for name in TRACKED if name.endswith(".md")]
MODULES = [name for name in TRACKED if re.fullmatch(r"(diffusion/)?\w+\.py", name)]


def blocks(document, language=""):
    """The fenced blocks of a language in a document, each as text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    return [text for kind, text in found if kind == language]


def commands(document):
    """The command lines in the plain blocks of a document, continued lines joined."""
    lines = "\n".join(blocks(document)).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|make|sbatch|source|git|pip) ", line)]


def words_of(command):
    """A command line's words without assignments of variables, and the number of the program's name among them."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words.pop(0)
    return words, next((k for k, word in enumerate(words) if word.endswith(".py")), None)


def load(script):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "demo"), str(ROOT / "benchmarks"), *sys.path])
    for command in commands(document):
        words, program = words_of(command)
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets), command
        elif program is not None:
            if words[0] == "torchrun":
                from torch.distributed.run import get_args_parser

                get_args_parser().parse_args(words[1:program] + ["program.py"])
            module = load(words[program])
            if hasattr(module, "parse_args"):
                module.parse_args(words[program + 1 :])
            else:
                assert words[program + 1 :] == [], f"{command}: the program takes no arguments"


# What makes a command of the documents small enough for a test; what it does stays the same.
SMALLER = (
    (r"--num-fid-samples \d+", "--num-fid-samples 12"),
    (r"-n-500\.npz", "-n-12.npz"),
    (r"--max-steps \d+", "--max-steps 2"),
    (r"checkpoints/\d+\.pt", "checkpoints/0000002.pt"),
    (r"--compare", "--compare --repeats 1"),
)


@pytest.fixture
def clone(tmp_path):
    """A folder like a clone, whose files are links, with images to train on."""
    from PIL import Image

    for name in TRACKED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    for k in range(80):
        path = tmp_path / "demo" / "data" / "train" / f"class{k % 10}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md", "docs/tutorial.md"])
def test_the_commands_on_the_small_model_run_as_typed(document, clone):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    for code in blocks(document, "python"):
        if "DiTPipeline" not in code:  # which begins with weights of 2.7 GB
            subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True)
    ran = 0
    for command in commands(document):
        if re.search(r"ckpt/fashion_mnist|--preset fashion", command):
            for pattern, text in SMALLER:
                command = re.sub(pattern, text, command)
            result = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            ran += 1
    assert ran


def anchors(document):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / document).read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            place = os.path.normpath(Path(document).parent / path) if path else document
            assert place in TRACKED or (ROOT / place).is_dir(), f"{document}: {target}"
            assert not anchor or anchor in anchors(place), f"{document}: {target}"


# Files that a program writes, or that a user brings.
MADE = (
    r"last\.pt|metrics\.jsonl|config\.json|dit\.safetensors|router\.(png|gif)|fora2\.pt|.*[A-Z]{3,}.*|classify_image.*"
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    names = {Path(name).name for name in TRACKED}
    for name in re.findall(
        r"`([\w./-]+\.(?:py|md|json|pt|png|gif|npz|pb|txt|toml|slurm))`", (ROOT / document).read_text()
    ):
        near = {name, os.path.normpath(Path(document).parent / name)}
        known = near & set(TRACKED) or ("/" not in name and name in names)
        assert known or re.fullmatch(MADE, Path(name).name), f"{document} names {name}"


def test_every_file_has_its_line_in_the_map():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Map of the files") : readme.index("## Differences")]
    listed = set(re.findall(r"`([\w./-]+)`", table))
    tops = {name if "/" not in name else name.split("/")[0] + "/" for name in TRACKED}
    missing = {top for top in tops if top.endswith((".py", "/")) and not top.startswith(".")} - listed
    assert not missing


# Parameters that hold tensors or arrays wherever they appear.
ARRAYS = {"x", "y", "z", "t", "noise", "latents", "features", "scores", "modulations", "x_start"}
SHAPE = r"[(\[][\w.*/ +-]+(, [\w.*/ +-]+)+[)\]]|\(N,\)|\[steps\]|0-d"


def public_functions():
    """(module, function, docstrings of it and its class) of all that is public, but programs' main and parse_args."""
    for module in MODULES:
        tree = ast.parse((ROOT / module).read_text())
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            if owner is not tree and owner.name.startswith("_"):
                continue
            for node in owner.body:
                public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
                if public and node.name not in ("main", "parse_args", "forward", "backward", "error"):
                    beside = ast.get_docstring(owner) or "" if owner is not tree else ""
                    yield module, node, (ast.get_docstring(node) or ""), beside


def raised(function):
    """The errors for users that a function raises itself."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(call, ast.Name) and call.id in ("UserError", "ValueError"):
                yield call.id


def test_public_functions_and_classes_have_docstrings_with_shapes_and_errors():
    faults, seen = [], 0
    for module, node, text, beside in public_functions():
        where = f"{module}:{node.lineno} {node.name}"
        simple = (
            any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list) and len(node.body) == 1
        )
        seen += 1
        if not text and not simple:
            faults.append(f"{where} has no docstring")
        arrays = ARRAYS & {argument.arg for argument in node.args.args}
        if arrays and not re.search(SHAPE, text + beside):
            faults.append(f"{where} takes {', '.join(arrays)} and states no shape")
        for error in set(raised(node)):
            if "aises " not in text + beside:
                faults.append(f"{where} raises {error} and does not say so")
    for module in MODULES:
        if not ast.get_docstring(ast.parse((ROOT / module).read_text())):
            faults.append(f"{module} has no docstring")
    assert seen > 100 and not faults, "\n".join(faults)
