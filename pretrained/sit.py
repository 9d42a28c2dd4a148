"""SiT and REPA: flow models with a DiT's tensors, whose state dicts become those of `FlowMatching` here."""

from collections.abc import Mapping

from torch import Tensor


def first_channels(state: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The state dict of a DiT without the output channels from `channels` on, which predict its variance.

    The output layer has a row for each cell of a patch and each channel.
    """
    state, patch = dict(state), state["x_embedder.proj.weight"].shape[-1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (patch * patch, -1))
        state[name] = rows[:, :channels].flatten(0, 1).contiguous()
    return state
