"""What the private network lets through on one host, as text for nftables. Pure.

Rules:
- machines reach machines of their own network (App.network) only, on any port, on any host; an
  address that is no known machine's reaches none: isolation fails closed, and a claim is
  always known before its machine runs;
- hosts (edges, checks) reach every machine; nobody from outside opens a connection to one;
- a packet with a private address comes in where that address is reached (nobody forges one);
- a Postgres app's endpoint is closed to machines of other networks, this host's DNS to all but its
  own machines;
- towards the outside a machine has its host's address; within the private network, its own.

Bridged and routed traffic are told apart by the kernel, so the same isolation stands in two tables,
both wholly ours. Docker drops what it does not know in FORWARD: `docker_chain` is what it must be
told (its chain DOCKER-USER is made for that).

Called and carried out by flyd/network/nftables.py. A machine that sends raw packets under the address
of another machine of the same host is not stopped here: give machines no NET_RAW.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network

from flyd.model import App, Host, Machine, Value
from flyd.network.addresses import gateway, subnet

TABLE = "flyd"
DOCKER_CHAIN = "FLYD"
BEFORE_OTHERS = -10  # in the filter hooks: a drop here is final, an accept elsewhere does not undo it


class FirewallView(Value, frozen=True, kw_only=True):
    """All that the rules of `host` depend on."""

    host: Host
    hosts: tuple[Host, ...] = ()
    networks: dict[str, tuple[str, ...]] = {}  # network -> addresses of its machines, sorted
    endpoints: dict[str, tuple[int, ...]] = {}  # network -> its Postgres endpoints' ports, sorted


def firewall_view(
    host: Host, *, hosts: Iterable[Host], apps: Iterable[App], machines: Iterable[Machine]
) -> FirewallView:
    """The view of `host`. A machine without an app is of no network."""
    network_of = {app.name: app.network for app in apps}
    addresses: dict[str, list[str]] = {network: [] for network in network_of.values()}
    for machine in machines:
        if machine.app in network_of:
            addresses[network_of[machine.app]].append(machine.private_ip)
    ports: dict[str, list[int]] = {}
    for app in apps:
        if app.endpoint_port:
            ports.setdefault(app.network, []).append(app.endpoint_port)
    return FirewallView(
        host=host,
        hosts=tuple(sorted({h.name: h for h in (*hosts, host)}.values(), key=lambda h: h.name)),
        networks={n: tuple(sorted(a)) for n, a in sorted(addresses.items()) if a},
        endpoints={n: tuple(sorted(p)) for n, p in sorted(ports.items())},
    )


def rules(view: FirewallView, interface: str, dns_port: int) -> str:
    """The whole of our two tables; nft replaces the old ones with them in one transaction."""
    sets, chain = _sets(view), _isolation(view)
    return "\n".join(
        [
            *(f"table {family} {TABLE}\ndelete table {family} {TABLE}" for family in ("inet", "bridge")),
            f"table bridge {TABLE} {{",
            *sets,
            *chain,
            *_chain("forward", f"filter hook forward priority {BEFORE_OTHERS}", ["jump isolate"]),
            "}",
            f"table inet {TABLE} {{",
            *sets,
            *chain,
            *_hooks(view, interface, dns_port),
            "}",
            "",
        ]
    )


def docker_chain(view: FirewallView) -> str:
    """For `iptables-restore --noflush`: let the private network's packets through Docker's FORWARD."""
    mine = subnet(view.host)
    apart = (IPv4Network(h.address) for h in view.hosts)  # where hosts' own addresses are not private
    others = [s for s in (*_subnets(view), *apart) if not s.overlaps(mine)]
    pairs = [pair for other in others for pair in ((mine, other), (other, mine))]
    accepted = [f"-A {DOCKER_CHAIN} -s {source} -d {target} -j ACCEPT" for source, target in pairs]
    return "\n".join(["*filter", f":{DOCKER_CHAIN} - [0:0]", *accepted, "COMMIT", ""])


# --------------------------------------------------------------------------- parts


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


def _sets(view: FirewallView) -> list[str]:
    own = sorted({a for h in view.hosts for a in (h.address, _gateway(h)) if a})
    return [
        _set("private", [str(s) for s in _subnets(view)], flags=True),
        _set("hosts", own),
        *(_set(f"network_{n}", view.networks[name]) for n, name in enumerate(view.networks)),
    ]


def _gateway(host: Host) -> str:
    try:
        return gateway(host)
    except ValueError:
        return ""


def _set(name: str, elements: Iterable[str], *, flags: bool = False) -> str:
    kind = "type ipv4_addr; flags interval;" if flags else "type ipv4_addr;"
    return f"  set {name} {{ {kind} elements = {{ {', '.join(elements)} }}; }}"


def _chain(name: str, hook: str, statements: Iterable[str]) -> list[str]:
    head = [f"    type {hook}; policy accept;"] if hook else []
    return [f"  chain {name} {{", *head, *(f"    {s}" for s in statements), "  }"]


def _isolation(view: FirewallView) -> list[str]:
    """Both ends private and neither a host: both must be of one network."""
    within = [f"ip saddr @network_{n} ip daddr @network_{n} return" for n in range(len(view.networks))]
    outside = ["ip saddr != @private return", "ip daddr != @private return"]
    hosts = ["ip saddr @hosts return", "ip daddr @hosts return"]
    return _chain("isolate", "", [*outside, *hosts, *within, "ip saddr @private counter drop"])


def _hooks(view: FirewallView, interface: str, dns_port: int) -> list[str]:
    mine = subnet(view.host)
    named = ", ".join(sorted({view.host.address, gateway(view.host)}))
    forged = 'iifname != "lo" ip saddr @private fib saddr . iif oif missing'
    stranger = f"ip saddr != {mine} ip saddr != {{ {named} }}"
    dns = f'iifname != "lo" ip daddr {{ {named} }} meta l4proto {{ tcp, udp }} th dport {dns_port}'
    opened = f"ip daddr {mine} ip saddr != @private ip saddr != @hosts ct state != {{ established, related }}"
    clamp = f'oifname "{interface}" tcp flags syn tcp option maxseg size set rt mtu'
    return [
        *_chain("arrive", "filter hook prerouting priority raw", [f"{forged} counter drop"]),
        *_chain(
            "forward",
            f"filter hook forward priority {BEFORE_OTHERS}",
            [clamp, f"{opened} counter drop", "jump isolate"],
        ),
        *_chain(
            "input",
            f"filter hook input priority {BEFORE_OTHERS}",
            [f"{dns} {stranger} counter drop", *_closed_endpoints(view)],
        ),
        *_chain(
            "leave",
            "nat hook postrouting priority srcnat",
            [f"ip saddr {mine} ip daddr != @private masquerade"],
        ),
    ]


def _closed_endpoints(view: FirewallView) -> list[str]:
    """To machines of other networks. A network without machines has none that may come."""
    numbers = {name: n for n, name in enumerate(view.networks)}
    statements: list[str] = []
    for network, ports in view.endpoints.items():
        to = f"tcp dport {{ {', '.join(map(str, ports))} }} ip saddr @private ip saddr != @hosts"
        own = f" ip saddr != @network_{numbers[network]}" if network in numbers else ""
        statements.append(f"{to}{own} counter drop")
    return statements
