"""The programs that people really run on a mount, and the ways in which programs read."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages, run_program, run_python

MIB = 1 << 20
LARGE = content("large", 10 * MIB + 4321)
OBJECTS = {f"set/{number % 3}/{number:03}.bin": content(f"file {number}", 1000 * number) for number in range(60)} | {
    "large.bin": LARGE,
    'with space/quote\'d "name".txt': b"odd\n",
    "empty": b"",
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files on the local disk."""
    root = tmp_path_factory.mktemp("local")
    for name, body in OBJECTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


@pytest.fixture(scope="module")
def mount(s3_server: S3Server) -> Iterator[Mount]:
    """One mount for all programs."""
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        bucket.fill(OBJECTS)
        yield node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", "--metadata-ttl=forever")


@pytest.fixture
def large(mount: Mount) -> Path:
    """The large file, without pages in the kernel."""
    evict_pages(mount.path / "large.bin")
    return mount.path / "large.bin"


# -- programs ---------------------------------------------------------------------------------------------------------


def test_md5sum_check(mount: Mount, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{hashlib.md5(body).hexdigest()}  {name}\n" for name, body in OBJECTS.items()))
    done = run_program(["md5sum", "-c", "--quiet", sums], cwd=mount.path)
    assert done.stdout == ""


def test_cmp_and_diff(mount: Mount, local: Path) -> None:
    run_program(["cmp", local / "large.bin", mount.path / "large.bin"])
    run_program(["diff", "-r", local, mount.path])


def test_rsync(mount: Mount, local: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run_program(["rsync", "-a", f"{mount.path}/", f"{copy}/"])
    run_program(["diff", "-r", local, copy])
    assert os.stat(copy / "large.bin").st_mtime == os.stat(mount.path / "large.bin").st_mtime
    again = run_program(["rsync", "-a", "--itemize-changes", f"{mount.path}/", f"{copy}/"])
    assert again.stdout == "", "a second run has nothing to do"
    checked = run_program(["rsync", "-rc", "--itemize-changes", "--dry-run", f"{mount.path}/", f"{local}/"])
    assert ">f" not in checked.stdout


def test_tar(mount: Mount, local: Path, tmp_path: Path) -> None:
    run_program(["tar", "-C", mount.path, "-cSf", tmp_path / "all.tar", "."])
    (tmp_path / "out").mkdir()
    run_program(["tar", "-C", tmp_path / "out", "-xf", tmp_path / "all.tar"])
    run_program(["diff", "-r", local, tmp_path / "out"])


def test_cp_keeps_everything(mount: Mount, local: Path, tmp_path: Path) -> None:
    run_program(["cp", "-a", mount.path, tmp_path / "copy"])
    run_program(["diff", "-r", local, tmp_path / "copy"])
    run_program(["cp", "--sparse=always", mount.path / "large.bin", tmp_path / "sparse"])
    assert (tmp_path / "sparse").read_bytes() == LARGE


def test_find(mount: Mount) -> None:
    files = run_program(["find", ".", "-type", "f", "-size", "+20k", "-name", "*.bin"], cwd=mount.path).stdout.split(
        "\n"
    )
    wanted = [f"./{name}" for name, body in OBJECTS.items() if len(body) > 20 * 1024 and name.endswith(".bin")]
    assert sorted(filter(None, files)) == sorted(wanted)
    directories = run_program(["find", ".", "-type", "d", "-links", "1"], cwd=mount.path).stdout.split("\n")
    assert sorted(filter(None, directories)) == sorted([".", "./set", "./set/0", "./set/1", "./set/2", "./with space"])


def test_ls_and_du(mount: Mount, local: Path) -> None:
    listed = run_program(["ls", "-lR", "--time-style=+%s", mount.path]).stdout
    assert listed.count("-r--r--r-- 1 ") == len(OBJECTS)
    size = sum(map(len, OBJECTS.values()))
    used = int(run_program(["du", "-sb", "--apparent-size", mount.path]).stdout.split()[0])
    assert size <= used <= size + 64 * 4096
    blocks = int(run_program(["du", "-s", "--block-size=1", mount.path]).stdout.split()[0])
    assert size <= blocks <= size + 512 * 100
    assert run_program(["ls", "-U", mount.path / "set/0"]).stdout.split() == sorted(os.listdir(local / "set/0"))


def test_df(mount: Mount) -> None:
    done = run_program(["df", "--output=source,fstype", mount.path])
    assert done.stdout.split("\n")[1].split() == [mount.state()["source"], "fuse.cachefs"]


def test_grep_wc_head_tail(mount: Mount) -> None:
    assert run_program(["wc", "-c", mount.path / "large.bin"]).stdout.split()[0] == str(len(LARGE))
    tail = run_program(["tail", "-c", "100", mount.path / "large.bin"])
    assert tail.stdout.encode("utf-8", "surrogateescape") == LARGE[-100:].decode("utf-8", "surrogateescape").encode(
        "utf-8", "surrogateescape"
    )
    assert run_program(["grep", "-rl", "odd", mount.path / "with space"]).stdout.startswith(str(mount.path))


def test_git_works_inside_a_copied_repository(bucket: Bucket, node: Node, s3_server: S3Server, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    run_program([*git, "init", "-q", repository])
    for number in range(20):
        (repository / f"file{number}.txt").write_text(f"content {number}\n" * 50)
    run_program([*git, "-C", repository, "add", "."])
    run_program([*git, "-C", repository, "commit", "-q", "-m", "first"])
    bucket.fill(
        {str(path.relative_to(repository)): path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    )
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
    inside = ["git", "-c", f"safe.directory={mount.path}", "--no-optional-locks", "-C", str(mount.path)]
    assert run_program([*inside, "status", "--porcelain"]).stdout == ""
    assert run_program([*inside, "log", "--format=%s"]).stdout == "first\n"
    run_program([*inside, "fsck", "--full", "--no-dangling"])
    run_program(["git", "-c", "safe.directory=*", "clone", "-q", f"file://{mount.path}", tmp_path / "clone"])
    assert (tmp_path / "clone/file7.txt").read_text() == "content 7\n" * 50


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_what_it_wrote_elsewhere(bucket: Bucket, node: Node, s3_server: S3Server, tmp_path: Path) -> None:
    job = ["--name=job", "--size=6m", "--bs=16k", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
    run_program(["fio", *job, "--rw=write", "--do_verify=0", f"--filename={tmp_path}/f"], cwd=tmp_path)
    bucket.put("f", (tmp_path / "f").read_bytes())
    path = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}").path / "f"
    for more in (
        ["--rw=read"],
        ["--rw=randread", "--randrepeat=1"],
        ["--rw=randread", "--ioengine=mmap"],
        ["--rw=read", "--numjobs=4", "--thread"],
        ["--rw=randread", "--ioengine=psync", "--direct=1"],
    ):
        evict_pages(path)
        run_program(["fio", *job, *more, "--readonly", f"--filename={path}"], cwd=tmp_path)


# -- ways of reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("bs=1", "count=3000"), ("bs=333",), ("bs=4097",), ("bs=777777",), ("bs=3M",)])
def test_dd_with_odd_block_sizes(large: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run_program(["dd", f"if={large}", f"of={tmp_path}/out", *arguments])
    found = (tmp_path / "out").read_bytes()
    assert found == (LARGE[:3000] if "count=3000" in arguments else LARGE)


def test_dd_skips(large: Path, tmp_path: Path) -> None:
    for skip in (1, 999, 10_000):
        run_program(["dd", f"if={large}", f"of={tmp_path}/out", "bs=1021", f"skip={skip}", "count=7"])
        assert (tmp_path / "out").read_bytes() == LARGE[skip * 1021 : (skip + 7) * 1021]


def test_dd_with_o_direct(large: Path, tmp_path: Path) -> None:
    run_program(["dd", f"if={large}", f"of={tmp_path}/out", "bs=1M", "iflag=direct"])
    assert (tmp_path / "out").read_bytes() == LARGE


def test_seek_data_and_hole(large: Path) -> None:
    descriptor = os.open(large, os.O_RDONLY)
    try:
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 0
        assert os.lseek(descriptor, 5, os.SEEK_HOLE) == len(LARGE)
    finally:
        os.close(descriptor)


MMAP_READER = """
import hashlib, mmap, random, sys
dice = random.Random(5)
with open(sys.argv[1], "rb") as file:
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped:
            for _ in range(200):
                mapped[dice.randrange(len(mapped))]
            mapped.madvise(mmap.MADV_RANDOM)
            tail = mapped[-5000:]
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            print(hashlib.md5(mapped).hexdigest(), hashlib.md5(tail).hexdigest())
"""


def test_mmap(large: Path) -> None:
    wanted = f"{hashlib.md5(LARGE).hexdigest()} {hashlib.md5(LARGE[-5000:]).hexdigest()}"
    assert run_python(MMAP_READER, large).split("\n")[:2] == [wanted, wanted]


FORK_READER = """
import mmap, os, sys
path, size = sys.argv[1], os.stat(sys.argv[1]).st_size
shared = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(shared, 0, prot=mmap.PROT_READ)
wanted = None
children = []
for number in range(24):
    pid = os.fork()
    if pid == 0:
        own = os.open(path, os.O_RDONLY)
        offset = number * (size // 24)
        a, b, c = os.pread(shared, 50_000, offset), os.pread(own, 50_000, offset), mapped[offset : offset + 50_000]
        if number % 4 == 0 and os.fork() == 0:
            os._exit(0 if os.pread(shared, 50_000, offset) == a else 1)
        os._exit(0 if a == b == c and len(a) == min(50_000, size - offset) else 1)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def test_fork_heavy_readers(large: Path) -> None:
    assert run_python(FORK_READER, large).strip() == str([0] * 24)


SENDFILE = """
import hashlib, os, socket, sys, threading
size = os.stat(sys.argv[1]).st_size
near, far = socket.socketpair()
digest, splice_digest = hashlib.md5(), hashlib.md5()
def receive():
    got = 0
    while got < size:
        piece = far.recv(1 << 20); got += len(piece); digest.update(piece)
thread = threading.Thread(target=receive); thread.start()
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
sent = 0
while sent < size: sent += os.sendfile(near.fileno(), fd, sent, size - sent)
thread.join()
out = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
copied = 0
while n := os.sendfile(out, fd, copied, 3_000_000): copied += n
r, w = os.pipe()
spliced = 0
while spliced < size:
    n = os.splice(fd, w, 60_000, offset_src=spliced)
    if n == 0: break
    splice_digest.update(os.read(r, n)); spliced += n
print(digest.hexdigest(), splice_digest.hexdigest(), copied)
"""


def test_sendfile_and_splice(large: Path, tmp_path: Path) -> None:
    sent, spliced, copied = run_python(SENDFILE, large, tmp_path / "out").split()
    assert sent == spliced == hashlib.md5(LARGE).hexdigest()
    assert int(copied) == len(LARGE)
    assert (tmp_path / "out").read_bytes() == LARGE


READAHEAD = """
import ctypes, hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.readahead(fd, ctypes.c_long(0), ctypes.c_size_t(4 << 20)) == 0, os.strerror(ctypes.get_errno())
for advice in (os.POSIX_FADV_RANDOM, os.POSIX_FADV_NORMAL, os.POSIX_FADV_SEQUENTIAL):
    os.posix_fadvise(fd, 0, 0, advice)
    print(hashlib.md5(os.pread(fd, 3 << 20, 1 << 20)).hexdigest())
buffers = [bytearray(n) for n in (1, 4095, 70_000, 5)]
os.preadv(fd, buffers, 12345)
print(hashlib.md5(b"".join(buffers)).hexdigest())
"""


def test_readahead_fadvise_and_preadv(large: Path) -> None:
    lines = run_python(READAHEAD, large).split()
    assert lines[:3] == [hashlib.md5(LARGE[MIB : 4 * MIB]).hexdigest()] * 3
    assert lines[3] == hashlib.md5(LARGE[12345 : 12345 + 74101]).hexdigest()


def test_running_a_program_from_the_mount(node: Node, bucket: Bucket, s3_server: S3Server) -> None:
    true = shutil.which("true")
    assert true is not None
    bucket.put("program", Path(true).read_bytes())
    bucket.put("script.py", b"print(6 * 7)\n")
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", "--file-mode=0555")
    run_program([mount.path / "program"])
    assert run_program(["python3", "-B", mount.path / "script.py"]).stdout == "42\n"


def test_a_working_directory_on_the_mount(mount: Mount) -> None:
    assert run_program(
        ["sh", "-c", "cd set/1 && cat 001.bin ../1/001.bin | wc -c && pwd -P"], cwd=mount.path
    ).stdout.split("\n")[:2] == ["2000", str(mount.path / "set/1")]


# -- many readers -----------------------------------------------------------------------------------------------------


def test_readers_of_one_cold_file_cost_one_transfer(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    body = bucket.put("cold", content("cold", 16 * MIB + 5))
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    os.stat(mount.path / "cold")
    proxy.forget()
    readers = [
        subprocess.Popen(["md5sum", str(mount.path / "cold")], stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    outputs = [reader.communicate(timeout=60)[0].split()[0] for reader in readers]
    assert set(outputs) == {hashlib.md5(body).hexdigest()}
    assert proxy.sent_bytes == len(body), "each block leaves the store once"


def test_many_threads_on_many_cold_files(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bodies = {f"{number:03}": content(f"cold {number}", 30_000 + number) for number in range(150)}
    bucket.fill(bodies)
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    program = (
        "import concurrent.futures, hashlib, os, sys\n"
        "read = lambda name: name + hashlib.md5(open(os.path.join(sys.argv[1], name), 'rb').read()).hexdigest()\n"
        "with concurrent.futures.ThreadPoolExecutor(16) as pool:\n"
        "    print('\\n'.join(pool.map(read, os.listdir(sys.argv[1]))))\n"
    )
    found = run_python(program, mount.path).split()
    assert sorted(found) == sorted(name + hashlib.md5(body).hexdigest() for name, body in bodies.items())
    assert proxy.count("get") == len(bodies)
