"""Weights of others: state dicts from DiT, fast-DiT, torch.compile and diffusers, and folders from the Hub."""

import argparse
import re
from pathlib import Path

from torch import Tensor

from pretrained.diffusers_layout import WEIGHTS, from_diffusers
from runtime import fetching, released
from runtime.errors import UserError
from runtime.files import load_tensors

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)(?<!\.pth)(?<!\.ckpt)(?<!\.bin)(?<!\.safetensors)")


def load_state_dict_of(name: str | Path) -> dict[str, Tensor]:
    """The state dict of a DiT, on the CPU.

    name: a released checkpoint (`DiT-XL-2-256x256.pt`, fetched if needed), or a .pt, .bin or .safetensors file.
    A training checkpoint (DiT, fast-DiT) gives its averaged weights `ema`, else `model`. The prefixes of
    DistributedDataParallel, accelerate and torch.compile are removed, and diffusers' layout becomes ours.
    Raises UserError if the file is missing or holds no state dict. Code in a file is never run.
    """
    path = released.find(name)
    # DiT's training script pickles its arguments beside the weights.
    state = load_tensors(path, allow=[argparse.Namespace])
    if isinstance(state, dict):
        state = next((state[key] for key in ("ema", "model") if isinstance(state.get(key), dict)), state)
    entries = state.items() if isinstance(state, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise UserError(f"{path} holds no state dict: save the model's state_dict(), alone or as 'ema' or 'model'")
    # Either prefix may be the outer one: a model is compiled before or after DistributedDataParallel wraps it.
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("transformer_blocks.") for key in state):
        try:
            return from_diffusers(state)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not hold diffusers' DiT: {error}") from error
    return state


def find_model_folder(name: str | Path) -> Path:
    """The path `name`, or a local copy of the model of diffusers with this name on the Hugging Face Hub.

    name: any existing path, or a Hub name (`facebook/DiT-XL-2-256`); anything else comes back as a Path.
    A Hub model is fetched into the Hub's cache, so HF_HOME and HF_HUB_OFFLINE work. Pickles are fetched only if there
    are no safetensors. Raises UserError if it cannot be fetched.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    safe, pickled = WEIGHTS
    parts = ("", "transformer/", "vae/")
    wanted = [part + file for part in parts for file in ("config.json", safe)]
    wanted += ["model_index.json", "scheduler/*.json"]
    try:
        folder = Path(fetching.call_hub(snapshot_download, str(name), allow_patterns=wanted))
        configured = [part for part in parts if (folder / part / "config.json").is_file()]
        missing = [part + pickled for part in configured if not (folder / part / safe).is_file()]
        if missing:
            folder = Path(fetching.call_hub(snapshot_download, str(name), allow_patterns=wanted + missing))
        return folder
    except fetching.DownloadError as error:
        raise UserError(
            f"there is no folder {name}, and it cannot be fetched from the Hugging Face Hub ({error}): "
            "download it elsewhere and pass its folder"
        ) from error
