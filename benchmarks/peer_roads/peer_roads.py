"""By which road custom calls reach the memory of other GPUs of a host: `python benchmarks/peer_roads/peer_roads.py`.

Each probe runs in processes of its own and under a time limit, and prints one line of JSON. What they compare:

- plain: addresses as they are, in one process, under each of XLA's allocators;
- handover: one process for each GPU. The region that an address lies in is exported as a file descriptor, handed over
  through a UNIX socket, and mapped by the peers;
- window: XLA's communicator, of its FFI extension for collectives, and NCCL's windows; one process and several;
- meet: a barrier that brings 8 bytes from every rank, on flags in peers' memory, beside `psum` and `all_gather`.

Reading is measured on two rows of 17.3 MB of other ranks a call, in a chain, without barriers: microseconds a call and
GB/s into each GPU. The library is compiled where it is missing, against the headers of jaxlib 0.10.2 (`--headers`).
"""

import argparse
import ctypes
import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

HERE = pathlib.Path(__file__).resolve()
LIBRARY = HERE.parent / "libpeer_roads.so"
HOME_ROWS, ROWS, ROW = 16, 2, 3 * 2048 * 1408  # rows of a rank, rows that a call reads, bf16 elements of a row
ALLOCATORS = {
    "default": {},
    "preallocate=false": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "platform": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    "cuda_async": {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
}
COMMAND_BUFFERS = {
    "on": "",
    "off": "--xla_gpu_enable_command_buffer=",
    "all": "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,COLLECTIVES",
}


def probes() -> list[dict[str, Any]]:
    plain = [{"kind": "plain", "allocator": a, "command_buffers": c} for c in ("on", "off") for a in ALLOCATORS]
    handover = [{"kind": "handover", "allocator": a, "processes": True} for a in ALLOCATORS]
    handover.append({"kind": "handover", "allocator": "default", "processes": True, "visible": True})
    window = [{"kind": "window", "processes": p, "whole": w} for p in (False, True) for w in (1, 0)]
    window += [{"kind": "window", "processes": p, "whole": 1, "allocator": "preallocate=false"} for p in (False, True)]
    window.append({"kind": "window", "processes": False, "whole": 1, "command_buffers": "off"})
    meet = [{"kind": "meet", "processes": p, "command_buffers": c} for p in (False, True) for c in COMMAND_BUFFERS]
    others = [{"kind": "meet", "allocator": a} for a in ALLOCATORS if a != "default"]
    default = {"allocator": "default", "command_buffers": "on", "processes": False, "visible": False}
    return [default | p for p in meet + window[:4] + handover[:1] + plain + handover[1:] + window[4:] + others]


def name(probe: dict[str, Any]) -> str:
    words = [probe["kind"], "processes" if probe["processes"] else "one process", probe["allocator"]]
    words += [f"command buffers {probe['command_buffers']}"]
    words += ["one GPU visible"] * probe["visible"]
    if "whole" in probe:
        words.append("window of the region" if probe["whole"] else "window of the buffer")
    return ", ".join(words)


# ----------------------------------------------------------------------------------------------------------------------
# The parent: no JAX here


def build(headers: str) -> None:
    command = ["nvcc", "-shared", "-std=c++17", "-O2", "-arch=sm_90", "-w", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += [f"-I{headers}", "-o", str(LIBRARY), str(HERE.with_suffix(".cu")), "-ldl"]
    subprocess.run(command, check=True, timeout=300)


def run_probe(probe: dict[str, Any], num_gpus: int, limit: float) -> dict[str, Any]:
    """Starts its processes, ends them all at the limit, and merges what they say."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {COMMAND_BUFFERS[probe['command_buffers']]}".strip()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = num_gpus if probe["processes"] else 1
    token = f"peer-roads-{os.getpid()}-{time.monotonic_ns()}"
    children, files = [], []
    for rank in range(world):
        config = probe | {"rank": rank, "world": world, "port": port, "token": token, "limit": limit}
        env = os.environ | ALLOCATORS[probe["allocator"]] | {"XLA_FLAGS": flags}
        env.setdefault("NCCL_DEBUG", "WARN")
        if probe["visible"]:
            env["CUDA_VISIBLE_DEVICES"] = str(rank)
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        files.append(file)
        command = [sys.executable, str(HERE), "--child", json.dumps(config)]
        children.append(
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        )
    end, grace = time.monotonic() + limit, None
    while any(c.poll() is None for c in children) and time.monotonic() < min(end, grace or end):
        if grace is None and any(c.poll() not in (None, 0) for c in children):
            grace = time.monotonic() + 8  # the others wait for it in vain
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    said, errors = [], []
    for rank, (child, file) in enumerate(zip(children, files, strict=True)):
        file.seek(0)
        text = file.read()
        found = re.findall(r"^RESULT (.*)$", text, re.M)
        errors += [f"NCCL: {w[:200]}" for w in dict.fromkeys(re.findall(r"NCCL WARN (.*)$", text, re.M))][:3]
        if found:
            said.append(json.loads(found[-1]))
        else:
            if re.search(r"^Timeout \(", text, re.M) or (child.returncode or 0) < 0:
                errors.append(f"rank {rank} was ended at its limit, or by a signal ({child.returncode})")
            errors += re.findall(r"^NOTE (.*)$", text, re.M)[-6:]
            lines = [line for line in text.splitlines() if re.search(r"[Ee]rror|ERROR|FAIL|failed|Fatal", line)]
            lines = lines or text.splitlines()
            errors.append(f"rank {rank} ended with {child.returncode}: {' | '.join(lines[-2:])[-600:]}")
    result: dict[str, Any] = {"probe": name(probe), "ok": len(said) == world and all(s["ok"] for s in said)}
    for key in sorted({k for s in said for k in s} - {"ok", "why"}):
        values = [s[key] for s in said if s.get(key) is not None]
        result[key] = round(sum(values) / len(values), 1) if values else None
    result["why"] = " || ".join(dict.fromkeys([s["why"] for s in said if s["why"]] + errors))[:2500]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that names of probes must match")
    parser.add_argument("--limit", type=float, default=75, help="seconds for a probe")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all probes; the rest are not started")
    parser.add_argument("--headers", help="jaxlib 0.10.2's include folder, to compile the library")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--output", help="a file that the lines are added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        Child(json.loads(options.child)).run()
        return
    chosen = [p for p in probes() if re.search(options.only, name(p))]
    if options.list:
        print("\n".join(name(p) for p in chosen))
        return
    start = time.monotonic()
    if options.headers:
        build(options.headers)
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    num_gpus = min(8, gpus.count("UUID: GPU"))
    print(gpus.splitlines()[0].split(" (")[0], "x", num_gpus, flush=True)
    for probe in chosen:
        left = options.budget - (time.monotonic() - start)
        if left < 25:
            print(json.dumps({"probe": name(probe), "ok": None, "why": "not started: no time left"}), flush=True)
            continue
        began = time.monotonic()
        result = run_probe(probe, num_gpus, min(options.limit, left))
        line = json.dumps(result | {"seconds": round(time.monotonic() - began, 1)})
        print(line, flush=True)
        if options.output:
            with pathlib.Path(options.output).open("a") as f:
                f.write(line + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Processes that meet through UNIX sockets of the abstract namespace


class Meeting:
    """All ranks' payloads and open files, each under a name of its own for every exchange."""

    def __init__(self, token: str, rank: int, world: int) -> None:
        self.token, self.rank, self.world = token, rank, world

    def _address(self, what: str, rank: int) -> str:
        return f"\0{self.token}.{what}.{rank}"

    def exchange(self, what: str, payload: dict[str, Any], fds: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
        server = socket.socket(socket.AF_UNIX)
        server.bind(self._address(what, self.rank))
        server.listen(self.world)
        server.settimeout(30)

        def serve() -> None:
            for _ in range(self.world - 1):
                peer, _ = server.accept()
                with peer:
                    socket.send_fds(peer, [json.dumps(payload).encode()], fds)
            server.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        received = []
        for rank in range(self.world):
            received.append((payload, fds) if rank == self.rank else self._from(what, rank))
        thread.join(30)
        return received

    def _from(self, what: str, rank: int) -> tuple[dict[str, Any], list[int]]:
        end = time.monotonic() + 30
        while True:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(30)
                try:
                    s.connect(self._address(what, rank))
                except (ConnectionRefusedError, FileNotFoundError):
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)
                    continue
                message, fds, _, _ = socket.recv_fds(s, 1 << 16, 4)
                return json.loads(message), list(fds)


def pidfd_getfd(pid: int, fd: int) -> str:
    """Whether the other way of taking a peer's file is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        result = libc.syscall(438, os.pidfd_open(pid), fd, 0)
    except OSError as error:
        return f"pidfd_open: {error.strerror}"
    return "works" if result >= 0 else os.strerror(ctypes.get_errno())


# ----------------------------------------------------------------------------------------------------------------------
# A process of a probe


class Child:
    def __init__(self, config: dict[str, Any]) -> None:
        import faulthandler

        faulthandler.dump_traceback_later(config["limit"] - 3, exit=True)
        self.config = config
        self.rank, self.world = config["rank"], config["world"]
        self.why: list[str] = []
        self._count: Any = None

    def run(self) -> None:
        try:
            result = self.measure()
        except Exception as error:  # a probe that fails is an answer
            traceback.print_exc()
            self.why.append(f"{type(error).__name__}: {str(error)[:700]}")
            result = {"ok": False}
        result["why"] = "; ".join([*self.why, *filter(None, [self.lib.roads_notes().decode()])])
        print("\nRESULT", json.dumps(result), flush=True)
        if result["ok"] and self.config["processes"]:
            self.meeting.exchange("end", {}, [])
            time.sleep(0 if self.rank else 1)  # the first one serves the others
        os._exit(not result["ok"])  # what is mapped is not taken apart

    def measure(self) -> dict[str, Any]:
        import jax

        self._load()
        jax.config.update("jax_enable_x64", True)
        if self.config["processes"]:
            local = 0 if self.config["visible"] else self.rank
            address = f"127.0.0.1:{self.config['port']}"
            jax.distributed.initialize(address, self.world, self.rank, local_device_ids=[local])
        self._register()
        devices = jax.devices()
        self.G = len(devices)
        self.local = [(devices.index(d), d.local_hardware_id) for d in jax.local_devices()]  # ranks and CUDA's devices
        self.mesh = jax.sharding.Mesh(devices, ("ep",))
        self.split = jax.NamedSharding(self.mesh, jax.P("ep"))
        self.meeting = Meeting(self.config["token"], self.rank, self.world)
        return getattr(self, self.config["kind"])()

    def _load(self) -> None:
        lib = self.lib = ctypes.CDLL(str(LIBRARY))
        u64, i32, out64, out32 = ctypes.c_uint64, ctypes.c_int, *map(ctypes.POINTER, (ctypes.c_uint64, ctypes.c_int))
        lib.roads_notes.restype = ctypes.c_char_p
        lib.roads_region.argtypes = i32, u64, out64, out64
        lib.roads_identity.argtypes = i32, u64
        lib.roads_identity.restype = u64
        lib.roads_export.argtypes = i32, u64, out32, out32
        lib.roads_import.argtypes = i32, i32, u64, out64
        lib.roads_ipc_handle.argtypes = i32, u64, ctypes.c_char_p
        lib.roads_place.argtypes = i32, i32, i32, out64, ctypes.c_char_p
        lib.roads_peer_place.argtypes = i32, i32, i32, u64, ctypes.c_char_p

    def _register(self) -> None:
        import jax

        for target in ("Address", "Pull", "Meet", "Send", "Receive"):
            capsule = jax.ffi.pycapsule(getattr(self.lib, target))
            jax.ffi.register_ffi_target(f"roads_{target}", capsule, platform="CUDA")
        if self.config["kind"] == "window":
            stages = {"prepare": "WindowPrepare", "initialize": "WindowInitialize", "execute": "WindowTable"}
            bundle = {stage: jax.ffi.pycapsule(getattr(self.lib, symbol)) for stage, symbol in stages.items()}
            jax.ffi.register_ffi_target("roads_WindowTable", bundle, platform="CUDA")

    # What the probes share

    def smap(self, f: Any, donate: tuple[int, ...] = ()) -> Any:
        import jax

        spec = jax.P("ep")
        mapped = jax.shard_map(f, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def rows_of_ranks(self, salt: int) -> Any:
        """bf16 [G * HOME_ROWS, ROW], whose element i of row r is (r * ROW + i + salt) % 251."""
        import jax
        import jax.numpy as jnp

        def make() -> Any:
            at = jnp.arange(self.G * HOME_ROWS * ROW, dtype=jnp.int64).reshape(-1, ROW)
            return ((at + salt) % 251).astype(jnp.bfloat16)

        return jax.block_until_ready(jax.jit(make, out_shardings=self.split)())

    def filled(self, shape: tuple[int, ...], value: float, dtype: Any) -> Any:
        import jax
        import jax.numpy as jnp

        return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=self.split)()

    def from_local(self, values: dict[int, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        """[G, *shape] of what each rank has."""
        import jax
        import numpy as np

        def part(index: Any) -> Any:
            return np.asarray(values[index[0].start or 0], dtype).reshape(1, *shape)

        return jax.make_array_from_callback((self.G, *shape), self.split, part)

    def addresses(self, array: Any) -> dict[int, int]:
        """Of this process's shards, by rank."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        call = jax.ffi.ffi_call("roads_Address", jax.ShapeDtypeStruct((1,), jnp.uint64))
        found = self.smap(call)(array)
        return {s.index[0].start or 0: int(np.asarray(s.data)[0]) for s in found.addressable_shards}

    def region(self, device: int, at: int) -> tuple[int, int]:
        base, size = ctypes.c_uint64(), ctypes.c_uint64()
        error = self.lib.roads_region(device, at, base, size)
        if error:
            raise RuntimeError(f"cuMemGetAddressRange: error {error}")
        return base.value, size.value

    def export(self, device: int, base: int) -> tuple[int, int, int]:
        """The driver's error, a file descriptor, and the kinds of handles that the memory was allocated for."""
        fd, kinds = ctypes.c_int(-1), ctypes.c_int(-1)
        return self.lib.roads_export(device, base, fd, kinds), fd.value, kinds.value

    def wanted(self, k: int) -> dict[int, list[int]]:
        """Rows that each rank of this process reads in the k-th call: of the ranks after it."""
        far = [1 + d % max(1, self.G - 1) for d in range(ROWS)]
        return {
            g: [(g + d) % self.G * HOME_ROWS + (k + 7 * i) % HOME_ROWS for i, d in enumerate(far)]
            for g, _ in self.local
        }

    def pull(self, table: Any, rows: Any, home: Any, out: Any) -> Any:
        import jax
        import numpy as np

        call = jax.ffi.ffi_call("roads_Pull", out, input_output_aliases={3: 0})
        return call(table.reshape(-1), rows.reshape(-1), home, out, blocks=np.int64(16))

    def wrong(self, out: Any, k: int, salt: int) -> int:
        """Elements of this process's shards of the k-th call's result that are not the peers' values."""
        import jax.numpy as jnp
        import numpy as np

        def count(out: Any, rows: Any, salt: Any) -> Any:
            at = rows.reshape(-1, 1).astype(jnp.int64) * ROW + jnp.arange(ROW) + salt
            return (out != (at % 251).astype(jnp.bfloat16)).sum().reshape(1)

        if self._count is None:
            self._count = self.smap(count)
        rows = self.from_local(self.wanted(k), (ROWS,), np.int32)
        salts = self.from_local({g: [salt] for g, _ in self.local}, (), np.int64)
        counts = self._count(out, rows, salts)
        return int(sum(np.asarray(s.data).sum() for s in counts.addressable_shards))

    def read(self, table: Any, home: Any, salt: int) -> dict[str, Any]:
        """Whether all values are right, and how fast a chain of reads is."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        rows = [self.from_local(self.wanted(k), (ROWS,), np.int32) for k in range(20)]

        def chain(out: Any, table: Any, home: Any, *rows: Any) -> Any:
            for r in rows:
                out = self.pull(table, r, home, out)
            return out

        step = self.smap(chain, donate=(0,))
        blank = functools.partial(self.filled, (self.G * ROWS, ROW), -1, jnp.bfloat16)
        wrong, times = 0, {}
        for number in (4, 20):
            out = step(blank(), table, home, *rows[:number])
            wrong += self.wrong(out, number - 1, salt)
            samples = []
            for _ in range(5):
                self.together()
                start = time.perf_counter()
                for _ in range(4):
                    out = step(out, table, home, *rows[:number])
                jax.block_until_ready(out)
                samples.append((time.perf_counter() - start) / 4 * 1e6)
            wrong += self.wrong(out, number - 1, salt)
            times[number] = float(np.median(samples))
        us = (times[20] - times[4]) / 16
        if wrong:
            self.why.append(f"{wrong} wrong values")
        return {"ok": wrong == 0, "us": us, "gb_per_s": ROWS * ROW * 2 / us / 1e3}

    def together(self) -> None:
        if self.config["processes"]:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("roads")

    # The probes

    def plain(self) -> dict[str, Any]:
        import numpy as np

        home = self.rows_of_ranks(0)
        more = [self.rows_of_ranks(salt) for salt in (1, 2, 3)]
        at = self.addresses(home)
        regions: set[tuple[int, int]] = set()
        for array in (home, *more):
            regions |= {self.region(d, self.addresses(array)[r]) for r, d in self.local}
        rank, device = self.local[0]
        base, size = self.region(device, at[rank])
        error, _, kinds = self.export(device, base)
        ipc = self.lib.roads_ipc_handle(device, base, ctypes.create_string_buffer(64))
        self.why.append(
            f"{len(more) + 1} arrays on {self.G} GPUs lie in {len(regions)} regions; the first: {size / 1e6:.0f} MB at "
            f"{base:#x}, export as a file: error {error}, allocated for handle types {kinds}, cudaIpc: error {ipc}"
        )
        # Whether an address that is given out again can be told apart, should memory behind it have changed.
        lives = []
        for salt in (4, 5):
            one = self.addresses(self.rows_of_ranks(salt))[rank]
            lives.append((one, self.lib.roads_identity(device, one)))
        (first, old), (second, new) = lives
        self.why.append(f"freed and allocated again: same address {first == second}, identities {old}, {new}")
        table = self.from_local({g: [at[r] for r in range(self.G)] for g in range(self.G)}, (self.G,), np.uint64)
        return self.read(table, home, 0)

    def handover(self) -> dict[str, Any]:
        import numpy as np

        (rank, device) = self.local[0]
        regions: dict[tuple[int, int], int] = {}  # mapped base by rank and its own base

        def table_of(array: Any, what: str) -> Any:
            mine = self.addresses(array)[rank]
            base, size = self.region(device, mine)
            error, fd, kinds = self.export(device, base)
            if error:
                ipc = self.lib.roads_ipc_handle(device, base, ctypes.create_string_buffer(64))
                self.why.append(f"{what}: export: error {error}, region of {size / 1e6:.0f} MB, cudaIpc: error {ipc}")
            payload = {"at": mine, "base": base, "size": size, "pid": os.getpid(), "fd": fd}
            told = self.meeting.exchange(what, payload, [fd] if not error else [])
            self.why.append(f"{what}: region of {size / 1e6:.0f} MB at {base:#x}, handle types {kinds}")
            local = []
            for peer, (p, fds) in enumerate(told):
                if peer == rank:
                    local.append(mine)
                    continue
                if not fds:
                    raise RuntimeError("; ".join(self.why) or f"rank {peer} could not export")
                key = peer, p["base"]
                if key not in regions:
                    mapped = ctypes.c_uint64()
                    start = time.perf_counter()
                    error = self.lib.roads_import(device, fds[0], p["size"], mapped)
                    us = (time.perf_counter() - start) * 1e6
                    if error:
                        raise RuntimeError(f"{what}: import and map: error {error}")
                    regions[key] = mapped.value
                    self.why.append(f"{what}: mapped rank {peer}'s in {us:.0f} us")
                    if len(regions) == 1:
                        self.why.append(f"pidfd_getfd: {pidfd_getfd(p['pid'], p['fd'])}")
                        self.lib.roads_spin(device, 500)
                        start = time.perf_counter()
                        error = self.lib.roads_import(device, fds[0], p["size"], mapped)
                        us = (time.perf_counter() - start) * 1e6
                        self.why.append(f"again while a kernel runs for 0.5 s: {us:.0f} us, error {error}")
                local.append(regions[key] + p["at"] - p["base"])
            self.meeting.exchange(what + " mapped", {}, [])
            return self.from_local({rank: local}, (self.G,), np.uint64)

        home = self.rows_of_ranks(0)
        result = self.read(table_of(home, "first"), home, 0)
        more = [self.rows_of_ranks(salt) for salt in range(1, 7)]
        before = len(regions)
        later = self.read(table_of(more[-1], "later"), more[-1], 6)
        self.why.append(f"later array: {later['gb_per_s']:.0f} GB/s, {len(regions) - before} regions were new")
        return result | {"ok": result["ok"] and later["ok"]}

    def window(self) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp
        import numpy as np

        def table_of(home: Any) -> Any:
            call = jax.ffi.ffi_call("roads_WindowTable", jax.ShapeDtypeStruct((self.G,), jnp.uint64))
            return call(home, num_ranks=np.int64(self.G), whole=np.int64(self.config["whole"]))[None]

        home = self.rows_of_ranks(0)
        table = jax.block_until_ready(self.smap(table_of)(home))
        result = self.read(table, home, 0)

        rows = [self.from_local(self.wanted(k), (ROWS,), np.int32) for k in range(6)]

        def chain(out: Any, home: Any, *rows: Any) -> Any:
            for r in rows:
                out = self.pull(table_of(home), r, home, out)
            return out

        blank = self.filled((self.G * ROWS, ROW), -1, jnp.bfloat16)
        inside = self.wrong(self.smap(chain)(blank, home, *rows), 5, 0)
        self.why.append(f"table and reads in one program: {inside} wrong values")
        self._note_now()

        # A program's own buffer moves with what else is allocated: how often must it be registered?
        def temporary(home: Any) -> Any:
            return table_of(home * 2)

        step, held = self.smap(temporary), []
        try:
            for i in range(5):
                jax.block_until_ready(step(home))
                held.append(self.filled((self.G, (i + 1) << 20), 0, jnp.float32))
            self.why.append("temporaries:")
        except Exception as error:  # what happens then is the answer
            self.why.append(f"temporaries: after {len(held)} calls {str(error)[:300]}")
        return result | {"ok": result["ok"] and inside == 0}

    def _note_now(self) -> None:
        self.why.append(self.lib.roads_notes().decode())

    def meet(self) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp
        import numpy as np

        self._places()
        one = jax.ShapeDtypeStruct((1,), jnp.uint64)
        all_of_them = jax.ShapeDtypeStruct((self.G,), jnp.uint64)
        meet = jax.ffi.ffi_call("roads_Meet", all_of_them)
        send = jax.ffi.ffi_call("roads_Send", one, input_output_aliases={0: 0})
        receive = jax.ffi.ffi_call("roads_Receive", all_of_them)

        # Rank r writes its mail (r + 1) * 50 us after the start of a step, plainly; who reads after a meeting sees all.
        def deliver(x: Any, meets: bool) -> Any:
            wrong = jnp.zeros((1,), jnp.int32)
            for i in range(8):
                sent = send(x + jnp.uint64(i), nanoseconds=np.int64(50_000))
                ready = meet(sent) if meets else jnp.tile(sent, self.G)
                got = receive(ready)
                wrong = wrong + (got != x + jnp.uint64(i)).sum(dtype=jnp.int32)
                apart = meet(got[:1])  # nobody writes again before all have read
                x = x + 100 + (apart[:1] >> jnp.uint64(63))  # which adds 0
            return wrong

        wrong = {}
        for meets in (True, False):
            step = self.smap(functools.partial(deliver, meets=meets))
            total = 0
            for i in range(10):
                counts = step(self.from_local({g: [10_000 * (i + 1)] for g, _ in self.local}, (), np.uint64))
                total += int(sum(np.asarray(s.data).sum() for s in counts.addressable_shards))
            wrong[meets] = total
        self.why.append(f"mail read wrongly: {wrong[True]} with, {wrong[False]} without the meeting (a control)")

        def scale(x: Any) -> Any:  # ranks differ, so that no collective is simplified away
            return x * (1 + jax.lax.axis_index("ep")).astype(x.dtype)

        def address(x: Any) -> Any:
            call = jax.ffi.ffi_call("roads_Address", one)
            return jnp.tile(call(x), self.G)

        steps = {
            "us": lambda x: scale(meet(x)[:1]),
            "psum_us": lambda x: scale(jax.lax.psum(x.astype(jnp.float32), "ep").astype(jnp.uint64)),
            "all_gather_us": lambda x: scale(jax.lax.all_gather(x, "ep", tiled=True)[:1]),
            "empty_call_us": lambda x: scale(address(x)[:1]),
        }

        def chain(x: Any, step: Any) -> Any:
            for _ in range(32):
                x = step(x)
            return x

        result: dict[str, Any] = {}
        ends = {}
        for what, step in steps.items():
            run = self.smap(functools.partial(chain, step=step))
            x = self.from_local({g: [g + 1] for g, _ in self.local}, (), np.uint64)
            jax.block_until_ready(run(x))
            samples = []
            for _ in range(7):
                self.together()
                start = time.perf_counter()
                for _ in range(10):
                    y = run(x)
                jax.block_until_ready(y)
                samples.append((time.perf_counter() - start) / 320 * 1e6)
            result[what] = float(np.median(samples))
            ends[what] = [np.asarray(s.data).tolist() for s in y.addressable_shards]
        if ends["us"] != ends["all_gather_us"]:
            self.why.append(f"values met {ends['us']}, gathered {ends['all_gather_us']}")
        late = sum(self.lib.roads_late(d) for _, d in self.local)
        if late:
            self.why.append(f"{late} waited for longer than 2 s")
        same = ends["us"] == ends["all_gather_us"]
        return {"ok": wrong[True] == 0 and wrong[False] > 0 and not late and same} | result

    def _places(self) -> None:
        """A meeting place on every GPU, known to all others."""
        mine = {}
        for rank, device in self.local:
            at, handle = ctypes.c_uint64(), ctypes.create_string_buffer(64)
            error = self.lib.roads_place(device, rank, self.G, at, handle)
            if error:
                raise RuntimeError(f"a place on device {device}: error {error}")
            mine[rank] = {"at": at.value, "device": device, "handle": handle.raw.hex()}
        if self.config["processes"]:
            told = self.meeting.exchange("places", mine[self.local[0][0]], [])
            all_places = {peer: p for peer, (p, _) in enumerate(told)}
        else:
            all_places = mine
        for rank, device in self.local:
            for peer, place in all_places.items():
                if peer != rank:
                    shared = bytes.fromhex(place["handle"]) if self.config["processes"] else None
                    error = self.lib.roads_peer_place(device, peer, place["device"], place["at"], shared)
                    if error:
                        raise RuntimeError(f"the place of rank {peer} for device {device}: error {error}")


if __name__ == "__main__":
    main()
