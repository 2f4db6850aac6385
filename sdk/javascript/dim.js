/**
 * The SDK for plugins of dim in JavaScript: what a plugin may do during a call.
 *
 * Write `plugin.js` that exports any of these functions; the others need not be there:
 *
 *   start(config, fromStateVersion)   before the first entry of every instance
 *   handle(event)                     event.type is 'message', 'timer', 'name-changed' or 'gap'
 *   command(method, body)             an order; what it returns is the reply
 *   query(method, body)               a question; it has no effects
 *
 * Values are plain objects: they are kept, sent and published as JSON. A call never waits, and what it asks for becomes
 * real together with the cursor past its entry, or not at all. Memory is a cache: what must survive a crash lies in
 * `state`. An exception that is none of those below is a trap: the event is tried once more and then set aside.
 */

import * as hostIpns from 'dim:coordination/ipns@0.1.0';
import * as hostLog from 'dim:coordination/log@0.1.0';
import * as hostPubsub from 'dim:coordination/pubsub@0.1.0';
import * as hostState from 'dim:coordination/state@0.1.0';
import * as hostTimers from 'dim:coordination/timers@0.1.0';

/** The plugin's config, filled in before `start`. */
export const config = {};

/** The event is wrong and will stay wrong: it is set aside as a dead letter, with the reason. */
export class Reject extends Error {}

/** The event may go better later: it comes again after so many seconds, a bounded number of times. */
export class Retry extends Error {
  constructor(after = 1) {
    super(`again after ${after} s`);
    this.after = after;
  }
}

/** The command or the query cannot be carried out, and why. */
export class Refused extends Error {
  tag = 'other';
}

/** The body is wrong. */
export class Invalid extends Refused {
  tag = 'invalid';
}

/** What it is about does not exist. */
export class NotFound extends Refused {
  tag = 'not-found';
}

/** It cannot be carried out as things stand. */
export class Conflict extends Refused {
  tag = 'conflict';
}

/** The plugin has no method of this name. */
export class UnknownMethod extends Refused {
  tag = 'unknown-method';
}

/** The host has refused a call: `kind` as in the interface (`not-granted`, `quota-exceeded`, …) and what it says. */
export class HostError extends Error {
  constructor(kind, detail) {
    super(detail === undefined ? kind : `${kind}: ${detail}`);
    this.kind = kind;
    this.detail = detail;
  }
}

/** Met for a while only: an event for which there is no room comes again. */
const FOR_A_WHILE = ['outbox', 'publishes-per-second', 'publish-bytes-per-second', 'document-bytes-per-second'];

const NANOSECONDS = 1_000_000_000;
const encoder = new TextEncoder();
const decoder = new TextDecoder();
const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function asked(call) {
  try {
    return call();
  } catch (error) {
    const refusal = error?.payload ?? error;
    if (refusal?.tag === undefined) throw error;
    throw new HostError(refusal.tag, refusal.val);
  }
}

/** Bytes as they are, anything else as JSON. */
function encode(value) {
  if (value instanceof Uint8Array) return value;
  const json = JSON.stringify(value);
  if (json === undefined) throw new TypeError(`${value} has no form in JSON`);
  return encoder.encode(json);
}

const decode = (bytes) => JSON.parse(decoder.decode(bytes));

/** Half of a surrogate pair has no form in UTF-8. */
const whole = (text) => {
  if (!text.isWellFormed()) throw new SyntaxError('half of a surrogate pair');
};

/** JSON of someone else's: what is read can be written again. Of use to `dim_component.js`. */
export function parse(text) {
  if (!/\\u[dD]/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (name, value) => {
    whole(name);
    if (typeof value === 'string') whole(value);
    return value;
  });
}

const nanoseconds = (seconds) => BigInt(Math.round(seconds * NANOSECONDS));
const timestamp = (date) => BigInt(date.getTime()) * 1_000_000n;
const date = (at) => new Date(Number(at / 1_000_000n));
const lifetimeOf = (seconds) => (seconds === undefined ? undefined : nanoseconds(seconds));

/** The time of the entry. It stands still during a call. */
export const now = () => new Date();

/** All keys that begin so, in order, with their bytes. */
function* scan(prefix = '', after = undefined) {
  let last = after === undefined ? undefined : encoder.encode(after);
  for (;;) {
    const page = asked(() => hostState.scan(encoder.encode(prefix), last, 256));
    if (page.length === 0) return;
    for (const { key, value } of page) {
      yield [decoder.decode(key), value];
      last = key;
    }
  }
}

/** A map in the state: its keys share a prefix, with which no other's begins, and are in order. */
class StateMap {
  constructor(prefix) {
    this.prefix = prefix;
  }

  get(key) {
    return state.get(this.prefix + key);
  }

  has(key) {
    return state.getBytes(this.prefix + key) !== undefined;
  }

  set(key, value) {
    state.set(this.prefix + key, value);
    return this;
  }

  delete(key) {
    state.delete(this.prefix + key);
  }

  *entries() {
    for (const [key, value] of scan(this.prefix)) yield [key.slice(this.prefix.length), decode(value)];
  }

  *keys() {
    for (const [key] of scan(this.prefix)) yield key.slice(this.prefix.length);
  }

  [Symbol.iterator]() {
    return this.entries();
  }
}

/** The plugin's own durable key-value space. */
export const state = {
  /** The value of a key; undefined if it has none. */
  get(key) {
    const value = state.getBytes(key);
    return value === undefined ? undefined : decode(value);
  },
  /** The bytes of a key, as they are. */
  getBytes: (key) => asked(() => hostState.get(encoder.encode(key))),
  /** Sets a key. */
  set: (key, value) => asked(() => hostState.set(encoder.encode(key), encode(value))),
  /** Removes a key; one that has no value is no error. */
  delete: (key) => asked(() => hostState.delete(encoder.encode(key))),
  scan,
  Map: StateMap,
};

/** Durable timers, in log time. */
export const timers = {
  set: (key, at) => asked(() => hostTimers.set(key, timestamp(at))),
  /** Sets a timer to fall due after so many seconds; like the other SDKs, in milliseconds. */
  setIn: (key, seconds) =>
    asked(() => hostTimers.set(key, timestamp(now()) + BigInt(Math.round(seconds * 1_000)) * 1_000_000n)),
  clear: (key) => asked(() => hostTimers.clear(key)),
  /** When a timer falls due; undefined if it is not set. */
  get(key) {
    const due = asked(() => hostTimers.get(key));
    return due === undefined ? undefined : date(due);
  },
};

/** Topics. */
export const pubsub = {
  publish: (topic, data) => asked(() => hostPubsub.publish(topic, encode(data))),
  subscribe: (topic) => asked(() => hostPubsub.subscribe(topic)),
  unsubscribe: (topic) => asked(() => hostPubsub.unsubscribe(topic)),
  listPeers: (topic) => asked(() => hostPubsub.listPeers(topic)),
  listTopics: () => asked(() => hostPubsub.listTopics()),
  /** For how many seconds a topic was listened to since then, and until when that is proven. */
  heard(topic, since) {
    const { listened, confirmedUntil } = asked(() => hostPubsub.heard(topic, timestamp(since)));
    return { listened: Number(listened) / NANOSECONDS, confirmedUntil: date(confirmedUntil) };
  },
};

/** Mutable names. A lifetime is in seconds. */
export const ipns = {
  updateState: (key, data, lifetime) =>
    asked(() => hostIpns.updateState(key, encode(data), lifetimeOf(lifetime))),
  publish: (key, path, lifetime) => asked(() => hostIpns.publish(key, path, lifetimeOf(lifetime))),
  keyId: (key) => asked(() => hostIpns.keyId(key)),
  follow: (name) => asked(() => hostIpns.follow(name)),
  unfollow: (name) => asked(() => hostIpns.unfollow(name)),
  resolve: (name) => asked(() => hostIpns.resolve(name)),
  /** The JSON document behind a followed name or an own key; undefined if it is not known yet. */
  getState(name) {
    try {
      return decode(asked(() => hostIpns.getState(name)).data);
    } catch (error) {
      if (error instanceof HostError && error.kind === 'not-yet-known') return undefined;
      throw error;
    }
  },
};

const writes =
  (level) =>
  (message, fields = {}) =>
    hostLog.write(
      level,
      message,
      Object.entries(fields).map(([name, value]) => ({ name, value: String(value) })),
    );

/** Lines for the operator: `log.info('recovered', { node_id })`. */
export const log = {
  trace: writes('trace'),
  debug: writes('debug'),
  info: writes('info'),
  warn: writes('warn'),
  error: writes('error'),
};

/** What is wrong with an object that should have these members; undefined if nothing is. */
function lacking(value, kinds) {
  for (const [member, kind] of Object.entries(kinds)) {
    if (value === null || typeof value !== 'object' || !Object.hasOwn(value, member)) return `it has no ${member}`;
    if (typeof value[member] !== kind) return `${member} is no ${kind}`;
  }
  return undefined;
}

/** The body of a command or a query, an object with these members, as in `{ node_id: 'string' }`; what is none is invalid. */
export function members(body, kinds) {
  const wrong = lacking(body, kinds);
  if (wrong !== undefined) throw new Invalid(wrong);
  return body;
}

/** A message. `origin` is 'host', 'plugin NAME' or 'peer ID'. Hostile until checked. */
class Message {
  type = 'message';

  constructor({ topic, data, origin }) {
    this.topic = topic;
    this.data = data;
    this.origin = origin.val === undefined ? origin.tag : `${origin.tag} ${origin.val}`;
  }

  /** What it says, as JSON: an object with these members, as in `{ node_id: 'string' }`; what is none is set aside. */
  json(kinds = {}) {
    let value;
    try {
      value = parse(strict.decode(this.data));
    } catch (error) {
      throw new Reject(`the message cannot be read: ${error.message}`);
    }
    const wrong = lacking(value, kinds);
    if (wrong !== undefined) throw new Reject(`the message cannot be read: ${wrong}`);
    return value;
  }
}

/** An event of the interface as a plain object. Of use to `dim_component.js`. */
export function plain({ tag, val }) {
  switch (tag) {
    case 'message':
      return new Message(val);
    case 'timer':
      return { type: 'timer', key: val.key, due: date(val.due) };
    case 'name-changed':
      return { type: 'name-changed', name: val.name, path: val.path, sequence: Number(val.sequence) };
    default:
      return { type: 'gap', topic: val.topic, since: date(val.since), until: date(val.until) };
  }
}

/** What becomes of an event that failed so; undefined if that is a trap. Of use to `dim_component.js`. */
export function failure(error) {
  if (error instanceof Reject) return { tag: 'reject', val: error.message };
  if (error instanceof Retry) return { tag: 'retry', val: nanoseconds(error.after) };
  if (error instanceof HostError) {
    return FOR_A_WHILE.includes(error.detail)
      ? { tag: 'retry', val: nanoseconds(1) }
      : { tag: 'reject', val: error.message };
  }
  return undefined;
}

/** How a command or a query is refused that failed so; undefined if that is a trap. Of use to `dim_component.js`. */
export function refusal(error) {
  if (error instanceof UnknownMethod) return { tag: 'unknown-method' };
  if (error instanceof Refused) return { tag: error.tag, val: error.message };
  if (error instanceof HostError) return { tag: 'other', val: error.message };
  return undefined;
}
