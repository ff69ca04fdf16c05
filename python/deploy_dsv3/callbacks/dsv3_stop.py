"""Ansible callback: stops the run between two tasks when the operator asked for it.

Ansible answers SIGINT by killing the modules that are running. deploy-dsv3 writes a file instead, and this
plugin, called before each task, stops the run as Ctrl-C would, at a moment when nothing runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: dsv3_stop
type: aggregate
short_description: Stop between two tasks
description:
  - Stops the playbook before the next task once the file named by E(DEPLOY_DSV3_STOP_FILE) exists.
requirements:
  - enabled by deploy-dsv3 itself
"""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Looks for the file before each task and handler."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "dsv3_stop"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        """Tie Ansible's life to deploy-dsv3's: killed, it leaves nothing that goes on changing hosts."""
        super().__init__()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Called before a task is handed to the hosts."""
        self._stop_if_asked()

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Called before a handler is handed to the hosts."""
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        flag = os.environ.get("DEPLOY_DSV3_STOP_FILE", "")
        if flag and os.path.exists(flag):  # noqa: PTH110 - one system call before each task
            raise KeyboardInterrupt
