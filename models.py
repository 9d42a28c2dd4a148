"""DiT: a diffusion transformer whose layers can run, be reused, or be blended.

A *layer* is the attention or the MLP of a block. At each step the value `compute` decides what happens to it:

    True          run it and remember its output,
    False         use the remembered output,
    floats        use a forecast: the sum of the last remembered outputs, newest first, with these weights,
    0-d tensor    in [0, 1]: blend the remembered and the fresh output. This is router training.

`apply_layer` and `remember` alone decide this; `Blend` is the formula of the blend. A layer's output is remembered
before its gate is applied. This file knows neither diffusion nor the router.

Sources: Peebles and Xie 2023, arXiv:2212.09748 (the model); Ma et al. 2024, arXiv:2406.01733 (the rule).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Compute = bool | Tensor | Sequence[float]  # the decision for one layer, as above
Slot = deque[Tensor]  # the last computed outputs (N, T, D) of one layer, newest first: none, or as many as fit
Cache = list[list[Slot]]  # per block the slots of attention and MLP


class Blend(torch.autograd.Function):
    """cached + compute * (fresh - cached), in the dtype of both (N, T, D); compute: a float32 scalar tensor.

    Saves one tensor (N, T, D) for the backward pass, the difference; `torch.lerp` would save two.
    The gradient of `compute` is summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, cached: Tensor, fresh: Tensor, compute: Tensor) -> Tensor:
        ctx.save_for_backward(fresh - cached, compute)
        # lerp is exact at both ends: 0 gives `cached` and 1 gives `fresh`, bit for bit.
        return torch.lerp(cached, fresh, compute.to(fresh.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor]:  # type: ignore[override]
        difference, compute = ctx.saved_tensors
        grad_fresh = grad * compute.to(grad.dtype) if ctx.needs_input_grad[1] else None
        grad_compute = torch.dot(grad.flatten().to(compute.dtype), difference.flatten().to(compute.dtype))
        return None, grad_fresh, grad_compute


def apply_layer(
    x: Tensor, gate: Tensor, layer: Callable[[], Tensor], compute: Compute, outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Add the gated output of a layer to x (N, T, D): run it, reuse or forecast its output, or blend.

    layer: a function without arguments that runs the layer; not called if it is reused. outputs: those of its slot.
    A forecast has as many weights as there are outputs. A blend needs two finite outputs, since 0 * inf is nan.
    Returns the sum, and the output of the layer if it ran, for `remember`. Raises ValueError if no output is there.
    """
    if compute is True:
        output = layer()
        return torch.addcmul(x, gate, output), output
    if not outputs:
        raise ValueError("a layer is reused before it ran: the first step of a schedule must run every layer")
    if isinstance(compute, Tensor):
        return torch.addcmul(x, gate, Blend.apply(outputs[0], layer(), compute)), None
    if compute is False:
        return torch.addcmul(x, gate, outputs[0]), None
    (weight, output), *terms = zip(compute, outputs)
    x = torch.addcmul(x, gate * weight, output)
    for weight, output in terms:
        x.addcmul_(gate * weight, output)  # in place: memory for another sum would cost more than the sum
    return x, None


def remember(slot: Slot, compute: Compute, output: Tensor | None) -> None:
    """Update the slot of a layer after `apply_layer`: a layer that ran adds its output, a blend empties the slot."""
    if isinstance(compute, Tensor):
        slot.clear()  # training blends only in the last call with a cache, so the memory is freed
    elif output is not None:
        # A new slot is filled: one graph of torch.compile serves slots of any age, but not one tensor in two places.
        if not slot:
            slot.extend(output.view_as(output) for _ in range((slot.maxlen or 1) - 1))
        slot.appendleft(output)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) * scale + shift; both (N, 1, D), the same for all tokens of a sample."""
    return torch.addcmul(shift, x, scale)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) -> vectors (N, D): sinusoidal features, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size
        self.frequency_shift = frequency_shift

    @staticmethod
    def features(t: Tensor, size: int, max_period: int = 10000, shift: int = 0) -> Tensor:
        """Cosines, then sines, of t (N,) at size/2 geometric frequencies -> (N, size), float32; size even.

        Frequency k is max_period ** -(k / (size/2 - shift)).
        """
        half = size // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(max_period) * k / (half - shift))
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        features = self.features(t, self.frequency_embedding_size, shift=self.frequency_shift)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class labels (N,) -> vectors (N, D). Row `num_classes` is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        # Without label dropout there is no null class and no row for it, as in the original.
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def drop(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Replace each of the labels (N,) by the null class with probability `dropout_prob`."""
        dropped = torch.rand(labels.shape, device=labels.device, generator=generator) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """Latents (N, C, H, W) -> tokens (N, T, D), one for each patch of `patch_size` x `patch_size` cells."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D) (Vaswani et al. 2017, sec. 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # q, k, v are (N, heads, T, D/heads).
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers over tokens (N, T, D), with a GELU by its tanh approximation between them.

    fused: whether CUDA computes the GELU inside the first product, which it can only do without gradients.
    """

    fused = False

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused and x.is_cuda and not torch.is_grad_enabled()
        return self.fc2(self.fused_hidden(x) if fused else self.act(self.fc1(x)))

    def fused_hidden(self, x: Tensor) -> Tensor:
        """act(fc1(x)) in one kernel. On a CPU the operation computes the exact GELU, not its tanh approximation."""
        hidden = torch._addmm_activation(self.fc1.bias, x.flatten(0, 1), self.fc1.weight.t(), use_gelu=True)
        return hidden.unflatten(0, x.shape[:2])


class DiTBlock(nn.Module):
    """One transformer block with adaLN-Zero conditioning: an attention layer, then an MLP layer."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=mlp_norm_eps)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        compute: tuple[Compute, Compute] = (True, True),
        outputs: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """x (N, T, D) -> x (N, T, D) and the outputs of the layers that ran.

        modulation: (N, 6, D), this block's element of `DiT.modulations`.
        compute, outputs: for attention and MLP, as in `apply_layer`.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unsqueeze(2).unbind(1)

        def attention() -> Tensor:
            return self.attn(modulate(self.norm1(x), shift_a, scale_a))

        def mlp() -> Tensor:
            return self.mlp(modulate(self.norm2(x), shift_m, scale_m))

        x, output_a = apply_layer(x, gate_a, attention, compute[0], outputs[0])
        x, output_m = apply_layer(x, gate_m, mlp, compute[1], outputs[1])
        return x, (output_a, output_m)


class FinalLayer(nn.Module):
    """Tokens (N, T, D) and a modulation (N, 2, D) -> patches (N, T, p*p*out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.unsqueeze(2).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _check_arguments(sizes: dict[str, int], frequency_shift: int, mlp_norm_eps: float) -> None:
    """Raises ValueError if a DiT cannot have these settings. sizes: all arguments that must be positive ints."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} {size!r} is not a positive whole number")
    if frequency_shift not in (0, 1):
        raise ValueError(f"frequency_shift {frequency_shift!r} is neither 0 nor 1")
    if not isinstance(mlp_norm_eps, float | int) or not 0 < mlp_norm_eps < math.inf:
        raise ValueError(f"mlp_norm_eps {mlp_norm_eps!r} is not a positive number")
    depth, hidden_size, num_heads = (sizes[name] for name in ("depth", "hidden_size", "num_heads"))
    if depth > 500:  # making a block takes time even on the device "meta"
        raise ValueError(f"depth {depth} is more than 500 blocks")
    if sizes["input_size"] % sizes["patch_size"]:
        raise ValueError(f"input_size {sizes['input_size']} is not a multiple of patch_size {sizes['patch_size']}")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")


class DiT(nn.Module):
    """A diffusion transformer over latents (Peebles and Xie 2023, sec. 3).

    input_size: height and width of the latent in cells, a multiple of patch_size.
    hidden_size: a multiple of num_heads, and of 4 for the fixed positions.
    frequency_shift, mlp_norm_eps: 0 and 1e-6 in the original, 1 and 1e-5 in diffusers.
    Raises ValueError if a size cannot be used.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size)
        sizes |= dict(depth=depth, num_heads=num_heads, num_classes=num_classes)
        _check_arguments(sizes, frequency_shift, mlp_norm_eps)
        self.in_channels = in_channels
        self.input_size = input_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.label_dropout = class_dropout_prob  # 0: no null class, so no guidance
        self.depth = depth
        # True: recompute each block in the backward pass instead of keeping its activations.
        self.grad_checkpointing = False

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Fixed, but the released state dicts contain it, hence a parameter without gradient.
        self.pos_embed = nn.Parameter(position_table(hidden_size, input_size // patch_size), requires_grad=False)
        blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio, mlp_norm_eps) for _ in range(depth)]
        self.blocks: Sequence[DiTBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise as published. Every gate and the output start at 0, so a fresh model outputs exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches, biases = self.x_embedder.proj.parameters()
        nn.init.xavier_uniform_(patches.view(patches.shape[0], -1))
        nn.init.zeros_(biases)
        for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
            nn.init.normal_(self.get_parameter(name), std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def empty_cache(self, order: int = 0) -> Cache:
        """A new cache: per block the empty slots [attention, MLP], for order + 1 outputs each."""
        return [[deque(maxlen=order + 1) for _ in range(2)] for _ in self.blocks]

    def cache_bytes(self, samples: int, dtype: torch.dtype, order: int = 0) -> int:
        """Bytes of a full cache in a torch.dtype. samples: rows of a batch; guidance needs two per image."""
        return 2 * self.depth * (order + 1) * samples * self.pos_embed[0].numel() * dtype.itemsize

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (N, T, p*p*C) -> images (N, C, H, W)."""
        n, side, p = x.shape[0], self.input_size // self.patch_size, self.patch_size
        x = x.reshape(n, side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.out_channels, side * p, side * p)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Timesteps t (..., N) and labels y (N,) -> the vectors (..., N, D) that condition the blocks."""
        return self.t_embedder(t.flatten()).unflatten(0, t.shape) + self.y_embedder(y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        """Modulation vectors from c (..., N, D): one (..., N, 6, D) per block, then (..., N, 2, D) for the final layer.

        The six are shift, scale and gate of the attention, then of the MLP; the two are shift and scale. A scale is the
        factor itself, 1 + the model's output.
        """
        modules = [block.adaLN_modulation for block in self.blocks] + [self.final_layer.adaLN_modulation]
        c = nn.functional.silu(c)  # every module starts with this
        vectors = [linear(c).unflatten(-1, (-1, c.shape[-1])) for _, linear in modules]
        for v in vectors:
            v[..., 1::3, :] += 1  # the scales
        return vectors

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        compute: Sequence[Sequence[Compute]] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predict noise and variance: x (N, C, H, W), t (N,), y (N,) -> (N, 2C, H, W), in the dtype of x.

        compute: per block (attention, MLP): True runs the layer, False reuses its cached output,
                 floats forecast it, a 0-d tensor in [0, 1] blends cached and fresh. None runs everything.
        cache:   from `empty_cache`. Reuse reads a slot, a running layer writes it, a blend empties it.
        Raises ValueError if a layer is reused before it ran.
        Source: Peebles and Xie 2023, sec. 3; Ma et al. 2024, sec. 3.2.
        """
        return self.denoise(x, self.modulations(self.condition(t, y)), compute, cache)

    def denoise(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        compute: Sequence[Sequence[Compute]] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """`forward`, given the `modulations` of the timesteps and labels."""
        dtype = x.dtype
        # (N, T, D), T = H*W / p**2; contiguous, or every sum with an output would mix two orders of memory
        x = self.x_embedder(x.to(self.pos_embed.dtype)).contiguous() + self.pos_embed
        for l, block in enumerate(self.blocks):
            row = (True, True) if compute is None else tuple(compute[l])
            # A layer that runs gets no outputs: torch.compile would make a graph for empty and one for full slots.
            past = tuple(() if cache is None or row[k] is True else tuple(cache[l][k]) for k in (0, 1))
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, outputs = checkpoint(block, x, modulations[l], row, past, use_reentrant=False)
            else:
                x, outputs = block(x, modulations[l], row, past)
            if cache is not None:
                for slot, compute_k, output in zip(cache[l], row, outputs):
                    remember(slot, compute_k, output)
        return self.unpatchify(self.final_layer(x, modulations[-1])).to(dtype)  # (N, T, p*p*2C) -> (N, 2C, H, W)

    def block_linears(self) -> list[Any]:
        """The four linear layers of the first block (all blocks have these shapes): qkv and output, then the MLP's."""
        block = self.blocks[0]
        return [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]

    def multiply_adds(self) -> dict[str, Any]:
        """Multiply-adds of one sample at one step without guidance, as a dict of ints.

        "layer": (attention, MLP) of one block, which reuse saves; "fixed": embedders, modulation and output.
        Counts linear layers, the patch convolution and the two attention products, but no norms, activations or sums.
        """
        tokens, d = self.pos_embed.shape[1:]

        def linear(module: nn.Module) -> int:
            return module.get_parameter("weight").numel()  # per token, or per sample

        qkv, proj, fc1, fc2 = map(linear, self.block_linears())
        attention = tokens * (qkv + proj) + 2 * tokens * tokens * d
        mlp = tokens * (fc1 + fc2)
        fixed = (
            tokens * (linear(self.x_embedder.proj) + linear(self.final_layer.linear))
            + linear(self.t_embedder.mlp[0])
            + linear(self.t_embedder.mlp[2])
            + self.depth * linear(self.blocks[0].adaLN_modulation[1])
            + linear(self.final_layer.adaLN_modulation[1])
        )
        return {"layer": (attention, mlp), "fixed": fixed}


class Guidance(float):
    """A guidance scale that also says where it acts; a plain float acts as one with the defaults.

    channels: of the output that are guided; the released samples of DiT and SiT have three of four, those of REPA all.
    interval: the lowest and highest t at which the output is guided; t is 1 for noise and 0 for data.
    Source of the interval: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """

    channels: int
    interval: tuple[float, float]

    def __new__(cls, scale: float, channels: int = 3, interval: Sequence[float] = (0.0, 1.0)) -> "Guidance":
        guidance = super().__new__(cls, scale)
        guidance.channels, (low, high) = channels, interval
        guidance.interval = low, high
        return guidance

    @classmethod
    def of(cls, scale: float) -> "Guidance":
        """`scale` itself if it is a `Guidance`, else one with the defaults."""
        return scale if isinstance(scale, cls) else cls(scale)

    def entries(self) -> dict[str, Any]:
        """What a manifest says of channels and interval, as JSON types; {} if they are the defaults."""
        default = Guidance(self)
        entries: dict[str, Any] = {} if self.channels == default.channels else {"cfg_channels": self.channels}
        return entries if self.interval == default.interval else entries | {"cfg_interval": list(self.interval)}

    def apply(self, output: Tensor, t: float) -> Tensor:
        """`guided` if t is in the interval, else the output as it is."""
        low, high = self.interval
        return guided(output, float(self), self.channels) if low <= t <= high else output


def guided(output: Tensor, cfg_scale: float, channels: int = 3) -> Tensor:
    """Apply classifier-free guidance to the output (2N, C', H, W) of a batch [x, x] with labels [y, null].

    Both halves get the guided `channels`; the others pass through. Source: Ho and Salimans 2021, eq. 6.
    """
    noise, rest = output[:, :channels], output[:, channels:]
    cond, uncond = noise.chunk(2)
    noise = uncond + cfg_scale * (cond - uncond)
    return torch.cat([torch.cat([noise, noise]), rest], dim=1)


def position_table(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side x side grid: float32 (1, side*side, dim), dim a multiple of 4.

    The first half of the features encodes the column, the second half the row; each has sines, then cosines.
    """
    if torch.get_default_device().type == "meta":  # only the shape is needed, the values come from a file
        return torch.empty(1, side * side, dim)
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.divmod(np.arange(side * side), side)
    halves = [np.outer(axis, omega) for axis in (column, row)]
    table = np.concatenate([wave(angles) for angles in halves for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table).float().unsqueeze(0)


# depth, hidden size, heads; with patches of 2, 4 and 8 latent cells there are twelve models.
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
