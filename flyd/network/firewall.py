"""What the private network lets through on one host, as text for nftables. Pure.

Rules:
- machines reach machines of their own network (App.network) only, on any port, on any host; an
  address that is no known machine's reaches none: isolation fails closed, and a claim is
  always known before its machine runs;
- hosts (edges, checks) reach every machine; nobody from outside opens a connection to one;
- where hosts are joined by a tunnel, packets from or for private addresses come in and go out
  by the tunnel, the machines' bridge and `lo` alone: a stranger on the hosts' own network who
  sends them to a host's public address gets nothing, and nothing leaves unencrypted while
  the tunnel is away. Hosts without one (`routes`) trust the network between them;
- a packet with a private address comes in where that address is reached (nobody forges one);
- a host's own private address answers machines and hosts only; of these, a Postgres app's endpoint
  answers machines of the app's network and hosts, DNS the host's own machines;
- an expelled host and its machines get and send nothing, also on connections that are open, but for
  new ones to this host's API: each call is checked there, and told why it is refused; it may join again;
- towards the outside a machine has its host's address; within the private network, its own.

All this holds for IPv4 and IPv6 alike (endpoints and DNS listen on IPv4 only). On one bridge machines
have two more ways past their networks, which are closed: link-local addresses, and what is sent to all.
Their frames are known there by their MAC addresses, which follow from the subnet.

No interface between hosts is named: an engine that reconnects a network names it anew.

Bridged and routed traffic are told apart by the kernel, so the same isolation stands in two tables,
both wholly ours. Docker drops what it does not know in FORWARD: `docker_chain` is what it must be
told (its chain DOCKER-USER is made for that).

Called and carried out by flyd/network/nftables.py. A machine that sends raw packets under the address
of another machine of the same host is not stopped here: give machines no NET_RAW.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from flyd.model import App, Host, Machine, Membership, Value
from flyd.network.addresses import address6, beneath, bridge, gateway, mac, subnet, subnet6
from flyd.network.expelled import cut_off, expelled_hosts

TABLE = "flyd"
DOCKER_CHAIN = "FLYD"
IP_TYPES = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}
SET_SUFFIXES = {"ip": "", "ip6": "6"}
NEIGHBOURS = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"  # what ARP is to IPv4
AGAIN_S = 60  # how long an expelled host's new connection to the API may last
OPENING = "ct state new tcp flags & (fin | syn | rst | ack) == syn"
BEFORE_OTHERS = -10  # in the filter hooks: a drop here is final, an accept elsewhere does not undo it


class FirewallView(Value, frozen=True, kw_only=True):
    """All that the rules of `host` depend on."""

    host: Host
    hosts: tuple[Host, ...] = ()
    networks: dict[str, tuple[str, ...]] = {}  # network -> addresses of its machines, sorted
    endpoints: dict[str, tuple[int, ...]] = {}  # network -> its Postgres endpoints' ports, sorted
    cut: tuple[str, ...] = ()  # networks of expelled hosts, sorted


def firewall_view(
    host: Host,
    *,
    hosts: Iterable[Host],
    apps: Iterable[App],
    machines: Iterable[Machine],
    memberships: Sequence[Membership] = (),
) -> FirewallView:
    """The view of `host`. A machine without an app is of no network."""
    network_of = {app.name: app.network for app in apps}
    out = expelled_hosts(host.name, memberships)
    known = sorted({h.name: h for h in (*hosts, host) if h.name not in out}.values(), key=lambda h: h.name)
    addresses: dict[str, list[str]] = {network: [] for network in network_of.values()}
    for machine in machines:
        if machine.app in network_of and machine.host not in out:
            addresses[network_of[machine.app]].append(machine.private_ip)
    ports: dict[str, list[int]] = {}
    for app in apps:
        if app.endpoint_port:
            ports.setdefault(app.network, []).extend((app.endpoint_port, app.read_port))
    return FirewallView(
        host=host,
        hosts=tuple(known),
        networks={n: tuple(sorted(a)) for n, a in sorted(addresses.items()) if a},
        endpoints={n: tuple(sorted(p)) for n, p in sorted(ports.items())},
        cut=cut_off(known, memberships, out),
    )


def rules(view: FirewallView, interface: str, dns_port: int) -> str:
    """The whole of our two tables; nft replaces the old ones with them in one transaction."""
    families = _families(view)
    sets, isolation = [*_sets(families), *_cut_sets(view)], _isolation(families)
    return "\n".join(
        [
            *(f"table {family} {TABLE}\ndelete table {family} {TABLE}" for family in ("inet", "bridge")),
            f"table bridge {TABLE} {{",
            *sets,
            *isolation,
            *_chain("forward", _filter("forward"), ["jump isolate", *_bridged(view)]),
            "}",
            f"table inet {TABLE} {{",
            *sets,
            *isolation,
            *_chain("arrive", "filter hook prerouting priority raw", _arriving(view, families, interface)),
            *_chain("forward", _filter("forward"), _forwarded(view, families, interface)),
            *_chain("input", _filter("input"), _for_the_host(view, families, dns_port)),
            *_chain("depart", _filter("postrouting"), _departing(view, families, interface)),
            *_chain("leave", "nat hook postrouting priority srcnat", _translated(families)),
            "}",
            "",
        ]
    )


def docker_chain(view: FirewallView) -> str:
    """For `iptables-restore --noflush`: let the private network's packets through Docker's FORWARD."""
    mine = subnet(view.host)
    apart = (IPv4Network(h.address) for h in view.hosts)  # where hosts' own addresses are not private
    return _docker_chain(mine, [s for s in (*_subnets(view), *apart) if not s.overlaps(mine)])


def docker_chain6(view: FirewallView) -> str:
    """The same for `ip6tables-restore`: newer engines filter IPv6, too."""
    mine = subnet6(view.host)
    return _docker_chain(mine, [s for s in _subnets6(view) if mine is not None and s != mine])


def _docker_chain(mine: IPv4Network | IPv6Network | None, others: Sequence[IPv4Network | IPv6Network]) -> str:
    pairs = [pair for other in others for pair in ((mine, other), (other, mine))]
    accepted = [f"-A {DOCKER_CHAIN} -s {source} -d {target} -j ACCEPT" for source, target in pairs]
    return "\n".join(["*filter", f":{DOCKER_CHAIN} - [0:0]", *accepted, "COMMIT", ""])


# --------------------------------------------------------------------------- whose addresses


class _Family(Value, frozen=True, kw_only=True):
    """One family of addresses. The names of its sets end in `suffix`."""

    ip: str  # as nftables calls it
    mine: str  # this host's machines
    gateway: str  # this host's own address among them
    private: tuple[str, ...]
    tunnelled: tuple[str, ...]
    hosts: tuple[str, ...]
    networks: tuple[tuple[str, ...], ...]

    @property
    def suffix(self) -> str:
        return SET_SUFFIXES[self.ip]


def _families(view: FirewallView) -> list[_Family]:
    """IPv4, and IPv6 where this host's machines have it."""
    private = tuple(str(s) for s in _subnets(view))
    four = _Family(
        ip="ip",
        mine=str(subnet(view.host)),
        gateway=gateway(view.host),
        private=private,
        tunnelled=(*private, *_apart(view)),
        hosts=tuple(sorted({a for h in view.hosts for a in (h.address, _gateway(h)) if a})),
        networks=tuple(view.networks.values()),
    )
    mine = subnet6(view.host)
    if mine is None:
        return [four]
    private = tuple(str(s) for s in _subnets6(view))
    six = _Family(
        ip="ip6",
        mine=str(mine),
        gateway=str(mine[1]),
        private=private,
        tunnelled=private,
        hosts=tuple(str(s[1]) for s in _subnets6(view)),
        networks=tuple(tuple(map(address6, addresses)) for addresses in view.networks.values()),
    )
    return [four, six]


def _subnets(view: FirewallView) -> list[IPv4Network]:
    """Of all hosts, without those that overlap another's (the mesh leaves them out, too)."""
    found: list[IPv4Network] = [subnet(view.host)]
    for host in view.hosts:
        try:
            network = subnet(host)
        except ValueError:
            continue
        if not any(network.overlaps(other) for other in found):
            found.append(network)
    return sorted(found)


def _subnets6(view: FirewallView) -> list[IPv6Network]:
    return sorted({s for h in view.hosts if (s := subnet6(h)) is not None})


def _apart(view: FirewallView) -> list[str]:
    """Hosts' own addresses that are in no subnet, yet reached by the tunnel."""
    subnets = _subnets(view)
    return sorted(
        h.address
        for h in view.hosts
        if h.wg_public_key
        and not beneath(h)
        and not any(IPv4Address(h.address) in network for network in subnets)
    )


def _gateway(host: Host) -> str:
    try:
        return gateway(host)
    except ValueError:
        return ""


def _own(view: FirewallView) -> str:
    """This host's own addresses on the private network."""
    return f"{{ {', '.join(sorted({view.host.address, gateway(view.host)}))} }}"


# --------------------------------------------------------------------------- parts


def _filter(hook: str) -> str:
    return f"filter hook {hook} priority {BEFORE_OTHERS}"


def _sets(families: Sequence[_Family]) -> list[str]:
    sets: list[str] = []
    for f in families:
        sets += [
            _networks_set(f"private{f.suffix}", f.ip, f.private),
            _networks_set(f"tunnelled{f.suffix}", f.ip, f.tunnelled),
            _set(f"hosts{f.suffix}", f"type {IP_TYPES[f.ip]};", f.hosts),
        ]
        for n, addresses in enumerate(f.networks):
            sets.append(_set(f"network{f.suffix}_{n}", f"type {IP_TYPES[f.ip]};", addresses))
    return sets


def _cut_sets(view: FirewallView) -> list[str]:
    return [
        _networks_set("cut", "ip", [n for n in view.cut if ":" not in n]),
        _networks_set("cut6", "ip6", [n for n in view.cut if ":" in n]),
        *(
            _set(f"again{suffix}", f"type {IP_TYPES[ip]} . inet_service; timeout {AGAIN_S}s;", ())
            for ip, suffix in SET_SUFFIXES.items()
        ),
    ]


def _networks_set(name: str, ip: str, networks: Sequence[str]) -> str:
    return _set(name, f"type {IP_TYPES[ip]}; flags interval;", networks)


def _set(name: str, kind: str, elements: Sequence[str]) -> str:
    listed = f" elements = {{ {', '.join(elements)} }};" if elements else ""
    return f"  set {name} {{ {kind}{listed} }}"


def _chain(name: str, hook: str, statements: Iterable[str]) -> list[str]:
    head = [f"    type {hook}; policy accept;"] if hook else []
    return [f"  chain {name} {{", *head, *(f"    {s}" for s in statements), "  }"]


def _isolation(families: Sequence[_Family]) -> list[str]:
    """Both ends private and neither a host: both must be of one network."""
    statements: list[str] = []
    for f in families:
        ip, private, hosts = f.ip, f"@private{f.suffix}", f"@hosts{f.suffix}"
        statements += [f"{ip} saddr != {private} return", f"{ip} daddr != {private} return"]
        statements += [f"{ip} saddr {hosts} return", f"{ip} daddr {hosts} return"]
        for n in range(len(f.networks)):
            network = f"@network{f.suffix}_{n}"
            statements.append(f"{ip} saddr {network} {ip} daddr {network} accept")
        statements.append(f"{ip} saddr {private} counter drop")
    return _chain("isolate", "", statements)


def _bridged(view: FirewallView) -> list[str]:
    """From machine to machine of this host, what is not between two addresses of one network.

    Their link-local addresses and what goes to all at once would pass by the networks.
    """
    own = subnet(view.host)
    machines = f"ether saddr {mac(str(own[0]))}-{mac(str(own[-1]))}"
    return [f"{machines} {NEIGHBOURS} accept", f"{machines} ether type {{ ip, ip6 }} counter drop"]


def _inside(view: FirewallView, interface: str) -> str:
    """Where private addresses are."""
    return f'{{ "lo", "{interface}", "{bridge(view.host.name)}" }}'


def _has_tunnel(view: FirewallView) -> bool:
    return bool(view.host.wg_public_key)


def _cut(view: FirewallView, end: str, here: str) -> list[str]:
    """What an expelled host sends (`end` saddr) or gets, but at the API, whose port is `here`."""
    api = view.host.api_address.rpartition(":")[2]
    statements: list[str] = []
    for ip, suffix in SET_SUFFIXES.items():
        expelled = f"{ip} {end} @cut{suffix}"
        statements.append(f"{expelled} meta l4proto != tcp counter drop")
        statements.append(f"{expelled} tcp {here} != {api} counter drop")
    return statements


def _cut_unless_new(end: str, there: str, *, opening: bool) -> list[str]:
    """Connections to the API from before the expelling. `there`: which port is the expelled host's."""
    statements: list[str] = []
    for ip, suffix in SET_SUFFIXES.items():
        expelled, one = f"{ip} {end} @cut{suffix}", f"{ip} {end} . tcp {there}"
        if opening:
            statements.append(f"{expelled} {OPENING} add @again{suffix} {{ {one} }}")
        statements.append(f"{expelled} {one} != @again{suffix} counter drop")
    return statements


def _arriving(view: FirewallView, families: Sequence[_Family], interface: str) -> list[str]:
    """Before all else, established connections included."""
    statements = _cut(view, "saddr", "dport")
    for f in families:
        forged = f"{f.ip} saddr @private{f.suffix} fib saddr . iif oif missing"
        statements.append(f'iifname != "lo" {forged} counter drop')
        if _has_tunnel(view):
            outside, private = f"iifname != {_inside(view, interface)}", f"@tunnelled{f.suffix}"
            statements += [f"{outside} {f.ip} {end} {private} counter drop" for end in ("saddr", "daddr")]
    return statements


def _departing(view: FirewallView, families: Sequence[_Family], interface: str) -> list[str]:
    """Last of all, whether it was sent here or passes through."""
    statements = [*_cut(view, "daddr", "sport"), *_cut_unless_new("daddr", "dport", opening=False)]
    if _has_tunnel(view):
        outside = f"oifname != {_inside(view, interface)}"
        statements += [f"{outside} {f.ip} daddr @tunnelled{f.suffix} counter drop" for f in families]
    return statements


def _foreign(family: _Family) -> str:
    """Opened by neither a machine nor a host."""
    ip, suffix = family.ip, family.suffix
    sources = f"{ip} saddr != @private{suffix} {ip} saddr != @hosts{suffix}"
    return f"{sources} ct state != {{ established, related }} counter drop"


def _forwarded(view: FirewallView, families: Sequence[_Family], interface: str) -> list[str]:
    return [
        *(f"{ip} {e} @cut{s} counter drop" for ip, s in SET_SUFFIXES.items() for e in ("saddr", "daddr")),
        f'oifname "{interface}" tcp flags syn tcp option maxseg size set rt mtu',
        *(f"{f.ip} daddr {f.mine} {_foreign(f)}" for f in families),
        # Here, too: a machine may reach another host's address under its own host's.
        *_closed_endpoints(view, f"ip saddr {subnet(view.host)} ip daddr @hosts"),
        "jump isolate",
    ]


def _for_the_host(view: FirewallView, families: Sequence[_Family], dns_port: int) -> list[str]:
    """What the host itself is sent. Its own packets come by `lo`."""
    own = _own(view)
    stranger = f"ip saddr != {subnet(view.host)} ip saddr != {own}"
    dns = f'iifname != "lo" ip daddr {own} meta l4proto {{ tcp, udp }} th dport {dns_port}'
    return [
        *_cut_unless_new("saddr", "sport", opening=True),
        f"{NEIGHBOURS} accept",  # they ask from their link-local addresses
        *(f'iifname != "lo" {f.ip} daddr {f.gateway} {_foreign(f)}' for f in families),
        f"{dns} {stranger} counter drop",
        *_closed_endpoints(view, f'iifname != "lo" ip daddr {own}'),
    ]


def _closed_endpoints(view: FirewallView, to: str) -> list[str]:
    """To all but hosts and the machines of the app's network. A network without machines has none."""
    numbers = {name: n for n, name in enumerate(view.networks)}
    statements: list[str] = []
    for network, ports in view.endpoints.items():
        others = "ip saddr != @hosts"
        if network in numbers:
            others += f" ip saddr != @network_{numbers[network]}"
        statements.append(f"{to} tcp dport {{ {', '.join(map(str, ports))} }} {others} counter drop")
    return statements


def _translated(families: Sequence[_Family]) -> list[str]:
    return [f"{f.ip} saddr {f.mine} {f.ip} daddr != @private{f.suffix} masquerade" for f in families]
