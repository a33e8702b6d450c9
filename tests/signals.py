"""Ctrl-C for tests. Whoever starts them in the background (`make test &` in a script) has SIGINT ignored, and every
process that they start inherits that; a test that sends SIGINT says that it is to be heard."""
import signal
from contextlib import contextmanager


def hear_ctrl_c():
    "For `preexec_fn` of subprocess.Popen: the child is interrupted by SIGINT, however the tests were started."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def hearing_ctrl_c():
    "Within it this process is interrupted by SIGINT, however it was started."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try: yield
    finally: signal.signal(signal.SIGINT, before)
