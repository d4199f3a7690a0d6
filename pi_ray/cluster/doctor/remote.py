"""Checks of a cluster through its address, and of whether a request without a token gets in."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pi_ray.cluster import auth, requirements
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.config import RunConfig

TIMEOUT_S = 10
GIB = 2**30
MODES = ("", *auth.AUTHENTICATED)
WORD = re.compile(r"[!-~]+")  # a token as a header can carry it


def check_authentication(address: str = "") -> Iterator[Finding]:
    """Check that authentication is on and that the token is there and private. `check_cluster` sends it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled" and address:
        message = f"RAY_AUTH_MODE=disabled: no token is sent to {address}"
        yield fail("token", message, f"'unset RAY_AUTH_MODE'. {auth.CURE}")
    elif mode == "disabled":
        message = "RAY_AUTH_MODE=disabled: pi-ray's own Ray has a token all the same, other programs' Ray has none"
        yield note("token", message, "'unset RAY_AUTH_MODE'")
    elif mode not in MODES:
        yield fail("token", f"RAY_AUTH_MODE={mode} is unknown to Ray", "set RAY_AUTH_MODE=token")
    elif auth.has_token():
        yield _check_token()
    elif mode == "token" and os.environ.get("RAY_ADDRESS") and not address:
        yield fail("token", "RAY_AUTH_MODE is token, and there is none for RAY_ADDRESS", auth.CURE)
    elif not address:
        yield ok("token", "no token yet; pi-ray's own Ray makes one when it starts")
    if mode in MODES and address.startswith("http://") and not auth.is_loopback(address):
        cure = "tunnel it (kubectl port-forward, ssh -L, ray dashboard) and use http://127.0.0.1, or put TLS before it"
        yield note("token", f"{address} is not encrypted: the token can be read on the way", cure)


def _check_token() -> Finding:
    """Check that the token can be read, by its owner alone, and sent."""
    source, token = _token()
    path = Path(source)
    if not WORD.fullmatch(token):
        message = f"{source} holds no token: it is empty, cannot be read, or is more than one word"
        return fail("token", message, auth.CURE)
    if path.is_file() and path.stat().st_mode & 0o077:
        return note("token", f"{path} can be read by others on this machine", f"'chmod 600 {path}'")
    return ok("token", f"Ray's token is there, from {source}")


def check_cluster(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """Check that the Jobs API answers, refuses a request without a token, and accepts yours; then check its nodes."""
    bare, message = _get_version(address)
    if bare is None:
        tunnels = "kubectl port-forward svc/NAME-head-svc 8265, ray dashboard, ssh -L 8265:127.0.0.1:8265"
        cure = f"is the cluster up, and the tunnel ({tunnels})?"
        yield fail("cluster", f"{address} does not answer: {message}", cure)
    elif bare == 200:
        message = f"{address} lets everyone in, without a token: anyone who reaches it can run programs there"
        yield fail("token", message, "start its Ray with RAY_AUTH_MODE=token (the files of 'pi-ray render' do)")
    elif bare not in (401, 403):
        cure = f"give the URL of the Jobs API, such as {auth.DEFAULT_ADDRESS}"
        yield fail("cluster", f"{address} answers {bare}, so it is no Ray dashboard", cure)
    elif not auth.has_token():
        yield fail("token", f"{address} wants a token, and there is none here", auth.CURE)
    elif os.environ.get("RAY_AUTH_MODE", "").lower() in MODES and WORD.fullmatch(_token()[1]):
        yield from _check_inside(address, config)  # else `check_authentication` has reported the token


def _check_inside(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """Check that the token is accepted, and then the cluster's Ray and its nodes."""
    source, token = _token()
    code, answer = _get_version(address, token)
    if code != 200:
        secret = "on Kubernetes, the key auth_token of its Secret"
        cure = f"take the cluster's: {secret}; else 'ray get-auth-token' prints it on its head node"
        yield fail("token", f"{address} does not take your token, from {source} ({code or answer})", cure)
        return
    yield ok("cluster", f"{address} asks for a token and takes yours")
    found = re.search(r'"ray_version": *"((\d+\.\d+)[^"]*)"', answer)
    floor, here = requirements.FLOORS["ray"], requirements.installed_version("ray")
    if found and requirements.is_older(found[2], floor):
        cure = f"start it with Ray {here}, as here, on every node: cluster/Dockerfile makes such an image"
        yield fail("versions", f"the cluster has Ray {found[1]}, and pi-ray needs {floor} or newer", cure)
    elif found and found[1] != here:
        cure = "jobs run with the cluster's; where one behaves otherwise than here, take the same on both"
        yield note("versions", f"the cluster has Ray {found[1]}, and this machine {here}", cure)
    yield from _check_nodes(address, config)


def _get_version(address: str, token: str = "") -> tuple[int | None, str]:
    """(status of /api/version, its answer or the error). A redirect, which could carry the token away, is no answer."""
    import httpx

    headers, proxied = {"Authorization": f"Bearer {token}"} if token else {}, not auth.is_loopback(address)
    request = httpx.stream("GET", f"{address}/api/version", headers=headers, timeout=TIMEOUT_S, trust_env=proxied)
    try:
        with request as answer:
            return answer.status_code, next(answer.iter_text(1 << 16), "")
    except httpx.RemoteProtocolError:
        return None, "what listens there does not speak HTTP, as Ray's own port (6379) does not"
    except (httpx.HTTPError, OSError, ImportError, ValueError) as error:  # the last two: a proxy that it cannot use
        return None, str(error)


def _token() -> tuple[str, str]:
    """(source, text) of the token that Ray would send; the text is "" where it cannot be read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"].strip()
    path = auth.token_file()
    try:
        return str(path), path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return str(path), ""


def _check_nodes(address: str, config: RunConfig | None) -> Iterator[Finding]:
    """Check the cluster's nodes against the run's workers. Too few is a note: an autoscaler may add nodes on demand."""
    auth.require_token(address)
    from ray.util.state import list_nodes

    try:
        nodes = list_nodes(address=address, detail=True, timeout=TIMEOUT_S)
        found = [node.resources_total for node in nodes if node.state == "ALIVE"]
    except Exception as error:  # the state API raises types of its own, of requests and of Ray
        message = f"the cluster's nodes cannot be listed: {str(error).splitlines()[0][:160]}"
        yield fail("nodes", message, "look at its dashboard; is Ray there of the same version as here?")
        return
    if not found:
        yield note("nodes", "none has joined yet", "a head that has just started takes some seconds: ask again")
        return
    cpus, gpus, memory = (sum(r.get(name, 0) for r in found) for name in ("CPU", "GPU", "memory"))
    number = "1 node" if len(found) == 1 else f"{len(found)} nodes"
    message = f"{number}, {cpus:g} CPUs, {gpus:g} GPUs, {memory / GIB:.0f} GiB"
    workers = (config.train.min_workers or config.train.workers) if config else 0
    if config and config.train.gpu is True and gpus < workers:
        cure = "fine where the autoscaler adds nodes; else start more, or lower train.workers"
        yield note("GPUs", f"{message}, for {workers} workers that need a GPU each", cure)
    else:
        yield ok("nodes", message)
    for step in ("prepare", "train", "evaluate", "serve"):
        asked = getattr(config.cluster, f"{step}_resources") if config else {}
        if asked and not any(all(r.get(name, 0) >= amount for name, amount in asked.items()) for r in found):
            cure = "fine where the autoscaler adds such nodes; else ray start --resources, or mend the names"
            yield note("nodes", f"no node offers what cluster.{step}_resources asks for: {asked}", cure)
