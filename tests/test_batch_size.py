import time

import numpy as np
import pytest
from conftest import PixelEncoder

from clipindex.batch_size import LARGEST, SMALLEST, fastest_batch_size, noise


class Device(PixelEncoder):
    """A device with a cost for each call and for each image."""

    def __init__(self, call_s, image_s):
        super().__init__()
        self.call_s, self.image_s = call_s, image_s
        self.sizes = []

    def encode(self, images):
        self.sizes.append(len(images))
        time.sleep(self.call_s + self.image_s * len(images))


def test_it_grows_until_a_calls_cost_is_drowned():
    size, rate = fastest_batch_size(Device(call_s=0.01, image_s=0.0005))
    # Doubling pays while it brings 5 %: at 256 a call costs 7 % of its images, at 512 half of that.
    assert size in (128, 256, 512)
    assert rate == pytest.approx(size / (0.01 + 0.0005 * size), rel=0.2)


def test_it_stays_small_where_images_cost_all():
    assert fastest_batch_size(Device(call_s=0.0, image_s=0.01))[0] == SMALLEST


def test_it_ends_at_the_largest():
    device = Device(call_s=0.1, image_s=0.0)
    assert fastest_batch_size(device)[0] == LARGEST
    assert max(device.sizes) == LARGEST


def test_it_is_measured_on_noise_that_is_the_same_each_time():
    first, again = (noise(PixelEncoder(), 4) for _ in range(2))
    assert first.shape == (4, 32, 32, 3) and len(np.unique(first)) == 256
    np.testing.assert_array_equal(first, again)


def test_a_slow_device_is_not_measured_for_long():
    device = Device(call_s=1.1, image_s=0.0)
    fastest_batch_size(device)
    assert device.sizes == [SMALLEST] * 3
