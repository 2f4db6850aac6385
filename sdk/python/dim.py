"""The SDK for plugins of dim in Python: what a plugin may do during a call.

Write `plugin.py` with any of these functions; the others need not be there:

    start(config, from_state_version)   before the first entry of every instance
    handle(event)                       a Message, Timer, NameChanged or Gap
    command(method, body)               an order; what it returns is the reply
    query(method, body)                 a question; it has no effects

Values are plain objects: they are kept, sent and published as JSON. A call never waits, and what it asks for becomes
real together with the cursor past its entry, or not at all. Memory is a cache: what must survive a crash lies in
`state`. An exception that is none of those below is a trap: the event is tried once more and then set aside.
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

# The plugin's config, filled in before `start`.
config = {}


class Reject(Exception):
    """The event is wrong and will stay wrong: it is set aside as a dead letter, with the reason."""


class Retry(Exception):
    """The event may go better later: it comes again after so many seconds, a bounded number of times."""

    def __init__(self, after=1.0):
        super().__init__(f"again after {after} s")
        self.after = after


class Refused(Exception):
    """The command or the query cannot be carried out, and why."""


class Invalid(Refused):
    """The body is wrong."""


class NotFound(Refused):
    """What it is about does not exist."""


class Conflict(Refused):
    """It cannot be carried out as things stand."""


class UnknownMethod(Refused):
    """The plugin has no method of this name."""


class HostError(Exception):
    """The host has refused a call: `kind` as in the interface (`not-granted`, `quota-exceeded`, …) and what it says."""

    def __init__(self, kind, detail):
        super().__init__(kind if detail is None else f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


# Met for a while only: an event for which there is no room comes again.
_FOR_A_WHILE = ("outbox", "publishes-per-second", "publish-bytes-per-second", "document-bytes-per-second")


def _asked(function, *arguments):
    try:
        return function(*arguments)
    except Err as error:
        name = type(error.value).__name__.partition("_")[2]
        kind = "".join("-" + c.lower() if c.isupper() else c for c in name).lstrip("-")
        raise HostError(kind, getattr(error.value, "value", None)) from None


def now():
    """The time of the entry, in UTC. It stands still during a call."""
    return _datetime(time.time_ns())


_EPOCH = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)


def _datetime(nanoseconds):
    return _EPOCH + datetime.timedelta(microseconds=nanoseconds // 1_000)


def _timestamp(moment):
    return round(moment.timestamp() * 1_000_000) * 1_000


def _encode(value):
    """Bytes as they are, anything else as JSON."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return _dumps(value).encode()


def _dumps(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _no_number(word):
    raise ValueError(f"{word} is no number in JSON")


# What is nested deeper would overflow the stack of an interpreter in WebAssembly; in Rust this is the limit, too.
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
    """JSON of someone else's. Every failure is a ValueError, and what is read can be written again."""
    if isinstance(text, bytes):
        text = text.decode()
    if _is_too_deep(text):
        raise ValueError("it is nested too deep")
    value = json.loads(text, parse_constant=_no_number)
    if re.search(r"\\u[dD]", text):
        # Half of a surrogate pair has no form in UTF-8.
        _encode(value)
    return value


def _lacking(value, members):
    """What is wrong with an object that should have these members; none if nothing is."""
    for member, kind in members.items():
        if not isinstance(value, dict) or member not in value:
            return f"it has no {member}"
        is_bool = isinstance(value[member], bool)
        # JSON knows no difference between 1 and 1.0.
        kinds = (int, float) if kind is float else kind
        if not isinstance(value[member], kinds) or is_bool and kind in (int, float):
            return f"{member} is no {kind.__name__}"
    return None


def members(body, **kinds):
    """The body of a command or a query, an object with these members, as in `node_id=str`; what is none is invalid."""
    lacking = _lacking(body, kinds)
    if lacking:
        raise Invalid(lacking)
    return body


@dataclass(frozen=True)
class Message:
    """A message on a topic. `origin` is "host", "plugin NAME" or "peer ID". Hostile until checked."""

    topic: str
    data: bytes
    origin: str

    def json(self, **members):
        """What it says, as JSON: an object with these members, as in `node_id=str`; what is none is set aside."""
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
    """A timer that fell due."""

    key: str
    due: datetime.datetime


@dataclass(frozen=True)
class NameChanged:
    """A followed name has a new value."""

    name: str
    path: str
    sequence: int


@dataclass(frozen=True)
class Gap:
    """A time in which messages of a topic may have been missed."""

    topic: str
    since: datetime.datetime
    until: datetime.datetime


def _get(key, default=None):
    """The value of a key."""
    value = _asked(_state.get, key.encode())
    return default if value is None else json.loads(value)


def _set(key, value):
    """Sets a key."""
    _asked(_state.set, key.encode(), _encode(value))


def _delete(key):
    """Removes a key; one that has no value is no error."""
    _asked(_state.delete, key.encode())


def _get_bytes(key):
    """The bytes of a key, as they are."""
    return _asked(_state.get, key.encode())


def _scan(prefix="", after=None):
    """All keys that begin so, in order, with their bytes."""
    after = None if after is None else after.encode()
    while page := _asked(_state.scan, prefix.encode(), after, 256):
        for pair in page:
            yield pair.key.decode(errors="replace"), pair.value
        after = page[-1].key


class _Map(MutableMapping):
    """A dictionary in the state: its keys share a prefix, with which no other's begins, and are in order."""

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


# The plugin's own durable key-value space.
state = SimpleNamespace(get=_get, set=_set, delete=_delete, get_bytes=_get_bytes, scan=_scan, Map=_Map)


def _set_in(key, seconds):
    """Sets a timer to fall due after so many seconds; like the other SDKs, in milliseconds."""
    _asked(_timers.set, key, (time.time_ns() // 1_000_000 + round(seconds * 1_000)) * 1_000_000)


def _due(key):
    """When a timer falls due, if it is set."""
    due = _asked(_timers.get, key)
    return None if due is None else _datetime(due)


# Durable timers, in log time.
timers = SimpleNamespace(
    set=lambda key, at: _asked(_timers.set, key, _timestamp(at)),
    set_in=_set_in,
    clear=lambda key: _asked(_timers.clear, key),
    get=_due,
)


def _heard(topic, since):
    """For how many seconds a topic was listened to since then, and until when that is proven."""
    heard = _asked(_pubsub.heard, topic, _timestamp(since))
    return heard.listened / 1e9, _datetime(heard.confirmed_until)


# Topics.
pubsub = SimpleNamespace(
    publish=lambda topic, data: _asked(_pubsub.publish, topic, _encode(data)),
    subscribe=lambda topic: _asked(_pubsub.subscribe, topic),
    unsubscribe=lambda topic: _asked(_pubsub.unsubscribe, topic),
    list_peers=lambda topic: _asked(_pubsub.list_peers, topic),
    list_topics=lambda: _asked(_pubsub.list_topics),
    heard=_heard,
)


def _lifetime(seconds):
    return None if seconds is None else round(seconds * 1_000_000_000)


def _document(name):
    """The JSON document behind a followed name or an own key; none if it is not known yet."""
    try:
        return json.loads(_asked(_ipns.get_state, name).data)
    except HostError as error:
        if error.kind == "not-yet-known":
            return None
        raise


# Mutable names. A lifetime is in seconds.
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


# Lines for the operator: `log.info("recovered", node_id=id)`.
log = SimpleNamespace(**{level.name.lower(): _writes(level) for level in _log.Level})


def _plain(event):
    """An event of the interface as a plain object."""
    value = event.value
    match event:
        case _event.Event_Message():
            origin = type(value.origin).__name__.partition("_")[2].lower()
            of = getattr(value.origin, "value", None)
            return Message(value.topic, value.data, origin if of is None else f"{origin} {of}")
        case _event.Event_Timer():
            return Timer(value.key, _datetime(value.due))
        case _event.Event_NameChanged():
            return NameChanged(value.name, value.path, value.sequence)
        case _event.Event_Gap():
            return Gap(value.topic, _datetime(value.since), _datetime(value.until))


def _done(called, result):
    """What a function of the plugin has returned: it has run to its end."""
    if hasattr(result, "__await__"):
        result.close()
        raise TypeError(f"a call never waits: `{called}` must not be async")
    return result


def _failure(error):
    """What becomes of an event that failed so; none if that is a trap."""
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
    """How a command or a query is refused that failed so; none if that is a trap."""
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
