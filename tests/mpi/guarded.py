"""Runs a program in a process of its own, whose death by a signal becomes an exit status of 1.

Where a process of the launcher's own is killed, the launcher kills all the others.
"""

from __future__ import annotations

import signal
import subprocess
import sys

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in which others are told of a failure; inherited
done = subprocess.run([sys.executable, *sys.argv[1:]], close_fds=False, check=False)
sys.exit(int(done.returncode != 0))
