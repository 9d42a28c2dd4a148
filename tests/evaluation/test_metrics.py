"""Metrics against the original evaluator's results, closed forms, and NumPy in float64."""

import numpy as np
import pytest
import torch
from conftest import DATA

from evaluation import metrics
from evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    statistics,
)

DTYPES = pytest.mark.parametrize("dtype", ["fp16", "fp32"])


@pytest.fixture(scope="module")
def published():
    """Features and probabilities in evaluator_metrics.npz, and the original's results for them."""
    with np.load(DATA / "evaluator_metrics.npz") as arrays:
        return dict(arrays)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def fid(x, y):
    return frechet_distance(*statistics(x), *statistics(y))


# The original's results


def test_fid_and_sfid_equal_the_originals(published):
    assert fid(published["ref_pool"], published["sample_pool"]) == pytest.approx(published["fid"], rel=1e-6)
    assert fid(published["ref_spatial"], published["sample_spatial"]) == pytest.approx(published["sfid"], rel=1e-6)


def test_the_inception_score_equals_the_originals(published):
    split = int(published["inception_score_split"])
    assert len(published["probabilities"]) % split  # the last run is shorter
    score = inception_score(published["probabilities"], split)
    assert score == pytest.approx(published["inception_score"], rel=1e-6)


@DTYPES
def test_precision_and_recall_equal_the_originals(published, dtype):
    precision, recall = precision_recall(published["ref_pool"], published["sample_pool"], dtype=dtype)
    assert precision == pytest.approx(published["precision_fp16"], abs=0.005)
    assert recall == pytest.approx(published["recall_fp16"], abs=0.005)


# Statistics


def test_batches_of_any_size_add_up_even_far_from_zero():
    features = normal(1, 500, 6) + 1e6
    exact = np.cov(features - 1e6, rowvar=False)
    for batches in ([500], [1, 0, 499], [3] * 166 + [2]):
        moments = Moments()
        for batch in np.split(features, np.cumsum(batches)[:-1]):
            moments.add(batch)
        mu, sigma = moments.statistics()
        np.testing.assert_allclose(mu, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(sigma, exact, rtol=1e-8, atol=1e-9)  # the features have ten digits after the point
        assert mu.dtype == sigma.dtype == np.float64 and np.array_equal(sigma, sigma.T)


# FID


def test_fid_of_commuting_gaussians_is_the_closed_form():
    basis = np.linalg.qr(normal(0, 8, 8))[0]
    a, b = np.linspace(0.1, 3, 8), np.linspace(2, 0.5, 8)
    mu1, mu2 = normal(1, 8), normal(2, 8)
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    actual = frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_covariances_that_share_no_direction_have_no_root():
    a, b = np.repeat([2.0, 0], 4), np.repeat([0, 3.0], 4)
    for seed in range(50):  # in some bases no rounding error is below 0
        basis, mu = np.linalg.qr(normal(seed, 8, 8))[0], normal(1, 8)
        distance = frechet_distance(mu, (basis * a) @ basis.T, mu, (basis * b) @ basis.T)
        assert distance == pytest.approx(20, rel=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("share", [0.1, 1])
def test_rounding_errors_of_any_sign_count_as_zero(sign, share, monkeypatch):
    """Another LAPACK rounds in its own way: here all eigenvalues that should be 0 are below it, or all are above."""
    sizes = iter([3.0, 3.0 * 2 * np.sqrt(4)])  # of sigma1, and of sigma1 sigma2

    def rounded(values):
        noise = sign * share * np.finfo(np.float64).eps * next(sizes) * np.linspace(0.2, 1, len(values))
        return np.where(np.abs(values) < 1e-9, noise, values)

    eigh, eigvalsh = np.linalg.eigh, np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigh", lambda x: (rounded(eigh(x)[0]), eigh(x)[1]))
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda x: rounded(eigvalsh(x)))
    a, b = np.diag(np.repeat([3.0, 0], 4)), np.diag(np.repeat([0, 2.0], 4))  # no common direction: the root is 0
    assert frechet_distance(np.zeros(8), a, np.zeros(8), b) == pytest.approx(20, rel=1e-12)


@pytest.mark.parametrize("samples", [(300, 200), (20, 300), (30, 20), (2, 2)])
@pytest.mark.parametrize("smallest", [0, -4, -8])
def test_fid_agrees_with_the_singular_values_of_the_samples(samples, smallest):
    # With sigma = x' x / (n-1), the trace of the root is the sum of the singular values of x1 x2'.
    scale = np.logspace(0, smallest, 64)
    x, y = (normal(seed, count, 64) * scale for seed, count in enumerate(samples))
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    traces = sum(np.square(z).sum() for z in centred)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + traces
    expected -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    # With scales below 1e-4, some squared eigenvalues are lost in rounding: 3.0e-8 of the traces were measured.
    assert fid(x, y) == pytest.approx(expected, rel=0, abs=(5e-8 if smallest else 1e-12) * traces)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(mu1=np.zeros(4)), r"\(4,\), \(3, 3\)"),
        (dict(mu1=np.array([0, np.nan, 0])), "mu1 or mu2 is not finite"),
        (dict(sigma1=np.triu(np.ones((3, 3)))), "sigma1 is not symmetric"),
        (dict(sigma2=np.diag([1, -0.5, 1])), "sigma2 has a negative eigenvalue"),
    ],
)
def test_fid_refuses_what_is_not_a_distribution(change, words):
    arguments = dict(mu1=np.zeros(3), sigma1=np.eye(3), mu2=np.zeros(3), sigma2=np.eye(3)) | change
    with pytest.raises(ValueError, match=words):
        frechet_distance(**arguments)


# KID


@pytest.mark.parametrize(
    "subsets, size, expected",
    [(100, 50, (0.018815089053255657, 0.03540312019956868)), (7, 200, (0.020938029173392585, 0.008173320569946066))],
)
def test_kid_equals_torch_fidelitys(published, subsets, size, expected):
    """The expected values are printed by this, with torch-fidelity 0.4.0 and SUBSETS, SIZE of the test:

    python -c "import numpy as np, torch; from torch_fidelity.metric_kid import kid_features_to_metric as kid
    a = np.load('tests/data/evaluator_metrics.npz')
    sets = [torch.from_numpy(a[name]).double() for name in ('ref_pool', 'sample_pool')]
    print(kid(*sets, kid_subsets=SUBSETS, kid_subset_size=SIZE, verbose=False))"
    """
    distance = kernel_distance(published["ref_pool"], published["sample_pool"], subsets, size)
    assert distance == pytest.approx(expected, rel=1e-11)


def test_kid_of_two_points_is_that_of_the_kernel_by_hand():
    # D = 2: the kernel of (1, 0) and (0, 1) is 1; of (2, 2) and either of them (2 / 2 + 1)^3 = 8.
    x, y = np.eye(2), np.array([[2.0, 2.0], [2.0, 2.0]])
    within_x, within_y, between = 1, (8 / 2 + 1) ** 3, 8
    with pytest.warns(RuntimeWarning, match="subsets of 2 points"):
        mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(within_x + within_y - 2 * between, rel=1e-14) and std < 1e-12


def test_kid_draws_the_same_subsets_each_time_and_others_with_another_seed(published):
    sets = published["ref_pool"], published["sample_pool"]
    first, again, other = (kernel_distance(*sets, 5, 30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("bad", [np.zeros((1, 2)), np.zeros((5, 3)), np.full((5, 2), np.inf), np.zeros(5)])
def test_kid_refuses_unusable_features(bad):
    with pytest.raises(ValueError, match="sample"):
        kernel_distance(np.zeros((5, 2)), bad)


# Inception Score


def test_the_score_is_one_for_equal_rows_and_the_number_of_classes_for_certain_and_even_rows():
    row = np.array([0.5, 0.25, 0.25, 0])
    assert inception_score(np.tile(row, (30, 1)), 7) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.eye(7, 9).repeat(3, 0)) == pytest.approx(7, rel=1e-12)  # two classes never occur


@pytest.mark.parametrize("bad", [[[1.5, -0.5]], [[np.nan, 1]], [[0.5, 0.4]], [1.0], np.zeros((0, 3))])
def test_the_score_refuses_what_is_not_a_distribution(bad):
    with pytest.raises(ValueError, match="probabilities are"):
        inception_score(np.array(bad))


# Precision and recall


def brute_force(reference, sample, k):
    """Precision and recall from all differences in float64."""

    def distances(a, b):
        return np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)).sum(-1)

    reference_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (reference, sample))
    between = distances(reference, sample)
    return (between <= reference_radii[:, None]).any(0).mean(), (between <= sample_radii).any(1).mean()


def whole_numbers(seed, count, features=6):
    """Points with squared distances that are whole numbers and exact in float16."""
    return np.random.default_rng(seed).integers(-6, 7, (count, features)).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("tile", [7, 64, 1000])
def test_the_size_of_tiles_does_not_change_the_result(dtype, tile):
    reference, sample = whole_numbers(0, 50), whole_numbers(1, 64) + 1
    expected = brute_force(reference, sample, 3)
    assert 0 < min(expected) and max(expected) < 1
    assert precision_recall(reference, sample, dtype=dtype, tile=tile) == pytest.approx(expected, abs=1e-12)


def test_float16_rounds_norms_products_and_each_sum_from_left_to_right():
    # Whole numbers whose sums are exact in float32, and above 2048, from where float16 has only even numbers.
    u, v = 8 * whole_numbers(0, 30, 12) + whole_numbers(1, 30, 12), 7 * whole_numbers(2, 40, 12)
    (distances,) = metrics._squared_distances(torch.from_numpy(u), torch.from_numpy(v), True)
    u_norms, v_norms, products = (x.astype(np.float16) for x in (np.square(u).sum(1), np.square(v).sum(1), u @ v.T))
    expected = u_norms[:, None] - np.float16(2) * products + v_norms
    assert expected.dtype == np.float16 and distances.dtype == torch.float32
    assert np.array_equal(distances.numpy(), expected)
    assert (distances.numpy() != np.square(u[:, None] - v[None]).sum(-1)).mean() > 0.5


def test_tiles_that_overflow_float16_are_computed_in_float32():
    # The squared norm overflows above a norm of 256.
    reference, sample, shift = normal(0, 40, 8), normal(1, 50, 8), np.eye(8)[0] * 300
    half, single = (precision_recall(reference + shift, sample + shift, dtype=dtype) for dtype in ("fp16", "fp32"))
    assert half == single == pytest.approx(brute_force(reference, sample, 3), abs=0.06)
    near = torch.full((2, 3), 1.00001)
    assert metrics._squared_distances(near, torch.ones(2, 3), True)[0].abs().max() == 0  # other tiles keep float16


def test_if_memory_runs_out_smaller_tiles_are_tried(published, monkeypatch):
    sets = published["ref_pool"], published["sample_pool"]
    expected, plain, sizes = precision_recall(*sets), metrics._squared_distances, []

    def small_machine(u, v, *args, **kwargs):
        sizes.append(len(u))
        if len(u) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(u, v, *args, **kwargs)

    monkeypatch.setattr(metrics, "_squared_distances", small_machine)
    with pytest.warns(RuntimeWarning) as warned:
        assert precision_recall(*sets) == expected
    assert [str(w.message).split("with ")[1] for w in warned] == ["tiles of 250 points", "tiles of 125 points"]
    assert max(sizes) == 400 and sizes[:3] == [400, 250, 125]


@pytest.mark.parametrize("bad", [whole_numbers(0, 3), whole_numbers(0, 9, 5), np.full((9, 6), np.nan)])
def test_precision_and_recall_refuse_unusable_features(bad):
    with pytest.raises(ValueError, match="reference"):
        precision_recall(bad, whole_numbers(1, 9))


@pytest.mark.gpu
@DTYPES
def test_a_gpu_agrees_and_keeps_the_settings_of_torch(published, dtype):
    sets = published["ref_pool"], published["sample_pool"]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        result = precision_recall(*sets, dtype=dtype, device="cuda")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert result == pytest.approx(precision_recall(*sets, dtype=dtype), abs=0.005)
