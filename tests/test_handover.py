"""Regions of memory that processes of one host hand to each other: files in memory stand for those of GPUs."""

import contextlib
import mmap
import os
import re
import socket
import threading
import time

import jax
import pytest

from jax_lplb import _handover
from jax_lplb._handover import Handover, agree


def file_of(text: bytes) -> int:
    fd = os.memfd_create("region")
    os.write(fd, text)
    return fd


def link_of(fd: str) -> str:
    with contextlib.suppress(FileNotFoundError):  # another thread's, closed meanwhile
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


def reader(regions: dict):
    """Maps files, and keeps what is in them by process and number."""

    def map_region(process: int, number: int, size: int, fd: int) -> None:
        with mmap.mmap(fd, size) as mapped:
            regions[process, number] = mapped[:]

    return map_region


def linked(*map_regions) -> list[Handover]:
    """Processes that have found each other."""
    processes = [Handover(process, map_region) for process, map_region in enumerate(map_regions)]
    for one in processes:
        one.others = {other.process: other.socket for other in processes if other is not one}
    return processes


@pytest.mark.smoke
def test_a_region_reaches_all_other_processes():
    """Whatever has its number before; descriptors do not pile up."""
    regions = [{}, {}, {}]
    processes = linked(*map(reader, regions))
    for text in (b"first", b"next one"):
        for one in processes:
            content = text + bytes([one.process])
            fd = file_of(content)
            assert one.hand_over(one.process, len(content), fd) == ""
            os.close(fd)
        for process, had in enumerate(regions):
            assert had == {(p, p): text + bytes([p]) for p in range(3) if p != process}
    assert not [link for fd in os.listdir("/proc/self/fd") if "memfd:region" in (link := link_of(fd))]


def refuses(*_) -> None:
    raise RuntimeError("cuMemMap: out of memory")


def other_user(monkeypatch, process):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    return f"process 1 .*: it belongs to user {user}, and this process to user {user + 1}"


def ended(monkeypatch, process):
    process.others = {1: "jax_lplb-nobody"}
    return "process 1 cannot be reached through a UNIX socket, .*: .*Connection refused"


def never_answers(monkeypatch, process):
    monkeypatch.setattr(_handover, "_ANSWER", 0.1)
    process.others = {1: Handover(1, lambda *_: time.sleep(1)).socket}
    return "process 1 cannot be reached through a UNIX socket, .*: timed out"


def cannot_map(monkeypatch, process):
    return "process 1: cuMemMap: out of memory"


@pytest.mark.parametrize("case", [other_user, ended, never_answers, cannot_map])
def test_what_goes_wrong_is_told(monkeypatch, case):
    process, _ = linked(refuses, refuses)
    fd = file_of(b"region")
    expected = case(monkeypatch, process)
    why = process.hand_over(0, 6, fd)
    os.close(fd)
    assert re.search(expected, why), why


def test_strangers_do_not_end_the_service():
    """Who says nothing, nonsense, or goes at once is answered or forgotten; the next one is served."""
    regions = {}
    process, _ = linked(refuses, reader(regions))
    for message in (None, b"", b"[0, 1", b"[0, 1, 2]"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect("\0" + process.others[1])
            if message is not None:
                stranger.send(message)
    fd = file_of(b"region")
    assert process.hand_over(2, 6, fd) == ""
    os.close(fd)
    assert regions == {(0, 2): b"region"}


# ---- The agreement ---------------------------------------------------------------------------------------------------


class Store:
    """What jax.distributed's client gives: a key is set once, and waited for."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


def verdicts(trials: list, processes: int) -> list[str]:
    """Of the processes that come, side by side; `trials`: what each does with its handover."""
    store, result = Store(), [None] * len(trials)

    def come(process: int) -> None:
        handover = Handover(process, lambda *_: None)
        result[process] = agree(store, processes, handover, lambda: trials[process](handover))

    threads = [threading.Thread(target=come, args=(process,)) for process in range(len(trials))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return result


def hands_over(handover: Handover) -> str:
    fd = file_of(b"region")
    why = handover.hand_over(0, 6, fd)
    os.close(fd)
    return why


def fails(handover: Handover) -> str:
    raise RuntimeError("no file of a pool")


def test_all_processes_agree(monkeypatch):
    assert verdicts([hands_over] * 3, 3) == [""] * 3
    assert verdicts([hands_over, fails, hands_over], 3) == ["process 1: no file of a pool"] * 3
    assert verdicts([hands_over, lambda _: "no access", hands_over], 3) == ["process 1: no access"] * 3
    monkeypatch.setattr(_handover, "PATIENCE", 0.2)
    monkeypatch.setattr(_handover, "_ANSWER", 0.2)
    (why,) = set(verdicts([hands_over] * 3, 4))
    assert why.startswith("not all of 4 processes have come")


def test_a_late_process_hears_what_the_others_decided(monkeypatch):
    """It could reach them all, but they have taken another road."""
    store = Store()
    monkeypatch.setattr(_handover, "PATIENCE", 0.1)
    monkeypatch.setattr(_handover, "_ANSWER", 0.1)
    first, second = linked(refuses, refuses)
    why = agree(store, 2, first, lambda: "")
    assert why
    store.values["jax_lplb/trial/0"] = ""
    assert agree(store, 2, second, lambda: "") == why
