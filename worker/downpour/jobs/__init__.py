"""The user's side of a cluster: submit jobs, follow them, take their results. Needs no torch.

::

    access      where the coordinator is, with which keys
    exchange    which requests are open, when they are repeated (no I/O)
    client      a blocking conversation with the coordinator
    submission  from a script or job file to a job
    status      a job's document with names and types
    logs        which bytes of which logs to read, lines from them (no I/O)
    follow      a job's logs and states until it ends
    download    a job's files
    api         ``downpour.submit``, ``downpour.job``, ``downpour.nodes``
"""
