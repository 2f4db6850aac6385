"""A plugin in Python that counts messages by topic and answers queries for the counts."""

import json

import wit_world
from componentize_py_types import Err
from wit_world.imports import event, state


# The host calls one export at a time, so a later call sees the value of an earlier one.
greeting = None


class WitWorld(wit_world.WitWorld):
    def start(self, config, from_state_version):
        global greeting
        greeting = json.loads(config)["greeting"]

    def handle(self, event_):
        if isinstance(event_, event.Event_Message):
            key = b"count/" + event_.value.topic.encode()
            state.set(key, str(self.count(event_.value.topic) + 1).encode())

    def command(self, method, body):
        raise Err(event.Refusal_UnknownMethod())

    def query(self, method, body):
        if method != "count":
            raise Err(event.Refusal_UnknownMethod())
        topic = json.loads(body)["topic"]
        return json.dumps({"greeting": greeting, "count": self.count(topic)})

    def count(self, topic):
        return int(state.get(b"count/" + topic.encode()) or b"0")
