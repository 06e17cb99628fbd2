"""Several processes, as on several machines or with one for each GPU: the numbers of one process."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest


def run(script: str, processes: int, *arguments: str, **environment: str) -> None:
    """As many processes of a script, each with its number; the first that fails fails all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = pathlib.Path(__file__).with_name(script)
    running = [
        subprocess.Popen(
            [sys.executable, path, *map(str, (process, processes, port)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {name: value.format(process=process) for name, value in environment.items()},
        )
        for process in range(processes)
    ]
    try:
        for process in running:
            text, _ = process.communicate(timeout=300)
            assert process.returncode == 0, text
    finally:
        for process in running:
            process.kill()


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    outputs = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.npz"
        run("moe_process.py", processes, str(out))
        with np.load(out, allow_pickle=False) as archive:
            outputs.append({name: archive[name] for name in archive.files})
    one, two = outputs
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6, atol=1e-6 * np.max(np.abs(value)), err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "environment",
    [
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"},
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
        {"CUDA_VISIBLE_DEVICES": "{process}"},
    ],
    ids=["preallocated", "growing", "platform", "cuda_async", "one visible"],
)
def test_a_process_for_each_gpu(environment):
    """Copies come from the memory of the others' GPUs; from a pool they come by collectives."""
    gpus = len(jax.devices("gpu"))
    processes = next((size for size in (8, 4, 2) if size <= gpus), None)
    if processes is None:
        pytest.skip("needs two GPUs")
    run("peer_process.py", processes, **environment)
