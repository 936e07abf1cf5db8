"""The worker's side of the protocol: a state machine, the thread that runs it, and what the session calls."""
