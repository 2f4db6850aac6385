// Publishes the running jobs as a document under an IPNS name.

import { UnknownMethod, config, ipns, now, state } from './dim.js';

// The running jobs, each with its start time.
const running = new state.Map('running/');

export function handle(event) {
  if (event.type !== 'message') return;
  const { job_id, event_type } = event.json({ job_id: 'string', event_type: 'string' });
  const isRunning = event_type === 'running';
  if (running.has(job_id) === isRunning) return;
  if (isRunning) running.set(job_id, now().toISOString());
  else running.delete(job_id);
  ipns.updateState(config.key, { jobs: [...running.keys()] });
}

export function query(method) {
  if (method !== 'running') throw new UnknownMethod();
  return [...running.keys()];
}
