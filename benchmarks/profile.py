"""Where does the time of a training step go? A real job on this machine, worker's and shard's side, phase by phase.

`python benchmarks/profile.py --help`; benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import sys

if __name__ == "profile":
    # Beside this file, the other benchmarks find it where a library means the standard library's `profile`.
    import importlib.util
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location("profile", Path(sysconfig.get_path("stdlib")) / "profile.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["profile"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["profile"])
elif __name__ == "__main__":
    from bench_lib.step_profile_command import main

    sys.exit(main())
