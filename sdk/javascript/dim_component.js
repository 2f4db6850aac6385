// Exports the component and calls `plugin.js`. Used by `dim plugin build`; not for authors of plugins.

import * as dim from './dim.js';
import * as plugin from './plugin.js';

/** Traps with an exception that is not of the SDK. Writes its stack to standard error, for the operator. */
function trap(error) {
  console.error(error?.stack ? `${error}\n${error.stack}` : String(error));
  throw error;
}

/** Returns the result of a function of the plugin. Throws a TypeError if the function is async. */
function done(called, result) {
  if (typeof result?.then === 'function') throw new TypeError(`a call never waits: \`${called}\` must not be async`);
  return result;
}

/** Returns the reason of an exception. If it is not of the SDK, adds its type and its line in the plugin. */
function why(error) {
  const onPurpose = error instanceof dim.Reject || error instanceof dim.Refused;
  if (onPurpose || !error?.stack) return String(error?.message ?? error);
  const frames = error.stack.split('\n').map((frame) => /@([^@]+):(\d+):\d+$/.exec(frame));
  const own = frames.find((frame) => frame && !/^(dim|dim_component)\.js$|initializer\.js$/.test(frame[1]));
  return `${error.name}: ${error.message}${own ? ` (${own[1]}:${own[2]})` : ''}`;
}

export function start(config, fromStateVersion) {
  for (const member of Object.keys(dim.config)) delete dim.config[member];
  Object.assign(dim.config, JSON.parse(config));
  try {
    done('start', plugin.start?.(dim.config, fromStateVersion));
  } catch (error) {
    throw why(error);
  }
}

export function handle(event) {
  try {
    done('handle', plugin.handle?.(dim.plain(event)));
  } catch (error) {
    throw dim.failure(error) ?? trap(error);
  }
}

/** Calls `command` or `query` of the plugin with the parsed body and returns the reply as JSON. */
function answer(called, method, body) {
  const call = plugin[called];
  let parsed;
  try {
    parsed = dim.parse(body);
  } catch (error) {
    throw dim.refusal(new dim.Invalid(error.message));
  }
  try {
    if (call === undefined) throw new dim.UnknownMethod();
    return JSON.stringify(done(called, call(method, parsed))) ?? 'null';
  } catch (error) {
    throw dim.refusal(error) ?? trap(error);
  }
}

export const command = (method, body) => answer('command', method, body);
export const query = (method, body) => answer('query', method, body);
