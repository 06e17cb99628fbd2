"""Several processes, as on several machines: the numbers of one process with as many devices."""

import pathlib
import socket
import subprocess
import sys

import numpy as np


def start(processes: int, out: pathlib.Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = pathlib.Path(__file__).with_name("moe_process.py")
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, (process, processes, port)), out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    outputs = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.npz"
        running = start(processes, out)
        try:
            for process in running:
                text, _ = process.communicate(timeout=300)
                assert process.returncode == 0, text
        finally:
            for process in running:
                process.kill()
        with np.load(out, allow_pickle=False) as archive:
            outputs.append({name: archive[name] for name in archive.files})
    one, two = outputs
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6, atol=1e-6 * np.max(np.abs(value)), err_msg=name)
