"""Templates of prefixes: what `pathTemplate` of a StorageClass becomes for one claim.

    ${pvc.namespace}/${pvc.name}    the claim: the provisioner adds it to the parameters (--extra-create-metadata)
    ${pv.name}                      the volume's name in Kubernetes
    ${volume.id}                    the volume's id, which no other volume has

INVARIANT: what comes out is a path of at least one part, without empty parts, "." and "..", of bounded length, so that
it never leads out of the prefix of its class. Names of Kubernetes have no slash; one that has is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from csi.status import invalid

MAX_PREFIX_BYTES = 512
"""Of what comes out, `prefix` included: keys have 1024 bytes, and the names of files need some of them."""
PVC_NAMESPACE = "csi.storage.k8s.io/pvc/namespace"
PVC_NAME = "csi.storage.k8s.io/pvc/name"
PV_NAME = "csi.storage.k8s.io/pv/name"
VOLUME_ID = "volume.id"
VARIABLES = {"pvc.namespace": PVC_NAMESPACE, "pvc.name": PVC_NAME, "pv.name": PV_NAME, VOLUME_ID: ""}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_PLACE = "x"


def checked(template: str) -> str:
    """Return the template without slashes at its ends. Raises ValueError when no claim could use it."""
    template = template.strip("/")
    if not template:
        raise ValueError("must not be empty; without it all claims share 'prefix'")
    for name in _VARIABLE.findall(template):
        if name not in VARIABLES:
            raise ValueError(f"unknown variable ${{{name}}}; known are {', '.join(f'${{{v}}}' for v in VARIABLES)}")
    if "$" in _VARIABLE.sub(_PLACE, template):
        raise ValueError("has a '$' that begins no ${variable}")
    if not _VARIABLE.search(template):
        raise ValueError("has no ${variable}, so all claims would get the same prefix; use 'prefix' for that")
    _check_path(_VARIABLE.sub(_PLACE, template))
    return template


def expanded(template: str, parameters: Mapping[str, str], volume_id: str) -> str:
    """Return the path ("a/b/") for one claim. Raises `Refused`."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name == VOLUME_ID:
            return volume_id
        found = parameters.get(VARIABLES[name], "")
        if not found:
            raise invalid(
                f"parameters.{VARIABLES[name]}",
                f"pathTemplate needs it for ${{{name}}}: start the external-provisioner with --extra-create-metadata",
            )
        if "/" in found or found in (".", ".."):
            raise invalid(f"parameters.{VARIABLES[name]}", f"{found!r} cannot be a part of a path")
        return found

    path = _VARIABLE.sub(value, template)
    try:
        _check_path(path)
    except ValueError as error:
        raise invalid("parameters.pathTemplate", f"becomes {path[:200]!r}, which {error}") from error
    return path + "/"


def _check_path(path: str) -> None:
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise ValueError(f"has {f'the part {part!r}' if part else 'an empty part'}, which no path can have")
        if part == ".cachefs":
            raise ValueError("has the part '.cachefs', which is where the driver keeps what it writes")
    if len(path.encode()) > MAX_PREFIX_BYTES or any(ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        raise ValueError(f"has more than {MAX_PREFIX_BYTES} bytes, or control characters")
