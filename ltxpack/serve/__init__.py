"""The server behind ``ltxpack serve``: the ``/v1/videos`` interface over HTTP, and a worker for each device.

The HTTP process (:mod:`app`) accepts jobs (:mod:`intake`), keeps them in a database (:mod:`jobs`) and hands them to its
workers (:mod:`workers`): processes of this machine or actors of a Ray cluster (:mod:`ray_workers`). It imports no
torch: only :mod:`worker`, which runs in the workers, does. :mod:`ray_serve` is the same server as an application of Ray
Serve.
"""
