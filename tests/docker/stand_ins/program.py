"""Stands in for the program of a bundle: notes how it is called; `build` takes a while and writes an engine.

$LOG: the notes. $BUILD_SECONDS: how long a build takes. $BUILD_END: an exit code, or KILL."""
import os
import signal
import sys
import time

home = os.path.dirname(os.path.realpath(sys.argv[0]))
engine = os.path.join(home, "model.engine")


def note(text):
    with open(os.environ["LOG"], "a") as log: log.write("{} {}\n".format(os.getpid(), text))


def end(number, frame):
    note("got signal {}".format(number))
    sys.exit(0)


def build():
    note(" ".join(["builds"] + sys.argv[4:])) # after build --timing-cache FILE
    with open(engine + ".part", "wb") as f: f.write(b"half")
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    ending = os.environ.get("BUILD_END", "0")
    if ending == "KILL": os.kill(os.getpid(), signal.SIGKILL)
    if ending != "0":
        sys.stderr.write("error: the build stops here\n")
        sys.exit(int(ending))
    with open(os.path.join(home, "model.onnx"), "rb") as f: model = f.read()
    with open(engine + ".part", "wb") as f: f.write(b"engine of " + model)
    os.rename(engine + ".part", engine)
    with open(sys.argv[sys.argv.index("--timing-cache") + 1], "wb") as f: f.write(b"timings")
    note("built")


signal.signal(signal.SIGTERM, end)
if sys.argv[1:2] == ["build"]: build()
else:
    which = "without an engine"
    if os.path.exists(engine):
        with open(engine, "rb") as f: which = f.read().decode()
    note("runs {} {}".format(" ".join(sys.argv[1:]), which))
    if sys.argv[1:2] == ["watch"]: time.sleep(20)
