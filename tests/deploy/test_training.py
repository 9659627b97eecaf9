"""The programs of the training examples, run as they stand in the manifests, over a real mount.

Those of PyTorch and WebDataset need an interpreter with torch, webdataset and pillow, which this project does not:

    TRAINING_PYTHON=/path/to/python .venv/bin/python -m pytest tests/deploy/test_training.py
"""

from __future__ import annotations

import io
import os
import random
import shlex
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from bench.s3_server import S3Server
from tests.deploy.chart import REPOSITORY, containers_of, pod_of
from tests.support.mounts import Bucket, Node

pytestmark = pytest.mark.fuse

FILES, SHARDS, SAMPLES = 90, 3, 40
PYTHON = os.environ.get("TRAINING_PYTHON", sys.executable)


def has_torch() -> bool:
    done = subprocess.run([PYTHON, "-c", "import torch, webdataset, PIL"], check=False, capture_output=True)
    return done.returncode == 0


needs_torch = pytest.mark.skipif(not has_torch(), reason="TRAINING_PYTHON names no Python with torch and webdataset")


@pytest.fixture(scope="module")
def data(s3_server: S3Server) -> Iterator[Path]:
    """A mount with train/, as the datasets of the examples have it, and shards of images."""
    source = random.Random(11)
    files = {f"train/class-{n % 3}/{n}": source.randbytes(source.randrange(1, 9000)) for n in range(FILES)}
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        bucket.fill(files)
        bucket.fill({f"train-{number:06d}.tar": shard(source) for number in range(SHARDS)})
        yield node.mount(bucket.url, "--endpoint-url", s3_server.endpoint_url).path


def shard(source: random.Random) -> bytes:
    """Images of all sizes, in colours and without, each with its class."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for number in range(SAMPLES):
            picture = io.BytesIO()
            size = (source.randrange(40, 300), source.randrange(40, 300))
            Image.new("L" if number % 7 == 0 else "RGB", size, number).save(picture, "JPEG")
            for suffix, body in (("jpg", picture.getvalue()), ("cls", str(number % 10).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return written.getvalue()


def example(name: str) -> list[dict[str, Any]]:
    text = (REPOSITORY / f"deploy/examples/{name}.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


def job_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the Job of an example and its container."""
    [job] = [each for each in example(name) if each["kind"] == "Job"]
    [one] = containers_of(pod_of(job) or {})
    return job, one


def placed(text: str, one: dict[str, Any], volume: str, where: Path) -> str:
    """Return a program with the path of a volume replaced by one of this machine."""
    [mounted] = [mount["mountPath"] for mount in one["volumeMounts"] if mount["name"] == volume]
    assert f'"{mounted}/' in text
    return text.replace(f'"{mounted}/', f'"{where}/')


def run(command: list[str], where: Path, **more: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command, cwd=where, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def output_of(child: subprocess.Popen[str]) -> str:
    try:
        output, _ = child.communicate(timeout=110)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, output
    return output


def test_the_training_job_reads_its_part(data: Path, tmp_path: Path) -> None:
    job, one = job_of("training-job")
    program = placed(one["command"][-1], one, "data", data)
    pods = job["spec"]["completions"]
    children = [
        run([sys.executable, "-c", program], tmp_path, JOB_COMPLETION_INDEX=str(index)) for index in range(pods)
    ]
    read = [[line.split() for line in output_of(child).splitlines()] for child in children]
    assert [[int(line[0]) for line in lines] for lines in read] == [[0, 1, 2]] * pods
    size = sum(path.stat().st_size for path in (data / "train").rglob("*") if path.is_file())
    assert [sum(int(lines[epoch][1]) for lines in read) for epoch in range(3)] == [size] * 3


@needs_torch
@pytest.mark.slow
def test_webdataset_reads_every_sample_in_every_epoch(data: Path, tmp_path: Path) -> None:
    _, one = job_of("webdataset")
    program = placed(one["command"][-1], one, "shards", data)
    told = output_of(run([PYTHON, "-c", program], tmp_path))
    assert [line for line in told.splitlines() if line[:1].isdigit()] == [
        f"{epoch} {SHARDS * SAMPLES}" for epoch in range(3)
    ]


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_ranks_of_ddp_train(data: Path, tmp_path: Path) -> None:
    """As many pods as the Job has, each by its own command line, which find each other at the first one."""
    job, one = job_of("pytorch-ddp")
    [config] = [each for each in example("pytorch-ddp") if each["kind"] == "ConfigMap"]
    for name, text in config["data"].items():
        (tmp_path / name).write_text(placed(text, one, "data", data), encoding="utf-8")
    shell, dash, line = one["command"]
    first = f"{job['metadata']['name']}-0.{pod_of(job)['subdomain']}"  # type: ignore[index]
    assert (shell, dash, f"--master-addr={first} " in line) == ("sh", "-c", True)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    line = line.replace(first, "127.0.0.1").replace("=29500", f"={port}").replace("/code/", f"{tmp_path}/")
    assert shlex.split(line)[1:3] == ["torchrun", f"--nnodes={job['spec']['completions']}"]
    pods = range(job["spec"]["completions"])
    children = [run([shell, dash, line], tmp_path, JOB_COMPLETION_INDEX=str(index)) for index in pods]
    told = [output_of(child) for child in children]
    for rank, text in enumerate(told):
        assert [f"rank {rank} epoch {epoch} loss " in text for epoch in range(3)] == [True] * 3, text
