"""Counts heartbeats and reports silent nodes."""

from dim import Message, NotFound, Timer, UnknownMethod, config, log, members, pubsub, state, timers

# Data that must survive a crash belongs in the state: memory is lost with the instance.
counts = state.Map("count/")


def handle(event):
    match event:
        case Message():
            node_id = event.json(node_id=str)["node_id"]
            count = counts.get(node_id, 0) + 1
            counts[node_id] = count
            if count == 1:
                log.info("a new node", node_id=node_id)
            timers.set_in("silent/" + node_id, config["silent_after_seconds"])
        case Timer(key=key) if key.startswith("silent/"):
            node_id = key.removeprefix("silent/")
            pubsub.publish(config["silent_topic"], {"node_id": node_id, "count": counts.get(node_id, 0)})


def command(method, body):
    if method != "forget":
        raise UnknownMethod
    node_id = members(body, node_id=str)["node_id"]
    count = counts.pop(node_id, None)
    if count is None:
        raise NotFound("node " + node_id)
    timers.clear("silent/" + node_id)
    return {"node_id": node_id, "count": count}


def query(method, body):
    if method != "counts":
        raise UnknownMethod
    return dict(counts.items())
