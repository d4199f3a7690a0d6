"""A Ray that pi-ray has started, as a stranger on the same machine finds it: clients and gRPC calls want its token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

CLIENT = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None))
"""
STRANGERS = {
    "without a token": {"RAY_AUTH_MODE": "disabled"},
    "with another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
}


def keys_of_cluster(ray, env):
    """What a client with these variables is told of the keys that the cluster's head keeps."""
    command = [sys.executable, "-c", CLIENT, ray.get_runtime_context().gcs_address]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("mode", STRANGERS.values(), ids=STRANGERS)
def test_a_client_is_told_nothing(ray_local, mode):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refused = keys_of_cluster(ray_local, {**env, **mode})
    assert refused.returncode and not refused.stdout and "InvalidAuthToken" in refused.stderr
    assert "session_name" in keys_of_cluster(ray_local, dict(os.environ)).stdout, "with the token it answers"


def listening_ports(process):
    """The ports at which a process, by its folder in /proc, waits for TCP connections."""
    links = [os.readlink(path) for path in (process / "fd").iterdir() if path.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


def test_a_replica_answers_no_call_without_the_token(ray_local):
    import grpc
    from ray import cloudpickle, serve
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which replicas do not find

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Waiting:
        def __call__(self):
            return "it is in"

    try:
        serve.run(Waiting.bind(), name="strangers", route_prefix=None)
        names = {path.parent: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
        (replica,) = (process for process, name in names.items() if name.startswith(b"ray::ServeReplica:strangers"))
        codes = []
        for port in listening_ports(replica):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
                ASGIServiceStub(channel).HandleRequest(ASGIRequest(pickled_request_metadata=b"x"), timeout=20)
            codes.append(refused.value.code())
        assert grpc.StatusCode.UNAUTHENTICATED in codes, codes
    finally:
        serve.shutdown()
