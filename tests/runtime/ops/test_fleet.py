"""A fleet on a real Redis server: workers that are killed and stopped, a server that is killed, refused and full."""
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops.fleet_queue import FleetError, FleetQueue, FleetRules, open_redis
from jetson_det.runtime.ops.fleet_worker import FleetWorker, failure_lines, submit_files

pytest.importorskip("redis", reason="the package redis is not installed")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
PROCESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fleet_worker_process.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "A Redis server in a folder."
    def __init__(self, folder, *options, **how):
        self.folder = str(folder)
        self.port = free_port()
        self.options = options
        self.tls = how.get("tls", False)
        self.url = "{}://127.0.0.1:{}".format("rediss" if self.tls else "redis", self.port)
        self.start()

    def start(self):
        port = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        self.process = subprocess.Popen(
            ["redis-server"] + port + ["--bind", "127.0.0.1", "--dir", self.folder, "--appendonly", "yes", "--save", ""]
            + list(self.options), stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError: time.sleep(.01)
        raise AssertionError("redis-server does not listen")

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*options, **how):
        servers.append(Server(tmp_path, *options, **how))
        return servers[-1]
    yield start
    for server in servers: server.kill()


@pytest.fixture
def queue(serve): return FleetQueue(serve().url, "gate", rules=FleetRules(claim_seconds=.05))


def png(gray): return cv2.imencode(".png", np.full((4, 4, 3), gray, np.uint8))[1].tobytes()


def worker_of(queue, infer=lambda image: int(image[0, 0, 0]), **kw): return FleetWorker(queue, infer, **kw)


def take(worker):
    "A frame in hand, within a moment."
    worker.join()
    worker._next_claim = 0
    entry = worker._next()
    assert entry is not None
    return entry


def start_worker(server, log, claim, pause):
    environ = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    words = [sys.executable, PROCESS, server.url, "gate", str(log), str(claim), str(pause)]
    return subprocess.Popen(words, env=environ)


def check_whole(queue, ids, found):
    "None lost, none stored twice."
    assert sorted(found) == sorted(ids)
    assert all(found[i]["found"] == gray for i, gray in ids.items())
    finished = [frame_id for _, frame_id, _ in queue.results(seconds=.1)]
    assert len(finished) == len(set(finished)) == len(ids)
    status = queue.status()
    assert (status.stored, status.backlog, status.in_hand, status.dead) == (len(ids), 0, 0, 0)
    return status


def test_none_is_lost_and_none_stored_twice(serve, tmp_path):
    server = serve()
    queue = FleetQueue(server.url, "gate", rules=FleetRules(claim_seconds=.6, backlog=500))
    workers = [start_worker(server, tmp_path / "log", .6, .004) for _ in range(3)]
    try:
        ids = {queue.submit(png(n % 251), "frame-%d" % n): n % 251 for n in range(300)}
        assert len(queue.wait(list(ids)[:20], 60)) == 20
        workers[0].kill()
        held = 0
        for _ in range(200): # stopped with a frame in hand
            os.kill(workers[1].pid, signal.SIGSTOP)
            held = [w.in_hand for w in queue.status().workers if "-%d-" % workers[1].pid in w.name]
            if held == [1]: break
            os.kill(workers[1].pid, signal.SIGCONT)
            time.sleep(.003)
        assert held == [1]
        found = queue.wait(ids, 60)
        os.kill(workers[1].pid, signal.SIGCONT)
        end = time.monotonic() + 10
        while queue.status().refused < 1 and time.monotonic() < end: time.sleep(.02)
        status = check_whole(queue, ids, found)
        assert status.claimed >= 1 and status.refused >= 1
        workers[2].terminate()
        assert workers[2].wait(20) == 0
    finally:
        for process in workers:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_ten_thousand_frames(serve, tmp_path):
    server = serve()
    queue = FleetQueue(server.url, "gate", rules=FleetRules(claim_seconds=2, backlog=500))
    log = tmp_path / "log"
    workers = [start_worker(server, log, 2, .01) for _ in range(4)]
    ended = threading.Event()
    kills = []

    def trouble():
        begin = time.monotonic()
        restarted = stopped = False
        while not ended.wait(5):
            workers[0].kill()
            workers[0].wait()
            workers[0] = start_worker(server, log, 2, .01)
            kills.append(1)
            if not stopped:
                os.kill(workers[1].pid, signal.SIGSTOP)
                stopped = True
                if ended.wait(4): break
                os.kill(workers[1].pid, signal.SIGCONT)
            elif not restarted:
                server.kill()
                time.sleep(.5)
                server.start()
                restarted = True
        os.kill(workers[1].pid, signal.SIGCONT)
        assert stopped and restarted, time.monotonic() - begin
    thread = threading.Thread(target=trouble)
    start = time.monotonic()
    thread.start()
    try:
        ids = {queue.submit(png(n % 251), "frame-%d" % n, wait=120): n % 251 for n in range(10000)}
        found = queue.wait(ids, 250)
        seconds = time.monotonic() - start
        ended.set()
        thread.join()
        time.sleep(1)
        status = check_whole(queue, ids, found)
        inferences = sum(1 for _ in open(str(log)))
        print("\n{:.0f} s, {:.0f} frames a second, {} inferences, {} kills, claimed {}, refused {}, outages {}".format(
            seconds, 10000 / seconds, inferences, len(kills), status.claimed, status.refused,
            queue.connection.outages))
        assert kills and status.claimed and queue.connection.outages == 1
    finally:
        ended.set()
        for process in workers:
            process.kill()
            process.wait()


def test_a_frame_is_known_by_its_id_before_and_after_its_result(queue):
    for _ in range(2): queue.submit(png(1), "a")
    assert queue.status().backlog == 1
    worker_of(queue).run(most=1)
    queue.submit(png(1), "a")
    status = queue.status()
    assert (status.backlog, status.submitted, status.stored) == (0, 1, 1)


def test_the_same_image_is_inferred_once_by_a_model(queue):
    ids = [queue.submit(png(gray)) for gray in (1, 2, 1, 1)]
    worker = worker_of(queue, model_hash="aa")
    worker.run(most=4)
    found = queue.wait(ids, 5)
    assert worker.inferences == 2 and queue.status().from_cache == 2
    assert [found[i]["found"] for i in ids] == [1, 2, 1, 1]
    assert [found[i].get("cached", False) for i in ids] == [False, False, True, True]


def test_results_expire_and_the_list_says_so(serve):
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(result_seconds=.05))
    queue.submit(png(1), "a")
    worker_of(queue, model_hash="aa").run(most=1)
    time.sleep(.1)
    assert queue.wait(["a"], 0) == {}
    assert [row[1:] for row in queue.results(seconds=0)] == [("a", None)]
    assert not queue.client.keys("*cache*")


def test_a_damaged_image_is_a_result_at_once(queue):
    ids = [queue.submit(data) for data in (b"none", png(3)[:30], png(3))]
    worker = worker_of(queue)
    worker.run(most=3)
    found = queue.wait(ids, 5)
    assert ["error" in found[i] for i in ids] == [True, True, False]
    assert worker.inferences == 1 and queue.status().errors == 2 and queue.status().dead == 0


def test_a_frame_that_kills_its_workers_is_a_dead_letter(serve):
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(claim_seconds=.01, deliveries=2))
    queue.submit(png(1), "poison")
    for n in range(3):
        worker = worker_of(queue)
        entry = take(worker) # and the process dies
        assert entry.deliveries == n + 1
        time.sleep(.02)
    worker.work(entry)
    assert queue.wait(["poison"], 5)["poison"]["error"] == "no result though 2 workers saw it"
    letter = queue.client.xrange(queue.key("dead"))[0][1]
    assert letter[b"id"] == b"poison" and letter[b"image"] == png(1) and b"2 workers" in letter[b"reason"]
    status = queue.status()
    assert (status.dead, status.errors, status.backlog, status.claimed) == (1, 1, 0, 2)


def test_a_dead_letter_is_written_once(queue):
    queue.submit(png(1), "a")
    worker = worker_of(queue)
    entry = take(worker)
    keys = [queue.key("dead"), queue.key("queued")]
    for _ in range(2): worker._run_script("bury", keys, [entry.place, "a", "why", 10])
    assert queue.status().dead == 1 and queue.client.xlen(queue.key("dead")) == 1
    worker._bury(entry, "why")
    assert queue.status().dead == 1 and queue.wait(["a"], 5)["a"]["error"] == "why"


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_deaths_and_late_results_gives_one_result_a_frame(serve, seed):
    "Workers take, store, store late, store twice and forget, in an order by chance."
    chance = random.Random(seed)
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(claim_seconds=.001, deliveries=10000))
    ids = {queue.submit(png(n), "frame-%d" % n): n for n in range(25)}
    workers = [worker_of(queue) for _ in range(3)]
    held = []
    for worker in workers: worker.join()
    for _ in range(400):
        worker = chance.choice(workers)
        worker._next_claim = 0
        action = chance.random()
        if action < .5:
            time.sleep(.0015 if chance.random() < .3 else 0)
            is_fresh = chance.random() < .3 and queue.status().backlog - queue.status().in_hand > 0
            entry = worker._claim() or (worker._read() if is_fresh else None)
            if entry is not None: held.append((worker, entry))
        elif held and action < .9: # perhaps after another worker has claimed or stored it
            owner, entry = chance.choice(held)
            owner._store(entry, {"found": ids[entry.frame_id]}, "", "")
        elif held: held.pop(chance.randrange(len(held)))
    time.sleep(.005)
    while queue.status().backlog:
        workers[0]._next_claim = 0
        entry = workers[0]._next()
        if entry is not None: workers[0].work(entry)
    status = check_whole(queue, ids, queue.wait(ids, 5))
    assert status.claimed and sum(worker.refused for worker in workers)


def test_a_detector_that_raises_is_tried_again_and_then_given_up(serve):
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(claim_seconds=.01, deliveries=2))
    queue.submit(png(1), "a")

    def fail(image): raise RuntimeError("out of memory")
    worker = worker_of(queue, fail)
    worker.work(take(worker))
    assert queue.wait(["a"], 0) == {} and queue.status().backlog == 1
    time.sleep(.02)
    worker.work(take(worker))
    assert queue.wait(["a"], 5)["a"]["error"] == "RuntimeError: out of memory"


def test_who_lost_a_frame_cannot_store_even_after_the_result_expired(serve):
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(claim_seconds=.01, result_seconds=.01))
    queue.submit(png(1), "a")
    slow = worker_of(queue)
    other = worker_of(queue)
    entry = take(slow)
    time.sleep(.02)
    other.work(take(other))
    time.sleep(.02)
    slow._store(entry, {"found": 9}, "", "")
    assert (slow.frames, slow.refused, queue.wait(["a"], 0)) == (0, 1, {})
    assert queue.status().stored == 1


def test_a_lost_answer_is_no_second_result(queue):
    queue.submit(png(1), "a")
    worker = worker_of(queue)
    entry = take(worker)
    for _ in range(2): worker._store(entry, {"found": 1}, "", "") # as after a connection that broke
    assert worker.refused == 0 and queue.status().stored == 1 and queue.status().refused == 0


def test_a_slow_worker_that_lives_keeps_its_frame(queue):
    queue.submit(png(1), "a")
    worker = worker_of(queue)
    entry = take(worker)
    worker._in_hand = (entry.place, time.monotonic())
    other = worker_of(queue)
    for _ in range(6):
        time.sleep(.03)
        worker.beat()
        assert other._claim() is None
    worker._in_hand = (entry.place, time.monotonic() - 1000) # it hangs
    time.sleep(.06)
    worker.beat()
    assert other._claim().frame_id == "a"


def test_a_full_queue_refuses_or_waits(serve):
    queue = FleetQueue(serve().url, "gate", rules=FleetRules(backlog=2))
    for name in "ab": queue.submit(png(1), name)
    with pytest.raises(FleetError, match="is full"): queue.submit(png(1), "c", wait=0)
    worker = worker_of(queue)
    later = threading.Timer(.1, lambda: worker.work(take(worker)))
    later.start()
    assert queue.submit(png(1), "c", wait=20) == "c"
    later.join()


def test_another_model_is_refused_on_both_sides(queue):
    worker_of(queue, model_hash="a" * 64).join()
    with pytest.raises(InputError, match="works with model aaaaaaaaaaaa"): worker_of(queue, model_hash="b" * 64).join()
    with pytest.raises(InputError, match="not bbbbbbbbbbbb"): queue.submit(png(1), model_hash="b" * 64)
    queue.client.hdel(queue.key("about"), "model")
    queue.submit(png(1), "x", model_hash="b" * 64)
    worker_of(queue, model_hash="a" * 64).run(most=1)
    assert "submitted for model bbbb" in queue.wait(["x"], 5)["x"]["error"]


def test_an_old_server_without_xautoclaim(serve, tmp_path):
    (tmp_path / "old.conf").write_text('rename-command XAUTOCLAIM ""\n')
    server = serve()
    server.kill()
    server.options = ()
    process = subprocess.Popen(["redis-server", str(tmp_path / "old.conf"), "--port", str(server.port), "--bind",
                                "127.0.0.1", "--save", "", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        queue = FleetQueue(server.url, "gate", rules=FleetRules(claim_seconds=.01))
        queue.submit(png(5), "a")
        take(worker_of(queue))
        time.sleep(.02)
        worker = worker_of(queue)
        entry = take(worker)
        assert not worker.has_autoclaim and entry.deliveries == 2
        worker.work(entry)
        assert queue.wait(["a"], 5)["a"]["found"] == 5
    finally:
        process.kill()
        process.wait()


def test_the_server_is_killed_between_submit_and_result(serve):
    server = serve()
    lines = []
    queue = FleetQueue(server.url, "gate", warn=lines.append)
    ids = [queue.submit(png(n)) for n in range(5)]
    server.kill()
    timer = threading.Timer(.3, server.start)
    timer.start()
    worker = worker_of(queue)
    worker.run(most=5)
    timer.join()
    assert len(queue.wait(ids, 5)) == 5 and queue.connection.outages == 1
    assert len(lines) == 2 and lines[1].endswith("is back")


def test_a_server_that_stays_away_is_one_line():
    queue = FleetQueue("redis://:secret@127.0.0.1:{}".format(free_port()), "gate")
    with pytest.raises(FleetError) as e: queue.submit(png(1), wait=.2)
    assert "refused" in str(e.value) and "secret" not in str(e.value)


@pytest.mark.parametrize("after", [0, 1, 40, 150])
def test_a_connection_is_cut_in_the_middle_of_a_command(serve, after):
    "A proxy passes so many bytes and cuts, once; the frame is queued once."
    server = serve()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)

        def pump(source, sink, most=None):
            passed = 0
            try:
                while most is None or passed < most:
                    data = source.recv(4096 if most is None else min(4096, most - passed))
                    if not data: break
                    sink.sendall(data)
                    passed += len(data)
            except OSError: pass
            for s in (source, sink):
                try: s.shutdown(socket.SHUT_RDWR)
                except OSError: pass

        accepted = []

        def proxy():
            for most in (after, None):
                client, _ = listener.accept()
                accepted.append(most)
                up = socket.create_connection(("127.0.0.1", server.port))
                threading.Thread(target=pump, args=(client, up, most), daemon=True).start()
                threading.Thread(target=pump, args=(up, client), daemon=True).start()
        threading.Thread(target=proxy, daemon=True).start()
        queue = FleetQueue("redis://127.0.0.1:{}".format(listener.getsockname()[1]), "gate")
        queue.submit(png(1), "a", wait=20)
        status = queue.status()
        assert (status.backlog, status.submitted, accepted) == (1, 1, [after, None])
        queue.close()


def test_a_full_memory_says_so(serve):
    server = serve("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    queue = FleetQueue(server.url, "gate")
    with pytest.raises(FleetError, match="memory of the server is full; raise maxmemory"):
        for n in range(20): queue.submit(os.urandom(1 << 20), wait=.3)


def test_a_wrong_password_is_one_line_and_a_file_brings_the_right_one(serve, tmp_path, monkeypatch):
    server = serve("--requirepass", "open sesame")
    address = server.url.replace("://", "://:wrong@")
    for url in (address, server.url):
        with pytest.raises(InputError) as e: FleetQueue(url, "gate").submit(png(1))
        assert "is refused" in str(e.value) and "wrong" not in str(e.value)
    (tmp_path / "password").write_text("open sesame\n")
    queue = FleetQueue(server.url, "gate", password_file=tmp_path / "password")
    assert queue.submit(png(1), "a") == "a" and "sesame" not in str(queue)
    monkeypatch.setenv("JETSON_DET_REDIS_PASSWORD", "open sesame")
    assert FleetQueue(server.url, "gate").submit(png(1), "a") == "a"
    with pytest.raises(InputError, match="can't be read"): open_redis(server.url, password_file=tmp_path / "none")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls_trusts_the_given_authority_alone(serve, tmp_path):
    def openssl(*words): subprocess.check_call(("openssl",) + words, cwd=str(tmp_path), stdout=subprocess.DEVNULL,
                                               stderr=subprocess.DEVNULL)
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ours", *new)
    openssl("req", "-keyout", "key.pem", "-out", "r.csr", "-subj", "/CN=queue", *new)
    for name in ("127.0.0.1", "127.0.0.9"):
        (tmp_path / "names").write_text("subjectAltName=IP:" + name)
        openssl("x509", "-req", "-in", "r.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "names", "-out", name + ".pem")
    options = ("--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem", "--tls-auth-clients", "no")
    server = serve("--tls-cert-file", "127.0.0.1.pem", *options, tls=True)
    queue = FleetQueue(server.url, "gate", ca_file=tmp_path / "ca.pem")
    assert queue.submit(png(1), "a", wait=5) == "a"
    with pytest.raises(InputError, match="certificate"): FleetQueue(server.url, "gate").submit(png(1), wait=1)
    other = serve("--tls-cert-file", "127.0.0.9.pem", *options, tls=True)
    with pytest.raises(InputError, match="certificate"):
        FleetQueue(other.url, "gate", ca_file=tmp_path / "ca.pem").submit(png(1), wait=1)


def test_wrong_rules_names_and_images(queue, tmp_path):
    for name in ("", "a b", "{x}", "a:b"):
        with pytest.raises(InputError, match="name of a queue"): FleetQueue("redis://h", name)
    for rules in (FleetRules(backlog=0), FleetRules(claim_seconds=-1), FleetRules(result_seconds=float("nan"))):
        with pytest.raises(InputError, match="more than 0"): rules.validate()
    with pytest.raises(InputError, match="0 bytes"): queue.submit(b"")
    with pytest.raises(InputError, match="cannot be read"): submit_files(queue, [tmp_path / "none.jpg"])


def test_a_status_is_json_and_an_empty_queue_has_one(queue):
    status = queue.status()
    assert json.loads(json.dumps(status.to_json()))["backlog"] == 0 and "no worker" in str(status)
    worker = worker_of(queue, name="orin-1")
    worker.join()
    worker.beat()
    assert [w.name for w in queue.status().workers] == ["orin-1"]


def test_a_worker_ends_at_sigterm_after_the_frame_in_hand_and_shows_its_rate_before(serve, tmp_path):
    server = serve()
    queue = FleetQueue(server.url, "gate")
    process = start_worker(server, tmp_path / "log", .3, .15)
    try:
        ids = [queue.submit(png(n), "frame-%d" % n) for n in range(40)]
        queue.wait(ids[:3], 30)
        end = time.monotonic() + 10
        while not any(w.frames_per_second > 0 for w in queue.status().workers) and time.monotonic() < end:
            time.sleep(.02)
        assert 0 < queue.status().workers[0].frames_per_second < 8 # .15 s a frame
        process.terminate()
        assert process.wait(20) == 0
        status = queue.status()
        assert status.in_hand == 0 and status.workers == () and 3 <= status.stored < 40
        assert status.stored + status.backlog == 40 == status.submitted
        assert status.stored == sum(1 for _ in open(str(tmp_path / "log"))) # none was inferred in vain
    finally:
        process.kill()
        process.wait()


# ---- files

def write_images(folder, names):
    "Images, each with another gray."
    for gray, name in enumerate(names): (folder / name).write_bytes(png(gray))
    return [folder / name for name in names]


def test_one_wrong_file_and_nothing_is_queued(queue, tmp_path):
    queue.rules = FleetRules(image_bytes=1000)
    files = write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "large.jpg").write_bytes(b"x" * 1001)
    (tmp_path / "folder").mkdir()
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "cut.jpg").symlink_to(tmp_path / "gone.jpg")
    wrong = [tmp_path / name for name in ("empty.jpg", "large.jpg", "folder", "pipe", "cut.jpg", "none.jpg")]
    for file in wrong:
        with pytest.raises(InputError, match="nothing was queued; 1 of 3 files") as e:
            submit_files(queue, files + [file])
        assert str(file) in str(e.value)
    with pytest.raises(InputError, match="6 of 8 files") as e: submit_files(queue, files + wrong)
    assert all(str(file) in str(e.value) for file in wrong) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="and 1 more"): submit_files(queue, files + wrong + wrong[:3])
    assert queue.status().submitted == 0
    assert len(submit_files(queue, iter(files))) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(queue, tmp_path):
    files = write_images(tmp_path, ["a.png", "b.png"])
    files[1].chmod(0)
    with pytest.raises(InputError, match="nothing was queued; 1 of 2 files"): submit_files(queue, files)
    assert queue.status().submitted == 0


def test_a_queue_that_is_full_late_in_the_list_says_how_far_it_came(queue, tmp_path):
    queue.rules = FleetRules(backlog=2)
    files = write_images(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    with pytest.raises(FleetError, match="is full .*2 of 4 files submitted, .*c.png is the next") as e:
        submit_files(queue, files, wait=0)
    assert "none is submitted twice" in str(e.value)
    worker_of(queue).run(most=2)
    assert len(submit_files(queue, files, wait=0)) == 4
    assert queue.status().submitted == 4, "the first two were not queued again"


def test_a_file_that_is_gone_when_its_turn_comes(queue, tmp_path, monkeypatch):
    files = write_images(tmp_path, ["a.png", "b.png"])
    submit = queue.submit

    def remove(*words):
        if files[1].exists(): files[1].unlink()
        return submit(*words)
    monkeypatch.setattr(queue, "submit", remove)
    with pytest.raises(InputError, match="b.png: cannot be read: .*; 1 of 2 files submitted, .*b.png is the next"):
        submit_files(queue, files)


def test_each_file_that_failed_has_a_line(queue, tmp_path):
    files = write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.txt").write_bytes(b"no image\n")
    ids = submit_files(queue, files[:1] + [tmp_path / "c.txt"] + files[1:])
    worker_of(queue).run(most=2)
    found = queue.wait(ids, .05)
    assert failure_lines(ids, found) == [
        "{}: not an image that OpenCV can decode (9 bytes)".format(tmp_path / "c.txt"),
        "{}: no result came in time".format(files[1])]
    worker_of(queue).run(most=1)
    assert len(failure_lines(ids, queue.wait(ids, 5))) == 1
    many = {str(n): "{}.png".format(n) for n in range(25)}
    assert failure_lines(many, {})[19:] == ["19.png: no result came in time", "and 5 more"]
    assert len(failure_lines(dict(list(many.items())[:20]), {})) == 20
    assert failure_lines(many, {n: {"found": []} for n in many}) == []


def test_the_command_says_which_files_failed(serve, tmp_path, capsys):
    typer = pytest.importorskip("typer", reason="the command line needs a newer Python")
    from jetson_det.cli_board import fleet_submit
    server = serve()
    files = write_images(tmp_path, ["a.png"])
    (tmp_path / "c.txt").write_bytes(b"no image\n")
    files.append(tmp_path / "c.txt")
    fleet_submit(server.url, "gate", files, results=0)
    assert capsys.readouterr().out == "2 submitted\n"
    worker_of(FleetQueue(server.url, "gate")).run(most=2)
    with pytest.raises(typer.Exit) as e: fleet_submit(server.url, "gate", files, results=5)
    assert e.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["{}: not an image that OpenCV can decode (9 bytes)".format(files[1]),
                     "2 submitted, 1 with a result, 1 error, 0 did not come"]


# ---- the blocks of the page

def page_blocks(page="fleet"):
    "The fenced blocks of a guide, in their order."
    with open(os.path.join(ROOT, "nbs", "guides", page + ".ipynb"), "rb") as f: cells = json.loads(f.read().decode())
    text = "\n".join("".join(cell["source"]) for cell in cells["cells"] if cell["cell_type"] == "markdown")
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)


def block_with(word): return next(block for block in page_blocks() if word in block)


def start_redis(folder, *words):
    process = subprocess.Popen(["redis-server", "redis.conf", "--bind", "127.0.0.1"] + list(words), cwd=str(folder),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if b"Ready to accept connections" in line: return process
    raise AssertionError("redis-server ended with {}".format(process.wait()))


def test_a_server_starts_with_the_settings_of_the_page(tmp_path):
    (tmp_path / "redis.conf").write_text(block_with("requirepass"))
    port = free_port()
    process = start_redis(tmp_path, "--port", str(port))
    try:
        client = open_redis("redis://:a-long-random-password@127.0.0.1:{}".format(port))[0]
        for name, value in (("appendonly", "yes"), ("maxmemory", str(2 << 30)), ("maxmemory-policy", "noeviction"),
                            ("appendfsync", "everysec")): assert client.config_get(name)[name] == value
        with pytest.raises(InputError, match="refused"):
            FleetQueue("redis://127.0.0.1:{}".format(port), "gate").submit(png(1))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_server_starts_with_the_certificates_of_the_page(tmp_path):
    subprocess.check_call(["sh", "-ec", block_with("openssl req")], cwd=str(tmp_path), stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL)
    (tmp_path / "redis.conf").write_text(block_with("tls-port"))
    port = free_port()
    process = start_redis(tmp_path, "--tls-port", str(port))
    try:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        for name in ("depot", "192.168.1.10"):
            with socket.create_connection(("127.0.0.1", port), 5) as plain:
                with context.wrap_socket(plain, server_hostname=name) as secure:
                    secure.sendall(b"PING\r\n")
                    assert secure.recv(64) == b"+PONG\r\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
