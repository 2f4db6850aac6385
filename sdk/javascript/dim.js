/**
 * The SDK for plugins of dim in JavaScript.
 *
 * A plugin is a file `plugin.js` that exports any of these functions, all optional:
 *
 *   start(config, fromStateVersion)   starts an instance, before its first entry
 *   handle(event)                     handles an event; its type is 'message', 'timer', 'name-changed' or 'gap'
 *   command(method, body)             executes a command and returns the reply
 *   query(method, body)               answers a query; it has no effects
 *
 * Values are plain objects. They are stored, sent and published as JSON. A call never waits. Its effects commit
 * together with the cursor past its entry, or not at all. Memory is a cache: data that must survive a crash belongs in
 * `state`. An exception that is not defined here is a trap: the host tries the event once more and then stores it as a
 * dead letter.
 */

import * as hostIpns from 'dim:coordination/ipns@0.2.0';
import * as hostLog from 'dim:coordination/log@0.2.0';
import * as hostPubsub from 'dim:coordination/pubsub@0.2.0';
import * as hostState from 'dim:coordination/state@0.2.0';
import * as hostTimers from 'dim:coordination/timers@0.2.0';

/** The plugin's config. The SDK fills it before it calls `start`. */
export const config = {};

/** Rejects the event: the host stores it as a dead letter with the reason. */
export class Reject extends Error {}

/** Retries the event after `after` seconds. The limit `retries` bounds the number of retries. */
export class Retry extends Error {
  constructor(after = 1) {
    super(`retry after ${after} s`);
    this.after = after;
  }
}

/** Refuses the command or query with a reason. */
export class Refused extends Error {
  tag = 'other';
}

/** Refuses the command or query because the body is invalid. */
export class Invalid extends Refused {
  tag = 'invalid';
}

/** Refuses the command or query because the requested object does not exist. */
export class NotFound extends Refused {
  tag = 'not-found';
}

/** Refuses the command or query because it conflicts with the current state. */
export class Conflict extends Refused {
  tag = 'conflict';
}

/** Refuses the command or query because the plugin has no method of this name. */
export class UnknownMethod extends Refused {
  tag = 'unknown-method';
}

/**
 * The error of a refused call of the host. `kind` is the case of the WIT error (`not-granted`, `quota-exceeded`, …) and
 * `detail` its payload, or undefined.
 */
export class HostError extends Error {
  constructor(kind, detail) {
    super(detail === undefined ? kind : `${kind}: ${detail}`);
    this.kind = kind;
    this.detail = detail;
  }
}

/** Temporary limits: an event that exceeds one is retried. */
const FOR_A_WHILE = ['outbox', 'publishes-per-second', 'publish-bytes-per-second', 'document-bytes-per-second'];

const NANOSECONDS = 1_000_000_000;
const encoder = new TextEncoder();
const decoder = new TextDecoder();
const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Calls a function of the host and converts its error to a HostError. */
function asked(call) {
  try {
    return call();
  } catch (error) {
    const refusal = error?.payload ?? error;
    if (refusal?.tag === undefined) throw error;
    throw new HostError(refusal.tag, refusal.val);
  }
}

/** Returns bytes unchanged, and any other value as JSON. */
function encode(value) {
  if (value instanceof Uint8Array) return value;
  const json = JSON.stringify(value);
  if (json === undefined) throw new TypeError(`${value} cannot be written as JSON`);
  return encoder.encode(json);
}

const decode = (bytes) => JSON.parse(decoder.decode(bytes));

/** Checks that a string is Unicode: half of a surrogate pair has no UTF-8 encoding. */
const whole = (text) => {
  if (!text.isWellFormed()) throw new SyntaxError('a string contains half of a surrogate pair');
};

/** Reads untrusted JSON. A value that is read can be written again. For `dim_component.js`. */
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

/** Returns the time of the entry. It does not advance during a call. */
export const now = () => new Date();

/** Iterates over the keys with a prefix, after the key `after`, sorted, with their bytes. */
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

/** A map in the state, sorted by key. Its keys share a prefix, which must not start another prefix. */
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

/** The durable key-value store of the plugin. */
export const state = {
  /** Returns the JSON value of a key, or undefined if it has none. */
  get(key) {
    const value = state.getBytes(key);
    return value === undefined ? undefined : decode(value);
  },
  /** Returns the stored bytes of a key, or undefined. */
  getBytes: (key) => asked(() => hostState.get(encoder.encode(key))),
  /** Sets a key. Bytes are stored unchanged, any other value as JSON. */
  set: (key, value) => asked(() => hostState.set(encoder.encode(key), encode(value))),
  /** Removes a key. A key without a value is not an error. */
  delete: (key) => asked(() => hostState.delete(encoder.encode(key))),
  scan,
  Map: StateMap,
};

/** Durable timers in log time. */
export const timers = {
  set: (key, at) => asked(() => hostTimers.set(key, timestamp(at))),
  /** Sets a timer to `seconds` from now, rounded to milliseconds like in the other SDKs. */
  setIn: (key, seconds) =>
    asked(() => hostTimers.set(key, timestamp(now()) + BigInt(Math.round(seconds * 1_000)) * 1_000_000n)),
  clear: (key) => asked(() => hostTimers.clear(key)),
  /** Returns the time at which a timer is due, or undefined if it is not set. */
  get(key) {
    const due = asked(() => hostTimers.get(key));
    return due === undefined ? undefined : date(due);
  },
};

/** Pubsub topics. */
export const pubsub = {
  publish: (topic, data) => asked(() => hostPubsub.publish(topic, encode(data))),
  /**
   * Subscribes to a topic. `from` is 'head' (the next event), 'earliest' (the earliest event that its writer keeps) or a
   * Date. On a plain topic nothing is kept: every subscription begins at the head.
   */
  subscribe(topic, from = 'head') {
    if (!(from instanceof Date) && from !== 'head' && from !== 'earliest') {
      throw new TypeError(`${from} is no beginning: use 'head', 'earliest' or a Date`);
    }
    const beginning = from instanceof Date ? { tag: 'time', val: timestamp(from) } : { tag: from };
    return asked(() => hostPubsub.subscribe(topic, beginning));
  },
  unsubscribe: (topic) => asked(() => hostPubsub.unsubscribe(topic)),
  listPeers: (topic) => asked(() => hostPubsub.listPeers(topic)),
  listTopics: () => asked(() => hostPubsub.listTopics()),
  /** Returns the seconds since `since` in which the host could receive messages, and the end of the proven time. */
  heard(topic, since) {
    const { listened, confirmedUntil } = asked(() => hostPubsub.heard(topic, timestamp(since)));
    return { listened: Number(listened) / NANOSECONDS, confirmedUntil: date(confirmedUntil) };
  },
};

/** IPNS names. A lifetime is in seconds. */
export const ipns = {
  updateState: (key, data, lifetime) =>
    asked(() => hostIpns.updateState(key, encode(data), lifetimeOf(lifetime))),
  publish: (key, path, lifetime) => asked(() => hostIpns.publish(key, path, lifetimeOf(lifetime))),
  keyId: (key) => asked(() => hostIpns.keyId(key)),
  follow: (name) => asked(() => hostIpns.follow(name)),
  unfollow: (name) => asked(() => hostIpns.unfollow(name)),
  resolve: (name) => asked(() => hostIpns.resolve(name)),
  /** Returns the JSON document of a followed name or an own key, or undefined if the host does not know it yet. */
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

/** Log lines for the operator: `log.info('recovered', { node_id })`. */
export const log = {
  trace: writes('trace'),
  debug: writes('debug'),
  info: writes('info'),
  warn: writes('warn'),
  error: writes('error'),
};

/** Checks that a value is an object with these members. Returns the reason if it is not, else undefined. */
function lacking(value, kinds) {
  for (const [member, kind] of Object.entries(kinds)) {
    if (value === null || typeof value !== 'object' || !Object.hasOwn(value, member)) return `${member} is missing`;
    if (typeof value[member] !== kind) return `${member} is not of type ${kind}`;
  }
  return undefined;
}

/** Returns the body of a call if it has these members, for example `{ node_id: 'string' }`. Else throws Invalid. */
export function members(body, kinds) {
  const wrong = lacking(body, kinds);
  if (wrong !== undefined) throw new Invalid(wrong);
  return body;
}

/**
 * A message on a topic. `origin` is 'host', 'plugin NAME', 'peer ID' or 'member NAME'. `data` is untrusted input. On a
 * reliable topic `member` is the identity of the event: { writer, peer, incarnation, sequence, time }.
 */
class Message {
  type = 'message';

  constructor({ topic, data, origin }) {
    this.topic = topic;
    this.data = data;
    if (origin.tag === 'member') {
      const { writer, peer, incarnation, sequence, time } = origin.val;
      this.origin = `member ${writer}`;
      this.member = { writer, peer, incarnation, sequence: Number(sequence), time: date(time) };
    } else {
      this.origin = origin.val === undefined ? origin.tag : `${origin.tag} ${origin.val}`;
    }
  }

  /** Reads the data as JSON with these members, for example `{ node_id: 'string' }`. Else throws Reject. */
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

/** The events of a member that a gap names: { missing: { writer, peer, incarnation, first, next } }, or {}. */
const missing = ({ missing: of }) =>
  of === undefined ? {} : { missing: { ...of, first: Number(of.first), next: Number(of.next) } };

/** Converts an event of the WIT interface to a plain object. For `dim_component.js`. */
export function plain({ tag, val }) {
  switch (tag) {
    case 'message':
      return new Message(val);
    case 'timer':
      return { type: 'timer', key: val.key, due: date(val.due) };
    case 'name-changed':
      return { type: 'name-changed', name: val.name, path: val.path, sequence: Number(val.sequence) };
    default:
      return { type: 'gap', topic: val.topic, since: date(val.since), until: date(val.until), ...missing(val) };
  }
}

/** Converts an exception to the failure of an event. Returns undefined if it is a trap. For `dim_component.js`. */
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

/** Converts an exception to the refusal of a call. Returns undefined if it is a trap. For `dim_component.js`. */
export function refusal(error) {
  if (error instanceof UnknownMethod) return { tag: 'unknown-method' };
  if (error instanceof Refused) return { tag: error.tag, val: error.message };
  if (error instanceof HostError) return { tag: 'other', val: error.message };
  return undefined;
}
