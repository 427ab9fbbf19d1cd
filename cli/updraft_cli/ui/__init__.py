"""The console: pages about drafts and their rollouts, served to the browser of the person who started it.

views (pure) <- security, samples, observer (reads a backend) <- pages, decisions, events, charts (HTTP) <- app <- server
"""
