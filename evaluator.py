"""Evaluate samples against a reference as the ADM evaluator does: Inception Score, FID, sFID, precision, recall; KID.

    python evaluator.py VIRTUAL_imagenet256_labeled.npz SAMPLES.npz
    python evaluator.py ckpt/fashion_mnist/reference.npz SAMPLES.npz --graph ckpt/fashion_mnist/classifier.pb
    python evaluator.py IMAGES --save-stats STATISTICS.npz       # once; then use STATISTICS.npz instead of IMAGES

Each set is an .npz of images (arr_0 uint8 (N, H, W, 3)), a folder of pictures, an .npz of statistics, or an .npz of
features of any network (arr_0 floats (N, D)). The graph and the ImageNet reference are downloaded if they are missing.
"""

import argparse

from runtime import cli

PUBLISHED_SAMPLES = 50000  # that published values are computed from
# By the name for --metrics: the printed name, and the arrays that the metric needs from both sets.
METRICS = {
    "is": ("Inception Score", ()),
    "fid": ("FID", ("mu", "sigma")),
    "sfid": ("sFID", ("mu_s", "sigma_s")),
    "precision": ("Precision", ("pool",)),
    "recall": ("Recall", ("pool",)),
    "kid": ("KID", ("pool",)),
}
PUBLISHED = [name for name in METRICS if name != "kid"]  # by the ADM evaluator
LABELS = {name: label for name, (label, _) in METRICS.items()} | {"kid_std": "KID standard deviation"}


def metric_names(text):
    """An argparse type: names of METRICS, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__, positional="REFERENCE [SAMPLES]")
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="images or statistics to compare with")
    add("sample", metavar="SAMPLES", nargs="?", help="images or statistics to judge; optional with --save-stats")
    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--graph", metavar="FILE", help="network for the features, a frozen TensorFlow graph; without it Inception v3")
    backends = ["auto", "torch", "tensorflow"]
    add("--backend", choices=backends, default="auto", help="library that runs the graph; auto is torch, the faster")
    cli.add_device_argument(network)
    add("--batch-size", metavar="N", type=cli.positive, default=64, help="images in the network at a time")
    results = parser.add_argument_group("results")
    add = results.add_argument
    help_text = f"metrics, separated by commas: {', '.join(METRICS)}"
    add("--metrics", metavar="NAMES", type=metric_names, default=",".join(PUBLISHED), help=help_text)
    add(
        "--distance", choices=["fp16", "fp32"], default="fp16", help="precision of distances; published values use fp16"
    )
    add("--kid-subsets", metavar="N", type=cli.positive, help="random subsets for KID; default: 100, as published")
    kid_size = cli.number(int, lambda value: value >= 2, "a whole number of at least 2")
    add("--kid-subset-size", metavar="N", type=kid_size, help="images of a set in each; default: 1000, as published")
    add("--save-stats", metavar="NPZ", help="write statistics and pool features of SAMPLES, without them of REFERENCE")
    add(
        "--keep-features",
        metavar="N",
        type=cli.positive,
        help="with --save-stats: write pool features of N images only",
    )
    cli.add_record_argument(results, also=["--json"])
    args = parser.parse_args(argv)
    if args.sample is None and not args.save_stats:
        parser.error("there are no samples to compare with the reference: name them, or add --save-stats")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {args.save_stats} does not end in .npz")
    if (args.kid_subsets or args.kid_subset_size) and "kid" not in args.metrics:
        parser.error("--kid-subsets and --kid-subset-size are about KID: add --metrics kid")
    if args.distance != parser.get_default("distance") and not {"precision", "recall"} & {*args.metrics}:
        parser.error("--distance is about precision and recall: add one of them to --metrics")
    if args.metrics != PUBLISHED and not args.sample:
        parser.error("--metrics is about SAMPLES: name them, or leave it out")
    if args.record and not args.sample:
        parser.error("--record writes the metrics of SAMPLES: name them, or leave it out")
    if args.keep_features and not args.save_stats:
        parser.error("--keep-features is about the file of --save-stats: add that")
    return args


def open_sets(reference, sample):
    """{"reference": EvaluationSet, "sample": EvaluationSet}; without "sample" if that is None."""
    from evaluation.evaluation_set import open_evaluation_set
    from runtime import released

    # Samples first: if they are missing, the gigabytes of the reference are not downloaded in vain.
    samples = {"sample": open_evaluation_set(released.find(sample))} if sample else {}
    return {"reference": open_evaluation_set(released.find(reference))} | samples


def needed_arrays(sets, metrics, save_stats):
    """Names of the arrays that each set must provide, {role: set of names}; save_stats: whether the last set is saved.

    Raises UserError if a set has neither the arrays nor images to compute them from.
    """
    from evaluation.evaluation_set import MOMENTS, STATISTICS
    from runtime.errors import UserError

    needed = {role: {array for name in metrics for array in METRICS[name][1]} for role in sets}
    if "is" in metrics and "sample" in sets:
        needed["sample"].add("pool")
    if save_stats:
        role, images = list(sets.items())[-1]
        if images.features:
            raise UserError(f"--save-stats writes statistics of images, and {images} holds features: use it as it is")
        needed[role] = {*STATISTICS, "pool"}
    of_features = [name for name, (_, arrays) in METRICS.items() if arrays and {*arrays} <= {"pool", *MOMENTS}]
    for role, images in sets.items():
        if images.features and not {*metrics} <= {*of_features}:
            raise UserError(
                f"{images} holds features, which are enough for {', '.join(of_features)}: pass --metrics fid,kid"
            )
        missing = sorted(images.missing(needed[role]))
        if missing and images.count is None:
            raise UserError(
                f"{images} holds no images and no {', '.join(missing)}: name the images, or leave out the metrics that "
                "need them with --metrics"
            )
    return needed


def check_graphs(sets, network):
    """Raise UserError if stored statistics come from different graphs, or from another graph than the network's."""
    from runtime.errors import UserError

    for images in sets:
        if network:
            network.check_stored(images)
    graphs = {images.about.get("graph") for images in sets} - {None}
    if len(graphs) > 1:
        raise UserError(f"{' and '.join(map(str, sets))} are statistics by different graphs: make both with the same")


def find_doubts(sets, metrics, network):
    """Yield a line for each thing that looks like a mistake in a set, or in a comparison of two by these metrics."""
    for images in sets.values():
        yield from images.doubts
    if "sample" not in sets:
        return
    reference, sample = sets["reference"], sets["sample"]
    if reference.is_same(sample):
        yield f"{reference} and {sample} are the same: a set is compared with itself"
    sizes = [images.size or images.about.get("image_size") for images in (reference, sample)]
    if all(sizes) and tuple(sizes[0]) != tuple(sizes[1]):
        pixels = (f"{images} has {w}x{h} pixels" for images, (h, w) in zip((reference, sample), sizes))
        yield f"{', '.join(pixels)}: the network resizes both to one size, which blurs them differently"
    count = sample.count or sample.about.get("images")
    if metrics == ["kid"]:  # fewer images do not raise it
        return
    if network and network.is_published and count and count < PUBLISHED_SAMPLES:
        yield f"{count} samples: published values use {PUBLISHED_SAMPLES}, with fewer FID and sFID are higher"
    width = network.sizes[0] if network else sample.stored["pool"].shape[1] if sample.features else 0
    if not (network and network.is_published) and 1 < (count or 0) <= width:
        yield f"{count} samples for {width} features: FID and sFID mean little"


def collect(images, needed, network, role):
    """The arrays `needed` of a set, {name: array}: stored ones, and the others computed by the network."""
    from tqdm import tqdm

    arrays = images.take(needed)
    missing = needed - arrays.keys()
    if missing:
        with tqdm(total=images.count, desc=role, unit="image", disable=None) as bar:
            arrays |= network.extract(images, missing, bar.update)
    return arrays


def compute_metrics(arrays, network, names, distance, kid, device):
    """Yield (name, value) of the metrics `names` in the order of METRICS; arrays: {role: {name: array}}.

    kid: arguments of `metrics.kernel_distance`. Raises ValueError if stored arrays cannot be used.
    """
    from tqdm import tqdm

    from evaluation import metrics

    reference, sample = arrays["reference"], arrays["sample"]
    if "is" in names:
        yield "is", metrics.inception_score(network.probabilities(sample["pool"]))
    for name in ("fid", "sfid"):
        if name in names:
            mu, sigma = METRICS[name][1]
            yield name, metrics.frechet_distance(reference[mu], reference[sigma], sample[mu], sample[sigma])
    if "precision" in names or "recall" in names:
        with tqdm(desc="precision and recall", unit="tile", disable=None, leave=False) as bar:

            def progress(done, total):
                bar.total = total
                bar.update(done - bar.n)

            pools = reference["pool"], sample["pool"]
            values = metrics.precision_recall(*pools, dtype=distance, device=device, progress=progress)
        yield from ((name, value) for name, value in zip(("precision", "recall"), values) if name in names)
    if "kid" in names:
        pools = reference["pool"], sample["pool"]
        yield from zip(("kid", "kid_std"), metrics.kernel_distance(*pools, **kid, device=device))


def set_figures(images, arrays):
    """The entry of a set in a record: its hash, its counts, and which of the used `arrays` were stored in it."""
    return {
        "sha256": images.sha256(),
        "images": images.count or images.about.get("images"),
        "pool_features": len(arrays.get("pool", ())),
        "stored": sorted(arrays.keys() & images.stored.keys()),
    }


def main(args):
    import time
    import warnings

    from evaluation.evaluation_set import save_statistics
    from runtime import devices, records
    from runtime.errors import UserError
    from runtime.files import check_outputs

    device = devices.pick_device(args.device)
    inputs = {"REFERENCE": args.reference, "SAMPLES": args.sample, "--graph": args.graph}
    check_outputs({"--save-stats": args.save_stats, "--record": args.record}, inputs)
    sets = open_sets(args.reference, args.sample)
    needed = needed_arrays(sets, args.metrics, args.save_stats)
    with cli.one_line_warnings() as warned:
        network = None
        computes = any(images.missing(needed[role]) for role, images in sets.items())
        # A graph that is named is at least compared with that of stored statistics.
        if computes or "is" in args.metrics and args.sample or args.graph:
            from evaluation.features import Network

            network = Network(args.graph, args.backend, device, args.batch_size)
        check_graphs(sets.values(), network)
        for doubt in find_doubts(sets, args.metrics, network):
            warnings.warn(doubt, RuntimeWarning, stacklevel=1)

        arrays, seconds = {}, {}
        for role, images in sets.items():
            start = time.perf_counter()
            arrays[role] = collect(images, needed[role], network, role)
            seconds[role] = time.perf_counter() - start
        if args.save_stats:  # of the last set
            made = {"graph": network.sha256, "images": images.count, "image_size": images.size} if network else {}
            save_statistics(args.save_stats, arrays[role], images.about or made, args.keep_features)
            print(f"Statistics: {args.save_stats}")
        if not args.sample:
            return

        values, fault, start = {}, None, time.perf_counter()
        try:
            kid = {"subsets": args.kid_subsets or 100, "size": args.kid_subset_size or 1000}
            for name, value in compute_metrics(arrays, network, args.metrics, args.distance, kid, device):
                values[name] = value
        except ValueError as error:
            fault = UserError(f"{args.reference} and {args.sample} cannot be compared: {error}")
        seconds["metrics"] = time.perf_counter() - start
    # Saved before it is printed: the output may be a pipe that was closed.
    if args.record and not fault:
        figures = {"metrics": {LABELS[name].lower().replace(" ", "_"): value for name, value in values.items()}}
        figures |= {role: set_figures(images, arrays[role]) for role, images in sets.items()}
        backend = network and {"name": network.backend, "graph_sha256": network.sha256, "versions": network.versions}
        figures |= {"backend": backend, "seconds": seconds, "warnings": warned}
        records.write_record(args.record, vars(args), device, figures)
    for name, value in values.items():
        print(f"{LABELS[name]}: {value:.6g}")
    if fault:
        raise fault


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --batch-size, or fewer --metrics")
