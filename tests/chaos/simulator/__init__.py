"""A whole job in one thread and virtual time: production state machines over a network, a disk and processes that fail.

Everything follows from a seed. What is Downpour's own runs as it is: :class:`downpour_server.service.ShardService` and
all below it, :class:`downpour.session.Session` with its client, control, engine and loaders,
:class:`downpour_coordinator.lifecycle.Lifecycle` and :class:`downpour_coordinator.service.JobService`. Replaced are
sockets (``network``), files (``disk``), clocks and threads (``kernel``), and who starts processes (``carrier``).
"""
