"""History files in Elle's format, so that the real Elle can judge the same file.

One operation a line, as in `histories/*.edn` of https://github.com/jepsen-io/elle and as elle-cli takes it
(`java -jar elle-cli.jar --model list-append FILE`, https://github.com/ligurio/elle-cli):

    {:type :ok, :f :txn, :value [[:append 3 1] [:r 4 [1 2]]], :process 0, :time 17, :index 1}

`:time` is in nanoseconds; `:index` is the line's number. Ours may have `:error "why"`. The reader takes
what the writer writes in any order of keys and with any space or commas between: it is no EDN library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from integration.histories.model import Append, Event, Read, Step, Type

TOKEN = re.compile(r'[\s,]*([\[\]{}]|"(?:[^"\\]|\\.)*"|[^\s,\[\]{}"]+)')
TYPES: dict[str, Type] = {":invoke": "invoke", ":ok": "ok", ":fail": "fail", ":info": "info"}

Value = str | int | list["Value"] | dict["Value", "Value"] | None  # strings keep their quotes, keywords :


def line(event: Event, index: int) -> str:
    """An event as a line without its end."""
    value = " ".join(_step(step) for step in event.steps)
    error = f", :error {json.dumps(event.error)}" if event.error else ""
    return (
        f"{{:type :{event.type}, :f :txn, :value [{value}], :process {event.process}, "
        f":time {event.time_ns}, :index {index}{error}}}"
    )


def _step(step: Step) -> str:
    if isinstance(step, Append):
        return f"[:append {step.key} {step.value}]"
    if step.values is None:
        return f"[:r {step.key} nil]"
    return f"[:r {step.key} [{' '.join(map(str, step.values))}]]"


def write(path: Path, history: Iterable[Event]) -> None:
    """A whole history, by time."""
    with path.open("w") as file:
        for index, event in enumerate(sorted(history, key=lambda e: e.time_ns)):
            file.write(line(event, index) + "\n")


def read(path: Path) -> list[Event]:
    """The events of a file; a last line that was cut off (its writer was killed) is left out.

    Raises ValueError, with the line's number, for what is no operation of a list-append history.
    """
    known: dict[str, int] = {}  # a value is in many reads: one int for all
    *lines, rest = path.read_text().split("\n")
    del rest  # "" behind the last line's end
    return [parse(text, f"{path}:{n}", known) for n, text in enumerate(lines, 1) if text.strip()]


def parse(text: str, where: str, known: dict[str, int]) -> Event:
    """The event of one line. `known` is filled with its numbers: share it between lines."""
    tokens = iter(TOKEN.findall(text))
    try:
        value = _value(next(tokens), tokens, known)
        if not isinstance(value, dict) or next(tokens, None) is not None or TOKEN.sub("", text).strip():
            raise ValueError("not one map")
        return _operation(value)
    except (KeyError, ValueError, TypeError, StopIteration) as error:
        raise ValueError(f"{where}: not an operation ({error!r}): {text[:200]}") from error


def _operation(told: dict[Value, Value]) -> Event:
    kind, process, time_ns = told[":type"], told[":process"], told[":time"]
    steps, error = told[":value"], told.get(":error", '""')
    if not (isinstance(kind, str) and isinstance(process, int) and isinstance(time_ns, int)):
        raise ValueError("a :type, a :process or a :time of the wrong kind")
    if not isinstance(steps, list) or not isinstance(error, str):
        raise ValueError("a :value or an :error of the wrong kind")
    return Event(TYPES[kind], process, time_ns, tuple(map(_read_step, steps)), json.loads(error))


def _read_step(told: Value) -> Step:
    match told:
        case [":append", int(key), int(value)]:
            return Append(key, value)
        case [":r", int(key), None]:
            return Read(key)
        case [":r", int(key), list(values)]:
            return Read(key, tuple(v for v in values if isinstance(v, int)))
        case _:
            raise ValueError(f"no step: {told}")


def _value(token: str, tokens: Iterator[str], known: dict[str, int]) -> Value:
    if token == "[":
        return _until("]", tokens, known)
    if token == "{":
        pairs = _until("}", tokens, known)
        return dict(zip(pairs[::2], pairs[1::2], strict=True))
    if token == "nil":
        return None
    if token[0] in ':"':
        return token
    found = known.get(token)
    return found if found is not None else known.setdefault(token, int(token))


def _until(end: str, tokens: Iterator[str], known: dict[str, int]) -> list[Value]:
    values: list[Value] = []
    for token in tokens:
        if token == end:
            return values
        values.append(_value(token, tokens, known))
    raise ValueError(f"no {end}")
