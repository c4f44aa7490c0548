"""Every mistake is named with its line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.deploy.appconfig import inspect, parse, remark_text
from flyd.deploy.appconfig.units import disk_gb, duration_s, memory_mb
from flyd.errors import InvalidInput

MALFORMED = [
    ("app = \n", 1, 7, "invalid value"),
    ('app = "x"\n[http_service\n', 2, 14, "expected ']' at the end of a table declaration"),
    ("a = 1\n  foo bar = 2\n", 2, 7, "expected '=' after a key in a key/value pair"),
    ("a = 1\na = 2\n", 2, 6, "cannot overwrite a value"),
    ('x = "abc', 1, 9, "unterminated string"),
    ("a = [1,\r\n b\r\n", 2, 2, "invalid value"),
    ("[" * 5000, 1, 3, "invalid initial character for a key part"),
    ("a = " + "[" * 5000, 1, 0, "nested too deeply"),
    ("a = " + "9" * 5000, 1, 0, "out of range"),
    ("a" * 1_000_001, 1, 0, "longer than"),
]


@pytest.mark.parametrize(("text", "line", "column", "message"), MALFORMED)
def test_malformed(text: str, line: int, column: int, message: str) -> None:
    report = inspect(text, "fly.toml")
    assert report.config is None
    (error,) = report.errors
    assert (error.line, error.column) == (line, column)
    assert message in error.message


def test_malformed_is_shown_with_its_line_and_a_caret() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse("a = 1\n\tfoo bar = 2\n", "some/fly.toml")
    assert caught.value.message.split("\n") == [
        "some/fly.toml:2:6: expected '=' after a key in a key/value pair",
        "     foo bar = 2",
        "         ^",
    ]
    assert "fly config validate some/fly.toml" in caught.value.hint


SERVICE = '[[services]]\ninternal_port = 80\n[[services.ports]]\nport = 80\nhandlers = ["http"]\n'
MOUNT = '[mounts]\nsource = "d"\ndestination = "/d"\n'
CHECK = '[checks.alive]\ntype = "tcp"\nport = 80\n'

# text, line, what the message holds
ERRORS = [
    ("\napp = 7", 2, "app: expected a string, not 7"),
    ("primary_region = 'Ams'", 1, "primary_region: 'Ams' is not a region's name"),
    ("primary_region = 'fra'\n[flyd]\nregions = ['ams']", 1, "'fra' is not among flyd.regions: ams"),
    ("[flyd]\nregions = ['ams', 'A!']", 2, "flyd.regions: 'A!' is not a region's name"),
    ("[flyd]\nregions = ['ams', 'ams']", 2, "a region is named twice"),
    ("[flyd]\nregions = 3", 2, "expected a list of strings"),
    ("[flyd]\nliveness = 3", 2, "flyd.liveness: expected a table, not 3"),
    ("[flyd.liveness]\nalive = 3", 2, "no top-level check 'alive': declare it under [checks.alive]"),
    ("[flyd.liveness]\nalife = 3\n" + CHECK, 2, "no top-level check 'alife': only alive"),
    ("[flyd.liveness]\nalive = 0\n" + CHECK, 2, "flyd.liveness.alive: 0 is not between 1 and 1000"),
    ("[flyd.liveness]\nalive = true\n" + CHECK, 2, "expected a whole number, not True"),
    ("[flyd]\nrequire = 'nvme'", 2, "flyd.require: expected a table, not 'nvme'"),
    ("[flyd.require]\ndisk = 3", 2, "flyd.require.disk: expected a string, not 3"),
    ("[flyd.require]\ndisk = ''", 2, "'' is no label's value"),
    ("[flyd.require]\n'-a' = 'b'", 2, "'-a' is no label's name"),
    ("[flyd.require]\nweb = { disk = 'nvme' }", 2, "there is no process group 'web', only app"),
    ("[flyd.require.app]\ndisk = true", 2, "flyd.require.app.disk: expected a string, not True"),
    ("kill_signal = 'SIGSTOP'", 1, "kill_signal: 'SIGSTOP' is not one of SIGINT"),
    ("kill_timeout = 'soon'", 1, "kill_timeout: expected a duration"),
    ("kill_timeout = -1", 1, "a duration can not be -1"),
    ("env = 'A=1'", 1, "env: expected a table or an array of tables"),
    ("[env]\nA = { b = 1 }", 2, "env.A: expected a string, number or boolean"),
    ("[deploy]\nstrategy = 'canry'", 2, "deploy.strategy: 'canry' is not one of rolling, immediate, canary"),
    ("[deploy]\nstrategy = 'canary'\n" + MOUNT, 2, "canary starts a second machine"),
    ("[deploy]\nstrategy = 'bluegreen'\n" + MOUNT, 2, "bluegreen starts a second machine"),
    ('[deploy]\n\nrelease_command = "a \'b"', 3, "can not be split into words (no closing quotation)"),
    ("[deploy]\nmax_unavailable = 0", 2, "expected a number above 0"),
    ("[deploy]\nwait_timeout = '5 minutes'", 2, "deploy.wait_timeout: expected a duration"),
    ('[processes]\nweb = "\'"', 2, "processes.web: can not be split"),
    ("[processes]\nweb = 3", 2, "processes.web: expected a string"),
    ("[http_service]\nforce_https = 'yes'", 2, "http_service.force_https: expected true or false"),
    ("[http_service]\ninternal_port = 'http'", 2, "expected a whole number, not 'http'"),
    ("[http_service]\ninternal_port = 70000", 2, "70000 is not between 1 and 65535"),
    ("[http_service]\ninternal_port = 0", 2, "0 is not between 1 and 65535"),
    ("http_service = 3", 1, "http_service: expected a table, not 3"),
    ("services = 'x'", 1, "services: expected a table or an array"),
    (
        "[processes]\nweb = 'a'\njobs = 'b'\n[http_service]\ninternal_port = 80",
        4,
        "names no process group, but the app has jobs, web: add processes = ['jobs']",
    ),
    (
        "[http_service]\ninternal_port = 80\nprocesses = ['web']",
        3,
        "there is no process group 'web', only app",
    ),
    ("[[restart]]\npolicy = 'always'\nprocesses = ['web']", 3, "there is no process group 'web'"),
    ("[[restart]]\npolicy = 'sometimes'", 2, "restart[0].policy: 'sometimes' is not one of"),
    (SERVICE.replace('"http"', '"htp"'), 5, "services[0].ports[0].handlers: 'htp' is not one of"),
    (SERVICE.replace("port = 80\nhandlers", "start_port = 1\nhandlers"), 4, "no ranges of ports"),
    (SERVICE.replace("port = 80\nhandlers", "handlers"), 3, "ports[0].port: is missing"),
    (
        SERVICE + "[[services.tcp_checks]]\ninterval = 'often'",
        7,
        "tcp_checks[0].interval: expected a duration",
    ),
    ("[checks.a]\nport = 1", 1, "checks.a.type: is missing: tcp or http"),
    ("[checks.a]\nport = 1\ntype = 'udp'", 3, "checks.a.type: 'udp' is not one of tcp, http"),
    ("[checks.a]\ntype = 'tcp'", 1, "checks.a.port: is missing"),
    ("[checks.a]\ntype = 'tcp'\nport = 1\ninterval = 1000", 4, "1 s is less than 2 s"),
    ("[checks.a]\ntype = 'tcp'\nport = 1\ntimeout = '61s'", 4, "61 s is more than 60 s"),
    ("[mounts]\nsource = ''\ndestination = '/d'", 2, "'' is not a name of a volume"),
    ("[mounts]\nsource = 'd'\ndestination = 'data'", 3, "is not an absolute path below /"),
    ("[mounts]\nsource = 'd'\ndestination = '/'", 3, "is not an absolute path below /"),
    ("[mounts]\nsource = 'd'\ndestination = '/a/../b'", 3, "is not an absolute path below /"),
    (MOUNT + "initial_size = 'big'", 4, "expected a size such as '10gb'"),
    (MOUNT + "initial_size = 0", 4, "a volume has at least 1 GB"),
    (MOUNT + "snapshot_retention = 61", 4, "61 is not between 1 and 60"),
    (MOUNT + "auto_extend_size_threshold = 10", 4, "10 is not between 50 and 99"),
    (MOUNT + "auto_extend_size_limit = '501gb'", 4, "501 GB is not between 1 and 500 GB"),
    (
        "[[mounts]]\nsource='a'\ndestination='/a'\n[[mounts]]\nsource='b'\ndestination='/b'",
        5,
        "has a mount already",
    ),
    ("[[vm]]\nsize = 'huge'", 2, "'huge' is not a size that flyd has"),
    ("[[vm]]\nsize = 'shared-cpu-3x'", 2, "'shared-cpu-3x' is not a size"),
    ("[[vm]]\nmemory = 'lots'", 2, "expected a size such as '512mb'"),
    ("[[vm]]\ncpus = 0", 2, "0 is not between 1 and 1024"),
    ("[[vm]]\ncpu_kind = 'fast'", 2, "'fast' is not one of shared, performance"),
    ("[build]\ncompression = 'xz'", 2, "'xz' is not one of gzip, zstd"),
    ("[build]\ncompression_level = 12", 2, "12 is not between 0 and 9"),
    ("[experimental]\ncmd = 3", 2, "experimental.cmd: expected a list of strings"),
]


@pytest.mark.parametrize(("text", "line", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(text: str, line: int, message: str) -> None:
    report = inspect(text, "fly.toml")
    assert report.config is None
    shown = [remark_text("fly.toml", error) for error in report.errors]
    assert len(shown) == 1
    assert shown[0].startswith(f"fly.toml:{line}: ")
    assert message in shown[0]


WARNINGS = [
    ("app = '${APP}'", 1, "is no name for an app"),
    ("[ENV]\nA = 1", 1, "ENV: unknown key: ignored (did you mean 'env'?)"),
    (
        "\n[http_service]\ninternal_port = 80\nmax_machines_running = 2",
        4,
        "did you mean 'min_machines_running'?",
    ),
    ("a = 1", 1, "a: unknown key: ignored"),
    ("swap_size_mb = 512", 1, "flyd does not use this yet"),
    ("[experimental]\nauto_rollback = true", 2, "always undoes a deploy that fails"),
    ("[http_service]\ninternal_port = 80\nauto_stop_machines = 'stop'", 3, "does not stop idle machines yet"),
    ("[http_service]\nauto_start_machines = true", 1, "internal_port: is missing"),
    ("[http_service]\ninternal_port = 80\nforce_https = true", 3, "no TLS yet"),
    ("[deploy]\nstrategy = 'canary'", 2, "does not know canary yet"),
    ("[http_service]\ninternal_port = 80\n[[http_service.checks]]\ntimeout = '500ms'", 4, "1 s is used"),
    ("[http_service]\ninternal_port = 80\n[[http_service.checks]]\ninterval = '2m'", 4, "60 s is used"),
    ("[[services]]\ninternal_port = 80", 1, "services[0].ports: the service has no ports"),
    (
        SERVICE + "[[services]]\ninternal_port=1\n[[services.ports]]\nport=80",
        8,
        "is also published by services[0]",
    ),
    (SERVICE.replace("[[services.p", "protocol='udp'\n[[services.p"), 3, "forwards no UDP"),
    (SERVICE + "[services.concurrency]\ntype = 'donuts'", 7, "'donuts' is not connections or requests"),
    (SERVICE + "[services.concurrency]\nsoft_limit = 30\nhard_limit = 25", 7, "is above hard_limit (25)"),
    (SERVICE + "[[services.concurrency]]\nsoft_limit = 30", 6, "Fly refuses an array here"),
    ("[env]\nFLY_REGION = 'x'", 2, "names starting with FLY_ belong to flyd"),
    ("kill_timeout = '10m'", 1, "600 s is too long: 300 s is used"),
    ("[build]\nimage = 'x'\ndockerfile = 'y'", 3, "more than one way to build: image, dockerfile"),
    ("[deploy]\nrelease_command = 'a && b'", 2, "no shell runs this, '&&' is passed as a word"),
    ("[[vm]]\nprocesses = ['web']", 2, "there is no process group 'web'"),
]


@pytest.mark.parametrize(("text", "line", "message"), WARNINGS, ids=[w[2][:40] for w in WARNINGS])
def test_warnings(text: str, line: int, message: str) -> None:
    report = inspect(text, "fly.toml")
    assert report.errors == ()
    shown = [remark_text("fly.toml", warning) for warning in report.warnings]
    assert len(shown) == 1
    assert shown[0].startswith(f"fly.toml:{line}: ")
    assert message in shown[0]


def test_all_mistakes_are_told_at_once_in_the_order_of_lines() -> None:
    text = "app = 1\n[mounts]\nsource = 'd'\ndestination = 'x'\n[deploy]\nstrategy = 'y'\n"
    assert [error.line for error in inspect(text, "f").errors] == [1, 4, 6]


DURATIONS = [
    ("1m30s", 90.0),
    ("500ms", 0.5),
    ("1.5h", 5400.0),
    ("0s", 0.0),
    ("", None),
    ("15", 0.015),
    (15, 0.015),
    (2.5, 0.0025),
]


@pytest.mark.parametrize(("value", "seconds"), DURATIONS)
def test_durations(value: object, seconds: float | None) -> None:
    found = duration_s(value, bare_s=1e-3)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", ["soon", "1 s", "-1s", "1d", "s", True, None, -1, float("nan"), [], "1s2"])
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration_s(value, bare_s=1)


def test_sizes() -> None:
    assert [memory_mb(v) for v in ("512mb", "1gb", "2G", "1.5GiB", 256, "256")] == [
        512,
        1024,
        2048,
        1536,
        256,
        256,
    ]
    assert [disk_gb(v) for v in ("10G", "10gb", "10GB", 10, "1500mb", "1tb")] == [10, 10, 10, 10, 2, 1024]
    for value in ("big", "", -1, True, 1.5, "1xb"):
        with pytest.raises(ValueError, match="expected a size"):
            memory_mb(value)


toml_like = st.text("abc=[]{}\"'#.\n 1,", max_size=40)


@settings(max_examples=200, deadline=None)
@given(toml_like)
def test_any_text_is_parsed_or_refused_with_a_line(text: str) -> None:
    report = inspect(text, "fly.toml")
    assert (report.config is None) == bool(report.errors)
    for remark in (*report.errors, *report.warnings):
        assert 1 <= remark.line <= text.count("\n") + 1


KNOWN = [
    "app",
    "env",
    "processes",
    "mounts",
    "services",
    "http_service",
    "checks",
    "vm",
    "deploy",
    "restart",
    "flyd",
]
INNER = [
    "internal_port",
    "processes",
    "concurrency",
    "checks",
    "ports",
    "tcp_checks",
    "http_checks",
    "headers",
    "source",
    "destination",
    "size",
    "memory",
    "type",
    "policy",
    "strategy",
    "regions",
]
junk = st.sampled_from(
    ["3", "''", "[]", "{}", "true", "[1]", "['x']", "[{}]", "{a=1}", "{a={}}", "[[{}]]", "1.5"]
)
inner = st.dictionaries(st.sampled_from(INNER), junk, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KNOWN), junk, max_size=4))
def test_any_value_of_a_known_key_is_judged_not_crashed_on(document: dict[str, str]) -> None:
    inspect("".join(f"{key} = {value}\n" for key, value in document.items()), "fly.toml")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KNOWN[2:]), inner)
def test_any_value_in_a_section_is_judged_not_crashed_on(section: str, values: dict[str, str]) -> None:
    inspect(f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()), "fly.toml")
