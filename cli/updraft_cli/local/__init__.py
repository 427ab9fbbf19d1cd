"""Local mode: everything but Kubernetes on one machine, as separate processes under one supervisor.

`plan` says what to run, `supervisor` and `child` run anything, `stack` puts both on a data folder.
"""
