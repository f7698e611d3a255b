"""How long a collective takes between GPUs: by datasheets, by NCCL's own model of its protocols, and by assumptions.

Nothing of it was measured here. docs/scaling.md holds the table of the quantities and their sources.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

GATHER, SCATTER, REDUCE, EXCHANGE = "all_gather", "reduce_scatter", "all_reduce", "all_to_all"


@dataclass(frozen=True)
class Hardware:
    """Machines of 8 H100 SXM. Datasheet figures carry no efficiency; the rest is assumed. Bytes, seconds, FLOP/s."""

    peak: float = 989e12  # dense bf16 (datasheet)
    mfu: float = 0.4  # assumed: model FLOPs utilisation of the compute alone
    memory_bandwidth: float = 3.35e12  # HBM3 (datasheet)
    memory_efficiency: float = 0.8  # assumed
    memory: float = 80e9  # (datasheet)
    memory_usable: float = 0.9  # assumed: the rest is for CUDA, NCCL and fragmentation
    machine: int = 8  # GPUs
    nvlink: float = 450e9  # each direction (datasheet: 900 GB/s both)
    network: float = 50e9  # 400 Gb/s InfiniBand for each GPU, each direction (ConnectX-7 datasheet)
    link_efficiency: float = 0.8  # assumed; 350 and 360 of 450 GB/s are reported on H100 in NVIDIA/nccl issue 1281


@dataclass(frozen=True)
class Protocol:
    """How NCCL runs a collective: seconds once and for every hop, and the share of the links' bandwidth it reaches."""

    base: float
    nvlink_hop: float
    network_hop: float
    bandwidth: float


# NCCL's own model of rings and trees over NVLink and a network: its protocols LL128 and Simple (NVIDIA/nccl at b647562,
# src/graph/tuning.cc)
RING = (Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92), Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0))
TREE = (Protocol(14.0e-6, 1.25e-6, 8.5e-6, 0.92 * 120 / 128), Protocol(0.0, 28e-6, 28e-6, 0.92))


class Way(NamedTuple):
    """A protocol's course for one kind of collective: seconds at once, and by link for each byte of the tensor."""

    latency: float
    nvlink: float
    network: float

    @property
    def per_byte(self) -> float:
        """NVLink and network work at the same time on different pieces of a collective; the slower one counts."""
        return max(self.nvlink, self.network)


@cache
def ways(hardware: Hardware, name: str, members: int, stride: int = 1) -> tuple[Way, ...]:
    """The courses among which NCCL chooses. A machine's members share its traffic, each with a network link of its own.

    An all-to-all, in which each rank sends every other one its part at once, has one hop.
    """
    local = max(1, min(members, hardware.machine // stride))
    machines = -(-members // local)
    nvlink = 1 / (hardware.nvlink * hardware.link_efficiency) if local > 1 else 0.0
    network = 1 / (hardware.network * hardware.link_efficiency)
    if name == EXCHANGE:
        simple = RING[1]
        latency = simple.base + (simple.nvlink_hop if machines == 1 else simple.network_hop)
        return (Way(latency, nvlink * (local - 1) / members, network * (members - local) / members),)
    passes = 2 if name == REDUCE else 1
    nvlink *= passes * (members - 1) / members
    network *= passes * (machines - 1) / machines / local  # what enters each machine
    found = []
    for protocol in RING:
        hops = (members - machines) * protocol.nvlink_hop + (machines - 1) * protocol.network_hop
        found.append((protocol, passes * hops))
    for protocol in TREE if name == REDUCE else ():  # NCCL has no tree for the other two
        hops = (local - 1) * protocol.nvlink_hop + math.log2(machines) * protocol.network_hop
        found.append((protocol, passes * hops))
    return tuple(
        Way(protocol.base + hops, nvlink / protocol.bandwidth, network / protocol.bandwidth) for protocol, hops in found
    )


def collective_time(hardware: Hardware, name: str, whole: float, members: int, stride: int = 1) -> dict[str, float]:
    """Seconds of one collective over `whole` bytes among `members` ranks, every `stride`-th of them: latency, and what
    NVLink and the network need.

    `whole` is the size of the tensor that all of them have together; of an all-to-all, what one rank hands in.
    """
    if members == 1:
        return {"latency": 0.0, "nvlink": 0.0, "network": 0.0}
    chosen = min(ways(hardware, name, members, stride), key=lambda way: way.latency + whole * way.per_byte)
    return {"latency": chosen.latency, "nvlink": whole * chosen.nvlink, "network": whole * chosen.network}


def duration(seconds: dict[str, float]) -> float:
    """NVLink and network work at the same time on different pieces of a collective; the slower one counts."""
    return seconds["latency"] + max(seconds["nvlink"], seconds["network"])


def seconds_of(hardware: Hardware, name: str, whole, members: int, stride: int = 1):
    """The durations of collectives over `whole` bytes each: a number, or an array (n,) of them."""
    if members == 1:
        return 0.0 * whole
    found = [way.latency + whole * way.per_byte for way in ways(hardware, name, members, stride)]
    return np.minimum.reduce(found)


def send_time(hardware: Hardware, size, is_far: bool):
    """Seconds of messages of `size` bytes each to one other rank: on this machine, or over the network."""
    simple = RING[1]
    if is_far:
        return simple.base + simple.network_hop + size / (hardware.network * hardware.link_efficiency)
    return simple.base + simple.nvlink_hop + size / (hardware.nvlink * hardware.link_efficiency)
