"""evaluator.py beside torch-fidelity, clean-fid and pytorch-fid: features of Inception v3, and the Frechet distance.

    python -m benchmarks.evaluators --record benchmarks/results/evaluators-cpu.json
    python -m benchmarks.evaluators --table

The others come with `pip install -r requirements-peers.txt`; rows of missing packages are left out. All networks get
the same random weights, those of a graph file by `benchmarks.inception_graph`: the work does not depend on them, and
the released weights are downloads. For the same reason clean-fid runs its own PyTorch network here, not the TorchScript
file that it fetches. For images of 299 pixels, which nothing resizes, all features must agree with ours: to 1e-5 for
torch-fidelity, to 1 % for the other two, which scale pixels to x / 127.5 - 1 and not, as the published graph does, to
x / 128 - 1.

Features: images start as uint8 arrays and end as features on the CPU, with the resize of each package, in fresh
processes that take turns; the first batch is not timed. The distance: from given statistics of random features, in turn
in one process; the results must agree to 1e-6.
"""

import contextlib
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli

# By the name of the row: the module of the network and the largest distance of its features from ours.
PACKAGES = {
    "torch-fidelity": ("torch_fidelity.feature_extractor_inceptionv3", 1e-5),
    "clean-fid": ("cleanfid.inception_pytorch", 0.01),
    "pytorch-fid": ("pytorch_fid.inception", 0.01),
}
OURS = "evaluator.py"
COMPARED, UNRESIZED = 2, 299  # images whose features are compared, and their pixels a side


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="images of a batch")
    parser.add_argument("--batches", type=cli.positive, default=2, help="timed batches of a round")
    parser.add_argument("--features", type=cli.positive, default=2048, help="features of the distance")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds, all in turn")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def installed():
    """The names of `PACKAGES` that can be used; one line on standard error for each of the others."""
    from importlib.util import find_spec

    found = [name for name, (module, _) in PACKAGES.items() if find_spec(module.partition(".")[0])]
    for name in PACKAGES.keys() - set(found):
        print(f"{name} is not installed, its row is left out: pip install {name}", file=sys.stderr)
    return found


def graph_weights(path):
    """Kernel (C_out, C_in, h, w), beta, mean, variance (C_out,) of each convolution of a graph file, in its order."""
    import torch

    from evaluation.graph_file import read_nodes

    nodes = read_nodes(path)
    for name in [name.removesuffix("/Conv2D") for name in nodes if name.endswith("/Conv2D")]:
        norm = [nodes[f"{name}/batchnorm/{array}"].constant() for array in ("beta", "moving_mean", "moving_variance")]
        kernel = nodes[f"{name}/conv2d_params"].constant().transpose(3, 2, 0, 1)
        yield [torch.tensor(array, dtype=torch.float32) for array in (kernel, *norm)]


def make_network(name, path):
    """The network of a package, on the CPU, with the weights of the graph file at `path`.

    Raises ValueError if its convolutions are others than those of the graph.
    """
    from importlib import import_module
    from unittest.mock import patch

    import torch

    module = import_module(PACKAGES[name][0])
    with (
        patch.object(module, "load_state_dict_from_url"),
        patch.object(torch.nn.Module, "load_state_dict"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        if name == "torch-fidelity":
            network = module.FeatureExtractorInceptionV3("inception", ["2048"])
        else:
            network = module.InceptionV3([3], resize_input=name == "pytorch-fid")
    layers = [layer for layer in network.modules() if hasattr(layer, "bn")]
    targets = [[layer.conv.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var] for layer in layers]
    sources = list(graph_weights(path))
    shapes = [[[tensor.shape for tensor in tensors] for tensors in side] for side in (sources, targets)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} has other convolutions than the graph")
    with torch.no_grad():
        for source, target, layer in zip(sources, targets, layers):
            layer.bn.weight.fill_(1)  # the graph does not scale
            for new, old in zip(source, target):
                old.copy_(new)
    return network.eval()


def make_extractor(name, path, device):
    """A function, images (N, H, W, 3) uint8 -> features (N, 2048) on the CPU, as the package computes them."""
    import numpy as np
    import torch

    if name == OURS:
        from evaluation.inception import Graph

        graph = Graph(path, device)
        return lambda images: graph.features(images)[0].cpu()
    network, resize = make_network(name, path).to(device), None
    if name == "clean-fid":
        from cleanfid.resize import build_resizer

        resize = build_resizer("clean")

    @torch.no_grad()
    def extract(images):
        if resize:
            images = np.stack([resize(image) for image in images])
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        return network(batch if name == "torch-fidelity" else batch / 255)[0].flatten(1).cpu()

    return extract


def measure_features(name, path, args):
    """Seconds of one round of a package, and its features of images that need no resize. The process must be fresh."""
    import warnings

    import numpy as np

    from runtime import devices

    warnings.simplefilter("ignore")  # of torchvision about arguments that the packages use
    extract, random = make_extractor(name, path, devices.pick_device(args.device)), np.random.default_rng(0)
    unresized = random.integers(0, 256, (COMPARED, UNRESIZED, UNRESIZED, 3), dtype=np.uint8)
    images = random.integers(0, 256, (args.batch_size, args.image_size, args.image_size, 3), dtype=np.uint8)
    features = extract(unresized).numpy()
    extract(images)
    return sum(common.timed(extract, images)[1] for _ in range(args.batches)), features


def distance_of(name):
    """The function of a package: mu1, sigma1, mu2, sigma2 -> the Frechet distance."""
    if name == OURS:
        from evaluation.metrics import frechet_distance as distance
    elif name == "clean-fid":
        from cleanfid.fid import frechet_distance as distance
    elif name == "pytorch-fid":
        from pytorch_fid.fid_score import calculate_frechet_distance as distance
    else:
        from torch_fidelity import metric_fid

        def distance(mu1, sigma1, mu2, sigma2):
            sets = dict(mu=mu1, sigma=sigma1), dict(mu=mu2, sigma=sigma2)
            return metric_fid.fid_statistics_to_metric(*sets, verbose=False)[metric_fid.KEY_METRIC_FID]

    return distance


def measure_distances(names, features, repeats):
    """Seconds and value of the distance by each package, {name: {...}}."""
    import warnings

    from benchmarks.metrics_speed import random_statistics

    warnings.simplefilter("ignore")  # of SciPy about arguments that the packages use
    inputs = random_statistics(2 * features, features)
    runs = {name: partial(common.timed, distance_of(name), *inputs) for name in names}
    results = common.in_turn(runs, repeats)
    return {
        name: {"distance": float(some[0][0]), "distance_seconds": [seconds for _, seconds in some]}
        for name, some in results.items()
    }


def measure(args):
    """Figures of each package. Raises RuntimeError if features or distances do not agree."""
    from importlib.metadata import version

    import numpy as np

    from benchmarks.inception_graph import inception_v3

    names = [OURS, *installed()]
    measured = common.run_alone(measure_distances, names, args.features, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = common.run_alone(inception_v3, Path(folder) / "random.pb")
        runs = {name: partial(common.run_alone, measure_features, name, path, args) for name in names}
        results = common.in_turn(runs, args.repeats)
    ours, expected = results[OURS][0][1], measured[OURS]["distance"]
    for name in names:
        seconds, features = zip(*results[name])
        apart = float(np.linalg.norm(features[0] - ours) / np.linalg.norm(ours))
        measured[name] |= {"seconds": seconds, "features_apart": apart}
        if name == OURS:
            continue
        measured[name]["version"] = version(name)
        if not apart <= PACKAGES[name][1]:
            raise RuntimeError(f"the features of {name} are {apart:.1e} from ours, above {PACKAGES[name][1]}")
        if not abs(measured[name]["distance"] - expected) <= 1e-6 * expected:
            raise RuntimeError(f"the distance is {measured[name]['distance']} by {name} and {expected} by ours")
    return {"measurements": measured}


def rows(record):
    """A row for each package; ratios are its seconds to ours."""
    flags, measured = record["flags"], record["measurements"]
    for name, figures in measured.items():
        images = flags["batches"] * flags["batch_size"]
        ratios = {
            key: f"{common.median_ratio(figures[key], measured[OURS][key]):.2f}"
            for key in ("seconds", "distance_seconds")
        }
        yield {
            "device": record["device"],
            "evaluator": f"{name} {figures.get('version', '')}".strip(),
            "pixels": flags["image_size"],
            "images/s": f"{images / statistics.median(figures['seconds']):.4g}",
            "seconds an image, to ours": ratios["seconds"],
            "features from ours": f"{figures['features_apart']:.1e}",
            "distance, seconds": f"{statistics.median(figures['distance_seconds']):.3g}",
            "to ours": ratios["distance_seconds"],
        }


def main(args):
    common.run_benchmark(args, "evaluators-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
