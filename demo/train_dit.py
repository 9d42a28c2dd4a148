"""Train the class-conditional DiT of the shipped model on the latents of its autoencoder.

    python -m demo.train_dit            # writes demo/output/fashion_mnist/{config.json,dit.safetensors}
    python -m demo.train_dit --flow --steps 3000    # a flow model, in demo/output/fashion_mnist_flow/

A flow model starts from the weights of the shipped DiT. If it is stopped, the same command continues. The model folder
gets the weights averaged over the updates.
"""

import os
from functools import partial
from pathlib import Path

from runtime import cli

# A flow model sees 1000 t, so that its times are nearly the timesteps of the DiT that it starts from.
FLOW = {"process": "flow", "time_scale": 1000}
MODEL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=192, depth=12, num_heads=6, num_classes=10)


def parse_args(argv=None):
    from demo.train_loop import HERE, MODEL_FOLDER, parser

    result = parser(__doc__, name="dit", updates=9200, batch_size=64)
    out = "model folder to write; that of a DiT holds vae/ already"
    result.add_argument("--out", type=Path, default=MODEL_FOLDER, help=out)
    result.add_argument("--compile", action="store_true", help="torch.compile; faster, needs a C++ compiler")
    result.add_argument("--flow", action="store_true", help="train by flow matching, from the weights of --init")
    shipped = HERE.parent / "ckpt" / "fashion_mnist"
    result.add_argument("--init", type=Path, default=shipped, help="with --flow: folder of a DiT to start from")
    args = result.parse_args(argv)
    if args.flow and args.out == MODEL_FOLDER:
        args.out = MODEL_FOLDER.with_name("fashion_mnist_flow")
    if args.flow and args.work == result.get_default("work"):
        args.work = args.work.with_name("flow.pt")
    return args


def encode_all(vae, images, device):
    """Mean and standard deviation of every image's latent: two float32 tensors (M, 4, 8, 8), scaled."""
    import torch
    from tqdm import tqdm

    from demo.train_loop import normalise

    with torch.no_grad():
        batches = tqdm(images.split(500), desc="encoding", disable=None)
        parts = [vae.encode(normalise(batch).to(device)).latent_dist for batch in batches]
        scale = vae.config.scaling_factor
        return torch.cat([p.mean for p in parts]) * scale, torch.cat([p.std for p in parts]) * scale


def export(weights, out, settings):
    """Write the model folder's configuration and weights; float16 halves the file at a relative error of 5e-4."""
    import json

    import torch
    from safetensors.torch import save_file

    from demo.fashion_mnist import CLASSES
    from runtime.files import atomic_write

    config = {"model": MODEL, "image_size": 32, "class_names": CLASSES, "cfg_scale": 2.0} | settings
    with atomic_write(out / "config.json") as part:
        part.write_text(json.dumps(config | {"horizontal_flip": False}, indent=2) + "\n")
    with atomic_write(out / "dit.safetensors") as part:
        save_file({name: value.to("cpu", torch.float16).contiguous() for name, value in weights.items()}, part)
    print(f"wrote {out / 'dit.safetensors'}")


def start_from(folder, out):
    """The start of a flow model: a DiT with the weights of a model folder, and the settings of its own in `out`."""
    from models import DiT
    from pretrained.loading import load_dit
    from pretrained.sit import first_channels
    from pretrained.spec import model_spec

    arguments = MODEL | {"learn_sigma": False}
    model, start = DiT(**arguments), load_dit(model_spec(ckpt=str(folder)), "cpu")
    model.load_state_dict(first_channels(start.state_dict(), start.in_channels))
    return model, FLOW | {"model": arguments, "vae": os.path.relpath(folder / "vae", out)}


def main(args):
    import torch
    from diffusers import AutoencoderKL
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from demo.train_loop import autocast, load_split, train
    from diffusion import create_diffusion
    from diffusion.flow import on_path, velocity_loss
    from models import DiT
    from runtime.devices import pick_device

    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model, settings = start_from(args.init, args.out) if args.flow else (DiT(**MODEL), {"vae": "vae"})
    model = model.to(device)
    # A flow model has fewer updates to forget the weights that it starts from.
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998 if args.flow else 0.999))
    images, labels = load_split(args.data, "train")
    vae = AutoencoderKL.from_pretrained(args.out / settings["vae"], local_files_only=True, use_safetensors=True)
    mean, std = encode_all(vae.to(device).eval(), images, device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; latent std {mean.std():.3f}", flush=True)
    diffusion = create_diffusion()
    # Everything random is drawn on the CPU, so that the run is the same on every device.
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    forward = torch.compile(model) if args.compile else model

    def loss_of_batch():
        index = torch.randint(len(images), (args.batch_size,), generator=generator)
        if args.flow:
            t = torch.rand(args.batch_size, generator=generator).to(device)
        else:
            i = torch.randint(diffusion.steps, (args.batch_size,), generator=generator).to(device)
        y = model.y_embedder.drop(labels[index], generator).to(device)
        shape = len(index), *mean.shape[1:]
        encoding, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        index = index.to(device)
        x_start = mean[index] + std[index] * encoding
        if args.flow:
            with autocast(device):
                output = forward(on_path(x_start, t, noise), FLOW["time_scale"] * t, y)
            return velocity_loss(output.float(), x_start, noise).mean()
        x = diffusion.q_sample(x_start, i, noise)
        with autocast(device):
            output = forward(x, i, y)
        mse, bits = diffusion.pretraining_loss(output.float(), x_start, x, i, noise)
        return (mse + bits).mean()

    how = {"updates": args.steps, "work": args.work, "after": partial(ema.update_parameters, model)}
    loss = train(loss_of_batch, optimizer, generator, **how, model=model, ema=ema)
    print(f"final loss {loss}")
    export(ema.module.state_dict(), args.out, settings)


if __name__ == "__main__":
    cli.run(main, parse_args())
