"""metrics.py against the original evaluator's answers, closed forms, SciPy, and NumPy in float64."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import DATA, ROOT

from evaluation import metrics
from evaluation.metrics import Moments, frechet_distance, inception_score, precision_recall, statistics


@pytest.fixture(scope="module")
def published():
    """The arrays of evaluator_metrics.npz: features, probabilities, and what the original computes of them."""
    with np.load(DATA / "evaluator_metrics.npz") as arrays:
        return dict(arrays)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed, size, samples=None):
    x = normal(seed, samples or 3 * size, size)
    return np.cov(x * np.linspace(0.1, 2, size), rowvar=False)


def fid(one, two):
    return frechet_distance(*statistics(one), *statistics(two))


# What the original computes


def test_fid_and_sfid_are_the_originals(published):
    assert fid(published["ref_pool"], published["sample_pool"]) == pytest.approx(published["fid"], rel=1e-6)
    assert fid(published["ref_spatial"], published["sample_spatial"]) == pytest.approx(published["sfid"], rel=1e-6)


def test_the_inception_score_is_the_originals(published):
    split = int(published["inception_score_split"])
    assert len(published["probabilities"]) % split  # its last block is a partial one
    score = inception_score(published["probabilities"], split)
    assert score == pytest.approx(published["inception_score"], rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_precision_and_recall_are_the_originals(published, dtype):
    precision, recall = precision_recall(published["ref_pool"], published["sample_pool"], dtype=dtype)
    assert precision == pytest.approx(published["precision_fp16"], abs=0.005)
    assert recall == pytest.approx(published["recall_fp16"], abs=0.005)


# Statistics


@pytest.mark.parametrize("samples", [2, 7, 100])
def test_statistics_are_numpys_mean_and_covariance(samples, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)
    features = normal(0, samples, 9).astype(np.float32)
    mu, sigma = statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-12, atol=1e-12)
    assert np.array_equal(sigma, sigma.T)


def test_batches_of_any_size_are_one_set_even_far_from_zero():
    features = normal(1, 500, 6) + 1e6
    exact = np.cov(features - 1e6, rowvar=False)
    for batches in ([500], [1, 0, 499], [3] * 166 + [2]):
        moments = Moments()
        for batch in np.split(features, np.cumsum(batches)[:-1]):
            moments.add(batch)
        mu, sigma = moments.statistics()
        assert moments.count == 500
        np.testing.assert_allclose(mu, features.mean(0), rtol=1e-14)
        # The features themselves have ten digits after the point.
        np.testing.assert_allclose(sigma, exact, rtol=1e-8, atol=1e-9)


def test_what_was_returned_does_not_change_with_later_batches():
    moments = Moments()
    moments.add(normal(2, 5, 3))
    mu, sigma = moments.statistics()
    kept = mu.copy(), sigma.copy()
    moments.add(normal(3, 5, 3))
    assert np.array_equal(mu, kept[0]) and np.array_equal(sigma, kept[1])


def test_a_batch_that_is_refused_is_not_taken_in():
    moments = Moments()
    moments.add(normal(4, 5, 3))
    before = moments.statistics()
    for bad in (np.full((2, 3), np.nan), np.array([[np.inf, 0, 0], [-np.inf, 0, 0]]), normal(5, 2, 4), normal(5, 3)):
        with pytest.raises(ValueError, match="features are"):
            moments.add(bad)
    assert all(np.array_equal(*pair) for pair in zip(before, moments.statistics()))


@pytest.mark.parametrize("samples", [0, 1])
def test_fewer_than_two_samples_have_no_covariance(samples):
    with pytest.raises(ValueError, match=f"{samples} features have no covariance"):
        statistics(np.zeros((samples, 4)))


# FID


def test_fid_of_commuting_gaussians_is_the_closed_form():
    basis = np.linalg.qr(normal(0, 8, 8))[0]
    a, b = np.linspace(0.1, 3, 8), np.linspace(2, 0.5, 8)
    mu1, mu2 = normal(1, 8), normal(2, 8)
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    actual = frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_fid_in_one_dimension_is_the_closed_form():
    assert frechet_distance([1.0], [[4.0]], [3.5], [[9.0]]) == pytest.approx(2.5**2 + (2 - 3) ** 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_fid_of_any_two_gaussians_of_the_plane_is_the_closed_form(seed):
    one, two = covariance(seed, 2), covariance(seed + 10, 2)
    # The roots r, s of the eigenvalues of the product: (r + s)^2 = r^2 + s^2 + 2 rs.
    root = np.sqrt(np.trace(one @ two) + 2 * np.sqrt(np.linalg.det(one) * np.linalg.det(two)))
    expected = np.trace(one) + np.trace(two) - 2 * root
    assert frechet_distance(np.zeros(2), one, np.zeros(2), two) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("samples", [(300, 200), (300, 20), (20, 300), (30, 20)])
def test_fid_agrees_with_the_matrix_square_root(samples):
    sigmas = [covariance(seed, 64, count) for seed, count in enumerate(samples)]
    root = scipy.linalg.sqrtm(sigmas[0] @ sigmas[1])
    expected = np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * np.trace(root).real
    assert frechet_distance(np.zeros(64), sigmas[0], np.zeros(64), sigmas[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("samples", [(300, 200), (20, 300), (30, 20), (2, 2)])
@pytest.mark.parametrize("smallest", [0, -4, -8])
def test_fid_agrees_with_the_singular_values_of_the_samples(samples, smallest):
    # With sigma = x' x / (n-1) the trace of the root is the sum of the singular values of x1 x2', without any root.
    scale = np.logspace(0, smallest, 64)
    one, two = (normal(seed, count, 64) * scale for seed, count in enumerate(samples))
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, two)]
    traces = sum(np.square(x).sum() for x in centred)
    expected = np.square(one.mean(0) - two.mean(0)).sum() + traces
    expected -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    # Scales of 1e-4 and less make squares of eigenvalues that are no more than rounding: of these the root is lost. How
    # many those are is up to the processor: 2.0e-8, 1.8e-8 and 1.1e-8 of the traces with OPENBLAS_CORETYPE=Haswell,
    # Prescott and Sandybridge, the same with one thread and two.
    assert fid(one, two) == pytest.approx(expected, rel=0, abs=(5e-8 if smallest else 1e-12) * traces)


@pytest.mark.parametrize("samples", [400, 20])
def test_fid_of_a_set_and_itself_is_zero(samples, published):
    features = published["ref_pool"][:samples]
    assert abs(fid(features, features)) < 1e-6
    assert abs(fid(1000 * features, 1000 * features)) < 1e-6


def test_covariances_that_share_no_direction_have_no_root():
    basis = np.linalg.qr(normal(0, 8, 8))[0]
    one, two = ((basis * scale) @ basis.T for scale in (np.repeat([2.0, 0], 4), np.repeat([0, 3.0], 4)))
    assert frechet_distance(np.zeros(8), one, np.zeros(8), two) == pytest.approx(4 * 2 + 4 * 3, rel=1e-12)


def test_fid_is_the_same_both_ways_round():
    one, two = covariance(3, 16), covariance(4, 16, 9)
    there = frechet_distance(np.zeros(16), one, np.ones(16), two)
    assert frechet_distance(np.ones(16), two, np.zeros(16), one) == pytest.approx(there, rel=1e-12)


def test_covariances_of_constant_features_and_in_float32_work():
    sigma, mu = covariance(0, 12), np.zeros(12)
    assert frechet_distance(mu, np.zeros((12, 12)), mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-12)
    assert frechet_distance(mu, np.zeros((12, 12)), mu + 1, np.zeros((12, 12))) == pytest.approx(12, rel=1e-12)
    low = covariance(1, 12, 5).astype(np.float32)  # rounding leaves negative eigenvalues
    assert np.linalg.eigvalsh(low.astype(np.float64))[0] < 0
    exact = frechet_distance(mu, sigma, mu, covariance(1, 12, 5))
    assert frechet_distance(mu, sigma, mu, low) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(mu1=np.zeros(4)), r"\(4,\), \(3, 3\)"),
        (dict(mu2=np.zeros((3, 1))), r"\(3, 1\)"),
        (dict(sigma2=np.eye(4)), r"\(4, 4\)"),
        (dict(mu1=np.zeros(0), sigma1=np.eye(0), mu2=np.zeros(0), sigma2=np.eye(0)), r"\(0,\)"),
        (dict(mu1=np.array([0, np.nan, 0])), "mu1 or mu2 is not finite"),
        (dict(mu2=np.array([0, np.inf, 0])), "mu1 or mu2 is not finite"),
        (dict(sigma1=np.full((3, 3), np.nan)), "sigma1 is not finite"),
        (dict(sigma2=np.diag([1, np.inf, 1])), "sigma2 is not finite"),
        (dict(sigma1=np.triu(np.ones((3, 3)))), "sigma1 is not symmetric"),
        (dict(sigma2=np.diag([1, -0.5, 1])), "sigma2 has a negative eigenvalue"),
        (dict(sigma1=np.diag([1, -0.5, 1])), "sigma1 has a negative eigenvalue"),
        (dict(sigma2=-np.eye(3)), "sigma2 has a negative eigenvalue"),
    ],
)
def test_what_is_no_distribution_is_refused(change, words):
    arguments = dict(mu1=np.zeros(3), sigma1=np.eye(3), mu2=np.zeros(3), sigma2=np.eye(3)) | change
    with pytest.raises(ValueError, match=words):
        frechet_distance(**arguments)


# Inception Score


def test_the_score_of_rows_that_are_alike_is_one():
    assert inception_score(np.full((30, 7), 1 / 7)) == pytest.approx(1, rel=1e-12)
    row = np.array([0.5, 0.25, 0.25, 0])
    assert inception_score(np.tile(row, (30, 1)), 7) == pytest.approx(1, rel=1e-12)


def test_the_score_of_certain_and_even_rows_is_the_number_of_classes():
    assert inception_score(np.eye(7).repeat(3, 0)) == pytest.approx(7, rel=1e-12)
    assert inception_score(np.eye(7, 9)) == pytest.approx(7, rel=1e-12)  # two classes that no row has


def test_a_partial_block_counts_in_full_and_the_order_matters():
    rows = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    assert inception_score(rows, 4) == pytest.approx((4 + 2) / 2, rel=1e-12)
    assert inception_score(rows, 5) == pytest.approx((np.exp(-0.4 * np.log(0.4) - 0.6 * np.log(0.2)) + 1) / 2)
    assert inception_score(rows[[0, 4, 1, 5, 2, 3]], 2) == pytest.approx((1 + 1 + 2) / 3, rel=1e-12)


def test_the_score_is_its_definition():
    p = np.random.default_rng(0).dirichlet(np.full(11, 0.3), 50)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert inception_score(p) == pytest.approx(expected, rel=1e-12)
    assert inception_score(p.astype(np.float16)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "bad", [[[1.5, -0.5]], [[np.nan, 1]], [[np.inf, 0]], [[0.5, 0.4]], [[3.0, 2.0]], [1.0], np.zeros((0, 3))]
)
def test_what_is_no_distribution_over_classes_is_refused(bad):
    with pytest.raises(ValueError, match="probabilities are"):
        inception_score(np.array(bad))


def test_blocks_without_rows_are_refused():
    with pytest.raises(ValueError, match="blocks have 0 rows"):
        inception_score(np.eye(2), 0)


# Precision and recall


def brute_force(reference, sample, k):
    """(precision, recall) from all differences in float64."""

    def distances(a, b):
        return np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)).sum(-1)

    reference_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (reference, sample))
    between = distances(reference, sample)
    return (between <= reference_radii[:, None]).any(0).mean(), (between <= sample_radii).any(1).mean()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_precision_and_recall_of_points_on_a_line_counted_by_hand(dtype):
    # k = 1: the reference's balls are 0+-1, 1+-1, 10+-9, the samples' 2+-2, 4+-2, 30+-26.
    reference, sample = (np.array(points, np.float32)[:, None] for points in ([0, 1, 10], [2, 4, 30]))
    # 2 is in the ball of 1 by its edge, 4 in that of 10, 30 in none; 0 in the ball of 2 by its edge, 1 and 10 too.
    assert precision_recall(reference, sample, 1, dtype) == (pytest.approx(2 / 3), 1)
    assert precision_recall(sample, reference, 1, dtype) == (1, pytest.approx(2 / 3))
    assert precision_recall(reference, sample + 100, 1, dtype) == (0, 0)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_radius_reaches_to_the_third_other_point(dtype):
    # The ball of 0 is 0+-3, that of 7 is 7+-6. Samples that are far from each other have large balls.
    reference = np.array([0, 1, 2, 3, 7], np.float32)[:, None]
    for at, inside in ((-3, 1), (-3.25, 0), (13, 1), (13.25, 0)):
        sample = np.array([at, 50, 60, 70], np.float32)[:, None]
        assert precision_recall(reference, sample, dtype=dtype) == (inside / 4, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_float32_agrees_with_brute_force(seed, k):
    reference, sample = normal(seed, 60, 5), 0.8 * normal(seed + 100, 75, 5) + 0.5
    expected = brute_force(reference.astype(np.float32), sample.astype(np.float32), k)
    assert 0 < min(expected) and max(expected) < 1
    assert precision_recall(reference, sample, k, "fp32", block=32) == pytest.approx(expected, abs=1e-12)


def whole_numbers(seed, count, features=6):
    """Points whose distances are whole numbers that float16 holds, so that no order of adding rounds anything."""
    return np.random.default_rng(seed).integers(-6, 7, (count, features)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("block", [1, 2, 7, 50, 64, 1000])
def test_any_block_size_gives_the_same_result(dtype, block):
    reference, sample = whole_numbers(0, 50), whole_numbers(1, 64) + 1
    expected = brute_force(reference, sample, 3)
    assert 0 < min(expected) and max(expected) < 1
    assert precision_recall(reference, sample, dtype=dtype, block=block) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_block_sizes_do_not_change_precision_and_recall_of_features(published, dtype):
    sets = published["ref_pool"], published["sample_pool"]
    whole = precision_recall(*sets, dtype=dtype)
    for block in (64, 100, 399):
        assert precision_recall(*sets, dtype=dtype, block=block) == pytest.approx(whole, abs=1e-12)


def test_the_reference_against_itself_is_perfect(published):
    for block in (100, 2048):
        assert precision_recall(published["ref_pool"], published["ref_pool"], dtype="fp32", block=block) == (1, 1)


def test_float16_rounds_the_norms_the_products_and_each_sum_from_left_to_right():
    # Whole numbers whose sums are exact in float32, and above 2048, where float16 holds even numbers alone.
    u, v = 8 * whole_numbers(0, 30, 12) + whole_numbers(1, 30, 12), 7 * whole_numbers(2, 40, 12)
    (distances,) = metrics._squared_distances(torch.from_numpy(u), torch.from_numpy(v), True)
    (exact,) = metrics._squared_distances(torch.from_numpy(u), torch.from_numpy(v), False)
    u_norms, v_norms, products = (x.astype(np.float16) for x in (np.square(u).sum(1), np.square(v).sum(1), u @ v.T))
    expected = u_norms[:, None] - np.float16(2) * products + v_norms
    assert expected.dtype == np.float16 and distances.dtype == torch.float32
    assert np.array_equal(distances.numpy(), expected)
    assert np.array_equal(exact.numpy(), np.square(u[:, None] - v[None]).sum(-1))
    assert (distances != exact).float().mean() > 0.5


def test_the_two_directions_of_a_pair_of_blocks_are_those_of_the_pair_turned_round():
    u, v = (torch.from_numpy(normal(seed, count, 12)).float() for seed, count in ((0, 9), (1, 5)))
    for half in (True, False):
        there, back = metrics._squared_distances(u, v, half, both=True)
        (turned,) = metrics._squared_distances(v, u, half)
        assert there.shape == (9, 5) and back.shape == (5, 9)
        torch.testing.assert_close(back, turned, rtol=2e-3 if half else 1e-5, atol=0)


@pytest.mark.parametrize("scale", [300, 1e5])
def test_what_float16_cannot_hold_is_computed_in_float32(scale):
    # The squared norm overflows from a norm of 256 on, the values themselves from 65520 on.
    reference, sample = (normal(seed, count, 8) for seed, count in ((0, 40), (1, 50)))
    expected = brute_force(reference, sample, 3)
    shift = np.zeros(8)
    shift[0] = scale
    half = precision_recall(reference + shift, sample + shift, dtype="fp16")
    assert half == precision_recall(reference + shift, sample + shift, dtype="fp32")
    if scale < 1e5:  # float32 still tells the points apart
        assert half == pytest.approx(expected, abs=0.06)


def test_only_blocks_that_overflow_are_computed_again():
    near, far = torch.zeros(2, 3), torch.full((2, 3), 200.0)
    far[1, 0] = 200.01
    near_near, far_far = (metrics._squared_distances(x, x, True)[0] for x in (near + 1.00001, far))
    assert near_near.abs().max() == 0  # float16 does not tell them apart
    assert far_far[0, 1] == metrics._squared_distances(far, far, False)[0][0, 1]


def test_points_that_are_all_alike_are_inside():
    alike = np.ones((9, 4), np.float32)
    for dtype in ("fp16", "fp32"):
        assert precision_recall(alike, alike[:5], dtype=dtype) == (1, 1)


def test_other_types_of_features_and_memory_that_cannot_be_written_work_without_a_warning(published):
    reference, sample = published["ref_pool"].copy(), published["sample_pool"].copy()
    expected = precision_recall(reference, sample)
    reference.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            precision_recall(reference, np.asfortranarray(sample, np.float64), device=torch.device("cpu")) == expected
        )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_without_memory_smaller_blocks_are_tried_and_said(error, published, monkeypatch):
    sets = published["ref_pool"], published["sample_pool"]
    expected, plain, sizes = precision_recall(*sets), metrics._squared_distances, []

    def small_machine(u, v, *args, **kwargs):
        sizes.append(len(u))
        if len(u) > 150:
            raise error
        return plain(u, v, *args, **kwargs)

    monkeypatch.setattr(metrics, "_squared_distances", small_machine)
    with pytest.warns(RuntimeWarning) as warned:
        assert precision_recall(*sets) == expected
    blocks = [f"out of memory: going on with blocks of {block} points" for block in (250, 125)]
    assert [str(one.message) for one in warned] == blocks
    assert max(sizes) == 400 and sizes[0] == 400 and sizes[1] == 250 and sizes[2] == 125


def test_an_error_that_is_not_about_memory_or_that_no_block_avoids_is_raised(monkeypatch):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(metrics, "_squared_distances", broken)
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        precision_recall(whole_numbers(0, 9), whole_numbers(1, 9))
    error = MemoryError()
    with warnings.catch_warnings(), pytest.raises(MemoryError):
        warnings.simplefilter("ignore")
        precision_recall(whole_numbers(0, 9), whole_numbers(1, 9))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(reference=whole_numbers(0, 3)), r"reference is \(3, 6\): .* N above k = 3"),
        (dict(sample=whole_numbers(0, 3)), "sample is"),
        (dict(sample=np.zeros(9)), r"sample is \(9,\)"),
        (dict(sample=np.zeros((9, 0))), r"sample is \(9, 0\)"),
        (dict(sample=whole_numbers(0, 9, 5)), "reference has 6 features a point, sample 5"),
        (dict(reference=np.full((9, 6), np.nan)), "reference is not finite"),
        (dict(sample=np.full((9, 6), -np.inf)), "sample is not finite"),
        (dict(dtype="bf16"), "'bf16' is neither"),
        (dict(k=0), "k is 0"),
        (dict(block=0), "block 0"),
    ],
)
def test_what_has_no_precision_and_recall_is_refused(change, words):
    arguments = dict(reference=whole_numbers(0, 9), sample=whole_numbers(1, 9)) | change
    with pytest.raises(ValueError, match=words):
        precision_recall(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_gpu_agrees_and_leaves_the_settings_of_torch(published, dtype, monkeypatch):
    sets = published["ref_pool"], published["sample_pool"]
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    result = precision_recall(*sets, dtype=dtype, device="cuda")
    assert result == pytest.approx(precision_recall(*sets, dtype=dtype), abs=0.005)
    assert torch.backends.cuda.matmul.allow_tf32


def test_importing_metrics_imports_no_torch():
    program = "import sys, numpy as np, metrics; metrics.inception_score(np.eye(3)); "
    program += "metrics.frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2)); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr


def test_progress_counts_every_block_of_distances():
    # Blocks of 4: 3 and 5 of them; 6 and 15 pairs for the radii of the sets, 15 between them.
    calls = []
    precision_recall(normal(0, 10, 3), normal(1, 19, 3), block=4, progress=lambda *call: calls.append(call))
    assert calls == [(done, 36) for done in range(1, 37)]
