"""An RTSP server with a moving test image in H.264: `/usr/bin/python3 rtsp_server.py PORT WIDTH HEIGHT FPS`.

It runs under Debian's own Python, which has GStreamer's bindings. PORT 0 takes a free one. It prints the port when it
listens, and runs until it is killed, or until its standard input closes.
"""
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer # noqa: E402


def main(port, width, height, fps):
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_shared(True)
    factory.set_launch(
        "( videotestsrc is-live=true pattern=ball ! video/x-raw,width={},height={},framerate={}/1 ! "
        "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=5 threads=1 ! "
        "rtph264pay name=pay0 pt=96 config-interval=1 )".format(width, height, fps))
    server.get_mount_points().add_factory("/test", factory)
    if not server.attach(None): sys.exit("port {} is in use".format(port))
    print(server.get_bound_port(), flush=True)
    loop = GLib.MainLoop()
    GLib.io_add_watch(sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IO_HUP, lambda *_: loop.quit())
    loop.run()


main(*sys.argv[1:])
