from conftest import random_dit

from runtime.hashes import fingerprint


def test_the_hash_of_a_model_follows_every_weight_and_its_configuration():
    one, config = random_dit(), {"depth": 3}
    first = fingerprint(one, config)
    assert first == fingerprint(random_dit(), config) and len(first) == 64
    assert first != fingerprint(one, {"depth": 4})
    one.blocks[1].mlp.fc2.weight[5, 7] += 1e-6
    assert first != fingerprint(one, config)
