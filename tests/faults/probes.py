"""What a worker or a router tells of itself from outside: its load by gRPC, its metrics by HTTP, its process by /proc."""

import urllib.request
from pathlib import Path

import grpc

from baton.types import Role, WorkerInfo
from baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc


def load_of(worker: WorkerInfo) -> common_pb2.WorkerLoad:
    answer: prefill_pb2.PrefillServiceGetInfoResponse | decode_pb2.DecodeServiceGetInfoResponse
    with grpc.insecure_channel(worker.address) as channel:
        if worker.role is Role.PREFILL:
            prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
            answer = prefill.GetInfo(prefill_pb2.PrefillServiceGetInfoRequest(), timeout=5)
        else:
            decode = decode_pb2_grpc.DecodeServiceStub(channel)
            answer = decode.GetInfo(decode_pb2.DecodeServiceGetInfoRequest(), timeout=5)
    return answer.load


def blocks_at_rest(worker: WorkerInfo) -> bool:
    """Whether a worker holds nothing for anybody."""
    return tells_of_rest(worker, load_of(worker))


def tells_of_rest(worker: WorkerInfo, load: common_pb2.WorkerLoad) -> bool:
    """Whether a load is that of a worker that holds nothing for anybody."""
    return (
        load.running_requests == load.waiting_requests == 0
        and load.free_blocks + load.cached_blocks == worker.num_blocks
    )


def metrics(port: int) -> dict[str, float]:
    """Every sample of a process on this machine, by its name with labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def metrics_of(worker: WorkerInfo) -> dict[str, float]:
    return metrics(int(worker.metrics_address.rpartition(":")[2]))


def num_files(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
