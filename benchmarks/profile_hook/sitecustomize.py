"""Python imports this before anything else in every process that has this folder on its path (see ``profile.py``)."""

import os

if "BENCH_PROFILE" in os.environ:
    import step_recorder

    step_recorder.begin()
