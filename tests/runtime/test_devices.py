"""devices.py: what it refuses. How it computes is tested where it is used (test_sampling.py, test_latency.py)."""

import pytest

from runtime import devices
from runtime.errors import UserError


def test_an_absent_device_is_refused():
    for name in ("cuda:63", "tpu", "meta", "meta:"):
        with pytest.raises(UserError, match="--device cpu"):
            devices.pick_device(name)
