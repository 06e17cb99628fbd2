"""Builds ffi/solve_mathdx.cu: the solve whose Cholesky factorisation and triangular solves are cuSolverDx's.

CMake runs this at build time; no GPU is needed, and nothing is left to compile at run time. For each architecture
libmathdx generates the cuSolverDx functions for the sizes asked for, nvcc compiles the kernels that call them, and
nvJitLink links both into machine code. A fat binary holds the result for all architectures.

Writes solve_mathdx.fatbin and solve_mathdx_sizes.h into the output folder.
"""

import argparse
import ctypes
import importlib.util
import pathlib
import re
import subprocess
import sys

WHEELS = "nvidia-libmathdx-cu13==0.4.1.15 nvidia-cuda-nvrtc==13.0.88 nvidia-nvjitlink==13.0.88"
MAX_SIZE = 128
RIGHT_SIDES = 2

# Of libcommondx.h and libcusolverdx.h.
SIZE, TYPE, PRECISION, SM, EXECUTION, BLOCK_DIM, API, FUNCTION, ARRANGEMENT, FILL_MODE = range(10)
LEADING_DIMENSION = 13
REAL, FLOAT64, BLOCK, SHARED_MEMORY, COLUMN_MAJOR, LOWER = 0, 6, 1, 0, 0, 1
POTRF, POTRS = 2, 3
SYMBOL_NAME = 0
# Of nvJitLink.h.
LTO_IR, FATBIN, OBJECT = 3, 4, 5


class Failure(Exception):
    """Reported without a traceback."""


def default_threads(size: int) -> int:
    """Threads of the kernel for pairs: they own a variable each, and there are four a rank with two redundants."""
    return min(512, max(64, 4 * 2 ** (size - 1).bit_length()))


def general_threads(size: int) -> int:
    """Threads of the kernel for placements that the kernel for pairs does not take: they own four variables each."""
    return max(128, default_threads(size))


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """[(ranks, threads)] of "8;32x256"."""
    sizes = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", entry)
        if match is None:
            raise Failure(f'sizes are group sizes, or RANKSxTHREADS, like "8;32x256"; got {entry!r}')
        size = int(match[1])
        threads = int(match[2] or default_threads(size))
        if not 2 <= size <= MAX_SIZE:
            raise Failure(f"a group size is 2 to {MAX_SIZE}; got {entry!r}")
        if threads % 32 or not max(32, size) <= threads <= 1024:
            raise Failure(f"threads are a multiple of 32, at least the group size and at most 1024; got {entry!r}")
        sizes[size] = threads
    return sorted(sizes.items())


def load_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Libmathdx and nvJitLink, from the wheels."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(p, "cu13", "lib") for p in (spec and spec.submodule_search_locations) or []]

    def load(pattern: str) -> ctypes.CDLL:
        for folder in folders:
            for path in sorted(folder.glob(pattern)):
                return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        raise Failure(f"{sys.executable} has no {pattern}: pip install {WHEELS}")

    # libmathdx finds NVRTC among the libraries loaded before, and NVRTC its builtins.
    load("libnvrtc-builtins.so.13.0")
    load("libnvrtc.so.13")
    return load("libmathdx.so.0"), load("libnvJitLink.so.13")


class MathDx:
    """Functions of cuSolverDx, through libmathdx."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status == 0:
            return
        size = ctypes.c_size_t()
        text = b""
        if self._library.commondxGetLastErrorStrSize(ctypes.byref(size)) == 0:
            buffer = ctypes.create_string_buffer(size.value)
            self._library.commondxGetLastErrorStr(ctypes.byref(ctypes.c_int()), size, buffer)
            text = buffer.value
        raise Failure(f"libmathdx: {name} failed with status {status}: {text.decode(errors='replace')}")

    def descriptor(self, name: str, function: int, size: int, threads: int, architecture: int) -> ctypes.c_longlong:
        """Cholesky in float64 of a lower triangle in shared memory by a whole block, or its solve of two right sides.

        Columns of the matrix are size + 1 apart, so that a row lies in different banks; right sides are `size` apart.
        """
        descriptor = ctypes.c_longlong()
        self._call("cusolverdxCreateDescriptor", ctypes.byref(descriptor))
        operators = {
            SIZE: [size, size, RIGHT_SIDES],
            TYPE: [REAL],
            PRECISION: [FLOAT64],
            SM: [10 * architecture],
            EXECUTION: [BLOCK],
            BLOCK_DIM: [threads, 1, 1],
            API: [SHARED_MEMORY],
            FUNCTION: [function],
            ARRANGEMENT: [COLUMN_MAJOR, COLUMN_MAJOR],
            FILL_MODE: [LOWER],
            LEADING_DIMENSION: [size + 1, size],
        }
        for operator, values in operators.items():
            array = (ctypes.c_longlong * len(values))(*values)
            if len(values) == 1:
                self._call("cusolverdxSetOperatorInt64", descriptor, operator, array[0])
            else:
                self._call("cusolverdxSetOperatorInt64s", descriptor, operator, ctypes.c_size_t(len(values)), array)
        self._call("cusolverdxSetOptionStr", descriptor, SYMBOL_NAME, name.encode())
        return descriptor

    def _bytes(self, name: str, descriptor: ctypes.c_longlong) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", descriptor, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, descriptor, size, buffer)
        return buffer.raw

    def lto_ir(self, descriptor: ctypes.c_longlong) -> bytes:
        return self._bytes("cusolverdxGetLTOIR", descriptor)

    def universal_fatbin(self, descriptor: ctypes.c_longlong) -> bytes:
        """The routines that all generated functions call."""
        return self._bytes("cusolverdxGetUniversalFATBIN", descriptor)


def link(library: ctypes.CDLL, architecture: int, inputs: list[tuple[int, str, bytes]]) -> tuple[bytes, str]:
    """A cubin of (input type, name, data), and the linker's report."""
    major, minor = ctypes.c_uint(), ctypes.c_uint()
    library.nvJitLinkVersion(ctypes.byref(major), ctypes.byref(minor))
    handle = ctypes.c_void_p()

    def call(name: str, *args: object) -> int:
        return getattr(library, f"__nvJitLink{name}_{major.value}_{minor.value}")(*args)

    def fetch(name: str) -> bytes:
        size = ctypes.c_size_t()
        if call(f"Get{name}Size", handle, ctypes.byref(size)) != 0 or size.value == 0:
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        call(f"Get{name}", handle, buffer)
        return buffer.raw

    # Without -optimize-unused-variables the tables of all cuSolverDx routines stay: 2 MB.
    options = [b"-lto", b"-O3", b"-verbose", b"-optimize-unused-variables", f"-arch=sm_{architecture}".encode()]
    array = (ctypes.c_char_p * len(options))(*options)
    status = call("Create", ctypes.byref(handle), ctypes.c_uint32(len(options)), array)
    if status != 0:
        raise Failure(f"nvJitLink: status {status} for sm_{architecture}")
    for kind, name, data in inputs:
        status = status or call("AddData", handle, kind, data, ctypes.c_size_t(len(data)), name.encode())
    status = status or call("Complete", handle)
    if status != 0:
        raise Failure(f"nvJitLink: status {status} for sm_{architecture}: {fetch('ErrorLog').decode(errors='replace')}")
    cubin, report = fetch("LinkedCubin"), fetch("InfoLog").rstrip(b"\0").decode(errors="replace")
    call("Destroy", ctypes.byref(handle))
    return cubin, report


def header(sizes: list[tuple[int, int]], functions: list[tuple[int, int]]) -> str:
    """X-macros over the kernels, X(ranks, threads for pairs, threads else), and the generated functions."""
    kernels = " ".join(f"X({size}, {threads}, {general_threads(size)})" for size, threads in sizes)
    generated = " ".join(f"X({size}, {threads})" for size, threads in functions)
    return (
        "// Written by cmake/mathdx.py.\n#pragma once\n\n"
        f"#define LPLB_MATHDX_SIZES(X) {kernels}\n"
        f"#define LPLB_MATHDX_FUNCTIONS(X) {generated}\n"
    )


def build(args: argparse.Namespace) -> None:
    sizes = parse_sizes(args.sizes)
    functions = sorted({*sizes, *((size, general_threads(size)) for size, _ in sizes)})
    architectures = [int(re.sub(r"[af]$", "", a)) for a in re.split(r"[;,\s]+", args.architectures.strip())]
    mathdx_library, linker = load_libraries()
    if args.check:
        return
    mathdx = MathDx(mathdx_library)
    args.out.mkdir(parents=True, exist_ok=True)
    args.out.joinpath("solve_mathdx_sizes.h").write_text(header(sizes, functions))

    images = []
    for architecture in architectures:
        compiled = args.out / f"solve_mathdx_{architecture}.o"
        target = f"-gencode=arch=compute_{architecture},code=lto_{architecture}"
        command = [args.nvcc, "-dc", target, "-std=c++17", "-O3", f"-I{args.out}", *args.nvcc_option]
        subprocess.run([*command, "-o", compiled, args.source], check=True)
        inputs = [(OBJECT, "solve_mathdx", compiled.read_bytes())]
        for size, threads in functions:
            for name, function in (("potrf", POTRF), ("potrs", POTRS)):
                symbol = f"lplb_{name}_{size}_{threads}"
                descriptor = mathdx.descriptor(symbol, function, size, threads, architecture)
                inputs.append((LTO_IR, symbol, mathdx.lto_ir(descriptor)))
        inputs.append((FATBIN, "cusolverdx", mathdx.universal_fatbin(descriptor)))
        cubin, report = link(linker, architecture, inputs)
        path = args.out / f"solve_mathdx_{architecture}.cubin"
        path.write_bytes(cubin)
        path.with_suffix(".log").write_text(report)
        images.append(f"--image3=kind=elf,sm={architecture},file={path}")
    fatbinary = pathlib.Path(args.nvcc).with_name("fatbinary")
    if not fatbinary.exists():  # nvcc may be a wrapper
        dry_run = subprocess.run([args.nvcc, "--dryrun", "-c", args.source], stderr=subprocess.PIPE, text=True)
        fatbinary = pathlib.Path(re.search(r"_HERE_=(.+)", dry_run.stderr)[1].strip(), "fatbinary")
    subprocess.run([fatbinary, "-64", f"--create={args.out / 'solve_mathdx.fatbin'}", *images], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", required=True, help='group sizes, or RANKSxTHREADS: "8;32x256"')
    parser.add_argument("--architectures", required=True, help='"90;100"')
    parser.add_argument("--nvcc")
    parser.add_argument("--nvcc-option", action="append", default=[])
    parser.add_argument("--source", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--check", action="store_true", help="no more than whether the sizes and the wheels will do")
    try:
        build(parser.parse_args())
    except (Failure, subprocess.CalledProcessError) as failure:
        sys.exit(f"jax_lplb: LPLB_MATHDX: {failure}")


if __name__ == "__main__":
    main()
