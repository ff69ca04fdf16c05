#!/usr/bin/python3
"""Keep the lock and the history of a deployment in /var/lib/deploy-dsv3 on a head.

It runs in two ways and needs nothing but Python 3.6 and its standard library: as an Ansible module (the marker
WANT_JSON makes Ansible pass its arguments in a file), and carried over by deploy-dsv3, which calls `apply`.

Every step happens under a lock of the kernel on the folder, so that of two who come at once one is first. Ages
are judged by this host's clock alone.
"""

import contextlib
import fcntl
import json
import os
import sys
import time

DOCUMENTATION = """
module: dsv3_lock
short_description: Take, refresh and release the lock of a deployment
description:
  - One run at a time may change a deployment. The lock is a file on its head that names the run that holds it.
  - A lock whose holder has not refreshed it for as long as it said is stale, and is taken over.
options:
  do:
    description: C(take), C(refresh), C(release), C(break) (whoever holds it) or C(read).
    type: str
    choices: [take, refresh, release, break, read]
    required: true
  holder:
    description: Who takes it; C(run) tells runs apart, C(expires_s) is the longest time between two refreshes.
    type: dict
    default: {}
  replace:
    description: Run that is known to be dead, whose lock may be taken over at once.
    type: str
    default: ""
  entry:
    description: Line of the history that is added with the release.
    type: dict
    default: {}
  keep:
    description: Keep that line even where there is no deployment and no history yet.
    type: bool
    default: false
  forget:
    description: Remove the history with the lock, and the folder if nothing else is in it.
    type: bool
    default: false
author: [deploy-dsv3]
"""

EXAMPLES = """
- name: Take the deployment's lock
  dsv3_lock:
    do: take
    holder: {run: 20260101T000000Z-deploy-1a2b, who: alice, expires_s: 300}
"""

RETURN = """
done:
  description: Whether the lock was taken, refreshed, released or broken.
  returned: always
  type: bool
holder:
  description: Who held it before; null for nobody. C(silent_s) is the time since its last sign of life.
  returned: always
  type: dict
runs:
  description: The history, oldest first.
  returned: do=read
  type: list
"""

FOLDER = "var/lib/deploy-dsv3"
CONFIG = "etc/deploy-dsv3"


@contextlib.contextmanager
def alone(folder):
    """Hold the kernel's lock on the folder, made where it is missing."""
    while True:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever had it before may have removed the folder.
            if os.path.exists(folder) and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                yield
                return
        finally:
            os.close(descriptor)


def load(path):
    """Return the holder in a lock file; None without one. A file that is not JSON is held by nobody known."""
    try:
        with open(path, encoding="utf-8") as handle:
            holder = json.loads(handle.read())
    except FileNotFoundError:
        return None
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {"run": "", "heartbeat": os.stat(path).st_mtime}


def store(path, holder):
    """Write a lock file as a whole."""
    temporary = "%s.%d" % (path, os.getpid())
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(holder))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def history(path):
    """Return the entries of a history; a line that was cut off is left out."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as handle:
        for line in handle:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def append(path, entry):
    """Add an entry to a history."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def died(holder):
    """Return the entry of a run that never came to give its lock back."""
    kept = {key: holder.get(key, "") for key in ("run", "verb", "who", "host")}
    since, seen_last = holder.get("since", 0), holder.get("heartbeat", 0)
    return dict(kept, schema=1, started=since, seconds=round(seen_last - since, 1), result="died", exit_code=137)


def apply(request, root="/", now=time.time):
    """Do what `request` asks, see the module's options; returns what the module returns."""
    folder, config = os.path.join(root, FOLDER), os.path.join(root, CONFIG)
    lock, kept = os.path.join(folder, "lock.json"), os.path.join(folder, "history.jsonl")
    do, mine = request["do"], request.get("holder") or {}
    if do == "read":
        return {"done": True, "holder": seen(load(lock), now()), "runs": history(kept)}
    with alone(folder):
        holder = load(lock)
        answer = {"done": False, "holder": seen(holder, now())}
        if do == "take" and may_take(answer["holder"], mine, request.get("replace")):
            if holder and holder.get("run") != mine["run"]:
                append(kept, died(holder))
            store(lock, dict(mine, since=now(), heartbeat=now()))
            answer["done"] = True
        if do == "refresh" and holder and holder.get("run") == mine["run"]:
            store(lock, dict(holder, heartbeat=now()))
            answer["done"] = True
        if (do == "release" and holder and holder.get("run") == mine["run"]) or (do == "break" and holder):
            os.remove(lock)
            answer["done"] = True
        # A host that has never had a deployment is left without a trace of a run that changed nothing.
        if request.get("entry") and (request.get("keep") or any(map(os.path.exists, (kept, config)))):
            append(kept, request["entry"])
        if request.get("forget") and not os.path.exists(lock):
            with contextlib.suppress(FileNotFoundError):
                os.remove(kept)
        if not os.listdir(folder):
            os.rmdir(folder)
    return answer


def seen(holder, now):
    """Return the holder with the time since its last sign of life."""
    return dict(holder, silent_s=round(abs(now - holder.get("heartbeat", 0)), 1)) if holder else None


def may_take(holder, mine, replace):
    """Return whether nobody holds the lock, or only somebody who is gone."""
    if holder is None or holder.get("run") == mine["run"]:
        return True
    return bool(replace and holder.get("run") == replace) or holder["silent_s"] > holder.get("expires_s", 0)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as arguments:  # Ansible's WANT_JSON convention
        print(json.dumps(dict(apply(json.load(arguments)), changed=False)))
