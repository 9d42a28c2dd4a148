"""Train the autoencoder of the shipped model: 32x32 RGB <-> 8x8 latents of 4 channels, as diffusers' AutoencoderKL.

    python -m demo.train_vae            # writes demo/output/fashion_mnist/vae; minutes on a laptop

If it is stopped, the same command continues.
"""

import tempfile
from pathlib import Path

from runtime import cli

KL_WEIGHT = 1e-4  # per latent value


def parse_args(argv=None):
    from demo.train_loop import MODEL_FOLDER, parser

    result = parser(__doc__, name="vae", updates=4000, batch_size=32)
    result.add_argument("--out", type=Path, default=MODEL_FOLDER / "vae", help="folder to write, as diffusers saves it")
    result.add_argument("--compile", action="store_true", help="torch.compile; faster, needs a C++ compiler")
    return result.parse_args(argv)


def main(args):
    import torch
    from diffusers import AutoencoderKL

    from demo.train_loop import autocast, load_split, normalise, train
    from runtime.devices import pick_device

    device = pick_device(args.device)
    images, _ = load_split(args.data, "train")
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    ).to(device)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0)

    def objective(x, noise):
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        # L1 keeps edges; the square keeps large errors rare.
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / noise[0].numel()

    if args.compile:
        objective = torch.compile(objective)

    def loss_of_batch():
        index = torch.randint(len(images), (args.batch_size,), generator=generator)
        noise = torch.randn((args.batch_size, 4, 8, 8), generator=generator)
        return objective(normalise(images[index]).to(device), noise.to(device))

    loss = train(loss_of_batch, optimizer, generator, updates=args.steps, work=args.work, vae=vae)
    vae.eval()
    held_out, _ = load_split(args.data, "test")
    x = normalise(held_out[:2000]).to(device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(250)])
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(250)])
    # The diffusion model sees latents of unit variance, as with Stable Diffusion's 0.18215.
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    psnr = -10 * torch.log10((decoded.clamp(-1, 1) - x).square().mean() / 4).item()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as part:
        vae.save_pretrained(part)
        for path in Path(part).iterdir():
            path.replace(args.out / path.name)
    print(f"final loss {loss}, PSNR on held-out images {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
