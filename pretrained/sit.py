"""SiT and REPA: flow models with a DiT's tensors, whose state dicts become those of `FlowMatching` here.

A file of SiT (Ma et al. 2024, arXiv:2401.08740) has t = 0 at the noise, a velocity that points to the data, and twice
the channels, of which half are not used. A file of REPA (Yu et al. 2024, arXiv:2410.06940) has t and velocity as here,
and heads that only its training needs.
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError

PATCHES, HEAD, TIME = "x_embedder.proj.weight", "final_layer.linear", "t_embedder.mlp.0.weight"
PROJECTORS, DECODER = "projectors.", re.compile(r"^decoder_blocks\.(\d+)\.")  # of REPA
# SiT and REPA have a DiT's tensors, but their output is another: arguments of their trainings, and names of files.
SIT_ARGUMENTS, REPA_ARGUMENTS = {"train_eps", "sample_eps", "transport"}, {"enc_type", "encoder_depth"}
FLOW_ARGUMENTS = {"path_type"} | SIT_ARGUMENTS | REPA_ARGUMENTS
FLOW_NAME = re.compile(r"(?<![^\W_])(?:SiT|REPA)(?![^\W_])|(?i:(?<![a-z])sit[-_](?:xl|[slb])(?![a-z]))")
DIT_NAME = re.compile(r"(?<![^\W_])DiT-(?:XL|[SLB])-[248]")


def check_process(path: Path, state: Mapping[str, Tensor], arguments: Mapping[str, Any], flow: bool) -> None:
    """Raise UserError if arguments or tensors are of a model of the other process; warn if only the file's name is.

    flow: whether the file is to be used as a flow model, or else as a DiT.
    """
    signs = sorted(FLOW_ARGUMENTS & {key for key in arguments if isinstance(key, str)})
    texts = {key: arguments[key] for key in ("model", "prediction") if isinstance(arguments.get(key), str)}
    if FLOW_NAME.match(texts.get("model", "")) or texts.get("prediction") in ("velocity", "v", "score"):
        signs += [f"{key} {text}" for key, text in texts.items()]
    if any(name.startswith(PROJECTORS) for name in state):
        signs.append("the projectors of REPA")
    names = str(path), path.resolve().name
    if flow:
        if str(texts.get("model")).startswith("DiT-") and not signs:
            raise UserError(f"{path} is a DiT by its arguments (model {texts['model']}): pass --model {texts['model']}")
        if told := next(filter(None, map(DIT_NAME.search, names)), None):
            print(f"warning: {path} is named {told[0]}: used as a flow model, a DiT makes garbage", file=sys.stderr)
        return _check_path(path, arguments)
    about = "flow matching, with the names and shapes of a DiT; as a DiT it makes garbage: pass --model SiT-XL/2, or "
    about += 'the name of its size, or a model folder whose config.json has "process": "flow"'
    if signs:
        raise UserError(f"{path} is a SiT by its arguments or tensors ({', '.join(signs)}), trained by {about}")
    if told := next(filter(None, map(FLOW_NAME.search, names)), None):
        print(f"warning: {path} is named {told[0]}: a SiT was trained by {about}", file=sys.stderr)


def _check_path(path: Path, arguments: Mapping[str, Any]) -> None:
    """Raise UserError if a training had another path than the linear one, or predicted something else."""
    for key, allowed in {"path_type": ("Linear", "linear"), "prediction": ("velocity", "v")}.items():
        if arguments.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path} was trained with {key} {arguments[key]}: only {allowed[0]} is implemented for flow models"
            )


def to_flow(state: Mapping[str, Tensor], arguments: Mapping[str, Any], time_scale: float = 1.0) -> dict[str, Tensor]:
    """The state dict of SiT or REPA as `FlowMatching` needs it; state: float32 tensors by name, of any model.

    REPA's projectors are dropped, and blocks that its early files count anew after those of the encoder are renamed.
    SiT's output is halved and negated, and its time turned, up to rounding. A file is SiT's if its training's arguments
    say so, or else if it has twice the channels.
    """
    repa = REPA_ARGUMENTS & arguments.keys() or any(name.startswith(PROJECTORS) for name in state)
    encoder = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    state = {
        DECODER.sub(lambda match: f"blocks.{encoder + int(match[1])}.", name): tensor
        for name, tensor in state.items()
        if not name.startswith(PROJECTORS)
    }
    if not {PATCHES, TIME, f"{HEAD}.weight", f"{HEAD}.bias"} <= state.keys() or state[PATCHES].dim() != 4:
        return state  # no DiT: the loader says what is missing
    rows, cells = len(state[f"{HEAD}.bias"]), state[PATCHES][0].numel()
    if rows == len(state[f"{HEAD}.weight"]) == 2 * cells:
        state = first_channels(state, state[PATCHES].shape[1])
    elif not SIT_ARGUMENTS & arguments.keys():
        return state
    return state if repa else _turned(state, time_scale)


def first_channels(state: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The state dict of a DiT without the output channels from `channels` on, which predict its variance.

    The output layer has a row for each cell of a patch and each channel.
    """
    state, patch = dict(state), state[PATCHES].shape[-1]
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        rows = state[name].unflatten(0, (patch * patch, -1))
        state[name] = rows[:, :channels].flatten(0, 1).contiguous()
    return state


def _turned(state: dict[str, Tensor], end: float) -> dict[str, Tensor]:
    """The state dict of the model whose output at time t is minus that of this one at `end` - t.

    The features of a time are its cosines and sines, and cos(f (T - t)) = cos fT cos ft + sin fT sin ft and
    sin(f (T - t)) = sin fT cos ft - cos fT sin ft: the first layer takes both.
    """
    weight = state[TIME].double()
    half = weight.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    cosines, sines = weight.split(half, dim=1)
    cos, sin = (end * frequencies).cos(), (end * frequencies).sin()
    turned = torch.cat([cosines * cos + sines * sin, cosines * sin - sines * cos], dim=1).float()
    return state | {TIME: turned} | {name: -state[name] for name in (f"{HEAD}.weight", f"{HEAD}.bias")}
