// Counts heartbeats and reports silent nodes.

import { NotFound, UnknownMethod, config, log, members, pubsub, state, timers } from './dim.js';

// Data that must survive a crash belongs in the state: memory is lost with the instance.
const counts = new state.Map('count/');

export function handle(event) {
  if (event.type === 'message') {
    const { node_id } = event.json({ node_id: 'string' });
    const count = (counts.get(node_id) ?? 0) + 1;
    counts.set(node_id, count);
    if (count === 1) log.info('a new node', { node_id });
    timers.setIn('silent/' + node_id, config.silent_after_seconds);
  } else if (event.type === 'timer' && event.key.startsWith('silent/')) {
    const node_id = event.key.slice('silent/'.length);
    pubsub.publish(config.silent_topic, { node_id, count: counts.get(node_id) ?? 0 });
  }
}

export function command(method, body) {
  if (method !== 'forget') throw new UnknownMethod();
  const { node_id } = members(body, { node_id: 'string' });
  const count = counts.get(node_id);
  if (count === undefined) throw new NotFound('node ' + node_id);
  counts.delete(node_id);
  timers.clear('silent/' + node_id);
  return { node_id, count };
}

export function query(method) {
  if (method !== 'counts') throw new UnknownMethod();
  return Object.fromEntries(counts);
}
