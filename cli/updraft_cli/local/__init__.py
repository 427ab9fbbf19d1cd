"""Local mode: all parts on one machine, without Kubernetes, as processes under one supervisor.

`plan` decides what to run, `supervisor` and `child` run any processes, and `stack` combines them on a data folder.
"""
