"""Never comes to train; says so before any server can be ready, because it imports nothing heavy."""

import signal

print("is asleep")
signal.pause()
