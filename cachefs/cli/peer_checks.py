"""What `cachefs doctor` looks at when peers are configured: whether etcd answers, the way to this node, and whether an
agent that runs is a peer.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cachefs.cli.checks import FAIL, OK, WARN, Check
from cachefs.cli.status import ask_agent
from cachefs.config import CacheConfig, PeerConfig, split_address
from cachefs.runtime import RuntimeDir

TIMEOUT_S = 3.0


def run_peer_checks(peer: PeerConfig) -> Iterator[Check]:
    """Yield the checks of etcd and of the address for other nodes; none without --etcd."""
    for endpoint in peer.etcd_endpoints:
        yield check_etcd(endpoint, peer)
    if peer.etcd_endpoints and not (peer.peer_cert or peer.peer_secret_file):
        text = "neither certificates nor a secret: other nodes are served on loopback only"
        if peer.peer_insecure:
            text = "neither certificates nor a secret: whoever reaches this node can read all cached files"
        yield Check("peers", WARN, text, "give --peer-secret-file, or --peer-cert, --peer-key and --peer-ca")
    if peer.etcd_endpoints and peer.advertise:
        yield check_advertised(peer.advertise)


def check_agent(cache: CacheConfig) -> Iterator[Check]:
    """Yield whether the agent of the cache directory is a peer, if one runs that was asked to be one."""
    if not Path(cache.runtime_dir, "agents").is_dir():  # asking must not make it
        return
    try:
        path = RuntimeDir(cache.runtime_dir).agent(cache.cache_dir, "sock")
    except OSError:  # it is not ours, as another check says
        return
    cluster = (ask_agent(path) or {}).get("cluster")
    if not cluster:
        return
    if cluster.get("problem"):
        text = f"the agent of {cache.cache_dir} is no peer for now: {cluster['problem']}"
        yield Check("peering", FAIL, text, "mend that: the agent tries again by itself, at least once a minute")
    else:
        yield Check("peering", OK, f"the agent of {cache.cache_dir} is in cluster {cluster.get('cluster')!r}")


def check_etcd(endpoint: str, peer: PeerConfig) -> Check:
    """Ask one server of etcd how it is."""
    try:
        tls = _tls(peer) if endpoint.startswith("https:") else None
        url = f"{endpoint.rstrip('/')}/health"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=tls) as answer:  # noqa: S310 - http or https
            health = json.loads(answer.read(4096))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return Check("etcd", FAIL, f"{endpoint} does not answer as etcd: {reason}", _remedy(reason))
    if not isinstance(health, dict) or str(health.get("health")).lower() != "true":
        return Check("etcd", FAIL, f"{endpoint} says that it is not well", "look at etcd: it may have lost its quorum")
    return Check("etcd", OK, f"{endpoint} is well")


def _tls(peer: PeerConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=peer.etcd_ca or None)
    if peer.etcd_cert:
        context.load_cert_chain(peer.etcd_cert, peer.etcd_key)
    return context


def _remedy(reason: object) -> str:
    match reason:
        case ssl.SSLCertVerificationError():
            return "the certificate is not trusted: name the authority's file with --etcd-ca"
        case ssl.SSLError():
            return "is it https? try http:// in --etcd, or give --etcd-cert and --etcd-key"
        case socket.gaierror():
            return "the name cannot be resolved: check --etcd and DNS"
        case ConnectionRefusedError():
            return "nothing listens there: check host and port of --etcd (2379 is usual)"
        case TimeoutError():
            return "a firewall may be in the way"
    return "check --etcd"


def check_advertised(advertise: str) -> Check:
    """Whether the address that other nodes get belongs to this machine, as it nearly always should."""
    host, _ = split_address(advertise)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except socket.gaierror:
        return Check("advertise", FAIL, f"{host} cannot be resolved", "give an address that other nodes can reach")
    except OSError:
        remedy = "give --peer-listen as well, if that is a translated address"
        return Check("advertise", WARN, f"{host} is no address of this machine", remedy)
    return Check("advertise", OK, f"{host} is an address of this machine")
