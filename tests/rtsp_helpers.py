"A real RTSP server for the tests, that can be cut, stopped and restored."
import os
import signal
import subprocess
from pathlib import Path

import pytest

PYTHON = "/usr/bin/python3" # Debian's, which has GStreamer's bindings
PROGRAM = Path(__file__).parent / "rtsp_server.py"
BINDINGS = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


def quiet_call(*command):
    "The exit code."
    return subprocess.call(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def needs_rtsp_server():
    "Skip where there is no server."
    if not os.path.exists(PYTHON) or quiet_call(PYTHON, "-c", BINDINGS):
        pytest.skip("no RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-ugly")


class RtspServer:
    "Within it a camera at `url`."
    def __init__(self, size=(48, 64), fps=25):
        self.port = 0
        self.process = None
        self.fps = fps
        self.start(size)

    def start(self, size):
        "Start it, on the port that it had."
        command = [PYTHON, str(PROGRAM), str(self.port), str(size[1]), str(size[0]), str(self.fps)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.port = int(self.process.stdout.readline())
        self.url = "rtsp://admin:secret@127.0.0.1:{}/test".format(self.port)

    def cut(self):
        "End it as a power failure would."
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def stop(self): self.process.send_signal(signal.SIGSTOP)
    def go_on(self): self.process.send_signal(signal.SIGCONT)
    def __enter__(self): return self
    def __exit__(self, *_): self.cut()
