"""``python -m downpour_server``: one shard process, told what it is by its launcher through the environment."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from types import FrameType

from downpour_common import exitcodes, failpoints, wire
from downpour_common.errors import DownpourError
from downpour_common.names import process_name
from downpour_common.transport.zeromq import ZmqClient, ZmqServer
from downpour_server.config import VARIABLE, ShardConfig


def main() -> int:
    """Serve until told to stop; an exit code."""
    text = os.environ.get(VARIABLE)
    if text is None or len(sys.argv) > 1:
        print(f"{__doc__}\n{VARIABLE} must hold a ShardConfig as JSON.", file=sys.stderr)  # noqa: T201
        return exitcodes.USAGE
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business; it ends the shard itself
    config = ShardConfig(**json.loads(text))
    # What torch loads stays; looking for garbage in it costs a tenth of a shard's start and most of its end.
    gc.disable()
    from downpour_server.service import ShardService, spare_threads, use_this_process

    gc.freeze()
    gc.enable()
    use_this_process(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        failpoints.arm(f"server/{config.index}", config.shard_epoch)
        server_keys, client_keys = config.transport_keys()
        data = ZmqServer(config.endpoint, keys=server_keys)
        control = ZmqClient(wire.CONTROL_HEADER_LIMIT, client_keys)
        try:
            follower_keys = config.follower_keys()
            ShardService(
                config,
                data,
                control,
                set_up=spare_threads,
                connect=lambda: ZmqClient(wire.CONTROL_HEADER_LIMIT, follower_keys),
                computed=time.process_time,
            ).run()
        finally:
            control.close()
            data.close()
    except DownpourError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"{process_name('server', config.index, config.shards)}: {error}", file=sys.stderr)  # noqa: T201
        return exitcodes.FAILED
    return exitcodes.OK


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
