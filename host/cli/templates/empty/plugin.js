// Logs the messages of a topic.

import { log } from './dim.js';

export function handle(event) {
  if (event.type === 'message') {
    log.info('a message came', { topic: event.topic, bytes: event.data.length });
  }
}
