"""The agent of one host: keeps to one coordinator, has the processes of jobs run there, and delivers what they wrote.

``state`` decides (with ``link``, ``logs``, ``process`` and ``download``), ``service`` carries out (with ``fetcher``,
``files``, ``folder`` and ``spawn``).
"""
