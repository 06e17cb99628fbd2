"""Peers' memory between processes of one host: each hands its regions of GPU memory over to all others, once.

XLA's buffers lie in few regions of memory: one, where memory is preallocated. The driver gives a file descriptor of a
region, a UNIX socket carries it to the other processes, and they map it. All have mapped a region before its process
tells of a buffer there (`share` in ffi/handover.cc). So what ranks are told they can reach, and nothing on a device
waits for a host.

Processes agree once, when they first trace a program that asks for this: each shows its socket in the key-value store
of `jax.distributed`, hands a region over, as a trial, and says how that went. The first one to know the verdict writes
it down for all. So all take the same road, also where some processes never come.
"""

import functools
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no public name for its key-value store

from jax_lplb import _handlers

PATIENCE = 120.0  # seconds that processes wait for each other's first trace
_ANSWER = 30.0  # seconds that one waits for others to map a region


class Handover:
    """Regions of this process to other ones, and theirs to this one, through a socket that a thread serves.

    `map_region`: called with the process, the number and size of its region, and a file descriptor.
    """

    def __init__(self, process: int, map_region: Callable[[int, int, int, int], None]) -> None:
        self.process = process
        self.others: dict[int, str] = {}  # their sockets
        self._map_region = map_region
        # In the abstract namespace: nothing is left on a disk.
        self.socket = f"jax_lplb-{secrets.token_hex(16)}"
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind("\0" + self.socket)
        self._listening.listen(1024)
        threading.Thread(target=self._serve, name="jax_lplb handover", daemon=True).start()

    def hand_over(self, number: int, size: int, fd: int) -> str:
        """Has all other processes map a region; what went wrong, or ''."""
        header = json.dumps([self.process, number, size]).encode()
        process = self.process
        try:
            with ExitStack() as stack:
                peers = {}
                for process, name in self.others.items():
                    peers[process] = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    peers[process].settimeout(_ANSWER)
                    peers[process].connect("\0" + name)
                    _check_user(peers[process])
                    socket.send_fds(peers[process], [header], [fd])
                for process, peer in peers.items():
                    answer = peer.recv(4096)
                    if answer != b"mapped":
                        return f"process {process}: {answer.decode() or 'it ended'}"
        except OSError as error:
            return f"process {process} cannot be reached through a UNIX socket, as those of one host can: {error}"
        return ""

    def _serve(self) -> None:
        while True:
            peer, _ = self._listening.accept()
            with peer:
                peer.settimeout(_ANSWER / 10)  # others are waiting, and this one sends as soon as it is connected
                with suppress(OSError):  # it has gone
                    peer.send(self._receive(peer).encode()[:4096])

    def _receive(self, peer: socket.socket) -> str:
        _check_user(peer)
        header, fds, *_ = socket.recv_fds(peer, 4096, 1)
        try:
            self._map_region(*json.loads(header), *fds)
        except Exception as error:  # whatever it is, who asked must know
            return str(error) or repr(error)
        finally:
            for fd in fds:
                os.close(fd)
        return "mapped"


def _check_user(peer: socket.socket) -> None:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise PermissionError(f"it belongs to user {user}, and this process to user {os.geteuid()}")


def why_out_of_reach(own: str) -> str:
    """Why processes cannot reach each other's memory, the same on all; '' where they can. `own`: this one's reason."""
    # In a thread of its own nothing is being traced.
    with _lock, ThreadPoolExecutor(1) as thread:
        return thread.submit(_agreed, distributed.global_state.client, own).result()


_lock = threading.Lock()


@functools.cache  # by the client: once for each time that jax.distributed is initialised
def _agreed(client: Any, own: str) -> str:
    if client is None:
        return "jax.distributed, through which processes find each other, is not initialised"
    process, processes = jax.process_index(), jax.process_count()
    devices = jax.local_devices()
    handover = Handover(process, _handlers.map_region)

    ordinals = [device.local_hardware_id for device in devices]
    try:
        _handlers.join_processes(process, processes, ordinals, handover.hand_over)
    except RuntimeError as error:
        own = own or str(error)

    def trial() -> str:
        for device in [] if own else devices:
            array = jax.block_until_ready(jax.device_put(np.zeros(1, np.int32), device))
            _handlers.share(device.local_hardware_id, array.unsafe_buffer_pointer(), array.nbytes)
        return own

    return agree(client, processes, handover, trial)


def agree(client: Any, processes: int, handover: Handover, trial: Callable[[], str]) -> str:
    """Of all processes that come here the same: '' once every one's trial has shown nothing against it, or why not."""
    end = time.monotonic() + PATIENCE

    def exchange(what: str, text: str) -> list[str]:
        client.key_value_set(f"jax_lplb/{what}/{handover.process}", text)
        return [hear(f"{what}/{process}") for process in range(processes)]

    def hear(what: str) -> str:
        left = max(_ANSWER, end - time.monotonic())  # for what is there to come
        return client.blocking_key_value_get(f"jax_lplb/{what}", int(1000 * left))

    try:
        handover.others = dict(enumerate(exchange("socket", handover.socket)))
        del handover.others[handover.process]
        try:
            why = trial()
        except RuntimeError as error:
            why = str(error)
        whys = exchange("trial", why and f"process {handover.process}: {why}")
        verdict = next(filter(None, whys), "")
    except jax.errors.JaxRuntimeError:
        verdict = f"not all of {processes} processes have come to a program that could within {PATIENCE:.0f} s"
    # Whoever has heard all trials, and heard of nothing against it, has heard this process's too: it is ready.
    with suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set("jax_lplb/verdict", verdict)
    return hear("verdict")
