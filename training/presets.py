"""The presets of train_router.py, each with its expected result."""

# Flags, and the result. Published: Ma et al. 2024, 8 GPUs, guidance 1.5, 50,000 samples. Shipped:
# benchmarks/results/table, 5,000 samples judged by the small classifier. The paper's first command line has --lr 0.01;
# the released routers were trained with 1e-3.
XL2 = {"model": "DiT-XL/2", "lr": 1e-3, "max_steps": 20000}
L2, UNKNOWN = {"model": "DiT-L/2"}, "published, but we do not have the results"
FASHION = {"ckpt": "ckpt/fashion_mnist", "data_path": "demo/data/train", "log_every": 10, "l1": 1e-4, "lr": 0.1}
PRESETS = {
    "xl2-50": (XL2 | {"num_sampling_steps": 50, "l1": 1e-6, "max_steps": 40000}, "published: FID 2.269, IS 244.14"),
    "xl2-20": (XL2 | {"num_sampling_steps": 20, "l1": 5e-6}, "published: FID 3.455, IS 227.04, 248 of 560 cached"),
    "xl2-10": (XL2 | {"num_sampling_steps": 10, "l1": 1e-6}, "published: FID 12.79, IS 156.3"),
    "xl2-512-50": (
        XL2 | {"image_size": 512, "num_sampling_steps": 50, "l1": 5e-6, "max_steps": 40000, "thres": 0.9},
        "published: FID 3.69, IS 202.1",
    ),
    "l2-50": (L2 | {"num_sampling_steps": 50, "l1": 1e-6, "lr": 1e-3, "max_steps": 40000}, UNKNOWN),
    "l2-20": (L2 | {"num_sampling_steps": 20, "l1": 5e-6, "lr": 1e-2, "max_steps": 20000}, UNKNOWN),
    "fashion-20": (
        FASHION | {"num_sampling_steps": 20, "max_steps": 300},
        "shipped: 38.7 % of all layers cached; FID 1.730, 93.10 % in their class (1.664, 93.56 % without)",
    ),
    "fashion-50": (
        FASHION | {"num_sampling_steps": 50, "max_steps": 600},
        "shipped: 46.2 % of all layers cached; FID 1.287, 93.50 % in their class (1.270, 93.52 % without)",
    ),
}


def describe_presets():
    """Format the table of presets for --help."""
    lines = ["presets, and their results:"]
    for name, (flags, outcome) in PRESETS.items():
        words = [f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items()]
        lines.append(f"  {name:11} {' '.join(words)}\n{'':14}{outcome}")
    return "\n".join(lines)
