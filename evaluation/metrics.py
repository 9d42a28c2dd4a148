"""Metrics of the ADM evaluator, and KID, as functions of arrays of features and probabilities.

Source: evaluator.py of openai/guided-diffusion; each function names its paper.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from runtime.devices import exact_float32
from runtime.memory import out_of_memory

TILE = 2048  # rows processed at a time; more are hardly faster and take more memory


class Moments:
    """Mean and covariance in float64 of features that arrive in batches and are not kept.

    Each batch is centred on its own mean before it is merged, so that features far from zero lose no digits.
    Source: Chan, Golub and LeVeque 1979, "Updating formulae ... for computing sample variances".
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Any = None
        self._scatter: Any = None

    def add(self, features):
        """Add features (N, D) of any float type; needs memory for a float64 copy of them and a few (D, D).

        Raises ValueError, and adds none of them, if a value is not finite or D differs from earlier batches.
        """
        features = np.asarray(features)
        if features.ndim != 2 or self.count and features.shape[1] != len(self._mean):
            expected = f"(N, {len(self._mean)})" if self.count else "(N, D)"
            raise ValueError(f"features are {features.shape}, not {expected}")
        count = len(features)
        if not count:
            return
        with np.errstate(invalid="ignore"):  # infinities of both signs add up to NaN
            mean = features.mean(0, dtype=np.float64)
        if not np.isfinite(mean).all():
            raise ValueError("features are not finite")
        centred = features - mean
        scatter = centred.T @ centred
        if self.count:
            shift = mean - self._mean
            scatter += self._scatter
            scatter += np.outer(shift, shift) * (self.count * count / (self.count + count))
            mean = self._mean + shift * (count / (self.count + count))
        self.count, self._mean, self._scatter = self.count + count, mean, scatter

    def statistics(self):
        """Mean (D,) and covariance (D, D) with ddof 1. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance: two are needed")
        return self._mean.copy(), self._scatter / (self.count - 1)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) with ddof 1 of features (N, D), in float64.

    Raises ValueError if the features are fewer than two or not finite.
    """
    features, moments = np.asarray(features), Moments()
    for start in range(0, len(features), TILE):
        moments.add(features[start : start + TILE])
    return moments.statistics()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions: FID of pool features, sFID of spatial features.

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)); means (D,), covariances (D, D), in float64.
    The error is below 5e-8 of the traces, so that a distance near 0 may be negative. Fewer samples than D are fine.
    Raises ValueError if shapes do not fit, a value is not finite, or a covariance is not symmetric or has a negative
    eigenvalue. Source: Heusel et al. 2017, eq. 6.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, np.float64) for value in (mu1, sigma1, mu2, sigma2))
    shapes = [value.shape for value in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or not mu1.size or shapes != 2 * [mu1.shape, 2 * mu1.shape]:
        raise ValueError(f"mu1, sigma1, mu2, sigma2 are {', '.join(map(str, shapes))}: (D,), (D, D) twice are needed")
    sigma1, sigma2 = _symmetric("sigma1", sigma1), _symmetric("sigma2", sigma2)
    values, vectors = np.linalg.eigh(sigma1)
    kept = _above_rounding("sigma1", values, np.abs(values).max())
    root = vectors[:, kept] * np.sqrt(values[kept])  # (D, rank of sigma1): root root' is sigma1
    # root' sigma2 root is symmetric and has the non-zero eigenvalues of sigma1 sigma2.
    product = root.T @ sigma2 @ root
    squares = np.linalg.eigvalsh((product + product.T) / 2)
    kept = _above_rounding("sigma2", squares, np.abs(values).max() * np.linalg.norm(sigma2))
    trace = np.sqrt(squares[kept]).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    if not np.isfinite(distance):
        raise ValueError("mu1 or mu2 is not finite")
    return float(distance)


def _symmetric(name, sigma):
    """The mean of the covariance `sigma` and its transpose, which differ by rounding."""
    largest = np.abs(sigma).max()
    if not np.isfinite(largest):
        raise ValueError(f"{name} is not finite")
    if np.abs(sigma - sigma.T).max() > 1e-5 * largest:  # rounding to float32 leaves less
        raise ValueError(f"{name} is not symmetric: it is not a covariance")
    return (sigma + sigma.T) / 2


def _above_rounding(name, values, scale):
    """Mask of the eigenvalues of a covariance that are more than rounding errors, which are relative to `scale`.

    With fewer samples than dimensions, many eigenvalues are 0 up to rounding, on both sides of 0. The square root would
    turn each 1e-16 into 1e-8, so values that are not well above the size of the lowest count as 0. If the few errors
    there are all lie above 0, as they may with any new LAPACK, a multiple of the precision bounds them: for 8 to 2048
    dimensions, up to 1.5 times the precision was measured.
    """
    lowest = values.min(initial=0)
    if lowest < -1e-5 * scale:
        raise ValueError(f"{name} has a negative eigenvalue: it is not a covariance")
    return values > max(-3 * lowest, 4 * np.finfo(np.float64).eps * scale)


def kernel_distance(
    reference: np.ndarray,
    sample: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    device: Any = "cpu",
) -> tuple[float, float]:
    """KID of features sample (N, D) against reference (M, D): mean and standard deviation over random subsets.

    A subset has `size` points of each set, or all points of the smaller set if these are fewer. Its distance is the
    unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, in float64; it may be
    negative. seed: of the subsets, drawn as torch-fidelity draws them, so that equal features give its values.
    device: a torch.device or its name.
    Raises ValueError if shapes or values do not fit, or a set has fewer than two points.
    Source: Binkowski et al. 2018, sec. 4; the estimate is that of Gretton et al. 2012, eq. 3.
    """
    reference, sample = _checked("reference", reference, 1), _checked("sample", sample, 1)
    _check_widths(reference, sample)
    if subsets < 1 or size < 2:
        raise ValueError(f"{subsets} subsets of {size} points: at least 1 of 2 are needed")
    if (smaller := min(len(reference), len(sample))) < size:
        warnings.warn(f"KID: subsets of {smaller} points, because a set has no more", RuntimeWarning, stacklevel=2)
        size = smaller
    draw, distances = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (
            torch.tensor(features[draw.choice(len(features), size, replace=False)], dtype=torch.float64, device=device)
            for features in (reference, sample)
        )
        within = [_cubic_kernel(z, z) for z in (x, y)]
        pairs = sum(kernel.sum() - kernel.trace() for kernel in within) / (size * (size - 1))
        distances.append((pairs - 2 * _cubic_kernel(x, y).mean()).item())
    return float(np.mean(distances)), float(np.std(distances))


def _cubic_kernel(x, y):
    """(x.y / D + 1)^3 of all pairs of points x (M, D) and y (N, D): (M, N)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Inception Score of class probabilities (N, classes), from 1 to the number of classes.

    In each run of `split` consecutive rows: the exponential of the mean KL divergence of the rows from their mean, in
    float64. The score is the mean over the runs; a shorter last run counts in full. A probability of 0 adds 0, the
    limit of p log p (the original returns NaN).
    Raises ValueError if there are no rows, a value is negative or not finite, or a row does not add up to 1.
    Source: Salimans et al. 2016, sec. 4.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size:
        raise ValueError(f"probabilities are {probabilities.shape}, not (N, classes)")
    if split < 1:
        raise ValueError(f"split is {split}: at least 1 row is needed")
    scores = []
    for start in range(0, len(probabilities), split):
        rows = probabilities[start : start + split].astype(np.float64)
        # Written so that NaN fails too. In half precision, rows add up to 1 within a few thousandths.
        if not (rows.min() >= 0 and np.abs(rows.sum(1) - 1).max() < 0.01):
            raise ValueError("probabilities are negative, not finite, or do not add up to 1 in a row")
        # The mean over rows of sum p (log p - log mean); the second term depends on the mean row only.
        scores.append(np.exp(_p_log_p(rows).sum() / len(rows) - _p_log_p(rows.mean(0)).sum()))
    return float(np.mean(scores))


def _p_log_p(p):
    return p * np.log(np.where(p > 0, p, 1))


def precision_recall(
    reference: np.ndarray,
    sample: np.ndarray,
    k: int = 3,
    dtype: str = "fp16",
    device: Any = "cpu",
    tile: int = TILE,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """Precision and recall of features sample (N, D) against reference (M, D), from 0 to 1.

    Each point has a ball that reaches to the k-th nearest other point of its set. Precision is the share of samples in
    any ball of the reference; recall is the share of the reference in any ball of the samples.
    dtype: of the squared distances. "fp16" is the published way: it rounds as float16 does and computes a tile again
    in float32 if float16 overflows. "fp32" differs from published values by up to 0.0024.
    device: a torch.device or its name. tile: points per side of a tile of distances, which changes at most the last
    bits of a distance; halved, with a warning, if memory runs out.
    progress: called with the numbers of finished and of all tiles after each tile.
    Raises ValueError if shapes or values do not fit, or a set has at most k points.
    Source: Kynkäänniemi et al. 2019, algorithm 1.
    """
    reference, sample = _checked("reference", reference, k), _checked("sample", sample, k)
    _check_widths(reference, sample)
    if dtype not in ("fp16", "fp32"):
        raise ValueError(f"dtype {dtype!r} is neither 'fp16' nor 'fp32'")
    if k < 1 or tile < 1:
        raise ValueError(f"k is {k}, tile {tile}: at least 1 is needed")
    device, tile = torch.device(device), min(tile, max(len(reference), len(sample)))
    while True:
        try:
            with exact_float32():  # TF32 has only the digits of float16
                return _precision_recall(reference, sample, k, dtype == "fp16", device, tile, progress)
        except (MemoryError, RuntimeError) as error:
            if tile == 1 or not out_of_memory(error):
                raise
        # Outside the handler, because the error keeps the tensors of the failed attempt alive.
        tile //= 2
        warnings.warn(f"out of memory: going on with tiles of {tile} points", RuntimeWarning, stacklevel=2)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _checked(name, features, k):
    """`features` as an array. Raises ValueError if it cannot be used."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) <= k or not features.shape[1]:
        raise ValueError(f"{name} is {features.shape}: (N, D) is needed, N above {k}")
    # Both are NaN if any value is; neither needs memory.
    if not np.isfinite([features.min(), features.max()]).all():
        raise ValueError(f"{name} is not finite")
    return features


def _check_widths(reference, sample):
    if reference.shape[1] != sample.shape[1]:
        raise ValueError(f"reference has {reference.shape[1]} features a point, sample {sample.shape[1]}")


def _precision_recall(reference, sample, k, half, device, tile, progress):
    """Precision and recall, computed on `device` in tiles of `tile` points per side."""
    m, n = (-(-len(features) // tile) for features in (reference, sample))
    total, done = m * (m + 1) // 2 + n * (n + 1) // 2 + m * n, 0

    def finish_tile():
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    reference_radii = _squared_radii(reference, k, half, device, tile, finish_tile)
    sample_radii = _squared_radii(sample, k, half, device, tile, finish_tile)
    inside_sample = torch.zeros(len(reference), dtype=torch.bool, device=device)
    inside_reference = torch.zeros(len(sample), dtype=torch.bool, device=device)
    for rows, u in _tiles(reference, device, tile):
        for columns, v in _tiles(sample, device, tile):
            (distances,) = _squared_distances(u, v, half)
            inside_reference[columns] |= (distances <= reference_radii[rows, None]).any(0)
            inside_sample[rows] |= (distances <= sample_radii[columns]).any(1)
            finish_tile()
    return inside_reference.double().mean().item(), inside_sample.double().mean().item()


def _squared_radii(features, k, half, device, tile, finish_tile):
    """Squared distance of each point to its k-th nearest other point, float32 (N,) on `device`.

    This is order statistic k of its distances to all points, if the point itself is order statistic 0.
    """
    nearest = torch.full((len(features), k + 1), torch.inf, device=device)

    def merge(rows, distances):
        found = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], 1).topk(k + 1, largest=False).values

    for rows, u in _tiles(features, device, tile):
        # One product serves both directions of a pair of tiles, so earlier columns are done already.
        for columns, v in _tiles(features, device, tile, rows.start):
            distances, *transposed = _squared_distances(u, v, half, both=columns.start > rows.start)
            merge(rows, distances)
            for distances in transposed:
                merge(columns, distances)
            finish_tile()
    return nearest.amax(1)


def _tiles(features, device, tile, start=0):
    """Yield (slice, points) of `features` from point `start` on, `tile` points at a time, as float32 on `device`."""
    for first in range(start, len(features), tile):
        rows = slice(first, min(first + tile, len(features)))
        yield rows, torch.tensor(features[rows], dtype=torch.float32, device=device)


def _squared_distances(u, v, half, both=False):
    """Squared Euclidean distances of points u (M, D) and v (N, D): [float32 (M, N)], with `both` also (N, M).

    half: round values, norms, products and sums to float16, unless one of them overflows. Products add up in float32,
    as in hardware that multiplies float16; on a CPU this is also many times faster.
    """
    for dtype in (torch.float16, torch.float32) if half else (torch.float32,):
        u_values, v_values = (points.to(dtype).float() for points in (u, v))  # no copies in float32
        u_norms, v_norms = (values.square().sum(1).to(dtype) for values in (u_values, v_values))
        products = (u_values @ v_values.T).to(dtype)
        # From left to right: |u|^2 - 2 u.v is rounded before |v|^2 is added.
        distances = [torch.sub(u_norms[:, None], products, alpha=2).add_(v_norms)]
        if both:
            distances.append(torch.sub(v_norms[:, None], products.T.contiguous(), alpha=2).add_(u_norms))
        # Check before the clamp, which would turn minus infinity into 0. aminmax finds NaN and makes no copy.
        if dtype == torch.float32 or all(torch.stack(d.aminmax()).isfinite().all() for d in distances):
            break
    return [d.clamp_(min=0).float() for d in distances]
