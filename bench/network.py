"""Run a script alone on a network of its own, and count what its processes send there.

    run_alone       starts the script again in a new network namespace, whose only way is loopback
    start_loopback  inside of it: sees that it is new, and brings `lo` up
    loopback        bytes and packets that `lo` has carried: IP packets with their headers, acknowledgements and
                    retransmissions (Linux' drivers/net/loopback.c); its MTU is 65,536 bytes
    tcp_sent        bytes of payload that this process has sent, by TCP socket: tcpi_bytes_sent and tcpi_bytes_retrans
                    of tcp(7)'s TCP_INFO (struct tcp_info of linux/tcp.h), Linux 4.19 or later

The script inside knows that it is there by its first argument, which names the namespace outside: unlike a variable of
the environment it reaches nothing that the script starts, and it is checked against the namespace that it is in.
"""

import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

OUTSIDE = "--outside="
NEEDS = (
    "a network namespace of its own needs Linux, `unshare` of util-linux, and permission for network namespaces (root, "
    "or user namespaces)"
)
QUIET_SECONDS = 0.25  # longer than Linux holds back an acknowledgement: 40 to 200 ms
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
_IFREQ = "16sh22x"  # struct ifreq: name, flags, the rest of a union
_BYTES_SENT = struct.Struct("QQ")  # tcpi_bytes_sent, tcpi_bytes_retrans
_BYTES_SENT_AT = 200


class Interface(NamedTuple):
    """What an interface has sent since it exists."""

    bytes: int
    packets: int


class Sent(NamedTuple):
    """What a socket has sent since it exists: all bytes of payload, and those of them that it had sent before."""

    bytes: int
    retransmitted: int


def outside(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the namespace outside, None for the run that is outside itself, and the arguments that the user gave."""
    if arguments and arguments[0].startswith(OUTSIDE):
        return arguments[0].removeprefix(OUTSIDE), [*arguments[1:]]
    return None, [*arguments]


def run_alone(script: Path, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by one that runs the script in a new network namespace.

    Raises: ValueError: there is none to be had.
    """
    unshare = unshare_command()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(unshare[0], [*unshare, sys.executable, str(script), f"{OUTSIDE}{_namespace()}", *arguments])


def unshare_command() -> list[str]:
    """Return the first way to a new namespace that works here: as root, or as root of a user namespace.

    Raises: ValueError: none does (the message says what it takes).
    """
    if sys.platform != "linux":
        raise ValueError(f"{NEEDS}: this is {sys.platform}")
    refused = ""
    for flags in (["-n"], ["-r", "-n"]):
        command = ["unshare", *flags, "--"]
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"{NEEDS}: {error}") from None
        if tried.returncode == 0:
            return command
        refused = next(iter(reversed(tried.stderr.splitlines())), f"unshare exits with {tried.returncode}")
    raise ValueError(f"{NEEDS}: {refused}")


def _namespace() -> str:
    return os.readlink("/proc/self/ns/net")


def start_loopback(outside: str) -> None:
    """Bring `lo` up.

    Raises: ValueError: this is the namespace outside, or an interface has carried something already.
    """
    if _namespace() == outside or any(carried.bytes for carried in _interfaces().values()):
        raise ValueError(
            f"not in a new network namespace: {_namespace()}, outside {outside}; start it without {OUTSIDE}"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        _, flags = struct.unpack(_IFREQ, fcntl.ioctl(s, _SIOCGIFFLAGS, struct.pack(_IFREQ, b"lo", 0)))
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags | _IFF_UP))


def _interfaces() -> dict[str, Interface]:
    """Return what every interface of this process' namespace has sent. Source: proc_net_dev of Linux's proc_net(5)."""
    lines = re.findall(r"^\s*(\S+?):(.*)$", Path("/proc/self/net/dev").read_text(), re.MULTILINE)
    columns = {name: [int(value) for value in values.split()] for name, values in lines}
    return {name: Interface(bytes=values[8], packets=values[9]) for name, values in columns.items()}


def loopback() -> Interface:
    """Return what `lo` has carried."""
    return _interfaces()["lo"]


def quiet_loopback() -> Interface:
    """Return what `lo` has carried, once nothing follows any more: the kernel acknowledges after the last call."""
    carried = loopback()
    while True:
        time.sleep(QUIET_SECONDS)
        last, carried = carried, loopback()
        if carried == last:
            return carried


def tcp_sent() -> dict[str, Sent]:
    """Return what each TCP socket of this process has sent.

    Raises: RuntimeError: the kernel does not count it.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            identity = os.readlink(f"/proc/self/fd/{name}")
            copy = os.dup(int(name)) if identity.startswith("socket:") else None
        except OSError:  # closed since it was listed, as the listing's own is
            continue
        if copy is None:
            continue
        with socket.socket(fileno=copy) as s:
            if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
                continue
            info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        if len(info) < _BYTES_SENT_AT + _BYTES_SENT.size:
            raise RuntimeError(
                f"TCP_INFO has {len(info)} bytes here, without tcpi_bytes_sent: Linux 4.19 or later has it"
            )
        found[identity] = Sent(*_BYTES_SENT.unpack_from(info, _BYTES_SENT_AT))
    return found


def sent_between(before: dict[str, Sent], after: dict[str, Sent]) -> Sent:
    """Return what all sockets together have sent from one `tcp_sent` to another; sockets may be new.

    Raises: RuntimeError: one was closed, and what it has sent is gone.
    """
    if closed := before.keys() - after.keys():
        raise RuntimeError(f"{len(closed)} of {len(before)} connections were closed while their bytes were counted")
    pairs = [(before.get(name, Sent(0, 0)), sent) for name, sent in after.items()]
    return Sent(*(sum(last[column] - first[column] for first, last in pairs) for column in range(2)))
