"""Refuses an uninstall of the chart while something in the cluster still needs the driver.

A Job of `helm uninstall` runs it before anything is taken away (see templates/uninstall.yaml). Claims, snapshots and
pods that are there when the driver goes can be deleted by nobody any more: kubelet and the sidecars of Kubernetes wait
for a driver that does not come back, and the mounts of pods that run stay behind.

    python uninstall_check.py DRIVER [API-ADDRESS DIRECTORY-OF-THE-SERVICE-ACCOUNT]

It only reads: persistentvolumes, pods, and volumesnapshotcontents where the cluster has them. Exit code 0: nothing is
left; 1: what is left is listed, one object a line; 2: the API could not be asked.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
PAGE = 500
TIMEOUT_S = 30
SHOWN = 20
"""Objects of each kind that are named; the others are counted."""


class ApiError(Exception):
    """The API answered something else than what was asked for. The text is for people."""


class Api:
    """The Kubernetes API, as far as listing goes. BLOCKS."""

    def __init__(self, address: str, account: str) -> None:
        self._address = urlsplit(address)
        self._account = Path(account)

    def list(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield all objects of a collection; none when the cluster does not have this kind. Raises ApiError."""
        token = ""
        while True:
            page = self._get(f"{path}?limit={PAGE}{'&continue=' + quote(token) if token else ''}")
            yield from page.get("items") or ()
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return

    def _get(self, path: str) -> dict[str, Any]:
        context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        host, port = self._address.hostname or "", self._address.port or 443
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        try:
            token = (self._account / "token").read_text(encoding="ascii").strip()
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}", "Accept": "application/json"})
            response = connection.getresponse()
            body = response.read()
        except OSError as error:
            raise ApiError(f"{self._address.netloc}{path}: {error}") from error
        except http.client.HTTPException as error:
            raise ApiError(f"{self._address.netloc}{path}: no answer in HTTP ({type(error).__name__})") from error
        finally:
            connection.close()
        if response.status == http.HTTPStatus.NOT_FOUND:
            return {}
        if response.status != http.HTTPStatus.OK:
            raise ApiError(f"{path}: {response.status} {response.reason}")
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise ApiError(f"{path}: the answer is no JSON") from error
        return answer if isinstance(answer, dict) else {}


def volumes_in_use(api: Api, driver: str) -> Iterator[str]:
    """Yield the persistent volumes of this driver that have a claim, or are still to be deleted."""
    for volume in api.list("/api/v1/persistentvolumes"):
        spec, metadata = volume["spec"], volume["metadata"]
        if (spec.get("csi") or {}).get("driver") != driver:
            continue
        claim = spec.get("claimRef") or {}
        if volume.get("status", {}).get("phase") == "Bound":
            yield f"persistentvolume {metadata['name']} of claim {claim.get('namespace')}/{claim.get('name')}"
        elif metadata.get("deletionTimestamp") or _to_be_deleted(volume, driver):
            yield f"persistentvolume {metadata['name']}, which is being deleted"


def _to_be_deleted(volume: dict[str, Any], driver: str) -> bool:
    """Whether csi-provisioner will ask the driver to delete it: its claim is gone, and the policy says so."""
    made_by = (volume["metadata"].get("annotations") or {}).get("pv.kubernetes.io/provisioned-by")
    left = volume.get("status", {}).get("phase") in ("Released", "Failed")
    return left and made_by == driver and volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete"


def pods_in_use(api: Api, driver: str) -> Iterator[str]:
    """Yield the pods that have an inline volume of this driver and have not ended."""
    for pod in api.list("/api/v1/pods"):
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            continue
        if any((volume.get("csi") or {}).get("driver") == driver for volume in pod["spec"].get("volumes") or ()):
            yield f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']} with an inline volume"


def snapshots_in_use(api: Api, driver: str) -> Iterator[str]:
    """Yield the snapshots of this driver that Kubernetes will want to delete through it."""
    for content in api.list("/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents"):
        spec = content["spec"]
        if spec.get("driver") == driver and spec.get("deletionPolicy") == "Delete":
            wanted = spec.get("volumeSnapshotRef") or {}
            yield f"volumesnapshot {wanted.get('namespace')}/{wanted.get('name')}"


def report(api: Api, driver: str) -> int:
    """Print what is left and return the exit code."""
    left: list[str] = []
    for found in (volumes_in_use(api, driver), pods_in_use(api, driver), snapshots_in_use(api, driver)):
        names = list(found)
        left += names[:SHOWN]
        if len(names) > SHOWN:
            left.append(f"and {len(names) - SHOWN} more like this")
    if not left:
        print(f"nothing uses {driver}")
        return 0
    print(f"{driver} is in use, so nothing was uninstalled. Delete these first (deploy/UNINSTALL.md):")
    print("\n".join(f"  {line}" for line in left))
    return 1


def main(arguments: list[str]) -> int:
    """Run the check."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
    where = f"[{host}]" if ":" in host else host
    address = f"https://{where}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
    driver, address, account = [*arguments, *[address, ACCOUNT][len(arguments) - 1 :]]
    try:
        return report(Api(address, account), driver)
    except ApiError as error:
        print(f"the Kubernetes API could not be asked what uses {driver}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
