"""The files of a Jetson that this project reads, made in a folder, and a program in tegrastats' place. Python 3.6."""
import sys
from pathlib import Path

# as the boards' systems write them; the figures are made up
NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "proc/meminfo": "MemTotal:        4059272 kB\nMemFree:          101000 kB\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n/dev/zram0 partition\t507408\t0\t5\n"
                  "/swapfile file\t4194300\t0\t-1\n",
    "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=5W >\n",
    "var/lib/nvpmodel/status": "pmode:0000 fmode:fanNull\n",
    "sys/class/devfreq/57000000.gpu/cur_freq": "76800000\n",
    "sys/class/devfreq/57000000.gpu/max_freq": "921600000\n",
    "sys/class/devfreq/57000000.gpu/available_frequencies": "76800000 153600000 640000000 921600000 \n",
    "sys/class/devfreq/57000000.gpu/governor": "nvhost_podgov\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.2.1": "",
    "usr/lib/aarch64-linux-gnu/tegra/libnvdla_compiler.so": "",
}
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/meminfo": "MemTotal:        7802704 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
                         "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/class/devfreq/15340000.vic/max_freq": "729600000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n", # the mode promises 1020: balena-jetson-orin#605
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
    "usr/lib/aarch64-linux-gnu/nvidia/libnvdla_compiler.so": "",
}
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/meminfo": "MemTotal:      128770048 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1000000000\n",
    "sys/class/devfreq/gpu-nvd-0/max_freq": "1692000000\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
}


def make_board(folder, files, **changes):
    "The folder with these files; changes: 'name' -> text, or None for none, by the last part of a path."
    for name, text in files.items():
        last = name.rpartition("/")[2]
        text = changes.get(last.replace(".", "_"), text)
        if text is None: continue
        path = Path(str(folder), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


TEGRASTATS = '''
import sys, time
words = sys.argv[1:]
if len(words) != 2 or words[0] != "--interval" or not words[1].isdigit():
    print("Usage: tegrastats [-option]")
    sys.exit(1)
lines = {lines!r}
number = 0
while True:
    print(lines[min(number, len(lines) - 1)], flush=True)
    number += 1
    time.sleep(int(words[1]) / 1000)
'''

NANO_LINE = ("RAM {ram}/3956MB (lfb 331x4MB) SWAP 2/1982MB (cached 0MB) CPU [19%@1479,27%@1479,off,19%@1479] "
             "EMC_FREQ 9%@1600 GR3D_FREQ {gpu}%@{mhz} VIC_FREQ 0%@140 APE 25 PLL@39.5C CPU@43.5C PMIC@100C GPU@{heat}C "
             "AO@48C thermal@43C POM_5V_IN {mw}/3422 POM_5V_GPU 1113/313 POM_5V_CPU 538/701")


def nano_line(ram=1500, gpu=99, mhz=921, heat=43, mw=4500):
    "A line as a Nano prints it for root."
    return NANO_LINE.format(ram=ram, gpu=gpu, mhz=mhz, heat=heat, mw=mw)


def fake_tegrastats(folder, lines):
    "The words that start a program which prints the lines, then the last one for ever; strict about its arguments."
    path = Path(str(folder), "tegrastats.py")
    path.write_text(TEGRASTATS.format(lines=list(lines)))
    return (sys.executable, str(path))
