# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who opened what, and when: what the kernel keeps of it, operators who expire, and ending what they opened."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._nft import (
    TABLE,
    Opening,
    Source,
    forget_openings,
    listing_digests,
    openings,
    read_listing,
    replace_transaction,
    windows,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Session
from ansible_collections.fleet.portknock.plugins.module_utils._shutting import find, shut
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed
from netlab import NFT, SSH, Lab, command

ALICE = (Knock(48396, "tcp"), Knock(39508, "udp"), Knock(30222, "tcp"))
BOB = (Knock(41001, "tcp"), Knock(52003, "udp"), Knock(33005, "tcp"))
OPERATORS = {"alice": [ALICE], "bob": [BOB]}
BOTH: dict[str, Any] = {"sequences": OPERATORS}
YEAR = 365 * 86400


class Host(Nftables):
    """The back end, as it runs inside the namespace of the lab's host."""

    def __init__(self, lab: Lab) -> None:
        self._name = lab.host.name
        super().__init__(self.call)

    def call(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        program = NFT if argv[0] == "nft" else [argv[0]]
        done = subprocess.run(
            ["ip", "netns", "exec", self._name, *program, *argv[1:]],
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        )
        return Completed(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def host(lab: Lab) -> Host:
    return Host(lab)


def records(lab: Lab) -> dict[tuple[str, str], Opening]:
    return {(record.number, str(record.source)): record for record in openings(lab.listing() or {})}


def counts(lab: Lab) -> dict[tuple[str, str], Optional[int]]:
    return {key: record.times for key, record in records(lab).items()}


def link_local(lab: Lab) -> tuple[str, str]:
    """The client's own link-local address and the host's, with the client's scope."""
    found = []
    for where, interface in ((lab.client, "c0"), (lab.host, "h0")):
        addresses = json.loads(where.ip("-j", "address", "show", interface))[0]["addr_info"]
        found.append(next(entry["local"] for entry in addresses if entry["scope"] == "link"))
    return f"{found[0]}%c0", f"{found[1]}%c0"


def test_an_opening_is_its_operator_s(lab: Lab) -> None:
    lab.gate(**BOTH)
    four, six = lab.source(4), lab.source(6)
    local, to = link_local(lab)
    for _ in range(3):
        lab.touch(four, *ALICE)
    lab.touch(four, *BOB)
    lab.touch(six, *BOB)
    lab.touch(local, *ALICE, host=to)
    on_host = local.replace("%c0", "%h0")
    assert counts(lab) == {("1", four): 3, ("2", four): 1, ("2", six): 1, ("1", on_host): 1}
    assert all(record.ago <= 10 for record in records(lab).values())
    assert {str(source) for source in windows(lab.listing() or {})} == {four, six, on_host}


def test_only_whole_sequences_are_on_record(lab: Lab) -> None:
    model = lab.gate(**BOTH, guard="strict")
    assert model["audit_days"] == 30
    for knocks in (ALICE[:2], (*reversed(ALICE),), (ALICE[0], BOB[1], ALICE[2])):
        stranger = lab.source()
        lab.touch(stranger, *knocks)
        lab.look(stranger)
    lab.flood(0, 500, ALICE[0].port, "tcp")
    assert counts(lab) == {}


def test_a_full_record_keeps_nobody_out(lab: Lab) -> None:
    lab.gate(**BOTH, max_windows=2)
    sources = [lab.source() for _ in range(3)]
    for source in sources:
        lab.touch(source, *ALICE)
        lab.host.nft(f"flush set inet {TABLE} open4")
    assert len(counts(lab)) == 2
    lab.touch(sources[2], *ALICE)
    assert lab.look(sources[2]) == "open"


def test_the_last_time_is_the_last(lab: Lab) -> None:
    lab.gate(**BOTH)
    source = lab.source()
    lab.touch(source, *ALICE)
    lab.host.nft(f"delete element inet {TABLE} opened4 {{ {source} . 2:1 }}")
    lab.host.nft(f"add element inet {TABLE} opened4 {{ {source} . 2:1 expires 29d }}")
    assert 86400 - 5 <= records(lab)["1", source].ago <= 86400 + 5
    lab.touch(source, *ALICE)
    assert records(lab)["1", source].ago <= 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guard": "strict"},
        {"open_window": 90},
        {"max_windows": 500},
        {"audit_days": 7},
        {"audit_days": 60},
        {"sequences": {"alice": [ALICE]}},
        {"template": "closed"},
    ],
    ids=str,
)
def test_records_outlive_another_ruleset(lab: Lab, host: Host, options: dict[str, Any]) -> None:
    lab.gate(**BOTH)
    sources = {"1": lab.source(4), "2": lab.source(6)}
    for _ in range(2):
        lab.touch(sources["1"], *ALICE)
        lab.touch(sources["2"], *BOB)
    local = f'add element inet {TABLE} opened_ll6 {{ "h0" . fe80::77 . 2:1a expires 29d }}'
    lab.host.nft(local)
    before = records(lab)
    host.load(lab.render(**{**BOTH, **options})[0], host.listing())
    after = records(lab)
    assert {key: record.source for key, record in after.items()} == {
        key: record.source for key, record in before.items()
    }
    assert all(abs(after[key].ago - record.ago) <= 10 for key, record in before.items())
    # nft 0.9.8 can't say counts.
    known = None if options.keys() & {"max_windows", "audit_days"} and host.version() == "0.9.8" else 2
    assert [after[number, source].times for number, source in sources.items()] == [known, known]
    if options.get("template") != "closed":
        lab.touch(sources["1"], *ALICE)
        assert records(lab)["1", sources["1"]].times == (known and 3)
        assert records(lab)["1", sources["1"]].ago <= 5


def test_a_shorter_memory_forgets(lab: Lab, host: Host) -> None:
    lab.gate(**BOTH)
    lab.host.nft(f"add element inet {TABLE} opened4 {{ 192.0.2.9 . 2:1 expires 20d, 192.0.2.8 . 2:1 expires 29d }}")
    host.load(lab.render(**BOTH, audit_days=7)[0], host.listing())
    assert set(counts(lab)) == {("1", "192.0.2.8")}
    host.load(lab.render(**BOTH, audit_days=0)[0], host.listing())
    assert counts(lab) == {}
    assert "opened4" not in json.dumps(lab.listing())
    source = lab.source()
    lab.touch(source, *ALICE)
    assert lab.look(source) == "open"


def test_forgetting_is_one_transaction(lab: Lab, host: Host) -> None:
    lab.gate(**BOTH)
    source = lab.source()
    lab.touch(source, *ALICE)
    host.load(forget_openings(lab.render(**BOTH)[0]), host.listing())
    assert counts(lab) == {}
    assert lab.look(source) == "open"


def test_records_are_no_difference(lab: Lab) -> None:
    lab.gate(**BOTH)
    before = listing_digests(lab.listing() or {})
    lab.touch(lab.source(), *ALICE)
    lab.touch(lab.source(6), *BOB)
    assert listing_digests(lab.listing() or {}) == before


@pytest.mark.parametrize(
    ("begins", "ends", "opens"),
    [
        (-60, 60, True),
        (-YEAR, 40000, True),
        (-YEAR, -1, False),
        (-YEAR, -40000, False),
        # A clock that is wrong: before the operator's sequence was made.
        (60, YEAR, False),
        (40000, YEAR, False),
    ],
)
@pytest.mark.parametrize("family", [4, 6])
def test_an_operator_expires(lab: Lab, family: int, begins: int, ends: int, opens: bool) -> None:
    now = int(time.time())
    lab.gate(**BOTH, validity={"bob": (now + begins, now + ends)})
    source, other = lab.source(family), lab.source(family)
    lab.touch(source, *BOB)
    lab.touch(other, *ALICE)
    assert (lab.look(source), lab.look(other)) == ("open" if opens else "reset", "open")
    assert (("2", source) in counts(lab)) == opens
    assert lab.count(f"at{family}") == 0
    # They are no worse off for it than anyone.
    lab.touch(source, *ALICE)
    assert lab.look(source) == "open"


def test_an_operator_expires_while_the_gate_stands(lab: Lab) -> None:
    ends = int(time.time()) + 2
    lab.gate(**BOTH, validity={"bob": (ends - YEAR, ends)})
    early, late = lab.source(), lab.source()
    lab.touch(early, *BOB)
    assert lab.look(early) == "open"
    while time.time() <= ends:
        time.sleep(0.05)
    lab.touch(late, *BOB)
    assert lab.look(late) == "reset"


def test_the_last_knock_of_who_has_expired_looks_closed(lab: Lab) -> None:
    now = int(time.time())
    lab.gate(**BOTH, validity={"bob": (now - YEAR, now - 60)})
    source = lab.source()
    lab.touch(source, *BOB[:-1])
    assert lab.look(source, port=BOB[-1].port) == lab.look(source, port=40001) == "reset"
    assert lab.look(source) == "reset"


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_the_time_zone_changes_nothing(lab: Lab, host: Host, zone: str) -> None:
    """Neither of who loads the gate nor of who loads again what the kernel has."""
    now = int(time.time())
    texts = [lab.render(**BOTH, validity={"bob": (now - YEAR, now + left)})[0] for left in (-1800, 1800)]
    for text, look in zip(texts, ("reset", "open")):
        in_zone = ["env", f"TZ={zone}", *NFT, "-f", "-"]
        lab.host.run(*in_zone, given=replace_transaction(text, lab.listing()))
        digests = host.digests(host.listing() or {})
        source = lab.source()
        lab.touch(source, *BOB)
        assert lab.look(source) == look
        kept = host.boot_text(host.kernel_text() or "")
        path = f"/run/{lab.host.name}.nft"
        try:
            with open(path, "w") as stream:
                stream.write(kept)
            shell = host.restore_command(f"< {path} /dev/stdin").replace("nft", " ".join(NFT), 1)
            lab.host.run("env", f"TZ={zone}", "sh", "-c", shell.replace("-f < ", "-f - < ").replace(" /dev/stdin", ""))
        finally:
            command("rm", "-f", path)
        assert host.digests(host.listing() or {}) == digests
        source = lab.source()
        lab.touch(source, *BOB)
        assert lab.look(source) == look


def test_the_clock_is_asked_for(host: Host) -> None:
    assert host.capabilities()["clock"] is True


Opened = Callable[[str], socket.socket]


@pytest.fixture
def session(lab: Lab) -> Opened:
    """A session with the protected port that is open already."""

    def connect(source: str) -> socket.socket:
        to = link_local(lab)[1] if "%" in source else None
        state, one = lab.connect(source, host=to)
        assert state == "open"
        return one

    return connect


def lives(one: socket.socket) -> bool:
    one.settimeout(2)
    try:
        one.send(b"x")
        return one.recv(10) == b"x"
    except ConnectionError:
        return False


def sessions_of(lab: Lab) -> str:
    """/proc as it is for a process in the host's namespace."""
    path = f"/run/{lab.host.name}-proc"
    command("mkdir", "-p", f"{path}/net")
    for table in ("tcp", "tcp6"):
        with open(f"{path}/net/{table}", "w") as stream:
            stream.write(lab.host.run("cat", f"/proc/net/{table}"))
    return path


@pytest.fixture
def proc(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets are listed as the host has them."""
    from ansible_collections.fleet.portknock.plugins.module_utils import _shutting

    real = _shutting.tcp_sessions

    def listed(ports: frozenset[int], _proc: str) -> list[Session]:
        path = sessions_of(lab)
        try:
            return real(ports, path)
        finally:
            command("rm", "-r", path)

    monkeypatch.setattr(_shutting, "tcp_sessions", listed)


@pytest.mark.usefixtures("proc")
def test_shutting_an_operator_out(lab: Lab, host: Host, session: Opened) -> None:
    lab.gate(**BOTH)
    local, to = link_local(lab)
    bobs = [lab.source(4), lab.source(6)]
    alices = [lab.source(4), lab.source(6)]
    shared = lab.source(4)
    for source in (*bobs, shared):
        lab.touch(source, *BOB)
    lab.touch(local, *BOB, host=to)
    for source in (*alices, shared):
        lab.touch(source, *ALICE)
    theirs = [session(source) for source in (*bobs, local, shared)]
    others = [session(source) for source in alices]
    numbers, ports = frozenset((2,)), frozenset((SSH,))
    found = find(host, numbers, ports, (), host.call)
    assert (len(found.windows), len(found.sessions)) == (4, 4)
    done = shut(host, numbers, ports, False, (), host.call)
    assert done == {"windows_closed": 4, "sessions_ended": 0, "sessions_left": 4, "warnings": []}
    assert [lab.look(source) for source in (*bobs, *alices, shared)] == ["reset", "reset", "open", "open", "reset"]
    assert lab.look(local, host=to) == "reset"
    assert all(lives(one) for one in (*theirs, *others))
    done = shut(host, numbers, ports, True, (), host.call)
    assert done == {"windows_closed": 0, "sessions_ended": 4, "sessions_left": 0, "warnings": []}
    assert [lives(one) for one in theirs] == [False] * 4
    assert [lives(one) for one in others] == [True] * 2
    # Who did it is still on record.
    assert ("2", bobs[0]) in counts(lab)
    done = shut(host, numbers, ports, True, (), host.call)
    assert done == {"windows_closed": 0, "sessions_ended": 0, "sessions_left": 0, "warnings": []}


@pytest.mark.usefixtures("proc")
def test_the_run_s_own_session_is_spared(lab: Lab, host: Host, session: Opened) -> None:
    lab.gate(**BOTH)
    source = lab.source()
    lab.touch(source, *BOB)
    own, other = session(source), session(source)
    spare = [Session(SSH, source, own.getsockname()[1])]
    done = shut(host, frozenset((2,)), frozenset((SSH,)), True, spare, host.call)
    assert (done["sessions_ended"], done["sessions_left"]) == (1, 0)
    assert [lives(own), lives(other)] == [True, False]
    assert done["warnings"] == [f"This run's own session from {source}, which they had opened the gate from, goes on."]


@pytest.mark.usefixtures("proc")
def test_other_interfaces_have_other_neighbours(lab: Lab, host: Host, session: Opened) -> None:
    """A link-local address of the record is on one interface; the same one on another interface is somebody else."""
    lab.gate(**BOTH)
    local, to = link_local(lab)
    lab.touch(local, *ALICE, host=to)
    one = session(local)
    lab.link("other0", "other1", lab.client)
    bare = local.partition("%")[0]
    lab.host.nft(f'add element inet {TABLE} opened_ll6 {{ "other0" . {bare} . 2:2 }}')
    done = shut(host, frozenset((2,)), frozenset((SSH,)), True, (), host.call)
    assert (done["windows_closed"], done["sessions_ended"], done["sessions_left"]) == (0, 0, 0)
    assert lives(one)


@pytest.mark.usefixtures("proc")
def test_a_window_that_nobody_is_known_to_have_opened(lab: Lab, host: Host) -> None:
    """Without records any window may be theirs."""
    lab.gate(**BOTH, audit_days=0)
    for sequence in (ALICE, BOB):
        lab.touch(lab.source(), *sequence)
    done = shut(host, frozenset((2,)), frozenset((SSH,)), True, (), host.call)
    assert done["windows_closed"] == 2
    assert lab.count("open4") == 0


@pytest.mark.usefixtures("proc")
@pytest.mark.parametrize(("code", "reason"), [(127, "ss is not installed"), (0, "INET_DIAG_DESTROY")])
def test_sessions_that_can_t_be_ended(lab: Lab, host: Host, session: Opened, code: int, reason: str) -> None:
    """No ss, or a kernel that does nothing about it."""
    lab.gate(**BOTH)
    source = lab.source()
    lab.touch(source, *BOB)
    one = session(source)

    def call(argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        return Completed(code, "", "") if argv[0] == "ss" else host.call(argv, stdin)

    done = shut(host, frozenset((2,)), frozenset((SSH,)), True, (), call)
    assert (done["windows_closed"], done["sessions_ended"], done["sessions_left"]) == (1, 0, 1)
    assert len(done["warnings"]) == 1
    assert reason in done["warnings"][0]
    assert lives(one)


def test_listings_of_a_gate_with_records(lab: Lab, host: Host) -> None:
    """What nft prints in its own words is read by everyone alike."""
    lab.gate(**BOTH)
    lab.touch(lab.source(), *ALICE)
    printed = host.call(["nft", "-j", "list", "table", "inet", TABLE]).stdout
    found = openings(read_listing(printed) or {})
    assert [(record.number, record.times, record.ago) for record in found] == [("1", 1, found[0].ago)]
    assert found[0].source == Source(found[0].source.address)
