"""The watchdog as systemd, Docker and a terminal meet it: real datagram sockets, processes that hang and refuse."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops import watchdog as module
from jetson_det.runtime.ops.watchdog import HealthFile, Systemd, Watchdog, healthy, supervise

LONG = 20 # seconds, for what takes a moment on a quiet machine


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    "A socket as systemd opens it, and what its service has in the environment."
    name = str(tmp_path / "notify") if request.param == "path" else "@jetson-det-{}".format(os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name.startswith("@") else name)
        listener.settimeout(LONG)
        yield listener, {"NOTIFY_SOCKET": name}


def messages(listener, seconds):
    "What comes in this time."
    end = time.monotonic() + seconds
    found = []
    while time.monotonic() < end:
        listener.settimeout(max(end - time.monotonic(), .001))
        try: found.append(listener.recv(4096).decode())
        except socket.timeout: break
    return found


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_it_is_fed_while_frames_come_and_not_after(manager):
    listener, environ = manager
    watchdog = Watchdog(.3, Systemd(dict(environ, WATCHDOG_USEC="100000", WATCHDOG_PID=str(os.getpid()))))
    for _ in range(8):
        watchdog.write()
        time.sleep(.05)
    running = messages(listener, .05)
    assert running[0].split("\n")[0] == "READY=1"
    assert sum("WATCHDOG=1" in text for text in running) >= 2 # each .05 s for .4 s
    assert sum("READY=1" in text for text in running) == 1
    assert "STATUS=8 frames" in messages(listener, .15)[-1]
    time.sleep(.35)
    messages(listener, .001)
    assert not any("WATCHDOG=1" in text for text in messages(listener, .2)) # it hangs: systemd would kill it now
    watchdog.write()
    assert any("WATCHDOG=1" in text for text in messages(listener, .2)) # and it went on
    watchdog.close()
    assert "STOPPING=1" in messages(listener, .1)[-1].split("\n")
    assert not messages(listener, .15) and not watchdog._thread.is_alive()


def test_without_a_watchdog_in_the_unit_only_the_states_are_told(manager):
    listener, environ = manager
    for more in ({}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}):
        watchdog = Watchdog(1, Systemd(dict(environ, **more)))
        watchdog.write()
        watchdog.close()
        assert watchdog._thread is None
        assert [text.split("\n")[0] for text in messages(listener, .02)] == ["READY=1", "STOPPING=1"]


def test_a_socket_that_is_gone_stops_nothing(tmp_path):
    systemd = Systemd({"NOTIFY_SOCKET": str(tmp_path / "none"), "WATCHDOG_USEC": "20000"})
    watchdog = Watchdog(1, systemd)
    watchdog.write()
    time.sleep(.05)
    watchdog.close()
    assert watchdog.frames == 1 and "No such file" in systemd.problem
    assert Systemd({"NOTIFY_SOCKET": "vsock:2:1"}).address is None
    assert Systemd({}).tell("READY=1") is False
    with pytest.raises(InputError, match="over 0"): Watchdog(0)


def test_a_status_is_one_line(manager):
    listener, environ = manager
    assert Systemd(environ).tell("STATUS=a\nWATCHDOG=1")
    assert messages(listener, .05) == ["STATUS=a\\nWATCHDOG=1"]


def test_health_file(tmp_path, capsys):
    path = tmp_path / "health.json"
    assert healthy(path).exit_code == 1 and "no frame yet" in healthy(path).text
    health = HealthFile(path, every=.2)
    for _ in range(5): health.write()
    assert json.loads(path.read_text())["frames"] == 1 # not with each frame
    time.sleep(.25)
    health.write()
    assert json.loads(path.read_text())["frames"] == 6
    assert healthy(path, 5).exit_code == 0
    time.sleep(.1)
    assert healthy(path, .05).exit_code == 1 and "the limit is 0.05 s" in healthy(path, .05).text
    health.close()
    assert os.listdir(str(tmp_path)) == ["health.json"]
    with pytest.raises(InputError, match="no such folder"): HealthFile(tmp_path / "none" / "health.json")
    for limit in (0, -1, float("nan")):
        with pytest.raises(InputError, match="over 0"): healthy(path, limit)


def test_a_clock_that_jumps_changes_nothing_since_this_start(tmp_path):
    "A Jetson without a battery begins in the past, and its clock jumps when the network comes."
    path = tmp_path / "health.json"
    HealthFile(path).write()
    row = json.loads(path.read_text())
    path.write_text(json.dumps(dict(row, time=row["time"] - 1e8)))
    assert healthy(path, 5).ok
    path.write_text(json.dumps(dict(row, boot="another", time=row["time"] - 100))) # before the last start
    assert not healthy(path, 5).ok and healthy(path, 200).ok
    path.write_text(json.dumps(dict(row, boot="another", time=row["time"] + 1e8)))
    assert "from the future" in healthy(path, 5).text and not healthy(path, 5).ok


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"boot": 1, "monotonic": []}', "\xff", "1" * 5000,
                                  '{"boot": "", "time": "x"}'])
def test_of_any_other_file_its_time_counts(tmp_path, text):
    path = tmp_path / "found.jsonl"
    path.write_bytes(text.encode("latin-1"))
    assert healthy(path, 5).ok
    os.utime(str(path), (time.time() - 60, time.time() - 60))
    assert not healthy(path, 5).ok


def test_a_disk_that_refuses_is_said_once(tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    health = HealthFile(folder / "health.json", every=0)
    folder.rmdir()
    for _ in range(3): health.write()
    assert health.failed == 3 and health.frames == 3
    assert capsys.readouterr().err.count("can't be written") == 1


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "health.json"
    health = HealthFile(path, every=0)
    health.write()
    ended = threading.Event()

    def write():
        while not ended.is_set(): health.write()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while health.frames < 200: assert "monotonic" in json.loads(path.read_text())
    finally:
        ended.set()
        writer.join()
    assert not health.failed


def run_script(text, *words):
    return [sys.executable, "-c", text] + [str(word) for word in words]


def test_back_off_doubles_and_ends(tmp_path, capfd):
    log = tmp_path / "log"
    failing = run_script("import sys,time; open(sys.argv[1],'a').write('%f\\n'%time.time()); sys.exit(3)", log)
    assert supervise(failing, failures=4, minutes=1, first_wait=.1, longest_wait=.2) == 1
    times = [float(line) for line in log.read_text().split()]
    waits = [b - a for a, b in zip(times, times[1:])]
    assert len(times) == 4 and all(wait > least for wait, least in zip(waits, (.1, .2, .2)))
    lines = capfd.readouterr().err.splitlines()
    assert [line.rpartition(" in ")[2] for line in lines[:3]] == ["0.1 s", "0.2 s", "0.2 s"]
    assert lines[3].startswith("error: ") and lines[3].endswith("given up") and "exit code 3" in lines[3]
    assert "4 times in 1 minutes" in lines[3]


def test_failures_of_long_ago_do_not_count(tmp_path):
    log = tmp_path / "log"
    text = "import sys; f=open(sys.argv[1],'a+'); f.write('x'); f.seek(0); sys.exit(len(f.read()) < 5)"
    fifth = run_script(text, log)
    assert supervise(fifth, failures=3, minutes=.25 / 60, first_wait=.2, longest_wait=.2) == 0
    assert log.read_text() == "x" * 5


def test_a_killed_child_is_started_again(tmp_path, capfd):
    log = tmp_path / "log"
    killed = "import os,sys; f=open(sys.argv[1],'a+'); f.write('x'); f.flush(); f.seek(0)\n" \
             "if len(f.read()) < 2: os.kill(os.getpid(), 9)"
    assert supervise(run_script(killed, log), first_wait=.05) == 0
    assert "ended by SIGKILL" in capfd.readouterr().err


def hanging(tmp_path):
    "Gives two frames, starts a child of its own, and hangs; hears no SIGTERM."
    text = ("import os,signal,subprocess,sys,time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "child = subprocess.Popen(['sleep', '300'])\n"
            "open(sys.argv[2], 'a').write('%d %d ' % (os.getpid(), child.pid))\n"
            "for _ in range(2):\n    open(sys.argv[1], 'w').close()\n    time.sleep(.05)\n"
            "time.sleep(300)")
    return run_script(text, tmp_path / "beat", tmp_path / "pids")


def is_gone(pid):
    try: os.kill(int(pid), 0)
    except ProcessLookupError: return True
    try:
        with open("/proc/{}/stat".format(pid)) as f: return f.read().rpartition(")")[2].split()[0] == "Z"
    except OSError: return True


def test_a_hung_child_and_its_children_are_killed(tmp_path, capfd):
    start = time.monotonic()
    assert supervise(hanging(tmp_path), tmp_path / "beat", seconds=.3, failures=1, grace=.2) == 1
    assert time.monotonic() - start < LONG
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    end = time.monotonic() + LONG
    while not all(map(is_gone, pids)) and time.monotonic() < end: time.sleep(.02)
    assert all(map(is_gone, pids))
    assert "because no frames came" in capfd.readouterr().err


def test_a_start_may_take_longer_than_a_frame(tmp_path):
    "An old file of an earlier run does not count, nor is its age that of the new run."
    beat = tmp_path / "beat"
    beat.write_text("")
    os.utime(str(beat), (1, 1))
    slow = run_script("import sys,time; time.sleep(.6); open(sys.argv[1], 'w').close()", beat)
    assert supervise(slow, beat, seconds=.5, start_seconds=LONG, failures=1) == 0
    assert supervise(run_script("import time; time.sleep(300)"), beat, seconds=.2, start_seconds=.4, failures=1) == 1


def supervising(words):
    "A process that supervises; it lies in no test's process, so that signals reach it alone."
    text = ("import json,sys; sys.path.insert(0, sys.argv[1])\n"
            "from jetson_det.runtime.ops.watchdog import supervise\n"
            "sys.exit(supervise(json.loads(sys.argv[2]), first_wait=300, grace=.5))")
    root = os.path.abspath(module.__file__)
    for _ in range(4): root = os.path.dirname(root)
    return subprocess.Popen([sys.executable, "-c", text, root, json.dumps(words)], stderr=subprocess.PIPE)


def wait_for(path):
    end = time.monotonic() + LONG
    while not os.path.exists(str(path)) and time.monotonic() < end: time.sleep(.02)
    assert os.path.exists(str(path))


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 7), (signal.SIGINT, 7), (signal.SIGUSR1, None)])
def test_signals_reach_the_command(tmp_path, number, code):
    "The command ends in its own way, and its exit code is that of the supervisor."
    child = ("import signal,sys,time\n"
             "def heard(n, _):\n    open(sys.argv[1], 'a').write('%d ' % n)\n    if n != 10: sys.exit(7)\n"
             "for n in (2, 10, 15): signal.signal(n, heard)\n"
             "open(sys.argv[2], 'w').close()\n"
             "while True: time.sleep(.05)")
    process = supervising(run_script(child, tmp_path / "heard", tmp_path / "ready"))
    try:
        wait_for(tmp_path / "ready")
        process.send_signal(number)
        wait_for(tmp_path / "heard")
        if code is None:
            assert process.poll() is None # SIGUSR1 ends nothing
            process.terminate()
            code = 7
        assert process.wait(LONG) == code
        assert (tmp_path / "heard").read_text().split()[0] == str(int(number))
    finally:
        process.kill()
        process.stderr.close()


def test_a_command_that_hears_nothing_is_killed_after_the_grace(tmp_path):
    child = "import signal,sys,time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], 'w').close(); time.sleep(300)"
    process = supervising(run_script(child, tmp_path / "ready"))
    try:
        wait_for(tmp_path / "ready")
        start = time.monotonic()
        process.terminate()
        assert process.wait(LONG) == 128 + 9
        assert time.monotonic() - start > .4
    finally:
        process.kill()
        process.stderr.close()


def test_a_supervisor_that_is_killed_takes_its_command_along(tmp_path):
    child = "import os,sys,time; open(sys.argv[1] + '.part', 'w').write(str(os.getpid()))\n" \
            "os.rename(sys.argv[1] + '.part', sys.argv[1]); time.sleep(300)"
    process = supervising(run_script(child, tmp_path / "pid"))
    wait_for(tmp_path / "pid")
    process.kill()
    process.wait(LONG)
    process.stderr.close()
    pid = (tmp_path / "pid").read_text()
    end = time.monotonic() + LONG
    while not is_gone(pid) and time.monotonic() < end: time.sleep(.02)
    assert is_gone(pid)


def test_a_signal_ends_the_wait_for_a_restart():
    process = supervising(["false"])
    try:
        assert b"started again in 300 s" in process.stderr.readline()
        process.terminate()
        assert process.wait(LONG) == 128 + 15
    finally:
        process.kill()
        process.stderr.close()


def test_faults():
    with pytest.raises(InputError, match="no-such-program: cannot be started"): supervise(["no-such-program"])
    with pytest.raises(InputError, match="no command"): supervise([])
    with pytest.raises(InputError, match="1 or more"): supervise(["true"], failures=0)
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(["true"]) == 0 and signal.getsignal(signal.SIGTERM) == before
