"""The commands `cachefs mount`, `umount` and `upgrade`.

`mount_volume` is the one path to a mount; `cachefs.cli.mount_helper` takes it as well. It checks what can be checked
before anything is started, in the order in which people can do something about it: configuration, mount point,
rights, bucket. When it fails, no mount, process or state file of the try is left (an agent that was started ends by
itself when idle).
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

import cachefs
from cachefs.cli.load import Loaded, build_config, load
from cachefs.cli.mount_options import MountWords, merged_environment, parse_words
from cachefs.cli.options import CONFIG_PARAMETER, config_options
from cachefs.cli.output import plain
from cachefs.config import Config
from cachefs.errors import ConfigError, MountError, UsageError
from cachefs.runtime import RuntimeDir, mount_id

_UPGRADE_S = 90.0


def mount_volume(
    source: str,
    mountpoint: str,
    options: Mapping[str, object],
    words: MountWords,
    *,
    config_file: str | None = None,
    environment: Mapping[str, str],
    notify: Callable[[str], object],
) -> Config:
    """Mount `source` and return when the mount answers (in the foreground: never). `options` go over those of `words`.

    Raises CachefsError with one line for a person; `notify` gets lines about what was done besides.
    """
    from cachefs.mount import kernel, launch
    from cachefs.mount.mountpoint import claimed, prepare_mountpoint

    if "://" not in source:
        raise UsageError(f"'{source}' is not a source: write s3://BUCKET[/PREFIX] or file://DIRECTORY")
    environment = merged_environment(environment, words)
    given = {**words.settings, **{name: value for name, value in options.items() if value is not None}}
    loaded = load({**given, "source": source}, environment, config_file or words.config_file or None)
    config = loaded.config
    if words.remount:
        from cachefs.cli.remount import check_remount

        return check_remount(source, mountpoint, loaded, set(given), words)
    runtime = _make_runtime(config.cache.runtime_dir)
    place = prepare_mountpoint(mountpoint, runtime, nonempty=words.nonempty, notify=notify)
    with claimed(place, runtime):
        # again under the claim: another mount of the same directory may have come first
        prepare_mountpoint(place, runtime, nonempty=words.nonempty, notify=notify)
        try:
            kernel.check_rights()
        except kernel.MountFailure as error:
            raise MountError(error.text) from error
        mounted_at_s = time.clock_gettime(time.CLOCK_BOOTTIME)  # one that nobody sets; no mount outlives a boot
        for notice in (*loaded.notices, *_check_bucket(loaded, environment, place, mounted_at_s)):
            notify(notice)
        plan = launch.make_plan(config, place, flags=words.flags, mounted_at_s=mounted_at_s)
        if not config.fuse.foreground:
            launch.start_detached(plan, environment, config.fuse.ready_timeout_s)
    if config.fuse.foreground:
        launch.become_supervisor(plan, environment)
    return config


def _make_runtime(path: str) -> RuntimeDir:
    try:
        return RuntimeDir(path)
    except OSError as error:
        raise MountError(f"--runtime-dir {path}: {error.strerror or error}") from error


def _check_bucket(loaded: Loaded, environment: Mapping[str, str], place: str, mounted_at_s: float) -> list[str]:
    """Let the agent check the bucket, one of our own version if nobody needs another. Returns its notices."""
    from cachefs.agent import launch, succession

    config, given = loaded.config, loaded.given
    check = functools.partial(
        launch.check_volume, config, environment, mount_id(place), place, sys.executable, mounted_at_s, given
    )
    try:
        return check()
    except launch.OtherVersion:
        plan = launch.AgentPlan(config.cache, config.peer, config.log, sys.executable, environment)
        succession.replace_unused(plan, config.fuse.ready_timeout_s)
        return check()


@click.command()
@click.argument("source")
@click.argument("mountpoint", type=click.Path())
@click.option(
    "-o",
    "mount_words",
    multiple=True,
    metavar="NAME[=VALUE],...",
    help="As in fstab: the options below without dashes, and ro, noexec, noatime, nonempty, remount, config=FILE, "
    "env-file=FILE.",
)
@config_options()
def mount(source: str, mountpoint: str, mount_words: tuple[str, ...], **options: Any) -> None:
    """Mount SOURCE (s3://BUCKET[/PREFIX] or file://DIRECTORY) on the directory MOUNTPOINT.

    Returns when the mount answers. Keys are taken from where all AWS tools take them: profile, environment, instance
    role.
    """
    config_file = options.pop(CONFIG_PARAMETER)
    words = parse_words(mount_words)
    if words.wants_rw:
        raise ConfigError("-o rw: writing is not offered yet; mount with -o ro")
    mount_volume(
        source,
        mountpoint,
        options,
        words,
        config_file=config_file,
        environment=os.environ,
        notify=lambda line: click.echo(f"cachefs: {plain(line)}", err=True),
    )
    click.echo(plain(f"{source} {'stays as it is' if words.remount else 'is mounted'} on {mountpoint}"))


def _runtime(runtime_dir: str | None, config_file: str | None) -> RuntimeDir:
    return RuntimeDir(build_config({"runtime_dir": runtime_dir}, os.environ, config_file).cache.runtime_dir)


def _runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option(
        "--config", CONFIG_PARAMETER, metavar="FILE", default=None, help="Configuration file that the mount uses."
    )(command)
    return click.option("--runtime-dir", metavar="DIR", default=None, help="Runtime directory of the mount.")(command)


@click.command()
@click.argument("mountpoint", type=click.Path())
@click.option(
    "--lazy", "-l", is_flag=True, help="If it is in use: detach it now, and serve open files until they are closed."
)
@click.option("--force", "-f", is_flag=True, help="Unmount whoever uses it: their reads fail.")
@_runtime_options
def umount(mountpoint: str, *, lazy: bool, force: bool, runtime_dir: str | None, config_file: str | None) -> None:
    """Take the mount at MOUNTPOINT away. If it is in use, says by whom."""
    from cachefs.mount.unmounting import unmount

    click.echo(plain(unmount(mountpoint, _runtime(runtime_dir, config_file), lazy=lazy, force=force)))


@click.command()
@click.argument("mountpoint", type=click.Path())
@_runtime_options
def upgrade(mountpoint: str, *, runtime_dir: str | None, config_file: str | None) -> None:
    """Replace the worker of the mount at MOUNTPOINT by the version installed now, without unmounting.

    Readers wait for less than a second. Also leaves the state "failed" after repeated crashes. When the new worker
    cannot start, the old one stays. An agent that the new version cannot talk to is replaced as well; otherwise agent
    and supervisor stay as they are.
    """
    from cachefs.cli.status import collect, version_remarks
    from cachefs.mount.control import ControlError, ask
    from cachefs.mount.mountinfo import canonical

    runtime = _runtime(runtime_dir, config_file)
    place = canonical(mountpoint)
    request = {"command": "upgrade", "python": sys.executable, "version": cachefs.__version__}
    try:
        reply = ask(runtime.mount(mount_id(place), "sock"), request, _UPGRADE_S)
    except ControlError as error:
        raise MountError(
            f"{place} is not a mount with a running supervisor, or it does not answer ({error})"
        ) from error
    if not reply.get("ok"):
        raise MountError(f"{place}: {reply.get('text')}")
    click.echo(plain(f"{place} is served by version {reply.get('version')}"))
    for mount in collect(runtime.path, place)["mounts"]:
        for remark in version_remarks(mount):
            click.echo(remark)
