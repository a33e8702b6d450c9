"""`jetson-det` as a user calls it: a process of its own, with its own folder, environment, output and exit code.

Python and the packages that jetson_det stands on are not loaded each time: the process is forked from one in which they
are. Its own modules are loaded anew, by the verb. What is loaded before it is needed is tested where a fresh Python is
started: test_cli.py, test_words.py, test_preflight.py, test_front_door.py.
"""
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from train_helpers import forkserver


def _command(words, folder, environment, output, errors, file_limit):
    "In the process."
    if file_limit is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    for name in [n for n in sys.modules if n.split(".")[0] == "jetson_det"]: del sys.modules[name]
    sys.argv = ["jetson-det", *words]
    from jetson_det.cli import main
    sys.exit(main())


def run_command(
    *words, # of the command line, after `jetson-det`
    cwd=None, # the folder it is called in
    timeout=280, # seconds
    file_limit=None, # bytes that a file may have; a write beyond them fails as on a full disk
):
    "As subprocess.run with captured text."
    words = [str(w) for w in words]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)/"output"
        errors = Path(folder)/"errors"
        output.touch()
        errors.touch()
        process = forkserver().Process(target=_command,
                                       args=(words, cwd or os.getcwd(), dict(os.environ), output, errors, file_limit))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, output.read_text(), errors.read_text())
