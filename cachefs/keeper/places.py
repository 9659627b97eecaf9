"""Where the keeper mounts: a directory of its own below the root, which keeper and CSI plugin both know."""

from __future__ import annotations

WHOLE_MACHINE = "/"
PLACES = "/var/lib/cachefs"


def below(root: str) -> str:
    """Return how the paths of everything below `root` begin."""
    return root if root.endswith("/") else f"{root}/"


def own_places(root: str, driver_name: str) -> str:
    """Return the directory for the mounts themselves: where plugins of kubelet have their files; on a machine without
    kubelet, where everything is below the root, in a directory of ours.
    """
    return f"{PLACES}/{driver_name}/mounts" if root == WHOLE_MACHINE else f"{root}/plugins/{driver_name}/mounts"
