"""Evaluate samples against a reference as the ADM evaluator does: Inception Score, FID, sFID, precision and recall.

    python evaluator.py VIRTUAL_imagenet256_labeled.npz SAMPLES.npz
    python evaluator.py ckpt/fashion_mnist/reference.npz SAMPLES.npz --graph ckpt/fashion_mnist/classifier.pb
    python evaluator.py IMAGES --save-stats STATISTICS.npz       # once, and then STATISTICS.npz in place of IMAGES

Either is an .npz of images (arr_0 uint8 (N, H, W, 3)), a folder of PNGs, or an .npz of statistics. The graph and the
ImageNet reference are fetched where they are missing.
"""

import argparse

from runtime import cli

PUBLISHED_SAMPLES = 50000  # that published values are of
# By the name to ask for it: what is printed; what it needs of both sets.
METRICS = {
    "is": ("Inception Score", ()),
    "fid": ("FID", ("mu", "sigma")),
    "sfid": ("sFID", ("mu_s", "sigma_s")),
    "precision": ("Precision", ("pool",)),
    "recall": ("Recall", ("pool",)),
}


def metric_names(text):
    """An argparse type: names of METRICS with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__, positional="REFERENCE [SAMPLES]")
    parser.add_argument("reference", metavar="REFERENCE", help="images or statistics to compare with")
    parser.add_argument(
        "sample", metavar="SAMPLES", nargs="?", help="images or statistics to judge; only --save-stats does without"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--graph",
        metavar="FILE",
        help="network of the features, a frozen TensorFlow graph; without it Inception v3",
    )
    network.add_argument(
        "--backend",
        choices=["auto", "torch", "tensorflow"],
        default="auto",
        help="what runs the graph; auto is torch, the faster one (benchmarks/README.md)",
    )
    cli.add_device_argument(network)
    network.add_argument(
        "--batch-size", metavar="N", type=cli.positive, default=64, help="images in the network at a time"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--metrics",
        metavar="NAMES",
        type=metric_names,
        default=",".join(METRICS),
        help="which to compute, with commas between them",
    )
    results.add_argument(
        "--distance",
        choices=["fp16", "fp32"],
        default="fp16",
        help="precision of the distances behind precision and recall: fp16 is the published one",
    )
    results.add_argument(
        "--save-stats",
        metavar="NPZ",
        help="write the sample's statistics and pool features (without a sample, the reference's) to this file",
    )
    results.add_argument(
        "--keep-features",
        metavar="N",
        type=cli.positive,
        help="with --save-stats: pool features of N images, evenly spaced; without it of all",
    )
    cli.add_record_argument(results, also=["--json"])
    args = parser.parse_args(argv)
    if args.sample is None and not args.save_stats:
        parser.error("there is nothing to compare with the reference: name the sample, or add --save-stats")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {args.save_stats} does not end in .npz")
    if args.keep_features and not args.save_stats:
        parser.error("--keep-features says what --save-stats writes: add that")
    return args


def requirements(args, sets):
    """The names of the arrays that each set has to provide, by its role.

    Raises UserError where a set neither stores them nor holds images to make them from.
    """
    from evaluation.evaluation_set import STATISTICS
    from runtime.errors import UserError

    needed = {role: {array for name in args.metrics for array in METRICS[name][1]} for role in sets}
    if "is" in args.metrics and "sample" in sets:
        needed["sample"].add("pool")
    if args.save_stats:
        needed[list(sets)[-1]] = {*STATISTICS, "pool"}
    for role, images in sets.items():
        missing = sorted(needed[role] - images.stored.keys())
        if missing and images.count is None:
            raise UserError(
                f"{images} holds no images and no {', '.join(missing)}: name the images, or leave out the metrics that "
                "need them with --metrics"
            )
    return needed


def check_graphs(sets, network):
    """Raises UserError where what is stored in the sets was made by another graph than the network, or each other's."""
    from runtime.errors import UserError

    for images in sets.values():
        if network:
            network.check(images)
    graphs = {images.about.get("graph") for images in sets.values()} - {None}
    if len(graphs) > 1:
        raise UserError(
            f"{' and '.join(map(str, sets.values()))} are statistics by different graphs: make both with the same"
        )


def doubts(sets, network):
    """Yields what looks like a mistake about two sets that are to be compared."""
    reference, sample = sets["reference"], sets["sample"]
    if reference.is_same(sample):
        yield f"{reference} and {sample} are the same: a set is compared with itself"
    sizes = [images.size or images.about.get("image_size") for images in (reference, sample)]
    if all(sizes) and tuple(sizes[0]) != tuple(sizes[1]):
        told = (f"{images} has {w}x{h} pixels" for images, (h, w) in zip((reference, sample), sizes))
        yield f"{', '.join(told)}: the network sees both at one size, but differently blurred"
    count = sample.count or sample.about.get("images")
    if network and network.is_published and count and count < PUBLISHED_SAMPLES:
        yield f"{count} samples: published values are of {PUBLISHED_SAMPLES}, with fewer FID and sFID are higher"
    elif network and 1 < (count or 0) <= network.sizes[0]:
        yield f"{count} samples for {network.sizes[0]} features: FID and sFID mean little"


def compute(args, arrays, network, device):
    """Yields the name and the value of each metric that is asked for, in the order of METRICS.

    Raises UserError where what was stored cannot be used.
    """
    from tqdm import tqdm

    from evaluation import metrics
    from runtime.errors import UserError

    reference, sample = arrays["reference"], arrays["sample"]
    try:
        if "is" in args.metrics:
            yield "is", metrics.inception_score(network.probabilities(sample["pool"]))
        for name in ("fid", "sfid"):
            if name in args.metrics:
                mu, sigma = METRICS[name][1]
                yield name, metrics.frechet_distance(reference[mu], reference[sigma], sample[mu], sample[sigma])
        if "precision" in args.metrics or "recall" in args.metrics:
            with tqdm(desc="precision and recall", unit="block", disable=None, leave=False) as bar:

                def progress(done, total):
                    bar.total = total
                    bar.update(done - bar.n)

                both = metrics.precision_recall(
                    reference["pool"], sample["pool"], dtype=args.distance, device=device, progress=progress
                )
            yield from ((name, value) for name, value in zip(("precision", "recall"), both) if name in args.metrics)
    except ValueError as error:
        raise UserError(f"{args.reference} and {args.sample} cannot be compared: {error}") from error


def main(args):
    import time
    import warnings

    from tqdm import tqdm

    from evaluation.evaluation_set import open_evaluation_set, save_statistics
    from runtime import devices, records, released
    from runtime.files import check_writable

    device = devices.pick_device(args.device)
    for place in filter(None, (args.save_stats, args.record)):
        check_writable(place)
    paths = {"reference": args.reference} | ({"sample": args.sample} if args.sample else {})
    # The sample first: where it is missing, the reference's gigabytes are not fetched for nothing.
    opened = {role: open_evaluation_set(released.find(paths[role])) for role in reversed(paths)}
    sets = {role: opened[role] for role in paths}
    needed = requirements(args, sets)
    missing = {role: needed[role] - images.stored.keys() for role, images in sets.items()}
    with cli.one_line_warnings() as said:
        network = None
        if any(missing.values()) or "is" in args.metrics and args.sample:
            from evaluation.features import Network

            network = Network(args.graph, args.backend, device, args.batch_size)
        check_graphs(sets, network)
        if args.sample:
            for text in doubts(sets, network):
                warnings.warn(text, RuntimeWarning, stacklevel=1)

        arrays, seconds, since = {}, {}, time.perf_counter()
        for role, images in sets.items():
            arrays[role] = {name: images.stored[name] for name in needed[role] - missing[role]}
            if missing[role]:
                with tqdm(total=images.count, desc=role, unit="image", disable=None) as bar:
                    arrays[role] |= network.extract(images, missing[role], bar.update)
            seconds[role] = time.perf_counter() - since - sum(seconds.values())
        if args.save_stats:
            # Of the last one, which is the sample if there are two.
            made = {"graph": network.sha256, "images": images.count, "image_size": images.size} if network else {}
            save_statistics(args.save_stats, arrays[role], images.about or made, args.keep_features)
            print(f"Statistics: {args.save_stats}")
        if not args.sample:
            return

        values = {}
        for name, value in compute(args, arrays, network, device):
            values[name] = value
            print(f"{METRICS[name][0]}: {value:.6g}", flush=True)
        seconds["metrics"] = time.perf_counter() - since - sum(seconds.values())
    if args.record:
        figures = {"metrics": {METRICS[name][0].lower().replace(" ", "_"): value for name, value in values.items()}}
        for role, images in sets.items():
            figures[role] = {
                "sha256": images.sha256(),
                "images": images.count or images.about.get("images"),
                "pool_features": len(arrays[role].get("pool", ())),
                "stored": sorted(needed[role] - missing[role]),
            }
        backend = network and {"name": network.backend, "graph_sha256": network.sha256, "versions": network.versions}
        records.write_record(args.record, vars(args), device, figures | {"backend": backend, "seconds": seconds, "warnings": said})


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --batch-size, or fewer --metrics")
