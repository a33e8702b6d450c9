"""How long a training will take: measured, or guessed, and always said which."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_det.core import InputError
from jetson_det.models.zoo import MODELS
from jetson_det.train import speed as module
from jetson_det.train.speed import (CARDS, HERE, Speed, guess_speed, machine_of, measure_speed, speed_on,
                                    training_seconds, training_text)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_measurement_trains_the_network_of_that_name():
    speed = measure_speed("yolox-nano", (64, 64), ["a"], device="cpu", images=2)
    assert .1 < speed.images_per_second < 1e5 and "measured here (1 CPU thread) in" in speed.source
    assert measure_speed("yolox-nano", (64, 64), ["a"], device="cpu", patience=0).source.endswith("1 step of 2 images")


def test_without_torch_it_is_a_guess(monkeypatch):
    def missing(*_): raise ImportError("torch")
    monkeypatch.setattr(module, "measure_speed", missing)
    assert "a rough guess" in speed_on(HERE, "yolox-nano", (416, 416), ["a"]).source


def test_a_guess_says_that_it_is_one_and_follows_work_and_machine():
    for name in MODELS:
        found = [guess_speed(name, (640, 640), machine_of(m)) for m in ("1 core", "8 cores", *CARDS)]
        assert all("rough guess" in s.source and "not measured" in s.source for s in found)
        assert found[0].images_per_second < found[1].images_per_second < found[2].images_per_second
        half = guess_speed(name, (640, 320), machine_of("8 cores"))
        assert half.images_per_second == pytest.approx(2*found[1].images_per_second)
    nano = guess_speed("yolox-nano", (416, 416), machine_of("1 core")) # what the figure of a core is from
    assert nano.images_per_second == pytest.approx(22, rel=.03)


@pytest.mark.parametrize("text", ["8 cores", "8-cores", "8_Cores", " 8 CPUs", "8cores"])
def test_ways_to_write_a_machine(text): assert machine_of(text).label == "8 CPU cores"


@pytest.mark.parametrize("text", ["", "cores", "0 cores", "-1 cores", "1e3 cores", "rtx", "this machine"])
def test_unknown_machines_are_one_line(text):
    with pytest.raises(InputError, match="unknown machine .*such as 8-cores") as e: machine_of(text)
    assert "\n" not in str(e.value)


@given(speed=st.floats(.01, 1e5), epochs=st.integers(1, 300), images=st.integers(1, 200_000),
       val=st.integers(0, 50_000))
def test_the_words_are_those_of_the_figure(speed, epochs, images, val):
    s = Speed(speed, "measured")
    seconds = training_seconds(s, epochs, images, val)
    assert seconds >= epochs*images/speed
    number, unit = training_text(s, epochs, images, val).split(":")[0].removeprefix("about ").split()
    unit_seconds = {"minute": 60, "hour": 3600, "day": 86400}[unit.removesuffix("s")]
    assert abs(float(number)*unit_seconds - seconds) <= .51*unit_seconds or (number == "1" and seconds < 60)
