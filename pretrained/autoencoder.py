"""The VAE of latent diffusion, with the names and the numbers of diffusers' AutoencoderKL.

diffusers takes more than half of the time until the first picture to import, so this class stands in for the usual
kind of VAE: `fits` says for which configurations. Sources: Rombach et al. 2022, appendix E; Kingma and Welling 2014.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The settings of AutoencoderKL in a config.json, and what holds without them.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
SIZES = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")


def fits(config: Mapping[str, Any]) -> bool:
    """Whether `AutoencoderKL` can be built from a config.json: it has the usual blocks and no unknown setting."""
    if not {name for name in config if not name.startswith("_")} <= DEFAULTS.keys():
        return False
    config = DEFAULTS | dict(config)
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    kinds = (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"))
    return (
        all(type(config[name]) is int and config[name] > 0 for name in SIZES)
        and all(type(config[name]) is bool for name in SWITCHES)
        and type(config["sample_size"]) is int
        and isinstance(widths, list | tuple)
        and all(type(width) is int and width > 0 and width % groups == 0 for width in widths)
        and 0 < len(widths) <= 10
        and all(list(config[name]) == [kind] * len(widths) for name, kind in kinds)
        and config["act_fn"] in ("silu", "swish")
    )


class Config(dict[str, Any]):
    """The settings of a VAE, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ResidualBlock(nn.Module):
    """x (N, C, H, W) -> (N, C', H, W): two normalised convolutions beside x, or a 1x1 convolution of it."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (self.conv_shortcut(x) if self.conv_shortcut else x) + hidden


class SelfAttention(nn.Module):
    """x (N, C, H, W) plus the attention of its cells to each other, with a single head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in "qkv")
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        cells = self.group_norm(x.flatten(2)).transpose(1, 2)  # (N, HW, C)
        q, k, v = (linear(cells)[:, None] for linear in (self.to_q, self.to_k, self.to_v))
        cells = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return cells.transpose(1, 2).reshape(x.shape) + x


class Resample(nn.Module):
    """x (N, C, H, W) -> (N, C, 2H, 2W) if `up`, else (N, C, H/2, W/2)."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        if not self.up:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        if len(x) >= 64 or 2 * x.numel() > 2**31:  # too large for channels last
            x = x.contiguous()
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one size of image, and the step to the next size."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, up: bool, last: bool) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        resample = nn.ModuleList([] if last else [Resample(c_out, up)])
        if up:
            self.upsamplers = resample
        else:
            self.downsamplers = resample
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *(self.upsamplers if self.up else self.downsamplers)):
            x = layer(x)
        return x


class Middle(nn.Module):
    """The blocks at the smallest size of image."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Coder(nn.Module):
    """The encoder, or with `up` the decoder: x (N, c_in, H, W) -> (N, c_out, H', W')."""

    def __init__(self, c_in: int, c_out: int, config: Config, up: bool) -> None:
        super().__init__()
        widths, groups = list(config.block_out_channels), config.norm_num_groups
        layers, last = config.layers_per_block + up, len(widths) - 1
        smallest = widths[-1]
        if up:
            widths.reverse()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        pairs = zip([widths[0], *widths], widths)
        levels = nn.ModuleList(Level(a, b, layers, groups, up, i == last) for i, (a, b) in enumerate(pairs))
        if up:
            self.up_blocks = levels
        else:
            self.down_blocks = levels
        self.mid_block = Middle(smallest, groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (self.mid_block, *self.up_blocks) if self.up else (*self.down_blocks, self.mid_block):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] <-> latents (N, C, s, s), s = S / 2**(levels - 1).

    config: a config.json for which `fits` is true. `encode` and `decode` are called as those of diffusers.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config = Config(DEFAULTS | dict(config))
        c = config.latent_channels
        self.encoder = Coder(config.in_channels, 2 * c, config, up=False)
        self.decoder = Coder(c, config.out_channels, config, up=True)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.use_post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def encode(self, x: Tensor) -> SimpleNamespace:
        """`latent_dist.parameters` are the means and log variances (N, 2C, s, s) of the latents of x."""
        moments = self.encoder(x)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(parameters=self.quant_conv(moments) if self.quant_conv else moments)
        )

    def decode(self, z: Tensor) -> SimpleNamespace:
        """`sample` are the images of latents z."""
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(z) if self.post_quant_conv else z))
