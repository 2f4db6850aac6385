"""Publishes the running jobs as a document under an IPNS name."""

from dim import Message, UnknownMethod, config, ipns, now, state

# The running jobs, each with its start time.
running = state.Map("running/")


def handle(event):
    if not isinstance(event, Message):
        return
    job = event.json(job_id=str, event_type=str)
    was_running = job["job_id"] in running
    is_running = job["event_type"] == "running"
    if was_running == is_running:
        return
    if is_running:
        running[job["job_id"]] = now().isoformat()
    else:
        del running[job["job_id"]]
    ipns.update_state(config["key"], {"jobs": list(running)})


def query(method, body):
    if method != "running":
        raise UnknownMethod
    return list(running)
