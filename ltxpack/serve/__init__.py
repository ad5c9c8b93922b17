"""The server behind ``ltxpack serve``: the ``/v1/videos`` interface over HTTP, and a process for each device.

The HTTP process (:mod:`app`) accepts jobs (:mod:`intake`), keeps them in a database (:mod:`jobs`) and hands them to its
workers (:mod:`workers`). It imports no torch: only :mod:`worker`, which runs in the other processes, does.
"""
