"""The ``downpour`` command: starts, watches and ends the processes of a job."""
