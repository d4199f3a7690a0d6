"""Looks at a cluster through its address, and at whether anything without a token gets in."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pi_ray.cluster import auth, requirements
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.config import RunConfig

TIMEOUT_S = 10
GIB = 2**30
MODES = ("", "token", "k8s")  # values of RAY_AUTH_MODE by which a token is sent
WORD = re.compile(r"[!-~]+")  # what a token looks like in a header


def check_authentication(address: str = "") -> Iterator[Finding]:
    """Ray's token: on, there, and for you alone. Whether a cluster takes it, `cluster` asks."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled" and address:
        yield fail("token", f"RAY_AUTH_MODE=disabled: no token is sent to {address}", f"'unset RAY_AUTH_MODE'. {auth.CURE}")
        return
    if mode == "disabled":
        yield fail("token", "RAY_AUTH_MODE=disabled: anyone who reaches this machine's Ray can run programs as you", "'unset RAY_AUTH_MODE'; pi-ray's own Ray then makes a token by itself")
        return
    if mode not in MODES:
        yield fail("token", f"RAY_AUTH_MODE={mode} is unknown to Ray", "set RAY_AUTH_MODE=token")
        return
    if auth.has_token():
        yield from _private()
    elif mode == "token" and os.environ.get("RAY_ADDRESS") and not address:
        yield fail("token", "RAY_AUTH_MODE is token, and there is none for RAY_ADDRESS", auth.CURE)
    elif not address:
        yield ok("token", "no token yet; pi-ray's own Ray makes one when it starts")
    if address.startswith("http://") and not auth.is_loopback(address):
        yield note("token", f"{address} is not encrypted: the token can be read on the way", "tunnel it (kubectl port-forward, ssh -L, ray dashboard) and use http://127.0.0.1, or put TLS before it")


def _private() -> Iterator[Finding]:
    """The token can be read, by its owner alone, and sent."""
    source, token = _token()
    path = Path(source)
    if not WORD.fullmatch(token):
        yield fail("token", f"{source} holds no token: it is empty, cannot be read, or is more than one word", auth.CURE)
    elif path.is_file() and path.stat().st_mode & 0o077:
        yield note("token", f"{path} can be read by others on this machine", f"'chmod 600 {path}'")
    else:
        yield ok("token", f"Ray's token is there, from {source}")


def check_cluster(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """The Jobs API answers, refuses a request without a token, and takes yours; then its nodes."""
    bare, said = _asked(address)
    if bare is None:
        yield fail("cluster", f"{address} does not answer: {said}", "is the cluster up, and the tunnel (kubectl port-forward svc/NAME-head-svc 8265, ray dashboard, ssh -L 8265:127.0.0.1:8265)?")
        return
    if bare == 200:
        yield fail("token", f"{address} lets everyone in, without a token: anyone who reaches it can run programs there", "start its Ray with RAY_AUTH_MODE=token (the files of 'pi-ray render' do)")
        return
    if bare not in (401, 403):
        yield fail("cluster", f"{address} answers {bare}, so it is no Ray dashboard", "give the URL of the Jobs API, such as http://127.0.0.1:8265")
        return
    source, token = _token()
    if not auth.has_token():
        yield fail("token", f"{address} wants a token, and there is none here", auth.CURE)
        return
    if os.environ.get("RAY_AUTH_MODE", "").lower() not in MODES or not WORD.fullmatch(token):
        return  # `authentication` has said it
    code, said = _asked(address, token)
    if code != 200:
        yield fail("token", f"{address} does not take your token, from {source} ({code or said})", "take the cluster's: on Kubernetes, the key auth_token of its Secret; else 'ray get-auth-token' prints it on its head node")
        return
    yield ok("cluster", f"{address} asks for a token and takes yours")
    yield from _version(said)
    yield from _nodes(address, config)


def _asked(address: str, token: str = "") -> tuple[int | None, str]:
    """(status of /api/version, its answer or what went wrong). Redirects are not followed: a token goes to the address that was named, and nowhere else."""
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}) if auth.is_loopback(address) else urllib.request.ProxyHandler())
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read(1 << 16).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError as error:
        return None, str(getattr(error, "reason", error))
    except http.client.HTTPException:
        return None, "what listens there does not speak HTTP, as Ray's own port (6379) does not"


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _token() -> tuple[str, str]:
    """(where it comes from, the text that Ray would send, "" where it cannot be read)."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return str(path), path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return str(path), ""


def _version(answer: str) -> Iterator[Finding]:
    """The cluster's Ray, with which jobs run, against pi-ray's floor and this machine's."""
    found, floor, here = re.search(r'"ray_version": *"((\d+)\.(\d+)[^"]*)"', answer), requirements.FLOORS["ray"], requirements.installed("ray")
    if found and (int(found[2]), int(found[3])) < tuple(map(int, floor.split("."))):
        yield fail("versions", f"the cluster has Ray {found[1]}, and pi-ray needs {floor} or newer", f"start it with Ray {here}, as here, on every node: cluster/Dockerfile makes such an image")
    elif found and found[1] != here:
        yield note("versions", f"the cluster has Ray {found[1]}, and this machine {here}", "jobs run with the cluster's; where one behaves otherwise than here, take the same on both")


def _nodes(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """The cluster's nodes against the run's workers. Nodes that come on demand are not there yet, so too few is a note."""
    auth.require(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes this, or RAY_ADDRESS, above what it is given
    from ray.util.state import list_nodes

    try:
        found = [n.resources_total for n in list_nodes(address=address, detail=True, timeout=TIMEOUT_S) if n.state == "ALIVE"]
    except Exception as error:  # the state API raises types of its own, of requests and of Ray
        yield fail("nodes", f"the cluster's nodes cannot be listed: {str(error).splitlines()[0][:160]}", "look at its dashboard; is Ray there of the same version as here?")
        return
    if not found:
        yield note("nodes", "none has joined yet", "a head that has just started takes some seconds: ask again")
        return
    gpus, cpus = sum(r.get("GPU", 0) for r in found), sum(r.get("CPU", 0) for r in found)
    said = f"{len(found)} {'node' if len(found) == 1 else 'nodes'}, {cpus:g} CPUs, {gpus:g} GPUs, {sum(r.get('memory', 0) for r in found) / GIB:.0f} GiB"
    workers = config.train.workers if config else 0
    if config and config.train.gpu is True and gpus < workers:
        yield note("GPUs", f"{said}, for {workers} workers that need a GPU each", "fine where the autoscaler adds nodes; else start more, or lower train.workers")
    else:
        yield ok("nodes", said)
    for step in ("prepare", "train", "evaluate", "serve") if config else ():
        asked = getattr(config.cluster, f"{step}_resources")
        if asked and not any(all(r.get(name, 0) >= amount for name, amount in asked.items()) for r in found):
            yield note("nodes", f"no node offers what cluster.{step}_resources asks for: {asked}", "fine where the autoscaler adds such nodes; else start one with ray start --resources, or mend the names")
