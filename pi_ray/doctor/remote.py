"""Looks at a cluster through its address, and at whether anything without a token gets in."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pi_ray import auth
from pi_ray.config import RunConfig
from pi_ray.doctor.finding import Finding, fail, note, ok

TIMEOUT_S = 10
GIB = 2**30


def authentication(address: str = "") -> Iterator[Finding]:
    """Ray's token: on, there, and for you alone. Of a cluster, whether it asks for one and takes this one."""
    mode, loopback = os.environ.get("RAY_AUTH_MODE", "").lower(), not address or auth.is_loopback(address)
    if mode == "disabled":
        danger = "anyone who reaches this machine's Ray can run programs as you" if loopback else f"anyone who reaches {address} can run programs there"
        yield fail("token", f"RAY_AUTH_MODE=disabled: {danger}", "'unset RAY_AUTH_MODE'" + ("; pi-ray's own Ray then makes a token by itself" if loopback else f". {auth.CURE}"))
        return
    if mode not in ("", "token", "k8s"):
        yield fail("token", f"RAY_AUTH_MODE={mode} is unknown to Ray", "set RAY_AUTH_MODE=token")
        return
    if not auth.has_token():
        missing = "no token for the cluster" if address else "no token yet; pi-ray's own Ray makes one when it starts"
        yield fail("token", missing, auth.CURE) if address or (mode == "token" and os.environ.get("RAY_ADDRESS")) else ok("token", missing)
    else:
        yield from _private()
    if address and not loopback and address.startswith("http://"):
        yield note("token", f"{address} is not encrypted: the token can be read on the way", "tunnel it (kubectl port-forward, ssh -L, ray dashboard) and use http://127.0.0.1, or put TLS before it")


def _private() -> Iterator[Finding]:
    """A token in a file is for its owner alone."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and path.is_file() and path.stat().st_mode & 0o077:
        yield note("token", f"{path} can be read by others on this machine", f"'chmod 600 {path}'")
    else:
        yield ok("token", "Ray's token is there")


def cluster(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """The Jobs API answers, refuses a request without a token, and takes yours; then its nodes."""
    bare, said = _asked(address)
    if bare is None:
        yield fail("cluster", f"{address} does not answer: {said}", "is the cluster up, and the tunnel (kubectl port-forward svc/NAME-head-svc 8265, ray dashboard, ssh -L 8265:127.0.0.1:8265)?")
        return
    if bare == 200:
        yield fail("token", f"{address} lets everyone in, without a token", "start its Ray with RAY_AUTH_MODE=token (the files of 'pi-ray render' do)")
    elif bare not in (401, 403):
        yield fail("cluster", f"{address} answers {bare}, so it is no Ray dashboard", "give the URL of the Jobs API, such as http://127.0.0.1:8265")
        return
    if bare == 200 or not auth.has_token():
        return
    code, _ = _asked(address, _token())
    if code != 200:
        yield fail("token", f"{address} does not take your token ({code})", "take the cluster's: on Kubernetes, the key auth_token of its Secret; else ~/.ray/auth_token of its head node")
        return
    yield ok("cluster", f"{address} asks for a token and takes yours")
    yield from _nodes(address, config)


def _asked(address: str, token: str = "") -> tuple[int | None, str]:
    """(status of /api/version, what went wrong). Redirects are not followed: a token goes to the address that was named, and nowhere else."""
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}) if auth.is_loopback(address) else urllib.request.ProxyHandler())
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError as error:
        return None, str(getattr(error, "reason", error))


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _token() -> str:
    """The text that Ray would send."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()


def _nodes(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """The cluster's nodes against the run's workers. Nodes that come on demand are not there yet, so too few is a note."""
    from ray.util.state import list_nodes

    auth.require(address)
    try:
        found = [n.resources_total for n in list_nodes(address=address, detail=True, timeout=TIMEOUT_S) if n.state == "ALIVE"]
    except Exception as error:  # the state API raises types of its own, of requests and of Ray
        yield fail("nodes", f"the cluster's nodes cannot be listed: {str(error).splitlines()[0][:160]}", "look at its dashboard; is Ray there of the same version as here?")
        return
    gpus, cpus = sum(r.get("GPU", 0) for r in found), sum(r.get("CPU", 0) for r in found)
    said = f"{len(found)} nodes, {cpus:g} CPUs, {gpus:g} GPUs, {sum(r.get('memory', 0) for r in found) / GIB:.0f} GiB"
    workers = config.train.workers if config else 0
    if config and config.train.gpu is True and gpus < workers:
        yield note("GPUs", f"{said}, for {workers} workers that need a GPU each", "fine where the autoscaler adds nodes; else start more, or lower train.workers")
    else:
        yield ok("nodes", said)
    for step in ("prepare", "train", "evaluate", "serve") if config else ():
        asked = getattr(config.cluster, f"{step}_resources")
        if asked and not any(all(r.get(name, 0) >= amount for name, amount in asked.items()) for r in found):
            yield note("nodes", f"no node offers what cluster.{step}_resources asks for: {asked}", "fine where the autoscaler adds such nodes; else start one with ray start --resources, or mend the names")
