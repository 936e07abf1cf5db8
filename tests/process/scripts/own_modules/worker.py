"""The user's own ``worker.py``, beside ``train.py``."""

LABEL = "from the user's own worker.py"
