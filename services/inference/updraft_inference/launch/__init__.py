"""Starts and supervises a server of an engine, with Updraft's plugin, an initial draft and the arguments that Updraft needs."""
