import torch

from runtime.noise import ImageNoise


def drawn(indices, **more):
    """The labels, the first noise and two further ones of the images `indices`."""
    draws = ImageNoise(3, indices, (4, 2, 2), 5, torch.device("cpu"), **more)
    assert torch.equal(draws.y, draws.labels)
    return draws.y, draws.z, draws.randn_like(draws.z), draws.randn_like(torch.cat([draws.z, draws.z]))


def test_an_image_draws_the_same_in_every_batch():
    y, z, first, second = drawn(range(10))
    assert torch.equal(second[:10], second[10:])  # both halves of a guidance batch
    for indices in ([7], [9, 2], range(4, 10)):
        y_again, z_again, first_again, second_again = drawn(indices)
        rows = list(indices)
        assert torch.equal(y_again, y[rows]) and torch.equal(z_again, z[rows])
        assert torch.equal(first_again, first[rows]) and torch.equal(second_again[: len(rows)], second[rows])


def test_draws_are_uniform_labels_and_independent_normal_noise():
    y, z, first, second = drawn(range(4000))
    counts = torch.bincount(y, minlength=5)
    assert counts.sum() == 4000 and ((counts - 800).abs() < 5 * 800**0.5).all()
    noise = torch.stack([z, first, second[:4000]]).flatten(2).double()
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5 and (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise.permute(0, 2, 1).flatten(0, 1))
    assert (correlation - torch.eye(48)).abs().max() < 6 / 4000**0.5
    other = ImageNoise(4, range(4000), (4, 2, 2), 5, torch.device("cpu"))
    assert (other.z * z).mean().abs() < 5 / z.numel() ** 0.5


def test_balanced_labels_take_turns_and_leave_the_noise_as_it_is():
    y, *noise = drawn(range(3, 15), balanced=True)
    assert y.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(noise, drawn(range(3, 15))[1:]))
