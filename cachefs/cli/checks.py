"""What `cachefs doctor` looks at on this machine: one function per check, each returns what it found and the remedy.

A check never changes anything that it finds (files that it makes to try something are removed at once), never touches a
mount point, and needs no rights: without them it says what it could not see.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cachefs import runtime
from cachefs.cli import keeper_checks, output
from cachefs.cli.load import Loaded, nearest_key, validate
from cachefs.cli.options import ENVIRONMENT_PREFIX, SETTINGS
from cachefs.cli.room import disk_room_bytes, memory_bytes, nearest_existing, used_bytes
from cachefs.cli.status import is_running
from cachefs.config import Config, LowLatency
from cachefs.errors import ConfigError
from cachefs.mount import kernel, mountinfo

OK, WARN, FAIL = "ok", "warn", "fail"

OLDEST_KERNEL = (5, 4)
MIN_OPEN_FILES = 1024
WORKER_BYTES = 140 << 20
"""What a worker and a supervisor take together, at most."""
GUARD_DEVICE = "/dev/cpu_dma_latency"
FUSE_CONF = "/etc/fuse.conf"
_NETWORK_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "virtiofs"})
_OWN_VARIABLES = frozenset({"CACHEFS_CONFIG", "CACHEFS_DEBUG"})


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    outcome: str
    """"ok", "warn" (works, but worse than it could) or "fail" (will not work)."""
    text: str
    remedy: str = ""


def run_host_checks(config: Config, environment: dict[str, str]) -> Iterator[Check]:
    """Yield every check of this machine. A check that fails itself becomes a warning and does not stop the others."""
    for name, check in _CHECKS:
        try:
            yield from check(config)
        except OSError as error:
            yield Check(name, WARN, f"cannot be checked: {error}")
    yield from check_variables(environment)


def check_configuration(config: Config) -> Iterator[Check]:
    """Whether `cachefs mount` would take these options."""
    try:
        validate(config)
    except ConfigError as error:
        yield Check("configuration", FAIL, str(error), "change this option, variable or key")
    else:
        yield Check("configuration", OK, "all values can be used")


def check_sizes(loaded: Loaded) -> Iterator[Check]:
    """What the tiers have by default here, where it is less than elsewhere."""
    for notice in loaded.notices:
        is_off = "tier is off" in notice
        yield Check("default size", WARN if is_off else OK, notice, "enlarge it, or give the size" if is_off else "")


def check_variables(environment: dict[str, str]) -> Iterator[Check]:
    """Variables that look like settings and are none (loading ignores them on purpose)."""
    known = {s.variable for s in SETTINGS} | _OWN_VARIABLES
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            near = nearest_key(name.removeprefix(ENVIRONMENT_PREFIX))
            if near:
                meant = ENVIRONMENT_PREFIX + near.replace("-", "_").upper()
                yield Check("environment", WARN, f"{name} is no setting and has no effect", f"did you mean {meant}?")


# -- kernel and fuse -------------------------------------------------------------------------------


def check_kernel(config: Config) -> Iterator[Check]:
    """Old kernels lack what survival of a crash needs."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_KERNEL:
        yield Check(
            "kernel", FAIL, f"{release} is too old", "use Linux 5.4 or newer (6.9 for mounts that lose nothing)"
        )
    elif not kernel.supports_resend(release):
        text = f"{release}: requests in flight fail when a worker crashes; all others are served"
        yield Check("kernel", WARN, text, "use Linux 6.9 or newer")
    else:
        yield Check("kernel", OK, f"{release}: readers do not notice when a worker crashes")


def check_fuse(config: Config) -> Iterator[Check]:
    """The device, the right to mount, and who may look into the mount."""
    if keeper_checks.mounts_for(config.cache.runtime_dir):
        yield Check("right to mount", OK, "not needed: the keeper of this node mounts")
        return
    try:
        os.close(kernel.open_device())
        yield Check("fuse device", OK, f"{kernel.DEVICE} can be opened")
    except kernel.MountFailure as error:
        what, _, remedy = error.text.rpartition(": ")
        yield Check("fuse device", FAIL, what or error.text, remedy)
    if kernel.may_mount():
        yield Check("right to mount", OK, "mounts directly (CAP_SYS_ADMIN)")
    elif kernel.find_fusermount() is None:
        yield Check("right to mount", FAIL, "neither root nor fusermount3", "install it: apt-get install fuse3")
    else:
        yield Check("right to mount", OK, f"mounts through {kernel.find_fusermount()}")
        if config.fuse.allow_other and not _fuse_conf_allows_others():
            yield Check(
                "allow other",
                FAIL,
                "--allow-other is not allowed to users here",
                "add user_allow_other to /etc/fuse.conf",
            )


def _fuse_conf_allows_others() -> bool:
    try:
        lines = Path(FUSE_CONF).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def check_libfuse(config: Config) -> Iterator[Check]:
    """The library that everything except reads goes through, and its Python side."""
    remedy = "install it: apt-get install fuse3 libfuse3-dev, then pip install pyfuse3"
    library = _load_library("libfuse3.so.3") or _load_library("libfuse3.so.4")
    if library is None:
        yield Check("libfuse", FAIL, "libfuse 3 is not installed", remedy)
        return
    library.fuse_pkgversion.restype = ctypes.c_char_p
    version = library.fuse_pkgversion().decode("ascii", "replace")
    try:
        yield Check("libfuse", OK, f"libfuse {version}, pyfuse3 {importlib.metadata.version('pyfuse3')}")
    except importlib.metadata.PackageNotFoundError:
        yield Check("libfuse", FAIL, "the Python package pyfuse3 is not installed", remedy)


def _load_library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def check_mount_helper(config: Config) -> Iterator[Check]:
    """mount(8) looks for helpers of fstab's types in /sbin only."""
    if keeper_checks.has_keeper(config.cache.runtime_dir):
        return  # nobody mounts by fstab there
    found = shutil.which("mount.fuse.cachefs", path="/sbin:/usr/sbin")
    if found:
        yield Check("fstab", OK, f"mount -t fuse.cachefs works through {found}")
        return
    own = Path(sys.executable).parent / "mount.fuse.cachefs"
    yield Check(
        "fstab", WARN, "fstab and `mount -t fuse.cachefs` do not know cachefs", f"ln -s {own} /sbin/mount.fuse.cachefs"
    )


def check_guard(config: Config) -> Iterator[Check]:
    """The wake-up guard makes single readers two to five times as fast on machines that halt idle CPUs."""
    if config.fuse.low_latency is LowLatency.OFF:
        yield Check("low latency", OK, "switched off with --low-latency off")
    elif os.access(GUARD_DEVICE, os.W_OK):
        yield Check("low latency", OK, f"{GUARD_DEVICE} can be held while requests are frequent")
    elif os.path.exists(GUARD_DEVICE):
        remedy = f"run as root, or allow it: chmod 666 {GUARD_DEVICE} (a udev rule keeps it)"
        yield Check(
            "low latency", WARN, f"no right to {GUARD_DEVICE}: idle CPUs sleep, and single readers wait longer", remedy
        )
    else:
        text = f"{GUARD_DEVICE} does not exist: idle CPUs sleep, and single readers wait longer"
        yield Check("low latency", WARN, text, "give the container the device, or use a kernel with CONFIG_PM")


# -- memory and disk -------------------------------------------------------------------------------


def check_shm(config: Config) -> Iterator[Check]:
    """The tmpfs of the shm tier."""
    cache = config.cache
    if not cache.shm_size_bytes:
        yield Check("shm tier", WARN, "it is off (--shm-size): every read is answered from the disk tier or the store")
        return
    stat = os.statvfs(cache.shm_dir)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    free += used_bytes(Path(runtime.shm_directory(cache.shm_dir, cache.cache_dir, os.getuid())))
    wanted = output.size(cache.shm_size_bytes)
    remedy = f"use a smaller --shm-size, or: mount -o remount,size=... {cache.shm_dir}"
    kind = file_system_of(cache.shm_dir)
    if kind not in ("tmpfs", "ramfs"):
        yield Check("shm tier", FAIL, f"{cache.shm_dir} is {kind}, not a tmpfs", "use --shm-dir with a tmpfs")
    elif total and cache.shm_size_bytes > total:
        yield Check("shm tier", FAIL, f"--shm-size {wanted}, but {cache.shm_dir} holds {output.size(total)}", remedy)
    elif total and cache.shm_size_bytes > free:
        text = f"--shm-size {wanted}, but only {output.size(free)} of {cache.shm_dir} are free: the tier stops there"
        yield Check("shm tier", WARN, text, remedy)
    else:
        yield Check("shm tier", OK, f"{wanted} fit into {cache.shm_dir} ({output.size(total)})")


def check_memory(config: Config) -> Iterator[Check]:
    """What the node has to have for tier, agent and one mount. A container's limit counts tmpfs pages as well."""
    cache = config.cache
    needed = cache.shm_size_bytes + cache.memory_limit_bytes + WORKER_BYTES
    have, whose = memory_bytes()
    text = f"{output.size(needed)} needed with a full shm tier and one mount, {output.size(have)} in {whose}"
    if needed > have:
        yield Check("memory", FAIL, text, "use a smaller --shm-size or --memory-limit")
    elif needed > have * 0.8:
        yield Check("memory", WARN, f"{text}: little is left for anybody else", "use a smaller --shm-size")
    else:
        yield Check("memory", OK, text)


def check_cache_directory(config: Config) -> Iterator[Check]:
    """The disk tier: may it be written, on what file system, and is there room?"""
    cache = config.cache
    directory = Path(cache.cache_dir)
    existing = nearest_existing(directory)
    try:
        with tempfile.TemporaryDirectory(prefix=".cachefs-doctor-", dir=existing):
            pass
    except OSError as error:
        text = f"cannot write to {existing}: {error.strerror}; reads would go without the disk tier"
        yield Check("cache directory", FAIL, text, "use --cache-dir, or change its owner")
        return
    kind = file_system_of(str(existing))
    if kind in _NETWORK_TYPES or kind.startswith("fuse"):
        text = f"{directory} is on {kind}: memory maps over a network are neither safe nor fast"
        yield Check("cache directory", FAIL, text, "use --cache-dir on a local disk")
    elif kind in ("overlay", "tmpfs", "ramfs", "aufs"):
        what = "memory" if kind in ("tmpfs", "ramfs") else "the layer of a container, slow and gone with it"
        yield Check("cache directory", WARN, f"{directory} is on {kind} ({what})", "use --cache-dir on a local disk")
    else:
        yield Check("cache directory", OK, f"{directory} is on {kind} and can be written")
    room = disk_room_bytes(directory)
    if cache.cache_size_bytes > room:
        text = f"--cache-size {output.size(cache.cache_size_bytes)}, but there is room for {output.size(room)}"
        yield Check(
            "disk space", WARN, f"{text}: the tier stops growing there", "use a smaller --cache-size, or free space"
        )
    else:
        yield Check("disk space", OK, f"{output.size(cache.cache_size_bytes)} fit, {output.size(room)} are free")


def check_runtime_directory(config: Config) -> Iterator[Check]:
    """Sockets and state files have to go somewhere."""
    directory = Path(config.cache.runtime_dir)
    existing = nearest_existing(directory)
    if len(os.fsencode(directory)) > runtime.MAX_PATH_BYTES:
        yield Check("runtime directory", FAIL, f"{directory} is too long for a socket", "use a shorter --runtime-dir")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Check("runtime directory", FAIL, f"cannot write to {existing}", "use --runtime-dir")
    else:
        try:
            runtime.check_own(directory, sticky=True)
        except runtime.NotOurs as error:
            yield Check("runtime directory", FAIL, str(error), "use --runtime-dir")
        except FileNotFoundError:
            yield Check("runtime directory", OK, f"{directory} (made when something is mounted)")
        else:
            yield Check("runtime directory", OK, f"{directory}")


def file_system_of(path: str) -> str:
    """Return the type of the file system that holds `path`, from the mount table (no question to the mount itself)."""
    real = os.path.realpath(path)
    holding = [m for m in mountinfo.mounts() if real == m.mountpoint or real.startswith(m.mountpoint.rstrip("/") + "/")]
    if not holding:
        return "unknown"
    # of several mounts at one place the last covers the others
    return max(enumerate(holding), key=lambda pair: (len(pair[1].mountpoint), pair[0]))[1].fstype


def check_open_files(config: Config) -> Iterator[Check]:
    """The agent holds a descriptor per request in flight, per worker and per environment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        remedy = "raise it: ulimit -n 4096, or LimitNOFILE= of the service" + (
            " (as root)" if hard < MIN_OPEN_FILES else ""
        )
        yield Check("open files", WARN, f"the limit is {shown}", remedy)
    else:
        yield Check("open files", OK, f"the limit is {shown}")


def check_keeper(config: Config) -> Iterator[Check]:
    """The keeper of a Kubernetes node, where there is one."""
    for finding in keeper_checks.look(config.cache.runtime_dir):
        yield Check("keeper", FAIL if finding.remedy else OK, finding.text, finding.remedy)


def check_stale_mounts(config: Config) -> Iterator[Check]:
    """Mounts whose supervisor is gone: they answer nothing, or would not be restarted."""
    path = config.cache.runtime_dir
    states = runtime.RuntimeDir(path).mount_states() if os.access(os.path.join(path, "mounts"), os.R_OK) else []
    served = {state.get("mountpoint") for state in states if is_running(state.get("supervisor_pid"))}
    found = [m for m in mountinfo.mounts() if m.is_cachefs]
    mounted = [m.mountpoint for m in found]
    served |= keeper_checks.kept(path, found)
    stale = [m for m in mounted if m not in served]
    for mountpoint in stale:
        text = f"{output.plain(mountpoint)} has no supervisor in {path}"
        remedy = f"cachefs umount {output.plain(mountpoint)} (or name its --runtime-dir)"
        yield Check("mounts", WARN, text, remedy)
    if not stale:
        yield Check("mounts", OK, f"{len(mounted)} mounted, none of them left over")


_CHECKS: tuple[tuple[str, Callable[[Config], Iterator[Check]]], ...] = (
    ("configuration", check_configuration),
    ("kernel", check_kernel),
    ("fuse device", check_fuse),
    ("libfuse", check_libfuse),
    ("fstab", check_mount_helper),
    ("low latency", check_guard),
    ("shm tier", check_shm),
    ("memory", check_memory),
    ("cache directory", check_cache_directory),
    ("runtime directory", check_runtime_directory),
    ("open files", check_open_files),
    ("keeper", check_keeper),
    ("mounts", check_stale_mounts),
)
