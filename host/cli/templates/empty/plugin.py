"""Logs the messages of a topic."""

from dim import Message, log


def handle(event):
    if isinstance(event, Message):
        log.info("a message came", topic=event.topic, bytes=len(event.data))
