"""Every array of the original implementation's outputs, in float32: 2e-5 of the largest value."""

import pytest
import torch

from models import guided
from router import Router, router_loss
from sampling import sample_latents
from schedule import Schedule


def guidance_batch(reference):
    z, y = reference["z"], reference["y"]
    return torch.cat([z, z]), torch.cat([y, torch.full_like(y, reference.null)])


def sample(reference, schedule, ancestral):
    torch.manual_seed(7)
    scale = float(reference["cfg_scale"])
    return sample_latents(
        reference.dit, reference.diffusion, reference["z"], reference["y"], scale, schedule, ancestral
    )


def test_timesteps_and_betas(reference):
    assert torch.equal(torch.from_numpy(reference.diffusion.timestep_map), reference["timestep_map"])
    torch.testing.assert_close(torch.from_numpy(reference.diffusion.betas), reference["betas"], rtol=1e-12, atol=0)


def test_positions_are_those_of_the_checkpoint(reference):
    from models import position_table

    reference.assert_agrees(position_table(48, 4), "weights/pos_embed", 1e-6)


def test_forward_without_and_with_guidance(reference):
    x, y = guidance_batch(reference)
    t = reference["forward_t"].expand(len(y))
    reference.assert_agrees(reference.dit(x, t, y), "forward")
    reference.assert_agrees(guided(reference.dit(x, t, y), float(reference["cfg_scale"])), "forward_cfg")


@pytest.mark.parametrize("sampler", ["ddim", "ancestral_seed7"])
def test_sampling_without_router(reference, sampler):
    reference.assert_agrees(sample(reference, None, sampler != "ddim"), sampler)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral_seed7"])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_sampling_with_router(reference, sampler, threshold):
    schedule = reference.router.schedule(threshold)
    reference.assert_agrees(sample(reference, schedule, sampler != "ddim"), f"{sampler}_router_{threshold}")


def test_a_wrong_schedule_does_not_agree(reference):
    other = Schedule(reference.router.schedule(0.1).compute.flip(1))
    with pytest.raises(AssertionError, match="of the largest value"):
        reference.assert_agrees(sample(reference, other, False), "ddim_router_0.1")


@pytest.mark.parametrize("kind, threshold", [("soft", None), ("ste", 0.5)])
def test_training_loss_and_router_gradients(reference, kind, threshold):
    router = Router(20, 28)
    router.routers.load_state_dict({f"{i}.prob": row for i, row in enumerate(reference["router_logits"])})
    y = torch.where(reference["train_label_drop"], reference.null, reference["train_y"])
    i = int(reference["train_t"])
    scores = router(i - 1)
    mse = router_loss(
        reference.dit, reference.diffusion, scores, i, reference["train_x0"], y, reference["train_noise"], threshold
    )
    (mse.mean() + float(reference["train_l1_weight"]) * scores.sum()).backward()
    reference.assert_agrees(mse.detach(), f"train_{kind}_mse")
    assert scores.sum().item() == pytest.approx(float(reference[f"train_{kind}_l1"]), rel=1e-6)
    gradient = torch.stack([torch.zeros(56) if row.prob.grad is None else row.prob.grad for row in router.routers])
    reference.assert_agrees(gradient, f"train_{kind}_grad", 1e-4)
