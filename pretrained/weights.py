"""Weights of others: state dicts from DiT's descendants, Lightning and diffusers, shards, and folders from the Hub."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrained.diffusers_layout import WEIGHTS, from_diffusers
from pretrained.sit import check_process
from runtime import fetching, released
from runtime.errors import UserError
from runtime.files import load_tensors, mismatch, named_tensors

HUB_NAME = re.compile(
    r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)(?<!\.pth)(?<!\.ckpt)(?<!\.bin)(?<!\.th)(?<!\.json)(?<!\.safetensors)"
)
# Weights of diffusers: BASE.safetensors, or an index of shards; a variant has one more word (BASE.fp16.safetensors).
BASE, KINDS = "diffusion_pytorch_model", [name.rpartition(".")[2] for name in WEIGHTS]
# The same as patterns for the Hub, in the order of preference. Variants are fetched only if there is nothing else.
PATTERNS = [[f"{BASE}.{kind}", f"{BASE}.{kind}.index.json", f"{BASE}-?????-of-?????.{kind}"] for kind in KINDS]
PATTERNS += [[f"{BASE}*.{kind}*"] for kind in KINDS]
# The outermost tensors of a DiT, in our layout and in diffusers': what comes before them is the prefix of a model.
OUTERMOST = re.compile(r"((?:.*\.)?)(?:[xy]_embedder|transformer_blocks\.\d+\.norm1\.emb)\.")
# Modules that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put around others.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_state_dict_of(name: str | Path) -> dict[str, Tensor]:
    """The state dict of a DiT, on the CPU: the first part of `load_checkpoint`."""
    return load_checkpoint(name)[0]


def load_checkpoint(name: str | Path, flow: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a DiT, on the CPU, and the arguments of its training that were saved beside it, or {}.

    name: a released checkpoint (`DiT-XL-2-256x256.pt`, fetched if needed), a file of `torch.save` or safetensors, or
    the index of shards. The DiT may be anywhere in nested dicts and below any prefix, beside other models: averaged
    weights ("ema") are preferred, then "model". Wrappers' names are removed, and diffusers' layout becomes ours.
    flow: whether it is wanted as a flow model (SiT), which only looks like a DiT.
    Raises UserError if the file is missing, holds no DiT or several, or a model of the other process. Code in a file is
    never run.
    """
    path = released.find(name)
    loaded = load_shards(path) if path.suffix == ".json" else load_tensors(path, allow=[argparse.Namespace])
    state, arguments = _find_dit(path, loaded), _arguments(loaded)
    check_process(path, state, arguments, flow)
    if any(key.startswith("transformer_blocks.") for key in state):
        try:
            state = from_diffusers(state)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not hold diffusers' DiT: {error}") from error
    return state, arguments


def _find_dit(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The tensors of the DiT in `loaded`, without its prefix. Raises UserError if there is none or it is ambiguous."""
    tensors = named_tensors(loaded)
    found: dict[tuple, list[str]] = {}
    for prefix in dict.fromkeys(match[1] for name in tensors if (match := OUTERMOST.match(name))):
        plain = _unwrapped(prefix)
        # Counted, because "ema.ema_model" may be beside "ema.online_model".
        averages = len(re.findall(r"(?<![a-z])ema(?![a-z])", plain.lower()))
        found.setdefault((plain == "ema.", averages, plain == "model."), []).append(prefix)
    if not found:
        some = f" (it has {next(iter(tensors))} and {len(tensors) - 1} other tensors)" if tensors else ""
        raise UserError(
            f"{path} does not fit a DiT, it holds no state dict of one{some}: "
            "save the model's state_dict(), alone or as 'ema' or 'model'"
        )
    prefixes = found[max(found)]
    parts = [[name for name in tensors if name.startswith(prefix)] for prefix in prefixes]
    if len({tuple(tensors[name].data_ptr() for name in names) for names in parts}) > 1:
        raise UserError(
            f"{path} holds several DiTs, {' and '.join(prefix or 'one without prefix' for prefix in prefixes)}: "
            "save the state_dict() of one of them alone"
        )
    return {_unwrapped(name.removeprefix(prefixes[0])): tensors[name] for name in parts[0]}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _arguments(loaded: Any) -> dict[str, Any]:
    """The arguments of a training that its checkpoint holds, by name; {} if there are none."""
    for key in ("args", "hyper_parameters", "config", "cfg"):
        value = loaded.get(key) if isinstance(loaded, dict) else None
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, dict):
            return value
    return {}


def load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index of diffusers lists. Raises UserError if they differ from its list."""
    files: Any = read_json(index).get("weight_map")
    plain = isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())
    if not plain or any(Path(file).name != file or "\\" in file for file in files.values()):
        raise UserError(f"{index} is no index of shards: its weight_map must name files beside it; fetch it again")
    shards = sorted(set(files.values()))
    if missing := [file for file in shards if not (index.parent / file).is_file()]:
        raise UserError(f"{index} lists {missing[0]}, and there is no such file beside it: fetch it too")
    state: dict[str, Tensor] = {}
    for file in shards:
        shard = index.parent / file
        tensors = named_tensors(load_tensors(shard))
        listed = dict.fromkeys(name for name in files if files[name] == file)
        if differs := mismatch(dict.fromkeys(tensors), listed):
            raise UserError(f"{shard} is not the shard that {index.name} lists: {differs}; fetch both again")
        state |= tensors
    return state


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file. Raises UserError if it cannot be read or holds no dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # whatever the locale
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): take it from its source again") from error


def saved_weights(folder: Path) -> dict[str, Path]:
    """The weights that diffusers saved in a folder, {variant or "": file or index of shards}; safetensors first."""
    found: dict[str, Path] = {}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{BASE}.*")):
            words = path.name.split(".")[1:]
            variant = ".".join(word for word in words if word not in (kind, "index", "json"))
            weights = kind in words and words[-1] == ("json" if "index" in words else kind) and path.is_file()
            if weights and not re.search(r"-\d+-of-\d+", path.name):  # else a shard
                found.setdefault(variant, path)
    return found


def weights_file(folder: Path) -> Path:
    """The weights that diffusers saved in a folder: a file or the index of shards, a variant if it is the only one.

    Raises UserError if there are none, or several variants.
    """
    found = saved_weights(folder)
    if "" not in found and len(found) > 1:
        raise UserError(
            f"{folder} has the variants {' and '.join(found)} and no plain weights: copy one variant and the "
            "configuration into a folder of their own"
        )
    if not found:
        raise UserError(f"{folder} has no {BASE}.safetensors or .bin, whole or in shards: save it with save_pretrained")
    return found.get("") or next(iter(found.values()))


def find_model_folder(name: str | Path) -> Path:
    """The path `name`, or a local copy of the model of diffusers with this name on the Hugging Face Hub.

    name: any existing path, or a Hub name (`facebook/DiT-XL-2-256`); anything else comes back as a Path.
    A Hub model is fetched into the Hub's cache, so HF_HOME and HF_HUB_OFFLINE work. Pickles are fetched only if there
    are no safetensors, variants only if there are no plain weights. Raises UserError if it cannot be fetched.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    parts = missing = ["", "transformer/", "vae/"]
    wanted = ["model_index.json", "scheduler/*.json"] + [part + "config.json" for part in parts]
    folder = Path(name)
    try:
        for patterns in PATTERNS:
            wanted += [part + pattern for part in missing for pattern in patterns]
            folder = Path(fetching.call_hub(snapshot_download, str(name), allow_patterns=wanted))
            configured = [part for part in parts if (folder / part / "config.json").is_file()]
            missing = [part for part in configured if not saved_weights(folder / part)]
            if not missing:
                break
        return folder
    except fetching.DownloadError as error:
        raise UserError(
            f"there is no folder {name}, and it cannot be fetched from the Hugging Face Hub ({error}): "
            "download it elsewhere and pass its folder"
        ) from error
