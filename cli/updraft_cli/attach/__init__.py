"""Updraft beside a server that somebody else started: what it needs, and what a running one lacks."""
