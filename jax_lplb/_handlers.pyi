from collections.abc import Callable
from typing import Any

ffi_api_version: tuple[int, int]
mathdx_sizes: tuple[int, ...]
max_experts: int
max_choices: int
max_begun: int
max_group_ranks: int
max_group_slots: int
max_near_slots: int
max_edge_ranks: int
max_colours: int
max_candidates: int

def shares_rows(num_experts: int, num_physical: int) -> int: ...
def peers_reachable() -> bool: ...
def gather_cuda() -> tuple[dict[str, Any], Any]: ...
def handlers() -> dict[str, dict[str, dict[str, Any]]]: ...

# With CUDA handlers alone.
def join_processes(
    process: int, num_processes: int, devices: list[int], hand_over: Callable[[int, int, int], str]
) -> None: ...
def share(device: int, buffer: int, bytes: int) -> None: ...
def map_region(process: int, number: int, bytes: int, fd: int) -> None: ...
