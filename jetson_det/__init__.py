__version__ = "0.1.0"


def __getattr__(name):
    "The names of `jetson_det.front_door`, imported when they are used."
    from .front_door import front_door
    return front_door(name)


def __dir__():
    from .front_door import NAMES
    return sorted([*globals(), *NAMES])
