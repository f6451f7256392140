"""A SLURM of its own for the tests, on one machine: munge, accounting, a controller and virtual nodes.

    python tests/slurm/cluster.py start [directory]     # prints what to export
    python tests/slurm/cluster.py stop [directory]

Everything lives in one directory and on free ports, so that it disturbs no SLURM that is there already; outside it
only lines of /etc/hosts are added, and taken out again. Only processes named in its pid files are ever stopped.
Needs root: the daemons of a node start jobs as their owners.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
HOSTS = Path("/etc/hosts")
DEFAULT = Path("/tmp/budgeted-slurm")
PACKAGES = (
    "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "slurm-wlm-mysql-plugin", "slurmdbd",
    "munge", "mariadb-server",
)  # fmt: skip
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "sacct", "munged", "mariadbd", "mariadb-install-db")
# Nodes before what they talk to.
ORDER = ("slurmd-*", "slurmctld", "slurmdbd", "mariadbd", "munged")


class Unavailable(RuntimeError):
    """There can be no SLURM here; the message says why."""


def install() -> None:
    """Have apt install what is missing. Raises Unavailable where that cannot be."""
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons need root")
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"{', '.join(missing)} are not installed, and there is no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    log = DEFAULT.with_suffix(".apt.log")
    with open(log, "w") as output:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *_known(PACKAGES)]):
            command = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", *words]
            try:
                subprocess.run(command, check=True, env=environment, stdout=output, stderr=output, timeout=240)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                raise Unavailable(f"apt-get {words[0]} failed ({type(error).__name__}); see {log}") from None
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    if missing:
        raise Unavailable(f"apt-get installed no {', '.join(missing)}; see {log}")


def _known(packages: Sequence[str]) -> list[str]:
    """Those that this distribution has: the MySQL plugin is a package of its own in some."""
    return [p for p in packages if subprocess.run(["apt-cache", "show", p], capture_output=True).stdout]


class Cluster:
    """`nodes` virtual nodes of `cpus` cores and as many pretended GPUs, in `state`."""

    def __init__(self, state: Path = DEFAULT, nodes: int = 2, cpus: int = 2) -> None:
        self.state, self.cpus = state, cpus
        self.conf = state / "etc" / "slurm.conf"
        self.log = state / "log"
        tag = secrets.token_hex(2)  # two clusters at once must not share names in /etc/hosts
        self.nodes = [f"v{tag}n{k}" for k in range(1, nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What clients need to find this cluster and no other."""
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str, timeout: float = 30) -> str:
        """The output of one of SLURM's commands. Raises CalledProcessError."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, check=True, capture_output=True, text=True, timeout=timeout
        )
        return done.stdout

    def start(self) -> None:
        """Bring it up, about 10 s; what is left of an earlier one is stopped first. Raises Unavailable."""
        self.stop()
        for name in ("etc", "log", "pid", "munge", "controller", "spool", "dev"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        try:
            self._write()
            self._start_munge()
            self._start_accounting()
            self._daemon("slurmctld", "-f", str(self.conf))
            for node in self.nodes:
                (self.state / "spool" / node).mkdir(exist_ok=True)
                self._daemon("slurmd", "-N", node, "-f", str(self.conf))
            self._wait("its nodes", self._idle)
        except (OSError, subprocess.SubprocessError) as error:
            self.stop()
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            raise Unavailable(f"the test SLURM did not start: {error} {said}; see {self.log}") from error
        except Unavailable:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of this cluster, and with them its jobs."""
        if self._pid("slurmctld"):
            for flag in ("--signal=KILL", "--quiet"):
                _quietly("scancel", "--full", "-u", str(os.getuid()), flag, env=self.environment)
        for pattern in ORDER:
            pids = [p for f in sorted((self.state / "pid").glob(pattern)) if (p := self._pid(f.name))]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            _wait_for(lambda pids=pids: not any(_alive(p) for p in pids), 5)
            for pid in filter(_alive, pids):
                os.kill(pid, signal.SIGKILL)
        self._name_nodes(remove=True)
        # Job numbers start again at 1: what is left of old jobs would be taken for that of new ones.
        for name in ("controller", "spool", "pid", "database", "munge", "etc"):
            shutil.rmtree(self.state / name, ignore_errors=True)

    def _write(self) -> None:
        ports = _free_ports(2 + len(self.nodes))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory=4000 Gres=gpu:{self.cpus} State=UNKNOWN"
            for name, port in zip(self.nodes, ports[2:], strict=True)
        ]
        values = {
            "state": self.state, "host": socket.gethostname(), "address": "127.0.0.1", "count": len(self.nodes),
            "nodes": "\n".join(nodes), "port_controller": ports[0], "port_accounting": ports[1],
        }  # fmt: skip
        for name, mode in (("slurm.conf", 0o644), ("slurmdbd.conf", 0o600)):
            path = self.conf.with_name(name)
            path.write_text(Template((HERE / name).read_text()).substitute(values))
            path.chmod(mode)
        devices = self.state / "dev"
        for k in range(self.cpus):  # SLURM hands out the names; nothing opens them
            if not (devices / f"nvidia{k}").is_symlink():
                (devices / f"nvidia{k}").symlink_to("/dev/null")
        self.conf.with_name("gres.conf").write_text(f"Name=gpu File={devices}/nvidia[0-{self.cpus - 1}]\n")
        self._name_nodes()

    def _name_nodes(self, remove: bool = False) -> None:
        """Let the nodes' names resolve: submitit and torch meet at one of them."""
        lines, mark = HOSTS.read_text().splitlines(), f"# the test SLURM in {self.state}"
        kept = [line for line in lines if not line.endswith(mark)]
        if kept != lines or not remove:
            ours = [] if remove else [f"127.0.0.1 {name} {mark}" for name in self.nodes]
            HOSTS.write_text("\n".join([*kept, *ours]) + "\n")

    def _start_munge(self) -> None:
        place = self.state / "munge"
        key = place / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        place.chmod(0o711)
        subprocess.run(
            ["munged", f"--key-file={key}", f"--socket={place}/socket", f"--log-file={self.log}/munged",
             f"--pid-file={place}/pid", f"--seed-file={place}/seed"],
            check=True, capture_output=True, timeout=20,
        )  # fmt: skip
        self._wait("munge", (place / "pid").exists)
        shutil.copy(place / "pid", self.state / "pid" / "munged")

    def _start_accounting(self) -> None:
        data, place = self.state / "database", self.state / "database.sock"
        common = ["--no-defaults", "--user=root", f"--datadir={data}"]
        with open(self.log / "mariadb", "a") as log:
            subprocess.run(
                ["mariadb-install-db", *common, "--auth-root-authentication-method=socket", "--skip-test-db"],
                check=True, stdout=log, stderr=log, timeout=60,
            )  # fmt: skip
            server = subprocess.Popen(
                ["mariadbd", *common, f"--socket={place}", "--skip-networking", "--innodb-buffer-pool-size=64M",
                 "--innodb-log-file-size=32M", "--innodb-flush-log-at-trx-commit=0"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        (self.state / "pid" / "mariadbd").write_text(str(server.pid))
        sql = ["mariadb", "--no-defaults", f"--socket={place}", "-e"]
        create = [*sql, "CREATE DATABASE IF NOT EXISTS slurm_accounting"]
        self._wait("MariaDB", lambda: _quietly(*create))
        self._daemon("slurmdbd", MYSQL_UNIX_PORT=str(place))
        self._wait("slurmdbd", lambda: _quietly("sacctmgr", "-n", "list", "cluster", env=self.environment))
        _quietly("sacctmgr", "-i", "add", "cluster", "budgeted", env=self.environment)

    def _daemon(self, *command: str, **environment: str) -> None:
        subprocess.run(
            command, env={**os.environ, **self.environment, **environment}, check=True, timeout=30,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(self.log / "daemons", "a"),  # noqa: SIM115
        )  # fmt: skip

    def _idle(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").split() == ["idle"] * len(self.nodes)
        except subprocess.SubprocessError:
            return False

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        if not _wait_for(ready, seconds):
            raise Unavailable(f"the test SLURM did not start: {what} did not answer in {seconds:.0f} s; see {self.log}")

    def _pid(self, name: str) -> int | None:
        try:
            pid = int((self.state / "pid" / name).read_text())
        except (OSError, ValueError):
            return None
        return pid if _alive(pid) else None


def _alive(pid: int) -> bool:
    """Is there such a process, other than one that only waits to be collected?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _quietly(*command: str, env: dict[str, str] | None = None) -> bool:
    try:
        done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _wait_for(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT)
    if sys.argv[1:2] == ["start"]:
        install()
        cluster.start()
        print(*(f"export {k}={v}" for k, v in cluster.environment.items()), sep="\n")
    elif sys.argv[1:2] == ["stop"]:
        cluster.stop()
    else:
        sys.exit(__doc__)
