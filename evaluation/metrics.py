"""The metrics of the ADM evaluator as functions of arrays of features and probabilities; knows no network and no files.

Source: evaluator.py of openai/guided-diffusion; the papers are named at the functions.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.memory import out_of_memory

BLOCK = 2048  # points; larger blocks are hardly faster and take more memory


class Moments:
    """Mean and covariance of features that come in batches and are not kept, in float64.

    Each batch is centred on its own mean and its sums are merged into those of all before, so that features far from
    zero lose no digits. Source: Chan, Golub and LeVeque 1979, "Updating formulae ... for computing sample variances".
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Any = None
        self._scatter: Any = None

    def add(self, features):
        """Takes in features (N, D) of any float type; holds a copy of them in float64 and a few (D, D) meanwhile.

        Raises ValueError, and takes in none of them, where one is not finite or D is not that of the batches before.
        """
        features = np.asarray(features)
        if features.ndim != 2 or self.count and features.shape[1] != len(self._mean):
            expected = f"(N, {len(self._mean)})" if self.count else "(N, D)"
            raise ValueError(f"features are {features.shape}, not {expected}")
        count = len(features)
        if not count:
            return
        with np.errstate(invalid="ignore"):  # of infinities of both signs
            mean = features.mean(0, dtype=np.float64)
        if not np.isfinite(mean).all():
            raise ValueError("features are not finite")
        centred = features - mean
        scatter = centred.T @ centred
        if self.count:
            step = mean - self._mean
            scatter += self._scatter
            scatter += np.outer(step, step) * (self.count * count / (self.count + count))
            mean = self._mean + step * (count / (self.count + count))
        self.count, self._mean, self._scatter = self.count + count, mean, scatter

    def statistics(self):
        """(mu, sigma) of all features so far, float64 (D,) and (D, D): the mean, and the covariance with ddof 1.

        Raises ValueError where they are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance: two are needed")
        return self._mean.copy(), self._scatter / (self.count - 1)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mu, sigma) of features (N, D), float64 (D,) and (D, D): the mean, and the covariance with ddof 1.

    Raises ValueError where the features are fewer than two or not finite.
    """
    features, moments = np.asarray(features), Moments()
    for start in range(0, len(features), BLOCK):
        moments.add(features[start : start + BLOCK])
    return moments.statistics()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The squared Fréchet distance of two normal distributions: FID of pool features, sFID of spatial ones. A float.

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)); means (D,), covariances (D, D), in float64.
    Exact to some 1e-8 of the traces, also with fewer samples than dimensions; so near to 0 it may be below.
    Raises ValueError where shapes do not fit, a value is not finite, or a covariance is none (not symmetric, or with a
    negative eigenvalue). Source: Heusel et al. 2017, eq. 6.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, np.float64) for value in (mu1, sigma1, mu2, sigma2))
    shapes = [value.shape for value in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or not mu1.size or shapes != 2 * [mu1.shape, 2 * mu1.shape]:
        raise ValueError(f"mu1, sigma1, mu2, sigma2 are {', '.join(map(str, shapes))}: (D,), (D, D) twice are needed")
    sigma1, sigma2 = _symmetric("sigma1", sigma1), _symmetric("sigma2", sigma2)
    values, vectors = np.linalg.eigh(sigma1)
    kept = _above_rounding("sigma1", values, np.abs(values).max())
    root = vectors[:, kept] * np.sqrt(values[kept])  # (D, rank of sigma1): root root' is sigma1
    # root' sigma2 root has the eigenvalues of sigma1 sigma2 that are not 0, and it is symmetric.
    product = root.T @ sigma2 @ root
    squares = np.linalg.eigvalsh((product + product.T) / 2)
    kept = _above_rounding("sigma2", squares, np.abs(values).max() * np.linalg.norm(sigma2))
    trace = np.sqrt(squares[kept]).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    if not np.isfinite(distance):
        raise ValueError("mu1 or mu2 is not finite")
    return float(distance)


def _symmetric(name, sigma):
    """The covariance `sigma` without what rounding left between its two halves."""
    largest = np.abs(sigma).max()
    if not np.isfinite(largest):
        raise ValueError(f"{name} is not finite")
    if np.abs(sigma - sigma.T).max() > 1e-5 * largest:  # float32 leaves less
        raise ValueError(f"{name} is not symmetric: it is no covariance")
    return (sigma + sigma.T) / 2


def _above_rounding(name, values, scale):
    """Which eigenvalues of a covariance are not 0 but for rounding; `scale` is what rounding is relative to.

    Fewer samples than dimensions have many of those, on both sides of 0. A root would make 1e-8 of each 1e-16, so what
    is not well above the lowest of them counts as 0.
    """
    lowest = values.min(initial=0)
    if lowest < -1e-5 * scale:
        raise ValueError(f"{name} has a negative eigenvalue: it is no covariance")
    return values > -3 * lowest


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """The Inception Score of class probabilities (N, classes), a float from 1 to the number of classes.

    The exponential of the mean KL divergence of the rows from their mean, in each block of `split` rows in their order;
    then the mean over blocks, in which a last block of fewer rows counts as the others do. In float64.
    A probability of 0 adds 0, the limit of p log p (the original gives NaN).
    Raises ValueError where there are no rows, a value is negative or not finite, or a row's sum is not 1.
    Source: Salimans et al. 2016, sec. 4.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size:
        raise ValueError(f"probabilities are {probabilities.shape}, not (N, classes)")
    if split < 1:
        raise ValueError(f"blocks have {split} rows: at least 1 is needed")
    scores = []
    for start in range(0, len(probabilities), split):
        block = probabilities[start : start + split].astype(np.float64)
        # Written so that NaN fails too. Half precision leaves sums that are 1 to a few thousandths.
        if not (block.min() >= 0 and np.abs(block.sum(1) - 1).max() < 0.01):
            raise ValueError("probabilities are negative, not finite, or do not add up to 1 in a row")
        # The sum over classes of p (log p - log mean), averaged over rows: the second part is the mean's alone.
        scores.append(np.exp(_p_log_p(block).sum() / len(block) - _p_log_p(block.mean(0)).sum()))
    return float(np.mean(scores))


def _p_log_p(p):
    return p * np.log(np.where(p > 0, p, 1))


def precision_recall(
    reference: np.ndarray,
    sample: np.ndarray,
    k: int = 3,
    dtype: str = "fp16",
    device: Any = "cpu",
    block: int = BLOCK,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """(precision, recall) of features sample (N, D) against reference (M, D), floats from 0 to 1.

    Each point has a ball that reaches to the k-th nearest other point of its own set. Precision is the share of samples
    in any ball of the reference, recall the share of the reference in any ball of the samples.
    dtype: of the squared distances. "fp16" is the published way: rounded where float16 rounds, a block of distances
    again in float32 where float16 overflows. "fp32" differs from published values by up to 0.0024.
    device: a torch.device or its name. block: points a side of the distances that are computed at a time; where memory
    does not suffice half as many are tried, with a warning. They change at most the last bits of a distance.
    progress: called with the number of blocks of distances that are done, and of all, after each of them.
    Raises ValueError where shapes or values do not fit, or a set has no k other points.
    Source: Kynkäänniemi et al. 2019, algorithm 1.
    """
    import torch

    reference, sample = (_checked(*named, k) for named in (("reference", reference), ("sample", sample)))
    if reference.shape[1] != sample.shape[1]:
        raise ValueError(f"reference has {reference.shape[1]} features a point, sample {sample.shape[1]}")
    if dtype not in ("fp16", "fp32"):
        raise ValueError(f"dtype {dtype!r} is neither 'fp16' nor 'fp32'")
    if k < 1 or block < 1:
        raise ValueError(f"k is {k}, block {block}: at least 1 is needed")
    device, block = torch.device(device), min(block, max(len(reference), len(sample)))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # its products have the digits of float16
    try:
        while True:
            try:
                return _precision_recall(reference, sample, k, dtype == "fp16", device, block, progress)
            except (MemoryError, RuntimeError) as error:
                if block == 1 or not out_of_memory(error):
                    raise
            # Here the error, which holds what was computed, is gone.
            block //= 2
            warnings.warn(f"out of memory: going on with blocks of {block} points", RuntimeWarning, stacklevel=2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _checked(name, features, k):
    """`features` as an array, where they can be used."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) <= k or not features.shape[1]:
        raise ValueError(f"{name} is {features.shape}: (N, D) is needed, N above k = {k}")
    # Both are NaN where any value is; neither takes memory.
    if not np.isfinite([features.min(), features.max()]).all():
        raise ValueError(f"{name} is not finite")
    return features


def _precision_recall(reference, sample, k, half, device, block, progress):
    """What `precision_recall` returns, computed on `device` in blocks of `block` points a side."""
    import torch

    m, n = (-(-len(features) // block) for features in (reference, sample))
    total, done = m * (m + 1) // 2 + n * (n + 1) // 2 + m * n, 0

    def show():
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    reference_radii, sample_radii = (_radii(features, k, half, device, block, show) for features in (reference, sample))
    inside_sample = torch.zeros(len(reference), dtype=torch.bool, device=device)
    inside_reference = torch.zeros(len(sample), dtype=torch.bool, device=device)
    for rows, u in _blocks(reference, device, block):
        for columns, v in _blocks(sample, device, block):
            (distances,) = _squared_distances(u, v, half)
            inside_reference[columns] |= (distances <= reference_radii[rows, None]).any(0)
            inside_sample[rows] |= (distances <= sample_radii[columns]).any(1)
            show()
    return inside_reference.double().mean().item(), inside_sample.double().mean().item()


def _radii(features, k, half, device, block, show):
    """The squared distance of each point to the k-th nearest other one, float32 (N,) on `device`; show() per block.

    That is order statistic k of its distances to all points, itself, order statistic 0, included.
    """
    import torch

    nearest = torch.full((len(features), k + 1), torch.inf, device=device)

    def take_in(rows, distances):
        found = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], 1).topk(k + 1, largest=False).values

    for rows, u in _blocks(features, device, block):
        # The products of a pair of blocks serve both: those before this one were done with it.
        for columns, v in _blocks(features, device, block, rows.start):
            distances, *transposed = _squared_distances(u, v, half, both=columns.start > rows.start)
            take_in(rows, distances)
            for distances in transposed:
                take_in(columns, distances)
            show()
    return nearest.amax(1)


def _blocks(features, device, block, start=0):
    """Yields (slice, points) of `features` from point `start` on, `block` at a time as float32 on `device`."""
    import torch

    for first in range(start, len(features), block):
        some = slice(first, min(first + block, len(features)))
        yield some, torch.tensor(features[some], dtype=torch.float32, device=device)


def _squared_distances(u, v, half, both=False):
    """[squared Euclidean distances of points u (M, D) and v (N, D)], float32 (M, N); `both`: [those, (N, M)] too.

    half: with the values, norms, products and sums rounded to float16, unless one of them overflows. The products add
    up in float32, as they do where hardware multiplies float16; on a CPU that is also many times faster.
    """
    import torch

    for dtype in (torch.float16, torch.float32) if half else (torch.float32,):
        # No copies in float32.
        u_values, v_values = (points.to(dtype).float() for points in (u, v))
        u_norms, v_norms = (values.square().sum(1).to(dtype) for values in (u_values, v_values))
        products = (u_values @ v_values.T).to(dtype)
        # From left to right: |u|^2 - 2 u.v is rounded before |v|^2 is added.
        distances = [torch.sub(u_norms[:, None], products, alpha=2).add_(v_norms)]
        if both:
            distances.append(torch.sub(v_norms[:, None], products.T.contiguous(), alpha=2).add_(u_norms))
        # Before the clamp, which would make 0 of minus infinity. Extremes, NaN among them, are found without a copy.
        if dtype == torch.float32 or all(torch.stack(one.aminmax()).isfinite().all() for one in distances):
            break
    return [one.clamp_(min=0).float() for one in distances]
