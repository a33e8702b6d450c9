"""tegrastats: a line of each kind, the figures of a measurement, and the program's faults played by scripts."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops.tegrastats import (
    Load, Memory, Rail, Sample, Tegrastats, Temperature, is_throttled, joules_per_frame, parse_line, summarize,
    total_watts
)

LINE = "RAM 900/3956MB (lfb 331x4MB) GR3D_FREQ 95%@921 CPU@44C POM_5V_IN 6000/5000"

# One line of each kind: board, the line, its power in W, its GPU. The figures are made up.
KINDS = [
    ("Nano, root", "RAM 512/3964MB (lfb 90x4MB) SWAP 7/1982MB (cached 2MB) IRAM 0/252kB(lfb 252kB) "
     "CPU [11%@204,8%@204,0%@204,1%@204] EMC_FREQ 1%@408 GR3D_FREQ 4%@76 APE 25 PLL@33C CPU@35.5C PMIC@100C GPU@36C "
     "AO@40.25C thermal@36.25C POM_5V_IN 1234/1200 POM_5V_GPU 10/11 POM_5V_CPU 210/220", 1.234, Load(4, (76,))),
    ("Nano, user", "RAM 512/3964MB (lfb 90x4MB) CPU [1%@102,off,off,2%@102] EMC_FREQ 0% GR3D_FREQ 12% PLL@39C "
     "POM_5V_IN 943/950 POM_5V_GPU 0/0 POM_5V_CPU 123/130", .943, Load(12)),
    ("Nano, R32.7.4", "RAM 1588/3963MB (lfb 170x4MB) CPU [19%@1479] EMC_FREQ 2%@1600 APE 25 PLL@37C "
     "POM_5V_IN 2765/2384", 2.765, None),
    ("Nano without monitor", "RAM 300/3964MB (lfb 781x4MB) CPU [0%@1479] EMC_FREQ 0% GR3D_FREQ 0% CPU@43C", None,
     Load(0)),
    ("TX2", "RAM 2344/7852MB (lfb 1154x4MB) CPU [1%@345,off,off,1%@345] GR3D_FREQ 3%@624 VDD_SYS_GPU 152/152 "
     "VDD_IN 3056/3000 VDD_SYS_CPU 99/98", 3.056, Load(3, (624,))),
    ("AGX Xavier", "RAM 721/31927MB (lfb 7291x4MB) CPU [2%@1190,off] GR3D_FREQ 0%@318 MTS fg 3% bg 1% GPU@37.5C "
     "GPU 10/9 CPU 311/300 SOC 932/900 CV 5/4 VDDRQ 621/600 SYS5V 1482/1400", 3.361, Load(0, (318,))),
    ("Orin NX, R35", "RAM 6334/15388MB (lfb 1770x4MB) CPU [6%@729] GR3D_FREQ 61%@611 VIC_FREQ 729 CV0@-256C "
     "VDD_IN 5299mW/5100mW VDD_CPU_GPU_CV 773mW/770mW VDD_SOC 1424mW/1400mW", 5.299, Load(61, (611,))),
    ("AGX Orin, R36", "RAM 29114/30697MB (lfb 3x4MB)    CPU [3%@729] GR3D_FREQ 7%@[305,306] NVENC      off  VIC   off "
     "  gpu@47.812C    VDD_GPU_SOC 3205mW/1mW VDD_CPU_CV 4405mW/1mW VIN_SYS_5V0 4767mW/1mW", 12.377,
     Load(7, (305, 306))),
    ("Thor, R39", "08-08-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 "
     "GR3D_FREQ @[1574,1574,1574] cpu@49.75C/50C VDD_GPU 6330mW/6000mW/7000mW VIN_SYS_5V0 900mW/900mW/900mW "
     "VIN 28906mW/14453mW/30000mW", 28.906, Load(None, (1574, 1574, 1574))),
]


@pytest.mark.parametrize("line, watts, gpu", [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
def test_a_line_of_each_kind(line, watts, gpu):
    sample = parse_line(line + "\n")
    assert sample.unknown == ()
    assert (total_watts(sample), sample.gpu) == (watts, gpu)


def test_every_field_of_a_line():
    sample = parse_line(KINDS[0][1])
    assert sample == Sample(
        ram=Memory(512, 3964, 90, 4), swap=Memory(7, 1982, cached_mb=2),
        iram=Memory(0, 252 / 1024, block_mb=252 / 1024),
        cores=(Load(11, (204,)), Load(8, (204,)), Load(0, (204,)), Load(1, (204,))),
        emc=Load(1, (408,)), gpu=Load(4, (76,)), engines=(("APE", Load(mhz=(25,))),),
        temperatures=(Temperature("PLL", 33), Temperature("CPU", 35.5), Temperature("PMIC", 100),
                      Temperature("GPU", 36), Temperature("AO", 40.25), Temperature("thermal", 36.25)),
        rails=(Rail("POM_5V_IN", 1234, 1200), Rail("POM_5V_GPU", 10, 11), Rail("POM_5V_CPU", 210, 220)))


def test_the_rarer_fields():
    sample = parse_line("11-30-2025  13:26:01 SWAP 1/2MB (cached 0MB) RAM 4722/7844MB (lfb 1x512kB) CPU [0%,off]@2601 "
                        "EMC_FREQ @4266 GR3D_FREQ off NVENC0_FREQ @1691 VIC_FREQ 3%@140 PVA0_FREQ off MTS fg 2% bg 1% "
                        "CV0@-256C cpu@50/61.5C gpu@-256C/-256C out@-12.5C NC 0mW/0mW NC 1mW/2mW")
    assert sample.date == "11-30-2025 13:26:01" and sample.ram.block_mb == .5 and sample.swap.cached_mb == 0
    assert sample.cores == (Load(0, (2601,)), Load(is_on=False))
    assert (sample.emc, sample.gpu) == (Load(None, (4266,)), Load(is_on=False))
    assert sample.engines == (("NVENC0_FREQ", Load(None, (1691,))), ("VIC_FREQ", Load(3, (140,))),
                              ("PVA0_FREQ", Load(is_on=False)), ("MTS fg", Load(2)), ("MTS bg", Load(1)))
    assert [zone[1:] for zone in sample.temperatures] == [(None, None), (50, 61.5), (None, None), (-12.5, None)]
    assert sample.rails == (Rail("NC", 0, 0), Rail("NC", 1, 2)) and sample.unknown == ()


@pytest.mark.parametrize("text, unknown", [
    ("FUTURE_TOKEN value", ("FUTURE_TOKEN value",)), ("SWAP 5/19", ("SWAP 5/19",)), ("CPU [3%@729,", ("CPU [3%@729,",)),
    ("CPU 25", ("CPU 25",)), ("a! NVDEC off b! c", ("a!", "b! c")), ("GR3D_FREQ 12/13", ("GR3D_FREQ 12/13",)),
    ("GPU@hotC", ("GPU@hotC",)), ("VDD 12mW", ("VDD 12mW",)), ("NVDEC " + "9" * 4000, ("NVDEC " + "9" * 4000,)),
])
def test_what_is_not_known_is_kept(text, unknown):
    sample = parse_line("RAM 1/2MB " + text + " VDD_IN 7/8")
    assert sample.unknown == unknown
    assert sample.rails == (Rail("VDD_IN", 7, 8),) and sample.cores == () and sample.gpu is None


@pytest.mark.parametrize("text, message", [
    ("", "not a line of tegrastats"), ("Cannot open /sys/kernel/debug", "not a line of tegrastats"),
    ("RAM 1/2", "not a line of tegrastats"), ("RAM 12", "not a line of tegrastats"), ("\0\x1b[2J", "not a line"),
    ("RAM 1/2MB CPU [1%] RAM 1/2MB", "RAM comes twice"), ("RAM 1/2MB GR3D_FREQ 1% GR3D_FREQ 2%", "GR3D_FREQ comes"),
])
def test_what_is_no_line(text, message):
    with pytest.raises(InputError, match=message) as error: parse_line(text)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.data
def test_every_line_of_the_boards_is_read(data):
    """Beside the parser stand a few loose patterns, each for one kind of field, that find the same in these lines."""
    rows = [row.split("\t", 1) for row in (data / "jetson/tegrastats.txt").read_text().splitlines() if row[0] != "#"]
    assert len(rows) >= 20
    for name, line in rows:
        sample = parse_line(line)
        assert sample.unknown == (("FUTURE_TOKEN value",) if "FUTURE_TOKEN" in line else ()), name
        zones = [(zone, float(c)) for zone, c in re.findall(r"(\w+)@(-?[\d.]+)C", line)]
        assert [(z.name, -256 if z.celsius is None else z.celsius) for z in sample.temperatures] == zones, name
        rails = re.findall(r"(?<!RAM)(?<!SWAP)(?:^|\s)(?!RAM|SWAP|IRAM)(\w+) (\d+)(?:mW)?/(\d+)(?:mW)?", line)
        assert [(r.name, str(r.mw), str(r.average_mw)) for r in sample.rails] == rails, name
        cores = re.search(r"CPU \[(.*?)\]", line)
        assert len(sample.cores) == (len(cores.group(1).split(",")) if cores else 0), name
        share = re.search(r"GR3D_FREQ (\d+)%", line)
        assert (sample.gpu.percent if sample.gpu else None) == (float(share.group(1)) if share else None), name
        assert (total_watts(sample) is None) == (not rails), name
        for rail in ("POM_5V_IN", "VDD_IN", "VIN"):
            inputs = [int(mw) for found, mw, _ in rails if found == rail]
            if inputs: assert total_watts(sample) == inputs[0] / 1000, name


@pytest.mark.parametrize("gpu, mode_mhz, throttled", [
    (Load(99, (921,)), 921.6, False), (Load(99, (844,)), 921.6, True), (Load(90, (624,)), 1020, True),
    (Load(89, (624,)), 1020, None), (Load(99), 921.6, None), (Load(None, (624,)), 1020, None), (None, 921.6, None),
    (Load(95, (0, 1300)), 1300, False), (Load(is_on=False), 1300, None),
])
def test_throttling(gpu, mode_mhz, throttled):
    assert is_throttled(gpu, mode_mhz) is throttled


def test_a_rail_short_is_no_total():
    sample = parse_line("RAM 1/2MB VDD_GPU_SOC 3205mW/1mW VIN_SYS_5V0 4767mW/1mW")
    assert total_watts(sample) is None


def test_figures_of_a_measurement():
    lines = ["RAM {}/3956MB GR3D_FREQ {}%@{} CPU@{}C PMIC@100C AO@-256C POM_5V_IN {}/9".format(*row) for row in [
        (900, 90, 921, 50, 4000), (950, 100, 768, 61.5, 6000), (920, 10, 76, 55, 2000), (910, 96, 640, 52, 8000)]]
    found = summarize(map(parse_line, lines), seconds=8, frames=80, mode_mhz=921.6)
    assert (found.samples, found.seconds, found.watts, found.watts_max) == (4, 8, 5, 8)
    assert found.joules_per_frame == pytest.approx(.5)
    assert found.gpu_p50 == 93 and found.gpu_p95 == pytest.approx(96 + .85 * 4)
    assert found.busy_mhz == 768 and found.throttled == pytest.approx(2 / 3)
    assert found.ram_max_mb == 950 and found.celsius == {"CPU": 61.5} and found.hottest == "CPU"
    text = found.text()
    assert "0.500 J per frame" in text and "67% of the busy samples, 768 MHz" in text and "61.5 C (CPU)" in text


def test_figures_that_a_board_does_not_report():
    found = summarize([parse_line("RAM 300/3964MB")], seconds=1, frames=5, mode_mhz=921.6)
    nothing = (found.watts, found.watts_max, found.joules_per_frame, found.gpu_p50, found.gpu_p95, found.busy_mhz,
               found.throttled, found.hottest)
    assert nothing == (None,) * 8 and found.celsius == {}
    assert "power       not reported by this board" in found.text() and "not known" in found.text()
    for frames, seconds in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="frames and seconds above zero"): joules_per_frame(5, seconds, frames)
    with pytest.raises(InputError, match="no line of tegrastats"): summarize([], 1)


def player(folder, script):
    "A program that takes tegrastats' place; $LINE is a line of figures."
    path = folder / "player.sh"
    path.write_text("LINE='{}'\n{}\n".format(LINE, script))
    return ("sh", str(path))


def is_gone(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return True
    return False


def until(condition, seconds=10):
    "Wait for something that another process does."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.01)
    return condition()


PLAY = "while :; do echo \"$LINE\"; sleep .02; done"


def test_a_window_of_the_measurement(tmp_path):
    script = "echo \"RAM 1/2MB POM_5V_IN 1/1\"; while [ ! -e {0}/go ]; do sleep .01; done; {1}".format(tmp_path, PLAY)
    with Tegrastats(20, player(tmp_path, script)) as stats:
        start = time.monotonic()
        (tmp_path / "go").write_text("")
        assert until(lambda: len(stats.samples(start)) >= 3)
        end = time.monotonic()
    count = len(stats.samples(start, end))
    found = stats.summary(start, end, frames=30, mode_mhz=921.6)
    assert (found.samples, found.watts, found.throttled, found.problem) == (count, 6, 0, "")
    assert found.joules_per_frame == pytest.approx(6 * (end - start) / 30)
    assert stats.samples(end=start)[0].rails == (Rail("POM_5V_IN", 1, 1),)
    whole = stats.summary()
    assert whole.samples > count and whole.seconds > end - start
    with pytest.raises(InputError, match="measure for longer"): stats.summary(start - 20, start - 10)
    with pytest.raises(InputError, match="ends before it starts"): stats.summary(end, start)


def test_the_interval_is_passed_on(tmp_path):
    command = player(tmp_path, "echo \"$@\" > {}/words; {}".format(tmp_path, PLAY))
    with Tegrastats(250, command): pass
    assert (tmp_path / "words").read_text().split() == ["--interval", "250"]
    for interval in (0, -5, 10**8):
        with pytest.raises(InputError, match="interval_ms"): Tegrastats(interval)


def test_the_program_is_ended(tmp_path):
    stats = Tegrastats(20, player(tmp_path, PLAY)).start()
    pid = stats._process.pid
    with pytest.raises(InputError, match="started already"): stats.start()
    begin = time.monotonic()
    stats.stop()
    stats.stop()
    assert is_gone(pid) and not stats._thread.is_alive() and time.monotonic() - begin < 2
    assert stats.problem == "" and stats.summary().problem == ""


def test_an_error_in_the_measurement_ends_it_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with Tegrastats(20, player(tmp_path, PLAY)) as stats: 1 / 0
    assert is_gone(stats._process.pid) and not stats._thread.is_alive()


def test_a_program_that_hears_no_sigterm(tmp_path):
    script = "trap '' TERM; echo \"$LINE\"; while :; do sleep .05; done"
    with Tegrastats(20, player(tmp_path, script)) as stats: pass
    assert is_gone(stats._process.pid) and not stats._thread.is_alive()


def test_a_child_that_holds_the_output(tmp_path):
    script = "sleep 60 & echo $! > {}/pid; echo \"$LINE\"; wait".format(tmp_path)
    with Tegrastats(20, player(tmp_path, script)) as stats: pass
    assert until(lambda: is_gone(int((tmp_path / "pid").read_text()))) and not stats._thread.is_alive()


def test_absent_and_not_executable(tmp_path):
    with pytest.raises(InputError, match="not on this machine.*mount the host's"):
        Tegrastats(command=("no-such-tegrastats",)).start()
    (tmp_path / "tegrastats").write_text("")
    with pytest.raises(InputError, match="may not be run by this user"):
        Tegrastats(command=(str(tmp_path / "tegrastats"),)).start()
    (tmp_path / "tegrastats").chmod(0o755)
    (tmp_path / "tegrastats").write_bytes(b"\x7fELF, but not for this machine")
    with pytest.raises(InputError, match="cannot be started: Exec format error"):
        Tegrastats(command=(str(tmp_path / "tegrastats"),)).start()
    with pytest.raises(InputError, match="was not started"): Tegrastats().summary()


@pytest.mark.parametrize("script, message", [
    ("echo 'sudo: a password is required' >&2; exit 3",
     "sh ended with exit code 3 before its first line: sudo: a password is required"),
    ("kill -9 $$", "sh ended by SIGKILL before its first line"),
    ("exit 0", "sh ended with exit code 0 before its first line"),
    ("printf 'RAM 1/2MB POM_5V_IN 1/1'", "before its first line"), # it was cut off: a digit may be missing
    ("sleep 60", "printed no line of figures in"),
    ("while :; do echo hello; sleep .02; done", "printed no line of figures in .*: hello"),
    ("yes x | tr -d '\\n'", "before its first line"), # a line without an end
])
def test_no_figures(tmp_path, script, message):
    stats = Tegrastats(20, player(tmp_path, script), first_line_s=.4 if "sleep" in script else 10)
    with pytest.raises(InputError, match=message) as error: stats.start()
    assert "\n" not in str(error.value)
    assert is_gone(stats._process.pid) and not stats._thread.is_alive()


def test_an_end_that_the_reader_has_not_noticed_yet(tmp_path):
    class Late(Tegrastats):
        "Its thread lives on for a moment after the last line."
        def _read(self):
            super()._read()
            time.sleep(.2)

    with pytest.raises(InputError, match="sh ended with exit code 3 before its first line"):
        Late(20, player(tmp_path, "exit 3")).start()


def test_killed_in_the_middle(tmp_path):
    with Tegrastats(20, player(tmp_path, PLAY)) as stats:
        assert until(lambda: len(stats.samples()) >= 2)
        os.killpg(stats._process.pid, signal.SIGKILL)
        assert until(lambda: stats.problem)
        assert re.match(r"sh ended by SIGKILL after \d+ lines$", stats.problem)
    found = stats.summary()
    assert found.watts == 6 and found.samples >= 2 and "SIGKILL" in found.text()


def test_stopped_in_the_middle(tmp_path):
    with Tegrastats(20, player(tmp_path, PLAY)) as stats:
        os.killpg(stats._process.pid, signal.SIGSTOP)
        assert until(lambda: stats.problem)
        assert "sh has printed nothing for" in stats.problem
        begin = time.monotonic()
    assert time.monotonic() - begin < 3 # not killed after its grace: SIGTERM was heard
    assert is_gone(stats._process.pid) and "printed nothing" in stats.summary().problem


def test_lines_that_are_no_samples_are_counted(tmp_path):
    script = "echo \"$LINE\"; echo; echo 'RAM 1/'; echo 'warning: \\033[1m'; echo \"$LINE\"; sleep 60"
    with Tegrastats(20, player(tmp_path, script)) as stats:
        assert until(lambda: len(stats.samples()) == 2)
    assert stats.problem.startswith("2 lines could not be read, the last one: warning: ")
    assert stats.problem.isprintable()


def test_the_oldest_samples_are_dropped(tmp_path):
    script = "for i in 1 2 3 4 5; do echo \"RAM $i/9MB\"; done; echo end; sleep 60"
    with Tegrastats(20, player(tmp_path, script), keep=3) as stats:
        assert until(lambda: stats.problem)
    assert [sample.ram.used_mb for sample in stats.samples()] == [3, 4, 5]


def test_the_program_ends_with_a_reader_that_was_killed(tmp_path):
    code = ("import os\nfrom jetson_det.runtime.ops.tegrastats import Tegrastats\n"
            "stats = Tegrastats(20, {!r}).start()\nprint(stats._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n")
    command = [sys.executable, "-c", code.format(player(tmp_path, PLAY))]
    output = subprocess.run(command, stdout=subprocess.PIPE, timeout=60).stdout
    pid = int(output)
    assert until(lambda: is_gone(pid) or open("/proc/{}/stat".format(pid)).read().split()[2] == "Z")
