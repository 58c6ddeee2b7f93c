"""What some boards have under ``/proc`` and ``/sys``, as far as measuring reads it: file names and their texts.

The shapes are those of kernel documentation (hwmon/ina3221, powercap, thermal sysfs, proc(5)) and of the Raspberry Pi
firmware; the numbers are examples.
"""

from __future__ import annotations

from pathlib import Path

_STAT = "cpu  {busy} 0 0 {idle} 50 0 0 {stolen} 7 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
_PI_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"

PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/stat": _STAT.format(busy=1000, idle=9000, stolen=0),
    "proc/meminfo": "MemTotal:        3884340 kB\n",
    _PI_FLAGS: "40000\n",
    "sys/class/thermal/thermal_zone0/temp": "61322\n",
    "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
    "sys/class/thermal/cooling_device0/max_state": "6\n",
    **{f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq": "1800000\n" for n in range(4)},
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
}
PI_4_LATER_AND_HOT = PI_4 | {
    "proc/stat": _STAT.format(busy=1300, idle=9500, stolen=0),
    _PI_FLAGS: "e0008\n",
    "sys/class/thermal/thermal_zone0/temp": "82764\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    **{f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq": "1200000\n" for n in range(4)},
}
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr2_input": "400\n",
    "sys/class/hwmon/hwmon1/in3_label": "NC\n",
    "sys/class/hwmon/hwmon2/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "3\n",
    "sys/class/thermal/thermal_zone0/temp": "48968\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/kernel/debug/nvmap/iovmm/clients": (
        "CLIENT                        PROCESS      PID        SIZE\n"
        "user                           python3     4711      66820K\n"
        "user                   gnome-shell bar     1234      11564K\n"
        "user                           python3     4711       1024K\n"
        "total                                               79408K\n"
    ),
}
NANO_OLD = {
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": "3500\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power1_input": "300\n",
}
XAVIER_WITHOUT_TOTAL = {
    f"sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0/{name}": text
    for n, rail, milliwatts in ((0, "GPU", 1000), (1, "CPU", 2000), (2, "SOC", 500))
    for name, text in ((f"rail_name_{n}", f"{rail}\n"), (f"in_power{n}_input", f"{milliwatts}\n"))
}
PC = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) N100\ncpu MHz\t\t: 3400.000\nflags\t\t: fpu vme\n"
    "processor\t: 1\ncpu MHz\t\t: 3200.000\n",
    "sys/class/hwmon/hwmon0/name": "nvme\n",
    "sys/class/hwmon/hwmon0/temp1_input": "99000\n",
    "sys/class/hwmon/hwmon1/name": "coretemp\n",
    "sys/class/hwmon/hwmon1/temp1_input": "55000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "0\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1\n",
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
}


def build(folder: Path, files: dict[str, str]) -> Path:
    """Write a board's files under ``folder``, over those that are there, and return it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
