"""devices.py: refusals. test_sampling.py and benchmarks/test_latency.py test how it computes."""

import pytest

from runtime import devices
from runtime.errors import UserError


def test_a_missing_device_is_refused():
    for name in ("cuda:63", "tpu", "meta", "meta:"):
        with pytest.raises(UserError, match="--device cpu"):
            devices.pick_device(name)
