"""State dicts from files: released, of DiT, fast-DiT, torch.compile and diffusers."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from pretrained.diffusers_layout import WEIGHTS, from_diffusers
from runtime import released
from runtime.errors import UserError
from runtime.files import load_tensors

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)(?<!\.pth)(?<!\.ckpt)(?<!\.bin)(?<!\.safetensors)")


def load_state_dict_of(name: str | Path) -> dict[str, Tensor]:
    """The weights of a DiT as a state dict {str: tensor} on the CPU.

    name: a released checkpoint (`DiT-XL-2-256x256.pt`, fetched where needed), or a path to a .pt, .bin or .safetensors.
    Of a training checkpoint (DiT, fast-DiT), the averaged weights (`ema`), else `model`. What DistributedDataParallel,
    accelerate and torch.compile put before names is removed. Names of diffusers become ours, as in `from_diffusers`.
    Raises UserError where there is no such file or it holds no state dict; code in a file is never run.
    """
    path = released.find(name)
    # DiT's training script pickles its arguments beside the weights.
    state = load_tensors(path, allow=[argparse.Namespace])
    if isinstance(state, dict):
        state = next((state[key] for key in ("ema", "model") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no state dict: save the model's state_dict(), alone or as 'ema' or 'model'")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path} is no state dict, its entry {key!r} is no tensor: "
                "save the model's state_dict(), alone or as 'ema' or 'model'"
            )
    # Compiled in a DistributedDataParallel or the other way round: either prefix may be the outer one.
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("transformer_blocks.") for key in state):
        try:
            return from_diffusers(state)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path} holds another model than diffusers' DiT: {error}") from error
    return state


def find_model_folder(name: str | Path) -> Path:
    """The folder (Path) of a pipeline or model: one that is there, or one of diffusers on the Hugging Face Hub.

    name: a path, or where there is none a Hub name (`facebook/DiT-XL-2-256`); other names come back as they are.
    Fetched into the Hub's cache, so HF_HOME and HF_HUB_OFFLINE work; pickles only where there are no safetensors.
    Raises UserError where it cannot be fetched.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return Path(name)
    import huggingface_hub
    from huggingface_hub.utils import logging

    safe, pickled = WEIGHTS
    parts = ("", "transformer/", "vae/")
    wanted = [part + file for part in parts for file in ("config.json", safe)]
    wanted += ["model_index.json", "scheduler/*.json"]
    # The client tries again for half a minute and logs each time; we say it once, when it has given up.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=wanted))
        configured = [part for part in parts if (folder / part / "config.json").is_file()]
        missing = [part + pickled for part in configured if not (folder / part / safe).is_file()]
        if missing:
            folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=wanted + missing))
        return folder
    except Exception as error:  # the client lets through what its transports raise, and these share no class
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"there is no folder {name}, and it cannot be fetched from the Hugging Face Hub ({reason}): "
            "download it elsewhere and name its folder"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
