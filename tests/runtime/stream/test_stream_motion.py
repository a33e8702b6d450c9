"""The motion gate: still frames cost nothing, movement opens it, and it opens by itself in time."""
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.stream.motion import MotionGate


def yard(x=None, shape=(120, 160), noise=0, seed=0):
    "A gray image, with a bright square at `x`."
    image = np.full(shape + (3,), 90, np.int16)
    if noise: image += np.random.RandomState(seed).randint(-noise, noise + 1, image.shape)
    if x is not None: image[40:70, x:x + 30] = 220
    return image.clip(0, 255).astype(np.uint8)


def test_still_and_noisy_yard_is_only_looked_at_when_due():
    gate = MotionGate(hold_seconds=1, every_seconds=5)
    looked = [k / 10 for k in range(201) if gate(yard(noise=8, seed=k), k / 10)]
    assert [t for t in looked if t > 1] == [6, 11, 16]  # open for the first second, then every five


def test_never_by_itself_where_it_is_told_so():
    gate = MotionGate(hold_seconds=1, every_seconds=None)
    assert not any([gate(yard(), k / 10) for k in range(400)][11:])


def test_movement_opens_it_at_once_and_it_stays_open_for_the_hold():
    gate = MotionGate(hold_seconds=1, every_seconds=None)
    for k in range(50): gate(yard(), k / 10)
    opened = [gate(yard(4 * k), 5 + k / 10) for k in range(20)]
    assert all(opened)
    after = [gate(yard(), 7 + k / 10) for k in range(200)]
    assert all(after[:10]) and not any(after[100:])


def test_a_smaller_change_keeps_it_open_than_opens_it():
    small = yard()
    small[40:52, 40:52] = 220  # 144 of 19200 pixels and the blur around it
    shut = MotionGate(share=.015, hold_seconds=0, every_seconds=None)
    shut(yard(), 0)
    shut(yard(), 1)  # the first frame opens: nothing was known before it
    assert not shut(yard(), 2) and not shut(small, 3)
    held = MotionGate(share=.015, hold_seconds=0, every_seconds=None)
    held(yard(), 0)
    assert held(small, 1)  # as it was open


def test_another_size_begins_anew():
    gate = MotionGate(hold_seconds=0, every_seconds=None)
    gate(yard(), 0)
    gate(yard(), 1)
    assert not gate(yard(), 2)
    assert gate(yard(shape=(240, 160)), 3)


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.1}, {"share": float("nan")}, {"hold_seconds": -1},
                                   {"every_seconds": 0}, {"hold_seconds": float("nan")}])
def test_settings_out_of_range(wrong):
    with pytest.raises(InputError, match="motion: " + list(wrong)[0]): MotionGate(**wrong)
