"""Labels that say which datasets a node holds, for whoever places work by hand or with `cachefs schedule --by-label`.

    dataset.cachefs.csi.k8s.io/<16 digits>: "64"      64 GiB or more of this dataset are in the caches of this node

The digits are the dataset's name (`peer.holding.dataset_name`); `cachefs schedule --by-label` writes them. Values are
0 and powers of two, so a cache that fills changes a label a few times and not each minute. At most `MOST_LABELS`, those
with the most bytes, and one request a minute at the most, none while nothing changes.

A thread asks the agents of this node over their sockets. What is there from an earlier life is taken away at the start,
and all of it at an orderly end. An API that does not answer costs one warning (`csi.kube`), and is asked again later.
The agents count for the cluster only: without --etcd there are no labels.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from cachefs.agent import launch, messages
from cachefs.errors import CachefsError
from cachefs.runtime import RuntimeDir
from csi.kube import KubeClient, KubeError

log = logging.getLogger(__name__)

LABEL_PREFIX = "dataset.cachefs.csi.k8s.io/"
MOST_LABELS = 16
PERIOD_S = 60.0
AGENT_S = 5.0
END_S = 10.0
GIB = 1 << 30


def label_value(held_bytes: int) -> str:
    """Return the whole GiB, rounded down to a power of two."""
    whole = held_bytes // GIB
    return str(1 << (whole.bit_length() - 1)) if whole else "0"


def wanted_labels(held: Mapping[str, int]) -> dict[str, str]:
    """Return the labels of a node that holds so many bytes of datasets."""
    most = sorted((pair for pair in held.items() if pair[1] > 0), key=lambda pair: (-pair[1], pair[0]))
    return {f"{LABEL_PREFIX}{name}": label_value(size) for name, size in most[:MOST_LABELS]}


def agent_holdings(runtime_dir: str) -> dict[str, int] | None:
    """Return the bytes of each dataset that the agents of a runtime directory hold; None: one of them does not say
    (it has only begun, or does not answer). BLOCKS for seconds at most.
    """
    held: dict[str, int] = {}
    for path in RuntimeDir(runtime_dir).agent_sockets():
        try:
            connection = launch.connect(path, AGENT_S)
            answer = None if connection is None else launch.ask(connection, messages.Status(id=1), AGENT_S)
        except (CachefsError, OSError) as error:
            log.debug("%s: %s", path, error)
            return None
        if connection is None:
            continue  # it has ended
        cluster = (answer.status.get("cluster") or {}) if isinstance(answer, messages.StatusReply) else {}
        datasets = cluster.get("datasets", {})
        if datasets is None:
            return None
        for name, size in datasets.items():
            held[name] = held.get(name, 0) + int(size)
    return held


def labels_of_node(name: str, runtime_dir: str, host: str, port: int) -> NodeLabels:
    """Return what labels a node after the agents of a runtime directory; `host` and `port`: of the Kubernetes API."""
    kube = KubeClient(host, port, component="cachefs-node", node_name=name)
    return NodeLabels(kube, name, lambda: agent_holdings(runtime_dir))


class NodeLabels:
    """Keeps the labels of one node in a thread of its own, from `start` to `close`."""

    def __init__(
        self, kube: KubeClient, node: str, held: Callable[[], Mapping[str, int] | None], *, period_s: float = PERIOD_S
    ) -> None:
        """`held` is called in the thread (`agent_holdings`); while it returns None, labels stay as they are."""
        self._kube = kube
        self._node = node
        self._held = held
        self._period_s = period_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-labels", daemon=True)
        self._known: dict[str, str] | None = None
        """What the node has from us; None: it has to be asked."""

    def start(self) -> None:
        """Begin. Returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Take the labels away and end; BLOCKS for some seconds at most."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(END_S)

    def _run(self) -> None:
        while not self._ending.wait(0):
            try:
                held = self._held()
                if held is not None:
                    self._settle(wanted_labels(held))
            except Exception:
                log.exception("the labels of node %s could not be looked after", self._node)
            self._ending.wait(self._period_s)
        self._settle({})

    def _settle(self, wanted: Mapping[str, str]) -> None:
        """Give the node these labels and no others of ours, with one request at the most if they are known."""
        if self._known is None:
            self._known = self._found()
        known = {} if self._known is None else self._known
        changes: dict[str, str | None] = {key: value for key, value in wanted.items() if known.get(key) != value}
        changes |= {key: None for key in known if key not in wanted}
        if changes and self._kube.label_node(self._node, changes):
            self._known = dict(wanted)
        elif changes:
            self._known = None  # the request may have arrived all the same

    def _found(self) -> dict[str, str] | None:
        try:
            described = self._kube.get_node(self._node)
        except KubeError as error:
            log.debug("node %s cannot be asked for its labels: %s", self._node, error)
            return None
        labels = (described.get("metadata") or {}).get("labels") or {}
        return {key: str(value) for key, value in labels.items() if key.startswith(LABEL_PREFIX)}
