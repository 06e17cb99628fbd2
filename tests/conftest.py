"""Eight virtual CPU devices, strict promotion, and the fixtures that choose what runs."""

import gc
import importlib.util
import os
import pathlib

# Most of a test's time on CPUs is LLVM's, and what it optimises runs once. GPUs' kernels stay as they are.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        *(
            ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
            if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
            else []
        ),
        os.environ.get("XLA_FLAGS", ""),
    ]
)
# On machines with several tests a GPU, none may take most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import pytest

# Tracing takes half of the rest; with less garbage collection, and without the source's lines in programs, it is less.
gc.set_threshold(100_000, 50, 1000)
jax.config.update("jax_traceback_in_locations_limit", 0)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would multiply in TensorFloat-32


def pytest_addoption(parser):
    parser.addoption(
        "--traces",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parents[2] / "shared" / "data",
        help="folder of the recorded routing traces",
    )


@pytest.fixture(scope="session")
def traces(request) -> pathlib.Path:
    """Folder of the recorded routing traces; tests that need it are skipped where it is absent."""
    folder = request.config.getoption("--traces")
    if not folder.is_dir():
        pytest.skip(f"no routing traces at {folder}; name their folder with --traces")
    return folder


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def platform(request):
    """The default device of what the test runs: a CPU, or a GPU where those tests are asked for."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def mesh(request) -> jax.sharding.Mesh:
    """Of eight virtual CPU devices, or of eight, four or two GPUs."""
    devices = jax.devices(request.param)
    ranks = next((size for size in (8, 4, 2) if size <= len(devices)), None)
    if ranks is None:
        pytest.skip("needs two GPUs")
    return jax.sharding.Mesh(devices[:ranks], ("ep",))


@pytest.fixture
def as_in_a_new_python(monkeypatch):
    """With JAX's own settings, but the devices that the tests have, whose number cannot be set any more."""
    update = jax.config.update
    monkeypatch.setattr(jax.config, "update", lambda name, value: name == "jax_num_cpu_devices" or update(name, value))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.set_mesh(None):
        yield


@pytest.fixture
def fresh():
    """What reads peers' memory is traced anew, with what a test puts in place of its parts."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=["ffi", "xla"])
def implementation(request) -> str:
    """The custom calls, and the pure JAX that they are compared with."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
