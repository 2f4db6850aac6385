"""The SDK for plugins of dim in Python.

A plugin is a file `plugin.py` with any of these functions, all optional:

    start(config, from_state_version)   starts an instance, before its first entry
    handle(event)                       handles a Message, Timer, NameChanged or Gap
    command(method, body)               executes a command and returns the reply
    query(method, body)                 answers a query; it has no effects

Values are plain objects. They are stored, sent and published as JSON. A call never waits. Its effects commit together
with the cursor past its entry, or not at all. Memory is a cache: data that must survive a crash belongs in `state`. An
exception that is not defined here is a trap: the host tries the event once more and then stores it as a dead letter.
"""

import datetime
import json
import re
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace

from componentize_py_types import Err
from wit_world.imports import event as _event
from wit_world.imports import ipns as _ipns
from wit_world.imports import log as _log
from wit_world.imports import pubsub as _pubsub
from wit_world.imports import state as _state
from wit_world.imports import timers as _timers

# The plugin's config. The SDK fills it before it calls `start`.
config = {}


class Reject(Exception):
    """Rejects the event: the host stores it as a dead letter with the reason."""


class Retry(Exception):
    """Retries the event after `after` seconds. The limit `retries` bounds the number of retries."""

    def __init__(self, after=1.0):
        super().__init__(f"retry after {after} s")
        self.after = after


class Refused(Exception):
    """Refuses the command or query with a reason."""


class Invalid(Refused):
    """Refuses the command or query because the body is invalid."""


class NotFound(Refused):
    """Refuses the command or query because the requested object does not exist."""


class Conflict(Refused):
    """Refuses the command or query because it conflicts with the current state."""


class UnknownMethod(Refused):
    """Refuses the command or query because the plugin has no method of this name."""


class HostError(Exception):
    """The error of a refused call of the host.

    `kind` is the case of the WIT error (`not-granted`, `quota-exceeded`, …) and `detail` its payload, or None.
    """

    def __init__(self, kind, detail):
        super().__init__(kind if detail is None else f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


# Temporary limits: an event that exceeds one is retried.
_FOR_A_WHILE = ("outbox", "publishes-per-second", "publish-bytes-per-second", "document-bytes-per-second")


def _asked(function, *arguments):
    """Calls a function of the host and converts its error to a HostError."""
    try:
        return function(*arguments)
    except Err as error:
        name = type(error.value).__name__.partition("_")[2]
        kind = "".join("-" + c.lower() if c.isupper() else c for c in name).lstrip("-")
        raise HostError(kind, getattr(error.value, "value", None)) from None


def now():
    """Returns the time of the entry, in UTC. It does not advance during a call."""
    return _datetime(time.time_ns())


_EPOCH = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)


def _datetime(nanoseconds):
    return _EPOCH + datetime.timedelta(microseconds=nanoseconds // 1_000)


def _timestamp(moment):
    return round(moment.timestamp() * 1_000_000) * 1_000


def _encode(value):
    """Returns bytes unchanged, and any other value as JSON."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return _dumps(value).encode()


def _dumps(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _no_number(word):
    raise ValueError(f"{word} is not a number in JSON")


# Maximum nesting of JSON. Deeper values would overflow the stack of the interpreter in WebAssembly. serde_json has the
# same limit.
_DEEPEST = 128


def _is_too_deep(text):
    if text.count("[") + text.count("{") <= _DEEPEST:
        return False
    depth = 0
    outside_strings = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    for bracket in re.findall(r"[][{}]", outside_strings):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEEPEST:
            return True
    return False


def _loads(text):
    """Reads untrusted JSON. Every error is a ValueError, and a value that is read can be written again."""
    if isinstance(text, bytes):
        text = text.decode()
    if _is_too_deep(text):
        raise ValueError(f"it has more than {_DEEPEST} levels")
    value = json.loads(text, parse_constant=_no_number)
    if re.search(r"\\u[dD]", text):
        # Half of a surrogate pair has no UTF-8 encoding: this raises a UnicodeEncodeError, which is a ValueError.
        _encode(value)
    return value


def _lacking(value, members):
    """Checks that a value is an object with these members. Returns the reason if it is not, else None."""
    for member, kind in members.items():
        if not isinstance(value, dict) or member not in value:
            return f"{member} is missing"
        is_bool = isinstance(value[member], bool)
        # JSON does not distinguish 1 and 1.0.
        kinds = (int, float) if kind is float else kind
        if not isinstance(value[member], kinds) or is_bool and kind in (int, float):
            return f"{member} is not of type {kind.__name__}"
    return None


def members(body, **kinds):
    """Returns the body of a command or query if it has these members, for example `node_id=str`. Else raises Invalid."""
    lacking = _lacking(body, kinds)
    if lacking:
        raise Invalid(lacking)
    return body


@dataclass(frozen=True)
class MemberEvent:
    """The identity of an event on a reliable topic.

    `writer` is the IPNS name of the writer's key and `peer` the peer id of the same key. `incarnation` is its process
    start, as 32 hex digits, and `sequence` the number of the event in it, from 0. `time` is the hybrid logical time.
    """

    writer: str
    peer: str
    incarnation: str
    sequence: int
    time: datetime.datetime


@dataclass(frozen=True)
class Message:
    """A message on a topic. `origin` is "host", "plugin NAME", "peer ID" or "member NAME". `data` is untrusted input.

    On a reliable topic `member` is the identity of the event.
    """

    topic: str
    data: bytes
    origin: str
    member: MemberEvent | None = None

    def json(self, **members):
        """Reads the data as JSON with these members, for example `node_id=str`. Else raises Reject."""
        try:
            value = _loads(self.data)
        except ValueError as error:
            raise Reject(f"the message cannot be read: {error}") from None
        lacking = _lacking(value, members)
        if lacking:
            raise Reject(f"the message cannot be read: {lacking}")
        return value


@dataclass(frozen=True)
class Timer:
    """A timer that is due. `due` is the time that it was set to."""

    key: str
    due: datetime.datetime


@dataclass(frozen=True)
class NameChanged:
    """A new value of a followed name."""

    name: str
    path: str
    sequence: int


@dataclass(frozen=True)
class MissingEvents:
    """The events of a member from `first` to the one before `next`, which cannot be had."""

    writer: str
    peer: str
    incarnation: str
    first: int
    next: int


@dataclass(frozen=True)
class Gap:
    """A span of time in which the host or the plugin may have missed messages of a topic.

    On a reliable topic `missing` names the events.
    """

    topic: str
    since: datetime.datetime
    until: datetime.datetime
    missing: MissingEvents | None = None


def _get(key, default=None):
    """Returns the JSON value of a key, or `default` if it has none."""
    value = _asked(_state.get, key.encode())
    return default if value is None else json.loads(value)


def _set(key, value):
    """Sets a key. Bytes are stored unchanged, any other value as JSON."""
    _asked(_state.set, key.encode(), _encode(value))


def _delete(key):
    """Removes a key. A key without a value is not an error."""
    _asked(_state.delete, key.encode())


def _get_bytes(key):
    """Returns the stored bytes of a key, or None."""
    return _asked(_state.get, key.encode())


def _scan(prefix="", after=None):
    """Iterates over the keys with a prefix, after the key `after`, sorted, with their bytes."""
    after = None if after is None else after.encode()
    while page := _asked(_state.scan, prefix.encode(), after, 256):
        for pair in page:
            yield pair.key.decode(errors="replace"), pair.value
        after = page[-1].key


class _Map(MutableMapping):
    """A dictionary in the state, sorted by key. Its keys share a prefix, which must not start another prefix."""

    def __init__(self, prefix):
        self.prefix = prefix

    def __getitem__(self, key):
        value = _get_bytes(self.prefix + key)
        if value is None:
            raise KeyError(key)
        return json.loads(value)

    def __setitem__(self, key, value):
        _set(self.prefix + key, value)

    def __delitem__(self, key):
        if _get_bytes(self.prefix + key) is None:
            raise KeyError(key)
        _delete(self.prefix + key)

    def __contains__(self, key):
        return _get_bytes(self.prefix + key) is not None

    def __iter__(self):
        return (key.removeprefix(self.prefix) for key, _ in _scan(self.prefix))

    def __len__(self):
        return sum(1 for _ in _scan(self.prefix))

    def items(self):
        return ((key.removeprefix(self.prefix), json.loads(value)) for key, value in _scan(self.prefix))


# The durable key-value store of the plugin.
state = SimpleNamespace(get=_get, set=_set, delete=_delete, get_bytes=_get_bytes, scan=_scan, Map=_Map)


def _set_in(key, seconds):
    """Sets a timer to `seconds` from now, rounded to milliseconds like in the other SDKs."""
    _asked(_timers.set, key, (time.time_ns() // 1_000_000 + round(seconds * 1_000)) * 1_000_000)


def _due(key):
    """Returns the time at which a timer is due, or None if it is not set."""
    due = _asked(_timers.get, key)
    return None if due is None else _datetime(due)


# Durable timers in log time.
timers = SimpleNamespace(
    set=lambda key, at: _asked(_timers.set, key, _timestamp(at)),
    set_in=_set_in,
    clear=lambda key: _asked(_timers.clear, key),
    get=_due,
)


def _heard(topic, since):
    """Returns for how many seconds since `since` the host could receive messages of a topic.

    The second value is the end of the proven time.
    """
    heard = _asked(_pubsub.heard, topic, _timestamp(since))
    return heard.listened / 1e9, _datetime(heard.confirmed_until)


def _subscribe(topic, beginning="head"):
    """Subscribes to a topic.

    `beginning` is "head" (the next event), "earliest" (the earliest event that its writer keeps) or a datetime. On a
    plain topic nothing is kept: every subscription begins at the head.
    """
    match beginning:
        case "head":
            beginning = _pubsub.Beginning_Head()
        case "earliest":
            beginning = _pubsub.Beginning_Earliest()
        case datetime.datetime():
            beginning = _pubsub.Beginning_Time(_timestamp(beginning))
        case _:
            raise ValueError(f'{beginning!r} is no beginning: use "head", "earliest" or a datetime')
    _asked(_pubsub.subscribe, topic, beginning)


# Pubsub topics.
pubsub = SimpleNamespace(
    publish=lambda topic, data: _asked(_pubsub.publish, topic, _encode(data)),
    subscribe=_subscribe,
    unsubscribe=lambda topic: _asked(_pubsub.unsubscribe, topic),
    list_peers=lambda topic: _asked(_pubsub.list_peers, topic),
    list_topics=lambda: _asked(_pubsub.list_topics),
    heard=_heard,
)


def _lifetime(seconds):
    return None if seconds is None else round(seconds * 1_000_000_000)


def _document(name):
    """Returns the JSON document of a followed name or an own key, or None if the host does not know it yet."""
    try:
        return json.loads(_asked(_ipns.get_state, name).data)
    except HostError as error:
        if error.kind == "not-yet-known":
            return None
        raise


# IPNS names. A lifetime is in seconds.
ipns = SimpleNamespace(
    update_state=lambda key, data, lifetime=None: _asked(
        _ipns.update_state, key, _encode(data), _lifetime(lifetime)
    ),
    publish=lambda key, path, lifetime=None: _asked(_ipns.publish, key, path, _lifetime(lifetime)),
    key_id=lambda key: _asked(_ipns.key_id, key),
    follow=lambda name: _asked(_ipns.follow, name),
    unfollow=lambda name: _asked(_ipns.unfollow, name),
    resolve=lambda name: _asked(_ipns.resolve, name),
    get_state=_document,
)


def _writes(level):
    def write(message, **fields):
        _log.write(level, message, [_log.Field(name, str(value)) for name, value in fields.items()])

    return write


# Log lines for the operator: `log.info("recovered", node_id=id)`.
log = SimpleNamespace(**{level.name.lower(): _writes(level) for level in _log.Level})


def _plain(event):
    """Converts an event of the WIT interface to a plain object."""
    value = event.value
    match event:
        case _event.Event_Message():
            of = getattr(value.origin, "value", None)
            if isinstance(value.origin, _event.Origin_Member):
                member = MemberEvent(of.writer, of.peer, of.incarnation, of.sequence, _datetime(of.time))
                return Message(value.topic, value.data, f"member {of.writer}", member)
            origin = type(value.origin).__name__.partition("_")[2].lower()
            return Message(value.topic, value.data, origin if of is None else f"{origin} {of}")
        case _event.Event_Timer():
            return Timer(value.key, _datetime(value.due))
        case _event.Event_NameChanged():
            return NameChanged(value.name, value.path, value.sequence)
        case _event.Event_Gap():
            of = value.missing
            missing = of and MissingEvents(of.writer, of.peer, of.incarnation, of.first, of.next)
            return Gap(value.topic, _datetime(value.since), _datetime(value.until), missing)


def _done(called, result):
    """Returns the result of a function of the plugin. Raises TypeError if the function is async."""
    if hasattr(result, "__await__"):
        result.close()
        raise TypeError(f"a call never waits: `{called}` must not be async")
    return result


def _failure(error):
    """Converts an exception to the failure of an event. Returns None if the exception is a trap."""
    match error:
        case Reject():
            return _event.Failure_Reject(str(error))
        case Retry():
            return _event.Failure_Retry(round(error.after * 1_000_000_000))
        case HostError() if error.detail in _FOR_A_WHILE:
            return _event.Failure_Retry(1_000_000_000)
        case HostError():
            return _event.Failure_Reject(str(error))


def _refusal(error):
    """Converts an exception to the refusal of a command or query. Returns None if the exception is a trap."""
    match error:
        case UnknownMethod():
            return _event.Refusal_UnknownMethod()
        case Invalid():
            return _event.Refusal_Invalid(str(error))
        case NotFound():
            return _event.Refusal_NotFound(str(error))
        case Conflict():
            return _event.Refusal_Conflict(str(error))
        case Refused() | HostError():
            return _event.Refusal_Other(str(error))
